// What only nvcc knows about the build.
#include "cuda/build_facts.h"

#define CHANPRUNE_STRING_OF(...) #__VA_ARGS__
#define CHANPRUNE_STRING(...) CHANPRUNE_STRING_OF(__VA_ARGS__)

namespace chanprune {

const char* compiled_archs() { return CHANPRUNE_STRING(__CUDA_ARCH_LIST__); }

}  // namespace chanprune
