// Norms of rows that lie one behind another in memory.
//
// The end of a row costs more than a short row itself if its lanes are folded into one value there
// and then. Here a row leaves kParts values, and kRowsAtOnce rows are folded together. Vectors are
// explicit: plain arrays of lanes end up on the stack between the loops of a row.
#pragma once

#include <cstdint>
#include <cstring>

#include "channel_norms_task.h"
#include "cpu/half_types.h"
#include "cpu/simd.h"

namespace chanprune {
namespace {  // clones are exported otherwise, whatever their visibility

// 32 bytes suit two of the three clones; compilers take wider ones apart through memory where the
// instruction set lacks them.
#if CHANPRUNE_HAS_CLONES || defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float Values __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  static constexpr int32_t kMagnitude = 0x7fffffff;
};

template <>
struct VectorTypes<double> {
  typedef double Values __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kMagnitude = 0x7fffffffffffffff;
};

template <typename A>
using Vector = typename VectorTypes<A>::Values;
using FloatBits = VectorTypes<float>::Integers;

template <typename A>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
CHANPRUNE_INLINE Vector<A> load_vector(const A* x) {
  Vector<A> values;
  std::memcpy(&values, x, sizeof(values));
  return values;
}

template <typename H>
CHANPRUNE_INLINE FloatBits load_bits(const H* x) {
  VectorTypes<float>::Halves halves;
  std::memcpy(&halves, x, sizeof(halves));
  return __builtin_convertvector(halves, FloatBits);
}

CHANPRUNE_INLINE Vector<float> load_vector(const BFloat16* x) {
  return reinterpret_cast<Vector<float>>(load_bits(x) << 16);
}

// See load(Float16); without the signs, which no norm minds.
CHANPRUNE_INLINE Vector<float> load_vector(const Float16* x) {
  const FloatBits magnitude = (load_bits(x) & 0x7fff) << 13;
  const Vector<float> finite = reinterpret_cast<Vector<float>>(magnitude) * 0x1p112f;
  const FloatBits special = (magnitude >= 0x0f800000) & 0x7f800000;
  return reinterpret_cast<Vector<float>>(reinterpret_cast<FloatBits>(finite) | special);
}

// Two vectors of the next elements; in which order does not matter to a norm.
template <typename A>
struct VectorPair {
  Vector<A> first;
  Vector<A> second;
};

template <typename T>
CHANPRUNE_INLINE VectorPair<Accumulator<T>> load_pair(const T* x) {
  return {load_vector(x), load_vector(x + kVectorSize<Accumulator<T>>)};
}

// Every other element, then those between: nothing has to be widened.
CHANPRUNE_INLINE VectorPair<float> load_pair(const BFloat16* x) {
  FloatBits bits;
  std::memcpy(&bits, x, sizeof(bits));
  constexpr int32_t kUpperHalf = -65536;
  return {reinterpret_cast<Vector<float>>(bits << 16),
          reinterpret_cast<Vector<float>>(bits & kUpperHalf)};
}

// Joins two partial results. NaN, once met, stays.
template <NormKind Kind, typename V>
CHANPRUNE_INLINE V join(V a, V b) {
  if constexpr (Kind == NormKind::kInf) {
    return ((b > a) | (b != b)) ? b : a;
  } else {
    return a + b;
  }
}

// One step of a reduction: `total` with the raw elements `x` taken in.
template <NormKind Kind, typename A>
CHANPRUNE_INLINE Vector<A> take_vector(Vector<A> total, Vector<A> x) {
  if constexpr (Kind == NormKind::kL2) {
    return total + x * x;
  } else {
    using Integers = typename VectorTypes<A>::Integers;
    return join<Kind>(total, reinterpret_cast<Vector<A>>(reinterpret_cast<Integers>(x) &
                                                         VectorTypes<A>::kMagnitude));
  }
}

// The first n elements of x, fewer than a vector, and zeros, which add nothing to any norm.
// `end`: elements up to there may be read.
template <typename T>
CHANPRUNE_INLINE Vector<Accumulator<T>> load_some(const T* x, int64_t n, const T* end) {
  using A = Accumulator<T>;
  constexpr int kSize = kVectorSize<A>;
  if (x + kSize <= end) {
    typename VectorTypes<A>::Integers index;
    for (int j = 0; j < kSize; ++j) {
      index[j] = j;
    }
    using Index = decltype(VectorTypes<A>::kMagnitude);
    return index < static_cast<Index>(n) ? load_vector(x) : Vector<A>{};
  }
  A values[kSize] = {};
  for (int64_t j = 0; j < n; ++j) {
    values[j] = load(x[j]);
  }
  return load_vector(values);
}

// Takes in what is left of a row: x: [n], fewer than two vectors.
template <NormKind Kind, typename T>
CHANPRUNE_INLINE Vector<Accumulator<T>> take_rest(Vector<Accumulator<T>> total, const T* x,
                                                  int64_t n, const T* end) {
  using A = Accumulator<T>;
  constexpr int kSize = kVectorSize<A>;
  if (n >= kSize) {
    total = take_vector<Kind, A>(total, load_vector(x));
    x += kSize;
    n -= kSize;
  }
  if (n > 0) {
    total = take_vector<Kind, A>(total, load_some(x, n, end));
  }
  return total;
}

// Reduces x: [n] to one vector; n small enough for plain accumulators.
template <NormKind Kind, typename T>
CHANPRUNE_INLINE Vector<Accumulator<T>> reduce_to_vector(const T* x, int64_t n, const T* end) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int kSize = kVectorSize<A>;
  V a = {};
  V b = {};
  V c = {};
  V d = {};
  int64_t i = 0;
  for (; i + 4 * kSize <= n; i += 4 * kSize) {
    const VectorPair<A> next = load_pair(x + i);
    const VectorPair<A> over_next = load_pair(x + i + 2 * kSize);
    a = take_vector<Kind, A>(a, next.first);
    b = take_vector<Kind, A>(b, next.second);
    c = take_vector<Kind, A>(c, over_next.first);
    d = take_vector<Kind, A>(d, over_next.second);
  }
  a = join<Kind>(a, c);
  b = join<Kind>(b, d);
  if (i + 2 * kSize <= n) {
    const VectorPair<A> next = load_pair(x + i);
    a = take_vector<Kind, A>(a, next.first);
    b = take_vector<Kind, A>(b, next.second);
    i += 2 * kSize;
  }
  a = join<Kind>(a, b);
  return take_rest<Kind>(a, x + i, n - i, end);
}

