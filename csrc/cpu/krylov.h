// Block Krylov for one matrix: reads, basis, projected matrix, error estimate, stop rule. The contract is kernels/contracts.py.
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "gram_matvec.h"

namespace sk {

// columns of info, as in contracts.py
enum Info { kSigma, kTheta, kRho, kError, kReads, kDone, kNan, kInf, kFrob2, kAmax, kScale, kTrace, kColumns, kTau, kOutside,
            kBeyond, kInfoColumns };

constexpr double kSafety = 10;  // the error estimate times this must be below tol (docs/accuracy.md)

template <class T>
constexpr double epsilon() {
  return sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
}

// The small algebra after a read: shared by the word rayleigh_ritz_ and the composite.
template <class T>
struct Step {
  int64_t n, ldn, b, columns, rank;  // columns: basis columns before the block just read
  T* q;                              // (>= columns + 2 b, ldn) basis rows; the next block is written behind the others
  T* w;                              // (b4, ldn), overwritten
  double* t;                         // projected matrix, leading dimension ldt
  int64_t ldt;
  int64_t* first;                    // profile of t: first nonzero column of every row
  std::vector<double>* z;            // leading Ritz vector: start and result
};

// Orthogonalize w, extend q and t (whose diagonal block is in place). Returns false where nothing new is left.
template <class T>
bool extend(Step<T>& s);

// Estimate from t into info; exact: the gap to the next Ritz value is computed, otherwise only compared with what tol asks.
// Returns whether the error estimate meets tol.
template <class T>
bool assess(Step<T>& s, double tol, bool exact, double* info);

// One block more than `min_reads` while a larger value could hide outside the basis. Blocks, not reads: a first read repeated
// at another scale teaches nothing.
inline bool enough_reads(const double* info, int64_t b, int64_t min_reads) {
  const bool hidden = info[kFrob2] - info[kTrace] > 0.5 * info[kTheta];
  return info[kColumns] >= double(b * (min_reads + hidden));
}

template <class T>
struct KrylovTask {
  Matrix a;
  const T* start;  // (b, ldn) orthonormal rows
  int64_t b, steps, cap, rank, min_reads, vectors;
  double tol;
  bool with_t, parallel;
  double* info;  // (kInfoColumns)
  T* x;          // (vectors, n) or null
  double* t;     // (steps * b + b)^2 or null
};

// Small sides are finished by a direct method where only values are asked for.
bool is_dense(const Matrix& a, int64_t rank, double tol, int64_t vectors, bool with_t);

template <class T>
void run_krylov(const KrylovTask<T>& task);

// The power of two to read at. A read at scale 1 is exact enough while every product of four entries stays far inside the
// range (composites.py).
template <class T>
constexpr int safe_exponent() {
  return sizeof(T) == 4 ? 20 : 200;
}
template <class T>
double safe_scale(double amax);

// (scale to read at, whether the read must be repeated): composites_step.py
template <class T>
inline std::pair<double, bool> rescale(double used, double amax) {
  const double limit = std::ldexp(1, safe_exponent<T>());
  const bool inside = amax * used >= 1 / limit && amax * used <= limit;
  if (inside || !(amax > 0) || std::isinf(amax)) return {used, false};
  return {safe_scale<T>(amax), true};
}

struct FirstRead {
  double at;  // the scale in use from now on
  bool bad, spoiled;  // not finite; and let through
};

// The statistics of a step's first read into info (reads, flags, norms, scale, done). `read_again(at)` reads once more at
// another scale where products would leave the range.
template <class T, class F>
FirstRead take_first_read(double used, bool propagate, Read<T>& read, double* info, const F& read_again) {
  const double amax = read.statistics.amax;
  const bool nan = read.statistics.nan, inf = read.statistics.inf || std::isinf(amax), spoiled = (nan || inf) && propagate;
  const auto [at, repeat] = rescale<T>(used, amax);
  if (repeat) read_again(at);
  info[kAmax] = amax;
  info[kNan] = nan;
  info[kInf] = inf;
  info[kFrob2] = read.statistics.frob2;
  info[kScale] = at;
  info[kReads] = 1 + repeat;
  info[kDone] = amax == 0 || spoiled;
  if (spoiled) info[kSigma] = nan ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  return {at, nan || inf, spoiled};
}

// (b, ldn) orthonormal rows drawn from (seed, m, n, step)
template <class T>
std::vector<T> start_block(int64_t m, int64_t n, int64_t b, int64_t seed, int64_t step);

}  // namespace sk
