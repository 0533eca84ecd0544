// Subnormals for code that relies on them.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace chanprune {

// While one lives, its thread computes with subnormals, whatever torch.set_flush_denormal says.
class SubnormalScope {
 public:
  SubnormalScope() : before_(control()) {
    if ((before_ & kFlush) != 0) {
      set_control(before_ & ~kFlush);
    }
  }
  SubnormalScope(const SubnormalScope&) = delete;
  SubnormalScope& operator=(const SubnormalScope&) = delete;
  ~SubnormalScope() {
    if ((before_ & kFlush) != 0) {
      set_control(before_);
    }
  }

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // flush to zero, denormals are zero
  static uint64_t control() { return _mm_getcsr(); }
  static void set_control(uint64_t value) {
    const auto bits = static_cast<uint32_t>(value);
    __asm__ volatile("ldmxcsr %0" : : "m"(bits) : "memory");  // nothing is read or written across
  }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  static uint64_t control() {
    uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(uint64_t value) {
    __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory");
  }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set_control(uint64_t) {}
#endif

  uint64_t before_;
};

}  // namespace chanprune
