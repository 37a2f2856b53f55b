#include <algorithm>
#include <vector>

#include "gram_matvec.h"

#define SK_KERNEL "momentum_norms.inc"
#include "foreach_isa.h"

namespace sk {

SK_DISPATCH(norms_chunk_f32, NormsChunk<float>)
SK_DISPATCH(norms_chunk_f64, NormsChunk<double>)

namespace {

inline void run(NormsChunk<float>& g) { norms_chunk_f32(g); }
inline void run(NormsChunk<double>& g) { norms_chunk_f64(g); }

}  // namespace

template <class T>
void momentum_norms(const Matrix& a, T scale, const Momentum<T>& move, bool parallel, double* norms) {
  std::fill(norms, norms + 5, 0.0);
  if (a.m == 0 || a.n == 0) return;
  const int64_t rows = chunk_rows(a.m), chunks = (a.m + rows - 1) / rows;
  std::vector<NormsChunk<T>> parts(chunks);
  auto chunk = [&](int64_t i) {
    parts[i] = {a, scale, &move, i * rows, std::min(a.m, (i + 1) * rows), Statistics{}, 0.0};
    run(parts[i]);
  };
  if (parallel && chunks > 1) {
    parallel_for(0, chunks, std::max<int64_t>(1, (int64_t(1) << 16) / (rows * a.n)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) chunk(i);
    });
  } else {
    for (int64_t i = 0; i < chunks; ++i) chunk(i);
  }
  Statistics all;
  for (const auto& part : parts) {
    all.add(part.statistics);
    norms[4] = std::max(norms[4], part.row2);
  }
  norms[0] = all.frob2;
  norms[1] = all.amax;
  norms[2] = all.nan;
  norms[3] = all.inf;
}

template void momentum_norms<float>(const Matrix&, float, const Momentum<float>&, bool, double*);
template void momentum_norms<double>(const Matrix&, double, const Momentum<double>&, bool, double*);

}  // namespace sk
