#include "gram_matvec.h"

#include <algorithm>
#include <memory>

namespace sk {

namespace {

constexpr int64_t kRowPanelBytes = 256 << 10;     // a panel and the block rows stay in a 1 MB second-level cache
constexpr int64_t kColumnPanelBytes = 384 << 10;
constexpr int64_t kColumnBlockBytes = 4096;       // block rows of this length stay in the first-level cache

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

template <class T>
bool is_direct(const Matrix& a, T scale, int64_t length, int64_t stride) {
  return a.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64) && stride == 1 && scale == T(1) && length >= kPad;
}

// rows [0, count) of a panel through a tile of R rows at a time, single rows at the end
#define SK_FOR_ROWS(COUNT, ...)                                           \
  {                                                                       \
    int64_t r = 0;                                                        \
    for (; r + R <= (COUNT); r += R) { constexpr int N = R; __VA_ARGS__ } \
    for (; r < (COUNT); ++r) { constexpr int N = 1; __VA_ARGS__ }         \
  }

template <class T, int B>
static inline void along(GramChunk<T>& g) {  // rows of the panel lie along the tracked side
  constexpr int R = simd<T, B>::rows;
  const Matrix& a = g.a;
  const bool direct = is_direct(a, g.scale, a.n, a.sn);
  const int64_t width = direct ? a.n : g.ldn, block = kColumnBlockBytes / sizeof(T), most = panel_rows<T>(a, g.ldn);
  for (int64_t p0 = g.row0; p0 < g.row1; p0 += most) {
    const int64_t count = std::min(most, g.row1 - p0), y0 = p0 - g.row0;
    const T* base = direct ? static_cast<const T*>(a.data) + p0 * a.sm : g.panel;
    const int64_t ld = direct ? a.sm : g.ldn;
    if (!direct)
      for (int64_t r = 0; r < count; ++r)
        pack<T>(a, (p0 + r) * a.sm, a.sn, a.n, g.scale, g.panel + r * g.ldn, g.ldn);
    for (int64_t j0 = 0; j0 < width; j0 += block) {
      // the last block takes a short rest along: tiles need a whole vector
      const int64_t length = width - j0 < 2 * block ? width - j0 : block;
      SK_FOR_ROWS(count, {
        const T* p[N];
        for (int i = 0; i < N; ++i) p[i] = base + (r + i) * ld + j0;
        if (g.with_statistics && j0 == 0)
          for (int i = 0; i < N; ++i) row_statistics<T, B>(p[i], a.n, g.statistics);
        for (int64_t c = 0; c < g.b4; c += 4) {
          T y[N * 4 < 16 ? 16 : N * 4];
          dot_tile<T, B, N>(p, g.v + c * g.ldn + j0, g.ldn, length, y);
          T* out = g.y + c * g.ldy + y0 + r;
          for (int i = 0; i < N; ++i)
            for (int k = 0; k < 4; ++k) out[k * g.ldy + i] = (j0 ? out[k * g.ldy + i] : T(0)) + y[i * 4 + k];
        }
      })
      if (length > block) break;
    }
    const int64_t ahead = direct && p0 + most < g.row1 ? most * a.sm : 0;
    for (int64_t j0 = 0; j0 < width; j0 += block) {
      const int64_t length = width - j0 < 2 * block ? width - j0 : block;
      SK_FOR_ROWS(count, {
        const T* p[N];
        for (int i = 0; i < N; ++i) p[i] = base + (r + i) * ld + j0;
        for (int64_t c = 0; c < g.b4; c += 4) {
          T y[N * 4];
          const T* in = g.y + c * g.ldy + y0 + r;
          for (int i = 0; i < N; ++i)
            for (int k = 0; k < 4; ++k) y[i * 4 + k] = in[k * g.ldy + i];
          axpy_tile<T, B, N>(p, y, g.w + c * g.ldn + j0, g.ldn, length, c == 0 ? ahead : 0);
        }
      })
      if (length > block) break;
    }
  }
}

template <class T, int B>
static inline void across(GramChunk<T>& g) {  // rows of the panel lie across the tracked side: one per tracked index
  constexpr int R = simd<T, B>::rows;
  const Matrix& a = g.a;
  const int64_t most = panel_columns<T>(a);
  for (int64_t p0 = g.row0; p0 < g.row1; p0 += most) {
    const int64_t count = std::min(most, g.row1 - p0), y0 = p0 - g.row0;
    // direct where the panel's lines do not all fall into a few cache sets
    const bool direct = is_direct(a, g.scale, count, a.sm) && (a.sn * int64_t(sizeof(T))) % 2048 != 0;
    const T* base = direct ? static_cast<const T*>(a.data) + p0 : g.panel;
    const int64_t ld = direct ? a.sn : padded(count), width = direct ? count : ld;
    SK_FOR_ROWS(a.n, {
      const T* p[N];
      for (int i = 0; i < N; ++i) {
        p[i] = base + (r + i) * ld;
        if (!direct) pack<T>(a, p0 * a.sm + (r + i) * a.sn, a.sm, count, g.scale, g.panel + (r + i) * ld, ld);
        if (g.with_statistics) row_statistics<T, B>(p[i], count, g.statistics);
      }
      for (int64_t c = 0; c < g.b4; c += 4) {
        T y[N * 4];
        for (int i = 0; i < N; ++i)
          for (int k = 0; k < 4; ++k) y[i * 4 + k] = g.v[(c + k) * g.ldn + r + i];
        axpy_tile<T, B, N>(p, y, g.y + c * g.ldy + y0, g.ldy, width, 0);
      }
    })
    const int64_t ahead = direct && p0 + most < g.row1 ? most : 0;
    SK_FOR_ROWS(a.n, {
      const T* p[N];
      for (int i = 0; i < N; ++i) {
        p[i] = base + (r + i) * ld;
        if (ahead)
          for (int64_t j = 0; j < count; j += 64 / sizeof(T)) __builtin_prefetch(p[i] + ahead + j, 0, 2);
      }
      for (int64_t c = 0; c < g.b4; c += 4) {
        T y[N * 4 < 16 ? 16 : N * 4];
        dot_tile<T, B, N>(p, g.y + c * g.ldy + y0, g.ldy, width, y);
        for (int i = 0; i < N; ++i)
          for (int k = 0; k < 4; ++k) g.w[(c + k) * g.ldn + r + i] += y[i * 4 + k];
      }
    })
  }
}

template <class T, int B>
static inline void gram_chunk(GramChunk<T>& g) {
  constexpr int R = simd<T, B>::rows;
  std::memset(g.w, 0, sizeof(T) * g.b4 * g.ldn);
  std::memset(g.y, 0, sizeof(T) * g.b4 * g.ldy);
  if (is_across(g.a))
    across<T, B>(g);
  else
    along<T, B>(g);
  for (int64_t c = 0; c < g.b4; c += R)
    for (int64_t d = 0; d < g.b4; d += 4) {
      const T* p[R];
      for (int i = 0; i < R; ++i) p[i] = g.y + (c + i) * g.ldy;
      T s[R * 4 < 16 ? 16 : R * 4];
      dot_tile<T, B, R>(p, g.y + d * g.ldy, g.ldy, g.ldy, s);
      for (int i = 0; i < R; ++i)
        for (int k = 0; k < 4; ++k) g.s[(c + i) * g.b4 + d + k] = s[i * 4 + k];
    }
}

template <int B>
static inline void gram_chunk_f32_body(GramChunk<float>& g) { gram_chunk<float, B>(g); }
template <int B>
static inline void gram_chunk_f64_body(GramChunk<double>& g) { gram_chunk<double, B>(g); }

inline void run_chunk(GramChunk<float>& g) { gram_chunk_f32(g); }
inline void run_chunk(GramChunk<double>& g) { gram_chunk_f64(g); }

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

SK_DISPATCH(gram_chunk_f32, GramChunk<float>)
SK_DISPATCH(gram_chunk_f64, GramChunk<double>)

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
               bool parallel, Read<T>& out) {
  const int64_t rows = chunk_rows(a.m), chunks = (a.m + rows - 1) / rows, block = b4 * ldn;
  out.s.assign(b4 * b4, 0.0);
  out.statistics = Statistics{};
  std::memset(w, 0, sizeof(T) * block);
  if (a.n == 0 || a.m == 0) return;
  parallel = parallel && chunks > 1;
  std::vector<double> s((parallel ? chunks : 1) * b4 * b4);
  std::vector<Statistics> statistics(parallel ? chunks : 1);
  static thread_local Buffer<T> partial_buffer;
  T* partial = partial_buffer.need((parallel ? chunks : 1) * block);
  auto chunk = [&](int64_t i, int64_t slot) {
    static thread_local Buffer<T> panel_buffer, y_buffer;
    const int64_t row0 = i * rows, row1 = std::min(a.m, row0 + rows), ldy = padded(row1 - row0);
    GramChunk<T> g{a, scale, row0, row1, b4, ldn, v, partial + slot * block, y_buffer.need(b4 * ldy), ldy,
                   s.data() + slot * b4 * b4, with_statistics, Statistics{}, panel_buffer.need(panel_entries<T>(a))};
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
                               Read<float>&);
template void gram_read<double>(const Matrix&, double, int64_t, int64_t, int64_t, const double*, double*, double*, bool,
                                bool, Read<double>&);

}  // namespace sk