// Rows that are read at the same time, far from one another. A core fetches one stretch of memory
// after the other and waits at the end of each page for the next one's address; of four stretches
// it has four times as much under way.
constexpr int kStreams = 4;

// Reduces kStreams rows of n elements, `stride` apart, to a vector each.
template <NormKind Kind, typename T>
CHANPRUNE_INLINE void reduce_to_vectors(const T* x, int64_t stride, int64_t n, const T* end,
                                        Vector<Accumulator<T>>* out) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  constexpr int kSize = kVectorSize<A>;
  V even[kStreams] = {};
  V odd[kStreams] = {};
  int64_t i = 0;
  for (; i + 2 * kSize <= n; i += 2 * kSize) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const VectorPair<A> next = load_pair(x + s * stride + i);
      even[s] = take_vector<Kind, A>(even[s], next.first);
      odd[s] = take_vector<Kind, A>(odd[s], next.second);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
    out[s] = take_rest<Kind>(join<Kind>(even[s], odd[s]), x + s * stride + i, n - i, end);
  }
}

constexpr int kParts = 4;        // a row leaves this many values
constexpr int kRowsAtOnce = 16;  // are folded together

template <NormKind Kind, typename A>
CHANPRUNE_INLINE void put_parts(Vector<A> values, A* parts) {
  constexpr int kSize = kVectorSize<A>;
  A lanes[kSize];
  std::memcpy(lanes, &values, sizeof(lanes));
  for (int j = 0; j < kParts; ++j) {
    if constexpr (kSize == 2 * kParts) {
      parts[j] = join<Kind>(lanes[j], lanes[j + kParts]);
    } else {
      parts[j] = j < kSize ? lanes[j % kSize] : A(0);
    }
  }
}

template <NormKind Kind, typename A>
CHANPRUNE_INLINE void fold_parts(const A* parts, A* values) {
  for (int r = 0; r < kRowsAtOnce; ++r) {
    const A* row = parts + r * kParts;
    values[r] = join<Kind>(join<Kind>(row[0], row[2]), join<Kind>(row[1], row[3]));
  }
}

// Reduces x: [rows, n], rows `stride` apart, to out: [rows]; n small enough for plain accumulators.
template <NormKind Kind, typename T>
CHANPRUNE_CLONES void reduce_rows(const T* x, int64_t stride, int64_t rows, int64_t n, const T* end,
                                  Accumulator<T>* __restrict out) {
  using A = Accumulator<T>;
  constexpr int kSteps = kRowsAtOnce / kStreams;
  const int64_t part = n < 4 * kVectorSize<A> ? 0 : rows / kStreams;  // rows of a stream
  A parts[kRowsAtOnce * kParts] = {};
  A values[kRowsAtOnce];
  for (int64_t first = 0; first < part; first += kSteps) {
    const int64_t count = part - first < kSteps ? part - first : kSteps;
    for (int64_t r = 0; r < count; ++r) {
      Vector<A> vectors[kStreams];
      reduce_to_vectors<Kind>(x + (first + r) * stride, part * stride, n, end, vectors);
      for (int s = 0; s < kStreams; ++s) {
        put_parts<Kind, A>(vectors[s], parts + (r * kStreams + s) * kParts);
      }
    }
    fold_parts<Kind>(parts, values);
    for (int64_t r = 0; r < count; ++r) {
      for (int s = 0; s < kStreams; ++s) {
        out[s * part + first + r] = values[r * kStreams + s];
      }
    }
  }
  for (int64_t first = kStreams * part; first < rows; first += kRowsAtOnce) {
    const int64_t count = rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce;
    for (int64_t r = 0; r < count; ++r) {
      put_parts<Kind, A>(reduce_to_vector<Kind>(x + (first + r) * stride, n, end),
                         parts + r * kParts);
    }
    fold_parts<Kind>(parts, values);
    for (int64_t r = 0; r < count; ++r) {
      out[first + r] = values[r];
    }
  }
}

}  // namespace
}  // namespace chanprune
