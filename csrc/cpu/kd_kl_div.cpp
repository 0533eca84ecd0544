// kd_kl_div and its backward on the CPU.
#include "kd_kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "checks.h"
#include "cpu/half_types.h"
#include "cpu/simd.h"
#include "cpu/vector_exp.h"
#include "new_tensor.h"

namespace chanprune {
namespace {

// Logits worked on together: both chunks and their converted copies stay in the first-level cache.
constexpr int64_t kChunk = 1024;
constexpr int64_t kGrain = 16384;  // logits worth a thread
constexpr int kLanes = 16;

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, typename A>
CHANPRUNE_CLONES void convert_in(const T* __restrict x, int64_t n, A* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = load(x[i]);
  }
}

template <typename T, typename A>
CHANPRUNE_CLONES void convert_out(const A* __restrict x, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    store(out + i, x[i]);
  }
}

// x as an array of the accumulation type: x itself, or converted into `buffer`.
template <typename T>
const Accumulator<T>* as_accumulator(const T* x, int64_t n, Accumulator<T>* buffer) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return x;
  } else {
    convert_in(x, n, buffer);
    return buffer;
  }
}

// The first n < kLanes elements of x, the other lanes -inf: a class that adds nothing.
template <typename A>
CHANPRUNE_INLINE void pad(const A* x, int64_t n, A* __restrict lanes) {
  for (int j = 0; j < kLanes; ++j) {
    lanes[j] = -std::numeric_limits<A>::infinity();
  }
  for (int64_t j = 0; j < n; ++j) {
    lanes[j] = x[j];
  }
}

// Halving keeps the additions independent, so that they are vectorised; short rows are mostly this.
template <typename A>
CHANPRUNE_INLINE A add_lanes(const A* lanes) {
  A sums[kLanes / 2];
  for (int j = 0; j < kLanes / 2; ++j) {
    sums[j] = lanes[j] + lanes[j + kLanes / 2];
  }
  for (int width = kLanes / 4; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      sums[j] += sums[j + width];
    }
  }
  return sums[0];
}

template <typename A>
CHANPRUNE_CLONES A largest(const A* x, int64_t n) {
  A lanes[kLanes];
  const int64_t whole = n - n % kLanes;
  pad(x + whole, n - whole, lanes);
  for (int j = 0; j < kLanes; ++j) {  // NaN is passed over here and met again in the sums
    lanes[j] = lanes[j] == lanes[j] ? lanes[j] : -std::numeric_limits<A>::infinity();
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
    }
  }
  return lanes[0];
}

template <typename A>
struct ChunkSums {
  A student;      // sum e^x
  A teacher;      // sum e^y
  A cross;        // sum e^y (y - x)
  A hard;         // sum e^(s - max s)
  A differences;  // sum (s - max s)
};

// One class: adds its terms to lane j of the sums.
template <bool Hard, typename A>
CHANPRUNE_INLINE void add_class(A s, A t, A student_max, A teacher_max, A inverse_temperature, A* z,
                                A* w, A* cross, A* hard, A* differences) {
  const A d = s - student_max;
  const A x = d * inverse_temperature;
  const A y = (t - teacher_max) * inverse_temperature;
  const A ey = vector_exp(y);
  *z += vector_exp(x);
  *w += ey;
  *cross += ey == 0 ? 0 : ey * (y - x);  // p ln p = 0 at p = 0, also where y or x is -inf
  if constexpr (Hard) {
    *hard += vector_exp(d);
    *differences += d;
  }
}

