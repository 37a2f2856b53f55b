"""Dense methods: exact singular values by torch.linalg, and the deterministic upper side by Gram squaring."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.contracts import acc_dtype


def spectral_norms(stacks: Sequence[Tensor], method: str, tol: float) -> Tensor:
    """(N,) sigma_max of every matrix of a ragged list; NaN and inf for such input; differentiable for finite input."""
    compute = _svd if method == "svd" else _gram
    return torch.cat([_guarded(a, compute, tol) for a in stacks])


def _guarded(A: Tensor, compute, tol: float) -> Tensor:  # type: ignore[no-untyped-def]
    """Scale by powers of two, keep non-finite matrices out of the computation, scale back."""
    acc = acc_dtype(A.dtype)
    k, m, n = A.shape
    if k == 0 or m == 0 or n == 0:
        return A.to(acc).sum((1, 2)) if A.requires_grad else A.new_zeros(k, dtype=acc)
    with torch.no_grad():
        amax = A.double().abs().amax((1, 2))  # NaN propagates
        nan, inf = amax.isnan(), A.isinf().flatten(1).any(1)
        zero = amax == 0
        bad = nan | inf | zero
        exponent = torch.frexp(torch.where(bad, torch.ones_like(amax), amax)).exponent
        # two factors: one may leave the range; float64, since ldexp's backward is 0 for negative integer exponents
        down = (-exponent // 2).double()
        up = -exponent - down
    x = torch.where(bad[:, None, None], torch.zeros_like(A, dtype=torch.float64), A.double())
    x = torch.ldexp(torch.ldexp(x, down[:, None, None]), up[:, None, None])
    value = compute(x if n <= m else x.mT, tol)
    value = torch.ldexp(torch.ldexp(value, -down), -up)
    value = torch.where(zero, 0.0, torch.where(nan, torch.nan, torch.where(inf, torch.inf, value)))
    return value.to(acc)


def _svd(x: Tensor, tol: float) -> Tensor:
    return torch.linalg.svdvals(x)[:, 0] if not x.requires_grad else torch.linalg.matrix_norm(x, 2)


def _gram(x: Tensor, tol: float) -> Tensor:
    """Schatten norm S_q with r^(1/q) <= 1 + tol, an upper bound of sigma_max at most that far above it.

    G <- (G / f)'(G / f), lg <- 2 (lg + ln f); S_(2^(j+1)) = exp((ln ||G||_F + lg) / 2^j) (facts of Gram iteration,
    Delattre et al. 2023).
    """
    r = x.shape[2]
    squarings = max(1, math.ceil(math.log2(max(2.0, math.log(max(r, 2)) / math.log1p(tol)))) - 1)
    g, log = x, x.new_zeros(x.shape[0])
    for _ in range(squarings):
        f = torch.linalg.matrix_norm(g)
        safe = torch.where(f > 0, f, torch.ones_like(f))
        g = g / safe[:, None, None]
        log = 2 * (log + safe.log())
        g = g.mT @ g
    f = torch.linalg.matrix_norm(g)
    value = torch.exp((torch.where(f > 0, f, torch.ones_like(f)).log() + log) / 2**squarings)
    return torch.where(f > 0, value, torch.zeros_like(value))
