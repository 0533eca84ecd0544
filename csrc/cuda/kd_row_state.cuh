// A row of logits in progress on CUDA: read once, joined between lanes, turned into its loss.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/element.cuh"
#include "kd_kl_div_options.h"

namespace chanprune {

// The options in the accumulation type, as kernels take them.
template <typename A>
struct KdFactors {
  A inverse_temperature;
  A temperature;
  A soft;
  A hard;
  A smoothing;
  A row_scale;  // 1 or 1/B
  int64_t ignore_index;
  const A* weights;  // null: 1 everywhere

  __device__ A weight(int64_t row) const { return weights == nullptr ? A(1) : weights[row]; }
};

template <typename A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

__device__ inline float exponential(float x) { return __expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// Maxima so far and sums relative to them; see kd_kl_div.h for the formulae.
template <typename A>
struct RowState {
  A student_max;
  A teacher_max;
  A student;
  A teacher;
  A cross;
  A hard;
  A differences;
  A seen;

  __device__ static RowState empty() {
    return {kMinusInfinity<A>, kMinusInfinity<A>, 0, 0, 0, 0, 0, 0};
  }

  // A row that is -inf so far has no maximum to subtract; 0 leaves its terms at e^-inf = 0.
  __device__ static A reference(A maximum) { return maximum == kMinusInfinity<A> ? 0 : maximum; }

  // Re-expresses the sums relative to larger or equal maxima.
  __device__ void raise(A new_student_max, A new_teacher_max, A inverse_temperature) {
    if (new_student_max == student_max && new_teacher_max == teacher_max) {
      return;
    }
    const A ds = student > 0 || hard > 0 ? student_max - new_student_max : 0;
    const A dt = teacher > 0 ? teacher_max - new_teacher_max : 0;
    const A shrink = exponential(dt * inverse_temperature);
    cross = teacher > 0 && shrink > 0 ? shrink * (cross + teacher * (dt - ds) * inverse_temperature)
                                      : 0;
    teacher *= shrink;
    student *= exponential(ds * inverse_temperature);
    hard *= exponential(ds);
    differences += seen == 0 ? 0 : seen * (student_max - new_student_max);
    student_max = new_student_max;
    teacher_max = new_teacher_max;
  }

  // Adds one class whose logits do not exceed the maxima.
  template <bool Hard>
  __device__ void add(A s, A t, A inverse_temperature) {
    const A d = s - reference(student_max);
    const A x = d * inverse_temperature;
    const A y = (t - reference(teacher_max)) * inverse_temperature;
    const A ey = exponential(y);
    student += exponential(x);
    teacher += ey;
    cross += ey == 0 ? 0 : ey * (y - x);  // p ln p = 0 at p = 0, also where y or x is -inf
    if constexpr (Hard) {
      hard += exponential(d);
      differences += d;
      seen += 1;
    }
  }

  __device__ void join(RowState other, A inverse_temperature) {
    const A s = max(student_max, other.student_max);
    const A t = max(teacher_max, other.teacher_max);
    raise(s, t, inverse_temperature);
    other.raise(s, t, inverse_temperature);
    student += other.student;
    teacher += other.teacher;
    cross += other.cross;
    hard += other.hard;
    differences += other.differences;
    seen += other.seen;
  }

  __device__ RowState from_lane(int mask) const {
    RowState other;
    other.student_max = exchange(student_max, mask);
    other.teacher_max = exchange(teacher_max, mask);
    other.student = exchange(student, mask);
    other.teacher = exchange(teacher, mask);
    other.cross = exchange(cross, mask);
    other.hard = exchange(hard, mask);
    other.differences = exchange(differences, mask);
    other.seen = exchange(seen, mask);
    return other;
  }
};

// One thread's share of a row: `Width` adjacent classes per access, then on by `workers`.
template <bool Hard, int Width, typename T>
__device__ RowState<Accumulator<T>> read_share(const T* student, const T* teacher, int64_t classes,
                                               int worker, int workers,
                                               Accumulator<T> inverse_temperature) {
  using A = Accumulator<T>;
  struct alignas(Width * sizeof(T)) Classes {
    T values[Width];
  };
  auto row = RowState<A>::empty();
  for (int64_t i = static_cast<int64_t>(worker) * Width; i < classes;
       i += static_cast<int64_t>(workers) * Width) {
    const auto s = *reinterpret_cast<const Classes*>(student + i);
    const auto t = *reinterpret_cast<const Classes*>(teacher + i);
    A student_max = row.student_max;
    A teacher_max = row.teacher_max;
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      student_max = max(student_max, load(s.values[j]));
      teacher_max = max(teacher_max, load(t.values[j]));
    }
    row.raise(student_max, teacher_max, inverse_temperature);
#pragma unroll
    for (int j = 0; j < Width; ++j) {
      row.template add<Hard>(load(s.values[j]), load(t.values[j]), inverse_temperature);
    }
  }
  return row;
}

template <typename A>
__device__ RowState<A> join_warp(RowState<A> row, A inverse_temperature) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    row.join(row.from_lane(mask), inverse_temperature);
  }
  return row;
}

// What the backward needs of a row.
template <bool Hard, typename A>
struct RowStatistics {
  A values[kKdStatistics];

  __device__ explicit RowStatistics(const RowState<A>& row)
      : values{row.student_max, logarithm(row.student), row.teacher_max, logarithm(row.teacher),
               Hard ? logarithm(row.hard) : A(0)} {}
};

// In float64, once a row: the terms of the divergence nearly cancel, and T^2 multiplies what is
// left.
template <bool Hard, typename T>
__device__ double row_loss(const RowState<Accumulator<T>>& row, const T* student, int64_t classes,
                           const int64_t* labels, int64_t b,
                           const KdFactors<Accumulator<T>>& factors) {
  using A = Accumulator<T>;
  double loss = 0;
  if (factors.soft != 0) {
    const double kl = static_cast<double>(row.cross) / row.teacher +
                      log(static_cast<double>(row.student) / row.teacher);
    loss = static_cast<double>(factors.soft) * factors.temperature * factors.temperature * kl;
  }
  if constexpr (Hard) {
    const int64_t label = labels[b];
    if (label != factors.ignore_index) {
      // An out-of-range label cannot be reported from here without a wait; NaN cannot be missed.
      const bool valid = label >= 0 && label < classes;
      const A logit = valid ? load(student[label]) : kNaN<A>;
      const double log_sum = log(static_cast<double>(row.hard));
      double hard = (1 - factors.smoothing) * (log_sum - (logit - row.student_max));
      if (factors.smoothing > 0) {
        hard += factors.smoothing *
                (log_sum - static_cast<double>(row.differences) / static_cast<double>(classes));
      }
      loss += factors.hard * hard;
    }
  }
  return factors.weight(b) * loss;
}

}  // namespace chanprune
