// A matrix as the kernels see it, and how its rows are brought into panels of the accumulation type.
#pragma once

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
  return rows * ((m + rows * most - 1) / (rows * most) > 0 ? (m + rows * most - 1) / (rows * most) : 1);
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
  double frob2 = 0, amax = 0;  // of the packed (scaled) entries
  bool nan = false;

  void add(const Statistics& o) {
    frob2 += o.frob2;
    amax = o.amax > amax ? o.amax : amax;
    nan |= o.nan;
  }
};

}  // namespace sk
