// kd_kl_div and its backward on CUDA. A warp owns a short row, a block a long one; every logit is
// read once per pass. Row losses are added in a fixed order by one block: no atomics, no host
// synchronisation.
#include <algorithm>

#include "cuda/element.cuh"
#include "cuda/kd_kl_div_kernels.h"
#include "cuda/kd_row_gradient.cuh"
#include "cuda/kd_row_state.cuh"

namespace chanprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kWarpRow = 1024;  // classes up to which a warp owns a row
constexpr int kReduceThreads = 1024;
constexpr int kPacksPerThread = 4;  // of a long row in the backward

// ---------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------

// Arguments of the forward kernels.
template <typename T>
struct RowsJob {
  const T* student;
  const T* teacher;
  const int64_t* labels;
  int64_t rows;
  int64_t classes;
  KdFactors<Accumulator<T>> factors;
  Accumulator<T>* losses;
  Accumulator<T>* statistics;  // or null
  T* gradient;                 // or null
};

// Loss, statistics and gradient of a finished row, which all `workers` threads of it hold alike.
template <bool Hard, int Width, typename T>
__device__ void finish_row(const RowsJob<T>& job, int64_t b, const RowState<Accumulator<T>>& row,
                           int worker, int workers) {
  using A = Accumulator<T>;
  const RowStatistics<Hard, A> statistics(row);
  const T* s = job.student + b * job.classes;
  if (worker == 0) {
    job.losses[b] =
        static_cast<A>(row_loss<Hard, T>(row, s, job.classes, job.labels, b, job.factors));
    if (job.statistics != nullptr) {
      for (int k = 0; k < kKdStatistics; ++k) {
        job.statistics[b * kKdStatistics + k] = statistics.values[k];
      }
    }
  }
  if (job.gradient != nullptr) {  // the row is read again, from a cache where it fits
    const auto factors =
        row_factors<Hard, A>(A(1), statistics.values, job.labels, b, job.classes, job.factors);
    write_gradient<Hard, Width, T>(factors, s, job.teacher + b * job.classes, job.classes,
                                   static_cast<int64_t>(worker) * Width,
                                   static_cast<int64_t>(workers) * Width,
                                   job.factors.inverse_temperature, job.gradient + b * job.classes);
  }
}

// A row that is left out: nothing of it is read.
template <int Width, typename T>
__device__ void skip_row(const RowsJob<T>& job, int64_t b, int worker, int workers) {
  if (worker == 0) {
    job.losses[b] = 0;
    if (job.statistics != nullptr) {
      for (int k = 0; k < kKdStatistics; ++k) {
        job.statistics[b * kKdStatistics + k] = 0;
      }
    }
  }
  if (job.gradient != nullptr) {
    write_zeros<Width, T>(job.classes, static_cast<int64_t>(worker) * Width,
                          static_cast<int64_t>(workers) * Width, job.gradient + b * job.classes);
  }
}

template <bool Hard, int Width, typename T>
__global__ void __launch_bounds__(kThreads) kd_rows_by_warp(RowsJob<T> job) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (b >= job.rows) {
    return;
  }
  if (job.factors.weight(b) == 0) {
    return skip_row<Width, T>(job, b, lane, kWarp);
  }
  const auto share =
      read_share<Hard, Width, T>(job.student + b * job.classes, job.teacher + b * job.classes,
                                 job.classes, lane, kWarp, job.factors.inverse_temperature);
  finish_row<Hard, Width, T>(job, b, join_warp(share, job.factors.inverse_temperature), lane,
                             kWarp);
}

// One block per row, so that every branch on the row is taken by all of its threads.
template <bool Hard, int Width, typename T>
__global__ void __launch_bounds__(kThreads) kd_rows_by_block(RowsJob<T> job) {
  using A = Accumulator<T>;
  __shared__ RowState<A> warp_rows[kWarps];
  const int64_t b = blockIdx.x;
  const int worker = static_cast<int>(threadIdx.x);
  if (job.factors.weight(b) == 0) {
    return skip_row<Width, T>(job, b, worker, kThreads);
  }
  const auto share =
      read_share<Hard, Width, T>(job.student + b * job.classes, job.teacher + b * job.classes,
                                 job.classes, worker, kThreads, job.factors.inverse_temperature);
  const auto warp_row = join_warp(share, job.factors.inverse_temperature);
  if (worker % kWarp == 0) {
    warp_rows[worker / kWarp] = warp_row;
  }
  __syncthreads();
  // Every thread joins the warps for itself, in one order: cheaper than to hand the result round.
  RowState<A> row = warp_rows[0];
  for (int w = 1; w < kWarps; ++w) {
    row.join(warp_rows[w], job.factors.inverse_temperature);
  }
  finish_row<Hard, Width, T>(job, b, row, worker, kThreads);
}

