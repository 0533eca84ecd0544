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
#include "cpu/subnormals.h"

namespace chanprune {
namespace {

// Columns of a unit: wide, because memory is read fastest in long runs; their accumulators still
// stay in the second-level cache.
constexpr int64_t kUnitColumns = 8192;
constexpr ChannelNormLimits kLimits = {65536, 65536, kUnitColumns, 64, kStreams};
// A row is summed in lanes over this many elements, then in float64: short float32 chains.
constexpr int64_t kRowChunk = 4096;
constexpr int kValues = 1024;           // rows reduced in one call
constexpr int64_t kShareValues = 8192;  // partial values joined together
constexpr int64_t kGrain = 32768;       // elements worth a thread

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

// Takes `Rows` rows of n columns, `stride` apart, into totals: [n].
template <NormKind Kind, int64_t Rows, typename T>
CHANPRUNE_CLONES void take_columns(const T* __restrict x, int64_t stride, int64_t n,
                                   Accumulator<T>* __restrict totals) {
  for (int64_t i = 0; i < n; ++i) {
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

// Rows of n elements, `stride` apart, one value each.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t n;
  const T* end;  // elements up to there may be read
};

template <NormKind Kind, typename T>
void put_short_rows(const Rows<T>& rows, int64_t first, const Sink<Kind, T>& sink) {
  Accumulator<T> values[kValues];
  for (int64_t r = 0; r < rows.count; r += kValues) {
    const int64_t count = std::min<int64_t>(kValues, rows.count - r);
    reduce_rows<Kind, T>(rows.data + r * rows.stride, rows.stride, count, rows.n, rows.end, values);
    for (int64_t i = 0; i < count; ++i) {
      sink.put(first + r + i, values[i]);
    }
  }
}

// Takes at most kStreams rows into totals: [rows].
template <NormKind Kind, typename T>
void reduce_long_rows(const Rows<T>& rows, double* totals) {
  Accumulator<T> values[kStreams];
  for (int64_t i = 0; i < rows.n; i += kRowChunk) {
    const int64_t n = std::min(kRowChunk, rows.n - i);
    reduce_rows<Kind, T>(rows.data + i, rows.stride, rows.count, n, rows.end, values);
    for (int64_t r = 0; r < rows.count; ++r) {
      totals[r] = join<Kind, double>(totals[r], values[r]);
    }
  }
}

// One row, its parts read like rows.
template <NormKind Kind, typename T>
double reduce_long_row(const T* row, int64_t n, const T* end) {
  const int64_t part = n / kStreams;
  const T* const rest = row + kStreams * part;
  double totals[kStreams] = {};
  reduce_long_rows<Kind>(Rows<T>{row, part, kStreams, part, end}, totals);
  reduce_long_rows<Kind>(Rows<T>{rest, 0, 1, n - kStreams * part, end}, totals);
  double total = 0;
  for (const double value : totals) {
    total = join<Kind, double>(total, value);
  }
  return total;
}

template <NormKind Kind, typename T>
void put_long_rows(const Rows<T>& rows, int64_t first, const Sink<Kind, T>& sink) {
  const int64_t part = rows.count / kStreams;
  for (int64_t r = 0; r < part; ++r) {
    double totals[kStreams] = {};
    const T* const row = rows.data + r * rows.stride;
    reduce_long_rows<Kind>(Rows<T>{row, part * rows.stride, kStreams, rows.n, rows.end}, totals);
    for (int64_t s = 0; s < kStreams; ++s) {
      sink.put(first + s * part + r, totals[s]);
    }
  }
  for (int64_t r = kStreams * part; r < rows.count; ++r) {
    sink.put(first + r, reduce_long_row<Kind>(rows.data + r * rows.stride, rows.n, rows.end));
  }
}

template <NormKind Kind, typename T>
void run_rows(const ChannelNormTask& task, const ChannelNormUnit& unit, double* partials) {
  const Sink<Kind, T> sink(task, unit.piece, partials);
  const T* const end = block_end<T>(task);
  const int64_t inner_pieces = (task.inner + task.piece_inner - 1) / task.piece_inner;
  const int64_t outer_begin = unit.piece / inner_pieces * task.piece_outer;
  const int64_t outer = std::min(task.outer - outer_begin, task.piece_outer);
  const int64_t inner_begin = unit.piece % inner_pieces * task.piece_inner;
  const int64_t inner = std::min(task.inner - inner_begin, task.piece_inner);
  const T* const first = static_cast<const T*>(task.data) + unit.first * task.channel_stride +
                         outer_begin * task.outer_stride + inner_begin;
  if (outer == 1) {
    const Rows<T> rows{first, task.channel_stride, unit.count, inner, end};
    return inner <= kRowChunk ? put_short_rows<Kind>(rows, unit.first, sink)
                              : put_long_rows<Kind>(rows, unit.first, sink);
  }
  Accumulator<T> values[kValues];
  for (int64_t c = 0; c < unit.count; ++c) {
    const T* channel = first + c * task.channel_stride;
    double total = 0;
    for (int64_t i = 0; i < inner; i += kRowChunk) {
      const int64_t n = std::min(kRowChunk, inner - i);
      for (int64_t o = 0; o < outer; o += kValues) {
        const int64_t count = std::min<int64_t>(kValues, outer - o);
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
  const int64_t part = (end - begin) / kStreams;
  for (int64_t o = begin; o < begin + part; ++o) {
    take_columns<Kind, kStreams, T>(first + o * task.outer_stride, part * task.outer_stride,
                                    unit.count, totals);
  }
  for (int64_t o = begin + kStreams * part; o < end; ++o) {
    take_columns<Kind, 1, T>(first + o * task.outer_stride, 0, unit.count, totals);
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

// Channels [first, first + count) of a split task.
struct Channels {
  const ChannelNormTask* task;
  int64_t first;
  int64_t count;  // at most kValues
};

// Joins their partial values in a fixed order, piece by piece: sums of several channels are under
// way at a time.
template <NormKind Kind, typename A>
void finish_channels(const Channels& channels, const double* partials) {
  const ChannelNormTask& task = *channels.task;
  double totals[kValues];
  std::fill_n(totals, channels.count, 0.0);
  for (int64_t piece = 0; piece < task.pieces; ++piece) {
    const double* values =
        partials + task.partial_start + piece * task.width + channels.first * task.group_stride;
    for (int64_t c = 0; c < channels.count; ++c) {
      double total = totals[c];
      for (int64_t j = 0; j < task.group; ++j) {
        total = join<Kind>(total, values[j]);
      }
      totals[c] = total;
      values += task.group_stride;
    }
  }
  A* const result = static_cast<A*>(task.result) + channels.first;
  for (int64_t c = 0; c < channels.count; ++c) {
    result[c] = static_cast<A>(finish<Kind>(totals[c]));
  }
}

template <NormKind Kind>
void finish_tasks(const ChannelNormPlan& plan, const double* partials) {
  std::vector<Channels> shares;
  std::vector<int64_t> starts;  // partial values of the shares before it
  shares.reserve(plan.units.size());
  starts.reserve(plan.units.size());
  int64_t total = 0;
  for (const ChannelNormTask& task : plan.tasks) {
    if (task.partial_start < 0) {
      continue;
    }
    const int64_t per_channel = task.pieces * task.group;
    const int64_t step = std::clamp<int64_t>(kShareValues / per_channel, 1, kValues);
    for (int64_t first = 0; first < task.channels; first += step) {
      const int64_t count = std::min(step, task.channels - first);
      shares.push_back({&task, first, count});
      starts.push_back(total);
      total += count * per_channel;
    }
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    auto s =
        static_cast<size_t>(std::lower_bound(starts.begin(), starts.end(), begin) - starts.begin());
    for (; s < shares.size() && starts[s] < end; ++s) {
      if (static_cast<ElementKind>(shares[s].task->dtype) == ElementKind::kDouble) {
        finish_channels<Kind, double>(shares[s], partials);
      } else {
        finish_channels<Kind, float>(shares[s], partials);
      }
    }
  });
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
        case ElementKind::kHalf: {
          const SubnormalScope scope;  // to read subnormal halves
          run_unit<Kind, Float16>(task, plan.units[u], partials.get());
          break;
        }
        case ElementKind::kBFloat16:
          run_unit<Kind, BFloat16>(task, plan.units[u], partials.get());
          break;
      }
    }
  });
  if (plan.partial_count > 0) {
    finish_tasks<Kind>(plan, partials.get());
  }
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
