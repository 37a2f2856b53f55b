#include "dense_norm.h"

#include <algorithm>

#include "small_eig.h"

namespace sk {

namespace {

// g (n, ld) symmetric, overwritten -> diagonal d, squared off-diagonal e2, by Householder reflections
template <class T, int B>
static inline void tridiagonal(T* g, int64_t n, int64_t ld, double* d, double* e2) {
  using S = simd<T, B>;
  constexpr int L = S::lanes;
  alignas(64) T v[padded_side()], p[padded_side()];
  for (int64_t i = 0; i < n; ++i) {
    d[i] = g[i * ld + i];
    if (i + 1 == n) break;
    T* column = g + i * ld;  // row i = column i by symmetry
    T tail = 0;
    for (int64_t r = i + 2; r < n; ++r) tail += column[r] * column[r];
    const T head = column[i + 1];
    if (!(tail > 0)) {
      e2[i] = double(head) * double(head);
      continue;
    }
    const T norm = std::sqrt(head * head + tail), alpha = head > 0 ? -norm : norm, v0 = head - alpha;
    e2[i] = double(alpha) * double(alpha);
    const T beta = T(2) / (v0 * v0 + tail);
    const int64_t from = (i + 1) / L * L;
    for (int64_t r = from; r < ld; ++r) v[r] = r > i + 1 && r < n ? column[r] : T(0), p[r] = 0;
    v[i + 1] = v0;
    int64_t r = i + 1;
    for (; r + 4 <= n; r += 4) {  // p = G v, by rows
      const T* row = g + r * ld;
      const typename S::vec k0 = S::splat(v[r]), k1 = S::splat(v[r + 1]), k2 = S::splat(v[r + 2]), k3 = S::splat(v[r + 3]);
      for (int64_t j = from; j < ld; j += L)
        S::store(p + j, S::load(p + j) + (k0 * S::load(row + j) + k1 * S::load(row + ld + j)) +
                            (k2 * S::load(row + 2 * ld + j) + k3 * S::load(row + 3 * ld + j)));
    }
    for (; r < n; ++r)
      for (int64_t j = from; j < ld; j += L) S::store(p + j, S::load(p + j) + S::splat(v[r]) * S::load(g + r * ld + j));
    typename S::vec sum = {};
    for (int64_t j = from; j < ld; j += L) sum += S::load(p + j) * S::load(v + j);
    T pv = 0;
    for (int l = 0; l < L; ++l) pv += sum[l];
    const T half = T(0.5) * beta * beta * pv;
    for (int64_t j = from; j < ld; j += L) S::store(p + j, S::splat(beta) * S::load(p + j) - S::splat(half) * S::load(v + j));
    for (r = i + 1; r < n; ++r) {  // G -= v p' + p v'
      T* row = g + r * ld;
      const typename S::vec kv = S::splat(v[r]), kp = S::splat(p[r]);
      for (int64_t j = from; j < ld; j += L)
        S::store(row + j, S::load(row + j) - (kv * S::load(p + j) + kp * S::load(v + j)));
    }
  }
}

template <class T, int B>
static inline void dense_norm(DenseNorm<T>& g) {
  constexpr int R = simd<T, B>::rows;
  const Matrix& a = g.a;
  const int64_t n = a.n, ldn = padded(n), n4 = (n + 3) / 4 * 4;
  alignas(64) double gram[padded_side() * padded_side()];
  alignas(64) T part[padded_side() * padded_side()];
  for (int64_t i = 0; i < n4 * ldn; ++i) gram[i] = 0;
  g.lambda = 0;
  g.statistics = Statistics{};
  if (is_across(a)) {
    const int64_t ldm = padded(a.m);
    for (int64_t i = 0; i < n4 + 3 && i < a.n + 3; ++i) {
      T* row = g.panel + i * ldm;
      pack<T>(a, i < n ? i * a.sn : 0, a.sm, i < n ? a.m : 0, g.scale, row, ldm);
      if (i < n) row_statistics<T, B>(row, ldm, g.statistics);
    }
    for (int64_t m0 = 0; m0 < ldm; m0 += 256) {  // partial sums of 256 products in T, beyond in float64
      const int64_t count = std::min<int64_t>(256, ldm - m0);
      for (int64_t i = 0; i < n4; i += R)
        for (int64_t j = i / 4 * 4; j < n4; j += 4) {
          const T* p[R];
          for (int r = 0; r < R; ++r) p[r] = g.panel + (i + r) * ldm + m0;
          T y[R * 4 < 16 ? 16 : R * 4];
          dot_tile<T, B, R>(p, g.panel + j * ldm + m0, ldm, count, y);
          for (int r = 0; r < R; ++r)
            for (int c = 0; c < 4; ++c) gram[(i + r) * ldn + j + c] += y[r * 4 + c];
        }
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < i; ++j) gram[i * ldn + j] = gram[j * ldn + i];
  } else {
    for (int64_t m0 = 0; m0 < a.m; m0 += 256) {
      const int64_t count = std::min<int64_t>(256, a.m - m0);
      for (int64_t r = 0; r < count; ++r) {
        T* row = g.panel + r * ldn;
        pack<T>(a, (m0 + r) * a.sm, a.sn, n, g.scale, row, ldn);
        row_statistics<T, B>(row, ldn, g.statistics);
      }
      for (int64_t i = 0; i < n4 * ldn; ++i) part[i] = 0;
      int64_t r = 0;
      auto add = [&](auto rows) __attribute__((always_inline)) {
        constexpr int N = decltype(rows)::value;
        const T* p[N];
        for (int k = 0; k < N; ++k) p[k] = g.panel + (r + k) * ldn;
        for (int64_t c = 0; c < n4; c += 4) {
          T y[N * 4];
          for (int k = 0; k < N; ++k)
            for (int q = 0; q < 4; ++q) y[k * 4 + q] = p[k][c + q];
          axpy_tile<T, B, N>(p, y, part + c * ldn, ldn, ldn, 0);
        }
      };
      for (; r + R <= count; r += R) add(std::integral_constant<int, R>{});
      for (; r < count; ++r) add(std::integral_constant<int, 1>{});
      for (int64_t i = 0; i < n4 * ldn; ++i) gram[i] += part[i];
    }
  }
  if (g.statistics.nan || !(g.statistics.amax > 0) || std::isinf(g.statistics.amax)) return;
  for (int64_t i = 0; i < n4 * ldn; ++i) part[i] = T(gram[i]);
  double d[padded_side()], e2[padded_side()];
  tridiagonal<T, B>(part, n, ldn, d, e2);
  g.lambda = largest_tridiagonal(d, e2, n);
}

template <int B> static inline void dense_norm_f32_body(DenseNorm<float>& g) { dense_norm<float, B>(g); }
template <int B> static inline void dense_norm_f64_body(DenseNorm<double>& g) { dense_norm<double, B>(g); }

}  // namespace

SK_DISPATCH(dense_norm_f32, DenseNorm<float>)
SK_DISPATCH(dense_norm_f64, DenseNorm<double>)

}  // namespace sk
