// Checks of kd_kl_div, shared by the CPU and CUDA modules.
#include "kd_kl_div.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "checks.h"

namespace chanprune {

KdInputs check_kd_kl_div(const Tensor& student, const Tensor& teacher,
                         const std::optional<Tensor>& labels,
                         const std::optional<Tensor>& row_weights, double temperature,
                         double soft_weight, double hard_weight, double label_smoothing,
                         int64_t ignore_index, int64_t reduction) {
  CHANPRUNE_CHECK_FLOAT_TYPE(student.scalar_type(), "kd_kl_div: student");
  CHANPRUNE_CHECK(student.dim() == 2 && student.size(1) >= 1,
                  "kd_kl_div: student should be [rows, classes] with at least one class, got ",
                  student.dim(), " dims");
  CHANPRUNE_CHECK(teacher.dim() == 2 && teacher.size(0) == student.size(0) &&
                      teacher.size(1) == student.size(1),
                  "kd_kl_div: teacher should have the shape of student [", student.size(0), ", ",
                  student.size(1), "]");
  CHANPRUNE_CHECK(teacher.scalar_type() == student.scalar_type(),
                  "kd_kl_div: teacher should have the dtype of student ",
                  dtype_name(student.scalar_type()), ", got ", dtype_name(teacher.scalar_type()));
  CHANPRUNE_CHECK(teacher.device() == student.device(),
                  "kd_kl_div: student and teacher should be on one device");
  CHANPRUNE_CHECK(std::isfinite(temperature) && temperature > 0,
                  "kd_kl_div: temperature should be a finite number above 0, got ", temperature);
  CHANPRUNE_CHECK(std::isfinite(soft_weight) && soft_weight >= 0 && std::isfinite(hard_weight) &&
                      hard_weight >= 0,
                  "kd_kl_div: soft_weight and hard_weight should be finite and not negative, got ",
                  soft_weight, " and ", hard_weight);
  CHANPRUNE_CHECK(labels.has_value() || hard_weight == 0, "kd_kl_div: hard_weight ", hard_weight,
                  " needs labels");
  CHANPRUNE_CHECK(label_smoothing >= 0 && label_smoothing <= 1,
                  "kd_kl_div: label_smoothing should be in [0, 1], got ", label_smoothing);
  CHANPRUNE_CHECK(reduction >= 0 && reduction <= 2,
                  "kd_kl_div: reduction should be 0 (none), 1 (sum) or 2 (batchmean), got ",
                  reduction);
  // Asking first saves a pass through the dispatcher, which small batches would feel.
  const auto packed = [](const Tensor& logits) {
    return logits.is_contiguous() ? logits : torch::stable::contiguous(logits);
  };
  const Tensor read_student = packed(student);
  // Without a soft term nothing of the teacher may show: 0 times its NaN or infinity would.
  KdInputs inputs{read_student,
                  soft_weight == 0 ? read_student : packed(teacher),
                  std::nullopt,
                  std::nullopt,
                  student.size(0),
                  student.size(1),
                  {temperature, soft_weight, hard_weight, label_smoothing, ignore_index,
                   static_cast<KdReduction>(reduction), false}};
  if (labels.has_value()) {
    CHANPRUNE_CHECK(labels->dim() == 1 && labels->size(0) == student.size(0) &&
                        labels->scalar_type() == ScalarType::Long,
                    "kd_kl_div: labels should be int64 [", student.size(0), "], got ",
                    dtype_name(labels->scalar_type()), " with ", labels->numel(), " elements");
    CHANPRUNE_CHECK(labels->device() == student.device(),
                    "kd_kl_div: labels should be on the device of student");
    inputs.labels = torch::stable::contiguous(*labels);
    inputs.options.hard = hard_weight != 0;
  }
  if (row_weights.has_value()) {
    const ScalarType dtype = accumulation_dtype(student.scalar_type());
    CHANPRUNE_CHECK(row_weights->dim() == 1 && row_weights->size(0) == student.size(0) &&
                        row_weights->scalar_type() == dtype &&
                        row_weights->device() == student.device(),
                    "kd_kl_div: row_weights should be ", dtype_name(dtype), " [", student.size(0),
                    "] on the device of student, got ", dtype_name(row_weights->scalar_type()),
                    " with ", row_weights->numel(), " elements");
    inputs.row_weights = torch::stable::contiguous(*row_weights);
  }
  return inputs;
}

void check_kd_backward(const KdInputs& inputs, const Tensor& grad, const Tensor& statistics) {
  const ScalarType dtype = accumulation_dtype(inputs.student.scalar_type());
  const int64_t upstream = inputs.options.reduction == KdReduction::kNone ? inputs.rows : 1;
  CHANPRUNE_CHECK(grad.numel() == upstream && grad.scalar_type() == dtype &&
                      grad.device() == inputs.student.device(),
                  "kd_kl_div_backward: grad should be ", dtype_name(dtype), " with ", upstream,
                  " elements on the device of student, got ", dtype_name(grad.scalar_type()),
                  " with ", grad.numel());
  CHANPRUNE_CHECK(statistics.dim() == 2 && statistics.size(0) == inputs.rows &&
                      statistics.size(1) == kKdStatistics && statistics.scalar_type() == dtype &&
                      statistics.device() == inputs.student.device(),
                  "kd_kl_div_backward: statistics should be the ", dtype_name(dtype), " [",
                  inputs.rows, ", ", static_cast<int64_t>(kKdStatistics),
                  "] tensor that kd_kl_div returned");
}

}  // namespace chanprune
