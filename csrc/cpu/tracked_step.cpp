#include "tracked_step.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "orthogonal.h"
#include "random.h"
#include "small_eig.h"

namespace sk {

namespace {

constexpr int64_t kFollowed = 2;  // Ritz values that the error estimate covers: kernels/composites_step.py

int64_t multiple_of_4(int64_t b) { return (b + 3) / 4 * 4; }

// rows of y (count, k) -> orthonormal rows in order; what is left of a row not above `floor` becomes a zero row
void orthonormalize(double* y, int64_t count, int64_t k, double floor) {
  for (int64_t c = 0; c < count; ++c) {
    double* row = y + c * k;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t i = 0; i < c; ++i) {
        double h = 0;
        for (int64_t j = 0; j < k; ++j) h += row[j] * y[i * k + j];
        for (int64_t j = 0; j < k; ++j) row[j] -= h * y[i * k + j];
      }
    double square = 0;
    for (int64_t j = 0; j < k; ++j) square += row[j] * row[j];
    const double norm = std::sqrt(square), inverse = norm > floor ? 1 / norm : 0;
    for (int64_t j = 0; j < k; ++j) row[j] = inverse > 0 ? row[j] * inverse : 0;
  }
}

// The largest eigenvalue of [[theta, r], [r, tau]] bounds sigma_max^2; room for rounding (contracts.py)
template <class T>
double upper_bound(const double* info, const double* t, int64_t ldt, int64_t K, int64_t b) {
  double coupling = 0;
  for (int64_t i = K; i < K + b; ++i)
    for (int64_t j = 0; j < K; ++j) coupling += t[i * ldt + j] * t[i * ldt + j];
  const double frob2 = info[kFrob2], theta = info[kTheta], room = 64 * epsilon<T>() * frob2;
  const double tau = std::max(frob2 - info[kTrace], 0.0) + room;
  const double square = (theta + tau) / 2 + std::hypot((theta - tau) / 2, std::sqrt(coupling)) + room;
  return std::sqrt(std::min(square, frob2 + room)) / info[kScale];
}

}  // namespace

template <class T>
double next_block(const NextBlock<T>& g) {
  const double theta = g.info[kTheta];
  if (!(theta > 0) || !std::isfinite(g.info[kSigma])) return 0;
  const int64_t K = int64_t(g.info[kColumns]), order = K + g.b, b4 = multiple_of_4(g.b);
  const int64_t kept = std::clamp<int64_t>(g.b - g.fresh, 0, K);
  std::vector<double> values, vectors, y(b4 * order, 0.0);
  symmetric_eigen(g.t, K, g.ldt, values, vectors);
  for (int64_t i = 0; i < kept; ++i) {  // A'A z in the basis, largest first
    const double* z = vectors.data() + (K - 1 - i) * K;
    for (int64_t r = 0; r < order; ++r)
      for (int64_t c = 0; c < K; ++c) y[i * order + r] += g.t[r * g.ldt + c] * z[c];
  }
  orthonormalize(y.data(), kept, order, 8 * epsilon<T>() * theta);
  int64_t full = 0;  // rows the space fills come first
  std::vector<T> coefficients(b4 * order, T(0));
  for (int64_t i = 0; i < kept; ++i) {
    bool any = false;
    for (int64_t r = 0; r < order; ++r) {
      coefficients[full * order + r] = T(y[i * order + r]);
      any |= y[i * order + r] != 0;
    }
    full += any;
  }
  static thread_local Buffer<T> buffer;
  T* rows = buffer.need(b4 * g.ldn);
  Combine<T> combine{coefficients.data(), b4, g.q, order, g.ldn, g.ldn, rows, g.ldn};
  run(combine);
  for (int64_t i = full; i < g.b; ++i) std::memset(rows + i * g.ldn, 0, sizeof(T) * g.ldn);
  draw_rows<T>(draw_key(g.seed, g.m, g.n, 2 + g.step), g.b - full, g.n, rows + full * g.ldn, g.ldn);
  std::vector<double> r(g.b * g.b);
  BlockQr<T> qr{rows, g.b, g.ldn, 1e-6 * std::sqrt(double(std::max<int64_t>(g.n, 1))), r.data(), 1};
  run(qr);
  for (int64_t i = 0; i < g.b; ++i) std::memcpy(g.v + i * g.n, rows + i * g.ldn, sizeof(T) * g.n);
  return upper_bound<T>(g.info, g.t, g.ldt, K, g.b);
}