template <bool Hard, typename A>
CHANPRUNE_CLONES void sum_chunk(const A* __restrict s, const A* __restrict t, int64_t n,
                                A student_max, A teacher_max, A inverse_temperature,
                                ChunkSums<A>* sums) {
  A z[kLanes] = {};
  A w[kLanes] = {};
  A cross[kLanes] = {};
  A hard[kLanes] = {};
  A differences[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      add_class<Hard>(s[i + j], t[i + j], student_max, teacher_max, inverse_temperature, z + j,
                      w + j, cross + j, hard + j, differences + j);
    }
  }
  // The remainder goes through the same vector code on a padded copy: -inf adds nothing.
  if (i < n) {
    A tail_s[kLanes];
    A tail_t[kLanes];
    pad(s + i, n - i, tail_s);
    pad(t + i, n - i, tail_t);
    A unused[kLanes] = {};
    for (int j = 0; j < kLanes; ++j) {
      add_class<Hard>(tail_s[j], tail_t[j], student_max, teacher_max, inverse_temperature, z + j,
                      w + j, cross + j, hard + j, unused + j);
    }
    if constexpr (Hard) {
      for (int j = 0; i + j < n; ++j) {
        differences[j] += s[i + j] - student_max;
      }
    }
  }
  *sums = {add_lanes(z), add_lanes(w), add_lanes(cross), 0, 0};
  if constexpr (Hard) {
    sums->hard = add_lanes(hard);
    sums->differences = add_lanes(differences);
  }
}

// A row in progress: maxima so far, sums relative to them. Float64, it is touched once per chunk.
struct RowState {
  double student_max = -std::numeric_limits<double>::infinity();
  double teacher_max = -std::numeric_limits<double>::infinity();
  double student = 0;
  double teacher = 0;
  double cross = 0;
  double hard = 0;
  double differences = 0;
  double seen = 0;  // classes

  // Re-expresses the sums relative to the maxima raised to the given ones.
  void raise(double new_student_max, double new_teacher_max, double inverse_temperature) {
    if (seen == 0) {
      student_max = new_student_max;
      teacher_max = new_teacher_max;
      return;
    }
    const double ds = student > 0 || hard > 0 ? student_max - new_student_max : 0;
    const double dt = teacher > 0 ? teacher_max - new_teacher_max : 0;
    const double shrink = std::exp(dt * inverse_temperature);
    cross = teacher > 0 && shrink > 0 ? shrink * (cross + teacher * (dt - ds) * inverse_temperature)
                                      : 0;
    teacher *= shrink;
    student *= std::exp(ds * inverse_temperature);
    hard *= std::exp(ds);
    differences += seen * (student_max - new_student_max);
    student_max = new_student_max;
    teacher_max = new_teacher_max;
  }
};

// A row that is -inf so far has no maximum to subtract; 0 leaves its terms at e^-inf = 0.
double finite_or_zero(double maximum) {
  return maximum == -std::numeric_limits<double>::infinity() ? 0 : maximum;
}

template <typename T>
RowState read_row(const T* student, const T* teacher, int64_t classes, const KdOptions& options) {
  using A = Accumulator<T>;
  alignas(64) A student_buffer[kChunk];
  alignas(64) A teacher_buffer[kChunk];
  const double inverse_temperature = 1.0 / options.temperature;
  RowState row;
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t n = std::min(kChunk, classes - begin);
    const A* s = as_accumulator(student + begin, n, student_buffer);
    const A* t = as_accumulator(teacher + begin, n, teacher_buffer);
    row.raise(std::max<double>(row.student_max, largest(s, n)),
              std::max<double>(row.teacher_max, largest(t, n)), inverse_temperature);
    ChunkSums<A> sums;
    const auto sum = options.hard ? &sum_chunk<true, A> : &sum_chunk<false, A>;
    sum(s, t, n, static_cast<A>(finite_or_zero(row.student_max)),
        static_cast<A>(finite_or_zero(row.teacher_max)), static_cast<A>(inverse_temperature),
        &sums);
    row.student += sums.student;
    row.teacher += sums.teacher;
    row.cross += sums.cross;
    row.hard += sums.hard;
    row.differences += sums.differences;
    row.seen += static_cast<double>(n);
  }
  return row;
}

double soft_loss(const RowState& row, double student_log_sum, double teacher_log_sum,
                 const KdOptions& options) {
  const double kl = row.cross / row.teacher - teacher_log_sum + student_log_sum;
  return options.soft_weight * options.temperature * options.temperature * kl;
}

double hard_loss(const RowState& row, double log_sum, double label_logit, int64_t classes,
                 const KdOptions& options) {
  double loss = (1 - options.label_smoothing) * (log_sum - (label_logit - row.student_max));
  if (options.label_smoothing > 0) {
    loss += options.label_smoothing * (log_sum - row.differences / static_cast<double>(classes));
  }
  return options.hard_weight * loss;
}

