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

// One label list per index of a dim, kept as slots from the start.
class Columns {
 public:
  explicit Columns(int64_t size) : filled_(size, 0) { slots_.cols = size; }

  void append(int64_t index, int64_t label) {
    const int64_t row = filled_[index]++;
    if (row == slots_.rows) {
      slots_.data.resize(static_cast<size_t>(++slots_.rows * slots_.cols), 0);
    }
    slots_.data[row * slots_.cols + index] = label;
  }

  void append_new(int64_t index, int64_t label) {
    for (int64_t row = 0; row < filled_[index]; ++row) {
      if (slots_.data[row * slots_.cols + index] == label) {
        return;
      }
    }
    append(index, label);
  }

  Slots take() { return std::move(slots_); }

 private:
  std::vector<int32_t> filled_;
  Slots slots_;
};

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

// ------------------------------------------------------------------------- data movement

Slots LabelStore::merge(const SlotsView& a, const SlotsView& b) {
  check(a);
  check(b);
  Slots result;
  result.rows = a.rows + b.rows;
  result.cols = a.cols * b.cols;
  result.data.reserve(static_cast<size_t>(result.rows * result.cols));
  for (int64_t row = 0; row < a.rows; ++row) {
    for (int64_t i = 0; i < a.cols; ++i) {
      result.data.insert(result.data.end(), static_cast<size_t>(b.cols), a.at(row, i));
    }
  }
  for (int64_t row = 0; row < b.rows; ++row) {
    for (int64_t i = 0; i < a.cols; ++i) {
      for (int64_t j = 0; j < b.cols; ++j) {
        result.data.push_back(b.at(row, j));
      }
    }
  }
  return result;
}

// A class is known by its number in here; -1 stands for "none" in a grid of numbers.
struct LabelStore::Splitting {
  static constexpr int32_t kMixed = -1;    // varies along several axes
  static constexpr int32_t kNowhere = -2;  // frozen by this call

  // Labels made for one row of mixed classes: one run of labels per varying axis.
  struct Factors {
    std::vector<size_t> axes;
    std::vector<int64_t> first_label;
  };

  const SlotsView given;
  const std::vector<int64_t>& sizes;
  const int32_t reason;
  const SlotsView rows;                  // `given`, resolved
  std::vector<int64_t> strides = {};     // of the axes, C order
  std::vector<size_t> wide = {};         // axes longer than 1
  std::vector<Columns> columns = {};     // the result, per axis
  std::vector<int32_t> numbers = {};     // class at each (row, position)
  std::vector<Label> classes = {};       // root of each class
  std::vector<int64_t> counts = {};      // positions of each class
  std::vector<int32_t> owner = {};       // axis of each class, kMixed or kNowhere
  std::vector<Factors> factors = {};     // per factored row
  std::vector<int32_t> defined_in = {};  // factored row that defined a class, or -1
  std::vector<int64_t> defined_at = {};  // position where it did

  int64_t coordinate(int64_t position, size_t axis) const {
    return position / strides[axis] % sizes[axis];
  }

  void labels_at(const Factors& of, int64_t position, std::vector<int64_t>& out) const {
    out.clear();
    for (size_t i = 0; i < of.axes.size(); ++i) {
      out.push_back(of.first_label[i] + coordinate(position, of.axes[i]));
    }
  }

  bool varies(const std::vector<int32_t>& line, size_t axis) const {
    for (int64_t position = 0; position < rows.cols; ++position) {
      const int64_t origin = position - coordinate(position, axis) * strides[axis];
      if (line[position] != line[origin]) {
        return true;
      }
    }
    return false;
  }
};

void LabelStore::number_classes(Splitting& work) {
  work.numbers.reserve(static_cast<size_t>(work.rows.rows * work.rows.cols));
  for (int64_t row = 0; row < work.rows.rows; ++row) {
    for (int64_t position = 0; position < work.rows.cols; ++position) {
      const Label label = static_cast<Label>(work.rows.at(row, position));
      if (label == 0) {
        work.numbers.push_back(-1);
        continue;
      }
      if (number_[label] < 0) {
        number_[label] = static_cast<int32_t>(work.classes.size());
        work.classes.push_back(label);
        work.counts.push_back(0);
      }
      work.numbers.push_back(number_[label]);
      ++work.counts[number_[label]];
    }
  }
  for (const Label label : work.classes) {
    number_[label] = -1;
  }
}

// Gives every class that fills whole slices of one axis to it, and freezes what fills everything.
void LabelStore::find_slices(Splitting& work) {
  const int64_t n = work.rows.cols;
  work.owner.assign(work.classes.size(), Splitting::kMixed);
  std::vector<int64_t> touched(work.classes.size());
  std::vector<int64_t> last(work.classes.size());
  for (const size_t axis : work.wide) {
    const int64_t slice = n / work.sizes[axis];
    const bool possible = std::any_of(work.counts.begin(), work.counts.end(),
                                      [slice](int64_t count) { return count % slice == 0; });
    if (!possible) {
      continue;
    }
    std::fill(touched.begin(), touched.end(), 0);
    std::fill(last.begin(), last.end(), -1);
    const int64_t inner = work.strides[axis];
    for (int64_t i = 0; i < work.sizes[axis]; ++i) {
      for (int64_t start = i * inner; start < n; start += inner * work.sizes[axis]) {
        for (int64_t position = start; position < start + inner; ++position) {
          for (int64_t row = 0; row < work.rows.rows; ++row) {
            const int32_t id = work.numbers[row * n + position];
            if (id >= 0 && last[id] != i) {
              last[id] = i;
              ++touched[id];
            }
          }
        }
      }
    }
    for (size_t id = 0; id < work.classes.size(); ++id) {
      if (work.owner[id] == Splitting::kMixed && work.counts[id] == touched[id] * slice) {
        work.owner[id] = static_cast<int32_t>(axis);
      }
    }
  }
  for (size_t id = 0; id < work.classes.size(); ++id) {
    if (work.counts[id] == n) {
      work.owner[id] = Splitting::kNowhere;
      freeze_label(work.classes[id], work.reason);
    }
  }
}

