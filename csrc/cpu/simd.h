// What every kernel shares outside the vector code: padding and the choice of an instruction set at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define SK_X86 1
#include <immintrin.h>
#else
#define SK_X86 0
#endif

namespace sk {

constexpr int64_t kPad = 16;  // rows of internal blocks are padded to a multiple of this, with zeros

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

int instruction_set();  // 0: baseline, 1: x86-64-v3 (AVX2), 2: x86-64-v4 (AVX-512); SPECTRAL_KERNELS_ISA lowers it

}  // namespace sk

// void NAME(ARGS&), defined in the *.inc of this kernel once per instruction set, dispatched at run time
#if SK_X86
#define SK_DISPATCH(NAME, ARGS)                      \
  void NAME(ARGS& args) {                            \
    switch (instruction_set()) {                     \
      case 2: return v4::NAME(args);                 \
      case 1: return v3::NAME(args);                 \
      default: return base::NAME(args);              \
    }                                                \
  }
#else
#define SK_DISPATCH(NAME, ARGS) \
  void NAME(ARGS& args) { return base::NAME(args); }
#endif
