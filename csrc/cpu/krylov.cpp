#include "krylov.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "dense_norm.h"
#include "orthogonal.h"
#include "random.h"
#include "small_eig.h"

namespace sk {

namespace {

int64_t multiple_of_4(int64_t b) { return (b + 3) / 4 * 4; }

double error_estimate(double rho, double gap) { return rho > 0 ? 0.5 * rho * rho / (std::max(gap, 0.0) + rho) : 0; }

// ||R z|| for the last block of z: the coupling block lies under columns [columns, K)
double coupling(const double* t, int64_t ldt, int64_t K, int64_t b, int64_t columns, const double* z) {
  double sum = 0;
  for (int64_t a = 0; a < b; ++a) {
    double row = 0;
    for (int64_t c = columns; c < K; ++c) row += t[(K + a) * ldt + c] * z[c];
    sum += row * row;
  }
  return std::sqrt(sum);
}

}  // namespace

template <class T>
double safe_scale(double amax) {
  const int limit = safe_exponent<T>(), largest = sizeof(T) == 4 ? 126 : 1000;
  if (!(amax > 0) || std::isinf(amax) || (amax >= std::ldexp(1, -limit) && amax <= std::ldexp(1, limit))) return 1;
  int exponent;
  std::frexp(amax, &exponent);
  return std::ldexp(1, std::clamp(-exponent + 1, -largest, largest));
}

template <class T>
std::vector<T> start_block(int64_t m, int64_t n, int64_t b, int64_t seed, int64_t step) {
  const int64_t ldn = padded(n);
  std::vector<T> v(b * ldn, T(0));
  draw_rows<T>(draw_key(seed, m, n, step), b, n, v.data(), ldn);
  std::vector<double> r(b * b);
  BlockQr<T> qr{v.data(), b, ldn, 1e-6 * std::sqrt(double(std::max<int64_t>(n, 1))), r.data(), 1};
  run(qr);
  return v;
}

template <class T>
bool extend(Step<T>& s) {
  const int64_t K = s.columns + s.b;
  double largest = 0;
  for (int64_t i = 0; i < K; ++i) largest = std::max(largest, s.t[i * s.ldt + i]);
  RowNorm<T> norm{s.w, s.b, s.ldn, 0};
  run(norm);
  largest = std::max(largest, norm.largest);
  Project<T> project{s.w, multiple_of_4(s.b), s.q, multiple_of_4(K), s.ldn};
  run(project);
  run(project);
  std::vector<double> r(s.b * s.b);
  BlockQr<T> qr{s.w, s.b, s.ldn, 8 * epsilon<T>() * largest, r.data(), 1};
  run(qr);
  if (qr.cancelled < 0.01) {
    // Nearly collinear rows: what is left of one may lie in the basis again. Once more from unit length; noise goes.
    std::vector<double> second(s.b * s.b), product(s.b * s.b, 0.0);
    run(project);
    BlockQr<T> again{s.w, s.b, s.ldn, 0.5, second.data(), 1};
    run(again);
    for (int64_t i = 0; i < s.b; ++i)
      for (int64_t k = i; k < s.b; ++k)
        for (int64_t j = k; j < s.b; ++j) product[i * s.b + j] += second[i * s.b + k] * r[k * s.b + j];
    r = product;
  }
  std::memcpy(s.q + K * s.ldn, s.w, sizeof(T) * s.b * s.ldn);
  bool any = false;
  for (int64_t a = 0; a < s.b; ++a) {
    for (int64_t c = 0; c < s.b; ++c) {
      const double value = c >= a ? r[a * s.b + c] : 0;
      s.t[(K + a) * s.ldt + s.columns + c] = value;
      s.t[(s.columns + c) * s.ldt + K + a] = value;
    }
    s.first[K + a] = s.columns + a;
    any |= r[a * s.b + a] > 0;
  }
  return any;
}

template <class T>
bool assess(Step<T>& s, double tol, bool exact, double* info) {
  const int64_t K = s.columns + s.b;
  double trace = 0;
  for (int64_t i = 0; i < K; ++i) trace += s.t[i * s.ldt + i];
  info[kTrace] = trace;
  info[kColumns] = double(K);
  double theta = 0, rho = 0, error = 0;
  bool met;
  if (s.rank > 1) {
    std::vector<double> values, vectors;
    symmetric_eigen(s.t, K, s.ldt, values, vectors);
    const int64_t rank = std::min(s.rank, K);
    theta = std::max(values[K - 1], 0.0);
    const double below = K > s.rank ? values[K - rank - 1] : 0;
    for (int64_t i = 0; i < rank && theta > 0; ++i) {
      const double residual = coupling(s.t, s.ldt, K, s.b, s.columns, vectors.data() + (K - 1 - i) * K) / theta;
      if (i == 0) rho = residual;
      error = std::max(error, error_estimate(residual, (values[K - 1 - i] - below) / theta));
    }
    s.z->assign(vectors.begin() + (K - 1) * K, vectors.begin() + K * K);
    met = kSafety * error <= tol;
  } else {
    std::vector<double>& z = *s.z;
    const size_t had = z.size();
    z.resize(K, 0.0);
    if (had == 0)
      for (int64_t i = 0; i < K; ++i) z[i] = s.t[i * s.ldt + i] + 1e-3 * trace / double(K) + 1e-300;
    Profile profile(s.t, K, s.ldt, s.first);
    double inner = 0;
    // the inner residual joins the outer one below: it need only be small beside what tol lets pass
    const double accuracy = tol > 0 ? std::clamp(0.01 * tol, 1e-13, 1e-4) : 1e-13;
    theta = std::max(profile.leading(z.data(), accuracy, tol > 0 ? 0.05 * std::sqrt(tol) : 1e-10, &inner), 0.0);
    if (theta > 0) rho = std::hypot(coupling(s.t, s.ldt, K, s.b, s.columns, z.data()), inner) / theta;
    // error <= tol / safety needs this gap to the second Ritz value: one count of eigenvalues instead of computing it
    const double gap = tol > 0 ? 0.5 * kSafety * rho * rho / tol - rho : 1;
    if (exact || !(tol > 0)) {
      error = theta > 0 ? error_estimate(rho, 1 - profile.count_down(1, theta) / theta) : 0;
      met = kSafety * error <= tol;
    } else {
      met = gap <= 0 || (gap < 1 && profile.factor(theta * (1 - gap)) <= 1);
      error = met ? error_estimate(rho, std::max(gap, 0.0)) : error_estimate(rho, 0);
    }
  }
  info[kTheta] = theta;
  info[kRho] = rho;
  info[kError] = error;
  info[kSigma] = std::sqrt(theta * (1 + rho * rho)) / info[kScale];
  return met;
}

namespace {

template <class T, class C>
void dense(const KrylovTask<T>& k) {
  std::vector<C> panel(dense_entries(k.a));
  DenseNorm<C> g{k.a, C(1), panel.data(), 0, {}};
  run(g);
  const double amax = g.statistics.amax, scale = safe_scale<C>(amax);
  double* info = k.info;
  info[kReads] = 1;
  if (scale != 1 && !g.statistics.nan) {
    g.scale = C(scale);
    run(g);
    info[kReads] = 2;
  }
  info[kScale] = scale;
  info[kAmax] = amax;
  info[kNan] = g.statistics.nan;
  info[kInf] = std::isinf(amax);
  info[kFrob2] = info[kTrace] = g.statistics.frob2;
  info[kTheta] = g.lambda;
  info[kSigma] = g.statistics.nan ? NAN : std::isinf(amax) ? INFINITY : std::sqrt(g.lambda) / scale;
  info[kDone] = 1;
}

// Keep the leading quarter of the Ritz vectors and the pending block; returns the number of columns kept.
template <class T>
int64_t restart(T* q, int64_t ldn, std::vector<double>& t, int64_t ldt, std::vector<int64_t>& first, std::vector<double>& z,
                int64_t most, int64_t b) {
  const int64_t keep = std::max(b, most / (4 * b) * b), keep4 = multiple_of_4(keep), part = 512;
  std::vector<double> values, vectors;
  symmetric_eigen(t.data(), most, ldt, values, vectors);
  std::vector<T> coefficients(keep4 * most, T(0)), out(keep4 * part);
  for (int64_t i = 0; i < keep; ++i)
    for (int64_t j = 0; j < most; ++j) coefficients[i * most + j] = T(vectors[(most - 1 - i) * most + j]);
  for (int64_t j = 0; j < ldn; j += part) {
    const int64_t width = std::min(part, ldn - j);
    Combine<T> combine{coefficients.data(), keep4, q + j, most, ldn, width, out.data(), part};
    run(combine);
    for (int64_t i = 0; i < keep; ++i) std::memcpy(q + i * ldn + j, out.data() + i * part, sizeof(T) * width);
  }
  std::memmove(q + keep * ldn, q + most * ldn, sizeof(T) * b * ldn);
  std::vector<double> arrow(b * keep, 0.0);
  for (int64_t a = 0; a < b; ++a)
    for (int64_t i = 0; i < keep; ++i)
      for (int64_t j = most - b; j < most; ++j)
        arrow[a * keep + i] += t[(most + a) * ldt + j] * vectors[(most - 1 - i) * most + j];
  std::fill(t.begin(), t.end(), 0.0);
  for (int64_t i = 0; i < keep; ++i) {
    t[i * ldt + i] = values[most - 1 - i];
    first[i] = i;
    for (int64_t a = 0; a < b; ++a) t[(keep + a) * ldt + i] = t[i * ldt + keep + a] = arrow[a * keep + i];
  }
  for (int64_t a = 0; a < b; ++a) first[keep + a] = 0;
  z.assign(keep, 0.0);
  z[0] = 1;
  return keep;
}

template <class T>
void write_vectors(const KrylovTask<T>& k, const T* q, int64_t ldn, const double* t, int64_t ldt, const std::vector<double>& z,
                   int64_t K) {
  const int64_t rows = multiple_of_4(k.vectors), n = k.a.n;
  std::vector<T> coefficients(rows * K, T(0)), out(rows * ldn);
  if (k.vectors == 1) {
    for (int64_t j = 0; j < K; ++j) coefficients[j] = T(z[j]);
  } else {
    std::vector<double> values, vectors;
    symmetric_eigen(t, K, ldt, values, vectors);
    for (int64_t i = 0; i < std::min(k.vectors, K); ++i)
      for (int64_t j = 0; j < K; ++j) coefficients[i * K + j] = T(vectors[(K - 1 - i) * K + j]);
  }
  Combine<T> combine{coefficients.data(), rows, q, K, ldn, ldn, out.data(), ldn};
  run(combine);
  for (int64_t i = 0; i < k.vectors; ++i) {
    double length = 0;
    for (int64_t j = 0; j < n; ++j) length += double(out[i * ldn + j]) * double(out[i * ldn + j]);
    const T inverse = length > 0 ? T(1 / std::sqrt(length)) : T(0);
    for (int64_t j = 0; j < n; ++j) k.x[i * n + j] = out[i * ldn + j] * inverse;
  }
}

}  // namespace

bool is_dense(const Matrix& a, int64_t rank, double tol, int64_t vectors, bool with_t) {
  return tol > 0 && !vectors && !with_t && rank == 1 && a.n <= kDenseSide && a.m * a.n <= kDenseEntries;
}

template <class T>
void run_krylov(const KrylovTask<T>& k) {
  const int64_t m = k.a.m, n = k.a.n, b = k.b, b4 = multiple_of_4(b), ldn = padded(n);
  double* info = k.info;
  std::fill(info, info + kInfoColumns, 0.0);
  info[kScale] = 1;
  if (m == 0 || n == 0) {
    info[kReads] = info[kDone] = 1;
    std::fill(k.x, k.x + k.vectors * n, T(0));
    return;
  }
  if (is_dense(k.a, k.rank, k.tol, k.vectors, k.with_t)) {
    if (sizeof(T) == 4 && k.tol >= 1e-5)
      dense<T, T>(k);
    else
      dense<T, double>(k);
    return;
  }
  const int64_t most = std::min(k.cap, k.steps * b), rows = most + b;
  // basis rows behind the last multiple of 4 are read by whole tiles: zero where b is not one itself
  const int64_t spare = b % 4 ? 4 : 0;
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> basis(static_cast<T*>(std::aligned_alloc(64, sizeof(T) * (rows + spare) * ldn)));
  T* q = basis.get();
  if (b % 4) std::memset(q, 0, sizeof(T) * (rows + spare) * ldn);
  std::memcpy(q, k.start, sizeof(T) * b * ldn);
  std::vector<T> w(b4 * ldn), block(b % 4 ? b4 * ldn : 0, T(0));
  std::vector<double> t(rows * rows, 0.0), z;
  std::vector<int64_t> first(rows, 0);
  Read<T> read;
  int64_t columns = 0, K = 0;
  const int64_t exhausted = n <= m ? n : m + b;  // a start on the longer side lies outside the row space
  const bool tiny = m * n < (1 << 15);  // assessing costs as much as two reads there: every other read
  for (int64_t step = 0; step < k.steps; ++step) {
    const T* v = q + columns * ldn;
    if (b % 4) {
      std::memcpy(block.data(), v, sizeof(T) * b * ldn);
      v = block.data();
    }
    gram_read<T>(k.a, T(info[kScale]), b, b4, ldn, v, w.data(), nullptr, step == 0, k.parallel, read);
    info[kReads] += 1;
    if (step == 0) {
      const double amax = read.statistics.amax;
      info[kAmax] = amax;
      info[kNan] = read.statistics.nan;
      info[kInf] = std::isinf(amax);
      if (read.statistics.nan || std::isinf(amax) || amax == 0) {
        info[kSigma] = read.statistics.nan ? NAN : amax;
        info[kDone] = 1;
        std::fill(k.x, k.x + k.vectors * n, T(0));
        return;
      }
      info[kScale] = safe_scale<T>(amax);
      if (info[kScale] != 1) {
        gram_read<T>(k.a, T(info[kScale]), b, b4, ldn, v, w.data(), nullptr, true, k.parallel, read);
        info[kReads] += 1;
      }
      info[kFrob2] = read.statistics.frob2;
    }
    K = columns + b;
    for (int64_t i = 0; i < b; ++i)
      for (int64_t j = 0; j < b; ++j) t[(columns + i) * rows + columns + j] = read.s[i * b4 + j];
    Step<T> s{n, ldn, b, columns, k.rank, q, w.data(), t.data(), rows, first.data(), &z};
    const bool goes_on = extend(s) && K < exhausted;
    const bool last = step + 1 == k.steps;
    const bool due = k.tol > 0 && step + 1 >= k.min_reads && !(tiny && (step - k.min_reads) % 2);
    if (!goes_on || last || due) {
      const bool met = assess(s, k.tol, last || !goes_on, info);
      if (!goes_on || (k.tol > 0 && met && enough_reads(info, b, k.min_reads))) {
        info[kDone] = 1;
        break;
      }
    }
    if (last) break;
    columns = K;
    if (K == most) columns = restart(q, ldn, t, rows, first, z, most, b);
  }
  if (k.vectors) write_vectors(k, q, ldn, t.data(), rows, z, K);
  if (k.t) {
    const int64_t order = k.steps * b + b;
    for (int64_t i = 0; i < rows; ++i) std::memcpy(k.t + i * order, t.data() + i * rows, sizeof(double) * rows);
  }
}

#define SK_INSTANTIATE(T)                                                                        \
  template double safe_scale<T>(double);                                                         \
  template std::vector<T> start_block<T>(int64_t, int64_t, int64_t, int64_t, int64_t);            \
  template bool extend<T>(Step<T>&);                                                             \
  template bool assess<T>(Step<T>&, double, bool, double*);                                      \
  template void run_krylov<T>(const KrylovTask<T>&);
SK_INSTANTIATE(float)
SK_INSTANTIATE(double)

}  // namespace sk
