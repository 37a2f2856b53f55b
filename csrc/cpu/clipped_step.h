// A whole clipped step of one matrix: momentum, leading triplets, update. The contract is kernels/contracts.py.
#pragma once

#include "apply_update.h"
#include "clip.h"

namespace sk {

template <class T>
struct ClippedStep {
  Matrix p, m;
  Momentum<T> move;
  T* v;  // (b, n) orthonormal rows, replaced
  double scale, size, decay;  // scale: at which the matrix was read last, 0: never
  bool skip, has_limit;
  double limit;     // of X, in place of the rank
  double* before;   // (2), replaced
  int64_t rank, step, b, r, fresh, reads, seed;
  double tol;
  bool parallel;
  double* info;  // (kInfoColumns)
};

// Returns the scale to read at next
template <class T>
double clipped_step(ClippedStep<T>& k);

}  // namespace sk
