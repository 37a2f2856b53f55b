// A matrix as the kernels see it, and how its rows are brought into panels of the accumulation type.
#pragma once

#include <algorithm>

#include "simd.h"

namespace sk {

enum class Dtype : int { f32, f64, bf16, f16 };

struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t m, n;    // n: the tracked side
  int64_t sm, sn;  // strides in entries
};

// The side to track, as ops/estimate.py chooses it: the shorter one, unless rows along the longer one are contiguous and long
// enough to stream, and the matrix is neither small nor thin.
inline Matrix oriented(Matrix a) {
  const int64_t small = a.m < a.n ? a.m : a.n, large = a.m < a.n ? a.n : a.m;
  bool swap = a.n > a.m;
  if (small >= 128 && large <= 16 * small) {
    if (a.sn == 1 && a.sm != 1) swap = false;
    if (a.sm == 1 && a.sn != 1) swap = true;
  }
  return swap ? Matrix{a.data, a.dtype, a.n, a.m, a.sn, a.sm} : a;
}

inline int64_t entry_bytes(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// Stored across the tracked side (columns contiguous): panels of whole columns' segments instead of whole rows.
inline bool is_across(const Matrix& a) { return a.sm == 1 && (a.sn != 1 || a.n < kPad); }

// Rows of the untracked side per chunk: a partial result per chunk, added up in order, so that bits depend on the shape alone.
inline int64_t chunk_rows(int64_t m) {
  const int64_t rows = m > 2048 ? 512 : 256, most = 64;  // 512: partial results of a large matrix stay below 1 % of it
  int64_t chunks = std::clamp<int64_t>((m + rows - 1) / rows, 1, most);
  if (m > 1024) chunks = (chunks + 3) / 4 * 4;  // fair shares for a few threads
  return chunks == 1 ? rows : (m + 4 * chunks - 1) / (4 * chunks) * 4;
}

inline float from_bf16(uint16_t x) {
  uint32_t u = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline float from_f16(uint16_t x) {
  // exponent and mantissa moved into place, then the bias corrected by an exact product (subnormals come right); inf, nan fixed
  uint32_t u = uint32_t(x & 0x7fff) << 13;
  float f;
  __builtin_memcpy(&f, &u, 4);
  f *= 0x1p112f;
  __builtin_memcpy(&u, &f, 4);
  u |= (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  u |= uint32_t(x & 0x8000) << 16;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // to nearest even
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

inline uint16_t to_f16(float f) {  // to nearest even
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  const uint32_t normal = (u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13;
  float magnitude;  // subnormals: one ulp of 0.5f is the smallest of them, so that a sum rounds as wanted
  __builtin_memcpy(&magnitude, &u, 4);
  magnitude += 0.5f;
  uint32_t small;
  __builtin_memcpy(&small, &magnitude, 4);
  uint32_t h = u < 0x38800000 ? small - 0x3f000000 : normal;
  h = u >= 0x477ff000 ? 0x7c00 : h;
  h = u > 0x7f800000 ? 0x7e00 : h;
  return uint16_t(sign | h);
}

template <class T>
inline T entry(const Matrix& a, int64_t offset) {
  switch (a.dtype) {
    case Dtype::f32: return T(static_cast<const float*>(a.data)[offset]);
    case Dtype::f64: return T(static_cast<const double*>(a.data)[offset]);
    case Dtype::bf16: return T(from_bf16(static_cast<const uint16_t*>(a.data)[offset]));
    default: return T(from_f16(static_cast<const uint16_t*>(a.data)[offset]));
  }
}

struct Statistics {
  double frob2 = 0, amax = 0;  // of the packed (scaled) entries; a momentum's amax is unscaled
  bool nan = false, inf = false;  // inf: set by a momentum only, whose entries count as zero where they are not finite

  void add(const Statistics& o) {
    frob2 += o.frob2;
    amax = o.amax > amax ? o.amax : amax;
    nan |= o.nan;
    inf |= o.inf;
  }
};

}  // namespace sk
