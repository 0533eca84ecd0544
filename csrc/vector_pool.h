// Many small vectors from one allocation.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "new_tensor.h"

namespace chanprune {

// Cuts the results of one call on the CPU from one block, which is freed with the last of them: an
// aligned allocation for each costs more than computing a small result. They are tensors with
// storages of their own. Elsewhere torch allocates them; its CUDA allocator is fast, and must know
// every tensor to follow streams.
class VectorPool {
 public:
  static int64_t bytes_of(int64_t size, torch::headeronly::ScalarType dtype) {
    const int64_t bytes = size * (dtype == torch::headeronly::ScalarType::Double ? 8 : 4);
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  // bytes: the sum of bytes_of() over all vectors to come
  VectorPool(const TensorMaker& maker, int64_t bytes)
      : maker_(maker), block_(maker.is_cpu() && bytes > 0 ? Block::make(bytes) : nullptr) {}
  VectorPool(const VectorPool&) = delete;
  VectorPool& operator=(const VectorPool&) = delete;
  ~VectorPool() {
    if (block_ != nullptr) {
      Block::release(nullptr, block_);
    }
  }

  // An uninitialised vector of dtype float32 or float64; the caller owns the handle.
  AtenTensorHandle next(int64_t size, torch::headeronly::ScalarType dtype) {
    if (block_ == nullptr || size == 0) {
      const int64_t stride = 1;
      return maker_.strided_handle(1, &size, &stride, dtype);
    }
    void* const data = block_->data() + used_;
    used_ += bytes_of(size, dtype);
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_from_blob(data, 1, &size, &stride, 0,
                        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                        aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                        nullptr, 0, &Block::release, block_));
    block_->references.fetch_add(1, std::memory_order_relaxed);
    return handle;
  }

 private:
  static constexpr int64_t kAlignment = 64;

  struct alignas(kAlignment) Block {
    std::atomic<int64_t> references{1};

    static Block* make(int64_t bytes) {
      void* const memory =
          ::operator new(sizeof(Block) + static_cast<size_t>(bytes), std::align_val_t(kAlignment));
      return new (memory) Block;
    }

    char* data() { return reinterpret_cast<char*>(this + 1); }

    static void release(void* /*data*/, void* context) {
      auto* const block = static_cast<Block*>(context);
      if (block->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        block->~Block();
        ::operator delete(context, std::align_val_t(kAlignment));
      }
    }
  };

  const TensorMaker& maker_;
  Block* block_;
  int64_t used_ = 0;
};

}  // namespace chanprune
