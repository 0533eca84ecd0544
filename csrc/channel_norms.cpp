// Checks and work splitting of channel_norms, shared by the CPU and CUDA modules.
#include "channel_norms.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "checks.h"
#include "new_tensor.h"
#include "vector_pool.h"

namespace chanprune {
namespace {

constexpr int64_t kShortRun = 32;   // inner runs below this are reduced by columns
constexpr int64_t kCacheLine = 64;  // bytes

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

// Dims of at most this many are sorted in place.
constexpr int64_t kMaxDims = 64;

// Whether all columns are read, those between the channels too: they are read along with the others
// where they are no more than these or share their cache lines.
bool are_columns_close(const ChannelNormTask& task, int64_t element_bytes) {
  return task.channel_stride <= std::max(2 * task.inner, kCacheLine / element_bytes);
}

// Fills the block view of a weight; false if its strides allow none that is worth walking.
bool view_as_block(const Tensor& weight, int64_t dim, ChannelNormTask* task) {
  const auto sizes = weight.sizes();
  const auto strides = weight.strides();
  const auto ndim = static_cast<int64_t>(sizes.size());
  CHANPRUNE_CHECK(ndim <= kMaxDims, "channel_norms: weights should have at most ", kMaxDims,
                  " dims, got ", ndim);
  const auto at = static_cast<size_t>(dim);
  const Axis channel = {sizes[at], strides[at]};
  // The other dims, innermost first; nearly always they come in this order.
  Axis others[kMaxDims];
  int64_t count = 0;
  for (int64_t d = ndim - 1; d >= 0; --d) {
    const Axis axis = {sizes[static_cast<size_t>(d)], strides[static_cast<size_t>(d)]};
    if (d == dim || axis.size == 1) {
      continue;
    }
    int64_t place = count++;
    for (; place > 0 && others[place - 1].stride > axis.stride; --place) {
      others[place] = others[place - 1];
    }
    others[place] = axis;
  }
  int64_t inner = 1;
  Axis outer = {1, 1};
  for (int64_t i = 0; i < count; ++i) {
    if (others[i].stride == inner) {
      inner *= others[i].size;
    } else if (outer.size == 1) {
      outer = others[i];
    } else if (others[i].stride == outer.size * outer.stride) {
      outer.size *= others[i].size;
    } else {
      return false;
    }
  }
  task->data = weight.data_ptr();
  task->outer = outer.size;
  task->channels = channel.size;
  task->inner = inner;
  task->outer_stride = outer.stride;
  task->channel_stride = channel.size > 1 ? channel.stride : inner;
  const bool short_runs = inner < kShortRun && (outer.size > 1 || inner == 1);
  task->columns = short_runs && are_columns_close(*task, weight.element_size());
  return task->columns || !short_runs;
}

void choose_split(const ChannelNormLimits& limits, ChannelNormTask* task) {
  task->piece_outer = task->outer;
  task->piece_inner = task->inner;
  if (task->columns) {
    task->width = (task->channels - 1) * task->channel_stride + task->inner;
    task->group = task->inner;
    task->group_stride = task->channel_stride;
    task->piece_outer = std::min(task->outer, limits.piece_outer);
  } else {
    task->width = task->channels;
    task->group = 1;
    task->group_stride = 1;
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
  const int64_t together = limits.rows_together;
  const int64_t rows = std::max<int64_t>(1, limits.unit_elements / per_value);
  const int64_t values =
      task.columns ? limits.unit_columns : (rows + together - 1) / together * together;
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
  if (weights.empty()) {
    return plan;
  }
  plan.results.reserve(weights.size());
  plan.tasks.reserve(weights.size());
  plan.units.reserve(2 * weights.size());
  plan.unit_elements.reserve(2 * weights.size());
  const TensorMaker maker(weights[0]);
  int64_t bytes = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const int64_t ndim = weight.dim();
    const ScalarType dtype = weight.scalar_type();
    CHANPRUNE_CHECK_FLOAT_TYPE(dtype, "channel_norms: every weight");
    CHANPRUNE_CHECK(dims[i] >= -ndim && dims[i] < ndim, "channel_norms: dims[", i,
                    "] should be in [", -ndim, ", ", ndim, "), got ", dims[i]);
    CHANPRUNE_CHECK(maker.is_on_device_of(weight),
                    "channel_norms: all weights should be on one device, but weights[", i,
                    "] is elsewhere than weights[0]");
    bytes += VectorPool::bytes_of(weight.size(dims[i] < 0 ? dims[i] + ndim : dims[i]),
                                  accumulation_dtype(dtype));
  }
  VectorPool pool(maker, bytes);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const ScalarType dtype = weight.scalar_type();
    const int64_t dim = dims[i] < 0 ? dims[i] + weight.dim() : dims[i];
    const AtenTensorHandle result = pool.next(weight.size(dim), accumulation_dtype(dtype));
    plan.results.push_back(result);
    if (weight.numel() == 0) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(result));
      continue;
    }
    plan.tasks.emplace_back();
    ChannelNormTask& task = plan.tasks.back();
    if (!view_as_block(weight, dim, &task)) {
      // The copy keeps the order of the strides: a norm minds none, and others cost more to make.
      plan.kept_alive.push_back(torch::stable::clone(weight));
      view_as_block(plan.kept_alive.back(), dim, &task);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(result, &task.result));
    task.dtype = static_cast<int32_t>(element_kind(dtype));
    choose_split(limits, &task);
    task.partial_start = -1;
    if (task.pieces > 1 || task.group > 1 || task.group_stride != 1) {
      task.partial_start = plan.partial_count;
      plan.partial_count += task.pieces * task.width;
    }
    add_units(limits, &plan);
  }
  return plan;
}

}  // namespace chanprune
