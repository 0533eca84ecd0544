// Vectors of kLanes values as plain arrays, which the compiler turns into SIMD registers.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/half_types.h"
#include "cpu/simd.h"

namespace chanprune {
namespace {  // clones are exported otherwise, whatever their visibility

constexpr int kLanes = 16;

// The first n < kLanes elements of x, the other lanes -inf: a logit that adds nothing.
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

// Largest of x: [n], -inf without any. NaN is passed over here and met again in the sums.
template <typename A>
CHANPRUNE_CLONES A largest(const A* x, int64_t n) {
  A lanes[4 * kLanes];  // four vectors in flight hide the latency of the comparison
  for (int j = 0; j < 4 * kLanes; ++j) {
    lanes[j] = -std::numeric_limits<A>::infinity();
  }
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4 * kLanes; ++j) {
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    }
  }
  A tail[kLanes];
  pad(x + i, n - i, tail);
  for (int j = 0; j < kLanes; ++j) {
    lanes[j] = tail[j] > lanes[j] ? tail[j] : lanes[j];
  }
  for (int width = 2 * kLanes; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) {
      lanes[j] = lanes[j + width] > lanes[j] ? lanes[j + width] : lanes[j];
    }
  }
  return lanes[0];
}

template <typename T>
CHANPRUNE_CLONES void convert_in(const T* __restrict x, int64_t n, Accumulator<T>* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = load(x[i]);
  }
}

template <typename T>
CHANPRUNE_CLONES void convert_out(const Accumulator<T>* __restrict x, int64_t n,
                                  T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    store(out + i, x[i]);
  }
}

}  // namespace
}  // namespace chanprune
