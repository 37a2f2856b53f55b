// gram_matvec of one matrix: W = A'(A V) and S = (A V)'(A V) from one read, in chunks of rows with partial results.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "momentum.h"

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
  const Momentum<T>* move;  // applied to every panel before it is read; statistics are then of what is read. Null: a is read
};

template <class T>
int64_t panel_entries(const Matrix& a);

void gram_chunk_f32(GramChunk<float>& args);
void gram_chunk_f64(GramChunk<double>& args);

template <class T>
struct Buffer {  // 64-byte aligned scratch that grows and is kept by its thread
  std::unique_ptr<T[], decltype(&std::free)> data{nullptr, &std::free};
  int64_t size = 0;
  T* need(int64_t entries) {
    if (entries > size) {
      data.reset(static_cast<T*>(std::aligned_alloc(64, padded(entries) * sizeof(T))));
      size = entries;
    }
    return data.get();
  }
};

using ParallelFor = std::function<void(int64_t, int64_t, int64_t, const std::function<void(int64_t, int64_t)>&)>;
void set_parallel_for(ParallelFor f);
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f);

template <class T>
struct Read {
  std::vector<double> s;  // (b4, b4)
  Statistics statistics;
};

// One read of `a`. v, w: (b4, ldn). y: (b, m) flat or null. parallel: chunks go to the threads (same bits either way).
// move: a's momentum, updated and read in the same pass.
template <class T>
void gram_read(const Matrix& a, T scale, int64_t b, int64_t b4, int64_t ldn, const T* v, T* w, T* y, bool with_statistics,
               bool parallel, Read<T>& out, const Momentum<T>* move = nullptr);

}  // namespace sk
