// Checks and copy descriptions of slice_channels, shared by the CPU and CUDA modules.
#include "slice_channels.h"

#include <algorithm>

#include "checks.h"
#include "cpu/simd.h"
#include "new_tensor.h"

namespace chanprune {
namespace {

using Extents = torch::headeronly::IntHeaderOnlyArrayRef;

// torch's own reading of ambiguous strides, so that results get the format torch would suggest.
bool is_channels_last(const Extents& sizes, const Extents& strides) {
  const size_t ndim = sizes.size();
  if ((ndim != 4 && ndim != 5) || strides[1] == 0) {
    return false;
  }
  int64_t floor = 0;
  for (size_t step = 0; step < ndim; ++step) {
    const size_t d = step == 0 ? 1 : step == ndim - 1 ? 0 : ndim - step;  // 1, spatial back, 0
    if (sizes[d] == 0 || strides[d] < floor || (d == 0 && floor == strides[1])) {
      return false;
    }
    floor = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

void pack_strides(const std::vector<int64_t>& sizes, bool channels_last,
                  std::vector<int64_t>* strides) {
  const size_t ndim = sizes.size();
  strides->resize(ndim);
  int64_t step = 1;
  const auto assign = [&](size_t d) {
    (*strides)[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) {
    assign(1);
  }
  for (size_t d = ndim; d-- > 0;) {
    if (!channels_last || d != 1) {
      assign(d);
    }
  }
}

// What one look at all values of an index list tells.
struct IndexScan {
  bool in_range;
  bool in_order;  // 0, 1, 2, ...
  int64_t runs;   // of adjacent indices
};

// Without a branch on any value, so that several are looked at together. count > 0
CHANPRUNE_CLONES IndexScan scan_indices(const int64_t* values, int64_t count, int64_t size) {
  const uint64_t last = static_cast<uint64_t>(size) - 1;
  uint64_t moved = static_cast<uint64_t>(values[0]);
  uint64_t outside = moved | (last - moved);  // top bit: an index below 0 or beyond the last
  uint64_t runs = 1;
  for (int64_t j = 1; j < count; ++j) {
    const auto value = static_cast<uint64_t>(values[j]);
    outside |= value | (last - value);
    moved |= value ^ static_cast<uint64_t>(j);
    runs += value != static_cast<uint64_t>(values[j - 1]) + 1;
  }
  return {outside >> 63 == 0, moved == 0, static_cast<int64_t>(runs)};
}

// A checked index list of one dim.
struct IndexList {
  const int64_t* values;  // on the host; null where all are kept in order
  int64_t count;
  int64_t runs;  // of adjacent indices
};

// Keeps a contiguous copy alive if one has to be made.
IndexList index_list(const std::optional<Tensor>& index, const char* name, size_t i, int64_t size,
                     std::vector<Tensor>* kept_alive) {
  if (!index.has_value()) {
    return {nullptr, size, 1};
  }
  CHANPRUNE_CHECK(index->scalar_type() == ScalarType::Long && index->dim() == 1 && index->is_cpu(),
                  "slice_channels: ", name, "[", i,
                  "] should be a one-dimensional int64 tensor on the CPU, got ", index->dim(),
                  " dims of ", dtype_name(index->scalar_type()));
  kept_alive->push_back(index->is_contiguous() ? *index : torch::stable::contiguous(*index));
  const int64_t count = index->numel();
  const auto* values = static_cast<const int64_t*>(kept_alive->back().data_ptr());
  const IndexScan scan = count > 0 ? scan_indices(values, count, size) : IndexScan{true, true, 0};
  for (int64_t j = 0; j < count && !scan.in_range; ++j) {
    CHANPRUNE_CHECK(values[j] >= 0 && values[j] < size, "slice_channels: ", name, "[", i,
                    "] should hold indices in [0, ", size, "), got ", values[j], " at position ",
                    j);
  }
  return {scan.in_order && count == size ? nullptr : values, count, scan.runs};
}

// The dims after the first two as one run or step of the source; false if they do not lie evenly.
bool merge_spatial(const Extents& sizes, const Extents& strides, int64_t* count, int64_t* stride) {
  *count = 1;
  *stride = 1;
  for (size_t d = sizes.size(); d-- > 2;) {
    if (sizes[d] == 1) {
      continue;
    }
    if (*count == 1) {
      *stride = strides[d];
    } else if (strides[d] != *stride * *count) {
      return false;
    }
    *count *= sizes[d];
  }
  return true;
}

// Describes the source; false if its strides need a copy first.
bool describe_source(const Tensor& t, bool channels_last, SliceTask* task) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t spatial = 1;
  int64_t spatial_stride = 1;
  const auto element = static_cast<int64_t>(t.element_size());
  if (!merge_spatial(sizes, strides, &spatial, &spatial_stride)) {
    return false;
  }
  if (!channels_last && spatial > 1 && spatial_stride != 1) {
    return false;
  }
  task->source = static_cast<const char*>(t.data_ptr());
  task->element = element;
  task->row_stride = !sizes.empty() ? strides[0] * element : 0;
  task->col_stride = sizes.size() > 1 ? strides[1] * element : 0;
  task->mid_stride = spatial_stride * element;
  task->mids = channels_last ? spatial : 1;
  task->run = channels_last ? element : spatial * element;
  return true;
}

// Widens runs over columns, and columns over rows, that are kept in full and lie without gaps.
void simplify(bool is_vector, const IndexList& rows, SliceTask* task) {
  if (is_vector) {  // a list of single elements: columns of one row
    task->cols = rows.count;
    task->col_index = rows.values;
    task->col_runs = rows.runs;
    task->col_stride = task->row_stride;
    task->rows = 1;
    task->row_index = nullptr;
    task->row_stride = 0;
  }
  if (task->col_index == nullptr && task->col_stride == task->run) {
    task->run *= task->cols;
    task->cols = 1;
  }
  if (task->cols == 1 && task->col_index == nullptr && task->mid_stride == task->run) {
    task->run *= task->mids;
    task->mids = 1;
  }
}

}  // namespace

SlicePlan plan_slice_channels(const std::vector<Tensor>& tensors, const OptionalTensors& rows,
                              const OptionalTensors& cols) {
  CHANPRUNE_CHECK(rows.size() == tensors.size() && cols.size() == tensors.size(),
                  "slice_channels: rows and cols should hold one entry per tensor, got ",
                  rows.size(), " and ", cols.size(), " for ", tensors.size(), " tensors");
  SlicePlan plan;
  if (tensors.empty()) {
    return plan;
  }
  plan.results.reserve(tensors.size());
  plan.tasks.reserve(tensors.size());
  plan.kept_alive.reserve(2 * tensors.size());
  const TensorMaker maker(tensors[0]);
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const auto source_sizes = tensor.sizes();
    const auto ndim = static_cast<int64_t>(source_sizes.size());
    CHANPRUNE_CHECK(maker.is_on_device_of(tensor),
                    "slice_channels: all tensors should be on one device, but tensors[", i,
                    "] is elsewhere than tensors[0]");
    CHANPRUNE_CHECK(!rows[i].has_value() || ndim >= 1, "slice_channels: rows[", i,
                    "] needs a tensor of at least one dim, got a scalar");
    CHANPRUNE_CHECK(!cols[i].has_value() || ndim >= 2, "slice_channels: cols[", i,
                    "] needs a tensor of at least two dims, got ", ndim);
    SliceTask task{};
    const IndexList row_list =
        index_list(rows[i], "rows", i, ndim > 0 ? source_sizes[0] : 1, &plan.kept_alive);
    const IndexList col_list =
        index_list(cols[i], "cols", i, ndim > 1 ? source_sizes[1] : 1, &plan.kept_alive);
    task.rows = row_list.count;
    task.cols = col_list.count;
    task.row_index = row_list.values;
    task.col_index = col_list.values;
    task.col_runs = col_list.runs;
    sizes.assign(source_sizes.begin(), source_sizes.end());
    if (ndim > 0) {
      sizes[0] = task.rows;
    }
    if (ndim > 1) {
      sizes[1] = task.cols;
    }
    const bool channels_last = is_channels_last(source_sizes, tensor.strides());
    pack_strides(sizes, channels_last, &strides);
    const AtenTensorHandle result =
        maker.strided_handle(ndim, sizes.data(), strides.data(), tensor.scalar_type());
    plan.results.push_back(result);
    if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) {
      continue;
    }
    if (!describe_source(tensor, channels_last, &task)) {
      plan.kept_alive.push_back(torch::stable::contiguous(
          tensor, !channels_last ? torch::headeronly::MemoryFormat::Contiguous
                  : ndim == 4    ? torch::headeronly::MemoryFormat::ChannelsLast
                                 : torch::headeronly::MemoryFormat::ChannelsLast3d));
      describe_source(plan.kept_alive.back(), channels_last, &task);
    }
    void* destination = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(result, &destination));
    task.destination = static_cast<char*>(destination);
    simplify(ndim == 1, row_list, &task);
    plan.tasks.push_back(task);
  }
  return plan;
}

}  // namespace chanprune
