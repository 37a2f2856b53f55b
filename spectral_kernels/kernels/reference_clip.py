"""The small algebra of a clipped step in plain torch: the oracle of every other backend. See contracts.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from . import random
from .contracts import INFO, NEW_ENERGY, left_out
from .reference import orthonormalize, supports  # noqa: F401  `supports` is the registry's
from .reference_step import fill


def clip_(
    m: Sequence[int],
    n: Sequence[int],
    V: Tensor,
    L: Tensor,
    R: Tensor,
    info: Tensor,
    W: Tensor,
    S: Tensor,
    Y: Tensor,
    scale: Tensor,
    rank: Tensor,
    limit: Tensor | None,
    before: Tensor,
    step: Tensor,
    b: int,
    r: int,
    fresh: int,
    tol: float,
    seed: int,
) -> None:
    """Triplets of the part that the block reaches, correction, error estimate, next block. See contracts.py."""
    first = left = right = 0
    for (rows, columns), group in groupby(zip(m, n, strict=True)):
        k = len(list(group))
        mine = slice(first, first + k)

        def part(x: Tensor, height: int, at: int, side: int, k: int = k) -> Tensor:
            return x[height * at : height * (at + k * side)].view(k, height, side)

        draws = random.draws([random.base(seed, rows, columns)] * k, 2 + step[mine], b * columns)
        _clip_stack(
            part(V, b, right, columns),
            part(L, r, left, rows),
            part(R, r, right, columns),
            info[mine],
            part(W, b, right, columns),
            S[mine],
            part(Y, b, left, rows),
            scale[mine],
            rank[mine],
            None if limit is None else limit[mine],
            before[mine],
            draws.view(k, b, columns),
            min(rows, columns),
            r,
            fresh,
            tol,
        )
        first, left, right = first + k, left + k * rows, right + k * columns


def _clip_stack(
    v: Tensor,
    left: Tensor,
    right: Tensor,
    info: Tensor,
    w: Tensor,
    S: Tensor,
    y: Tensor,
    scale: Tensor,
    rank: Tensor,
    limit: Tensor | None,
    before: Tensor,
    draws: Tensor,
    short: int,
    r: int,
    fresh: int,
    tol: float,
) -> None:
    """Matrices of one shape, (k, ...) each; v, left, right, info and before are replaced."""
    b, n = v.shape[1:]
    eps, least = torch.finfo(v.dtype).eps, left_out(v.dtype)
    live = (info[:, INFO["done"]] == 0) & S.isfinite().all(2).all(1) & w.isfinite().all(2).all(1)
    S = torch.where(live[:, None, None], S, 0)
    wide = torch.where(live[:, None, None], w, 0).double()
    values, E = torch.linalg.eigh(S)
    values, E = values.flip(1).clamp(min=0), E.flip(2)
    kept = values > least * values[:, :1]
    T = torch.where(kept[:, None], E / torch.where(kept, values, 1).sqrt()[:, None], 0)  # (k, b, b)
    C = T.mT @ wide  # Q'A, (k, b, n); from the Gram matrix of W it would have the rounding of sigma_1^4 over lambda
    squares, U = torch.linalg.eigh(C @ C.mT)
    sigma, U = squares.flip(1).clamp(min=0).sqrt(), U.flip(2)
    T = (T @ U).mT  # row i: u_i = sum over c of T[i, c] (row c of y)
    kept = sigma**2 > least * sigma[:, :1] ** 2
    sigma = torch.where(kept, sigma, 0)
    inverse = torch.where(kept, 1 / torch.where(kept, sigma, 1), 0)[:, :, None]

    top, index = sigma[:, 0], (rank - 1)[:, None]
    last = sigma.gather(1, index)[:, 0] if limit is None else torch.full_like(top, 0.0)
    beyond = torch.zeros_like(live)
    if limit is not None:
        last = limit * scale.double()
        beyond = (sigma[:, -1] > last) & (b < short)
        last = torch.where(beyond, sigma[:, -1], last)
    tau = torch.maximum(last, (8 * eps) ** 0.5 * top)
    known = tau > 0
    unit = torch.where(known, tau, 1)

    Z = ((U.mT * inverse) @ C).to(v.dtype)
    excess = (sigma - tau[:, None]).clamp(min=0)[:, :r, None]
    new_left = (T[:, :r] * excess).to(v.dtype) @ y
    new_right = Z[:, :r] * (excess > 0)
    trace = (sigma**2).sum(1)
    frob2 = info[:, INFO["frob2"]]
    outside = (frob2 - trace).clamp(min=0)
    gap = torch.where(sigma >= tau[:, None], sigma - values.sqrt(), 0).amax(1) / unit
    expected = torch.minimum(before[:, 0], before[:, 1] * frob2 / unit**2)
    gained = (outside / unit**2 - torch.where((before < 0).any(1), 0, expected)).clamp(min=0)
    error = gap + NEW_ENERGY * gained

    lost = live & ~known & (frob2 > 0)
    live = live & known
    basis, _ = orthonormalize(Z[:, : b - fresh], Z[:, :0], torch.zeros_like(top))
    block = fill(basis, draws)
    there = live[:, None, None]
    v.copy_(torch.where(there | lost[:, None, None], block, v))
    left.copy_(torch.where(there, new_left, left))
    right.copy_(torch.where(there, new_right, right))
    found = {
        "sigma": top / info[:, INFO["scale"]],
        "theta": top**2,
        "trace": trace,
        "columns": torch.full_like(top, b),
        "error": error,
        "done": ((error <= tol) | (b >= n)).double(),
        "tau": tau,
        "outside": outside,
        "beyond": beyond.double(),
    }
    for name, value in found.items():
        info[:, INFO[name]] = torch.where(live, value, info[:, INFO[name]])
    info[:, INFO["error"]] = torch.where(lost, torch.inf, info[:, INFO["error"]])
    missed = torch.stack((outside / unit**2, outside / torch.where(frob2 > 0, frob2, 1)), 1)
    before.copy_(torch.where(live[:, None], missed, before))
