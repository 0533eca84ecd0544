// The gradient of a row of logits on CUDA, from its statistics.
#pragma once

#include <cstdint>

#include "cuda/kd_row_state.cuh"

namespace chanprune {

// What the gradient of a row needs beside its logits.
template <typename A>
struct RowFactors {
  A student_max;
  A student_log_sum;
  A teacher_max;
  A teacher_log_sum;
  A hard_log_sum;
  A soft;
  A hard;
  A at_label;  // taken off the label's own class
  A uniform;
  int64_t label;
};

template <bool Hard, typename A>
__device__ RowFactors<A> row_factors(A upstream, const A* kept, const int64_t* labels, int64_t b,
                                     int64_t classes, const KdFactors<A>& factors) {
  upstream *= factors.row_scale * factors.weight(b);
  RowFactors<A> row{kept[kStudentMax],
                    kept[kStudentLogSum],
                    kept[kTeacherMax],
                    kept[kTeacherLogSum],
                    kept[kHardLogSum],
                    upstream * factors.soft * factors.temperature,
                    0,
                    0,
                    factors.smoothing / static_cast<A>(classes),
                    -1};
  if constexpr (Hard) {
    const int64_t label = labels[b];
    if (label != factors.ignore_index) {
      const bool valid = label >= 0 && label < classes;
      row.hard = valid ? upstream * factors.hard : kNaN<A>;
      row.at_label = row.hard * (1 - factors.smoothing);
      row.label = label;
    }
  }
  return row;
}

template <bool Hard, typename A>
__device__ A derivative(const RowFactors<A>& row, A s, A t, int64_t k, A inverse_temperature) {
  const A d = s - row.student_max;
  const A p = exponential(d * inverse_temperature - row.student_log_sum);
  const A q = exponential((t - row.teacher_max) * inverse_temperature - row.teacher_log_sum);
  A result = row.soft * (p - q);
  if constexpr (Hard) {
    result += row.hard * (exponential(d - row.hard_log_sum) - row.uniform);
    result -= k == row.label ? row.at_label : A(0);
  }
  return result;
}

// Classes first, first + step, ... of one row, `Width` adjacent ones per access.
template <bool Hard, int Width, typename T>
__device__ void write_gradient(const RowFactors<Accumulator<T>>& row, const T* student,
                               const T* teacher, int64_t classes, int64_t first, int64_t step,
                               Accumulator<T> inverse_temperature, T* gradient) {
  struct alignas(Width * sizeof(T)) Classes {
    T values[Width];
  };
  for (int64_t i = first; i < classes; i += step) {
    const auto s = *reinterpret_cast<const Classes*>(student + i);
    const auto t = *reinterpret_cast<const Classes*>(teacher + i);
    Classes out;
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      store(&out.values[j], derivative<Hard>(row, load(s.values[j]), load(t.values[j]), i + j,
                                             inverse_temperature));
    }
    *reinterpret_cast<Classes*>(gradient + i) = out;
  }
}

template <int Width, typename T>
__device__ void write_zeros(int64_t classes, int64_t first, int64_t step, T* gradient) {
  struct alignas(Width * sizeof(T)) Classes {
    T values[Width];
  };
  Classes zeros;
#pragma unroll
  for (int j = 0; j < Width; ++j) {
    store(&zeros.values[j], Accumulator<T>(0));
  }
  for (int64_t i = first; i < classes; i += step) {
    *reinterpret_cast<Classes*>(gradient + i) = zeros;
  }
}

}  // namespace chanprune