template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    sum_losses_kernel(const A* losses, int64_t rows, double scale, A* loss) {
  __shared__ double shares[kReduceThreads];
  double share = 0;
  for (int64_t b = threadIdx.x; b < rows; b += kReduceThreads) {
    share += losses[b];
  }
  shares[threadIdx.x] = share;
  __syncthreads();
  for (int width = kReduceThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) {
      shares[threadIdx.x] += shares[threadIdx.x + width];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    *loss = static_cast<A>(shares[0] * scale);
  }
}

// ---------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------

// Grid: x over rows (a warp or a block each), y over shares of long rows.
template <bool Hard, int Width, bool ByWarp, typename T>
__global__ void __launch_bounds__(kThreads)
    kd_backward_kernel(const Accumulator<T>* grad, bool per_row, const T* student, const T* teacher,
                       const Accumulator<T>* statistics, const int64_t* labels, int64_t rows,
                       int64_t classes, KdFactors<Accumulator<T>> factors, T* result) {
  using A = Accumulator<T>;
  const int64_t b = ByWarp ? static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp
                           : static_cast<int64_t>(blockIdx.x);
  if (b >= rows) {
    return;
  }
  const int worker = static_cast<int>(threadIdx.x) % (ByWarp ? kWarp : kThreads);
  const int64_t step = static_cast<int64_t>(ByWarp ? kWarp : kThreads) * Width;
  const int64_t first = blockIdx.y * step + static_cast<int64_t>(worker) * Width;
  const int64_t at = b * classes;
  if (factors.weight(b) == 0) {
    return write_zeros<Width, T>(classes, first, step * gridDim.y, result + at);
  }
  const auto row = row_factors<Hard, A>(grad[per_row ? b : 0], statistics + b * kKdStatistics,
                                        labels, b, classes, factors);
  write_gradient<Hard, Width, T>(row, student + at, teacher + at, classes, first, step * gridDim.y,
                                 factors.inverse_temperature, result + at);
}

// ---------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------

template <typename A>
KdFactors<A> factors_of(const KdBatch& batch) {
  const KdOptions& options = batch.options;
  return {static_cast<A>(1.0 / options.temperature),
          static_cast<A>(options.temperature),
          static_cast<A>(options.soft_weight),
          static_cast<A>(options.hard_weight),
          static_cast<A>(options.label_smoothing),
          static_cast<A>(batch.row_scale),
          options.ignore_index,
          static_cast<const A*>(batch.weights)};
}

// Rows can be read in 16-byte packs when every row starts on one.
template <typename T>
bool rows_are_packed(const KdBatch& batch) {
  const auto start =
      reinterpret_cast<uintptr_t>(batch.student) | reinterpret_cast<uintptr_t>(batch.teacher);
  return batch.classes % Pack<T>::kSize == 0 && start % 16 == 0;
}

unsigned blocks_of_warps(int64_t rows) {
  return static_cast<unsigned>((rows + kWarps - 1) / kWarps);
}

template <bool Hard, int Width, typename T>
void launch_rows(const KdBatch& batch, void* losses, void* statistics, void* gradient,
                 cudaStream_t stream) {
  using A = Accumulator<T>;
  const RowsJob<T> job = {static_cast<const T*>(batch.student),
                          static_cast<const T*>(batch.teacher),
                          batch.labels,
                          batch.rows,
                          batch.classes,
                          factors_of<A>(batch),
                          static_cast<A*>(losses),
                          static_cast<A*>(statistics),
                          static_cast<T*>(gradient)};
  if (batch.classes <= kWarpRow) {
    kd_rows_by_warp<Hard, Width, T><<<blocks_of_warps(batch.rows), kThreads, 0, stream>>>(job);
  } else {
    kd_rows_by_block<Hard, Width, T>
        <<<static_cast<unsigned>(batch.rows), kThreads, 0, stream>>>(job);
  }
}

