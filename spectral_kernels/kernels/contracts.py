"""The contract of every kernel word: schema, meaning, fake. Read this file first.

Conventions
-----------
* A *ragged list* `A` holds stacks `(k_i, m_i, n_i)` of one float dtype on one device, any strides. Its matrices are
  numbered through in order: N = sum k_i. Callers pass `A` or `A.mT`: a block is as long as the last, the tracked side
  (ops/estimate.py chooses it); the words work for any shape.
* The accumulation dtype `acc` is float64 for float64 matrices and float32 for every other dtype.
* *Flat* tensors hold one block per matrix, one after the other, without padding: a flat `(b, n_j)` of acc is a 1-D
  tensor of b * sum n_j numbers. Blocks are stored transposed: row c of matrix j's `(b, n_j)` is column c of V_j.
* Small dense results (S, T, info, stats) are float64, one slice per matrix.
* One read = one pass over the bytes of a matrix.
* Words promise the same bits run to run, for any number of threads, alone or inside any list (native backends).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMESPACE = "spectral_kernels"

# Columns of `info` (N, INFO_COLUMNS), float64, one row per matrix. Quantities marked * are of scale * A.
INFO = {
    "sigma": 0,  # best lower estimate of the spectral norm of A (unscaled); NaN or inf for such input
    "theta": 1,  # * largest eigenvalue of the projected matrix T, a lower bound of sigma_max^2
    "rho": 2,  # relative residual ||A'A z - theta z|| / theta of the leading Ritz vector z
    "error": 3,  # estimated relative error of sigma: 0.5 rho^2 / (gap + rho)
    "reads": 4,  # passes over the matrix, a repeated first read included
    "done": 5,  # 1: finished (converged, exhausted, zero or not finite)
    "nan": 6,  # 1: a NaN entry
    "inf": 7,  # 1: an infinite entry
    "frob2": 8,  # * squared Frobenius norm
    "amax": 9,  # largest |entry| of A (unscaled)
    "scale": 10,  # the power of two at which the matrix was read
    "trace": 11,  # * trace of T
    "columns": 12,  # basis columns in use (rows of Q, order of T)
    "tau": 13,  # * clip_: the value at which singular values are clipped; 0 elsewhere
    "outside": 14,  # * clip_: squared Frobenius norm of what the block does not reach
    "beyond": 15,  # clip_: 1 where the threshold would clip more values than the block holds, and tau is larger
}
INFO_COLUMNS = 16
STATS = {"frob2": 0, "amax": 1, "nan": 2, "inf": 3}  # columns of `stats` (N, 4), float64
NORMS = {**STATS, "row2": 4}  # columns of the result of `momentum_norms_` (N, 5), float64


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def counts(A: Sequence[Tensor]) -> int:
    """N: the number of matrices of a ragged list."""
    return sum(a.shape[0] for a in A)


def sides(A: Sequence[Tensor], dim: int) -> list[int]:
    """Size along `dim` of every matrix, one entry per matrix of the ragged list."""
    return [a.shape[dim] for a in A for _ in range(a.shape[0])]


_library = torch.library.Library(NAMESPACE, "DEF")

# ----------------------------------------------------------------------------------------------------------------------
# gram_matvec: one read of every matrix.
#   V      flat (b, n_j) acc     scale (N,) acc, powers of two: every product is of scale_j * A_j
#   skip   (N,) bool or None: matrices not to be read; their outputs are 0
#   -> W   flat (b, n_j) acc     W = A' (A V)
#      S   (N, b, b) float64     S = Y' Y with Y = A V
#      stats (N, 4) float64      ||scale A||_F^2, max |A| (unscaled, NaN ignored), NaN flag, inf flag;
#                                zeros unless with_stats
#      Y   flat (b, m_j) acc     empty unless with_y
# A matrix with a non-finite entry has its flags right, everything else of it unspecified, and its neighbours untouched.
_library.define(
    "gram_matvec(Tensor[] A, Tensor V, Tensor scale, Tensor? skip, int b, bool with_stats, bool with_y)"
    " -> (Tensor W, Tensor S, Tensor stats, Tensor Y)"
)


@torch.library.register_fake(f"{NAMESPACE}::gram_matvec")
def _gram_matvec_fake(A, V, scale, skip, b, with_stats, with_y):
    N = counts(A)
    rows = sum(a.shape[0] * a.shape[1] for a in A) * b if with_y else 0
    small = dict(dtype=torch.float64)
    return V.new_empty(V.shape), V.new_empty((N, b, b), **small), V.new_empty((N, 4), **small), V.new_empty((rows,))


# ----------------------------------------------------------------------------------------------------------------------
# rayleigh_ritz_: the small algebra of one block Krylov step, all matrices at once, after gram_matvec has read block V.
#   n      size of the tracked side of every matrix
#   Q      flat (cap + b, n_j) acc: rows [0, K) are the orthonormal basis, K = `columns` + b, the last b of them the
#          block V just read. On return rows [K, K + b) hold the next block.
#   V      flat (b, n_j) acc: on return the next block (those rows of Q; zero rows where the space is exhausted)
#   T      (N, cap + b, cap + b) float64, symmetric: Q' A'A Q. The word writes S into the diagonal block [K-b, K),
#          and the coupling R of W = Q Q' W + V_next R into rows [K, K + b), columns [K-b, K), and its transpose.
#   info   (N, INFO_COLUMNS) float64, updated; matrices with done = 1 are left alone
#   W, S   as gram_matvec returned them; scale (N,) acc as given to it
#   columns  basis columns before this block: 0, b, 2b, ...
#   tol    stop when 10 * error <= tol with `min_reads` blocks in the basis or more, one more while
#          frob2 - trace > theta / 2 (a larger value could hide outside the basis); 0: never stop early
#   rank   the error estimate covers the `rank` leading Ritz values (1: sigma_max)
# W is orthogonalized against rows [0, K) of Q twice, then within itself and, where its rows are nearly collinear,
# against Q again; a row whose remainder is below 8 eps(acc) max(theta, longest row of W) is deflated: a zero row of
# Q, zero in R.
_library.define(
    "rayleigh_ritz_(int[] n, Tensor(a!) Q, Tensor(b!) V, Tensor(c!) T, Tensor(d!) info, Tensor W, Tensor S,"
    " Tensor scale, int b, int columns, int rank, float tol, int min_reads) -> ()"
)


@torch.library.register_fake(f"{NAMESPACE}::rayleigh_ritz_")
def _rayleigh_ritz_fake(n, Q, V, T, info, W, S, scale, b, columns, rank, tol, min_reads):
    return None


# ----------------------------------------------------------------------------------------------------------------------
# block_krylov: the whole estimator. Default: a loop over the two words above (composites.py); a backend may replace it.
#   V0     flat (b, n_j) acc orthonormal rows to start from, or None: drawn from (seed, shape)
#   b      block width     steps  most reads     cap  most basis columns (a multiple of b), then a thick restart
#   tol    as above; 0: exactly `steps` reads (fewer where the space is exhausted)
#   vectors  0: none; 1: the leading right singular vector, flat (n_j); b: the b leading Ritz vectors, flat (b, n_j)
#   with_t   also return T (N, steps*b + b, steps*b + b), for certificates; then steps * b <= cap: no restart
#   -> info (N, INFO_COLUMNS) float64, X flat acc, T float64 (empty unless with_t)
_library.define(
    "block_krylov(Tensor[] A, Tensor? V0, int b, int steps, int cap, int rank, float tol, int min_reads, int seed,"
    " int vectors, bool with_t) -> (Tensor info, Tensor X, Tensor T)"
)


@torch.library.register_fake(f"{NAMESPACE}::block_krylov")
def _block_krylov_fake(A, V0, b, steps, cap, rank, tol, min_reads, seed, vectors, with_t):
    N = counts(A)
    like = A[0]
    order = (N, steps * b + b, steps * b + b) if with_t else (0,)
    total = sum(a.shape[0] * a.shape[2] for a in A)
    return (
        like.new_empty((N, INFO_COLUMNS), dtype=torch.float64),
        like.new_empty((total * vectors,), dtype=acc_dtype(like.dtype)),
        like.new_empty(order, dtype=torch.float64),
    )


# ----------------------------------------------------------------------------------------------------------------------
# krylov_norm: block_krylov for one matrix (m, n) or stack (k, m, n), values only: a short cut for small calls.
#   -> () or (k,) acc: sigma_max; negative where tol was not proved within `steps` reads
_library.define("krylov_norm(Tensor A, int b, int steps, int cap, float tol, int min_reads, int seed) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::krylov_norm")
def _krylov_norm_fake(A, b, steps, cap, tol, min_reads, seed):
    return A.new_empty(A.shape[:-2], dtype=acc_dtype(A.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# momentum_gram_matvec_: the momentum of every matrix and one read of what an optimizer will apply, in one pass.
#   M      ragged list, updated in place: M <- beta M + alpha G, rounded to its dtype (alpha = 1: heavy ball,
#          1 - beta: moving average, negative: ascent). M_j is read and written once, G_j read once
#   G      ragged list of the same shapes, any float dtype, any strides
#   X      what is read: M as just stored, or beta M + alpha G in acc with `nesterov`
#   update     False: M stays, X is read again (M, or beta M + alpha G)
#   propagate  False: an entry of G that is not finite counts as zero, and so does one of the new M: M and X are finite
#              True: such entries enter M and X, as in torch's optimizers
#   V, scale, b as in gram_matvec; acc is that of M's dtype
#   skip   (N,) bool or None: matrices to be left alone, M included; their outputs are 0
#   -> W, S, stats (N, 4), Y (empty unless with_y) of X as in gram_matvec; the NaN and inf flags are those of G, of
#      beta M + alpha G and of its rounding to M's dtype, before anything counts as zero (without an update: of X alone)
_library.define(
    "momentum_gram_matvec_(Tensor(a!)[] M, Tensor[] G, Tensor V, Tensor scale, Tensor? skip, float beta, float alpha,"
    " bool nesterov, bool update, bool propagate, int b, bool with_y=False)"
    " -> (Tensor W, Tensor S, Tensor stats, Tensor Y)"
)


@torch.library.register_fake(f"{NAMESPACE}::momentum_gram_matvec_")
def _momentum_gram_matvec_fake(M, G, V, scale, skip, beta, alpha, nesterov, update, propagate, b, with_y=False):
    return _gram_matvec_fake(M, V, scale, skip, b, True, with_y)


# ----------------------------------------------------------------------------------------------------------------------
# momentum_norms_: the same pass for what is not normalized by its spectral norm.
#   -> norms (N, 5) float64: ||scale X||_F^2, max |X| (unscaled, NaN ignored), NaN flag, inf flag, and the largest
#      squared l2 norm of a row of scale X; zeros where skipped
_library.define(
    "momentum_norms_(Tensor(a!)[] M, Tensor[] G, Tensor scale, Tensor? skip, float beta, float alpha,"
    " bool nesterov, bool update, bool propagate) -> Tensor"
)


@torch.library.register_fake(f"{NAMESPACE}::momentum_norms_")
def _momentum_norms_fake(M, G, scale, skip, beta, alpha, nesterov, update, propagate):
    return M[0].new_empty((counts(M), len(NORMS)), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# apply_update_: P <- (1 - decay) P - size (scale X - L' R), one pass; P is read and written once, X's sources once.
#   P      ragged list, any float dtype, updated in place, rounded to nearest; M, G of the same shapes
#   G      empty: X = M; otherwise (Nesterov) X = beta M + alpha G
#   size   (N,) acc; decay (N,) float64; scale (N,) acc, powers of two: size alone would overflow for tiny X. acc: the
#          wider of the accumulation dtypes of P and M
#   skip   (N,) bool or None: P stays, bit for bit
#   L, R   flat (r, m_j) and (r, n_j) of the accumulation dtype of M: a correction of rank r; None and r = 0: none
_library.define(
    "apply_update_(Tensor(a!)[] P, Tensor[] M, Tensor[] G, Tensor size, Tensor scale, Tensor decay, Tensor? skip,"
    " float beta, float alpha, Tensor? L=None, Tensor? R=None, int r=0) -> ()"
)


@torch.library.register_fake(f"{NAMESPACE}::apply_update_")
def _apply_update_fake(P, M, G, size, scale, decay, skip, beta, alpha, L=None, R=None, r=0):
    return None


# ----------------------------------------------------------------------------------------------------------------------
# next_block_: what a block Krylov space (Q, T, info after rayleigh_ritz_) leaves for the next call.
#   m, n   sides of every matrix, n the tracked one
#   V      flat (b, n_j) acc. On return orthonormal rows: first A'A z of the b - fresh leading Ritz vectors z
#          (orthonormalized in descending order), then random rows, drawn from (seed, shape, step_j). Rows that the
#          space does not fill are random too, rows beyond n are zero. Unchanged where theta is not positive.
#   step   (N,) int64: a draw depends on it. Row r of a draw: numbers [r n, (r + 1) n) of random.draws at 2 + step_j
#   -> upper (N,) float64, of A unscaled: an upper bound of sigma_max, always (up to rounding, for which it has room):
#      sigma_max^2 <= the largest eigenvalue of [[theta, r], [r, tau]], r = ||R||_F >= ||(I - QQ')A'A Q||,
#      tau = ||A||_F^2 - trace T >= ||A (I - QQ')||_F^2, and <= ||A||_F^2; 0 where theta is not positive
_library.define(
    "next_block_(int[] m, int[] n, Tensor Q, Tensor T, Tensor info, Tensor(a!) V, Tensor step, int b, int fresh,"
    " int seed) -> Tensor"
)


@torch.library.register_fake(f"{NAMESPACE}::next_block_")
def _next_block_fake(m, n, Q, T, info, V, step, b, fresh, seed):
    return info.new_empty((len(n),))


# ----------------------------------------------------------------------------------------------------------------------
# tracked_step_: a whole step P <- (1 - decay) P - size X / ||X||_2 of every matrix, ||X||_2 followed by a block.
# Default: the words above, one after the other (composites.py); a backend may go matrix by matrix while M is in cache.
#   P, M, G  ragged lists with the tracked side last (of M; the three are oriented alike)
#   V      flat (b, n_j) acc, orthonormal rows; replaced by next_block_
#   scale  (N,) acc, powers of two at which matrices were read last, replaced; 0: never
#   step   (N,) int64 for next_block_
#   size   (N,) float64: the spectral norm of the update; decay (N,) float64
#   skip   (N,) bool or None: matrices to be left alone altogether
#   upper  divide by the upper bound of next_block_ instead of the estimate
#   reads  most reads of a matrix, the one of the momentum pass included (a first read repeated at another scale comes
#          on top); tol and min_reads decide, per matrix and on the device, whether a read was enough: rayleigh_ritz_
#          with rank 2, for a second value may be about to overtake the first
# P stays, bit for bit, where G or the new momentum is not finite (unless `propagate`: then it becomes NaN); V stays
# where X is zero or not finite. The default takes `owner` too: matrices of one parameter, which stays as a whole.
#   -> info (N, INFO_COLUMNS), of X, flags as momentum_gram_matvec_ gives them; bound (N,) as next_block_ gives it
#      (sigma and bound NaN or inf where such entries propagate)
_library.define(
    "tracked_step_(Tensor(a!)[] P, Tensor(b!)[] M, Tensor[] G, Tensor(c!) V, Tensor(d!) scale, Tensor step,"
    " Tensor size, Tensor decay, Tensor? skip, float beta, float alpha, bool nesterov, bool propagate, bool upper,"
    " int b, int fresh, int reads, float tol, int min_reads, int seed) -> (Tensor info, Tensor bound)"
)


@torch.library.register_fake(f"{NAMESPACE}::tracked_step_")
def _tracked_step_fake(P, M, G, V, scale, step, size, decay, *options):
    N = counts(M)
    return size.new_empty((N, INFO_COLUMNS)), size.new_empty((N,))


# ----------------------------------------------------------------------------------------------------------------------
# clip_: the small algebra of a clipped step, all matrices at once, after gram_matvec has read block V with Y = A V.
# With S = E Lambda E', Q = Y E Lambda^-1/2 is an orthonormal basis of the range of Y, and the singular triplets of
# Q Q' A come from the b x b matrix (W E Lambda^-1/2)'(W E Lambda^-1/2) = U Sigma^2 U': u = Q U, v = W E Lambda^-1/2 U
# / Sigma. Eigenvalues of S and values Sigma^2 up to `left_out` of the largest count as zero.
#   m, n   sides of every matrix, n the tracked one
#   V      flat (b, n_j) acc: the block just read, orthonormal or zero rows. On return the block of the next read: the
#          b - fresh leading v, orthonormalized in descending order, then random rows, drawn from (seed, shape, step_j)
#          as in next_block_; rows that are missing are random too, rows beyond n are zero
#   L, R   flat (r, m_j), (r, n_j) acc, overwritten: L' R = sum over the r leading i of (sigma_i - tau)_+ u_i v_i',
#          of scale A: A - L' R has its singular values clipped at tau, apart from what the block missed
#   info   sigma, theta = sigma_1^2, trace (sum of sigma_i^2), columns (b), error, done, tau, outside, beyond are
#          set; reads, frob2, amax, scale and flags are the caller's. done = 1: left alone, with V, L, R and before
#   W, S, Y as gram_matvec returned them, scale (N,) acc as given to it
#   rank   (N,) int64, 1 ... b: tau = sigma_rank, and at least sqrt(8 eps(acc)) sigma_1, below which nothing is known
#   limit  (N,) float64 or None: clip at this value of A (unscaled) instead; at sigma_b, and beyond = 1, where more
#          than the b < min(m, n) values of the block would be clipped
#   before (N, 2) float64: `outside` of the read before, over tau^2 and over frob2; 0 or less: never read. Replaced
#   tol    done = 1 where error <= tol or the block fills the space (b >= n)
# A block that sees nothing of a matrix that is not zero (S = 0, frob2 > 0) is drawn anew, and error is infinite.
# error estimates by how much the largest singular value of the clipped, divided matrix exceeds 1: the largest
# (sigma_i - lambda_i^1/2) / tau over sigma_i >= tau (lambda: eigenvalues of S, half a power step behind) plus
# NEW_ENERGY times what `outside` has gained over the smaller of the two values in `before`, in units of tau^2.
NEW_ENERGY = 0.15


def left_out(acc: torch.dtype) -> float:
    """Share of sigma_1^2 that counts as zero: above it rounding, eps sigma_1^2 / lambda^1/2, is below tau's floor."""
    return max((1024 * torch.finfo(acc).eps) ** 2, 4 * torch.finfo(torch.float64).eps)


