#include "clipped_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sk {

namespace {

// P <- keep P - ratio (at X - L'R) in the type A
template <class A, class T>
void move_parameter(const ClippedStep<T>& k, double ratio, double at, const T* left, const T* right) {
  const Matrix none{nullptr, k.m.dtype, k.m.m, k.m.n, k.m.sm, k.m.sn};
  const Momentum<T>& u = k.move;
  Update<A> update{k.p, k.m, u.nesterov ? u.g : none, A(u.beta), A(u.alpha), A(T(ratio)), A(at), A(1 - k.decay)};
  std::vector<A> wide;
  if constexpr (sizeof(A) == sizeof(T)) {
    update.less = {left, right, k.r, k.m.m, k.m.n};
  } else {
    wide.assign(left, left + k.r * k.m.m);
    wide.insert(wide.end(), right, right + k.r * k.m.n);
    update.less = {wide.data(), wide.data() + k.r * k.m.m, k.r, k.m.m, k.m.n};
  }
  apply_update<A>(update, k.parallel, true);
}

}  // namespace

template <class T>
double clipped_step(ClippedStep<T>& k) {
  const int64_t m = k.m.m, n = k.m.n, b = k.b, b4 = (b + 3) / 4 * 4, ldn = padded(n);
  double* info = k.info;
  std::fill(info, info + kInfoColumns, 0.0);
  const double used = k.scale > 0 ? k.scale : 1;
  info[kScale] = used;
  info[kDone] = 1;
  if (k.skip) return k.scale;

  static thread_local Buffer<T> buffer;
  T* block = buffer.need(2 * b4 * ldn + b * (m + n) + k.r * (m + n));
  T *w = block + b4 * ldn, *y = w + b4 * ldn, *flat = y + b * m, *left = flat + b * n, *right = left + k.r * m;
  std::vector<double> s(b * b);
  std::fill(left, left + k.r * (m + n), T(0));
  Read<T> read;
  auto look = [&](double at, bool statistics, const Momentum<T>* move) {
    std::memset(block, 0, sizeof(T) * b4 * ldn);
    for (int64_t c = 0; c < b; ++c) std::memcpy(block + c * ldn, k.v + c * n, sizeof(T) * n);
    gram_read<T>(k.m, T(at), b, b4, ldn, block, w, y, statistics, k.parallel, read, move);
  };
  look(used, true, &k.move);
  Momentum<T> again = k.move;
  again.update = false;
  const auto [at, bad, spoiled] = take_first_read<T>(used, k.move.propagate, read, info,
                                                     [&](double other) { look(other, true, &again); });

  for (int64_t i = 0; i < k.reads && info[kDone] == 0; ++i) {
    if (i) {
      info[kReads] += 1;
      look(at, false, k.move.nesterov ? &again : nullptr);
    }
    for (int64_t c = 0; c < b; ++c) {
      std::memcpy(flat + c * n, w + c * ldn, sizeof(T) * n);
      std::copy_n(read.s.data() + c * b4, b, s.data() + c * b);
    }
    clip<T>({m, n, b, k.r, k.fresh, k.seed, k.step + (i << 32), k.rank, k.has_limit, k.limit * at, k.tol, k.v, left, right, flat,
             y, s.data(), info, k.before});
  }

  double ratio = info[kTau] > 0 ? k.size / info[kTau] : 0;
  if (spoiled) ratio = std::numeric_limits<double>::quiet_NaN();
  if (!bad || k.move.propagate) {
    if (sizeof(T) == 4 && k.p.dtype == Dtype::f64)
      move_parameter<double>(k, ratio, at, left, right);
    else
      move_parameter<T>(k, ratio, at, left, right);
  }
  return info[kAmax] == 0 ? k.scale : at;
}

template double clipped_step<float>(ClippedStep<float>&);
template double clipped_step<double>(ClippedStep<double>&);

}  // namespace sk
