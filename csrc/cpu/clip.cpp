#include "clip.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "orthogonal.h"
#include "random.h"
#include "small_eig.h"

namespace sk {

namespace {

constexpr double kNewEnergy = 0.15;  // NEW_ENERGY of kernels/contracts.py
constexpr int64_t kPart = 512;       // columns of a long product at a time

int64_t multiple_of_4(int64_t b) { return (b + 3) / 4 * 4; }

// Squares (side, side) with zeros behind b
struct Squares {
  int64_t b, side;
  double *basis, *turned, *gram, *product;  // rows: eigenvectors of S over their roots; the same turned; W W'; scratch

  explicit Squares(int64_t width) : b(width), side(padded(width)) {
    static thread_local Buffer<double> buffer;
    basis = buffer.need(4 * side * side);
    std::fill_n(basis, 4 * side * side, 0.0);
    turned = basis + side * side;
    gram = turned + side * side;
    product = gram + side * side;
  }
  // out = x y; not out itself
  void multiply(const double* x, const double* y, double* out) const {
    Combine<double> combine{x, multiple_of_4(b), y, side, side, side, out, side};
    run(combine);
  }
};

bool all_finite(const double* x, int64_t b, int64_t ld) {
  double sum = 0;  // 0 * x is NaN for what is not finite
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < b; ++j) sum += 0 * x[i * ld + j];
  return sum == 0;
}

// Values of the projected matrix, descending: sigma (0 where rounding hides them), roots of the eigenvalues of S, and
// rows of `basis`: the coefficients of u_i over the rows of Y. Returns false where S or W is not finite.
template <class T>
bool decompose(const Clip<T>& g, const T* w, int64_t ldn, Squares& q, std::vector<double>& sigma, std::vector<double>& root) {
  const int64_t b = g.b, side = q.side;
  const double eps = 1024 * epsilon<T>(), floor = std::max(eps * eps, 4 * epsilon<double>());  // left_out of contracts.py
  if (!all_finite(g.s, b, b)) return false;
  const bool rotates = sizeof(T) == 8;  // W itself before its Gram matrix: float64 has no digits to spare for W W' / lambda
  BlockGram<T> gram{w, b, ldn, q.gram, side};
  run(gram);
  if (!all_finite(q.gram, b, side)) return false;
  std::vector<double> values, vectors;
  symmetric_eigen(g.s, b, b, values, vectors);
  for (int64_t i = 0; i < b; ++i) {
    const double value = std::max(values[b - 1 - i], 0.0);
    root[i] = std::sqrt(value);
    const double inverse = value > floor * values[b - 1] ? 1 / root[i] : 0;
    for (int64_t c = 0; c < b; ++c) q.turned[c * side + i] = q.basis[i * side + c] = vectors[(b - 1 - i) * b + c] * inverse;
  }
  if (rotates) {
    static thread_local Buffer<T> buffer;
    const int64_t b4 = multiple_of_4(b);
    std::vector<T> coefficients(b4 * b, T(0));
    for (int64_t i = 0; i < b; ++i) std::copy_n(q.basis + i * side, b, coefficients.data() + i * b);
    T* z = buffer.need(b4 * ldn);
    Combine<T> combine{coefficients.data(), b4, w, b, ldn, ldn, z, ldn};
    run(combine);
    gram.w = z;
    run(gram);
  } else {
    q.multiply(q.basis, q.gram, q.product);
    q.multiply(q.product, q.turned, q.gram);
  }
  symmetric_eigen(q.gram, b, side, values, vectors);
  for (int64_t i = 0; i < b; ++i) {
    sigma[i] = std::sqrt(std::max(values[b - 1 - i], 0.0));
    if (!(sigma[i] * sigma[i] > floor * (sigma[0] * sigma[0]))) sigma[i] = 0;
    std::copy_n(vectors.data() + (b - 1 - i) * b, b, q.product + i * side);
  }
  std::copy_n(q.basis, side * side, q.turned);
  q.multiply(q.product, q.turned, q.basis);
  return true;
}

// rows of x (count, ld) -> orthonormal rows in order: Cholesky of their Gram matrix where they are close to orthonormal, as
// singular vectors are up to rounding. Returns false, with x as it was, where they are not.
template <class T>
bool orthonormalize(T* x, int64_t count, int64_t ld, T* out) {
  const int64_t rows = multiple_of_4(count);
  std::vector<double> g(count * count), inverse(count * count, 0.0);
  BlockGram<T> gram{x, count, ld, g.data(), count};
  run(gram);
  for (int64_t i = 0; i < count; ++i) {
    double far = 0;
    for (int64_t j = 0; j < count; ++j) far += std::abs(g[i * count + j] - (i == j));
    if (!(far < 0.25)) return false;
  }
  for (int64_t i = 0; i < count; ++i)  // g = L L', L below and on the diagonal
    for (int64_t j = 0; j <= i; ++j) {
      double sum = g[i * count + j];
      for (int64_t k = 0; k < j; ++k) sum -= g[i * count + k] * g[j * count + k];
      g[i * count + j] = i == j ? std::sqrt(sum) : sum / g[j * count + j];
    }
  for (int64_t i = 0; i < count; ++i) {
    double* row = inverse.data() + i * count;
    row[i] = 1;
    for (int64_t j = 0; j < i; ++j)
      for (int64_t k = 0; k <= j; ++k) row[k] -= g[i * count + j] * inverse[j * count + k];
    for (int64_t k = 0; k <= i; ++k) row[k] /= g[i * count + i];
  }
  std::vector<T> coefficients(rows * count, T(0));
  for (int64_t i = 0; i < count * count; ++i) coefficients[i] = T(inverse[i]);
  Combine<T> combine{coefficients.data(), rows, x, count, ld, ld, out, ld};
  run(combine);
  return true;
}

// v: rows [0, known) of z orthonormalized, then random ones
template <class T>
void next_block(const Clip<T>& g, T* z, int64_t known, int64_t ldn, T* spare) {
  const bool near = orthonormalize(z, known, ldn, spare);
  T* rows = near ? spare : z;
  std::memset(rows + known * ldn, 0, sizeof(T) * (g.b - known) * ldn);
  draw_rows<T>(draw_key(g.seed, g.m, g.n, 2 + g.step), g.b - known, g.n, rows + known * ldn, ldn);
  std::vector<double> r(g.b * g.b);
  BlockQr<T> qr{rows, g.b, ldn, 0, r.data(), 1};
  if (!near) {
    qr.b = known;
    run(qr);
  }
  qr.b = g.b;
  qr.from = known;
  qr.floor = 1e-6 * std::sqrt(double(std::max<int64_t>(g.n, 1)));
  run(qr);
  for (int64_t i = 0; i < g.b; ++i) std::memcpy(g.v + i * g.n, rows + i * ldn, sizeof(T) * g.n);
}

}  // namespace

