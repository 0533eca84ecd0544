// Host side of kd_kl_div on CUDA: results, statistics and launches.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cuda/kd_kl_div_kernels.h"
#include "cuda/launch.h"
#include "kd_kl_div.h"
#include "new_tensor.h"

namespace chanprune {
namespace {

LogitKind logit_kind(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Double:
      return LogitKind::kDouble;
    case ScalarType::Half:
      return LogitKind::kHalf;
    case ScalarType::BFloat16:
      return LogitKind::kBFloat16;
    default:
      return LogitKind::kFloat;
  }
}

KdBatch batch_of(const KdInputs& inputs) {
  return {
      inputs.student.data_ptr(),
      inputs.teacher.data_ptr(),
      inputs.labels.has_value() ? static_cast<const int64_t*>(inputs.labels->data_ptr()) : nullptr,
      inputs.row_weights.has_value() ? inputs.row_weights->data_ptr() : nullptr,
      inputs.rows,
      inputs.classes,
      kd_row_scale(inputs),
      inputs.options};
}

// Launches the forward; the loss is that of the reduction.
Tensor run_forward(const KdInputs& inputs, void* statistics, void* gradient, cudaStream_t stream) {
  const LogitKind kind = logit_kind(inputs.student);
  const KdBatch batch = batch_of(inputs);
  const ScalarType dtype = accumulation_dtype(inputs.student.scalar_type());
  const Tensor losses = new_empty_vector(inputs.student, inputs.rows, dtype);
  if (inputs.rows > 0) {
    launch_kd_rows(kind, batch, losses.data_ptr(), statistics, gradient, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (inputs.options.reduction == KdReduction::kNone) {
    return losses;
  }
  const Tensor loss = new_empty_strided(inputs.student, {}, {}, dtype);
  launch_kd_sum(kind, batch, losses.data_ptr(), loss.data_ptr(), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return loss;
}

Tensor new_gradient(const KdInputs& inputs) {
  return new_empty_strided(inputs.student, {inputs.rows, inputs.classes}, {inputs.classes, 1},
                           inputs.student.scalar_type());
}

std::tuple<Tensor, Tensor> kd_kl_div_cuda(Tensor student, Tensor teacher,
                                          std::optional<Tensor> labels,
                                          std::optional<Tensor> row_weights, double temperature,
                                          double soft_weight, double hard_weight,
                                          double label_smoothing, int64_t ignore_index,
                                          int64_t reduction) {
  const LaunchScope scope(student);
  const KdInputs inputs =
      check_kd_kl_div(student, teacher, labels, row_weights, temperature, soft_weight, hard_weight,
                      label_smoothing, ignore_index, reduction);
  const Tensor statistics =
      new_empty_strided(student, {inputs.rows, kKdStatistics}, {kKdStatistics, 1},
                        accumulation_dtype(student.scalar_type()));
  return {run_forward(inputs, statistics.data_ptr(), nullptr, scope.stream()), statistics};
}

std::tuple<Tensor, Tensor> kd_kl_div_with_gradient_cuda(Tensor student, Tensor teacher,
                                                        std::optional<Tensor> labels,
                                                        std::optional<Tensor> row_weights,
                                                        double temperature, double soft_weight,
                                                        double hard_weight, double label_smoothing,
                                                        int64_t ignore_index, int64_t reduction) {
  const LaunchScope scope(student);
  const KdInputs inputs =
      check_kd_kl_div(student, teacher, labels, row_weights, temperature, soft_weight, hard_weight,
                      label_smoothing, ignore_index, reduction);
  const Tensor gradient = new_gradient(inputs);
  return {run_forward(inputs, nullptr, gradient.data_ptr(), scope.stream()), gradient};
}

Tensor kd_kl_div_backward_cuda(Tensor grad, Tensor student, Tensor teacher, Tensor statistics,
                               std::optional<Tensor> labels, std::optional<Tensor> row_weights,
                               double temperature, double soft_weight, double hard_weight,
                               double label_smoothing, int64_t ignore_index, int64_t reduction) {
  const LaunchScope scope(student);
  const KdInputs inputs =
      check_kd_kl_div(student, teacher, labels, row_weights, temperature, soft_weight, hard_weight,
                      label_smoothing, ignore_index, reduction);
  check_kd_backward(inputs, grad, statistics);
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor kept = torch::stable::contiguous(statistics);
  const Tensor gradient = new_gradient(inputs);
  if (inputs.rows > 0) {
    launch_kd_backward(logit_kind(student), batch_of(inputs), upstream.data_ptr(), kept.data_ptr(),
                       gradient.data_ptr(), scope.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return gradient;
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CUDA, m) {
  m.impl("kd_kl_div", TORCH_BOX(&chanprune::kd_kl_div_cuda));
  m.impl("kd_kl_div_with_gradient", TORCH_BOX(&chanprune::kd_kl_div_with_gradient_cuda));
  m.impl("kd_kl_div_backward", TORCH_BOX(&chanprune::kd_kl_div_backward_cuda));
}
