// P <- keep P - size (scale X - L'R), X = M or beta M + alpha G, one pass. The contract is kernels/contracts.py.
#pragma once

#include "matrix.h"

namespace sk {

template <class T>
struct Correction {  // sum over c < rank of left[c][line] right[c][entry]; rank 0: none
  const T *left = nullptr, *right = nullptr;
  int64_t rank = 0, ldl = 0, ldr = 0;
};

template <class T>
struct Update {
  Matrix p, m, g;  // g.data null: X = M; strides along the same axes
  T beta, alpha, size, scale, keep;
  Correction<T> less = {};
};

template <class T>
struct UpdateChunk {  // entries [begin, end) of lines [line0, line1): lines along n
  Update<T> u;
  int64_t line0, line1, begin, end;
  T* left;  // scratch of 4 * rank entries
};
void update_chunk_f32(UpdateChunk<float>& args);
void update_chunk_f64(UpdateChunk<double>& args);

// T: the wider of the accumulation types of P and M. backwards: what was read last of M comes first.
template <class T>
void apply_update(Update<T> u, bool parallel, bool backwards);

}  // namespace sk
