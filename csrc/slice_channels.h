// slice_channels: keep chosen indices of dims 0 and 1 of many tensors in one pass over the data.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor_handles.h"

namespace chanprune {

// The copy that makes one result, in bytes so that every dtype is the same job.
//
// The result is written front to back as [rows, mids, cols, run]. A contiguous weight [O, I, kh,
// kw] has mids = 1 and runs of kh * kw elements; a channels_last one has mids = kh * kw and runs of
// one element. Where all columns are kept they become part of the run.
struct SliceTask {
  const char* source;
  char* destination;
  int64_t rows;
  int64_t mids;
  int64_t cols;
  int64_t run;               // bytes
  int64_t row_stride;        // bytes, in the source
  int64_t mid_stride;        // bytes, in the source
  int64_t col_stride;        // bytes, in the source
  const int64_t* row_index;  // [rows] on the host, or null: all rows in order
  const int64_t* col_index;  // [cols] on the host, or null: all columns in order
  int64_t col_runs;          // runs of adjacent columns in it
  int64_t element;           // bytes of one element
};

struct SlicePlan {
  TensorHandles results;
  std::vector<SliceTask> tasks;  // results without elements have none
  std::vector<torch::stable::Tensor> kept_alive;
};

using OptionalTensors = std::vector<std::optional<torch::stable::Tensor>>;

// Checks the arguments, every index value included, and allocates the results.
//   tensors: any dtype, device and strides
//   rows:    one per tensor: int64 [R] on the CPU with values in [0, size(0)), or null to keep all
//   cols:    one per tensor: int64 [C] on the CPU with values in [0, size(1)), or null to keep all
// Result i has shape [R, C, ...]; it is channels_last where tensors[i] is, else contiguous.
SlicePlan plan_slice_channels(const std::vector<torch::stable::Tensor>& tensors,
                              const OptionalTensors& rows, const OptionalTensors& cols);

// The operator as the dispatcher calls it, around the kernels of one device.
template <TensorHandles (*Run)(const std::vector<torch::stable::Tensor>& tensors,
                               const OptionalTensors& rows, const OptionalTensors& cols)>
void boxed_slice_channels(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  using torch::stable::detail::to;
  const auto tensors = to<std::vector<torch::stable::Tensor>>(stack[0]);
  const auto rows = to<OptionalTensors>(stack[1]);
  const auto cols = to<OptionalTensors>(stack[2]);
  stack[0] = Run(tensors, rows, cols).release();
}

}  // namespace chanprune
