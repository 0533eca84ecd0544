// channel_norms on CUDA: one launch for all weights, a second one only where a reduction was split.
// No atomics: partial values are joined in a fixed order, so results repeat bit for bit.
#include "cuda/channel_norms_kernels.h"
#include "cuda/element.cuh"

namespace chanprune {
namespace {

constexpr int kThreads = kChannelNormThreads;
constexpr int kWarps = kThreads / kWarp;
// Rows up to this length are reduced by a warp each, longer ones by the whole block.
constexpr int64_t kWarpRow = 2048;

// ---------------------------------------------------------------------------------------------
// Arithmetic of the norms
// ---------------------------------------------------------------------------------------------

// `total` with the raw element `x` taken in. NaN, once met, stays.
template <NormKind Kind, typename A>
__device__ inline A take(A total, A x) {
  if constexpr (Kind == NormKind::kL1) {
    return total + (x < 0 ? -x : x);
  } else if constexpr (Kind == NormKind::kL2) {
    return total + x * x;
  } else {
    const A m = x < 0 ? -x : x;
    return (m > total || m != m) ? m : total;
  }
}

template <NormKind Kind, typename A>
__device__ inline A join(A a, A b) {
  if constexpr (Kind == NormKind::kInf) {
    return (b > a || b != b) ? b : a;
  } else {
    return a + b;
  }
}

template <NormKind Kind>
__device__ inline double finish(double total) {
  return Kind == NormKind::kL2 ? sqrt(total) : total;
}

// Leaves value `i` of a task's piece in the result itself or among the partial values.
template <NormKind Kind, typename A>
__device__ inline void put(const ChannelNormTask& task, int64_t piece, int64_t i, double value,
                           double* partials) {
  if (task.partial_start < 0) {
    static_cast<A*>(task.result)[i] = static_cast<A>(finish<Kind>(value));
  } else {
    partials[task.partial_start + piece * task.width + i] = value;
  }
}

// ---------------------------------------------------------------------------------------------
// Rows
// ---------------------------------------------------------------------------------------------

// One thread's share of x: [n], read by `workers` threads: a head up to 16-byte alignment, packs,
// two in flight, and a tail.
template <NormKind Kind, typename T>
__device__ inline Accumulator<T> reduce_share(const T* x, int64_t n, int worker, int workers) {
  constexpr int kPack = Pack<T>::kSize;
  Accumulator<T> total = 0;
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t head = misaligned == 0 ? 0 : min(n, kPack - misaligned);
  if (worker < head) {
    total = take<Kind>(total, load(x[worker]));
  }
  const int64_t packs = (n - head) / kPack;
  const auto* packed = reinterpret_cast<const Pack<T>*>(x + head);
  int64_t i = worker;
  for (; i + workers < packs; i += 2 * workers) {
    const Pack<T> a = packed[i];
    const Pack<T> b = packed[i + workers];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      total = take<Kind>(total, load(a.values[j]));
      total = take<Kind>(total, load(b.values[j]));
    }
  }
  if (i < packs) {
    const Pack<T> a = packed[i];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      total = take<Kind>(total, load(a.values[j]));
    }
  }
  const int64_t tail = head + packs * kPack + worker;
  if (tail < n) {
    total = take<Kind>(total, load(x[tail]));
  }
  return total;
}

template <NormKind Kind, typename A>
__device__ inline A reduce_warp(A total) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    total = join<Kind>(total, exchange(total, mask));
  }
  return total;
}

template <NormKind Kind, typename T>
__device__ void run_rows(const ChannelNormTask& task, const ChannelNormUnit& unit,
                         double* partials) {
  using A = Accumulator<T>;
  __shared__ double warp_totals[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t inner_pieces = (task.inner + task.piece_inner - 1) / task.piece_inner;
  const int64_t outer_begin = unit.piece / inner_pieces * task.piece_outer;
  const int64_t outer_end = min(task.outer, outer_begin + task.piece_outer);
  const int64_t inner_begin = unit.piece % inner_pieces * task.piece_inner;
  const int64_t length = min(task.piece_inner, task.inner - inner_begin);
  const bool by_warp = (outer_end - outer_begin) * length <= kWarpRow;
  const int worker = by_warp ? lane : static_cast<int>(threadIdx.x);
  const int workers = by_warp ? kWarp : kThreads;
  const int64_t step = by_warp ? kWarps : 1;
  for (int64_t c = unit.first + (by_warp ? warp : 0); c < unit.first + unit.count; c += step) {
    const T* row = static_cast<const T*>(task.data) + c * task.channel_stride + inner_begin;
    A share = 0;
    for (int64_t o = outer_begin; o < outer_end; ++o) {
      const A part = reduce_share<Kind, T>(row + o * task.outer_stride, length, worker, workers);
      share = join<Kind>(share, part);
    }
    share = reduce_warp<Kind>(share);
    if (by_warp) {
      if (lane == 0) {
        put<Kind, A>(task, unit.piece, c, share, partials);
      }
      continue;
    }
    if (lane == 0) {
      warp_totals[warp] = share;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) {
        total = join<Kind>(total, warp_totals[w]);
      }
      put<Kind, A>(task, unit.piece, c, total, partials);
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------
// Columns
// ---------------------------------------------------------------------------------------------

// Each thread owns `Width` adjacent columns, read by one access, in each stride of the block.
template <NormKind Kind, typename T, int Width>
__device__ inline void add_columns(const ChannelNormTask& task, const ChannelNormUnit& unit,
                                   double* partials) {
  using A = Accumulator<T>;
  struct alignas(Width * sizeof(T)) Columns {
    T values[Width];
  };
  const int64_t begin = unit.piece * task.piece_outer;
  const int64_t end = min(task.outer, begin + task.piece_outer);
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * Width; i < unit.count;
       i += kThreads * Width) {
    A totals[Width] = {};
    const T* column = static_cast<const T*>(task.data) + unit.first + i;
#pragma unroll 4
    for (int64_t o = begin; o < end; ++o) {
      const auto columns = *reinterpret_cast<const Columns*>(column + o * task.outer_stride);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        totals[j] = take<Kind>(totals[j], load(columns.values[j]));
      }
    }
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      put<Kind, A>(task, unit.piece, unit.first + i + j, totals[j], partials);
    }
  }
}

