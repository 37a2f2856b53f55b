"""The optimizer's step over the words; a backend may replace it by one that goes matrix by matrix. See contracts.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .composites import SAFE_EXPONENT, per_entry, safe_scale, store
from .contracts import INFO, INFO_COLUMNS, STATS, acc_dtype, counts, sides

# Ritz values that the error estimate covers: a value that is about to overtake the leading one from the second place
# has a large residual while that of the leading one is small (docs/tracking.md).
FOLLOWED = 2


def rescale(scale: Tensor, amax: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale to read at, must the read be repeated) from the scale that was read at and max |entry|.

    The old scale (1 where it was 0) stays while scale * amax is in the safe window, where products of four entries are
    exact enough; otherwise the power of two next to 1 / amax, or 1 where that lies in the window too.
    """
    used = torch.where(scale > 0, scale, 1).double()
    limit = 2.0 ** SAFE_EXPONENT[acc]
    inside = (amax * used >= 1 / limit) & (amax * used <= limit)
    again = ~inside & (amax > 0) & torch.isfinite(amax)
    return torch.where(again, safe_scale(amax, acc), used).to(acc), again


def hold_back(bad: Tensor, skip: Tensor | None, owner: Tensor | None, propagate: bool) -> Tensor | None:
    """(N,) bool or None: matrices whose parameter must stay, those of `skip` and the bad ones with their like."""
    if propagate:
        return skip
    if owner is not None:
        flags = torch.zeros_like(bad, dtype=torch.int64).index_add_(0, owner, bad.long())
        bad = flags[owner] > 0
    return bad if skip is None else skip | bad


class FirstRead(NamedTuple):
    """What the momentum pass of a step found, repeated at another scale where it had to be."""

    W: Tensor
    S: Tensor
    Y: Tensor
    info: Tensor  # flags, norms, scale, reads; done where nothing more is to be read
    at: Tensor  # the scale that was read at
    bad: Tensor  # not finite
    idle: Tensor  # skipped or zero: the tracker stays

    def spoil(self, info: Tensor) -> None:
        """sigma of matrices that are not finite, where such entries propagate."""
        nan, inf = info[:, INFO["nan"]] > 0, info[:, INFO["inf"]] > 0
        info[:, INFO["sigma"]] = torch.where(nan, torch.nan, torch.where(inf, torch.inf, info[:, INFO["sigma"]]))


def first_read(
    words: Any,
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    skip: Tensor | None,
    moved: tuple[float, float, bool],
    propagate: bool,
    b: int,
    with_y: bool,
) -> FirstRead:
    """The momentum of every matrix and the first read of it, at a scale where products stay in range."""
    acc, n = acc_dtype(M[0].dtype), sides(M, 2)
    info = torch.zeros((counts(M), INFO_COLUMNS), dtype=torch.float64, device=V.device)
    at = torch.where(scale > 0, scale, 1)
    W, S, stats, Y = words.momentum_gram_matvec_(M, G, V, at, skip, *moved, True, propagate, b, with_y)
    amax = stats[:, STATS["amax"]]
    nan, inf = stats[:, STATS["nan"]] > 0, stats[:, STATS["inf"]] > 0  # a repeated read sees the cleaned momentum
    bad = nan | inf
    at, again = rescale(scale, amax, acc)
    W2, S2, stats2, Y2 = words.momentum_gram_matvec_(M, G, V, at, ~again, *moved, False, propagate, b, with_y)
    W = torch.where(per_entry(again, n, b), W2, W)
    S = torch.where(again[:, None, None], S2, S)
    stats = torch.where(again[:, None], stats2, stats)
    if with_y:
        Y = torch.where(per_entry(again, sides(M, 1), b), Y2, Y)
    gone = torch.zeros_like(bad) if skip is None else skip
    finished = gone | (amax == 0) | (bad if propagate else torch.zeros_like(bad))
    info[:, INFO["amax"]] = amax
    info[:, INFO["nan"]], info[:, INFO["inf"]] = nan.double(), inf.double()
    info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
    info[:, INFO["scale"]] = at.double()
    info[:, INFO["reads"]] = (~gone).double() + again.double()
    info[:, INFO["done"]] = finished.double()
    return FirstRead(W, S, Y, info, at, bad, gone | (amax == 0))