// Label of a row, or -1 where the row has no hard term.
int64_t label_of(const KdInputs& inputs, const int64_t* labels, int64_t row) {
  if (!inputs.options.hard || labels[row] == inputs.options.ignore_index) {
    return -1;
  }
  return labels[row];
}

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

const int64_t* label_data(const KdInputs& inputs) {
  return inputs.labels.has_value() ? static_cast<const int64_t*>(inputs.labels->data_ptr())
                                   : nullptr;
}

int64_t rows_per_thread(int64_t classes) { return std::max<int64_t>(1, kGrain / classes); }

template <typename T>
void forward(const KdInputs& inputs, double* losses, Accumulator<T>* statistics) {
  using A = Accumulator<T>;
  const auto* student = static_cast<const T*>(inputs.student.data_ptr());
  const auto* teacher = static_cast<const T*>(inputs.teacher.data_ptr());
  const int64_t* labels = label_data(inputs);
  const int64_t classes = inputs.classes;
  torch::stable::parallel_for(
      0, inputs.rows, rows_per_thread(classes), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          const T* s = student + b * classes;
          const RowState row = read_row(s, teacher + b * classes, classes, inputs.options);
          const double student_log_sum = std::log(row.student);
          const double teacher_log_sum = std::log(row.teacher);
          const double hard_log_sum = inputs.options.hard ? std::log(row.hard) : 0;
          losses[b] = inputs.options.soft_weight == 0
                          ? 0
                          : soft_loss(row, student_log_sum, teacher_log_sum, inputs.options);
          const int64_t label = label_of(inputs, labels, b);
          if (label >= 0) {
            losses[b] += hard_loss(row, hard_log_sum, load(s[label]), classes, inputs.options);
          }
          A* kept = statistics + b * kKdStatistics;
          kept[kStudentMax] = static_cast<A>(row.student_max);
          kept[kStudentLogSum] = static_cast<A>(student_log_sum);
          kept[kTeacherMax] = static_cast<A>(row.teacher_max);
          kept[kTeacherLogSum] = static_cast<A>(teacher_log_sum);
          kept[kHardLogSum] = static_cast<A>(hard_log_sum);
        }
      });
}

// Factors of one row's gradient before the label's own term:
// soft (p_s - p_t) + hard (q - uniform).
template <typename A>
struct GradientFactors {
  A inverse_temperature;
  A soft;
  A hard;
  A uniform;  // smoothing / C
};

template <bool Hard, typename A>
CHANPRUNE_INLINE A derivative(A s, A t, const A* kept, const GradientFactors<A>& by) {
  const A d = s - kept[kStudentMax];
  const A p = vector_exp(d * by.inverse_temperature - kept[kStudentLogSum]);
  const A q = vector_exp((t - kept[kTeacherMax]) * by.inverse_temperature - kept[kTeacherLogSum]);
  A result = by.soft * (p - q);
  if constexpr (Hard) {
    result += by.hard * (vector_exp(d - kept[kHardLogSum]) - by.uniform);
  }
  return result;
}

template <bool Hard, typename A>
CHANPRUNE_CLONES void differentiate(const A* __restrict s, const A* __restrict t, int64_t n,
                                    const A* __restrict statistics, GradientFactors<A> by,
                                    A* __restrict out) {
  A kept[kKdStatistics];  // copied: the gradient written could alias the originals
  for (int k = 0; k < kKdStatistics; ++k) {
    kept[k] = statistics[k];
  }
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; ++i) {
    out[i] = derivative<Hard>(s[i], t[i], kept, by);
  }
  if (whole < n) {  // through the same vector code, on a padded copy
    A tail_s[kLanes];
    A tail_t[kLanes];
    pad(s + whole, n - whole, tail_s);
    pad(t + whole, n - whole, tail_t);
    for (int j = 0; j < kLanes; ++j) {
      tail_s[j] = derivative<Hard>(tail_s[j], tail_t[j], kept, by);
    }
    for (int64_t i = whole; i < n; ++i) {
      out[i] = tail_s[i - whole];
    }
  }
}

