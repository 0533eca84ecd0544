// Plain description of the work of channel_norms, as kernels read it; no torch types.
#pragma once

#include <cstdint>

namespace chanprune {

enum class NormKind : int32_t { kL1, kL2, kInf };

// The reduction of one weight, seen in storage order.
//
// A weight whose dims other than the channel dim merge into two, one of them with stride 1, is a
// block [outer, channels, inner]. Norms do not mind the order of summation, so channels_last and
// sliced weights are walked as they lie. Two ways to reduce the block:
//   rows:    inner runs are long; one value per channel, `width` = channels.
//   columns: inner runs are short and close to one another; outer steps are added element by
//            element, from the first channel's first to the last channel's last: `width` values. At
//            the end the `group` = inner of each channel, `group_stride` from the last channel's,
//            are added up.
// Long reductions are cut into `pieces`, each giving `width` partial values.
struct ChannelNormTask {
  const void* data;
  void* result;  // [channels] of the accumulation dtype
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t outer_stride;    // elements
  int64_t channel_stride;  // elements
  int64_t width;
  int64_t group;
  int64_t group_stride;
  int64_t pieces;
  int64_t piece_outer;    // outer steps in a piece
  int64_t piece_inner;    // inner elements in a piece (rows only)
  int64_t partial_start;  // first of pieces * width partial values; -1: units write the result
  int32_t columns;        // bool
  int32_t dtype;          // ElementKind
};

// A share of one task: values [first, first + count) of one piece.
struct ChannelNormUnit {
  int64_t first;
  int64_t piece;
  int32_t count;
  int32_t task;
};

enum class ElementKind : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace chanprune
