// slice_channels on CUDA: one launch for all tensors. The results are cut into runs of words that
// blocks write front to back; every word finds its source by index, whatever the dtype.
#include "cuda/slice_channels_kernels.h"

namespace chanprune {
namespace {

// Where words of one line come from. Index is 32 bits wide unless a line is longer.
template <typename Word, typename Index>
__device__ inline void copy_words(const WordTask& task, const WordUnit& unit) {
  const int64_t first_line = unit.first / task.line_words;
  const auto first_word = static_cast<Index>(unit.first % task.line_words);
  const auto line_words = static_cast<Index>(task.line_words);
  const auto run_words = static_cast<Index>(task.run_words);
  auto* destination = reinterpret_cast<Word*>(task.destination) + unit.first;
  for (Index w = threadIdx.x; w < static_cast<Index>(unit.count); w += kSliceThreads) {
    const Index at = first_word + w;
    const int64_t line = first_line + at / line_words;
    const Index in_line = at % line_words;
    const int64_t row = task.mids == 1 ? line : line / task.mids;
    const int64_t mid = task.mids == 1 ? 0 : line % task.mids;
    const Index column = run_words == 1 ? in_line : in_line / run_words;
    const Index in_run = run_words == 1 ? 0 : in_line % run_words;
    const int64_t source_row = task.row_index == nullptr ? row : task.row_index[row];
    const int64_t source_column = task.col_index == nullptr ? column : task.col_index[column];
    const char* source = task.source + source_row * task.row_stride + mid * task.mid_stride +
                         source_column * task.col_stride;
    destination[w] = reinterpret_cast<const Word*>(source)[in_run];
  }
}

template <typename Word>
__device__ inline void run_unit(const WordTask& task, const WordUnit& unit) {
  if (task.line_words < (int64_t{1} << 31) - kSliceUnitWords) {
    copy_words<Word, uint32_t>(task, unit);
  } else {
    copy_words<Word, uint64_t>(task, unit);
  }
}

__global__ void __launch_bounds__(kSliceThreads)
    slice_channels_kernel(const WordTask* tasks, const WordUnit* units) {
  const WordUnit unit = units[blockIdx.x];
  const WordTask task = tasks[unit.task];
  switch (task.word) {
    case 1:
      return run_unit<uint8_t>(task, unit);
    case 2:
      return run_unit<uint16_t>(task, unit);
    case 4:
      return run_unit<uint32_t>(task, unit);
    case 8:
      return run_unit<uint2>(task, unit);
    default:
      return run_unit<uint4>(task, unit);
  }
}

}  // namespace

void launch_slice_channels(const WordTask* tasks, const WordUnit* units, int64_t unit_count,
                           cudaStream_t stream) {
  slice_channels_kernel<<<static_cast<unsigned>(unit_count), kSliceThreads, 0, stream>>>(tasks,
                                                                                         units);
}

}  // namespace chanprune
