// sigma_max of a small matrix by a direct method: Gram matrix, tridiagonal form, largest eigenvalue.
#pragma once

#include <algorithm>

#include "matrix.h"

namespace sk {

constexpr int64_t kDenseSide = 64;           // tracked sides up to this; from measurements: benchmarks, row C4
constexpr int64_t kDenseEntries = 1 << 17;   // larger ones are worth several threads: block Krylov

template <class T>
struct DenseNorm {
  Matrix a;
  T scale;
  T* panel;   // scratch: dense_entries(a)
  double lambda;  // largest eigenvalue of (scale A)'(scale A)
  Statistics statistics;  // of scale * A; where it holds a NaN or inf, or is zero, lambda is 0
};
void dense_norm_f32(DenseNorm<float>& args);
void dense_norm_f64(DenseNorm<double>& args);
inline void run(DenseNorm<float>& a) { dense_norm_f32(a); }
inline void run(DenseNorm<double>& a) { dense_norm_f64(a); }

inline int64_t dense_entries(const Matrix& a) {
  return is_across(a) ? padded(a.m) * (a.n + 3) : padded(a.n) * (std::min<int64_t>(a.m, 256) + 3);
}

}  // namespace sk
