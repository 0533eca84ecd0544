// slice_channels on the CPU.
#include "slice_channels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/simd.h"
#include "cpu/window_gather.h"

namespace chanprune {
namespace {

constexpr int64_t kGrainBytes = 131072;  // bytes worth a thread
constexpr int64_t kUnitBytes = 65536;    // bytes of rows handed out together
constexpr int64_t kShortCopy = 256;      // up to here vector copies in line beat a memcpy call
constexpr int64_t kPrefetch = 1024;      // bytes read ahead of short columns
constexpr int64_t kLongSegment = 256;    // from this mean on, adjacent columns are worth joining
constexpr int64_t kGatherBytes = 24;     // below this mean segment, elements are gathered singly
constexpr int64_t kGathered = 4;         // elements, stored together
constexpr int64_t kWindowRows = 8;       // from here on windows are worth planning

// Adjacent kept columns, copied as one.
struct Segment {
  int64_t offset;  // bytes from the start of the source row
  int64_t bytes;
};

template <typename Word>
CHANPRUNE_INLINE void copy_word(char* destination, const char* source) {
  Word word;
  std::memcpy(&word, source, sizeof(Word));
  std::memcpy(destination, &word, sizeof(Word));
}

struct Word16 {
  uint64_t low;
  uint64_t high;
};

// Copies n bytes by whole words, the last one overlapping its neighbour.
template <typename Word>
CHANPRUNE_INLINE void copy_overlapping(char* destination, const char* source, int64_t n) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Word));
  for (int64_t i = 0; i + kSize < n; i += kSize) {
    copy_word<Word>(destination + i, source + i);
  }
  copy_word<Word>(destination + n - kSize, source + n - kSize);
}

CHANPRUNE_INLINE void copy_bytes(char* destination, const char* source, int64_t n) {
  if (n > kShortCopy) {
    std::memcpy(destination, source, static_cast<size_t>(n));
  } else if (n >= 16) {
    copy_overlapping<Word16>(destination, source, n);
  } else if (n >= 8) {
    copy_overlapping<uint64_t>(destination, source, n);
  } else if (n >= 4) {
    copy_overlapping<uint32_t>(destination, source, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      destination[i] = source[i];
    }
  }
}

// Rows [begin, end) of a task and where their first byte goes.
struct RowRange {
  const SliceTask* task;
  int64_t begin;
  int64_t end;
  char* destination;
};

CHANPRUNE_INLINE const char* source_row(const SliceTask& task, int64_t row) {
  return task.source + (task.row_index == nullptr ? row : task.row_index[row]) * task.row_stride;
}

// Copies the same segments of every row, one after the other.
CHANPRUNE_CLONES void copy_segments(const RowRange& range, const Segment* segments, int64_t count) {
  const SliceTask task = *range.task;  // a local copy: the bytes written could alias the original
  char* destination = range.destination;
  for (int64_t r = range.begin; r < range.end; ++r) {
    const char* row = source_row(task, r);
    for (int64_t m = 0; m < task.mids; ++m) {
      const char* source = row + m * task.mid_stride;
      for (int64_t s = 0; s < count; ++s) {
        copy_bytes(destination, source + segments[s].offset, segments[s].bytes);
        destination += segments[s].bytes;
      }
    }
  }
}

// Collects single elements. Not cloned: hardware gathers lose to scalar loads from cache.
template <typename Word>
void gather(const RowRange& range) {
  const SliceTask task = *range.task;
  char* destination = range.destination;
  for (int64_t r = range.begin; r < range.end; ++r) {
    const char* row = source_row(task, r);
    for (int64_t m = 0; m < task.mids; ++m) {
      const char* source = row + m * task.mid_stride;
      int64_t c = 0;
      for (; c + kGathered <= task.cols; c += kGathered) {
        Word words[kGathered];
        for (int64_t k = 0; k < kGathered; ++k) {
          std::memcpy(&words[k], source + task.col_index[c + k] * task.col_stride, sizeof(Word));
        }
        std::memcpy(destination, words, sizeof(words));
        destination += sizeof(words);
      }
      for (; c < task.cols; ++c) {
        copy_word<Word>(destination, source + task.col_index[c] * task.col_stride);
        destination += sizeof(Word);
      }
    }
  }
}

void gather_windows(const RowRange& range, const std::vector<GatherWindow>& windows) {
  const SliceTask& task = *range.task;
  char* destination = range.destination;
  int64_t room = (range.end - range.begin) * task.mids * task.cols;
  for (int64_t r = range.begin; r < range.end; ++r) {
    const char* row = source_row(task, r);
    const int64_t ahead = task.mids > 1       ? task.mid_stride
                          : r + 1 < range.end ? source_row(task, r + 1) - row
                                              : 0;
    for (int64_t m = 0; m < task.mids; ++m) {
      gather_row(row + m * task.mid_stride, windows, destination, room, ahead);
      destination += task.cols * task.run;
      room -= task.cols;
    }
  }
}

template <int64_t Bytes>
struct Block {
  char bytes[Bytes];
};

// Copies every column by itself: `Blocks` words from its front and as many from its end, which
// overlap. Without a branch that depends on the column list none is mispredicted.
template <typename Word, int64_t Blocks>
CHANPRUNE_CLONES void copy_columns(const RowRange& range) {
  const SliceTask task = *range.task;
  constexpr auto kSize = static_cast<int64_t>(sizeof(Word));
  const int64_t from_end = task.run - Blocks * kSize;
  char* destination = range.destination;
  for (int64_t r = range.begin; r < range.end; ++r) {
    const char* row = source_row(task, r);
    for (int64_t c = 0; c < task.cols; ++c) {
      const char* source = row + task.col_index[c] * task.col_stride;
      __builtin_prefetch(source + kPrefetch);
      for (int64_t i = 0; i < Blocks; ++i) {
        copy_word<Word>(destination + i * kSize, source + i * kSize);
      }
      for (int64_t i = 0; i < Blocks; ++i) {
        copy_word<Word>(destination + from_end + i * kSize, source + from_end + i * kSize);
      }
      destination += task.run;
    }
  }
}

