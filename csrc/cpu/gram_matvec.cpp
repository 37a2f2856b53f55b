#include "gram_matvec.h"

#include <algorithm>

namespace sk {
namespace {

constexpr int64_t kRowPanelBytes = 128 << 10;     // a panel and the block rows stay in a 1 MB second-level cache
constexpr int64_t kColumnPanelBytes = 384 << 10;
constexpr int64_t kColumnBlockBytes = 4096;       // block rows of this length stay in the first-level cache
constexpr int64_t kAxpyBytes = 24 << 10;

template <class T>
int64_t panel_rows(const Matrix& a, int64_t ldn) {
  const int64_t rows = kRowPanelBytes / (ldn * int64_t(sizeof(T))) / 4 * 4;
  return std::clamp<int64_t>(rows, 4, 256);
}

template <class T>
int64_t panel_columns(const Matrix& a) {
  const int64_t columns = kColumnPanelBytes / (std::max<int64_t>(a.n, 1) * int64_t(sizeof(T))) / 32 * 32;
  return std::clamp<int64_t>(columns, 32, 256);
}

// Columns at a time of w, which is read and written: all of its rows stay in the first-level cache. Dots have short rests to
// pay for and only read v: from the second-level cache that is fast enough.
template <class T>
int64_t axpy_columns(int64_t b4) {
  if (b4 == 4) return kColumnBlockBytes / sizeof(T);
  return std::clamp<int64_t>(kAxpyBytes / (b4 * int64_t(sizeof(T))) / 64 * 64, 256, kColumnBlockBytes / sizeof(T));
}

template <class T>
bool is_direct(const Matrix& a, T scale, int64_t length, int64_t stride) {
  return a.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64) && stride == 1 && scale == T(1) && length >= kPad;
}

}  // namespace
}  // namespace sk

#define SK_KERNEL "gram_matvec.inc"
#include "foreach_isa.h"

namespace sk {

SK_DISPATCH(gram_chunk_f32, GramChunk<float>)
SK_DISPATCH(gram_chunk_f64, GramChunk<double>)

namespace {

inline void run_chunk(GramChunk<float>& g) { gram_chunk_f32(g); }
inline void run_chunk(GramChunk<double>& g) { gram_chunk_f64(g); }

}  // namespace

int instruction_set() {
  static const int level = [] {
    int have = 0;
#if SK_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v3")) have = 1;
    if (__builtin_cpu_supports("x86-64-v4")) have = 2;
#endif
    const char* wish = std::getenv("SPECTRAL_KERNELS_ISA");
    if (wish && !std::strcmp(wish, "baseline")) have = 0;
    if (wish && !std::strcmp(wish, "avx2")) have = std::min(have, 1);
    return have;
  }();
  return level;
}


static ParallelFor& parallel_for_in_use() {  // set while other statics are still being constructed
  static ParallelFor f;
  return f;
}

void set_parallel_for(ParallelFor f) { parallel_for_in_use() = std::move(f); }

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& f) {
  if (begin >= end) return;
  parallel_for_in_use()(begin, end, std::max<int64_t>(grain, 1), f);
}

template <class T>
int64_t panel_entries(const Matrix& a) {
  const int64_t ldn = padded(a.n);
  return is_across(a) ? padded(std::min(panel_columns<T>(a), chunk_rows(a.m))) * a.n : panel_rows<T>(a, ldn) * ldn;
}

template <class T>
void gram_read(const Matrix& a, T scale, int64_t b, int64_t b4, int64_t ldn, const T* v, T* w, T* y, bool with_statistics,
               bool parallel, Read<T>& out, const Momentum<T>* move) {
  const int64_t rows = chunk_rows(a.m), chunks = (a.m + rows - 1) / rows, block = b4 * ldn;
  out.s.assign(b4 * b4, 0.0);
  out.statistics = Statistics{};
  std::memset(w, 0, sizeof(T) * block);
  if (y) std::memset(y, 0, sizeof(T) * b * a.m);
  if (a.n == 0 || a.m == 0) return;
  parallel = parallel && chunks > 1;
  std::vector<double> s((parallel ? chunks : 1) * b4 * b4);
  std::vector<Statistics> statistics(parallel ? chunks : 1);
  static thread_local Buffer<T> partial_buffer;
  T* partial = partial_buffer.need((parallel ? chunks : 1) * block);
  auto chunk = [&](int64_t i, int64_t slot) {
    static thread_local Buffer<T> panel_buffer, y_buffer;
    const int64_t row0 = i * rows, row1 = std::min(a.m, row0 + rows), ldy = padded(row1 - row0);
    const bool along_rows = !is_across(a);  // whole rows in memory order need no panel
    const bool packs = !(along_rows && is_direct(a, scale, a.n, a.sn) && !(move && move->nesterov));
    T* panel = packs ? panel_buffer.need(panel_entries<T>(a)) : nullptr;
    GramChunk<T> g{a, scale, row0, row1, b4, ldn, v, partial + slot * block, y_buffer.need(b4 * ldy), ldy,
                   s.data() + slot * b4 * b4, with_statistics, Statistics{}, panel, move};
    run_chunk(g);
    statistics[slot] = g.statistics;
    if (y)
      for (int64_t c = 0; c < b; ++c) std::memcpy(y + c * a.m + row0, g.y + c * ldy, sizeof(T) * (row1 - row0));
  };
  auto collect = [&](int64_t slot) {
    for (int64_t i = 0; i < b4 * b4; ++i) out.s[i] += s[slot * b4 * b4 + i];
    out.statistics.add(statistics[slot]);
  };
  auto add = [&](int64_t slot, int64_t begin, int64_t end) {
    const T* part = partial + slot * block;
    for (int64_t i = begin; i < end; ++i) w[i] += part[i];
  };
  if (!parallel) {
    for (int64_t i = 0; i < chunks; ++i) {
      chunk(i, 0);
      collect(0);
      add(0, 0, block);
    }
    return;
  }
  parallel_for(0, chunks, std::max<int64_t>(1, (int64_t(1) << 16) / (rows * a.n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) chunk(i, i);
  });
  for (int64_t i = 0; i < chunks; ++i) collect(i);
  parallel_for(0, block, (int64_t(1) << 16) / chunks + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < chunks; ++i) add(i, begin, end);
  });
}

template int64_t panel_entries<float>(const Matrix&);
template int64_t panel_entries<double>(const Matrix&);
template void gram_read<float>(const Matrix&, float, int64_t, int64_t, int64_t, const float*, float*, float*, bool, bool,
                               Read<float>&, const Momentum<float>*);
template void gram_read<double>(const Matrix&, double, int64_t, int64_t, int64_t, const double*, double*, double*, bool,
                                bool, Read<double>&, const Momentum<double>*);

}  // namespace sk
