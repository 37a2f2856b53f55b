"""Exact singular values: a float64 SVD at a scale where nothing leaves the range."""

from __future__ import annotations

import torch
from torch import Tensor


def amax(A: Tensor) -> Tensor:
    """(k,) float64 largest absolute entries; NaN and inf for such matrices."""
    k, m, n = A.shape
    if 0 in A.shape:
        return A.new_zeros(k, dtype=torch.float64)
    return torch.maximum(A.amax((1, 2)), -A.amin((1, 2))).double()


def power(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent in float64, in two factors: one may leave the range."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x.double(), half), exponent - half)


def exponents(largest: Tensor) -> Tensor:
    """(k,) e with largest 2^e in [1/2, 1); 0 for zero and non-finite matrices."""
    usable = torch.isfinite(largest) & (largest > 0)
    return -torch.frexp(torch.where(usable, largest, 1.0)).exponent * usable


def unit_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """float64 U, S, Vh of 2^e A, non-finite matrices as zero; e (k,); finite (k,)."""
    largest = amax(A)
    finite, e = torch.isfinite(largest), exponents(largest)
    x = power(torch.where(finite[:, None, None], A, 0), e[:, None, None])
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    return U, S, Vh, e, finite
