#include "orthogonal.h"

namespace sk {

namespace {

template <class T, int B>
static inline void project(Project<T>& g) {
  constexpr int R = simd<T, B>::rows;
  for (int64_t k = 0; k < g.k; k += R) {
    const T* p[R];
    for (int i = 0; i < R; ++i) p[i] = g.q + (k + i) * g.ld;
    for (int64_t c = 0; c < g.b4; c += 4) {
      T h[R * 4 < 16 ? 16 : R * 4];
      dot_tile<T, B, R>(p, g.w + c * g.ld, g.ld, g.ld, h);
      for (int i = 0; i < R * 4; ++i) h[i] = -h[i];
      axpy_tile<T, B, R>(p, h, g.w + c * g.ld, g.ld, g.ld, 0);
    }
  }
}

template <class T, int B>
static inline T dot(const T* x, const T* y, int64_t n) {
  using S = simd<T, B>;
  typename S::vec a = {}, b = {};
  int64_t j = 0;
  for (; j + 2 * S::lanes <= n; j += 2 * S::lanes) {
    a += S::load(x + j) * S::load(y + j);
    b += S::load(x + j + S::lanes) * S::load(y + j + S::lanes);
  }
  for (; j + S::lanes <= n; j += S::lanes) a += S::load(x + j) * S::load(y + j);
  a += b;
  T sum = 0;
  for (int i = 0; i < S::lanes; ++i) sum += a[i];
  return sum;
}

template <class T, int B>
static inline void block_qr(BlockQr<T>& g) {
  for (int64_t i = 0; i < g.b * g.b; ++i) g.r[i] = 0;
  for (int64_t c = 0; c < g.b; ++c) {
    T* w = g.w + c * g.ld;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t i = 0; i < c; ++i) {
        const T* x = g.w + i * g.ld;
        const T h = dot<T, B>(x, w, g.ld);
        for (int64_t j = 0; j < g.ld; ++j) w[j] -= h * x[j];
        g.r[i * g.b + c] += h;
      }
    const double norm = std::sqrt(double(dot<T, B>(w, w, g.ld)));
    const bool kept = norm > g.floor;
    const T inverse = kept ? T(1 / norm) : T(0);
    for (int64_t j = 0; j < g.ld; ++j) w[j] *= inverse;
    g.r[c * g.b + c] = kept ? norm : 0;
  }
}

template <class T, int B>
static inline void combine(Combine<T>& g) {
  for (int64_t c = 0; c < g.rows; ++c) std::memset(g.out + c * g.ldo, 0, sizeof(T) * g.width);
  for (int64_t k = 0; k < g.k; ++k) {
    const T* p[1] = {g.q + k * g.ldq};
    for (int64_t c = 0; c < g.rows; c += 4) {
      T y[4];
      for (int i = 0; i < 4; ++i) y[i] = g.coefficients[(c + i) * g.k + k];
      axpy_tile<T, B, 1>(p, y, g.out + c * g.ldo, g.ldo, g.width, 0);
    }
  }
}

template <int B> static inline void project_f32_body(Project<float>& g) { project<float, B>(g); }
template <int B> static inline void project_f64_body(Project<double>& g) { project<double, B>(g); }
template <int B> static inline void block_qr_f32_body(BlockQr<float>& g) { block_qr<float, B>(g); }
template <int B> static inline void block_qr_f64_body(BlockQr<double>& g) { block_qr<double, B>(g); }
template <int B> static inline void combine_f32_body(Combine<float>& g) { combine<float, B>(g); }
template <int B> static inline void combine_f64_body(Combine<double>& g) { combine<double, B>(g); }

}  // namespace

SK_DISPATCH(project_f32, Project<float>)
SK_DISPATCH(project_f64, Project<double>)
SK_DISPATCH(block_qr_f32, BlockQr<float>)
SK_DISPATCH(block_qr_f64, BlockQr<double>)
SK_DISPATCH(combine_f32, Combine<float>)
SK_DISPATCH(combine_f64, Combine<double>)

}  // namespace sk
