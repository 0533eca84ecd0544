// Run-time SIMD dispatch for leaf functions.
//
// A function marked CHANPRUNE_CLONES is compiled for baseline x86-64, AVX2+FMA (x86-64-v3) and
// AVX-512 (x86-64-v4); the dynamic linker picks one when the library is loaded. Rules for such a
// function: plain loops over arrays only, helpers marked CHANPRUNE_INLINE (they must be compiled
// into each clone), no lambdas and no std:: algorithms, threads outside.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && __GNUC__ >= 12 && !defined(CHANPRUNE_NO_CLONES)
#define CHANPRUNE_HAS_CLONES 1
#define CHANPRUNE_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CHANPRUNE_HAS_CLONES 0
#define CHANPRUNE_CLONES
#endif

#define CHANPRUNE_INLINE static inline __attribute__((always_inline))
