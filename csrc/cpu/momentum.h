// The momentum of a matrix, M <- beta M + alpha G, as a stage in front of whatever reads M. The contract is kernels/contracts.py.
#pragma once

#include "matrix.h"

namespace sk {

template <class T>
struct Momentum {
  Matrix g;  // strides along the same axes as those of the matrix it moves
  T beta, alpha;
  bool nesterov, update, propagate;
};

template <class T>
struct NormsChunk {  // rows [row0, row1) of the norms that need no block
  Matrix a;
  T scale;
  const Momentum<T>* move;
  int64_t row0, row1;
  Statistics statistics;
  double row2;  // largest squared length of a row of scale * X
};
void norms_chunk_f32(NormsChunk<float>& args);
void norms_chunk_f64(NormsChunk<double>& args);

// One pass; norms: frob2, amax, NaN flag, inf flag, row2
template <class T>
void momentum_norms(const Matrix& a, T scale, const Momentum<T>& move, bool parallel, double* norms);

}  // namespace sk
