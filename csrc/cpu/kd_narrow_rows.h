// kLanes rows of few classes at a time, one row per lane: a row by itself would leave most of a
// vector idle and pay for its sums one by one. See kd_kl_div.h for the formulae.
#pragma once

#include <cstdint>

#include "cpu/kd_wide_rows.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"
#include "kd_kl_div_options.h"

namespace chanprune {
namespace {  // clones are exported otherwise, whatever their visibility

constexpr int64_t kNarrow = 112;  // most classes of such a row

// What becomes of kLanes rows; arrays are per row.
template <typename T>
struct NarrowRows {
  const T* student;  // [rows, classes]
  const T* teacher;
  int64_t rows;  // at most kLanes
  int64_t classes;
  int64_t labels[kLanes];         // < 0: no hard term in this row
  const Accumulator<T>* weights;  // or null: 1; a row with weight 0 counts as absent
  double* losses;                 // times weight
  Accumulator<T>* statistics;     // [rows, kKdStatistics] or null
  T* gradient;                    // [rows, classes] or null
  double gradient_scale;          // beside the weight
};

template <typename A>
struct NarrowSums {
  A student_max[kLanes];
  A teacher_max[kLanes];
  A student[kLanes];
  A teacher[kLanes];
  A cross[kLanes];
  A hard[kLanes];
  A differences[kLanes];
};

// rows: [count, classes] to lanes: [classes, kLanes]; lanes that are no rows hold 0.
template <typename T>
CHANPRUNE_INLINE void rows_to_lanes(const T* __restrict rows, int64_t count, int64_t classes,
                                    Accumulator<T>* __restrict lanes) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < classes; ++c) {
      lanes[c * kLanes + r] = load(rows[r * classes + c]);
    }
  }
  for (int64_t r = count; r < kLanes; ++r) {
    for (int64_t c = 0; c < classes; ++c) {
      lanes[c * kLanes + r] = 0;
    }
  }
}

template <typename A>
CHANPRUNE_INLINE void find_maxima(const A* lanes, int64_t classes, A* __restrict maxima) {
  for (int j = 0; j < kLanes; ++j) {
    maxima[j] = -std::numeric_limits<A>::infinity();
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int j = 0; j < kLanes; ++j) {
      maxima[j] = lanes[c * kLanes + j] > maxima[j] ? lanes[c * kLanes + j] : maxima[j];
    }
  }
}

// Sums over the classes; the logits in s and t become e^x and e^y, hard: [classes, kLanes] gets
// e^(s - max s).
template <bool Hard, typename A>
CHANPRUNE_INLINE void sum_narrow(A* __restrict s, A* __restrict t, A* __restrict hard,
                                 int64_t classes, A inverse_temperature, NarrowSums<A>* sums) {
  find_maxima(s, classes, sums->student_max);
  find_maxima(t, classes, sums->teacher_max);
  A student_max[kLanes];
  A teacher_max[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    const A low = -std::numeric_limits<A>::infinity();
    student_max[j] = sums->student_max[j] == low ? 0 : sums->student_max[j];
    teacher_max[j] = sums->teacher_max[j] == low ? 0 : sums->teacher_max[j];
    sums->student[j] = 0;
    sums->teacher[j] = 0;
    sums->cross[j] = 0;
    sums->hard[j] = 0;
    sums->differences[j] = 0;
  }
  // Chains of a few additions: the loss is a small difference of what comes out.
  constexpr int64_t kChain = 16;
  for (int64_t first = 0; first < classes; first += kChain) {
    const int64_t end = classes - first < kChain ? classes : first + kChain;
    A z[kLanes] = {};
    A w[kLanes] = {};
    A cross[kLanes] = {};
    A h[kLanes] = {};
    A differences[kLanes] = {};
    for (int64_t c = first; c < end; ++c) {
      A* const s_c = s + c * kLanes;
      A* const t_c = t + c * kLanes;
      A* const h_c = hard + c * kLanes;
      for (int j = 0; j < kLanes; ++j) {
        const RowMaxima<A> maxima = {student_max[j], teacher_max[j], inverse_temperature};
        const ClassTerms<A> terms = class_terms<Hard>(s_c[j], t_c[j], maxima);
        z[j] += terms.student;
        w[j] += terms.teacher;
        cross[j] += terms.cross;
        s_c[j] = terms.student;
        t_c[j] = terms.teacher;
        if constexpr (Hard) {
          h[j] += terms.hard;
          differences[j] += terms.difference;
          h_c[j] = terms.hard;
        }
      }
    }
    for (int j = 0; j < kLanes; ++j) {
      sums->student[j] += z[j];
      sums->teacher[j] += w[j];
      sums->cross[j] += cross[j];
      sums->hard[j] += h[j];
      sums->differences[j] += differences[j];
    }
  }
}