_library.define(
    "clip_(int[] m, int[] n, Tensor(a!) V, Tensor(b!) L, Tensor(c!) R, Tensor(d!) info, Tensor W, Tensor S, Tensor Y,"
    " Tensor scale, Tensor rank, Tensor? limit, Tensor(e!) before, Tensor step, int b, int r, int fresh, float tol,"
    " int seed) -> ()"
)


@torch.library.register_fake(f"{NAMESPACE}::clip_")
def _clip_fake(m, n, V, L, R, info, *options):
    return None


# ----------------------------------------------------------------------------------------------------------------------
# clipped_step_: a whole step P <- (1 - decay) P - size D of every matrix, D = sum of min(sigma_i / tau, 1) u_i v_i' of
# X: the same words with clip_ in the middle. Default: composites_step.py. Arguments as in tracked_step_; besides
#   before (N, 2) as in clip_, replaced     rank (N,) int64, limit (N,) float64 or None, r as in clip_
#   reads, tol   most reads of a matrix; another one where the error of clip_ is above tol
#   -> info (N, INFO_COLUMNS)
_library.define(
    "clipped_step_(Tensor(a!)[] P, Tensor(b!)[] M, Tensor[] G, Tensor(c!) V, Tensor(d!) scale, Tensor(e!) before,"
    " Tensor step, Tensor size, Tensor decay, Tensor rank, Tensor? limit, Tensor? skip, float beta, float alpha,"
    " bool nesterov, bool propagate, int b, int r, int fresh, int reads, float tol, int seed) -> Tensor"
)


@torch.library.register_fake(f"{NAMESPACE}::clipped_step_")
def _clipped_step_fake(P, M, G, V, scale, before, step, size, *options):
    return size.new_empty((counts(M), INFO_COLUMNS))
