"""The contract of the words that multiply matrices: `orthogonalize` and the steps of Muon are made of them.

Conventions are those of contracts.py; besides
* X is oriented with the shorter side first, m <= n, by its caller; any strides. Symmetric matrices are (k, m, m).
* `dtype` is what products are computed in: operands are rounded to it, sums are accumulated in `acc_dtype(dtype)` and
  rounded to it once. Neighbours in a list do not touch each other; zero rows and columns stay exactly zero.
* Bits are the same run to run for a fixed number of threads and a fixed list; libraries of matrix products may sum in
  another order otherwise.
* "Symmetric" results: half the tiles are computed and mirrored, exactly; where whole products are faster (CPUs, small
  matrices), up to rounding.
* factor (N, 2) of acc_dtype(dtype), or None: X is multiplied by both numbers, one after the other, before it is
  rounded to `dtype`. Two, since one may leave the range: a power of two, and a number near 1.
"""

from __future__ import annotations

import torch

from .contracts import NAMESPACE, acc_dtype, counts

WORDS = ("gram", "square_add", "multiply_add", "multiply_update_", "newton_schulz")  # served by the dtype of products

# Order from which CPUs compute half of a symmetric product. Measured with two threads that sleep between calls: that
# takes 0.87 of the time of a whole one at 768, 0.77 at 1024, 0.66 at 2048, and more than all of it at 512.
LEAST_HALVED = 768

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# ----------------------------------------------------------------------------------------------------------------------
# gram: XX' of every matrix, symmetric.
#   -> (k, m, m) of dtype, contiguous, per stack: (f X)(f X)'
_library.define("gram(Tensor[] X, Tensor? factor, ScalarType dtype) -> Tensor[]")


@torch.library.register_fake(f"{NAMESPACE}::gram")
def _gram_fake(X, factor, dtype):
    return [x.new_empty((x.shape[0], x.shape[1], x.shape[1]), dtype=dtype) for x in X]


# ----------------------------------------------------------------------------------------------------------------------
# square_add: b A + c A^2 of every symmetric matrix, symmetric; c = 0: no product.
_library.define("square_add(Tensor[] A, float b, float c) -> Tensor[]")


@torch.library.register_fake(f"{NAMESPACE}::square_add")
def _square_add_fake(A, b, c):
    return [a.new_empty(a.shape) for a in A]


# ----------------------------------------------------------------------------------------------------------------------
# multiply_add: a fX + B fX for symmetric B (k, m, m) of dtype.
#   symmetric  X is (k, m, m) and commutes with B, as polynomials of one matrix do: the result is symmetric
#   -> (k, m, n) of dtype per stack, its rows (or columns, where X has those contiguous) contiguous
_library.define(
    "multiply_add(Tensor[] B, Tensor[] X, Tensor? factor, float a, bool symmetric, ScalarType dtype) -> Tensor[]"
)


@torch.library.register_fake(f"{NAMESPACE}::multiply_add")
def _multiply_add_fake(B, X, factor, a, symmetric, dtype):
    return [like(x, dtype) for x in X]


def like(x, dtype):
    """An empty stack of x's shape, contiguous along the same side as x."""
    k, m, n = x.shape
    if m > 1 and n > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((k, n, m), dtype=dtype).mT
    return x.new_empty((k, m, n), dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# multiply_update_: P <- (1 - decay) P - size B fX of every matrix: the last product of an orthogonalized step.
#   P      ragged list of X's shapes, any float dtype and strides, rounded to nearest
#   B      (k, m, m) of dtype per stack, symmetric
#   size, decay  (N,) float64     skip (N,) bool or None: P stays, bit for bit
_library.define(
    "multiply_update_(Tensor(a!)[] P, Tensor[] B, Tensor[] X, Tensor? factor, Tensor size, Tensor decay, Tensor? skip,"
    " ScalarType dtype) -> ()"
)


@torch.library.register_fake(f"{NAMESPACE}::multiply_update_")
def _multiply_update_fake(P, B, X, factor, size, decay, skip, dtype):
    return None


# ----------------------------------------------------------------------------------------------------------------------
# newton_schulz: X <- X p(X'X) composed over the steps of a schedule. Default: composites_products.py over the words
# above; a backend may replace it, in whole or for the matrices that it keeps on chip.
#   factor (N, 2): after it singular values lie where the schedule wants them, but for `schatten4`
#   schatten4  divide by the Schatten-4 norm too, ||XX'||_F^1/2 >= sigma_max, found in the first Gram matrix
#   coefficients  a, b, c of every step, one after the other:  X <- aX + (bA + cA^2) X,  A = XX'
#   gram   iterate on R = XX' instead, X <- QX at the end:  B = bR + cR^2, Q <- aQ + BQ, R <- (a + B) R (a + B)
#   restarts  steps (1 ... T - 1) after which X <- QX and R is computed anew; [] unless gram
#   P      ragged list or []: P <- (1 - decay) P - size X in place of a result; size, decay, skip as above
#   -> the results, of dtype (empty list with P); (N, 2) float64: what X was multiplied by altogether, in two factors.
#      Zero matrices stay zero; those with non-finite entries give anything, alone
_library.define(
    "newton_schulz(Tensor[] X, Tensor factor, bool schatten4, float[] coefficients, bool gram, int[] restarts,"
    " ScalarType dtype, Tensor(a!)[] P, Tensor? size, Tensor? decay, Tensor? skip) -> (Tensor[], Tensor)"
)


@torch.library.register_fake(f"{NAMESPACE}::newton_schulz")
def _newton_schulz_fake(X, factor, schatten4, coefficients, gram, restarts, dtype, P, size, decay, skip):
    out = [] if P else [like(x, dtype) for x in X]
    return out, factor.new_empty((counts(X), 2), dtype=torch.float64)


def triples(coefficients):
    """(a, b, c) of every step."""
    return [tuple(coefficients[i : i + 3]) for i in range(0, len(coefficients), 3)]


def factors_of(X, factor):
    """(k, 2) of every stack, or None."""
    return [None] * len(X) if factor is None else list(factor.split([x.shape[0] for x in X]))


def rounded(x, pair, dtype):
    """f x rounded to dtype, in acc_dtype(dtype) until then; x itself where it is so already."""
    if pair is not None:
        wide = acc_dtype(dtype)
        x = x.to(wide if x.dtype != torch.float64 else x.dtype)
        x = x * pair[:, 0, None, None].to(x.dtype) * pair[:, 1, None, None].to(x.dtype)
    return x.to(dtype)
