// Plain options and row statistics of kd_kl_div, as kernels read them; no torch types.
#pragma once

#include <cstdint>

namespace chanprune {

enum class KdReduction : int64_t { kNone = 0, kSum = 1, kBatchMean = 2 };

// What the forward keeps of a row for the backward, in this order.
enum KdStatistic : int64_t {
  kStudentMax = 0,     // of s
  kStudentLogSum = 1,  // ln Zs at temperature T
  kTeacherMax = 2,     // of t
  kTeacherLogSum = 3,  // ln Zt at temperature T
  kHardLogSum = 4,     // ln sum e^(s - max s); 0 without a hard term
  kKdStatistics = 5,
};

struct KdOptions {
  double temperature;
  double soft_weight;
  double hard_weight;
  double label_smoothing;
  int64_t ignore_index;
  KdReduction reduction;
  bool hard;  // labels given and hard_weight != 0
};

}  // namespace chanprune
