"""The tracker: singular vectors of a ragged list of matrices, kept up to date by a read or a few at a time.

One read, `gram_matvec`, serves a block of four directions per matrix: the current vector, two companions and one that
takes up fresh randomness. docs/parametrization.md has what that buys over one blind power step.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.composites import SAFE_EXPONENT, safe_scale
from ..kernels.contracts import INFO, NAMESPACE, STATS, acc_dtype
from .estimate import BASIS_COLUMNS, BLOCK, MIN_READS, MOST_READS, warm_blocks
from .norm import AccuracyWarning

FRESH = 0.3  # share of new randomness in the last companion, per update; docs/parametrization.md has the choice
KRYLOV_READS = 8  # up to so many reads keep the Krylov space, 4 (m + n) numbers each; more go to block_krylov


class _Run(NamedTuple):
    """Consecutive matrices of one shape, n the tracked side: they are served as one batch."""

    k: int
    m: int
    n: int


@torch.library.custom_op(f"{NAMESPACE}::track_", mutates_args=("right", "left", "blocks"))
def track_(
    A: list[Tensor], right: list[Tensor], left: list[Tensor], blocks: list[Tensor], reads: int, tol: float, seed: int
) -> Tensor:
    """One update of the singular vectors of every matrix; opaque to torch.compile.

    A (m_i, n_i), equal shapes adjacent, one dtype and device; right (n_i,) and left (m_i,) singular vectors; blocks
    (4, n_i): a random direction, rotated by one entry an update, and three companions of the right vector.
    -> (N,) acc: sigma = left' A right of the new vectors, NaN or inf for such a matrix, whose vectors stay.
    """
    with torch.no_grad():
        return track(A, right, left, blocks, reads, tol, seed)


@track_.register_fake
def _(A: Any, right: Any, left: Any, blocks: Any, reads: int, tol: float, seed: int) -> Tensor:
    return A[0].new_empty((len(A),), dtype=acc_dtype(A[0].dtype))


def track(
    A: Sequence[Tensor],
    right: list[Tensor],
    left: list[Tensor],
    blocks: list[Tensor],
    reads: int,
    tol: float,
    seed: int,
) -> Tensor:
    acc = acc_dtype(A[0].dtype)
    runs = _runs(A)
    stacks = [a[None] for a in A]
    words = registry.words(A[0].device.type, A[0].dtype, BLOCK)
    V = _start(right, blocks, runs, acc)
    if tol > 0 or reads > KRYLOV_READS:
        V = _converge(words, stacks, V, runs, reads, tol, seed)
        reads = 1

    # block Krylov space of `reads` reads: rows W = (A'A) V and Y = A V, both kept
    scale = torch.ones(len(A), dtype=acc, device=A[0].device)
    W: list[Tensor] = []
    Y: list[Tensor] = []
    basis: list[Tensor] = []
    S, stats, rows = scale, scale, []  # set by the first read
    for read in range(reads):
        if reads > 1:
            V = [_orthonormal(x, q) for x, q in zip(V, basis or [x[:, :0] for x in V], strict=True)]
            basis = _extend(basis, V)
        w, S, found, y = words.gram_matvec(stacks, _flat(V), scale, None, BLOCK, read == 0, True)
        if read == 0:
            stats, rows = found, found.tolist()
            limit = 2.0 ** SAFE_EXPONENT[acc]
            if any(not 1 / limit <= row[STATS["amax"]] <= limit for row in rows):  # zeros too, for which the scale is 1
                scale = safe_scale(stats[:, STATS["amax"]], acc).to(acc)
                w, S, _, y = words.gram_matvec(stacks, _flat(V), scale, None, BLOCK, False, True)
        V = _cut(w, runs, 2)
        W, Y = _extend(W, V), _extend(Y, _cut(y, runs, 1))

    if reads > 1:
        S = torch.cat([_gram(y) for y in Y])
    M = torch.cat([_gram(w) for w in W]) if len(W) > 1 else _gram(W[0])
    bad = None
    if any(row[STATS["nan"]] or row[STATS["inf"]] for row in rows):
        nan, inf = stats[:, STATS["nan"]] > 0, stats[:, STATS["inf"]] > 0
        bad = torch.where(nan, torch.nan, torch.where(inf, torch.inf, 0.0))
    power, Z = _half_step(S, M, None if bad is None else bad != 0, acc)
    _write_back(right, left, blocks, W, Y, Z, power, runs)
    sigma = power[:, 0].sqrt() / scale
    return (sigma if bad is None else sigma + bad).to(acc)


def _runs(A: Sequence[Tensor]) -> list[_Run]:
    out: list[_Run] = []
    for a in A:
        m, n = a.shape
        if out and out[-1].m == m and out[-1].n == n:
            out[-1] = _Run(out[-1].k + 1, m, n)
        else:
            out.append(_Run(1, m, n))
    return out


def _flat(V: Sequence[Tensor]) -> Tensor:
    return V[0].reshape(-1) if len(V) == 1 else torch.cat([x.reshape(-1) for x in V])


def _cut(flat: Tensor, runs: Sequence[_Run], side: int) -> list[Tensor]:
    """One (k, BLOCK, size) view per run."""
    if len(runs) == 1:
        return [flat.view(runs[0].k, BLOCK, runs[0][side])]
    parts = flat.split([run.k * BLOCK * run[side] for run in runs])
    return [part.view(run.k, BLOCK, run[side]) for part, run in zip(parts, runs, strict=True)]


def _extend(rows: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, 1) for pair in zip(rows, more, strict=True)] if rows else more


def _gram(X: Tensor) -> Tensor:
    X = X.double()
    return X @ X.mT


def _start(right: list[Tensor], blocks: list[Tensor], runs: Sequence[_Run], acc: torch.dtype) -> list[Tensor]:
    """(k, BLOCK, n) per run: the current vector and its three companions."""
    out, first = [], 0
    for run in runs:
        mine = slice(first, first + run.k)
        first += run.k
        V = torch.stack(blocks[mine]).to(acc)
        V[:, 0] = torch.stack(right[mine])
        out.append(V)
    return out


def _converge(
    words: Any,
    stacks: Sequence[Tensor],
    V: list[Tensor],
    runs: Sequence[_Run],
    reads: int,
    tol: float,
    seed: int,
) -> list[Tensor]:
    """The leading Ritz vectors after as many reads as `tol` needs (0: after reads - 1), one (k, BLOCK, n) per run.

    A stop rule trusts its start, so as many random rows stand beside the current ones. With two of four rows random
    some norms along a drift were off by more than tol; with four of eight none, in half the reads.
    """
    start = warm_blocks([x for run in V for x in run.split(1)], stacks, seed)
    budget = MOST_READS if tol > 0 else reads - 1
    b = 2 * BLOCK
    info, X, _ = words.block_krylov(stacks, start, b, budget, BASIS_COLUMNS, 1, tol, MIN_READS, seed, BLOCK, False)
    unfinished = int((info[:, INFO["done"]] == 0).sum()) if tol > 0 else 0
    if unfinished:
        warnings.warn(
            f"spectral_norm: {budget} reads did not prove tol={tol:g} for {unfinished} of {len(stacks)} weights; "
            "the next update goes on from there",
            AccuracyWarning,
            stacklevel=2,
        )
    return _cut(X, runs, 2)


def _orthonormal(X: Tensor, Q: Tensor) -> Tensor:
    """X (k, b, n) -> orthonormal rows of what X adds to the rows of Q (k, K, n); zero rows where it adds nothing."""
    length = torch.linalg.vector_norm(X, dim=2, keepdim=True)
    X = X / torch.where(length > 0, length, 1)
    for _ in range(2):
        X = X - (X @ Q.mT) @ Q
        values, vectors = torch.linalg.eigh(torch.nan_to_num(_gram(X), posinf=0.0, neginf=0.0))
        kept = values > 64 * torch.finfo(X.dtype).eps ** 2
        X = (vectors * torch.where(kept, values.rsqrt(), 0)[:, None]).mT.to(X.dtype) @ X
    return X


def _half_step(S: Tensor, M: Tensor, bad: Tensor | None, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stationary values of ||W'z||^2 / ||Y'z||^2, descending (N, b), and their vectors z as columns (N, K, b).

    S = Y Y', M = W W'. The largest is the best lower bound of sigma^2 that the reads support; zeros for bad matrices.
    z' S z = 1, so that Y'z is a unit vector and W'z has length sqrt(value).
    """
    if bad is not None:
        S, M = (torch.where(bad[:, None, None], 0.0, X) for X in (S, M))
    values, vectors = torch.linalg.eigh(S)
    # Y is known to rounding: what lies below it relative to the largest is noise, and would win the quotient
    kept = values > (8 * torch.finfo(acc).eps * values[:, -1:]).clamp(min=torch.finfo(torch.float64).tiny)
    T = vectors * torch.where(kept, values.rsqrt(), 0)[:, None]
    power, Z = torch.linalg.eigh(T.mT @ M @ T)
    return power[:, -BLOCK:].flip(1).clamp(min=0), (T @ Z)[:, :, -BLOCK:].flip(2)