// Gradient of the logits for the upstream gradient `grad`, null for ones.
template <typename T>
void backward(const KdInputs& inputs, const Accumulator<T>* grad, const Accumulator<T>* statistics,
              T* result) {
  using A = Accumulator<T>;
  const auto* student = static_cast<const T*>(inputs.student.data_ptr());
  const auto* teacher = static_cast<const T*>(inputs.teacher.data_ptr());
  const int64_t* labels = label_data(inputs);
  const int64_t classes = inputs.classes;
  const KdOptions& options = inputs.options;
  const double scale = kd_row_scale(inputs);
  const bool per_row = options.reduction == KdReduction::kNone;
  torch::stable::parallel_for(
      0, inputs.rows, rows_per_thread(classes), [&](int64_t first, int64_t last) {
        alignas(64) A student_buffer[kChunk];
        alignas(64) A teacher_buffer[kChunk];
        alignas(64) A result_buffer[kChunk];
        for (int64_t b = first; b < last; ++b) {
          const int64_t label = label_of(inputs, labels, b);
          const double upstream = scale * (grad == nullptr ? 1 : per_row ? grad[b] : grad[0]);
          const double hard = label >= 0 ? upstream * options.hard_weight : 0;
          const GradientFactors<A> by = {
              static_cast<A>(1.0 / options.temperature),
              static_cast<A>(upstream * options.soft_weight * options.temperature),
              static_cast<A>(hard),
              static_cast<A>(options.label_smoothing / static_cast<double>(classes))};
          const auto run = label >= 0 ? &differentiate<true, A> : &differentiate<false, A>;
          for (int64_t begin = 0; begin < classes; begin += kChunk) {
            const int64_t n = std::min(kChunk, classes - begin);
            const int64_t at = b * classes + begin;
            A* out = result_buffer;
            if constexpr (std::is_same_v<T, A>) {
              out = result + at;
            }
            run(as_accumulator(student + at, n, student_buffer),
                as_accumulator(teacher + at, n, teacher_buffer), n, statistics + b * kKdStatistics,
                by, out);
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

// Sums or copies the row losses, in order: the result does not depend on the number of threads.
template <typename A>
void reduce(const KdInputs& inputs, const std::vector<double>& losses, A* loss) {
  if (inputs.options.reduction == KdReduction::kNone) {
    for (size_t b = 0; b < losses.size(); ++b) {
      loss[b] = static_cast<A>(losses[b]);
    }
    return;
  }
  double total = 0;
  for (const double value : losses) {
    total += value;
  }
  *loss = static_cast<A>(total * kd_row_scale(inputs));
}

std::tuple<Tensor, Tensor> kd_kl_div_cpu(Tensor student, Tensor teacher,
                                         std::optional<Tensor> labels, double temperature,
                                         double soft_weight, double hard_weight,
                                         double label_smoothing, int64_t ignore_index,
                                         int64_t reduction) {
  const KdInputs inputs = check_kd_kl_div(student, teacher, labels, temperature, soft_weight,
                                          hard_weight, label_smoothing, ignore_index, reduction);
  check_labels(inputs);
  const ScalarType kept_dtype = accumulation_dtype(student.scalar_type());
  Tensor statistics =
      new_empty_strided(student, {inputs.rows, kKdStatistics}, {kKdStatistics, 1}, kept_dtype);
  Tensor loss = inputs.options.reduction == KdReduction::kNone
                    ? new_empty_vector(student, inputs.rows, kept_dtype)
                    : new_empty_strided(student, {}, {}, kept_dtype);
  std::vector<double> losses(static_cast<size_t>(inputs.rows));
  if (kept_dtype == ScalarType::Double) {
    forward<double>(inputs, losses.data(), static_cast<double*>(statistics.data_ptr()));
    reduce(inputs, losses, static_cast<double*>(loss.data_ptr()));
    return {loss, statistics};
  }
  auto* kept = static_cast<float*>(statistics.data_ptr());
  switch (student.scalar_type()) {
    case ScalarType::Half:
      forward<Float16>(inputs, losses.data(), kept);
      break;
    case ScalarType::BFloat16:
      forward<BFloat16>(inputs, losses.data(), kept);
      break;
    default:
      forward<float>(inputs, losses.data(), kept);
  }
  reduce(inputs, losses, static_cast<float*>(loss.data_ptr()));
  return {loss, statistics};
}

template <typename A>
void run_with_gradient(const KdInputs& inputs, A* loss, A* gradient) {
  std::vector<double> losses(static_cast<size_t>(inputs.rows));
  std::vector<A> statistics(static_cast<size_t>(inputs.rows * kKdStatistics));
  forward<A>(inputs, losses.data(), statistics.data());
  reduce(inputs, losses, loss);
  backward<A>(inputs, nullptr, statistics.data(), gradient);
}

std::tuple<Tensor, Tensor> kd_kl_div_with_gradient_cpu(Tensor student, Tensor teacher,
                                                       std::optional<Tensor> labels,
                                                       double temperature, double soft_weight,
                                                       double hard_weight, double label_smoothing,
                                                       int64_t ignore_index, int64_t reduction) {
  const KdInputs inputs = check_kd_kl_div(student, teacher, labels, temperature, soft_weight,
                                          hard_weight, label_smoothing, ignore_index, reduction);
  check_labels(inputs);
  const ScalarType dtype = student.scalar_type();
  CHANPRUNE_CHECK(dtype == accumulation_dtype(dtype),
                  "kd_kl_div_with_gradient: student should be float32 or float64 (a half gradient "
                  "would be rounded before it is scaled), got ",
                  dtype_name(dtype));
  Tensor loss = inputs.options.reduction == KdReduction::kNone
                    ? new_empty_vector(student, inputs.rows, dtype)
                    : new_empty_strided(student, {}, {}, dtype);
  Tensor gradient =
      new_empty_strided(student, {inputs.rows, inputs.classes}, {inputs.classes, 1}, dtype);
  if (dtype == ScalarType::Double) {
    run_with_gradient(inputs, static_cast<double*>(loss.data_ptr()),
                      static_cast<double*>(gradient.data_ptr()));
  } else {
    run_with_gradient(inputs, static_cast<float*>(loss.data_ptr()),
                      static_cast<float*>(gradient.data_ptr()));
  }
  return {loss, gradient};
}

Tensor kd_kl_div_backward_cpu(Tensor grad, Tensor student, Tensor teacher, Tensor statistics,
                              std::optional<Tensor> labels, double temperature, double soft_weight,
                              double hard_weight, double label_smoothing, int64_t ignore_index,
                              int64_t reduction) {
  const KdInputs inputs = check_kd_kl_div(student, teacher, labels, temperature, soft_weight,
                                          hard_weight, label_smoothing, ignore_index, reduction);
  check_labels(inputs);
  check_kd_backward(inputs, grad, statistics);
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor kept = torch::stable::contiguous(statistics);
  Tensor result = new_empty_strided(student, {inputs.rows, inputs.classes}, {inputs.classes, 1},
                                    student.scalar_type());
  const void* g = upstream.data_ptr();
  const void* k = kept.data_ptr();
  void* r = result.data_ptr();
  switch (student.scalar_type()) {
    case ScalarType::Double:
      backward<double>(inputs, static_cast<const double*>(g), static_cast<const double*>(k),
                       static_cast<double*>(r));
      break;
    case ScalarType::Half:
      backward<Float16>(inputs, static_cast<const float*>(g), static_cast<const float*>(k),
                        static_cast<Float16*>(r));
      break;
    case ScalarType::BFloat16:
      backward<BFloat16>(inputs, static_cast<const float*>(g), static_cast<const float*>(k),
                         static_cast<BFloat16*>(r));
      break;
    default:
      backward<float>(inputs, static_cast<const float*>(g), static_cast<const float*>(k),
                      static_cast<float*>(r));
  }
  return result;
}

}  // namespace
}  // namespace chanprune

STABLE_TORCH_LIBRARY_IMPL(chanprune, CPU, m) {
  m.impl("kd_kl_div", TORCH_BOX(&chanprune::kd_kl_div_cpu));
  m.impl("kd_kl_div_with_gradient", TORCH_BOX(&chanprune::kd_kl_div_with_gradient_cpu));
  m.impl("kd_kl_div_backward", TORCH_BOX(&chanprune::kd_kl_div_backward_cpu));
}
