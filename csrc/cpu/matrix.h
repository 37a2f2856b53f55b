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

inline int64_t entry_bytes(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// Stored across the tracked side (columns contiguous): panels of whole columns' segments instead of whole rows.
inline bool is_across(const Matrix& a) { return a.sm == 1 && (a.sn != 1 || a.n < kPad); }

// Rows of the untracked side per chunk: a partial result per chunk, added up in order, so that bits depend on the shape alone.
inline int64_t chunk_rows(int64_t m) {
  constexpr int64_t rows = 256, most = 64;
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

// dst[0..count) = scale * entries at offset, offset + stride, ...; zeros up to `width`
template <class T>
static inline void pack(const Matrix& a, int64_t offset, int64_t stride, int64_t count, T scale, T* __restrict dst,
                        int64_t width) {
  if (stride == 1 && a.dtype == Dtype::bf16) {
    const uint16_t* s = static_cast<const uint16_t*>(a.data) + offset;
    for (int64_t i = 0; i < count; ++i) dst[i] = T(from_bf16(s[i])) * scale;
  } else if (stride == 1 && a.dtype == Dtype::f16) {
    const uint16_t* s = static_cast<const uint16_t*>(a.data) + offset;
    for (int64_t i = 0; i < count; ++i) dst[i] = T(from_f16(s[i])) * scale;
  } else if (a.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64)) {
    const T* s = static_cast<const T*>(a.data) + offset;
    if (stride == 1)
      for (int64_t i = 0; i < count; ++i) dst[i] = s[i] * scale;
    else
      for (int64_t i = 0; i < count; ++i) dst[i] = s[i * stride] * scale;
  } else {
    for (int64_t i = 0; i < count; ++i) dst[i] = entry<T>(a, offset + i * stride) * scale;
  }
  for (int64_t i = count; i < width; ++i) dst[i] = 0;
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

// sum of squares, largest magnitude and NaN flag of a contiguous row
template <class T, int B>
static inline void row_statistics(const T* p, int64_t n, Statistics& s) {
  using S = simd<T, B>;
  T squares = 0, largest = 0;
  bool nan = false;
  int64_t j = 0;
  if (n >= S::lanes) {
    typename S::vec sq = {}, top = {};
    typename S::mask bad = {};
    auto take = [&](typename S::vec x) __attribute__((always_inline)) {
      sq += x * x;
      bad |= x != x;
      typename S::vec ax = x < 0 ? -x : x;
      top = ax > top ? ax : top;
    };
    for (; j + S::lanes <= n; j += S::lanes) take(S::load(p + j));
    if (j < n) take(S::keep(S::load(p + n - S::lanes), S::last(n - j)));
    j = n;
    for (int i = 0; i < S::lanes; ++i) {
      squares += sq[i];
      largest = top[i] > largest ? top[i] : largest;
      nan |= bad[i] != 0;
    }
  }
  for (; j < n; ++j) {
    const T x = p[j], ax = x < 0 ? -x : x;
    squares += x * x;
    largest = ax > largest ? ax : largest;
    nan |= x != x;
  }
  s.frob2 += squares;
  s.amax = largest > s.amax ? largest : s.amax;
  s.nan |= nan;
}

}  // namespace sk
