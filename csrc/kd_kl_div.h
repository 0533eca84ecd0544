// kd_kl_div: distillation loss from raw logits, optionally with hard-label cross-entropy.
//
// With x = (s - max s) / T, y = (t - max t) / T, Zs = sum e^x, Zt = sum e^y over one row,
//   KL(softmax(t/T) || softmax(s/T)) = sum(e^y (y - x)) / Zt - ln Zt + ln Zs,
// and with q = softmax(s), e = label_smoothing,
//   CE = -(1 - e) ln q[label] - e/C sum ln q.
// A row's loss is row_weight (soft_weight T^2 KL + hard_weight CE); a row with weight 0 is left
// out, whatever its logits are. Both maxima move while a row is read, the sums are rescaled then,
// so each logit is read from memory once.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "kd_kl_div_options.h"

namespace chanprune {

// Checked, contiguous arguments.
struct KdInputs {
  torch::stable::Tensor student;  // [B, C]
  torch::stable::Tensor teacher;  // [B, C], dtype of student; without a soft term, student
  std::optional<torch::stable::Tensor> labels;       // int64 [B]
  std::optional<torch::stable::Tensor> row_weights;  // accumulation dtype [B]
  int64_t rows;
  int64_t classes;
  KdOptions options;
};

KdInputs check_kd_kl_div(const torch::stable::Tensor& student, const torch::stable::Tensor& teacher,
                         const std::optional<torch::stable::Tensor>& labels,
                         const std::optional<torch::stable::Tensor>& row_weights,
                         double temperature, double soft_weight, double hard_weight,
                         double label_smoothing, int64_t ignore_index, int64_t reduction);

// Checks what only the backward takes.
//   grad:       [] or, for reduction none, [B]; accumulation dtype
//   statistics: [B, kKdStatistics] as the forward returned them
void check_kd_backward(const KdInputs& inputs, const torch::stable::Tensor& grad,
                       const torch::stable::Tensor& statistics);

// What 1 unit of the result contributes to a row: 1 for none and sum, 1/B for batchmean.
inline double kd_row_scale(const KdInputs& inputs) {
  return inputs.options.reduction == KdReduction::kBatchMean && inputs.rows > 0
             ? 1.0 / static_cast<double>(inputs.rows)
             : 1.0;
}

}  // namespace chanprune
