// One upload for all tables that a kernel reads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/launch.h"

namespace chanprune {

// Host tables packed into one pinned buffer and sent by one asynchronous copy. torch's caching
// allocators keep both buffers from being reused before the stream has passed the kernels.
//
// Tables may hold device addresses of other tables: reserve them, allocate, then fill.
class TableUpload {
 public:
  // Room for `count` values; the returned offset becomes an address by table_at.
  template <typename T>
  int64_t reserve(int64_t count) {
    const int64_t offset = (static_cast<int64_t>(bytes_.size()) + 15) / 16 * 16;
    bytes_.resize(static_cast<size_t>(offset) + static_cast<size_t>(count) * sizeof(T));
    return offset;
  }

  template <typename T>
  void fill(int64_t offset, const std::vector<T>& values) {
    copy_in(offset, values.data(), values.size());
  }

  template <typename T>
  int64_t add(const T* values, int64_t count) {
    const int64_t offset = reserve<T>(count);
    copy_in(offset, values, static_cast<size_t>(count));
    return offset;
  }

  template <typename T>
  int64_t add(const std::vector<T>& values) {
    return add(values.data(), static_cast<int64_t>(values.size()));
  }

  // The device buffer, on the device of `like`; keep it until the kernels are launched.
  torch::stable::Tensor allocate(const torch::stable::Tensor& like) const {
    return torch::stable::new_empty(like, {static_cast<int64_t>(bytes_.size())},
                                    torch::headeronly::ScalarType::Byte);
  }

  void send(torch::stable::Tensor device) const {
    const torch::stable::Tensor host = new_pinned_bytes(static_cast<int64_t>(bytes_.size()));
    std::memcpy(host.data_ptr(), bytes_.data(), bytes_.size());
    torch::stable::copy_(device, host, /*non_blocking=*/true);
  }

 private:
  template <typename T>
  void copy_in(int64_t offset, const T* values, size_t count) {
    if (count > 0) {
      std::memcpy(bytes_.data() + offset, values, count * sizeof(T));
    }
  }

  std::vector<char> bytes_;
};

template <typename T>
T* table_at(const torch::stable::Tensor& buffer, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(buffer.data_ptr()) + offset);
}

}  // namespace chanprune
