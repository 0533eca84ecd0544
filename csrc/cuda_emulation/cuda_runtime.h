// Stands in for the toolkit's header where kernels are compiled for the CPU: what csrc/cuda uses of
// CUDA C++, with CUDA's meaning.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_emulation/grid.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

using cudaStream_t = void*;
using dim3 = cuda_emulation::Extent;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define threadIdx cuda_emulation::thread_index
#define blockIdx cuda_emulation::block_index
#define blockDim cuda_emulation::block_extent
#define gridDim cuda_emulation::grid_extent

inline void __syncthreads() { cuda_emulation::wait_for_block(); }

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (lanes != 0xffffffffU) {
    __builtin_trap();  // only whole warps are emulated
  }
  cuda_emulation::exchange_in_warp(&value, sizeof(T), mask);
  return value;
}

// Of two numbers the one that is no NaN, as on the device.
inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }

// The device multiplies in float32 and has a power of two by table. (glibc declares a function of
// this name, so a macro.)
#define __expf(x) std::exp2(static_cast<float>(x) * 1.44269504F)
