// Launchers of the channel_norms kernels; no torch types, so that nvcc reads no torch headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "channel_norms_task.h"

namespace chanprune {

constexpr int kChannelNormThreads = 256;
constexpr int kChannelNormUnitColumns = 1024;

// Runs every unit by a block of its own. All pointers are device memory.
//   tasks: [tasks], units: [unit_count], partials: [partial values of split tasks]
void launch_channel_norms(NormKind kind, const ChannelNormTask* tasks, const ChannelNormUnit* units,
                          int64_t unit_count, double* partials, cudaStream_t stream);

// Joins the partial values of split tasks; units name channels, at most kChannelNormThreads each.
void launch_join_pieces(NormKind kind, const ChannelNormTask* tasks, const ChannelNormUnit* units,
                        int64_t unit_count, const double* partials, cudaStream_t stream);

}  // namespace chanprune
