// Dense symmetric eigenproblems of a few dozen rows in float64, and the leading pair of a projected matrix with a profile.
#pragma once

#include <cstdint>
#include <vector>

namespace sk {

// All eigenvalues (ascending) and eigenvectors of the symmetric (k, k) matrix a (leading dimension ld): Householder
// tridiagonalization and implicit QL (Golub and Van Loan, section 8.3). vectors: (k, k), row i belongs to values[i].
void symmetric_eigen(const double* a, int64_t k, int64_t ld, std::vector<double>& values, std::vector<double>& vectors);

// Largest eigenvalue of the symmetric tridiagonal matrix with diagonal d (k) and squared off-diagonal e2 (k - 1), e2[i] between
// i and i + 1, to relative `accuracy`: Laguerre's iteration from above, which is monotone and cubic (Wilkinson, The Algebraic
// Eigenvalue Problem, chapter 7).
double largest_tridiagonal(const double* d, const double* e2, int64_t k, double accuracy);

// A symmetric matrix whose row i starts at column first[i]: block tridiagonal, or with an arrow after a thick restart.
class Profile {
 public:
  Profile(const double* t, int64_t k, int64_t ld, const int64_t* first) : t_(t), k_(k), ld_(ld), first_(first) {}

  // L D L' = x I - T without pivoting; returns the number of eigenvalues of T above x (Sylvester's inertia)
  int64_t factor(double x);
  void solve(double* z) const;  // z <- (x I - T)^-1 z of the last factor
  void multiply(const double* z, double* y) const;

  // Leading eigenpair by inverse iteration from shifts proved to lie above the spectrum. z (k): start and result, unit length.
  // Stops when theta is proved within `accuracy` (relative) of the largest eigenvalue and the residual is at most
  // `quiet` * theta. Returns theta = z' T z; residual = ||T z - theta z||.
  double leading(double* z, double accuracy, double quiet, double* residual);

  // The `which`-th largest eigenvalue (0: the largest) to relative 1e-3 of `top`, by bisection on the inertia
  double count_down(int64_t which, double top);

 private:
  const double* t_;
  int64_t k_, ld_;
  const int64_t* first_;
  std::vector<double> l_, d_, work_;
};

}  // namespace sk
