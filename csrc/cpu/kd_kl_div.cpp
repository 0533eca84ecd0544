// kd_kl_div and its backward on the CPU.
#include "kd_kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/half_types.h"
#include "cpu/kd_narrow_rows.h"
#include "cpu/kd_wide_rows.h"
#include "new_tensor.h"

namespace chanprune {
namespace {

constexpr int64_t kGrain = 8192;  // logits worth a thread: some 20 microseconds

// The raw data of a call.
template <typename T>
struct Batch {
  const T* student;
  const T* teacher;
  const int64_t* labels;          // or null
  const Accumulator<T>* weights;  // or null
  int64_t rows;
  int64_t classes;
  KdOptions options;
  double scale;  // of every row in the reduced loss

  explicit Batch(const KdInputs& inputs)
      : student(static_cast<const T*>(inputs.student.data_ptr())),
        teacher(static_cast<const T*>(inputs.teacher.data_ptr())),
        labels(inputs.labels ? static_cast<const int64_t*>(inputs.labels->data_ptr()) : nullptr),
        weights(inputs.row_weights
                    ? static_cast<const Accumulator<T>*>(inputs.row_weights->data_ptr())
                    : nullptr),
        rows(inputs.rows),
        classes(inputs.classes),
        options(inputs.options),
        scale(kd_row_scale(inputs)) {}

  // Label of a row, or -1 where the row has no hard term.
  int64_t label(int64_t row) const {
    return options.hard && labels[row] != options.ignore_index ? labels[row] : -1;
  }

  double weight(int64_t row) const { return weights == nullptr ? 1 : weights[row]; }
};

void check_labels(const KdInputs& inputs) {
  if (!inputs.labels.has_value()) {
    return;
  }
  const auto* labels = static_cast<const int64_t*>(inputs.labels->data_ptr());
  for (int64_t row = 0; row < inputs.rows; ++row) {
    CHANPRUNE_CHECK((labels[row] >= 0 && labels[row] < inputs.classes) ||
                        labels[row] == inputs.options.ignore_index,
                    "kd_kl_div: labels should be in [0, ", inputs.classes, ") or ignore_index ",
                    inputs.options.ignore_index, ", got ", labels[row], " at row ", row);
  }
}

int64_t rows_per_thread(int64_t classes) { return std::max<int64_t>(1, kGrain / classes); }

// ---------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------

struct LogSums {
  double student;
  double teacher;
  double hard;
};

double row_loss(const RowState& row, const LogSums& logs, int64_t label, double label_logit,
                int64_t classes, const KdOptions& options) {
  double loss = 0;
  if (options.soft_weight != 0) {
    const double kl = row.cross / row.teacher - logs.teacher + logs.student;
    loss = options.soft_weight * options.temperature * options.temperature * kl;
  }
  if (label >= 0) {
    double hard = (1 - options.label_smoothing) * (logs.hard - (label_logit - row.student_max));
    if (options.label_smoothing > 0) {
      hard +=
          options.label_smoothing * (logs.hard - row.differences / static_cast<double>(classes));
    }
    loss += options.hard_weight * hard;
  }
  return loss;
}

// Room for the exponentials of one row beside its gradient.
template <typename T>
class RowScratch {
  using A = Accumulator<T>;

 public:
  RowScratch(int64_t classes, bool hard)
      : student_(std::is_same_v<T, A> ? nullptr : new A[classes]),
        teacher_(new A[classes]),
        hard_(hard ? new A[classes] : nullptr) {}

  // The student's exponentials are kept where the gradient goes, if types allow.
  KeptTerms<A> terms(T* gradient) const {
    if constexpr (std::is_same_v<T, A>) {
      return {gradient, teacher_.get(), hard_.get()};
    } else {
      return {student_.get(), teacher_.get(), hard_.get()};
    }
  }

