// Allocation on a tensor's device without a round trip through the boxed dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace chanprune {

// Uninitialised tensor on the device of `like`.
inline torch::stable::Tensor new_empty_strided(const torch::stable::Tensor& like,
                                               const std::vector<int64_t>& sizes,
                                               const std::vector<int64_t>& strides,
                                               torch::headeronly::ScalarType dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               shim_dtype, device_type, like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor new_empty_vector(const torch::stable::Tensor& like, int64_t size,
                                              torch::headeronly::ScalarType dtype) {
  return new_empty_strided(like, {size}, {1}, dtype);
}

}  // namespace chanprune