def read_on(
    words: Any,
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    at: Tensor,
    info: Tensor,
    moved: tuple[float, float, bool],
    propagate: bool,
    b: int,
    with_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """W, S, Y of a further read, of the matrices that are not done; counted in info."""
    going = info[:, INFO["done"]] == 0
    info[:, INFO["reads"]] += going.double()
    if moved[2]:  # the look-ahead is nowhere stored
        W, S, _, Y = words.momentum_gram_matvec_(M, G, V, at, ~going, *moved, False, propagate, b, with_y)
    else:
        W, S, _, Y = words.gram_matvec(M, V, at, ~going, b, False, with_y)
    return W, S, Y


def tracked_step_(
    words: Any,
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    step: Tensor,
    size: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    propagate: bool,
    upper: bool,
    b: int,
    fresh: int,
    reads: int,
    tol: float,
    min_reads: int,
    seed: int,
    owner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Momentum, estimate, new block, update; nothing is sent to the host (capturable).

    owner (N,) int64: matrices with one number are one parameter, which stays as a whole where one of them is bad.
    """
    acc, device, N = acc_dtype(M[0].dtype), V.device, counts(M)
    n = sides(M, 2)
    rows = reads * b + b
    if N == 0:
        info = torch.zeros((0, INFO_COLUMNS), dtype=torch.float64, device=device)
        return info, info.new_zeros(0)
    T = torch.zeros((N, rows, rows), dtype=torch.float64, device=device)
    Q = torch.zeros(rows * sum(n), dtype=acc, device=device)
    store(Q, V, n, b, rows)
    moved = (beta, alpha, nesterov)
    first = first_read(words, M, G, V, scale, skip, moved, propagate, b, False)
    info, at, bad, idle = first.info, first.at, first.bad, first.idle

    v, W, S = V.clone(), first.W, first.S
    rayleigh_ritz_, next_block_ = words.rayleigh_ritz_for(reads * b, FOLLOWED), words.next_block_for(rows)
    for read in range(reads):
        if read:
            W, S, _ = read_on(words, M, G, v, at, info, moved, propagate, b, False)
        rayleigh_ritz_(n, Q, v, T, info, W, S, at, b, read * b, FOLLOWED, tol, min_reads)
    bound = next_block_(sides(M, 1), n, Q, T, info, V, step, b, fresh, seed)

    norm = bound if upper else info[:, INFO["sigma"]]
    norm = norm * at.double()
    moves = norm > 0  # of scale * X
    ratio = torch.where(moves, size / torch.where(moves, norm, 1), 0)
    scale.copy_(torch.where(idle, scale, at))
    if propagate:
        ratio = torch.where(bad, torch.nan, ratio)
        first.spoil(info)
        bound = torch.where(bad, info[:, INFO["sigma"]], bound)
    held = hold_back(bad, skip, owner, propagate)
    words.apply_update_(P, M, G if nesterov else [], ratio.to(acc), at, decay, held, beta, alpha)
    return info, bound


def clipped_step_(
    words: Any,
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    before: Tensor,
    step: Tensor,
    size: Tensor,
    decay: Tensor,
    rank: Tensor,
    limit: Tensor | None,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    propagate: bool,
    b: int,
    r: int,
    fresh: int,
    reads: int,
    tol: float,
    seed: int,
    owner: Tensor | None = None,
) -> Tensor:
    """Momentum, leading triplets, update with singular values clipped; nothing is sent to the host (capturable).

    owner as in tracked_step_.
    """
    m, n, moved = sides(M, 1), sides(M, 2), (beta, alpha, nesterov)
    if not m:
        return torch.zeros((0, INFO_COLUMNS), dtype=torch.float64, device=V.device)
    first = first_read(words, M, G, V, scale, skip, moved, propagate, b, True)
    W, S, Y, info, at = first.W, first.S, first.Y, first.info, first.at
    L, R = V.new_zeros(r * sum(m)), V.new_zeros(r * sum(n))
    for read in range(reads):
        if read:
            W, S, Y = read_on(words, M, G, V, at, info, moved, propagate, b, True)
        draw = step + (read << 32)
        words.clip_(m, n, V, L, R, info, W, S, Y, at, rank, limit, before, draw, b, r, fresh, tol, seed)
    tau = info[:, INFO["tau"]]
    ratio = torch.where(tau > 0, size / torch.where(tau > 0, tau, 1), 0)
    scale.copy_(torch.where(first.idle, scale, at))
    if propagate:
        ratio = torch.where(first.bad, torch.nan, ratio)
        first.spoil(info)
    held = hold_back(first.bad, skip, owner, propagate)
    words.apply_update_(P, M, G if nesterov else [], ratio.to(V.dtype), at, decay, held, beta, alpha, L, R, r)
    return info