 private:
  std::unique_ptr<A[]> student_;
  std::unique_ptr<A[]> teacher_;
  std::unique_ptr<A[]> hard_;
};

// Turns the kept exponentials of a row into its gradient.
template <typename T>
void finish_gradient(const Batch<T>& batch, int64_t b, const RowState& row,
                     const KeptTerms<Accumulator<T>>& kept, T* gradient) {
  using A = Accumulator<T>;
  const int64_t label = batch.label(b);
  const KdOptions& options = batch.options;
  const double upstream = batch.scale * batch.weight(b);
  const double soft = upstream * options.soft_weight * options.temperature;
  const double hard = label >= 0 ? upstream * options.hard_weight : 0;
  const double uniform = options.label_smoothing / static_cast<double>(batch.classes);
  const GradientFactors<A> factors = {
      static_cast<A>(soft / row.student), static_cast<A>(soft / row.teacher),
      static_cast<A>(label >= 0 ? hard / row.hard : 0), static_cast<A>(hard * uniform)};
  const auto combine = label >= 0 ? &combine_terms<true, A> : &combine_terms<false, A>;
  combine(kept.student, kept.teacher, kept.hard, batch.classes, factors, kept.student);
  if (label >= 0) {
    kept.student[label] -= static_cast<A>(hard * (1 - options.label_smoothing));
  }
  if constexpr (!std::is_same_v<T, A>) {
    convert_out(kept.student, batch.classes, gradient);
  }
}

// Losses of rows [begin, end), and their statistics or gradients where these are not null.
template <typename T>
void run_wide_rows(const Batch<T>& batch, int64_t begin, int64_t end, double* losses,
                   Accumulator<T>* statistics, T* gradient) {
  using A = Accumulator<T>;
  const KdOptions& options = batch.options;
  const RowScratch<T> scratch(gradient == nullptr ? 0 : batch.classes, options.hard);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t at = b * batch.classes;
    T* const row_gradient = gradient == nullptr ? nullptr : gradient + at;
    if (batch.weight(b) == 0) {
      losses[b] = 0;
      if (statistics != nullptr) {
        std::fill_n(statistics + b * kKdStatistics, kKdStatistics, A(0));
      }
      if (gradient != nullptr) {
        std::fill_n(row_gradient, batch.classes, T{});
      }
      continue;
    }
    const T* s = batch.student + at;
    const T* t = batch.teacher + at;
    const auto kept = gradient == nullptr ? KeptTerms<A>{} : scratch.terms(row_gradient);
    const RowState row = gradient == nullptr
                             ? read_row(s, t, batch.classes, options)
                             : read_row_and_keep(s, t, batch.classes, options, kept);
    const LogSums logs = {std::log(row.student), std::log(row.teacher),
                          options.hard ? std::log(row.hard) : 0};
    const int64_t label = batch.label(b);
    losses[b] = batch.weight(b) *
                row_loss(row, logs, label, label >= 0 ? load(s[label]) : 0, batch.classes, options);
    if (statistics != nullptr) {
      A* out = statistics + b * kKdStatistics;
      out[kStudentMax] = static_cast<A>(row.student_max);
      out[kStudentLogSum] = static_cast<A>(logs.student);
      out[kTeacherMax] = static_cast<A>(row.teacher_max);
      out[kTeacherLogSum] = static_cast<A>(logs.teacher);
      out[kHardLogSum] = static_cast<A>(logs.hard);
    }
    if (gradient != nullptr) {
      finish_gradient(batch, b, row, kept, row_gradient);
    }
  }
}

// The same for rows of few classes; `begin` is a multiple of kLanes.
template <typename T>
void run_narrow_blocks(const Batch<T>& batch, int64_t begin, int64_t end, double* losses,
                       Accumulator<T>* statistics, T* gradient) {
  const auto run = batch.options.hard ? &run_narrow_rows<true, T> : &run_narrow_rows<false, T>;
  for (int64_t b = begin; b < end; b += kLanes) {
    const int64_t at = b * batch.classes;
    NarrowRows<T> rows{};
    rows.student = batch.student + at;
    rows.teacher = batch.teacher + at;
    rows.rows = std::min<int64_t>(kLanes, end - b);
    rows.classes = batch.classes;
    for (int64_t r = 0; r < rows.rows; ++r) {
      rows.labels[r] = batch.label(b + r);
    }
    rows.weights = batch.weights == nullptr ? nullptr : batch.weights + b;
    rows.losses = losses + b;
    rows.statistics = statistics == nullptr ? nullptr : statistics + b * kKdStatistics;
    rows.gradient = gradient == nullptr ? nullptr : gradient + at;
    rows.gradient_scale = batch.scale;
    run(rows, batch.options);
  }
}

// Sums or copies the row losses, in order: the result does not depend on the number of threads.
template <typename T>
void reduce(const Batch<T>& batch, const std::vector<double>& losses, Accumulator<T>* loss) {
  if (batch.options.reduction == KdReduction::kNone) {
    for (size_t b = 0; b < losses.size(); ++b) {
      loss[b] = static_cast<Accumulator<T>>(losses[b]);
    }
    return;
  }
  double total = 0;
  for (const double value : losses) {
    total += value;
  }
  *loss = static_cast<Accumulator<T>>(total * batch.scale);
}

// Writes the loss and, where not null, statistics or gradient (of the loss, or of the sum of the
// unreduced losses).
template <typename T>
void forward(const KdInputs& inputs, void* loss, void* statistics, void* gradient) {
  using A = Accumulator<T>;
  const Batch<T> batch(inputs);
  std::vector<double> losses(static_cast<size_t>(batch.rows));
  auto* const kept = static_cast<A*>(statistics);
  auto* const out = static_cast<T*>(gradient);
  const int64_t grain = rows_per_thread(batch.classes);
  if (batch.classes <= kNarrow) {
    const int64_t blocks = (batch.rows + kLanes - 1) / kLanes;
    torch::stable::parallel_for(
        0, blocks, (grain + kLanes - 1) / kLanes, [&](int64_t begin, int64_t end) {
          run_narrow_blocks(batch, begin * kLanes, std::min(batch.rows, end * kLanes),
                            losses.data(), kept, out);
        });
  } else {
    torch::stable::parallel_for(0, batch.rows, grain, [&](int64_t begin, int64_t end) {
      run_wide_rows(batch, begin, end, losses.data(), kept, out);
    });
  }
  reduce(batch, losses, static_cast<A*>(loss));
}

// ---------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------

// Gradient of the logits, from the upstream gradient and the statistics of the rows.
template <typename T>
void backward(const KdInputs& inputs, const void* grad, const void* statistics, void* gradient) {
  using A = Accumulator<T>;
  const Batch<T> batch(inputs);
  const auto* upstreams = static_cast<const A*>(grad);
  const auto* kept = static_cast<const A*>(statistics);
  auto* result = static_cast<T*>(gradient);
  const int64_t classes = batch.classes;
  const KdOptions& options = batch.options;
  const bool per_row = options.reduction == KdReduction::kNone;
  torch::stable::parallel_for(
      0, batch.rows, rows_per_thread(classes), [&](int64_t first, int64_t last) {
        alignas(64) A student_buffer[kChunk];
        alignas(64) A teacher_buffer[kChunk];
        alignas(64) A result_buffer[kChunk];
        for (int64_t b = first; b < last; ++b) {
          if (batch.weight(b) == 0) {
            std::fill_n(result + b * classes, classes, T{});
            continue;
          }
          const int64_t label = batch.label(b);
          const double upstream = batch.scale * batch.weight(b) * upstreams[per_row ? b : 0];
          const double hard = label >= 0 ? upstream * options.hard_weight : 0;
          RecomputeFactors<A> factors{
              {},
              static_cast<A>(1.0 / options.temperature),
              static_cast<A>(upstream * options.soft_weight * options.temperature),
              static_cast<A>(hard),
              static_cast<A>(options.label_smoothing / static_cast<double>(classes))};
          std::copy_n(kept + b * kKdStatistics, kKdStatistics, factors.statistics);
          const auto run = label >= 0 ? &differentiate<true, A> : &differentiate<false, A>;
          for (int64_t begin = 0; begin < classes; begin += kChunk) {
            const int64_t n = std::min(kChunk, classes - begin);
            const int64_t at = b * classes + begin;
            A* out = result_buffer;
            if constexpr (std::is_same_v<T, A>) {
              out = result + at;
            }
            run(as_accumulator(batch.student + at, n, student_buffer),
                as_accumulator(batch.teacher + at, n, teacher_buffer), n, factors, out);
            if (label >= begin && label < begin + n) {
              out[label - begin] -= static_cast<A>(hard * (1 - options.label_smoothing));
            }
            if constexpr (!std::is_same_v<T, A>) {
              convert_out(result_buffer, n, result + at);
            }
          }
        }
      });
}

// ---------------------------------------------------------------------------------------------
// Operators
// ---------------------------------------------------------------------------------------------

Tensor new_loss(const KdInputs& inputs) {
  const ScalarType dtype = accumulation_dtype(inputs.student.scalar_type());
  return inputs.options.reduction == KdReduction::kNone
             ? new_empty_vector(inputs.student, inputs.rows, dtype)
             : new_empty_strided(inputs.student, {}, {}, dtype);
}

Tensor new_gradient(const KdInputs& inputs) {
  return new_empty_strided(inputs.student, {inputs.rows, inputs.classes}, {inputs.classes, 1},
                           inputs.student.scalar_type());
}

void run_forward(const KdInputs& inputs, void* loss, void* statistics, void* gradient) {
  const ScalarType dtype = inputs.student.scalar_type();
  const auto run = dtype == ScalarType::Double     ? &forward<double>
                   : dtype == ScalarType::Half     ? &forward<Float16>
                   : dtype == ScalarType::BFloat16 ? &forward<BFloat16>
                                                   : &forward<float>;
  run(inputs, loss, statistics, gradient);
}

std::tuple<Tensor, Tensor> kd_kl_div_cpu(Tensor student, Tensor teacher,
                                         std::optional<Tensor> labels,
                                         std::optional<Tensor> row_weights, double temperature,
                                         double soft_weight, double hard_weight,
                                         double label_smoothing, int64_t ignore_index,
                                         int64_t reduction) {
  const KdInputs inputs =
      check_kd_kl_div(student, teacher, labels, row_weights, temperature, soft_weight, hard_weight,
                      label_smoothing, ignore_index, reduction);
  check_labels(inputs);
  Tensor loss = new_loss(inputs);
  Tensor statistics = new_empty_strided(student, {inputs.rows, kKdStatistics}, {kKdStatistics, 1},
                                        accumulation_dtype(student.scalar_type()));
  run_forward(inputs, loss.data_ptr(), statistics.data_ptr(), nullptr);
  return {loss, statistics};
}

std::tuple<Tensor, Tensor> kd_kl_div_with_gradient_cpu(Tensor student, Tensor teacher,
                                                       std::optional<Tensor> labels,
                                                       std::optional<Tensor> row_weights,
                                                       double temperature, double soft_weight,
                                                       double hard_weight, double label_smoothing,
                                                       int64_t ignore_index, int64_t reduction) {
  const KdInputs inputs =
      check_kd_kl_div(student, teacher, labels, row_weights, temperature, soft_weight, hard_weight,
                      label_smoothing, ignore_index, reduction);
  check_labels(inputs);
  Tensor loss = new_loss(inputs);
  Tensor gradient = new_gradient(inputs);
  run_forward(inputs, loss.data_ptr(), nullptr, gradient.data_ptr());
  return {loss, gradient};
}

Tensor kd_kl_div_backward_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor statistics,
                              std::optional<Tensor> labels, std::optional<Tensor> row_weights,
                              double temperature, double soft_weight, double hard_weight,
                              double label_smoothing, int64_t ignore_index, int64_t reduction) {
  const KdInputs inputs =
      check_kd_kl_div(student, teacher, labels, row_weights, temperature, soft_weight, hard_weight,
                      label_smoothing, ignore_index, reduction);
  check_labels(inputs);
  check_kd_backward(inputs, grad, statistics);
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor kept = torch::stable::contiguous(statistics);
  Tensor gradient = new_gradient(inputs);
  const ScalarType dtype = student.scalar_type();
  const auto run = dtype == ScalarType::Double     ? &backward<double>
                   : dtype == ScalarType::Half     ? &backward<Float16>
                   : dtype == ScalarType::BFloat16 ? &backward<BFloat16>
                                                   : &backward<float>;
  run(inputs, upstream.data_ptr(), kept.data_ptr(), gradient.data_ptr());
  return gradient;
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CPU, m) {
  m.impl("kd_kl_div", TORCH_BOX(&chanprune::kd_kl_div_cpu));
  m.impl("kd_kl_div_with_gradient", TORCH_BOX(&chanprune::kd_kl_div_with_gradient_cpu));
  m.impl("kd_kl_div_backward", TORCH_BOX(&chanprune::kd_kl_div_backward_cpu));
}
