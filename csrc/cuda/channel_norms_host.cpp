// Host side of channel_norms on CUDA: tables, scratch and launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "channel_norms.h"
#include "cuda/channel_norms_kernels.h"
#include "cuda/launch.h"
#include "cuda/table_upload.h"
#include "new_tensor.h"

namespace chanprune {
namespace {

constexpr ChannelNormLimits kLimits = {16384, 65536, kChannelNormUnitColumns, 128, 1};

// Channels of the tasks that were split, a block's worth at a time.
std::vector<ChannelNormUnit> joining_units(const ChannelNormPlan& plan) {
  std::vector<ChannelNormUnit> units;
  for (size_t t = 0; t < plan.tasks.size(); ++t) {
    if (plan.tasks[t].partial_start < 0) {
      continue;
    }
    const int64_t channels = plan.tasks[t].channels;
    for (int64_t first = 0; first < channels; first += kChannelNormThreads) {
      const int64_t count = std::min<int64_t>(kChannelNormThreads, channels - first);
      units.push_back({first, 0, static_cast<int32_t>(count), static_cast<int32_t>(t)});
    }
  }
  return units;
}

TensorHandles channel_norms_cuda(const std::vector<torch::stable::Tensor>& weights,
                                 const std::vector<int64_t>& dims, double p) {
  if (weights.empty()) {
    return {};
  }
  const LaunchScope scope(weights[0]);
  ChannelNormPlan plan = plan_channel_norms(weights, dims, p, kLimits);
  if (plan.units.empty()) {
    return std::move(plan.results);
  }
  const std::vector<ChannelNormUnit> joins = joining_units(plan);
  TableUpload upload;
  const int64_t tasks_at = upload.add(plan.tasks);
  const int64_t units_at = upload.add(plan.units);
  const int64_t joins_at = upload.add(joins);
  const torch::stable::Tensor tables = upload.allocate(weights[0]);
  upload.send(tables);
  const torch::stable::Tensor scratch =
      new_empty_vector(weights[0], plan.partial_count, torch::headeronly::ScalarType::Double);
  const auto* tasks = table_at<const ChannelNormTask>(tables, tasks_at);
  auto* partials = static_cast<double*>(scratch.data_ptr());
  launch_channel_norms(plan.kind, tasks, table_at<const ChannelNormUnit>(tables, units_at),
                       static_cast<int64_t>(plan.units.size()), partials, scope.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (!joins.empty()) {
    launch_join_pieces(plan.kind, tasks, table_at<const ChannelNormUnit>(tables, joins_at),
                       static_cast<int64_t>(joins.size()), partials, scope.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return std::move(plan.results);
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CUDA, m) {
  m.impl("channel_norms", &chanprune::boxed_channel_norms<&chanprune::channel_norms_cuda>);
}
