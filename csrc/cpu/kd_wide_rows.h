// One row of kd_kl_div at a time, chunk by chunk; see kd_kl_div.h for the formulae.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/half_types.h"
#include "cpu/lanes.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"
#include "kd_kl_div_options.h"

namespace chanprune {
namespace {  // clones are exported otherwise, whatever their visibility

// Logits worked on together: chunks and their converted copies stay in the first-level cache. Sums
// over a chunk are of the accumulation type, sums of chunks are float64.
constexpr int64_t kChunk = 1024;

// x: [n <= kChunk] as an array of the accumulation type: x itself, or converted into `buffer`.
template <typename T>
const Accumulator<T>* as_accumulator(const T* x, int64_t n, Accumulator<T>* buffer) {
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return x;
  } else {
    convert_in(x, n, buffer);
    return buffer;
  }
}

template <typename A>
struct ChunkSums {
  A student;      // sum e^x
  A teacher;      // sum e^y
  A cross;        // sum e^y (y - x)
  A hard;         // sum e^(s - max s)
  A differences;  // sum (s - max s)
};

// The exponentials of a row or chunk, kept for its gradient; null where they are not wanted.
template <typename A>
struct KeptTerms {
  A* student;  // e^x
  A* teacher;  // e^y
  A* hard;     // e^(s - max s), only with a hard term