namespace {

// Reads after the first while the matrix's own rule asks for them, then the next block; returns the upper bound.
template <class T>
double follow(const TrackedStep<T>& k, T at, T* q, T* w, T* block, Read<T>& read) {
  const int64_t n = k.m.n, b = k.b, b4 = multiple_of_4(b), ldn = padded(n), rows = k.reads * b + b;
  double* info = k.info;
  std::vector<double> t(rows * rows, 0.0), z;
  std::vector<int64_t> first(rows, 0);
  Momentum<T> again = k.move;
  again.update = false;
  for (int64_t step = 0; step < k.reads; ++step) {
    const int64_t columns = step * b;
    if (step) {
      info[kReads] += 1;
      const T* v = q + columns * ldn;
      if (b % 4) {
        std::memcpy(block, v, sizeof(T) * b * ldn);
        v = block;
      }
      gram_read<T>(k.m, at, b, b4, ldn, v, w, nullptr, false, k.parallel, read, k.move.nesterov ? &again : nullptr);
    }
    for (int64_t i = 0; i < b; ++i)
      for (int64_t j = 0; j < b; ++j)
        t[(columns + i) * rows + columns + j] = 0.5 * (read.s[i * b4 + j] + read.s[j * b4 + i]);
    z.clear();
    Step<T> s{n, ldn, b, columns, kFollowed, q, w, t.data(), rows, first.data(), &z};
    const bool goes_on = extend(s) && columns + b < n;
    const bool met = assess(s, k.tol, true, info);
    if (!goes_on || !(info[kTheta] > 0) || (k.tol > 0 && met && enough_reads(info, b, k.min_reads))) {
      info[kDone] = 1;
      break;
    }
  }
  return next_block<T>({k.m.m, n, ldn, b, k.fresh, k.seed, k.step, q, t.data(), rows, info, k.v});
}

template <class A, class T>
void move_parameter(const TrackedStep<T>& k, double ratio, double at) {
  const Matrix none{nullptr, k.m.dtype, k.m.m, k.m.n, k.m.sm, k.m.sn};
  const Momentum<T>& u = k.move;
  apply_update<A>({k.p, k.m, u.nesterov ? u.g : none, A(u.beta), A(u.alpha), A(T(ratio)), A(at), A(1 - k.decay)}, k.parallel, true);
}

}  // namespace

template <class T>
Tracked tracked_step(TrackedStep<T>& k) {
  const int64_t n = k.m.n, b = k.b, b4 = multiple_of_4(b), ldn = padded(n);
  double* info = k.info;
  std::fill(info, info + kInfoColumns, 0.0);
  const double used = k.scale > 0 ? k.scale : 1;
  info[kScale] = used;
  info[kDone] = 1;
  if (k.skip) return {k.scale, 0};

  static thread_local Buffer<T> buffer;
  const int64_t rows = k.reads * b + b + (b % 4 ? 4 : 0);  // tiles of 4 rows: zero behind the last block
  T* q = buffer.need((rows + 2 * b4) * ldn);
  T *w = q + rows * ldn, *block = w + b4 * ldn;
  if (b % 4 || ldn != n) std::memset(q, 0, sizeof(T) * (rows + 2 * b4) * ldn);
  for (int64_t c = 0; c < b; ++c) {
    std::memcpy(q + c * ldn, k.v + c * n, sizeof(T) * n);
    std::memcpy(block + c * ldn, k.v + c * n, sizeof(T) * n);
  }

  Read<T> read;
  gram_read<T>(k.m, T(used), b, b4, ldn, block, w, nullptr, true, k.parallel, read, &k.move);
  const auto [at, bad, spoiled] = take_first_read<T>(used, k.move.propagate, read, info, [&](double other) {
    Momentum<T> again = k.move;
    again.update = false;
    gram_read<T>(k.m, T(other), b, b4, ldn, block, w, nullptr, true, k.parallel, read, &again);
  });
  const double bound = spoiled ? info[kSigma] : info[kDone] != 0 ? 0 : follow<T>(k, T(at), q, w, block, read);

  const double norm = (k.upper ? bound : info[kSigma]) * at;  // of scale * X
  double ratio = norm > 0 ? k.size / norm : 0;
  if (spoiled) ratio = std::numeric_limits<double>::quiet_NaN();
  if (!bad || k.move.propagate) {
    if (sizeof(T) == 4 && k.p.dtype == Dtype::f64)
      move_parameter<double>(k, ratio, at);
    else
      move_parameter<T>(k, ratio, at);
  }
  return {info[kAmax] == 0 ? k.scale : at, bound};
}

template double next_block<float>(const NextBlock<float>&);
template double next_block<double>(const NextBlock<double>&);
template Tracked tracked_step<float>(TrackedStep<float>&);
template Tracked tracked_step<double>(TrackedStep<double>&);

}  // namespace sk
