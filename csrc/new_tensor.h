// Allocation on a tensor's device without a round trip through the boxed dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace chanprune {

// Makes uninitialised tensors on the device of one tensor, which is asked for once: a call with
// many small tensors consists of little else.
class TensorMaker {
 public:
  explicit TensorMaker(const torch::stable::Tensor& like) : device_index_(like.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type_));
  }

  bool is_on_device_of(const torch::stable::Tensor& tensor) const {
    int32_t type = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type == device_type_ && tensor.get_device_index() == device_index_;
  }

  torch::stable::Tensor strided(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                torch::headeronly::ScalarType dtype) const {
    return torch::stable::Tensor(strided_handle(ndim, sizes, strides, dtype));
  }

  // The caller owns the handle.
  AtenTensorHandle strided_handle(int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                  torch::headeronly::ScalarType dtype) const {
    const int32_t shim_dtype =
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(ndim, sizes, strides, shim_dtype,
                                                           device_type_, device_index_, &handle));
    return handle;
  }

  torch::stable::Tensor vector(int64_t size, torch::headeronly::ScalarType dtype) const {
    const int64_t stride = 1;
    return strided(1, &size, &stride, dtype);
  }

  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }

 private:
  int32_t device_type_ = 0;
  int32_t device_index_;
};

// Uninitialised tensor on the device of `like`.
inline torch::stable::Tensor new_empty_strided(const torch::stable::Tensor& like,
                                               const std::vector<int64_t>& sizes,
                                               const std::vector<int64_t>& strides,
                                               torch::headeronly::ScalarType dtype) {
  return TensorMaker(like).strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                   dtype);
}

inline torch::stable::Tensor new_empty_vector(const torch::stable::Tensor& like, int64_t size,
                                              torch::headeronly::ScalarType dtype) {
  return TensorMaker(like).vector(size, dtype);
}

}  // namespace chanprune