void LabelStore::place_slices(Splitting& work) {
  const int64_t n = work.rows.cols;
  for (size_t entry = 0; entry < work.numbers.size(); ++entry) {
    const int32_t id = work.numbers[entry];
    if (id >= 0 && work.owner[id] >= 0) {
      const size_t axis = static_cast<size_t>(work.owner[id]);
      const int64_t position = static_cast<int64_t>(entry) % n;
      work.columns[axis].append_new(work.coordinate(position, axis), work.classes[id]);
    }
  }
}

// Gives each varying axis new labels and makes every class of the row the OR of its own.
void LabelStore::factor(Splitting& work, const std::vector<int32_t>& line,
                        const std::vector<size_t>& varying) {
  const int32_t current = static_cast<int32_t>(work.factors.size());
  work.factors.push_back({varying, {}});
  Splitting::Factors& factors = work.factors.back();
  for (const size_t axis : varying) {
    const int64_t first = fresh(work.sizes[axis]);
    factors.first_label.push_back(first);
    for (int64_t i = 0; i < work.sizes[axis]; ++i) {
      work.columns[axis].append(i, first + i);
    }
  }
  std::vector<int64_t> labels;
  std::vector<int64_t> earlier;
  Leaves parts;
  for (int64_t position = 0; position < work.rows.cols; ++position) {
    work.labels_at(factors, position, labels);
    const int32_t id = line[position];
    const int64_t count = static_cast<int64_t>(labels.size());
    if (id < 0) {
      freeze({labels.data(), 1, count, count, 1}, cause(work.given, position, work.reason));
    } else if (work.defined_in[id] < 0) {
      work.defined_in[id] = current;
      work.defined_at[id] = position;
      parts.assign(labels.begin(), labels.end());
      define(work.classes[id], parts.data(), parts.size());
    } else {
      work.labels_at(work.factors[work.defined_in[id]], work.defined_at[id], earlier);
      if (earlier.size() == labels.size()) {
        unify({labels.data(), 1, count, count, 1}, {earlier.data(), 1, count, count, 1},
              work.reason);
      } else {
        const int64_t others = static_cast<int64_t>(earlier.size());
        equate({labels.data(), count, 1, 1, 1}, {earlier.data(), others, 1, 1, 1}, 0, work.reason);
      }
    }
  }
}

std::vector<Slots> LabelStore::split(const SlotsView& row, const std::vector<int64_t>& sizes,
                                     int32_t reason_given) {
  int64_t product = 1;
  bool valid = true;
  for (const int64_t size : sizes) {
    valid = valid && size >= 0 && (size == 0 || product <= std::numeric_limits<Label>::max());
    product *= valid ? size : 0;
  }
  if (!valid || product != row.cols) {
    std::string listed;
    for (const int64_t size : sizes) {
      listed += (listed.empty() ? "" : ", ") + std::to_string(size);
    }
    throw std::invalid_argument("sizes should have the product " + std::to_string(row.cols) +
                                ", got [" + listed + "]");
  }
  const std::optional<Slots> changed = resolve(row);
  Splitting work{row, sizes, reason_given, changed ? changed->view() : row};
  const int64_t n = row.cols;
  work.strides.assign(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    work.strides[axis - 1] = work.strides[axis] * sizes[axis];
  }
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    work.columns.emplace_back(sizes[axis]);
    if (sizes[axis] > 1) {
      work.wide.push_back(axis);
    }
  }
  if (sizes.empty()) {
    freeze(row, reason_given);
  } else if (n > 0 && work.wide.size() < 2) {
    Columns& home = work.columns[work.wide.empty() ? 0 : work.wide[0]];
    for (int64_t slot = 0; slot < work.rows.rows; ++slot) {
      for (int64_t i = 0; i < n; ++i) {
        if (work.rows.at(slot, i) != 0) {
          home.append(i, work.rows.at(slot, i));
        }
      }
    }
  } else if (n > 0) {
    number_classes(work);
    find_slices(work);
    place_slices(work);
    work.defined_in.assign(work.classes.size(), -1);
    work.defined_at.assign(work.classes.size(), -1);
    // What is left, moved up so that fewer rows have holes: a hole freezes the labels it gets.
    std::vector<std::vector<int32_t>> mixed;
    for (int64_t position = 0; position < n; ++position) {
      size_t depth = 0;
      for (int64_t slot = 0; slot < work.rows.rows; ++slot) {
        const int32_t id = work.numbers[slot * n + position];
        if (id >= 0 && work.owner[id] == Splitting::kMixed) {
          if (depth == mixed.size()) {
            mixed.emplace_back(static_cast<size_t>(n), -1);
          }
          mixed[depth++][position] = id;
        }
      }
    }
    for (const std::vector<int32_t>& line : mixed) {
      std::vector<size_t> varying;
      std::copy_if(work.wide.begin(), work.wide.end(), std::back_inserter(varying),
                   [&](size_t axis) { return work.varies(line, axis); });
      if (varying.size() > 1) {
        factor(work, line, varying);
        continue;
      }
      for (int64_t position = 0; position < n; ++position) {
        if (line[position] >= 0) {
          work.columns[varying[0]].append_new(work.coordinate(position, varying[0]),
                                              work.classes[line[position]]);
        }
      }
    }
  }
  std::vector<Slots> result;
  for (Columns& column : work.columns) {
    result.push_back(column.take());
  }
  return result;
}

}  // namespace chanprune