template <bool Hard, typename T>
CHANPRUNE_CLONES void run_narrow_rows(const NarrowRows<T>& rows, const KdOptions& options) {
  using A = Accumulator<T>;
  alignas(64) A s[kNarrow * kLanes];
  alignas(64) A t[kNarrow * kLanes];
  alignas(64) A h[Hard ? kNarrow * kLanes : kLanes];
  alignas(64) double student_log[kLanes];
  alignas(64) double teacher_log[kLanes];
  alignas(64) double hard_log[kLanes];
  alignas(64) double losses[kLanes];
  alignas(64) double weights[kLanes];
  A label_logit[kLanes] = {};
  bool has_label[kLanes] = {};
  const int64_t classes = rows.classes;
  const double smoothing = options.label_smoothing;
  rows_to_lanes(rows.student, rows.rows, classes, s);
  rows_to_lanes(rows.teacher, rows.rows, classes, t);
  for (int64_t r = 0; r < kLanes; ++r) {
    weights[r] = r >= rows.rows ? 0 : rows.weights == nullptr ? 1 : rows.weights[r];
    if (Hard && r < rows.rows && rows.labels[r] >= 0) {
      has_label[r] = true;
      label_logit[r] = s[rows.labels[r] * kLanes + r];
    }
  }
  NarrowSums<A> sums;
  sum_narrow<Hard>(s, t, h, classes, static_cast<A>(1.0 / options.temperature), &sums);

  const double soft = options.soft_weight * options.temperature * options.temperature;
  for (int j = 0; j < kLanes; ++j) {
    student_log[j] = log_of_sum<A>(sums.student[j]);
    teacher_log[j] = log_of_sum<A>(sums.teacher[j]);
    hard_log[j] = Hard ? log_of_sum<A>(sums.hard[j]) : 0;
    const double kl =
        sums.cross[j] / static_cast<double>(sums.teacher[j]) - teacher_log[j] + student_log[j];
    losses[j] = soft == 0 ? 0 : soft * kl;
  }
  if constexpr (Hard) {
    for (int j = 0; j < kLanes; ++j) {
      const double label_term =
          hard_log[j] - (static_cast<double>(label_logit[j]) - sums.student_max[j]);
      const double uniform_term = hard_log[j] - sums.differences[j] / static_cast<double>(classes);
      const double smooth = smoothing == 0 ? 0 : smoothing * uniform_term;
      losses[j] += has_label[j] ? options.hard_weight * ((1 - smoothing) * label_term + smooth) : 0;
    }
  }
  for (int64_t r = 0; r < rows.rows; ++r) {
    rows.losses[r] = weights[r] == 0 ? 0 : weights[r] * losses[r];
  }
  if (rows.statistics != nullptr) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      A* kept = rows.statistics + r * kKdStatistics;
      kept[kStudentMax] = sums.student_max[r];
      kept[kStudentLogSum] = static_cast<A>(student_log[r]);
      kept[kTeacherMax] = sums.teacher_max[r];
      kept[kTeacherLogSum] = static_cast<A>(teacher_log[r]);
      kept[kHardLogSum] = static_cast<A>(hard_log[r]);
    }
  }
  if (rows.gradient == nullptr) {
    return;
  }
  A by_student[kLanes];
  A by_teacher[kLanes];
  A by_hard[kLanes];
  A uniform[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    const double upstream = weights[j] * rows.gradient_scale;
    const double soft_scale = upstream * options.soft_weight * options.temperature;
    const double hard_scale = has_label[j] ? upstream * options.hard_weight : 0;
    by_student[j] = static_cast<A>(soft_scale / sums.student[j]);
    by_teacher[j] = static_cast<A>(soft_scale / sums.teacher[j]);
    by_hard[j] = static_cast<A>(has_label[j] ? hard_scale / sums.hard[j] : 0);
    uniform[j] = static_cast<A>(hard_scale * smoothing / static_cast<double>(classes));
    label_logit[j] = static_cast<A>(hard_scale * (1 - smoothing));  // now what its class loses
  }
  for (int64_t c = 0; c < classes; ++c) {
    A* const s_c = s + c * kLanes;
    const A* const t_c = t + c * kLanes;
    const A* const h_c = Hard ? h + c * kLanes : h;
    for (int j = 0; j < kLanes; ++j) {
      A value = by_student[j] * s_c[j] - by_teacher[j] * t_c[j];
      if constexpr (Hard) {
        value += by_hard[j] * h_c[j] - uniform[j];
      }
      s_c[j] = value;
    }
  }
  for (int64_t r = 0; r < rows.rows; ++r) {
    if (Hard && has_label[r]) {
      s[rows.labels[r] * kLanes + r] -= label_logit[r];
    }
    for (int64_t c = 0; c < classes; ++c) {
      store(rows.gradient + r * classes + c, weights[r] == 0 ? A(0) : s[c * kLanes + r]);
    }
  }
}

}  // namespace
}  // namespace chanprune
