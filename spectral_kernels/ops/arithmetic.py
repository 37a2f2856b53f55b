"""The two recursions in the arithmetic of a device, in numpy: products summed in float32 and rounded to the operands'.

No torch here: what is measured must not depend on the caller's matmul precision, default device, autocast or tracing.
Matrices are float32 arrays that hold values of the dtype (float64 for float64), stacks in leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .polynomials import Triple, compose

Matrix = NDArray[Any]

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Errors of the Gram matrix in units of roundoff ||R||, and of an update R <- W R W, W = aI + B, in units of
# roundoff (a ||W R|| + ||R'||), since the first product W R is rounded and then multiplied by up to a. Spectral norms
# measured over Gaussian, log-spaced, rank-1, rank-m/4 and constant matrices of 8 x 16, 128 x 128 and 512 x 512 with the
# Keller and the 5-step Polar Express list: below 0.9 and 2.04 in the halves, where one rounding ends a product; below
# 14.2 and 18.3 where the sums round too. (Updates of constant float32 matrices reach 130, along their one direction and
# without harm: outputs stay within 0.004. float64 is taken to be like float32.)
GRAM_ERROR = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 16.0, torch.float64: 16.0}
UPDATE_ERROR = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 32.0, torch.float64: 32.0}


def rounded(x: Matrix, dtype: torch.dtype) -> Matrix:
    """x rounded to nearest, ties to even, to the values of dtype; float32 (float64 for float64)."""
    if dtype == torch.float64:
        return np.asarray(x, np.float64)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32)
        if dtype == torch.float16:
            return x.astype(np.float16).astype(np.float32)
        if dtype == torch.bfloat16:
            bits = x.view(np.uint32)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            near = (bits + (np.uint32(0x7FFF) + even)) & np.uint32(0xFFFF0000)
            return np.where(np.isnan(x), x, near.view(np.float32))
    return x


def _symmetric(x: Matrix) -> Matrix:
    """One half is computed and mirrored."""
    return np.tril(x) + np.swapaxes(np.tril(x, -1), -1, -2)


def standard(X: Matrix, steps: Sequence[Triple], dtype: torch.dtype) -> Matrix:
    """A = XX', B = bA + cA^2, X <- aX + BX, each rounded to dtype; X: (..., m, n), m <= n."""
    with np.errstate(all="ignore"):
        X = rounded(X, dtype)
        for a, b, c in _in(X, steps):
            A = _symmetric(rounded(X @ np.swapaxes(X, -1, -2), dtype))
            B = _symmetric(rounded(b * A + c * (A @ A), dtype))
            X = rounded(a * X + B @ X, dtype)
    return X


def gram(X: Matrix, steps: Sequence[Triple], dtype: torch.dtype, restarts: Sequence[int]) -> Matrix:
    """R = XX'; B = bR + cR^2, Q <- aQ + BQ, R <- (aI + B) R (aI + B); X <- QX at the end and at the restarts."""
    with np.errstate(all="ignore"):
        X = rounded(X, dtype)
        identity = np.eye(X.shape[-2], dtype=X.dtype)
        R = Q = identity
        for i, (a, b, c) in enumerate(_in(X, steps)):
            fresh = i == 0 or i in restarts
            if fresh:
                X = rounded(Q @ X, dtype) if i else X
                R = _symmetric(rounded(X @ np.swapaxes(X, -1, -2), dtype))
            B = _symmetric(rounded(b * R + c * (R @ R), dtype))
            Q = rounded(a * identity + B, dtype) if fresh else _symmetric(rounded(a * Q + B @ Q, dtype))
            if i + 1 < len(steps) and i + 1 not in restarts:
                WR = _symmetric(rounded(a * R + B @ R, dtype))
                R = _symmetric(rounded(a * WR + WR @ B, dtype))
        return rounded(Q @ X, dtype)


def _in(X: Matrix, steps: Sequence[Triple]) -> list[tuple[Any, Any, Any]]:
    """The coefficients as scalars of X's type: a Python float would do too, a float64 one would widen the products."""
    return [(X.dtype.type(a), X.dtype.type(b), X.dtype.type(c)) for a, b, c in steps]


def worst_gram(
    steps: Sequence[Triple], dtype: torch.dtype, restarts: Sequence[int], top: float
) -> tuple[float, float, float]:
    """(largest |output|, largest deviation for inputs from 0.05, largest gain Q) of method "gram" for inputs up to top.

    One singular value at a time: its r = sigma^2 is off by the whole error of the Gram matrix, downwards or upwards,
    and again after every update. An r that came out negative grows by a^2 a step until the polynomial diverges there;
    a random matrix may miss it. Steps between two neighbouring restarts are those of method "standard" and exact here.
    """
    sigma = np.concatenate([np.geomspace(1e-7, 1e-2, 100), np.linspace(0.01, top, 200)])
    exact = compose(tuple(steps), sigma)
    roundoff = ROUNDOFF[dtype]
    largest = deviation = gain = 0.0
    with np.errstate(all="ignore"):
        for sign in (-1, 1):
            x, r, q = sigma, np.zeros_like(sigma), np.ones_like(sigma)
            for i, (a, b, c) in enumerate(steps):
                if i == 0 or i in restarts:
                    x, q = x * q, np.ones_like(q)
                    alone = i + 1 == len(steps) or i + 1 in restarts  # a segment of one step: as in "standard"
                    r = x * x + (0 if alone else sign * GRAM_ERROR[dtype] * roundoff * (x * x).max())
                w = a + r * (b + r * c)
                wr = r * w
                r = wr * w
                r = r + sign * UPDATE_ERROR[dtype] * roundoff * (abs(a) * np.abs(wr).max() + np.abs(r).max())
                q = q * w
                gain = max(gain, float(np.nan_to_num(np.abs(q), nan=np.inf).max()))
            x = np.nan_to_num(x * q, nan=np.inf)
            largest = max(largest, float(np.abs(x).max()))
            deviation = max(deviation, float(np.abs(x - exact)[sigma >= 0.05].max(initial=0.0)))
    return largest, deviation, gain


__all__ = ["ROUNDOFF", "gram", "rounded", "standard", "worst_gram"]
