// channel_norms on the CPU.
#include "channel_norms.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "cpu/half_types.h"
#include "cpu/norm_rows.h"
#include "cpu/simd.h"

namespace chanprune {
namespace {

// Columns of a unit: wide, because memory is read fastest in long runs; their accumulators still
// stay in the second-level cache.
constexpr int64_t kUnitColumns = 8192;
constexpr int64_t kOuterAtOnce = 4;  // of a column task: their accumulators are loaded once for all
constexpr int64_t kColumnsAheadBytes = 4096;  // the next rows are fetched at least so far ahead
constexpr ChannelNormLimits kLimits = {65536, 65536, kUnitColumns, 64};
// A row is summed in lanes over this many elements, then in float64: short float32 chains.
constexpr int64_t kRowChunk = 4096;
constexpr int kValues = 256;       // rows reduced in one call
constexpr int64_t kGrain = 32768;  // elements worth a thread

CHANPRUNE_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
CHANPRUNE_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// One step of a reduction: `total` with the raw element `x` taken in. NaN, once met, stays.
template <NormKind Kind, typename A>
CHANPRUNE_INLINE A take(A total, A x) {
  if constexpr (Kind == NormKind::kL1) {
    return total + magnitude(x);
  } else if constexpr (Kind == NormKind::kL2) {
    return total + x * x;
  } else {
    const A m = magnitude(x);
    return (m > total || m != m) ? m : total;
  }
}

// Takes `Rows` rows of n columns, `stride` apart, into totals: [n]. Rows that come `ahead` elements
// later are fetched meanwhile.
template <NormKind Kind, int64_t Rows, typename T>
CHANPRUNE_CLONES void take_columns(const T* __restrict x, int64_t stride, int64_t n, int64_t ahead,
                                   Accumulator<T>* __restrict totals) {
  constexpr int64_t kStep = 64 / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    for (int64_t r = 0; r < Rows; ++r) {
      __builtin_prefetch(x + r * stride + i + ahead);
    }
    for (int64_t j = i; j < i + kStep; ++j) {
      Accumulator<T> total = totals[j];
      for (int64_t r = 0; r < Rows; ++r) {
        total = take<Kind>(total, load(x[r * stride + j]));
      }
      totals[j] = total;
    }
  }
  for (; i < n; ++i) {
    Accumulator<T> total = totals[i];
    for (int64_t r = 0; r < Rows; ++r) {
      total = take<Kind>(total, load(x[r * stride + i]));
    }
    totals[i] = total;
  }
}

template <NormKind Kind>
double finish(double total) {
  return Kind == NormKind::kL2 ? std::sqrt(total) : total;
}

// Where a unit leaves value `i` of its task: in the result itself, or among the partial values.
template <NormKind Kind, typename T>
struct Sink {
  Accumulator<T>* result;
  double* partial;

  Sink(const ChannelNormTask& task, int64_t piece, double* partials)
      : result(task.partial_start < 0 ? static_cast<Accumulator<T>*>(task.result) : nullptr),
        partial(result ? nullptr : partials + task.partial_start + piece * task.width) {}

