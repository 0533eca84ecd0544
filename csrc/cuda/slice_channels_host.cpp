// Host side of slice_channels on CUDA: word tables, index lists and the launch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <map>
#include <utility>

#include "cuda/launch.h"
#include "cuda/slice_channels_kernels.h"
#include "cuda/table_upload.h"
#include "slice_channels.h"

namespace chanprune {
namespace {

// Widest word that divides every address and length of the task; a step that is never taken, past
// the only row, mid or column, does not count.
int32_t word_bytes(const SliceTask& task) {
  const auto step = [](int64_t stride, int64_t count, const int64_t* index) {
    return count > 1 || index != nullptr ? static_cast<uint64_t>(stride) : 0;
  };
  const auto bits =
      static_cast<uint64_t>(task.run) | step(task.row_stride, task.rows, task.row_index) |
      step(task.mid_stride, task.mids, nullptr) | step(task.col_stride, task.cols, task.col_index) |
      reinterpret_cast<uintptr_t>(task.source) | reinterpret_cast<uintptr_t>(task.destination);
  int32_t word = 16;
  while (bits % static_cast<uint64_t>(word) != 0) {
    word /= 2;
  }
  return word;
}

// Uploads each distinct index list once: a model shares its lists among many tensors.
class IndexLists {
 public:
  explicit IndexLists(TableUpload* upload) : upload_(upload) {}

  // Offset in the upload, or -1 for null.
  int64_t add(const int64_t* index, int64_t count) {
    if (index == nullptr) {
      return -1;
    }
    const auto [entry, fresh] = offsets_.try_emplace({index, count}, 0);
    if (fresh) {
      entry->second = upload_->add(index, count);
    }
    return entry->second;
  }

 private:
  TableUpload* upload_;
  std::map<std::pair<const int64_t*, int64_t>, int64_t> offsets_;
};

TensorHandles slice_channels_cuda(const std::vector<torch::stable::Tensor>& tensors,
                                  const OptionalTensors& rows, const OptionalTensors& cols) {
  SlicePlan plan = plan_slice_channels(tensors, rows, cols);
  if (plan.tasks.empty()) {
    return std::move(plan.results);
  }
  const LaunchScope scope(tensors[0]);
  // The index lists come first in the buffer, then the tables that hold their device addresses: so
  // the addresses are known from the buffer's, before anything is sent.
  TableUpload upload;
  IndexLists lists(&upload);
  std::vector<WordTask> tasks;
  std::vector<WordUnit> units;
  std::vector<std::pair<int64_t, int64_t>> list_offsets;
  for (const SliceTask& task : plan.tasks) {
    const int32_t word = word_bytes(task);
    const int64_t run_words = task.run / word;
    tasks.push_back({task.source, task.destination, nullptr, nullptr, task.row_stride,
                     task.mid_stride, task.col_stride, task.mids, run_words, task.cols * run_words,
                     word});
    list_offsets.emplace_back(lists.add(task.row_index, task.rows),
                              lists.add(task.col_index, task.cols));
    const int64_t words = task.rows * task.mids * task.cols * run_words;
    const auto index = static_cast<int32_t>(tasks.size()) - 1;
    for (int64_t first = 0; first < words; first += kSliceUnitWords) {
      units.push_back(
          {first, static_cast<int32_t>(std::min(kSliceUnitWords, words - first)), index});
    }
  }
  const int64_t units_at = upload.add(units);
  const int64_t tasks_at = upload.reserve<WordTask>(static_cast<int64_t>(tasks.size()));
  const torch::stable::Tensor tables = upload.allocate(tensors[0]);
  for (size_t i = 0; i < tasks.size(); ++i) {
    const auto [row_at, col_at] = list_offsets[i];
    tasks[i].row_index = row_at < 0 ? nullptr : table_at<const int64_t>(tables, row_at);
    tasks[i].col_index = col_at < 0 ? nullptr : table_at<const int64_t>(tables, col_at);
  }
  upload.fill(tasks_at, tasks);
  upload.send(tables);
  launch_slice_channels(table_at<const WordTask>(tables, tasks_at),
                        table_at<const WordUnit>(tables, units_at),
                        static_cast<int64_t>(units.size()), scope.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return std::move(plan.results);
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CUDA, m) {
  m.impl("slice_channels", &chanprune::boxed_slice_channels<&chanprune::slice_channels_cuda>);
}
