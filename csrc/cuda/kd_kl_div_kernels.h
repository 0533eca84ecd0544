// Launchers of the kd_kl_div kernels; no torch types, so that nvcc reads no torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kd_kl_div_options.h"

namespace chanprune {

// All pointers are device memory. Logits and the gradient are of `dtype`; losses, statistics and
// the upstream gradient are float64 for float64 logits, else float32.
struct KdBatch {
  const void* student;    // [rows, classes]
  const void* teacher;    // [rows, classes]
  const int64_t* labels;  // [rows] or null
  const void* weights;    // [rows] or null: 1 everywhere; losses' type
  int64_t rows;
  int64_t classes;
  double row_scale;  // 1 or 1 / rows
  KdOptions options;
};

enum class LogitKind : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

//   losses:     [rows]
//   statistics: [rows, kKdStatistics] or null
//   gradient:   [rows, classes] of the reduced loss (of the losses' sum if there is none), or null
void launch_kd_rows(LogitKind dtype, const KdBatch& batch, void* losses, void* statistics,
                    void* gradient, cudaStream_t stream);

//   losses: [rows], loss: [] = row_scale * their sum
void launch_kd_sum(LogitKind dtype, const KdBatch& batch, const void* losses, void* loss,
                   cudaStream_t stream);

//   grad: [] or, for reduction none, [rows];  result: [rows, classes]
void launch_kd_backward(LogitKind dtype, const KdBatch& batch, const void* grad,
                        const void* statistics, void* result, cudaStream_t stream);

}  // namespace chanprune
