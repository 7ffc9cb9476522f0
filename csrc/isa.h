// Which x86 instruction set the CPU has. A kernel's inner loops are a header that is compiled once for each set, inside a namespace and
// a target region of its own (each_isa.h); the set is chosen at run time.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastinvdpo {

enum class Isa { kBaseline, kAvx2, kAvx512 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

// The best set that the CPU has.
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

struct IsaChoice {
  Isa isa;
  std::string refusal;  // why the set that was asked for cannot be had; empty when nothing is wrong
};

// The set to use: the best one, or a lesser one that FASTINVDPO_ISA names. Read once, at the first use.
inline const IsaChoice& isa_choice() {
  static const IsaChoice choice = [] {
    const Isa best = detect_isa();
    const char* const asked = std::getenv("FASTINVDPO_ISA");
    if (asked == nullptr || *asked == '\0') return IsaChoice{best, {}};
    std::string known;
    for (int i = 0; i <= static_cast<int>(best); ++i) {
      if (std::strcmp(asked, kIsaNames[i]) == 0) return IsaChoice{static_cast<Isa>(i), {}};
      known += std::string(i == 0 ? "" : ", ") + kIsaNames[i];
    }
    const std::string problem = std::string("FASTINVDPO_ISA = '") + asked + "': this CPU has no such instruction set.";
    return IsaChoice{best, problem + " Remedy: use one of " + known + ", or leave it out."};
  }();
  return choice;
}

inline Isa isa() {
  const IsaChoice& choice = isa_choice();
  if (!choice.refusal.empty()) throw std::runtime_error(choice.refusal);
  return choice.isa;
}

// The function for this CPU among three that differ in their instruction set.
#if defined(__x86_64__)
#define FID_FOR_THIS_CPU(function)                              \
  (fastinvdpo::isa() == fastinvdpo::Isa::kAvx512 ? avx512::function \
   : fastinvdpo::isa() == fastinvdpo::Isa::kAvx2 ? avx2::function   \
                                                 : baseline::function)
#else
#define FID_FOR_THIS_CPU(function) (static_cast<void>(fastinvdpo::isa()), baseline::function)
#endif

}  // namespace fastinvdpo
