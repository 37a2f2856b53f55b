// gram_matvec of one matrix: W = A'(A V) and S = (A V)'(A V) from one read, in chunks of rows with partial results.
#pragma once

#include <functional>
#include <vector>

#include "matrix.h"

namespace sk {

template <class T>
struct GramChunk {
  Matrix a;
  T scale;
  int64_t row0, row1;  // rows of the untracked side
  int64_t b4, ldn;     // block rows (a multiple of 4), their padded length
  const T* v;          // (b4, ldn)
  T* w;                // (b4, ldn) partial result, overwritten
  T* y;                // (b4, ldy) this chunk's A V, overwritten; zero-padded
  int64_t ldy;
  double* s;           // (b4, b4), overwritten
  bool with_statistics;
  Statistics statistics;
  T* panel;            // scratch of panel_entries(...) entries
};

template <class T>
int64_t panel_entries(const Matrix& a);

void gram_chunk_f32(GramChunk<float>& args);
void gram_chunk_f64(GramChunk<double>& args);

using ParallelFor = std::function<void(int64_t, int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;
void set_parallel_for(ParallelFor f);
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

template <class T>
struct Read {
  std::vector<double> s;  // (b4, b4)
  Statistics statistics;
};

// One read of `a`. v, w: (b4, ldn). y: (b, m) flat or null. parallel: chunks go to the threads (same bits either way).
template <class T>
void gram_read(const Matrix& a, T scale, int64_t b, int64_t b4, int64_t ldn, const T* v, T* w, T* y, bool with_statistics,
               bool parallel, Read<T>& out);

}  // namespace sk
