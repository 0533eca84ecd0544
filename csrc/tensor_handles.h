// Tensors that a kernel is about to return as a list.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <utility>
#include <vector>

namespace chanprune {

// Owns plain handles. torch::stable::Tensor allocates a reference count for each tensor and another
// handle when it is returned, which many small results would feel.
class TensorHandles {
 public:
  TensorHandles() = default;
  TensorHandles(const TensorHandles&) = delete;
  TensorHandles& operator=(const TensorHandles&) = delete;
  TensorHandles(TensorHandles&& other) noexcept : handles_(std::exchange(other.handles_, {})) {}
  TensorHandles& operator=(TensorHandles&& other) noexcept {
    std::swap(handles_, other.handles_);
    return *this;
  }
  ~TensorHandles() {
    for (AtenTensorHandle handle : handles_) {
      aoti_torch_delete_tensor_object(handle);
    }
  }

  void reserve(size_t count) { handles_.reserve(count); }

  // Takes the handle over; room for it must have been reserved.
  void push_back(AtenTensorHandle handle) { handles_.push_back(handle); }

  // Gives the tensors away as what a boxed kernel returns for Tensor[].
  StableIValue release() {
    StableListHandle list = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(handles_.size(), &list));
    for (AtenTensorHandle handle : handles_) {
      STABLE_TORCH_ERROR_CODE_CHECK(
          torch_list_push_back(list, torch::stable::detail::from(handle)));
    }
    handles_.clear();
    return torch::stable::detail::from(list);
  }

 private:
  std::vector<AtenTensorHandle> handles_;
};

}  // namespace chanprune