def _write_back(
    right: list[Tensor],
    left: list[Tensor],
    blocks: list[Tensor],
    W: Sequence[Tensor],
    Y: Sequence[Tensor],
    Z: Tensor,
    power: Tensor,
    runs: Sequence[_Run],
) -> None:
    """right <- W'z / |W'z|, left <- Y'z, companions <- the next three, and the random direction rotated.

    Zero and non-finite matrices keep what they had; companions that the reads did not find are random.
    """
    live = power[:, 0] > 0
    all_live = all(live.tolist())
    unit = Z * torch.where(power > 0, power.rsqrt(), 0)[:, None]
    first = 0
    for run, w, y in zip(runs, W, Y, strict=True):
        mine = slice(first, first + run.k)
        first += run.k
        x = unit[mine].mT.to(w.dtype) @ w  # (k, BLOCK, n)
        other = (Z[mine, :, :1].mT.to(y.dtype) @ y)[:, 0]  # (k, m)
        block = torch.stack(blocks[mine]).to(w.dtype)
        before = torch.stack(right[mine]).to(w.dtype)
        # eigenvectors come with either sign: keep the direction, for averages of state_dicts
        sign = torch.where((x[:, 0] * before).sum(1) < 0, -1.0, 1.0)[:, None]
        x[:, 0] *= sign
        other *= sign
        if not all_live:
            keep = ~live[mine, None]
            x = torch.where(keep[..., None], torch.cat((before[:, None], block[:, 1:]), 1), x)
            other = torch.where(keep, torch.stack(left[mine]), other)
        torch._foreach_copy_(right[mine], x[:, 0].unbind())
        torch._foreach_copy_(left[mine], other.unbind())
        g = block[:, 0]
        x[:, 0] = g.roll(1, 1)
        if all_live:
            x[:, 3].add_(g, alpha=FRESH)
        torch._foreach_copy_(blocks[mine], x.unbind())
