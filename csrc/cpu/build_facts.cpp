// Facts about the build that the Python side reports.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/simd.h"

namespace {

#if CHANPRUNE_HAS_CLONES
// Multiversioned exactly like the kernels, so it names the clone that they run.
__attribute__((target("default"))) const char* level() { return "default"; }
__attribute__((target("arch=x86-64-v3"))) const char* level() { return "x86-64-v3"; }
__attribute__((target("arch=x86-64-v4"))) const char* level() { return "x86-64-v4"; }
#else
const char* level() { return "default"; }
#endif

std::string simd_level() { return level(); }

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::string major_minor(uint64_t version) {
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 0xff);
}

// Lines of name=value.
std::string build_facts() {
  return std::string("compiler=") + kCompiler +
         "\ntarget_torch=" + major_minor(TORCH_TARGET_VERSION) +
         "\nbuilt_with_torch=" + TORCH_VERSION;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(chanprune, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&simd_level));
  m.impl("build_facts", TORCH_BOX(&build_facts));
}
