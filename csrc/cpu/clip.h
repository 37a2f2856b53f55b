// The small algebra of a clipped step for one matrix, after a read. The contract is kernels/contracts.py.
#pragma once

#include "krylov.h"

namespace sk {

template <class T>
struct Clip {
  int64_t m, n, b, r, fresh, seed, step, rank;
  bool has_limit;
  double limit, tol;   // limit of scale * A, in place of the rank
  T *v, *left, *right;  // (b, n), (r, m), (r, n); left alone where nothing is known
  const T *w, *y;      // (b, n), (b, m)
  const double* s;     // (b, b)
  double *info, *before;  // (kInfoColumns), (2)
};

template <class T>
void clip(const Clip<T>& g);

}  // namespace sk
