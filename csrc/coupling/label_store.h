// Boolean variables "this index is removed" and the equations between them.
//
// A label is a variable; label 0 is the constant "never removed". Labels form classes (equal
// variables); a class is free, frozen (never removed) or defined as the OR of other classes. A
// tensor dim of size n carries slots: labels in a (k, n) grid, zeros being padding; index i is
// removed iff any label of column i is.
//
// Every method only restricts which assignments are possible. Two facts keep definitions sound and
// acyclic: unions, definitions and freezes touch leaves only (roots without definition), and every
// operand is first expanded to its leaves.
//
// chanprune_ext/analysis/labels.py holds the reference implementation; both give equal results.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace chanprune {

// A read-only (rows, cols) grid of labels in the caller's memory; strides count elements.
struct SlotsView {
  const int64_t* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;

  int64_t at(int64_t row, int64_t col) const { return data[row * row_stride + col * col_stride]; }
};

// An owned (rows, cols) grid of labels in C order.
struct Slots {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<int64_t> data;

  SlotsView view() const { return {data.data(), rows, cols, cols, 1}; }
};

class LabelStore {
 public:
  // A class is defined as the OR of at most this many others; beyond, everything is tied.
  static constexpr size_t kMaxSlots = 8;

  explicit LabelStore(int64_t capacity);

  // Number of labels ever made, label 0 included.
  int64_t size() const { return static_cast<int64_t>(parent_.size()); }

  // Makes n consecutive labels on one new axis and returns the first.
  int64_t fresh(int64_t n);

  // Throws std::invalid_argument for a label outside [0, size()). The functions on one label leave
  // this to the caller, all others do it before anything changes.
  void check(const SlotsView& labels) const;

  // --- queries ---

  // Smallest label of the class.
  int64_t find(int64_t label);
  // Whether the class can never be removed (a defined one: all its parts can't).
  bool frozen(int64_t label);
  // Reason a label is frozen for; -1 if it is not, or is label 0.
  int64_t reason(int64_t label);
  int64_t axis(int64_t label);
  int64_t flags(int64_t label);
  // Live leaves of every column: distinct, packed to the top in order of first occurrence. Nothing
  // is returned where `slots` has this form already.
  std::optional<Slots> resolve(const SlotsView& slots);
  // Live (root, index) pairs in the order of index.
  std::vector<std::pair<int64_t, int64_t>> occurrences(const SlotsView& slots);
  // Every live root in ascending order with a hash of the list positions it occurs in (once per
  // index) and of its axis.
  std::vector<std::pair<int64_t, uint64_t>> signatures(const std::vector<SlotsView>& dims);

  // --- restrictions ---

  void freeze(const SlotsView& labels, int32_t reason);
  void set_flag(const SlotsView& labels, int64_t bit);
  // OR of column i of a == OR of column i of b, for every i and every assignment.
  void unify(const SlotsView& a, const SlotsView& b, int32_t reason);
  // All columns are removed together or not at all.
  void tie(const SlotsView& labels, int32_t reason);

  // --- data movement ---

  // Slots of two dims viewed as one: (k1, n1), (k2, n2) -> (k1 + k2, n1 * n2), C order.
  Slots merge(const SlotsView& a, const SlotsView& b);
  // Slots of one dim viewed as several in C order, one grid (k_j, sizes[j]) each.
  std::vector<Slots> split(const SlotsView& row, const std::vector<int64_t>& sizes, int32_t reason);

 private:
  using Label = int32_t;
  using Leaves = std::vector<Label>;
  enum class State : uint8_t { kFree, kFrozen, kDefined };
  struct Definition {
    int64_t start;  // into parts_
    int64_t count;
  };
  // Working state of one call of split.
  struct Splitting;

  Label root(Label label);
  Label axis_root(Label axis);
  // Rewrites the definition of a root as its leaves, frozen ones included.
  void flatten(Label root);
  // Calls visit(leaf) for every leaf of a label, frozen ones included, until it returns false.
  template <class Visit>
  bool each_leaf(Label label, Visit&& visit);
  void live_of(const SlotsView& slots, int64_t col, Leaves& out);
  bool is_resolved(const SlotsView& slots);
  // The reason that froze a column already, else the given one.
  int32_t cause(const SlotsView& slots, int64_t col, int32_t reason);
  void freeze_label(Label label, int32_t reason);
  void join(Label a, Label b);
  void join_all(const Leaves& leaves);
  void define(Label leaf, const Label* parts, size_t count);
  // OR of column `col` of a == OR of column `col` of b.
  void equate(const SlotsView& a, const SlotsView& b, int64_t col, int32_t reason);

  void number_classes(Splitting& work);
  void find_slices(Splitting& work);
  void place_slices(Splitting& work);
  void factor(Splitting& work, const std::vector<int32_t>& line,
              const std::vector<size_t>& varying);

  std::vector<Label> parent_;
  std::vector<State> state_;     // of roots
  std::vector<int32_t> detail_;  // of roots: reason if frozen, index into definitions_ if defined
  std::vector<uint8_t> flags_;   // of roots
  std::vector<Label> label_axis_;
  std::vector<Label> axis_parent_;
  std::vector<Definition> definitions_;
  std::vector<Label> parts_;
  // Dense numbering of the roots met during one call; -1 between calls.
  std::vector<int32_t> number_;
  // Scratch, kept to save allocations in the inner loops.
  Leaves left_, right_, only_left_, only_right_, pending_, visited_, flat_;
};

}  // namespace chanprune
