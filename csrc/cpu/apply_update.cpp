#include "apply_update.h"

#include <algorithm>

#include "gram_matvec.h"

namespace sk {

constexpr int64_t kRightBytes = 512 << 10;  // half a second-level cache

}  // namespace sk

#define SK_KERNEL "apply_update.inc"
#include "foreach_isa.h"

namespace sk {

SK_DISPATCH(update_chunk_f32, UpdateChunk<float>)
SK_DISPATCH(update_chunk_f64, UpdateChunk<double>)

namespace {

constexpr int64_t kBlock = 1 << 14;  // entries that a thread takes at a time

inline void run(UpdateChunk<float>& c) { update_chunk_f32(c); }
inline void run(UpdateChunk<double>& c) { update_chunk_f64(c); }

Matrix turned(const Matrix& a) { return {a.data, a.dtype, a.n, a.m, a.sn, a.sm}; }

bool is_one_run(const Matrix& a) { return a.sn == 1 && (a.sm == a.n || a.m == 1); }

}  // namespace

template <class T>
void apply_update(Update<T> u, bool parallel, bool backwards) {
  if (u.p.m == 0 || u.p.n == 0) return;
  if (u.p.n == 1 || (u.p.m > 1 && u.p.sm < u.p.sn)) {  // lines along the closer entries of P
    u.p = turned(u.p);
    u.m = turned(u.m);
    u.g = turned(u.g);
    std::swap(u.less.left, u.less.right);
    std::swap(u.less.ldl, u.less.ldr);
  }
  int64_t lines = u.p.m, length = u.p.n;
  if (u.less.rank == 0 && is_one_run(u.p) && is_one_run(u.m) && (!u.g.data || is_one_run(u.g))) {
    length *= lines;
    lines = 1;
  }
  const int64_t fit = std::max<int64_t>(1, kBlock / length), each = u.less.rank ? (fit + 3) / 4 * 4 : fit;  // lines of a block
  const int64_t pieces = lines == 1 ? (length + kBlock - 1) / kBlock : 1;        // or pieces of the only one
  const int64_t blocks = lines == 1 ? pieces : (lines + each - 1) / each;
  auto block = [&](int64_t i) {
    static thread_local Buffer<T> scratch;
    UpdateChunk<T> c{u, 0, 1, 0, length, u.less.rank ? scratch.need(4 * u.less.rank) : nullptr};
    if (lines == 1) {
      c.begin = i * kBlock;
      c.end = std::min(length, c.begin + kBlock);
    } else {
      c.line0 = i * each;
      c.line1 = std::min(lines, c.line0 + each);
    }
    run(c);
  };
  auto range = [&](int64_t begin, int64_t end) {
    if (backwards)
      for (int64_t i = end; i-- > begin;) block(i);
    else
      for (int64_t i = begin; i < end; ++i) block(i);
  };
  if (parallel && blocks > 1)
    parallel_for(0, blocks, 4, range);
  else
    range(0, blocks);
}

template void apply_update<float>(Update<float>, bool, bool);
template void apply_update<double>(Update<double>, bool, bool);

}  // namespace sk
