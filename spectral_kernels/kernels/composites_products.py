"""Newton–Schulz over the product words; a backend may replace it. See contracts_products.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contracts import acc_dtype
from .contracts_products import triples


def schatten_factor(R: Sequence[Tensor], factor: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) 1 / ||R||_F^1/2, 1 where R is zero, and `factor` with it, (N, 2)."""
    # in float64: squares of squares of 2^24 entries near 2^20 leave the range of float32
    square = torch.cat([torch.linalg.vector_norm(r, dim=(1, 2), dtype=torch.float64) for r in R])
    usable = square > 0
    inverse = torch.where(usable, torch.where(usable, square, 1).rsqrt(), 1).to(factor.dtype)
    return inverse, torch.stack((factor[:, 0], factor[:, 1] * inverse), 1)


def newton_schulz(
    words: Any,
    X: Sequence[Tensor],
    factor: Tensor,
    schatten4: bool,
    coefficients: Sequence[float],
    gram: bool,
    restarts: Sequence[int],
    dtype: torch.dtype,
    P: Sequence[Tensor],
    size: Tensor | None,
    decay: Tensor | None,
    skip: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    steps = triples(coefficients)
    own, used = factor.to(acc_dtype(dtype)), factor.double()
    Y = list(X)
    R = words.gram(Y, own, dtype)
    if schatten4:
        inverse, own = schatten_factor(R, own)
        used = torch.stack((used[:, 0], used[:, 1] * inverse.double()), 1)
        squares = (inverse**2).split([r.shape[0] for r in R])
        R = [(r.to(s.dtype) * s[:, None, None]).to(dtype) for r, s in zip(R, squares, strict=True)]
    pending: Tensor | None = own  # not yet multiplied into Y
    Q: list[Tensor] | None = None
    for t, (a, b, c) in enumerate(steps):
        last = t == len(steps) - 1
        B = words.square_add(R, b, c)
        if gram:
            again = not last and t + 1 not in restarts
            if again:
                half = words.multiply_add(B, R, None, a, True, dtype)
                R = words.multiply_add(B, half, None, a, True, dtype)
            Q = shifted(B, a) if Q is None else words.multiply_add(B, Q, None, a, True, dtype)
            if again:
                continue
        if last and P:
            words.multiply_update_(P, Q if gram else shifted(B, a), Y, pending, size, decay, skip, dtype)
            return [], used
        Y = words.multiply_add(Q if gram else B, Y, pending, 0.0 if gram else a, False, dtype)
        pending, Q = None, None
        if not last:
            R = words.gram(Y, None, dtype)
    return Y, used


def shifted(B: Sequence[Tensor], a: float) -> list[Tensor]:
    """a I + B, in place."""
    for b in B:
        b.diagonal(dim1=1, dim2=2).add_(a)
    return list(B)
