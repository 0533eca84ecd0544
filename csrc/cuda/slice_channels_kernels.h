// Launcher of the slice_channels kernel; no torch types, so that nvcc reads no torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace chanprune {

constexpr int kSliceThreads = 256;
constexpr int64_t kSliceUnitWords = kSliceThreads * 16;

// A copy (see SliceTask) counted in words of `word` bytes, with index lists on the device.
struct WordTask {
  const char* source;
  char* destination;
  const int64_t* row_index;  // null: all rows in order
  const int64_t* col_index;  // null: all columns in order
  int64_t row_stride;        // bytes, in the source
  int64_t mid_stride;
  int64_t col_stride;
  int64_t mids;
  int64_t run_words;
  int64_t line_words;  // of one (row, mid): cols * run_words
  int32_t word;        // bytes: 1, 2, 4, 8 or 16
};

// Words [first, first + count) of one result, count <= kSliceUnitWords.
struct WordUnit {
  int64_t first;
  int32_t count;
  int32_t task;
};

// Runs every unit by a block of its own. Both tables are device memory.
void launch_slice_channels(const WordTask* tasks, const WordUnit* units, int64_t unit_count,
                           cudaStream_t stream);

}  // namespace chanprune
