// Vectors of one register's width and the two tiles that every kernel here is made of.
//
//   dot_tile    y[r][c]  = sum_j p[r][j] v[c][j]        rows of a panel against 4 block rows
//   axpy_tile   w[c][j] += sum_r y[r][c] p[r][j]        the same operands, transposed product
//
// A block kernel runs dot then axpy on a panel stored along the tracked side, axpy then dot on one stored across it.
// Code is templated on the register width in bytes; SK_DISPATCH compiles each entry point for three instruction sets and picks
// one at run time. Templates must be inlined into the entry point (flatten) to be compiled for its instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__)
#define SK_X86 1
#else
#define SK_X86 0
#endif

namespace sk {

constexpr int64_t kPad = 16;  // rows of internal blocks are padded to a multiple of this, with zeros

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

int instruction_set();  // 0: baseline, 1: x86-64-v3 (AVX2), 2: x86-64-v4 (AVX-512); SPECTRAL_KERNELS_ISA lowers it

#if SK_X86
#define SK_DISPATCH(NAME, ARGS)                                                                                       \
  __attribute__((target("arch=x86-64-v4"), flatten)) static void NAME##_v4(ARGS& args) { NAME##_body<64>(args); }     \
  __attribute__((target("arch=x86-64-v3"), flatten)) static void NAME##_v3(ARGS& args) { NAME##_body<32>(args); }     \
  __attribute__((flatten)) static void NAME##_base(ARGS& args) { NAME##_body<16>(args); }                             \
  void NAME(ARGS& args) {                                                                                             \
    switch (instruction_set()) {                                                                                      \
      case 2: return NAME##_v4(args);                                                                                 \
      case 1: return NAME##_v3(args);                                                                                 \
      default: return NAME##_base(args);                                                                              \
    }                                                                                                                 \
  }
#else
#define SK_DISPATCH(NAME, ARGS) \
  void NAME(ARGS& args) { NAME##_body<16>(args); }
#endif

template <class T, int B>
struct simd {
  typedef T vec __attribute__((vector_size(B)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> lane_int;
  typedef lane_int mask __attribute__((vector_size(B)));
  static constexpr int lanes = B / sizeof(T);
  static constexpr int rows = B >= 64 ? 4 : 2;  // rows x 4 accumulators and their operands fit the register file

  static inline vec load(const T* p) {
    vec v;
    __builtin_memcpy(&v, p, B);
    return v;
  }
  static inline void store(T* p, vec v) { __builtin_memcpy(p, &v, B); }
  static inline vec splat(T x) { return x - vec{}; }
  // all ones in the last `rem` lanes: an overlapping last vector then counts every entry once
  static inline mask last(int64_t rem) {
    mask m;
    for (int i = 0; i < lanes; ++i) m[i] = i >= lanes - rem ? -1 : 0;
    return m;
  }
  static inline vec keep(vec v, mask m) { return (vec)((mask)v & m); }
};

// Adds the upper to the lower S lanes of every group of 2 S lanes of (a, b), and packs the sums.
template <int S, class V, size_t... I>
static inline V fold(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((int(I) / S) * 2 * S + int(I) % S)...) +
         __builtin_shufflevector(a, b, ((int(I) / S) * 2 * S + int(I) % S + S)...);
}

// out[i] = sum of the lanes of a[i], COUNT = 4, 8 or 16: log2(lanes) rounds of folding, about two shuffles a vector
template <class T, int B, int COUNT, int S = simd<T, B>::lanes / 2>
static inline void sum_lanes(typename simd<T, B>::vec* a, T* out) {
  constexpr int L = simd<T, B>::lanes;
  for (int i = 0; i < COUNT / 2; ++i) a[i] = fold<S>(a[2 * i], a[2 * i + 1], std::make_index_sequence<L>{});
  if constexpr (S == 1) {
    for (int i = 0; i < COUNT / 2; ++i) __builtin_memcpy(out + i * L, &a[i], B);
  } else if constexpr (COUNT > 2) {
    sum_lanes<T, B, COUNT / 2, S / 2>(a, out);
  } else {  // one vector left, with L / S sums in groups of S lanes
    for (int g = 0; g < L / S; ++g) {
      T total = 0;
      for (int i = 0; i < S; ++i) total += a[0][g * S + i];
      out[g] = total;
    }
  }
}

// y[r * 4 + c] = sum_j p[r][j] v[c][j] over j in [0, n); n >= lanes, v readable (not padded) up to n
template <class T, int B, int R>
static inline void dot_tile(const T* const* p, const T* v, int64_t ldv, int64_t n, T* y) {
  using S = simd<T, B>;
  typename S::vec acc[R * 4] = {};
  int64_t j = 0;
  for (; j + S::lanes <= n; j += S::lanes) {
    typename S::vec x[4];
    for (int c = 0; c < 4; ++c) x[c] = S::load(v + c * ldv + j);
    for (int r = 0; r < R; ++r) {
      typename S::vec a = S::load(p[r] + j);
      for (int c = 0; c < 4; ++c) acc[r * 4 + c] += a * x[c];
    }
  }
  if (j < n) {
    const typename S::mask tail = S::last(n - j);
    j = n - S::lanes;
    for (int r = 0; r < R; ++r) {
      typename S::vec a = S::keep(S::load(p[r] + j), tail);
      for (int c = 0; c < 4; ++c) acc[r * 4 + c] += a * S::load(v + c * ldv + j);
    }
  }
  sum_lanes<T, B, R * 4>(acc, y);
}

// w[c][j] += sum_r y[r * 4 + c] p[r][j]; prefetches `ahead` entries further along each p[r] where ahead != 0
template <class T, int B, int R>
static inline void axpy_tile(const T* const* p, const T* y, T* w, int64_t ldw, int64_t n, int64_t ahead) {
  using S = simd<T, B>;
  typename S::vec k[R * 4];
  for (int i = 0; i < R * 4; ++i) k[i] = S::splat(y[i]);
  int64_t j = 0;
  for (; j + S::lanes <= n; j += S::lanes) {
    typename S::vec o[4];
    for (int c = 0; c < 4; ++c) o[c] = S::load(w + c * ldw + j);
    for (int r = 0; r < R; ++r) {
      typename S::vec a = S::load(p[r] + j);
      if (ahead) __builtin_prefetch(p[r] + j + ahead, 0, 2);
      for (int c = 0; c < 4; ++c) o[c] += k[r * 4 + c] * a;
    }
    for (int c = 0; c < 4; ++c) S::store(w + c * ldw + j, o[c]);
  }
  if (j < n) {
    const typename S::mask tail = S::last(n - j);
    j = n - S::lanes;
    typename S::vec o[4];
    for (int c = 0; c < 4; ++c) o[c] = S::load(w + c * ldw + j);
    for (int r = 0; r < R; ++r) {
      typename S::vec a = S::keep(S::load(p[r] + j), tail);
      for (int c = 0; c < 4; ++c) o[c] += k[r * 4 + c] * a;
    }
    for (int c = 0; c < 4; ++c) S::store(w + c * ldw + j, o[c]);
  }
}

}  // namespace sk
