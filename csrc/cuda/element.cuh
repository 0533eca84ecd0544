// Element types on the device: conversion to the accumulation type and 16-byte packs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace chanprune {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float load(float value) { return value; }
__device__ inline double load(double value) { return value; }
__device__ inline float load(__half value) { return __half2float(value); }
__device__ inline float load(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void store(float* out, float value) { *out = value; }
__device__ inline void store(double* out, double value) { *out = value; }
__device__ inline void store(__half* out, float value) { *out = __float2half_rn(value); }
__device__ inline void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

// What one 16-byte access carries.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ inline bool is_pack_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Value of lane `lane ^ mask`; float64 travels as two words inside __shfl_xor_sync.
template <typename A>
__device__ inline A exchange(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

constexpr int kWarp = 32;

}  // namespace chanprune