template <NormKind Kind, typename T>
__device__ void run_columns(const ChannelNormTask& task, const ChannelNormUnit& unit,
                            double* partials) {
  constexpr int kPack = Pack<T>::kSize;
  const T* first = static_cast<const T*>(task.data) + unit.first;
  // Packs only where they leave no thread of the block idle that single columns would occupy.
  const bool packed = is_pack_aligned(first) && task.outer_stride % kPack == 0 &&
                      unit.count % kPack == 0 && unit.count >= kThreads * kPack;
  if (packed) {
    add_columns<Kind, T, kPack>(task, unit, partials);
  } else {
    add_columns<Kind, T, 1>(task, unit, partials);
  }
}

// ---------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------

template <NormKind Kind, typename T>
__device__ inline void run_unit(const ChannelNormTask& task, const ChannelNormUnit& unit,
                                double* partials) {
  if (task.columns) {
    run_columns<Kind, T>(task, unit, partials);
  } else {
    run_rows<Kind, T>(task, unit, partials);
  }
}

// One block per unit.
template <NormKind Kind>
__global__ void __launch_bounds__(kThreads)
    channel_norms_kernel(const ChannelNormTask* tasks, const ChannelNormUnit* units,
                         double* partials) {
  const ChannelNormUnit unit = units[blockIdx.x];
  const ChannelNormTask task = tasks[unit.task];
  switch (static_cast<ElementKind>(task.dtype)) {
    case ElementKind::kFloat:
      return run_unit<Kind, float>(task, unit, partials);
    case ElementKind::kDouble:
      return run_unit<Kind, double>(task, unit, partials);
    case ElementKind::kHalf:
      return run_unit<Kind, __half>(task, unit, partials);
    case ElementKind::kBFloat16:
      return run_unit<Kind, __nv_bfloat16>(task, unit, partials);
  }
}

// One thread per channel of a split task.
template <NormKind Kind>
__global__ void __launch_bounds__(kThreads)
    join_pieces_kernel(const ChannelNormTask* tasks, const ChannelNormUnit* units,
                       const double* partials) {
  const ChannelNormUnit unit = units[blockIdx.x];
  const ChannelNormTask task = tasks[unit.task];
  if (static_cast<int>(threadIdx.x) >= unit.count) {
    return;
  }
  const int64_t c = unit.first + threadIdx.x;
  double total = 0;
  for (int64_t piece = 0; piece < task.pieces; ++piece) {
    const double* values =
        partials + task.partial_start + piece * task.width + c * task.group_stride;
    for (int64_t j = 0; j < task.group; ++j) {
      total = join<Kind>(total, values[j]);
    }
  }
  total = finish<Kind>(total);
  if (static_cast<ElementKind>(task.dtype) == ElementKind::kDouble) {
    static_cast<double*>(task.result)[c] = total;
  } else {
    static_cast<float*>(task.result)[c] = static_cast<float>(total);
  }
}

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

template <NormKind Kind>
void launch_units(const ChannelNormTask* tasks, const ChannelNormUnit* units, int64_t unit_count,
                  double* partials, cudaStream_t stream) {
  channel_norms_kernel<Kind>
      <<<static_cast<unsigned>(unit_count), kThreads, 0, stream>>>(tasks, units, partials);
}

template <NormKind Kind>
void launch_joins(const ChannelNormTask* tasks, const ChannelNormUnit* units, int64_t unit_count,
                  const double* partials, cudaStream_t stream) {
  join_pieces_kernel<Kind>
      <<<static_cast<unsigned>(unit_count), kThreads, 0, stream>>>(tasks, units, partials);
}

}  // namespace

void launch_channel_norms(NormKind kind, const ChannelNormTask* tasks, const ChannelNormUnit* units,
                          int64_t unit_count, double* partials, cudaStream_t stream) {
  const auto launch = kind == NormKind::kL1   ? &launch_units<NormKind::kL1>
                      : kind == NormKind::kL2 ? &launch_units<NormKind::kL2>
                                              : &launch_units<NormKind::kInf>;
  launch(tasks, units, unit_count, partials, stream);
}

void launch_join_pieces(NormKind kind, const ChannelNormTask* tasks, const ChannelNormUnit* units,
                        int64_t unit_count, const double* partials, cudaStream_t stream) {
  const auto launch = kind == NormKind::kL1   ? &launch_joins<NormKind::kL1>
                      : kind == NormKind::kL2 ? &launch_joins<NormKind::kL2>
                                              : &launch_joins<NormKind::kInf>;
  launch(tasks, units, unit_count, partials, stream);
}

}  // namespace chanprune