template <bool Hard, int Width, typename T>
void launch_gradient(const KdBatch& batch, const void* grad, const void* statistics, void* result,
                     cudaStream_t stream) {
  using A = Accumulator<T>;
  const bool per_row = batch.options.reduction == KdReduction::kNone;
  const auto factors = factors_of<A>(batch);
  const bool by_warp = batch.classes <= kWarpRow;
  const int64_t share = static_cast<int64_t>(kThreads) * Width * kPacksPerThread;
  const auto shares =
      static_cast<unsigned>(std::min<int64_t>(65535, (batch.classes + share - 1) / share));
  const auto kernel = by_warp ? &kd_backward_kernel<Hard, Width, true, T>
                              : &kd_backward_kernel<Hard, Width, false, T>;
  const dim3 grid =
      by_warp ? dim3(blocks_of_warps(batch.rows)) : dim3(static_cast<unsigned>(batch.rows), shares);
  kernel<<<grid, kThreads, 0, stream>>>(
      static_cast<const A*>(grad), per_row, static_cast<const T*>(batch.student),
      static_cast<const T*>(batch.teacher), static_cast<const A*>(statistics), batch.labels,
      batch.rows, batch.classes, factors, static_cast<T*>(result));
}

template <typename T>
void run_rows(const KdBatch& batch, void* losses, void* statistics, void* gradient,
              cudaStream_t stream) {
  constexpr int kPack = Pack<T>::kSize;
  const bool packed = rows_are_packed<T>(batch);
  const auto run = batch.options.hard
                       ? (packed ? &launch_rows<true, kPack, T> : &launch_rows<true, 1, T>)
                       : (packed ? &launch_rows<false, kPack, T> : &launch_rows<false, 1, T>);
  run(batch, losses, statistics, gradient, stream);
}

template <typename T>
void run_backward(const KdBatch& batch, const void* grad, const void* statistics, void* result,
                  cudaStream_t stream) {
  constexpr int kPack = Pack<T>::kSize;
  const bool packed = rows_are_packed<T>(batch);
  const auto run =
      batch.options.hard
          ? (packed ? &launch_gradient<true, kPack, T> : &launch_gradient<true, 1, T>)
          : (packed ? &launch_gradient<false, kPack, T> : &launch_gradient<false, 1, T>);
  run(batch, grad, statistics, result, stream);
}

}  // namespace

void launch_kd_rows(LogitKind dtype, const KdBatch& batch, void* losses, void* statistics,
                    void* gradient, cudaStream_t stream) {
  switch (dtype) {
    case LogitKind::kFloat:
      return run_rows<float>(batch, losses, statistics, gradient, stream);
    case LogitKind::kDouble:
      return run_rows<double>(batch, losses, statistics, gradient, stream);
    case LogitKind::kHalf:
      return run_rows<__half>(batch, losses, statistics, gradient, stream);
    case LogitKind::kBFloat16:
      return run_rows<__nv_bfloat16>(batch, losses, statistics, gradient, stream);
  }
}

void launch_kd_sum(LogitKind dtype, const KdBatch& batch, const void* losses, void* loss,
                   cudaStream_t stream) {
  if (dtype == LogitKind::kDouble) {
    sum_losses_kernel<double><<<1, kReduceThreads, 0, stream>>>(static_cast<const double*>(losses),
                                                                batch.rows, batch.row_scale,
                                                                static_cast<double*>(loss));
  } else {
    sum_losses_kernel<float><<<1, kReduceThreads, 0, stream>>>(
        static_cast<const float*>(losses), batch.rows, batch.row_scale, static_cast<float*>(loss));
  }
}

void launch_kd_backward(LogitKind dtype, const KdBatch& batch, const void* grad,
                        const void* statistics, void* result, cudaStream_t stream) {
  switch (dtype) {
    case LogitKind::kFloat:
      return run_backward<float>(batch, grad, statistics, result, stream);
    case LogitKind::kDouble:
      return run_backward<double>(batch, grad, statistics, result, stream);
    case LogitKind::kHalf:
      return run_backward<__half>(batch, grad, statistics, result, stream);
    case LogitKind::kBFloat16:
      return run_backward<__nv_bfloat16>(batch, grad, statistics, result, stream);
  }
}

}  // namespace chanprune
