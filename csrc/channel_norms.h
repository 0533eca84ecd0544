// channel_norms: Lp norm of every channel of many weights in one call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "channel_norms_task.h"
#include "tensor_handles.h"

namespace chanprune {

// How finely to cut. These depend on the device, never on the number of threads, so that results
// do not change with it.
struct ChannelNormLimits {
  int64_t unit_elements;   // elements a unit of short rows should touch
  int64_t split_elements;  // longest row that stays in one piece
  int64_t unit_columns;    // columns in a unit
  int64_t piece_outer;     // outer steps in a piece of a column task
  int64_t rows_together;   // a unit of rows holds a multiple of so many
};

struct ChannelNormPlan {
  NormKind kind;
  TensorHandles results;
  std::vector<ChannelNormTask> tasks;
  std::vector<ChannelNormUnit> units;
  std::vector<int64_t> unit_elements;             // work of each unit, for balancing
  int64_t partial_count = 0;                      // float64 values
  std::vector<torch::stable::Tensor> kept_alive;  // copies of weights that are no such block
};

// Checks the arguments, allocates the results and cuts the work.
//   weights: float tensors of one device, each with at least one dim, any strides
//   dims:    one per weight, in [-ndim, ndim)
//   p:       1, 2 or infinity
ChannelNormPlan plan_channel_norms(const std::vector<torch::stable::Tensor>& weights,
                                   const std::vector<int64_t>& dims, double p,
                                   const ChannelNormLimits& limits);

// The operator as the dispatcher calls it, around the kernels of one device.
template <TensorHandles (*Run)(const std::vector<torch::stable::Tensor>& weights,
                               const std::vector<int64_t>& dims, double p)>
void boxed_channel_norms(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  using torch::stable::detail::to;
  const auto weights = to<std::vector<torch::stable::Tensor>>(stack[0]);
  const auto dims = to<std::vector<int64_t>>(stack[1]);
  stack[0] = Run(weights, dims, to<double>(stack[2])).release();
}

}  // namespace chanprune
