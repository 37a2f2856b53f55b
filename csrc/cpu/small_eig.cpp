#include "small_eig.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "matrix.h"

namespace sk {

namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();

// Sums of squares below count as zero: so near the smallest numbers a rotation or reflection would not be one.
constexpr double kNothing = 1e-280;

struct SymmetricEigen {  // matrices (k, ld), ld a multiple of 8, zeros behind k
  int64_t k, ld;
  double *a, *q = nullptr, *v = nullptr;              // a is overwritten; q: rows are eigenvectors
  double *d = nullptr, *e = nullptr, *p = nullptr;    // eigenvalues of the rows of q; (ld), (2 ld) scratch
};

}  // namespace
}  // namespace sk

#define SK_KERNEL "small_eig.inc"
#include "foreach_isa.h"

namespace sk {
namespace {

SK_DISPATCH(symmetric_eigen_rows, SymmetricEigen)

}  // namespace

void symmetric_eigen(const double* a, int64_t k, int64_t ld, std::vector<double>& values, std::vector<double>& vectors) {
  const int64_t wide = (k + 7) / 8 * 8;
  std::vector<double> work(wide * (3 * k + 4), 0.0);
  SymmetricEigen s{k, wide, work.data()};
  s.q = s.a + k * wide;
  s.v = s.q + k * wide;
  s.d = s.v + k * wide;
  s.e = s.d + wide;
  s.p = s.e + wide;
  double largest = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) largest = std::max(largest, std::abs(a[i * ld + j]));
  int exponent = 0;  // entries of size one: squares neither overflow nor vanish
  if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &exponent);
  const double scale = std::ldexp(1, -exponent), back = std::ldexp(1, exponent);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) s.a[i * wide + j] = 0.5 * (a[i * ld + j] * scale + a[j * ld + i] * scale);
  symmetric_eigen_rows(s);
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t x, int64_t y) { return s.d[x] < s.d[y] || (s.d[x] == s.d[y] && x < y); });
  values.resize(k);
  vectors.resize(k * k);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = s.d[order[i]] * back;
    std::copy_n(s.q + order[i] * wide, k, vectors.data() + i * k);
  }
}

double largest_tridiagonal(const double* d, const double* e2, int64_t k, double accuracy) {
  if (k == 1) return d[0];
  double x = 0, floor = 0, frob2 = 0;  // Gershgorin's upper end; the largest diagonal entry is a lower bound
  for (int64_t i = 0; i < k; ++i) {
    const double left = i ? std::sqrt(e2[i - 1]) : 0, right = i + 1 < k ? std::sqrt(e2[i]) : 0;
    x = std::max(x, d[i] + left + right);
    floor = std::max(floor, d[i]);
    frob2 += d[i] * d[i] + (i + 1 < k ? 2 * e2[i] : 0);
  }
  x = std::min(x, std::sqrt(frob2));
  if (!(x > 0)) return 0;
  x *= 1 + 4 * kEps;
  const double n = double(k);
  for (int step = 0; step < 40; ++step) {
    // q_i = x - d_i - e2_(i-1) / q_(i-1); s1 = (log det)', s2 = -(log det)''
    double q = 1, dq = 0, ddq = 0, s1 = 0, s2 = 0;
    bool above = true;
    for (int64_t i = 0; i < k; ++i) {
      const double inverse = i ? 1 / q : 0, e = i ? e2[i - 1] : 0, w = e * inverse * inverse;
      const double nq = x - d[i] - e * inverse;
      const double ndq = 1 + w * dq;
      const double nddq = w * (ddq - 2 * dq * dq * inverse);
      q = nq;
      dq = ndq;
      ddq = nddq;
      if (!(q > 0)) {
        above = false;
        break;
      }
      const double u = dq / q;
      s1 += u;
      s2 += u * u - ddq / q;
    }
    if (!above) break;  // rounding has carried x onto the eigenvalue
    const double root = std::sqrt(std::max(0.0, (n - 1) * (n * s2 - s1 * s1)));
    const double move = n / (s1 + root);
    x -= move;
    // cubic: the next move would be of the order of the cube of this one
    if (move * move * move <= 1e-3 * accuracy * x * x * x || !(move > 2 * kEps * x)) break;
  }
  return std::max(x, floor);
}

