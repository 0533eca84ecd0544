#include "coupling/label_store.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace chanprune {

namespace {

constexpr uint64_t kHashSeed = 0x243F6A8885A308D3;
constexpr uint64_t kAxisSeed = 0x13198A2E03707344;

// The splitmix64 finaliser (Steele, Lea, Flood 2014): a 64-bit bijection that scatters.
uint64_t mix(uint64_t word) {
  word += 0x9E3779B97F4A7C15;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
  return word ^ (word >> 31);
}

template <class T>
bool contains(const std::vector<T>& values, T value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

template <class T>
void push_new(std::vector<T>& values, T value) {
  if (!contains(values, value)) {
    values.push_back(value);
  }
}

}  // namespace

LabelStore::LabelStore(int64_t capacity) : axis_parent_{0} {
  const size_t room = static_cast<size_t>(std::max<int64_t>(capacity, 16));
  parent_.reserve(room);
  state_.reserve(room);
  detail_.reserve(room);
  flags_.reserve(room);
  label_axis_.reserve(room);
  number_.reserve(room);
  parent_.push_back(0);
  state_.push_back(State::kFrozen);
  detail_.push_back(-1);
  flags_.push_back(0);
  label_axis_.push_back(0);
  number_.push_back(-1);
}

int64_t LabelStore::fresh(int64_t n) {
  const int64_t first = size();
  if (n < 0) {
    throw std::invalid_argument("n should be the number of labels to make (>= 0), got " +
                                std::to_string(n));
  }
  if (n > std::numeric_limits<Label>::max() - first) {
    throw std::invalid_argument("n should leave the store below 2^31 labels, got " +
                                std::to_string(n) + " on top of " + std::to_string(first));
  }
  if (n == 0) {
    return first;
  }
  const Label axis = static_cast<Label>(axis_parent_.size());
  axis_parent_.push_back(axis);
  const size_t end = static_cast<size_t>(first + n);
  if (end > parent_.capacity()) {
    // resize() alone would grow to the exact size asked for, copying everything on every call.
    const size_t room = std::max(end, 2 * parent_.capacity());
    parent_.reserve(room);
    state_.reserve(room);
    detail_.reserve(room);
    flags_.reserve(room);
    label_axis_.reserve(room);
    number_.reserve(room);
  }
  for (int64_t label = first; label < first + n; ++label) {
    parent_.push_back(static_cast<Label>(label));
  }
  state_.resize(end, State::kFree);
  detail_.resize(end, -1);
  flags_.resize(end, 0);
  label_axis_.resize(end, axis);
  number_.resize(end, -1);
  return first;
}

// ------------------------------------------------------------------------------- classes

void LabelStore::check(const SlotsView& labels) const {
  int64_t least = 0;
  int64_t most = 0;
  for (int64_t row = 0; row < labels.rows; ++row) {
    for (int64_t col = 0; col < labels.cols; ++col) {
      least = std::min(least, labels.at(row, col));
      most = std::max(most, labels.at(row, col));
    }
  }
  if (least < 0 || most >= size()) {
    throw std::invalid_argument("labels should lie in [0, " + std::to_string(size()) + "), got " +
                                std::to_string(least < 0 ? least : most));
  }
}

LabelStore::Label LabelStore::root(Label label) {
  while (parent_[label] != label) {
    parent_[label] = parent_[parent_[label]];
    label = parent_[label];
  }
  return label;
}

LabelStore::Label LabelStore::axis_root(Label axis) {
  while (axis_parent_[axis] != axis) {
    axis_parent_[axis] = axis_parent_[axis_parent_[axis]];
    axis = axis_parent_[axis];
  }
  return axis;
}

void LabelStore::flatten(Label root_label) {
  Definition& definition = definitions_[detail_[root_label]];
  const Label* parts = parts_.data() + definition.start;
  bool flat = true;
  for (int64_t i = 0; flat && i < definition.count; ++i) {
    flat = parent_[parts[i]] == parts[i] && state_[parts[i]] != State::kDefined;
  }
  if (flat) {
    return;
  }
  flat_.clear();
  visited_.clear();
  pending_.assign(std::make_reverse_iterator(parts + definition.count),
                  std::make_reverse_iterator(parts));
  while (!pending_.empty()) {
    const Label part = root(pending_.back());
    pending_.pop_back();
    if (contains(visited_, part)) {
      continue;
    }
    visited_.push_back(part);
    if (state_[part] == State::kDefined) {
      const Definition& inner = definitions_[detail_[part]];
      for (int64_t i = inner.count; i-- > 0;) {
        pending_.push_back(parts_[inner.start + i]);
      }
    } else {
      flat_.push_back(part);
    }
  }
  const int64_t count = static_cast<int64_t>(flat_.size());
  if (count > definition.count) {
    definition.start = static_cast<int64_t>(parts_.size());
    parts_.insert(parts_.end(), flat_.begin(), flat_.end());
  } else {
    std::copy(flat_.begin(), flat_.end(), parts_.begin() + definition.start);
  }
  definition.count = count;
}

template <class Visit>
bool LabelStore::each_leaf(Label label, Visit&& visit) {
  const Label top = root(label);
  if (state_[top] != State::kDefined) {
    return visit(top);
  }
  flatten(top);
  const Definition definition = definitions_[detail_[top]];
  for (int64_t i = 0; i < definition.count; ++i) {
    if (!visit(parts_[definition.start + i])) {
      return false;
    }
  }
  return true;
}

void LabelStore::live_of(const SlotsView& slots, int64_t col, Leaves& out) {
  out.clear();
  for (int64_t row = 0; row < slots.rows; ++row) {
    each_leaf(static_cast<Label>(slots.at(row, col)), [&](Label leaf) {
      if (state_[leaf] == State::kFree) {
        push_new(out, leaf);
      }
      return true;
    });
  }
}

// ------------------------------------------------------------------------------- queries

int64_t LabelStore::find(int64_t label) { return root(static_cast<Label>(label)); }

bool LabelStore::frozen(int64_t label) {
  return each_leaf(static_cast<Label>(label),
                   [&](Label leaf) { return state_[leaf] == State::kFrozen; });
}

int64_t LabelStore::reason(int64_t label) {
  int64_t found = -1;
  const bool all_frozen = each_leaf(static_cast<Label>(label), [&](Label leaf) {
    if (state_[leaf] == State::kFrozen && found < 0) {
      found = detail_[leaf];
    }
    return state_[leaf] == State::kFrozen;
  });
  return all_frozen ? std::max<int64_t>(found, -1) : -1;
}

int64_t LabelStore::axis(int64_t label) { return axis_root(label_axis_[label]); }

int64_t LabelStore::flags(int64_t label) { return flags_[root(static_cast<Label>(label))]; }

bool LabelStore::is_resolved(const SlotsView& slots) {
  int64_t deepest = 0;
  for (int64_t col = 0; col < slots.cols; ++col) {
    bool ended = false;
    for (int64_t row = 0; row < slots.rows; ++row) {
      const int64_t label = slots.at(row, col);
      if (label == 0) {
        ended = true;
        continue;
      }
      if (ended || parent_[label] != label || state_[label] != State::kFree) {
        return false;
      }
      for (int64_t above = 0; above < row; ++above) {
        if (slots.at(above, col) == label) {
          return false;
        }
      }
      deepest = std::max(deepest, row + 1);
    }
  }
  return deepest == slots.rows;
}

std::optional<Slots> LabelStore::resolve(const SlotsView& slots) {
  check(slots);
  if (is_resolved(slots)) {
    return std::nullopt;
  }
  Slots result;
  result.cols = slots.cols;
  for (int64_t col = 0; col < slots.cols; ++col) {
    live_of(slots, col, left_);
    const int64_t count = static_cast<int64_t>(left_.size());
    if (count > result.rows) {
      result.rows = count;
      result.data.resize(static_cast<size_t>(count * result.cols), 0);
    }
    for (int64_t row = 0; row < count; ++row) {
      result.data[row * result.cols + col] = left_[row];
    }
  }
  return result;
}

std::vector<std::pair<int64_t, int64_t>> LabelStore::occurrences(const SlotsView& slots) {
  check(slots);
  std::vector<std::pair<int64_t, int64_t>> pairs;
  pairs.reserve(static_cast<size_t>(slots.cols));
  for (int64_t col = 0; col < slots.cols; ++col) {
    live_of(slots, col, left_);
    for (const Label leaf : left_) {
      pairs.emplace_back(leaf, col);
    }
  }
  return pairs;
}

std::vector<std::pair<int64_t, uint64_t>> LabelStore::signatures(
    const std::vector<SlotsView>& dims) {
  for (const SlotsView& dim : dims) {
    check(dim);
  }
  std::vector<std::pair<int64_t, uint64_t>> sums;
  for (size_t position = 0; position < dims.size(); ++position) {
    const uint64_t term = mix(kHashSeed + position);
    for (int64_t col = 0; col < dims[position].cols; ++col) {
      live_of(dims[position], col, left_);
      for (const Label leaf : left_) {
        if (number_[leaf] < 0) {
          number_[leaf] = static_cast<int32_t>(sums.size());
          sums.emplace_back(leaf, 0);
        }
        sums[number_[leaf]].second += term;
      }
    }
  }
  for (auto& [leaf, hash] : sums) {
    number_[leaf] = -1;
    hash = mix(hash + mix(kAxisSeed + static_cast<uint64_t>(axis(leaf))));
  }
  std::sort(sums.begin(), sums.end());
  return sums;
}

// -------------------------------------------------------------------------- restrictions

int32_t LabelStore::cause(const SlotsView& slots, int64_t col, int32_t reason_given) {
  for (int64_t row = 0; row < slots.rows; ++row) {
    const int64_t earlier = reason(slots.at(row, col));
    if (earlier >= 0) {
      return static_cast<int32_t>(earlier);
    }
  }
  return reason_given;
}

void LabelStore::freeze_label(Label label, int32_t reason_given) {
  each_leaf(label, [&](Label leaf) {
    if (state_[leaf] == State::kFree) {
      state_[leaf] = State::kFrozen;
      detail_[leaf] = reason_given;
    }
    return true;
  });
}

void LabelStore::freeze(const SlotsView& labels, int32_t reason_given) {
  check(labels);
  for (int64_t row = 0; row < labels.rows; ++row) {
    for (int64_t col = 0; col < labels.cols; ++col) {
      freeze_label(static_cast<Label>(labels.at(row, col)), reason_given);
    }
  }
}

void LabelStore::set_flag(const SlotsView& labels, int64_t bit) {
  if (bit < 1 || bit > 128 || (bit & (bit - 1)) != 0) {
    throw std::invalid_argument("bit should be a power of two from 1 to 128, got " +
                                std::to_string(bit));
  }
  check(labels);
  const uint8_t mask = static_cast<uint8_t>(bit);
  for (int64_t row = 0; row < labels.rows; ++row) {
    for (int64_t col = 0; col < labels.cols; ++col) {
      const Label top = root(static_cast<Label>(labels.at(row, col)));
      if (top == 0) {
        continue;
      }
      flags_[top] |= mask;
      each_leaf(top, [&](Label leaf) {
        flags_[leaf] |= mask;
        return true;
      });
    }
  }
}

void LabelStore::join(Label a, Label b) {
  a = root(a);
  b = root(b);
  if (a == b) {
    return;
  }
  if (b < a) {
    std::swap(a, b);
  }
  parent_[b] = a;
  flags_[a] |= flags_[b];
  Label axis_a = axis_root(label_axis_[a]);
  Label axis_b = axis_root(label_axis_[b]);
  if (axis_b < axis_a) {
    std::swap(axis_a, axis_b);
  }
  axis_parent_[axis_b] = axis_a;
}

void LabelStore::join_all(const Leaves& leaves) {
  for (const Label leaf : leaves) {
    join(leaves.front(), leaf);
  }
}

void LabelStore::define(Label leaf, const Label* parts, size_t count) {
  state_[leaf] = State::kDefined;
  detail_[leaf] = static_cast<int32_t>(definitions_.size());
  definitions_.push_back({static_cast<int64_t>(parts_.size()), static_cast<int64_t>(count)});
  for (size_t i = 0; i < count; ++i) {
    parts_.push_back(parts[i]);
    flags_[root(parts[i])] |= flags_[leaf];
  }
}

void LabelStore::equate(const SlotsView& a, const SlotsView& b, int64_t col, int32_t reason_given) {
  live_of(a, col, left_);
  live_of(b, col, right_);
  only_left_.clear();
  only_right_.clear();
  for (const Label leaf : left_) {
    if (!contains(right_, leaf)) {
      only_left_.push_back(leaf);
    }
  }
  for (const Label leaf : right_) {
    if (!contains(left_, leaf)) {
      only_right_.push_back(leaf);
    }
  }
  if (only_left_.empty() || only_right_.empty()) {
    if (only_left_.empty() && only_right_.empty()) {
      return;
    }
    if (left_.empty()) {
      reason_given = cause(a, col, reason_given);
    } else if (right_.empty()) {
      reason_given = cause(b, col, reason_given);
    }
    for (const Leaves* leaves : {&only_left_, &only_right_}) {
      for (const Label leaf : *leaves) {
        freeze_label(leaf, reason_given);
      }
    }
  } else if (only_left_.size() == only_right_.size()) {
    for (size_t i = 0; i < only_left_.size(); ++i) {
      join(only_left_[i], only_right_[i]);
    }
  } else if (only_left_.size() == 1 && only_right_.size() <= kMaxSlots) {
    define(only_left_[0], only_right_.data(), only_right_.size());
  } else if (only_right_.size() == 1 && only_left_.size() <= kMaxSlots) {
    define(only_right_[0], only_left_.data(), only_left_.size());
  } else {
    only_left_.insert(only_left_.end(), only_right_.begin(), only_right_.end());
    join_all(only_left_);
  }
}

void LabelStore::unify(const SlotsView& a, const SlotsView& b, int32_t reason_given) {
  if (a.cols != b.cols) {
    throw std::invalid_argument("a and b should be slots of dims of one size, got " +
                                std::to_string(a.cols) + " and " + std::to_string(b.cols) +
                                " columns");
  }
  check(a);
  check(b);
  const bool single = a.rows == 1 && b.rows == 1;
  for (int64_t col = 0; col < a.cols; ++col) {
    if (single) {
      const Label x = root(static_cast<Label>(a.at(0, col)));
      const Label y = root(static_cast<Label>(b.at(0, col)));
      if (x == y) {
        continue;
      }
      if (state_[x] == State::kFree && state_[y] == State::kFree) {
        join(x, y);
        continue;
      }
    }
    equate(a, b, col, reason_given);
  }
}

void LabelStore::tie(const SlotsView& labels, int32_t reason_given) {
  check(labels);
  Leaves all;
  for (int64_t col = 0; col < labels.cols; ++col) {
    live_of(labels, col, left_);
    if (left_.empty()) {
      freeze(labels, cause(labels, col, reason_given));
      return;
    }
    all.insert(all.end(), left_.begin(), left_.end());
  }
  join_all(all);
}

}  // namespace chanprune
