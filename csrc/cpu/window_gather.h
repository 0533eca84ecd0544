// Gathers four-byte elements of a row by shuffling vectors instead of loading them one by one.
//
// Kept channels are mostly ascending, so neighbouring results come from a narrow window of the row:
// load the window, permute, store. The same column list serves every row of a weight, hence the
// windows are planned once. Any list is correct; one that jumps about only gets short windows.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

// Chosen by asking the processor, not by the linker, so that sanitised builds have it too.
#if defined(__x86_64__) && defined(__GNUC__)
#define CHANPRUNE_VECTOR_GATHER 1
#include <immintrin.h>
#else
#define CHANPRUNE_VECTOR_GATHER 0
#endif

namespace chanprune {

// Up to `kLanes` results in a row out of `kWindow` adjacent source elements.
struct GatherWindow {
  static constexpr int64_t kMaxLanes = 16;
  int64_t base;   // first element of the window
  int64_t count;  // results
  alignas(64) int32_t lane[kMaxLanes];
};

enum class GatherWidth { kNone, kAvx2, kAvx512 };

inline GatherWidth gather_width() {
#if CHANPRUNE_VECTOR_GATHER
  static const GatherWidth width = __builtin_cpu_supports("avx512f") ? GatherWidth::kAvx512
                                   : __builtin_cpu_supports("avx2")  ? GatherWidth::kAvx2
                                                                     : GatherWidth::kNone;
  return width;
#else
  return GatherWidth::kNone;
#endif
}

// Source elements a window spans, and results it gives at most.
inline int64_t window_span(GatherWidth width) { return width == GatherWidth::kAvx512 ? 32 : 8; }
inline int64_t window_lanes(GatherWidth width) { return width == GatherWidth::kAvx512 ? 16 : 8; }

// Windows of `count` columns; empty if the row is too short for one or windows would not pay.
inline std::vector<GatherWindow> plan_windows(const int64_t* columns, int64_t count) {
  const GatherWidth width = gather_width();
  if (width == GatherWidth::kNone || count == 0) {
    return {};
  }
  const int64_t span = window_span(width);
  const int64_t lanes = window_lanes(width);
  int64_t last = 0;
  for (int64_t j = 0; j < count; ++j) {
    last = columns[j] > last ? columns[j] : last;
  }
  if (last + 1 < span) {
    return {};
  }
  std::vector<GatherWindow> windows;
  windows.reserve(static_cast<size_t>(count / (lanes / 2) + 1));
  for (int64_t j = 0; j < count;) {
    int64_t low = columns[j];
    int64_t high = low;
    int64_t n = 1;
    for (; n < lanes && j + n < count; ++n) {
      const int64_t column = columns[j + n];
      const int64_t new_low = column < low ? column : low;
      const int64_t new_high = column > high ? column : high;
      if (new_high - new_low >= span) {
        break;
      }
      low = new_low;
      high = new_high;
    }
    GatherWindow window{};
    window.base = low < last + 1 - span ? low : last + 1 - span;  // never reads past the last one
    window.count = n;
    for (int64_t k = 0; k < n; ++k) {
      window.lane[k] = static_cast<int32_t>(columns[j + k] - window.base);
    }
    windows.push_back(window);
    j += n;
  }
  if (static_cast<int64_t>(windows.size()) * 2 > count) {
    windows.clear();
  }
  return windows;
}

#if CHANPRUNE_VECTOR_GATHER
// One row: windows of `source` to `destination`. Whole vectors are stored where `room` elements
// from `destination` allow it; the next window or row then overwrites the surplus.
__attribute__((target("avx512f"))) inline void gather_row_avx512(const char* source,
                                                                 const GatherWindow* windows,
                                                                 size_t count, char* destination,
                                                                 int64_t room, int64_t ahead) {
  for (size_t w = 0; w < count; ++w) {
    const GatherWindow& window = windows[w];
    const char* from = source + window.base * 4;
    __builtin_prefetch(from + ahead);
    __builtin_prefetch(from + ahead + 64);
    const __m512i low = _mm512_loadu_si512(from);
    const __m512i high = _mm512_loadu_si512(from + 64);
    const __m512i result = _mm512_permutex2var_epi32(low, _mm512_load_si512(window.lane), high);
    if (room >= 16) {
      _mm512_storeu_si512(destination, result);
    } else {
      _mm512_mask_storeu_epi32(destination, static_cast<__mmask16>((1u << window.count) - 1),
                               result);
    }
    destination += window.count * 4;
    room -= window.count;
  }
}

__attribute__((target("avx2"))) inline void gather_row_avx2(const char* source,
                                                            const GatherWindow* windows,
                                                            size_t count, char* destination,
                                                            int64_t room, int64_t ahead) {
  for (size_t w = 0; w < count; ++w) {
    const GatherWindow& window = windows[w];
    __builtin_prefetch(source + window.base * 4 + ahead);
    const __m256i row =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + window.base * 4));
    const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(window.lane));
    const __m256i result = _mm256_permutevar8x32_epi32(row, lanes);
    if (room >= 8) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination), result);
    } else {
      alignas(32) char spilled[32];
      _mm256_store_si256(reinterpret_cast<__m256i*>(spilled), result);
      std::memcpy(destination, spilled, static_cast<size_t>(window.count) * 4);
    }
    destination += window.count * 4;
    room -= window.count;
  }
}
#endif

// `room`: elements that may be written from `destination` on. `ahead`: bytes from this row to the
// one gathered next, which is fetched meanwhile: kept rows lie too irregularly for the hardware to
// guess.
inline void gather_row(const char* source, const std::vector<GatherWindow>& windows,
                       char* destination, int64_t room, int64_t ahead) {
#if CHANPRUNE_VECTOR_GATHER
  if (gather_width() == GatherWidth::kAvx512) {
    gather_row_avx512(source, windows.data(), windows.size(), destination, room, ahead);
  } else {
    gather_row_avx2(source, windows.data(), windows.size(), destination, room, ahead);
  }
#else
  (void)source, (void)windows, (void)destination, (void)room, (void)ahead;
#endif
}

}  // namespace chanprune
