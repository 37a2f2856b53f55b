"""The small algebra of a clipped step: two eigenproblems of order b a matrix, and rows mixed by what comes out.

    S = E diag(lambda) E'               T = E lambda^-1/2: Y T is orthonormal
    T' W W' T = U diag(sigma^2) U'      (T U)' Y = u',    (T U / sigma)' W = v'

by Jacobi rotations in float64 (jacobi.py), one program a matrix; gram.py has W W', mixing.py L, R and the next block.
A tracked block is close to the singular vectors already: S is nearly diagonal, and few sweeps do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import INFO_COLUMNS
from ..contracts import NEW_ENERGY as ENERGY
from .gram import gram
from .jacobi import jacobi
from .mixing import FIELDS, Mixer, order_of, small_options
from .ragged import on

INFO_FIELDS = tl.constexpr(INFO_COLUMNS)
NEW_ENERGY = tl.constexpr(ENERGY)
EPS = tl.constexpr(2.0**-23)
REST = tl.constexpr(1e-26)  # 1e-13 of a matrix, squared: directions are used down to 4 eps lambda_1
TAU = tl.constexpr((8 * 2.0**-23) ** 0.5)  # of sigma_1: below, nothing is known
SCRATCH = tl.constexpr(7)  # matrices of even order that `small_kernel` needs


@triton.jit
def _start(P, Z, players, ld, x, r, c):
    """P := x, Z := the identity in the rows of a slice."""
    keep = (r < players) & (c < players)
    tl.store(P + r * ld + c, x, mask=keep)
    tl.store(Z + r * ld + c, tl.where(r == c, 1.0, x * 0.0), mask=keep)


@triton.jit
def _sorted(P, b, ld, ORDER: tl.constexpr):
    """(1, ORDER) each: the diagonal of P, negative ones as 0, and where every entry stands in descending order."""
    c = tl.arange(0, ORDER)[None, :]
    values = tl.load(P + c * (ld + 1), mask=c < b, other=0.0)
    place = tl.zeros((1, ORDER), tl.int32)
    for k in range(0, b):
        other = tl.load(P + k * (ld + 1))
        place += ((other > values) | ((other == values) & (k < c))).to(tl.int32)
    return tl.maximum(values, 0.0), tl.where(c < b, place, c)


@triton.jit
def _times(A, across, down, X, OUT, b, ld, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """OUT = A X; entry (r, k) of A is at r * across + k * down, X and OUT have rows `ld` apart."""
    c = tl.arange(0, ORDER)[None, :]
    tl.debug_barrier()
    for start in range(0, b, SLICE):
        r = start + tl.arange(0, SLICE)[:, None]
        total = tl.zeros((SLICE, ORDER), tl.float64)
        for k in range(0, b):
            left = tl.load(A + r * across + k * down, mask=r < b, other=0.0)
            total += left * tl.load(X + k * ld + c, mask=c < b, other=0.0)
        tl.store(OUT + r * ld + c, total, mask=(r < b) & (c < b))
    tl.debug_barrier()


@triton.jit(do_not_specialize=[
    "table", "S", "H", "scale", "rank", "limit", "before", "info", "found", "scratch", "left", "right", "rows", "b",
    "fresh", "tol", "has_limit",
])  # fmt: skip
def small_kernel(
    table, S, H, scale, rank, limit, before, info, found, scratch, left, right, rows, b, fresh, tol, has_limit,
    ORDER: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """H: W W'. left, right, rows (N, b, b): what L, R and the next block are of Y and W; found: rows of the block that
    are not random, -1 where the matrix stays as it is."""
    j = tl.program_id(0).to(tl.int64)
    row = info + j * INFO_FIELDS
    sizes = table + j * FIELDS
    tl.store(found + j, -1)
    if tl.load(row + 5) == 0:
        ld = (b + 1) // 2 * 2
        P = scratch + j * SCRATCH * ld * ld
        Z = P + ld * ld
        new_P = Z + ld * ld
        new_Z = new_P + ld * ld
        T = new_Z + ld * ld
        F = T + ld * ld
        values = F + ld * ld
        c = tl.arange(0, ORDER)[None, :]
        s = S + j * b * b
        h = H + j * b * b
        wrong = tl.zeros((SLICE, ORDER), tl.float64)
        for start in range(0, ld, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            keep = (r < b) & (c < b)
            x = 0.5 * (tl.load(s + r * b + c, mask=keep, other=0.0) + tl.load(s + c * b + r, mask=keep, other=0.0))
            wrong += (x + tl.load(h + r * b + c, mask=keep, other=0.0)) * 0.0
            _start(P, Z, ld, ld, x, r, c)
        if tl.sum(tl.sum(wrong, axis=1), axis=0) == 0:
            tl.debug_barrier()
            P1, Z1 = jacobi(P, Z, new_P, new_Z, ld, ld, REST, ORDER, SLICE)
            squares, place = _sorted(P1, b, ld, ORDER)
            top = tl.max(tl.max(squares, axis=1), axis=0)
            kept = (squares > top * (4 * EPS)) & (c < b)
            half = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, squares, 1.0)), 0.0)
            tl.store(values + place, tl.sqrt(squares), mask=c < b)
            for start in range(0, b, SLICE):
                r = start + tl.arange(0, SLICE)[:, None]
                keep = (r < b) & (c < b)
                tl.store(T + r * ld + c, half * tl.load(Z1 + r * ld + c, mask=keep, other=0.0), mask=keep)
            # (T' H T), in F; P1 is one of the two copies, both free now
            _times(h, b, 1, T, new_P, b, ld, ORDER, SLICE)
            _times(T, 1, ld, new_P, F, b, ld, ORDER, SLICE)
            for start in range(0, ld, SLICE):
                r = start + tl.arange(0, SLICE)[:, None]
                keep = (r < b) & (c < b)
                x = 0.5 * (
                    tl.load(F + r * ld + c, mask=keep, other=0.0) + tl.load(F + c * ld + r, mask=keep, other=0.0)
                )
                _start(P, Z, ld, ld, x, r, c)
            tl.debug_barrier()
            P2, Z2 = jacobi(P, Z, new_P, new_Z, ld, ld, REST, ORDER, SLICE)
            theta, place = _sorted(P2, b, ld, ORDER)
            first = tl.max(tl.max(theta, axis=1), axis=0)
            kept = (theta > first * (4 * EPS)) & (c < b)
            sigma = tl.where(kept, tl.sqrt(theta), 0.0)
            top = tl.max(tl.max(sigma, axis=1), axis=0)
            least = tl.sum(tl.sum(tl.where((place == b - 1) & (c < b), sigma, 0.0), axis=1), axis=0)
            beyond = least < 0
            if has_limit != 0:
                last = tl.load(limit + j) * tl.load(scale + j).to(tl.float64)
                beyond = (least > last) & (b < tl.minimum(tl.load(sizes), tl.load(sizes + 1)))
                last = tl.where(beyond, least, last)
            else:
                index = tl.load(rank + j).to(tl.int32) - 1
                last = tl.sum(tl.sum(tl.where((place == index) & (c < b), sigma, 0.0), axis=1), axis=0)
            tau = tl.maximum(last, top * TAU)
            if tau > 0:
                excess = tl.maximum(sigma - tau, 0.0)
                inverse = tl.where(kept, 1.0 / tl.where(kept, sigma, 1.0), 0.0)
                _times(T, ld, 1, Z2, F, b, ld, ORDER, SLICE)  # (T U): column i belongs to place[i]
                for start in range(0, b, SLICE):
                    r = start + tl.arange(0, SLICE)[:, None]
                    keep = (r < b) & (c < b)
                    x = tl.load(F + r * ld + c, mask=keep, other=0.0)
                    at = j * b * b + place * b + r
                    v = x * inverse
                    tl.store(rows + at, v.to(tl.float32), mask=keep)
                    tl.store(left + at, (x * excess).to(tl.float32), mask=keep)
                    tl.store(right + at, tl.where(excess > 0, v, 0.0).to(tl.float32), mask=keep)
                trace = tl.sum(tl.sum(sigma * sigma, axis=1), axis=0)
                frob2 = tl.load(row + 8)
                outside = tl.maximum(frob2 - trace, 0.0)
                behind = tl.load(values + place, mask=c < b, other=0.0)
                gap = tl.where(c < b, tl.where(sigma >= tau, sigma - behind, 0.0), float("-inf"))
                gap = tl.max(tl.max(gap, axis=1), axis=0) / tau
                one = tl.load(before + 2 * j)
                two = tl.load(before + 2 * j + 1)
                expected = tl.minimum(one, two * frob2 / (tau * tau))
                expected = tl.where((one < 0) | (two < 0), 0.0, expected)
                missed = outside / (tau * tau)
                error = gap + tl.maximum(missed - expected, 0.0) * NEW_ENERGY
                done = (error <= tol) | (b >= tl.load(sizes + 1))
                tl.store(before + 2 * j, missed)
                tl.store(before + 2 * j + 1, outside / tl.where(frob2 > 0, frob2, 1.0))
                tl.store(row, top / tl.load(row + 10))
                tl.store(row + 1, top * top)
                tl.store(row + 3, error)
                tl.store(row + 5, done.to(tl.float64))
                tl.store(row + 11, trace)
                tl.store(row + 12, b.to(tl.float64))
                tl.store(row + 13, tau)
                tl.store(row + 14, outside)
                tl.store(row + 15, beyond.to(tl.float64))
                whole = tl.sum(tl.sum(kept.to(tl.int32), axis=1), axis=0)
                tl.store(found + j, tl.minimum(whole, b - fresh))


WIDEST = 80


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
    """Triplets of the part that the block reaches, correction, error estimate, next block; see contracts.py. No host
    sync."""
    N = len(n)
    if N == 0:
        return
    found = torch.empty(N, dtype=torch.int32, device=V.device)
    scratch = V.new_empty(N * SCRATCH.value * (b + b % 2) ** 2, dtype=torch.float64)
    left, right, rows = (V.new_empty((N, b, b)) for _ in range(3))
    mixer = Mixer(m, n, b, seed, found, step)
    H = gram(W, n, b)
    with on(V.device):
        small_kernel[(N,)](
            mixer.table.tensor, S, H, scale, rank, before if limit is None else limit, before, info, found, scratch,
            left, right, rows, b, fresh, tol, int(limit is not None), **small_options(order_of(b)),
        )  # fmt: skip
    mixer.mix(left, Y, L, r, 0)
    mixer.mix(right, W, R, r, 1)
    mixer.mix(rows, W, V, b, 1, draws=True)
    mixer.orthonormalize_(V)


def supports(dtype: torch.dtype, b: int) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel works on float32 blocks, not for {str(dtype).removeprefix('torch.')}"
    if not 1 <= b <= WIDEST:
        return f"the Triton kernel serves blocks of 1 to {WIDEST} columns, not {b}"
    return None
