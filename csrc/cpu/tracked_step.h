// A whole step of one matrix: momentum, estimate, next block, update. The contract is kernels/contracts.py.
#pragma once

#include "apply_update.h"
#include "krylov.h"

namespace sk {

template <class T>
struct NextBlock {
  int64_t m, n, ldn, b, fresh, seed, step;
  const T* q;        // (>= columns + b, ldn): basis and the block behind it
  const double* t;   // projected matrix, leading dimension ldt
  int64_t ldt;
  const double* info;
  T* v;              // (b, n), overwritten where theta is positive
};

// Returns the upper bound of sigma_max
template <class T>
double next_block(const NextBlock<T>& g);

template <class T>
struct TrackedStep {
  Matrix p, m;
  Momentum<T> move;
  T* v;  // (b, n) orthonormal rows, replaced
  double scale, size, decay;  // scale: at which the matrix was read last, 0: never
  bool skip, upper;
  int64_t step, b, fresh, reads, min_reads, seed;
  double tol;
  bool parallel;
  double* info;  // (kInfoColumns)
};

struct Tracked {
  double scale, bound;
};

template <class T>
Tracked tracked_step(TrackedStep<T>& k);

}  // namespace sk