  KeptTerms from(int64_t begin) const {
    if (student == nullptr) {
      return *this;
    }
    return {student + begin, teacher + begin, hard == nullptr ? nullptr : hard + begin};
  }
};

template <typename A>
struct RowMaxima {
  A student;
  A teacher;
  A inverse_temperature;
};

// What one class adds to the sums, and its exponentials.
template <typename A>
struct ClassTerms {
  A student;
  A teacher;
  A cross;
  A hard;
  A difference;
};

template <bool Hard, typename A>
CHANPRUNE_INLINE ClassTerms<A> class_terms(A s, A t, const RowMaxima<A>& maxima) {
  const A d = s - maxima.student;
  const A x = d * maxima.inverse_temperature;
  const A y = (t - maxima.teacher) * maxima.inverse_temperature;
  const A ex = vector_exp(x);
  const A ey = vector_exp(y);
  // p ln p = 0 at p = 0, also where y or x is -inf.
  return {ex, ey, ey == 0 ? 0 : ey * (y - x), Hard ? vector_exp(d) : A(0), d};
}

template <bool Hard, bool Keep, typename A>
CHANPRUNE_CLONES void sum_chunk(const A* __restrict s, const A* __restrict t, int64_t n,
                                RowMaxima<A> maxima, ChunkSums<A>* sums, A* __restrict keep_student,
                                A* __restrict keep_teacher, A* __restrict keep_hard) {
  A z[kLanes] = {};
  A w[kLanes] = {};
  A cross[kLanes] = {};
  A hard[kLanes] = {};
  A differences[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const ClassTerms<A> terms = class_terms<Hard>(s[i + j], t[i + j], maxima);
      z[j] += terms.student;
      w[j] += terms.teacher;
      cross[j] += terms.cross;
      if constexpr (Hard) {
        hard[j] += terms.hard;
        differences[j] += terms.difference;
      }
      if constexpr (Keep) {
        keep_student[i + j] = terms.student;
        keep_teacher[i + j] = terms.teacher;
        if constexpr (Hard) {
          keep_hard[i + j] = terms.hard;
        }
      }
    }
  }
  // The remainder goes through the same vector code on a padded copy: -inf adds nothing.
  if (whole < n) {
    A tail_s[kLanes];
    A tail_t[kLanes];
    A tail_h[kLanes];
    pad(s + whole, n - whole, tail_s);
    pad(t + whole, n - whole, tail_t);
    for (int j = 0; j < kLanes; ++j) {
      const ClassTerms<A> terms = class_terms<Hard>(tail_s[j], tail_t[j], maxima);
      z[j] += terms.student;
      w[j] += terms.teacher;
      cross[j] += terms.cross;
      hard[j] += terms.hard;
      tail_s[j] = terms.student;
      tail_t[j] = terms.teacher;
      tail_h[j] = terms.hard;
    }
    if constexpr (Hard) {
      for (int j = 0; whole + j < n; ++j) {
        differences[j] += s[whole + j] - maxima.student;
      }
    }
    if constexpr (Keep) {
      for (int64_t i = whole; i < n; ++i) {
        keep_student[i] = tail_s[i - whole];
        keep_teacher[i] = tail_t[i - whole];
        if constexpr (Hard) {
          keep_hard[i] = tail_h[i - whole];
        }
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

  // Takes in n classes whose logits do not exceed the maxima.
  template <typename A>
  void add(const A* s, const A* t, int64_t n, const KdOptions& options, const KeptTerms<A>& kept) {
    const auto sum = kept.student == nullptr
                         ? (options.hard ? &sum_chunk<true, false, A> : &sum_chunk<false, false, A>)
                         : (options.hard ? &sum_chunk<true, true, A> : &sum_chunk<false, true, A>);
    // A row that is -inf so far has no maximum to subtract; 0 leaves its terms at e^-inf = 0.
    const auto reference = [](double maximum) {
      return static_cast<A>(std::isinf(maximum) && maximum < 0 ? 0 : maximum);
    };
    ChunkSums<A> sums;
    sum(s, t, n,
        {reference(student_max), reference(teacher_max), static_cast<A>(1.0 / options.temperature)},
        &sums, kept.student, kept.teacher, kept.hard);
    student += sums.student;
    teacher += sums.teacher;
    cross += sums.cross;
    hard += sums.hard;
    differences += sums.differences;
    seen += static_cast<double>(n);
  }
};

// Reads every logit of a row once.
template <typename T>
RowState read_row(const T* student, const T* teacher, int64_t classes, const KdOptions& options) {
  using A = Accumulator<T>;
  alignas(64) A student_buffer[kChunk];
  alignas(64) A teacher_buffer[kChunk];
  RowState row;
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t n = std::min(kChunk, classes - begin);
    const A* s = as_accumulator(student + begin, n, student_buffer);
    const A* t = as_accumulator(teacher + begin, n, teacher_buffer);
    row.raise(std::max<double>(row.student_max, largest(s, n)),
              std::max<double>(row.teacher_max, largest(t, n)), 1.0 / options.temperature);
    row.template add<A>(s, t, n, options, {nullptr, nullptr, nullptr});
  }
  return row;
}

// The same, keeping the exponentials: [classes] each. Needs the maxima first, and so a second look
// at the row, which is still in a cache then.
template <typename T>
RowState read_row_and_keep(const T* student, const T* teacher, int64_t classes,
                           const KdOptions& options, const KeptTerms<Accumulator<T>>& kept) {
  using A = Accumulator<T>;
  alignas(64) A student_buffer[kChunk];
  alignas(64) A teacher_buffer[kChunk];
  RowState row;
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t n = std::min(kChunk, classes - begin);
    row.student_max = std::max<double>(
        row.student_max, largest(as_accumulator(student + begin, n, student_buffer), n));
    row.teacher_max = std::max<double>(
        row.teacher_max, largest(as_accumulator(teacher + begin, n, teacher_buffer), n));
  }
  for (int64_t begin = 0; begin < classes; begin += kChunk) {
    const int64_t n = std::min(kChunk, classes - begin);
    row.add(as_accumulator(student + begin, n, student_buffer),
            as_accumulator(teacher + begin, n, teacher_buffer), n, options, kept.from(begin));
  }
  return row;
}

// Factors of one row's gradient before the label's own term.
template <typename A>
struct GradientFactors {
  A student;
  A teacher;
  A hard;
  A uniform;
};

// student e^x - teacher e^y + hard e^(s - max s) - uniform, from kept exponentials.
template <bool Hard, typename A>
CHANPRUNE_CLONES void combine_terms(const A* student, const A* __restrict teacher,
                                    const A* __restrict hard, int64_t n, GradientFactors<A> by,
                                    A* out) {
  for (int64_t i = 0; i < n; ++i) {
    A value = by.student * student[i] - by.teacher * teacher[i];
    if constexpr (Hard) {
      value += by.hard * hard[i] - by.uniform;
    }
    out[i] = value;
  }
}

// What the gradient of a row needs where its exponentials are not at hand.
template <typename A>
struct RecomputeFactors {
  A statistics[kKdStatistics];
  A inverse_temperature;
  A soft;
  A hard;
  A uniform;  // smoothing / C
};

template <bool Hard, typename A>
CHANPRUNE_INLINE A derivative(A s, A t, const RecomputeFactors<A>& by) {
  const A d = s - by.statistics[kStudentMax];
  const A p = vector_exp(d * by.inverse_temperature - by.statistics[kStudentLogSum]);
  const A q = vector_exp((t - by.statistics[kTeacherMax]) * by.inverse_temperature -
                         by.statistics[kTeacherLogSum]);
  A result = by.soft * (p - q);
  if constexpr (Hard) {
    result += by.hard * (vector_exp(d - by.statistics[kHardLogSum]) - by.uniform);
  }
  return result;
}

// soft (p_s - p_t) + hard (q - uniform), from logits and statistics.
template <bool Hard, typename A>
CHANPRUNE_CLONES void differentiate(const A* __restrict s, const A* __restrict t, int64_t n,
                                    RecomputeFactors<A> by, A* __restrict out) {
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; ++i) {
    out[i] = derivative<Hard>(s[i], t[i], by);
  }
  if (whole < n) {  // through the same vector code, on a padded copy
    A tail_s[kLanes];
    A tail_t[kLanes];
    pad(s + whole, n - whole, tail_s);
    pad(t + whole, n - whole, tail_t);
    for (int j = 0; j < kLanes; ++j) {
      tail_s[j] = derivative<Hard>(tail_s[j], tail_t[j], by);
    }
    for (int64_t i = whole; i < n; ++i) {
      out[i] = tail_s[i - whole];
    }
  }
}

}  // namespace
}  // namespace chanprune
