// Which x86 instruction set the CPU has. A kernel's inner loops are a header that is compiled once for each set, inside a namespace and
// a target region of its own (preference_loss.cpp shows how); the set is chosen at run time.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastinvdpo {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

inline Isa isa() {
  static const Isa detected = detect_isa();
  return detected;
}

// The function for this CPU among three that differ in their instruction set.
#if defined(__x86_64__)
#define FID_FOR_THIS_CPU(function)                              \
  (fastinvdpo::isa() == fastinvdpo::Isa::kAvx512 ? avx512::function \
   : fastinvdpo::isa() == fastinvdpo::Isa::kAvx2 ? avx2::function   \
                                                 : baseline::function)
#else
#define FID_FOR_THIS_CPU(function) baseline::function
#endif

}  // namespace fastinvdpo
