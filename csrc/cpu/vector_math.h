// e^x and ln x in forms that the compiler vectorises.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/half_types.h"
#include "cpu/simd.h"

namespace chanprune {

// e^x for x <= 0 (larger arguments up to 88 are fine too); relative error below 2e-7.
// Below -87 the result is 0: such terms vanish beside the maximum's e^0 = 1. NaN stays NaN.
CHANPRUNE_INLINE float vector_exp(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693145751953125f;  // exact times any exponent
  constexpr float kLn2Low = 1.42860682030941723e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = float_of((bits_of(rounded) + 127u) << 23);  // 2^n
  return x < -87.0f ? 0.0f : p * scale;
}

// float64 serves gradient checks, not speed.
CHANPRUNE_INLINE double vector_exp(double x) { return std::exp(x); }

CHANPRUNE_INLINE uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CHANPRUNE_INLINE double double_of(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// ln x of a normal x or 0, to 1e-12: for sums of float32 terms. NaN stays NaN.
CHANPRUNE_INLINE double vector_log(double x) {
  const uint64_t bits = bits_of(x);
  const double exponent = double_of(0x4330000000000000u | (bits >> 52)) - 0x1p52 - 1023;
  const double mantissa = double_of((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u);
  const bool large = mantissa > 1.4142135623730951;
  const double m = large ? mantissa * 0.5 : mantissa;
  const double n = large ? exponent + 1 : exponent;
  const double s = (m - 1) / (m + 1);  // ln m = 2 artanh s, |s| < 0.172
  const double q = s * s;
  double p = 1.0 / 13;
  p = p * q + 1.0 / 11;
  p = p * q + 1.0 / 9;
  p = p * q + 1.0 / 7;
  p = p * q + 1.0 / 5;
  p = p * q + 1.0 / 3;
  p = p * q + 1.0;
  const double result = n * 0.69314718055994531 + 2 * s * p;
  const double or_infinite = x == 0 ? -std::numeric_limits<double>::infinity() : result;
  return x == x ? or_infinite : x;
}

// ln of a sum that was made in type A.
template <typename A>
CHANPRUNE_INLINE double log_of_sum(double sum) {
  return std::is_same_v<A, float> ? vector_log(sum) : std::log(sum);
}

}  // namespace chanprune
