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

from ..contracts import INFO_COLUMNS, left_out
from ..contracts import NEW_ENERGY as ENERGY
from .block_gram import gram
from .jacobi import jacobi
from .mixing import FIELDS, Mixer, order_of, small_options
from .ragged import on

INFO_FIELDS = tl.constexpr(INFO_COLUMNS)
NEW_ENERGY = tl.constexpr(ENERGY)
LEFT_OUT = tl.constexpr(left_out(torch.float32))  # of the largest eigenvalue
REST = tl.constexpr(1e-26)  # 1e-13 of a matrix, squared: directions are used down to LEFT_OUT lambda_1
TAU = tl.constexpr((8 * 2.0**-23) ** 0.5)  # of sigma_1: below, nothing is known
SCRATCH = tl.constexpr(4)  # matrices of even order that `eigen_kernel` needs


@triton.jit(do_not_specialize=["info", "X", "values", "vectors", "scratch", "b"])
def eigen_kernel(info, X, values, vectors, scratch, b, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """values (N, b), descending, those below 0 as 0, and vectors (N, b, b), columns, of symmetric X (N, b, b)."""
    j = tl.program_id(0).to(tl.int64)
    if tl.load(info + j * INFO_FIELDS + 5) == 0:
        ld = (b + 1) // 2 * 2
        P = scratch + j * SCRATCH * ld * ld
        Z = P + ld * ld
        x = X + j * b * b
        c = tl.arange(0, ORDER)[None, :]
        for start in range(0, ld, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            inside = (r < b) & (c < b)
            keep = (r < ld) & (c < ld)
            one = tl.load(x + r * b + c, mask=inside, other=0.0)
            two = tl.load(x + c * b + r, mask=inside, other=0.0)
            tl.store(P + r * ld + c, 0.5 * (one + two), mask=keep)
            tl.store(Z + r * ld + c, tl.where(r == c, 1.0, 0.0).to(tl.float64), mask=keep)
        tl.debug_barrier()
        P, Z = jacobi(P, Z, Z + ld * ld, Z + 2 * ld * ld, ld, ld, REST, ORDER, SLICE)
        diagonal = tl.load(P + c * (ld + 1), mask=c < b, other=0.0)
        place = tl.zeros((1, ORDER), tl.int32)
        for k in range(0, b):
            other = tl.load(P + k * (ld + 1))
            place += ((other > diagonal) | ((other == diagonal) & (k < c))).to(tl.int32)
        tl.store(values + j * b + place, tl.maximum(diagonal, 0.0), mask=c < b)
        for start in range(0, b, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            keep = (r < b) & (c < b)
            tl.store(vectors + j * b * b + r * b + place, tl.load(Z + r * ld + c, mask=keep, other=0.0), mask=keep)


@triton.jit
def _product(A, across, down, X, r, c, b, SLICE: tl.constexpr, ORDER: tl.constexpr):
    """Rows r of A X; entry (r, k) of A is at r * across + k * down."""
    total = tl.zeros((SLICE, ORDER), tl.float64)
    for k in range(0, b):
        left = tl.load(A + r * across + k * down, mask=r < b, other=0.0)
        total += left * tl.load(X + k * b + c, mask=c < b, other=0.0)
    return total


@triton.jit(do_not_specialize=["info", "S", "H", "values", "T", "between", "F", "found", "b"])
def whiten_kernel(info, S, H, values, T, between, F, found, b, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """T, which holds E, becomes E lambda^-1/2, and F = T' H T; found: 0, or -1 for what is done or not finite."""
    j = tl.program_id(0).to(tl.int64)
    usable = tl.load(info + j * INFO_FIELDS + 5) == 0
    at = j * b * b
    c = tl.arange(0, ORDER)[None, :]
    if usable:
        wrong = tl.zeros((SLICE, ORDER), tl.float64)
        lambdas = tl.load(values + j * b + c, mask=c < b, other=0.0)
        kept = lambdas > tl.load(values + j * b) * LEFT_OUT
        half = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, lambdas, 1.0)), 0.0)
        for start in range(0, b, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            keep = (r < b) & (c < b)
            here = at + r * b + c
            wrong += tl.load(S + here, mask=keep, other=0.0) * 0.0 + tl.load(H + here, mask=keep, other=0.0) * 0.0
            tl.store(T + here, half * tl.load(T + here, mask=keep, other=0.0), mask=keep)
        usable = tl.sum(tl.sum(wrong, axis=1), axis=0) == 0
        tl.debug_barrier()
        for start in range(0, b, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            x = _product(H + at, b, 1, T + at, r, c, b, SLICE, ORDER)
            tl.store(between + at + r * b + c, x, mask=(r < b) & (c < b))
        tl.debug_barrier()
        for start in range(0, b, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            x = _product(T + at, 1, b, between + at, r, c, b, SLICE, ORDER)
            tl.store(F + at + r * b + c, x, mask=(r < b) & (c < b))
    tl.store(found + j, usable.to(tl.int32) - 1)


@triton.jit
def _entry(x, c, index):
    """Number `index` of a row."""
    return tl.sum(tl.sum(tl.where(c == index, x, 0.0), axis=1), axis=0)


@triton.jit(do_not_specialize=[
    "table", "info", "scale", "rank", "limit", "before", "lambdas", "thetas", "T", "U", "found", "left", "right",
    "rows", "b", "fresh", "tol", "has_limit",
])  # fmt: skip
def clip_kernel(
    table, info, scale, rank, limit, before, lambdas, thetas, T, U, found, left, right, rows, b, fresh, tol, has_limit,
    ORDER: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """left, right, rows (N, b, b): what L, R and the next block are of Y and W; found: rows of the block that are not
    random, -1 where the matrix stays as it is."""
    j = tl.program_id(0).to(tl.int64)
    if tl.load(found + j) >= 0:
        row = info + j * INFO_FIELDS
        sizes = table + j * FIELDS
        c = tl.arange(0, ORDER)[None, :]
        theta = tl.load(thetas + j * b + c, mask=c < b, other=0.0)
        kept = theta > tl.load(thetas + j * b) * LEFT_OUT
        sigma = tl.where(kept, tl.sqrt(theta), 0.0)
        top = _entry(sigma, c, 0)
        least = _entry(sigma, c, b - 1)
        beyond = least < 0
        if has_limit != 0:
            last = tl.load(limit + j) * tl.load(scale + j).to(tl.float64)
            beyond = (least > last) & (b < tl.minimum(tl.load(sizes), tl.load(sizes + 1)))
            last = tl.where(beyond, least, last)
        else:
            last = _entry(sigma, c, tl.load(rank + j).to(tl.int32) - 1)
        tau = tl.maximum(last, top * TAU)
        frob2 = tl.load(row + 8)
        if (tau > 0) | (frob2 > 0):
            excess = tl.maximum(sigma - tau, 0.0)
            inverse = tl.where(kept, 1.0 / tl.where(kept, sigma, 1.0), 0.0)
            at = j * b * b
            for start in range(0, b, SLICE):
                r = start + tl.arange(0, SLICE)[:, None]
                keep = (r < b) & (c < b)
                x = _product(T + at, b, 1, U + at, r, c, b, SLICE, ORDER)
                v = x * inverse
                tl.store(rows + at + c * b + r, v.to(tl.float32), mask=keep)
                tl.store(left + at + c * b + r, (x * excess).to(tl.float32), mask=keep)
                tl.store(right + at + c * b + r, tl.where(excess > 0, v, 0.0).to(tl.float32), mask=keep)
            known = tl.sum(tl.sum((kept & (c < b)).to(tl.int32), axis=1), axis=0)
            tl.store(found + j, tl.minimum(known, b - fresh))
            if tau > 0:
                trace = tl.sum(tl.sum(sigma * sigma, axis=1), axis=0)
                outside = tl.maximum(frob2 - trace, 0.0)
                behind = tl.sqrt(tl.load(lambdas + j * b + c, mask=c < b, other=0.0))
                gap = tl.where(c < b, tl.where(sigma >= tau, sigma - behind, 0.0), float("-inf"))
                gap = tl.max(tl.max(gap, axis=1), axis=0) / tau
                one = tl.load(before + 2 * j)
                two = tl.load(before + 2 * j + 1)
                missed = outside / (tau * tau)
                expected = tl.where((one < 0) | (two < 0), 0.0, tl.minimum(one, two * frob2 / (tau * tau)))
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
            else:  # the block sees nothing of this matrix: all rows of the next one are random
                tl.store(row + 3, float("inf"))
        else:
            tl.store(found + j, -1)


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
    T, U, F, between = (V.new_empty((N, b, b), dtype=torch.float64) for _ in range(4))
    lambdas, thetas = (V.new_empty((N, b), dtype=torch.float64) for _ in range(2))
    left, right, rows = (V.new_empty((N, b, b)) for _ in range(3))
    mixer = Mixer(m, n, b, seed, found, step)
    H = gram(W, n, b)
    options = small_options(order_of(b))
    with on(V.device):
        eigen_kernel[(N,)](info, S, lambdas, T, scratch, b, **options)
        whiten_kernel[(N,)](info, S, H, lambdas, T, between, F, found, b, **options)
        eigen_kernel[(N,)](info, F, thetas, U, scratch, b, **options)
        clip_kernel[(N,)](
            mixer.table.tensor, info, scale, rank, before if limit is None else limit, before, lambdas, thetas, T, U,
            found, left, right, rows, b, fresh, tol, int(limit is not None), **options,
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
