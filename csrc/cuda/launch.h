// Where kernels are launched: device guard, current stream, memory that the device can fetch from.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace chanprune {

// Makes the device of a tensor current and finds the stream that torch would use there. Launching
// on torch's own stream keeps CUDA graphs and user streams correct.
class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& on) : guard_(on.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Page-locked, so that a copy to the device need not wait for it.
inline torch::stable::Tensor new_pinned_bytes(int64_t count) {
  return torch::stable::empty({count}, torch::headeronly::ScalarType::Byte, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU),
                              /*pin_memory=*/true);
}

}  // namespace chanprune
