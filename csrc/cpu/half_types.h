// float16 and bfloat16 conversion as branch-free integer arithmetic, which vectorises in every SIMD
// clone (the scalar conversions of c10 do not).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace chanprune {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// What values of a type are computed in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

CHANPRUNE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CHANPRUNE_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

CHANPRUNE_INLINE float load(float value) { return value; }
CHANPRUNE_INLINE double load(double value) { return value; }
CHANPRUNE_INLINE float load(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}

CHANPRUNE_INLINE float load(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Exponent bias 15 becomes 127 by an exact multiplication, which also normalises subnormals
  // (where they are not flushed: see subnormals.h).
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // Inf and NaN
  return float_of(finite | special | sign);
}

CHANPRUNE_INLINE void store(float* out, float value) { *out = value; }
CHANPRUNE_INLINE void store(double* out, double value) { *out = value; }

CHANPRUNE_INLINE void store(BFloat16* out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded =
      (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

CHANPRUNE_INLINE void store(Float16* out, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 lets the FPU round at the right bit.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t unsigned_half = magnitude >= 0x477ff000u ? special : finite;  // >= 65520 overflows
  out->bits = static_cast<uint16_t>(unsigned_half | ((bits >> 16) & 0x8000u));
}

}  // namespace chanprune