int64_t Profile::factor(double x) {
  l_.resize(k_ * k_);
  d_.resize(k_);
  int64_t above = 0;
  for (int64_t i = 0; i < k_; ++i) {
    const double* row = t_ + i * ld_;
    double* li = l_.data() + i * k_;
    double pivot = x - row[i];
    for (int64_t j = first_[i]; j < i; ++j) {
      const double* lj = l_.data() + j * k_;
      double u = -row[j];
      for (int64_t k = std::max(first_[i], first_[j]); k < j; ++k) u -= li[k] * lj[k];  // li holds L D until divided below
      li[j] = u;
    }
    for (int64_t j = first_[i]; j < i; ++j) {
      const double u = li[j];
      li[j] = u / d_[j];
      pivot -= u * li[j];
    }
    if (std::abs(pivot) < 1e-300) pivot = 1e-300;
    d_[i] = pivot;
    above += pivot < 0;
  }
  return above;
}

void Profile::solve(double* z) const {
  for (int64_t i = 0; i < k_; ++i) {
    const double* li = l_.data() + i * k_;
    double sum = z[i];
    for (int64_t j = first_[i]; j < i; ++j) sum -= li[j] * z[j];
    z[i] = sum;
  }
  for (int64_t i = 0; i < k_; ++i) z[i] /= d_[i];
  for (int64_t i = k_ - 1; i >= 0; --i) {
    const double* li = l_.data() + i * k_;
    for (int64_t j = first_[i]; j < i; ++j) z[j] -= li[j] * z[i];
  }
}

void Profile::multiply(const double* z, double* y) const {
  for (int64_t i = 0; i < k_; ++i) y[i] = t_[i * ld_ + i] * z[i];
  for (int64_t i = 0; i < k_; ++i)
    for (int64_t j = first_[i]; j < i; ++j) {
      y[i] += t_[i * ld_ + j] * z[j];
      y[j] += t_[i * ld_ + j] * z[i];
    }
}

double Profile::leading(double* z, double accuracy, double quiet, double* residual) {
  work_.resize(k_);
  double* y = work_.data();
  double theta = 0, rest = 0, proved = std::numeric_limits<double>::infinity();
  for (int iteration = 0; iteration < 60; ++iteration) {
    double length = 0;
    for (int64_t i = 0; i < k_; ++i) length += z[i] * z[i];
    length = 1 / std::sqrt(length);
    for (int64_t i = 0; i < k_; ++i) z[i] *= length;
    multiply(z, y);
    theta = 0;
    for (int64_t i = 0; i < k_; ++i) theta += z[i] * y[i];
    rest = 0;
    for (int64_t i = 0; i < k_; ++i) rest += (y[i] - theta * z[i]) * (y[i] - theta * z[i]);
    rest = std::sqrt(rest);
    if (!(theta > 0)) break;
    if (proved - theta <= accuracy * theta && rest <= std::max(quiet, accuracy) * theta) break;
    double width = std::max(rest, 0.25 * accuracy * theta);
    while (factor(theta + width) > 0) width *= 2;  // the spectrum reaches further than this vector saw
    proved = std::min(proved, theta + width);
    solve(z);
  }
  *residual = rest;
  return theta;
}

double Profile::count_down(int64_t which, double top) {
  if (which >= k_) return 0;
  double low = 0, high = top * (1 + 1e-9);
  while (high - low > 1e-3 * top) {
    const double middle = 0.5 * (low + high);
    (factor(middle) > which ? low : high) = middle;
  }
  return high;
}

}  // namespace sk