// The copy_columns for a run of this many bytes, null where there is none.
using ColumnCopy = void (*)(const RowRange&);

ColumnCopy column_copy(int64_t run) {
  if (run < 8 || run > kLongSegment) {
    return nullptr;
  }
  return run < 16    ? &copy_columns<uint64_t, 1>
         : run < 32  ? &copy_columns<Block<16>, 1>
         : run < 64  ? &copy_columns<Block<32>, 1>
         : run < 128 ? &copy_columns<Block<32>, 2>
                     : &copy_columns<Block<32>, 4>;
}

// A task made ready for row-wise execution, in the first of these ways that is set; with none of
// them single elements are gathered.
struct RowCopier {
  SliceTask task;
  ColumnCopy columns;
  std::vector<GatherWindow> windows;
  std::vector<Segment> segments;
  int64_t row_bytes;  // of the result
  int64_t rows_per_unit;
};

std::vector<Segment> column_segments(const SliceTask& task) {
  std::vector<Segment> segments;
  segments.reserve(static_cast<size_t>(task.cols));
  for (int64_t j = 0; j < task.cols; ++j) {
    const int64_t column = task.col_index == nullptr ? j : task.col_index[j];
    const int64_t offset = column * task.col_stride;
    if (!segments.empty() && segments.back().offset + segments.back().bytes == offset) {
      segments.back().bytes += task.run;
    } else {
      segments.push_back({offset, task.run});
    }
  }
  return segments;
}

RowCopier prepare(const SliceTask& task) {
  RowCopier copier{task, nullptr, {}, {}, task.mids * task.cols * task.run, 1};
  copier.rows_per_unit = std::max<int64_t>(1, kUnitBytes / copier.row_bytes);
  const int64_t bytes = task.cols * task.run;
  if (task.col_index != nullptr) {
    const int64_t segments = task.col_stride == task.run ? task.col_runs : task.cols;
    const bool long_segments = bytes >= segments * kLongSegment;
    if (task.run != task.element) {
      copier.columns = long_segments ? nullptr : column_copy(task.run);
      if (copier.columns != nullptr) {
        return copier;
      }
    } else {
      const bool pays = task.rows * task.mids >= kWindowRows && !long_segments;
      if (pays && task.run == 4 && task.col_stride == 4) {
        copier.windows = plan_windows(task.col_index, task.cols);
      }
      if (!copier.windows.empty() || bytes < segments * kGatherBytes) {
        return copier;
      }
    }
  }
  copier.segments = column_segments(task);
  return copier;
}

void copy_rows(const RowCopier& copier, int64_t begin, int64_t end) {
  const RowRange range{&copier.task, begin, end,
                       copier.task.destination + begin * copier.row_bytes};
  if (copier.columns != nullptr) {
    return copier.columns(range);
  }
  if (!copier.windows.empty()) {
    return gather_windows(range, copier.windows);
  }
  if (!copier.segments.empty()) {
    return copy_segments(range, copier.segments.data(),
                         static_cast<int64_t>(copier.segments.size()));
  }
  switch (copier.task.run) {
    case 1:
      return gather<uint8_t>(range);
    case 2:
      return gather<uint16_t>(range);
    case 4:
      return gather<uint32_t>(range);
    case 8:
      return gather<uint64_t>(range);
    default:  // the one wider element is complex128
      return gather<Word16>(range);
  }
}

struct Unit {
  size_t copier;
  int64_t first_row;
  int64_t start;  // bytes written by the units before it
};

TensorHandles slice_channels_cpu(const std::vector<torch::stable::Tensor>& tensors,
                                 const OptionalTensors& rows, const OptionalTensors& cols) {
  SlicePlan plan = plan_slice_channels(tensors, rows, cols);
  std::vector<RowCopier> copiers;
  std::vector<Unit> units;
  copiers.reserve(plan.tasks.size());
  units.reserve(2 * plan.tasks.size());
  int64_t total = 0;
  for (const SliceTask& task : plan.tasks) {
    copiers.push_back(prepare(task));
    const RowCopier& copier = copiers.back();
    for (int64_t row = 0; row < task.rows; row += copier.rows_per_unit) {
      units.push_back({copiers.size() - 1, row, total});
      total += copier.row_bytes * std::min(copier.rows_per_unit, task.rows - row);
    }
  }
  // Threads share the bytes: a unit belongs to the thread whose share it starts in.
  torch::stable::parallel_for(0, total, kGrainBytes, [&](int64_t begin, int64_t end) {
    auto unit = std::lower_bound(units.begin(), units.end(), begin,
                                 [](const Unit& u, int64_t at) { return u.start < at; });
    for (; unit != units.end() && unit->start < end; ++unit) {
      const RowCopier& copier = copiers[unit->copier];
      copy_rows(copier, unit->first_row,
                std::min(copier.task.rows, unit->first_row + copier.rows_per_unit));
    }
  });
  return std::move(plan.results);
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CPU, m) {
  m.impl("slice_channels", &chanprune::boxed_slice_channels<&chanprune::slice_channels_cpu>);
}
