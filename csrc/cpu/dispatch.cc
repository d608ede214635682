// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace ivg::cpu {

#define IVG_DECLARE(name, Args)      \
  void name##_baseline(const Args&); \
  void name##_avx2(const Args&);     \
  void name##_avx512(const Args&);
IVG_FOR_EACH_KERNEL(IVG_DECLARE)
#undef IVG_DECLARE

namespace {

struct Variant {
  CpuKernels kernels;
  bool (*is_supported)();
};

#define IVG_MEMBER_baseline(name, Args) name##_baseline,
#define IVG_MEMBER_avx2(name, Args) name##_avx2,
#define IVG_MEMBER_avx512(name, Args) name##_avx512,

// Best first.
const Variant kVariants[] = {
#if IVG_HAVE_avx512
    {{"avx512", IVG_FOR_EACH_KERNEL(IVG_MEMBER_avx512)},
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
#endif
#if IVG_HAVE_avx2
    // Every processor with AVX2 and FMA has F16C, which __builtin_cpu_supports cannot ask for here.
    {{"avx2", IVG_FOR_EACH_KERNEL(IVG_MEMBER_avx2)},
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {{"baseline", IVG_FOR_EACH_KERNEL(IVG_MEMBER_baseline)}, [] { return true; }},
};

const CpuKernels& choose() {
  const char* wanted = std::getenv("IVG_FAST_CPU_ISA");
  for (const Variant& variant : kVariants) {
    if (wanted != nullptr && std::strcmp(wanted, variant.kernels.isa) != 0) continue;
    if (variant.is_supported()) return variant.kernels;
    if (wanted != nullptr) {
      throw std::runtime_error("IVG_FAST_CPU_ISA=" + std::string(wanted) +
                               ": this processor lacks that instruction set");
    }
  }
  throw std::runtime_error(
      "IVG_FAST_CPU_ISA must be baseline, avx2 or avx512 (what this build has), got '" +
      std::string(wanted) + "'");
}

}  // namespace

const CpuKernels& kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace ivg::cpu
