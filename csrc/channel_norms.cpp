// Checks and work splitting of channel_norms, shared by the CPU and CUDA modules.
#include "channel_norms.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "new_tensor.h"

namespace chanprune {
namespace {

constexpr int64_t kShortRun = 32;  // inner runs below this are reduced by columns

NormKind norm_kind(double p) {
  CHANPRUNE_CHECK(p == 1.0 || p == 2.0 || (std::isinf(p) && p > 0),
                  "channel_norms: p should be 1, 2 or inf, got ", p);
  return p == 1.0 ? NormKind::kL1 : p == 2.0 ? NormKind::kL2 : NormKind::kInf;
}

ElementKind element_kind(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return ElementKind::kDouble;
    case ScalarType::Half:
      return ElementKind::kHalf;
    case ScalarType::BFloat16:
      return ElementKind::kBFloat16;
    default:
      return ElementKind::kFloat;
  }
}

struct Axis {
  int64_t size;
  int64_t stride;
};

// Merges axes, ordered by falling stride, into one; false if they do not lie evenly.
bool merge(const std::vector<Axis>& axes, Axis* merged) {
  *merged = {1, 1};
  for (size_t i = axes.size(); i-- > 0;) {
    if (i + 1 == axes.size()) {
      *merged = axes[i];
    } else if (axes[i].stride == merged->size * merged->stride) {
      merged->size *= axes[i].size;
    } else {
      return false;
    }
  }
  return true;
}

// Fills the block view of `weight`; false if its strides allow none.
bool view_as_block(const Tensor& weight, int64_t dim, ChannelNormTask* task) {
  std::vector<Axis> outer;
  std::vector<Axis> inner;
  const Axis channel = {weight.size(dim), weight.stride(dim)};
  std::vector<Axis> others;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    if (d != dim && weight.size(d) != 1) {
      others.push_back({weight.size(d), weight.stride(d)});
    }
  }
  std::stable_sort(others.begin(), others.end(),
                   [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
  for (const Axis& axis : others) {
    (channel.size > 1 && axis.stride > channel.stride ? outer : inner).push_back(axis);
  }
  Axis outer_axis;
  Axis inner_axis;
  if (!merge(outer, &outer_axis) || !merge(inner, &inner_axis) || inner_axis.stride != 1) {
    return false;
  }
  task->data = weight.data_ptr();
  task->outer = outer_axis.size;
  task->channels = channel.size;
  task->inner = inner_axis.size;
  task->outer_stride = outer_axis.stride;
  task->channel_stride = channel.size > 1 ? channel.stride : task->inner;
  return true;
}

void choose_split(const ChannelNormLimits& limits, ChannelNormTask* task) {
  const bool dense = task->channel_stride == task->inner;
  task->columns = dense && task->inner < kShortRun && (task->outer > 1 || task->inner == 1);
  task->piece_outer = task->outer;
  task->piece_inner = task->inner;
  if (task->columns) {
    task->width = task->channels * task->inner;
    task->group = task->inner;
    task->piece_outer = std::min(task->outer, limits.piece_outer);
  } else {
    task->width = task->channels;
    task->group = 1;
    if (task->outer * task->inner > limits.split_elements) {
      if (task->outer > 1) {
        task->piece_outer = std::max<int64_t>(1, limits.split_elements / task->inner);
      } else {
        task->piece_inner = limits.split_elements;
      }
    }
  }
  const auto pieces = [](int64_t total, int64_t piece) { return (total + piece - 1) / piece; };
  task->pieces = pieces(task->outer, task->piece_outer) * pieces(task->inner, task->piece_inner);
}

void add_units(const ChannelNormLimits& limits, ChannelNormPlan* plan) {
  const int32_t index = static_cast<int32_t>(plan->tasks.size()) - 1;
  const ChannelNormTask& task = plan->tasks.back();
  const int64_t per_value = task.piece_outer * (task.columns ? 1 : task.piece_inner);
  const int64_t values =
      task.columns ? limits.unit_columns : std::max<int64_t>(1, limits.unit_elements / per_value);
  for (int64_t piece = 0; piece < task.pieces; ++piece) {
    for (int64_t first = 0; first < task.width; first += values) {
      const int64_t count = std::min(values, task.width - first);
      plan->units.push_back({first, piece, static_cast<int32_t>(count), index});
      plan->unit_elements.push_back(count * per_value);
    }
  }
}

}  // namespace

ChannelNormPlan plan_channel_norms(const std::vector<Tensor>& weights,
                                   const std::vector<int64_t>& dims, double p,
                                   const ChannelNormLimits& limits) {
  CHANPRUNE_CHECK(weights.size() == dims.size(),
                  "channel_norms: dims should hold one dim per weight, got ", dims.size(),
                  " dims for ", weights.size(), " weights");
  ChannelNormPlan plan;
  plan.kind = norm_kind(p);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const int64_t ndim = weight.dim();
    CHANPRUNE_CHECK_FLOAT(weight, "channel_norms: every weight");
    CHANPRUNE_CHECK(dims[i] >= -ndim && dims[i] < ndim, "channel_norms: dims[", i,
                    "] should be in [", -ndim, ", ", ndim, "), got ", dims[i]);
    CHANPRUNE_CHECK(weight.device() == weights[0].device(),
                    "channel_norms: all weights should be on one device, but weights[", i,
                    "] is elsewhere than weights[0]");
    const int64_t dim = dims[i] < 0 ? dims[i] + ndim : dims[i];
    Tensor result =
        new_empty_vector(weight, weight.size(dim), accumulation_dtype(weight.scalar_type()));
    plan.results.push_back(result);
    if (weight.numel() == 0) {
      torch::stable::zero_(result);
      continue;
    }
    ChannelNormTask task{};
    if (!view_as_block(weight, dim, &task)) {
      plan.kept_alive.push_back(torch::stable::contiguous(weight));
      view_as_block(plan.kept_alive.back(), dim, &task);
    }
    task.result = result.data_ptr();
    task.dtype = static_cast<int32_t>(element_kind(weight.scalar_type()));
    choose_split(limits, &task);
    task.partial_start = -1;
    if (task.pieces > 1 || task.group > 1) {
      task.partial_start = plan.partial_count;
      plan.partial_count += task.pieces * task.width;
    }
    plan.tasks.push_back(task);
    add_units(limits, &plan);
  }
  return plan;
}

}  // namespace chanprune