  void put(int64_t i, double value) const {
    if (result != nullptr) {
      result[i] = static_cast<Accumulator<T>>(finish<Kind>(value));
    } else {
      partial[i] = value;
    }
  }
};

// One past the last element of a task's block.
template <typename T>
const T* block_end(const ChannelNormTask& task) {
  return static_cast<const T*>(task.data) + (task.outer - 1) * task.outer_stride +
         (task.channels - 1) * task.channel_stride + task.inner;
}

template <NormKind Kind, typename T>
void run_rows(const ChannelNormTask& task, const ChannelNormUnit& unit, double* partials) {
  const Sink<Kind, T> sink(task, unit.piece, partials);
  const T* const end = block_end<T>(task);
  const int64_t inner_pieces = (task.inner + task.piece_inner - 1) / task.piece_inner;
  const int64_t outer_begin = unit.piece / inner_pieces * task.piece_outer;
  const int64_t outer_end = std::min(task.outer, outer_begin + task.piece_outer);
  const int64_t inner_begin = unit.piece % inner_pieces * task.piece_inner;
  const int64_t inner_end = std::min(task.inner, inner_begin + task.piece_inner);
  const T* const first = static_cast<const T*>(task.data) + unit.first * task.channel_stride;
  Accumulator<T> values[kValues];
  if (outer_end - outer_begin == 1 && inner_end - inner_begin <= kRowChunk) {
    const T* const row = first + outer_begin * task.outer_stride + inner_begin;
    for (int64_t c = 0; c < unit.count; c += kValues) {
      const int64_t count = std::min<int64_t>(kValues, unit.count - c);
      reduce_rows<Kind, T>(row + c * task.channel_stride, task.channel_stride, count,
                           inner_end - inner_begin, end, values);
      for (int64_t i = 0; i < count; ++i) {
        sink.put(unit.first + c + i, values[i]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < unit.count; ++c) {
    const T* channel = first + c * task.channel_stride;
    double total = 0;
    for (int64_t i = inner_begin; i < inner_end; i += kRowChunk) {
      const int64_t n = std::min(kRowChunk, inner_end - i);
      for (int64_t o = outer_begin; o < outer_end; o += kValues) {
        const int64_t count = std::min<int64_t>(kValues, outer_end - o);
        reduce_rows<Kind, T>(channel + o * task.outer_stride + i, task.outer_stride, count, n, end,
                             values);
        for (int64_t j = 0; j < count; ++j) {
          total = join<Kind, double>(total, values[j]);
        }
      }
    }
    sink.put(unit.first + c, total);
  }
}

template <NormKind Kind, typename T>
void run_columns(const ChannelNormTask& task, const ChannelNormUnit& unit, double* partials) {
  alignas(64) Accumulator<T> totals[kUnitColumns];
  std::fill_n(totals, unit.count, Accumulator<T>(0));
  const Sink<Kind, T> sink(task, unit.piece, partials);
  const int64_t begin = unit.piece * task.piece_outer;
  const int64_t end = std::min(task.outer, begin + task.piece_outer);
  const T* first = static_cast<const T*>(task.data) + unit.first;
  int64_t o = begin;
  const int64_t group = std::max<int64_t>(1, kOuterAtOnce * task.outer_stride);
  constexpr int64_t kLeast = kColumnsAheadBytes / static_cast<int64_t>(sizeof(T));
  const int64_t ahead = (kLeast + group - 1) / group * group;
  for (; o + kOuterAtOnce <= end; o += kOuterAtOnce) {
    take_columns<Kind, kOuterAtOnce, T>(first + o * task.outer_stride, task.outer_stride,
                                        unit.count, ahead, totals);
  }
  for (; o < end; ++o) {
    take_columns<Kind, 1, T>(first + o * task.outer_stride, 0, unit.count, 0, totals);
  }
  for (int64_t i = 0; i < unit.count; ++i) {
    sink.put(unit.first + i, totals[i]);
  }
}

template <NormKind Kind, typename T>
void run_unit(const ChannelNormTask& task, const ChannelNormUnit& unit, double* partials) {
  if (task.columns) {
    run_columns<Kind, T>(task, unit, partials);
  } else {
    run_rows<Kind, T>(task, unit, partials);
  }
}

// Joins the partial values of a split task in a fixed order.
template <NormKind Kind, typename A>
void finish_task(const ChannelNormTask& task, const double* partials) {
  A* result = static_cast<A*>(task.result);
  for (int64_t c = 0; c < task.channels; ++c) {
    double total = 0;
    for (int64_t piece = 0; piece < task.pieces; ++piece) {
      const double* values = partials + task.partial_start + piece * task.width + c * task.group;
      for (int64_t j = 0; j < task.group; ++j) {
        total = join<Kind>(total, values[j]);
      }
    }
    result[c] = static_cast<A>(finish<Kind>(total));
  }
}

template <NormKind Kind>
void run(const ChannelNormPlan& plan) {
  const std::unique_ptr<double[]> partials(new double[static_cast<size_t>(plan.partial_count)]);
  // Threads share the elements, not the units: a unit belongs to the thread whose share it starts
  // in.
  std::vector<int64_t> starts(plan.units.size());
  int64_t total = 0;
  for (size_t u = 0; u < plan.units.size(); ++u) {
    starts[u] = total;
    total += plan.unit_elements[u];
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    auto u =
        static_cast<size_t>(std::lower_bound(starts.begin(), starts.end(), begin) - starts.begin());
    for (; u < plan.units.size() && starts[u] < end; ++u) {
      const ChannelNormTask& task = plan.tasks[static_cast<size_t>(plan.units[u].task)];
      switch (static_cast<ElementKind>(task.dtype)) {
        case ElementKind::kFloat:
          run_unit<Kind, float>(task, plan.units[u], partials.get());
          break;
        case ElementKind::kDouble:
          run_unit<Kind, double>(task, plan.units[u], partials.get());
          break;
        case ElementKind::kHalf:
          run_unit<Kind, Float16>(task, plan.units[u], partials.get());
          break;
        case ElementKind::kBFloat16:
          run_unit<Kind, BFloat16>(task, plan.units[u], partials.get());
          break;
      }
    }
  });
  if (plan.partial_count == 0) {
    return;
  }
  const auto tasks = static_cast<int64_t>(plan.tasks.size());
  torch::stable::parallel_for(
      0, tasks, 1 + kGrain * tasks / (1 + plan.partial_count), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const ChannelNormTask& task = plan.tasks[static_cast<size_t>(t)];
          if (task.partial_start < 0) {
            continue;
          }
          if (static_cast<ElementKind>(task.dtype) == ElementKind::kDouble) {
            finish_task<Kind, double>(task, partials.get());
          } else {
            finish_task<Kind, float>(task, partials.get());
          }
        }
      });
}

TensorHandles channel_norms_cpu(const std::vector<torch::stable::Tensor>& weights,
                                const std::vector<int64_t>& dims, double p) {
  ChannelNormPlan plan = plan_channel_norms(weights, dims, p, kLimits);
  switch (plan.kind) {
    case NormKind::kL1:
      run<NormKind::kL1>(plan);
      break;
    case NormKind::kL2:
      run<NormKind::kL2>(plan);
      break;
    case NormKind::kInf:
      run<NormKind::kInf>(plan);
      break;
  }
  return std::move(plan.results);
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CPU, m) {
  m.impl("channel_norms", &chanprune::boxed_channel_norms<&chanprune::channel_norms_cpu>);
}
