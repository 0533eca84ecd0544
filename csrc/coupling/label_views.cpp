// Labels of a dim that is viewed as several, and of several that are viewed as one.
#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "coupling/label_store.h"

namespace chanprune {

namespace {

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
