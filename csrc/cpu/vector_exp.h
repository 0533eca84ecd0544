// e^x in a form that the compiler vectorises.
#pragma once

#include <cmath>

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

}  // namespace chanprune
