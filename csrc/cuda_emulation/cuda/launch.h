// Stands in for csrc/cuda/launch.h: the device is the CPU, there are no streams and nothing to pin.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#undef STD_CUDA_KERNEL_LAUNCH_CHECK  // torch defines it, for the CUDA runtime
#define STD_CUDA_KERNEL_LAUNCH_CHECK()

namespace chanprune {

class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& /*on*/) {}

  cudaStream_t stream() const { return nullptr; }
};

inline torch::stable::Tensor new_pinned_bytes(int64_t count) {
  return torch::stable::empty({count}, torch::headeronly::ScalarType::Byte);
}

}  // namespace chanprune