template <class T>
void clip(const Clip<T>& g) {
  const int64_t b = g.b, b4 = multiple_of_4(b), r4 = multiple_of_4(g.r), n = g.n, ldn = padded(n);
  double* info = g.info;
  if (info[kDone] != 0) return;
  static thread_local Buffer<T> block_buffer, z_buffer, part_buffer;
  T* w = block_buffer.need(b4 * ldn);
  for (int64_t c = 0; c < b; ++c) {
    std::memcpy(w + c * ldn, g.w + c * n, sizeof(T) * n);
    std::fill(w + c * ldn + n, w + (c + 1) * ldn, T(0));
  }
  Squares q(b);
  std::vector<double> sigma(b), root(b);
  if (!decompose(g, w, ldn, q, sigma, root)) return;

  const double top = sigma[0];
  const bool beyond = g.has_limit && sigma[b - 1] > g.limit && b < std::min(g.m, n);
  const double last = beyond ? sigma[b - 1] : g.has_limit ? g.limit : sigma[std::clamp<int64_t>(g.rank, 1, b) - 1];
  const double tau = std::max(last, std::sqrt(8 * epsilon<T>()) * top);
  T* z = z_buffer.need(b4 * ldn);
  if (!(tau > 0)) {
    if (info[kFrob2] > 0) {  // the block sees nothing of this matrix
      next_block(g, z, 0, ldn, w);
      info[kError] = std::numeric_limits<double>::infinity();
    }
    return;
  }

  const int64_t kept = std::clamp<int64_t>(b - g.fresh, 0, b), used = std::max(kept, g.r), used4 = multiple_of_4(used);
  std::vector<T> coefficients(used4 * b, T(0));
  for (int64_t i = 0; i < used; ++i)
    for (int64_t c = 0; c < b; ++c) coefficients[i * b + c] = sigma[i] > 0 ? T(q.basis[i * q.side + c] / sigma[i]) : T(0);
  Combine<T> right{coefficients.data(), used4, w, b, ldn, ldn, z, ldn};
  run(right);
  for (int64_t i = 0; i < g.r; ++i) {
    if (sigma[i] > tau)
      std::memcpy(g.right + i * n, z + i * ldn, sizeof(T) * n);
    else
      std::fill_n(g.right + i * n, n, T(0));
  }

  coefficients.assign(r4 * b, T(0));
  for (int64_t i = 0; i < g.r; ++i)
    for (int64_t c = 0; c < b; ++c) coefficients[i * b + c] = T(q.basis[i * q.side + c] * std::max(sigma[i] - tau, 0.0));
  T *part = part_buffer.need((b + r4) * kPart), *out = part + b * kPart;
  for (int64_t j = 0; g.r && j < g.m; j += kPart) {
    const int64_t width = std::min(kPart, g.m - j), wide = padded(width);
    for (int64_t c = 0; c < b; ++c) {
      std::memcpy(part + c * kPart, g.y + c * g.m + j, sizeof(T) * width);
      std::fill(part + c * kPart + width, part + c * kPart + wide, T(0));
    }
    Combine<T> left{coefficients.data(), r4, part, b, kPart, wide, out, kPart};
    run(left);
    for (int64_t i = 0; i < g.r; ++i) std::memcpy(g.left + i * g.m + j, out + i * kPart, sizeof(T) * width);
  }

  double trace = 0, gap = 0;
  for (int64_t i = 0; i < b; ++i) {
    trace += sigma[i] * sigma[i];
    const double behind = sigma[i] >= tau ? sigma[i] - root[i] : 0;
    gap = i == 0 ? behind : std::max(gap, behind);
  }
  gap /= tau;
  const double frob2 = info[kFrob2], square = tau * tau, outside = std::max(frob2 - trace, 0.0);
  const bool first = g.before[0] < 0 || g.before[1] < 0;
  const double expected = first ? 0 : std::min(g.before[0], g.before[1] * frob2 / square);
  const double error = gap + kNewEnergy * std::max(outside / square - expected, 0.0);
  info[kSigma] = top / info[kScale];
  info[kTheta] = top * top;
  info[kTrace] = trace;
  info[kColumns] = double(b);
  info[kError] = error;
  info[kDone] = error <= g.tol || b >= n;
  info[kTau] = tau;
  info[kOutside] = outside;
  info[kBeyond] = beyond;
  g.before[0] = outside / square;
  g.before[1] = outside / (frob2 > 0 ? frob2 : 1);

  int64_t known = 0;
  while (known < kept && sigma[known] > 0) ++known;
  next_block(g, z, known, ldn, w);
}

template void clip<float>(const Clip<float>&);
template void clip<double>(const Clip<double>&);

}  // namespace sk
