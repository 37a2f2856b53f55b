// Orthogonalization of a block against a basis, and linear combinations of basis rows.
#pragma once

#include "simd.h"

namespace sk {

template <class T>
struct RowNorm {  // the largest length of a row of w (b, ld)
  const T* w;
  int64_t b, ld;
  double largest;
};
void row_norm_f32(RowNorm<float>& args);
void row_norm_f64(RowNorm<double>& args);

template <class T>
struct Project {  // w -= (w q') q, four basis rows at a time: (b4, ld) against (k, ld), k a multiple of 4
  T* w;
  int64_t b4;
  const T* q;
  int64_t k, ld;
};
void project_f32(Project<float>& args);
void project_f64(Project<double>& args);

template <class T>
struct BlockQr {  // rows of w (b, ld) -> orthonormal rows, r (b, b) with column c = coefficients of the old row c
  T* w;
  int64_t b, ld;
  double floor;  // rows whose remainder is not above it become zero rows
  double* r;
  double cancelled;  // result: the smallest ratio of a kept remainder to its row's length
  int64_t from = 0;  // rows before are orthonormal already
};
void block_qr_f32(BlockQr<float>& args);
void block_qr_f64(BlockQr<double>& args);

template <class T>
struct Combine {  // out (rows, ldo) = coefficients (rows, k) q (k, ldq), `width` columns (of kPad); rows a multiple of 4, no aliasing
  const T* coefficients;
  int64_t rows;
  const T* q;
  int64_t k, ldq, width;
  T* out;
  int64_t ldo;
};
void combine_f32(Combine<float>& args);
void combine_f64(Combine<double>& args);

template <class T>
struct BlockGram {  // g (b, ldg) = w w' of rows w (b, ld), ld a multiple of kPad: exact products, sums in float64
  const T* w;
  int64_t b, ld;
  double* g;
  int64_t ldg;
};
void block_gram_f32(BlockGram<float>& args);
void block_gram_f64(BlockGram<double>& args);

inline void run(RowNorm<float>& a) { row_norm_f32(a); }
inline void run(RowNorm<double>& a) { row_norm_f64(a); }
inline void run(Project<float>& a) { project_f32(a); }
inline void run(Project<double>& a) { project_f64(a); }
inline void run(BlockQr<float>& a) { block_qr_f32(a); }
inline void run(BlockQr<double>& a) { block_qr_f64(a); }
inline void run(Combine<float>& a) { combine_f32(a); }
inline void run(Combine<double>& a) { combine_f64(a); }
inline void run(BlockGram<float>& a) { block_gram_f32(a); }
inline void run(BlockGram<double>& a) { block_gram_f64(a); }

}  // namespace sk
