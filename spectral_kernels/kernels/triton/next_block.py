"""The block of the next step: two launches, one program per matrix in each.

    small   T = Z diag(lambda) Z' by Jacobi rotations; C = the leading T z, orthonormal in the basis; the upper bound
    block   V = C Q, then as many random rows, orthonormal to those before, as fill b rows

Rotations (jacobi.py) go on until what is off the diagonal is 1e-8 of T, less than T's own rounding. A block after one
read has b columns, hence b - 1 rounds a sweep, and three sweeps do; squaring T, as rayleigh_ritz.py does, would cost
twenty products for each of the b - fresh vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import INFO_COLUMNS
from .draws import draw_key, normal, signed_base
from .jacobi import jacobi
from .ragged import on, table

INFO_FIELDS = tl.constexpr(INFO_COLUMNS)
REST = tl.constexpr(1e-16)  # square of the 1e-8 above


@triton.jit
def _leading(t, P, Z, C, columns, rows, b, kept, floor, ORDER: tl.constexpr, B: tl.constexpr):
    """C (B, ORDER) := T z of the `kept` leading vectors, orthonormalized in descending order, without those that leave
    nothing above the floor; returns how many there are."""
    d = tl.arange(0, ORDER)
    i = tl.arange(0, B)[:, None]
    c = tl.arange(0, ORDER)[None, :]
    values = tl.where(d < columns, tl.load(P + d * (ORDER + 1)), float("-inf"))
    Y = tl.zeros((B, ORDER), tl.float64)
    count = 0
    for _ in range(0, kept):
        which = tl.min(tl.where(values == tl.max(values, axis=0), d, ORDER - 1), axis=0)
        values = tl.where(d == which, float("-inf"), values)
        y = tl.zeros((1, ORDER), tl.float64)
        for start in range(0, columns, 8):
            k = start + tl.arange(0, 8)[:, None]
            z = tl.load(Z + k * ORDER + which, mask=k < columns, other=0.0)
            y += tl.sum(
                z * tl.load(t + k * rows + c, mask=(k < columns) & (c < columns + b), other=0.0), axis=0, keep_dims=True
            )
        for _sweep in range(2):
            y -= tl.sum(tl.sum(Y * y, axis=1, keep_dims=True) * Y, axis=0, keep_dims=True)
        norm = tl.sqrt(tl.sum(tl.sum(y * y, axis=1), axis=0))
        enough = norm > floor
        Y = tl.where(i == tl.where(enough, count, B), y / tl.where(enough, norm, 1.0), Y)
        count += enough.to(tl.int32)
    tl.store(C + i * ORDER + c, Y.to(tl.float32))
    return count


@triton.jit
def _upper(t, row, theta, columns, rows, b, ORDER: tl.constexpr, B: tl.constexpr):
    """The root of the largest eigenvalue of [[theta, r], [r, tau]], with room for rounding; contracts.py."""
    c = tl.arange(0, ORDER)[None, :]
    behind = tl.arange(0, B)[:, None]
    R = tl.load(t + (columns + behind) * rows + c, mask=(behind < b) & (c < columns), other=0.0)
    r2 = tl.sum(tl.sum(R * R, axis=1), axis=0)
    frob2 = tl.load(row + 8)
    room = frob2 * 2.0**-17  # 64 eps
    tau = tl.maximum(frob2 - tl.load(row + 11), 0.0) + room
    half = (theta - tau) / 2
    square = (theta + tau) / 2 + tl.sqrt(half * half + r2) + room
    return tl.sqrt(tl.minimum(square, frob2 + room)) / tl.load(row + 10)


@triton.jit(do_not_specialize=["T", "info", "upper", "C", "found", "scratch", "rows", "b", "fresh"])
def small_kernel(
    T, info, upper, C, found, scratch, rows, b, fresh, ORDER: tl.constexpr, SLICE: tl.constexpr, B: tl.constexpr
):
    """found: rows of C, -1 where the block stays."""
    j = tl.program_id(0).to(tl.int64)
    row = info + j * INFO_FIELDS
    sigma = tl.load(row)
    theta = tl.load(row + 1)
    if (theta > 0) & (tl.abs(sigma) < float("inf")):
        columns = tl.load(row + 12).to(tl.int32)
        t = T + j * rows * rows
        P = scratch + j * 4 * ORDER * ORDER
        new_P = P + ORDER * ORDER
        Z = new_P + ORDER * ORDER
        new_Z = Z + ORDER * ORDER
        c = tl.arange(0, ORDER)[None, :]
        for start in range(0, ORDER, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            x = tl.load(t + r * rows + c, mask=(r < columns) & (c < columns), other=0.0)
            tl.store(P + r * ORDER + c, x)
            tl.store(new_P + r * ORDER + c, x * 0.0)
            tl.store(Z + r * ORDER + c, tl.where(r == c, 1.0, x * 0.0))
        tl.debug_barrier()
        players = (columns + 1) // 2 * 2
        P, Z = jacobi(P, Z, new_P, new_Z, players, ORDER, REST, ORDER, SLICE)
        own = C + j * B * ORDER
        # floor: 8 eps theta
        tl.store(found + j, _leading(t, P, Z, own, columns, rows, b, b - fresh, theta * 2.0**-20, ORDER, B))
        tl.store(upper + j, _upper(t, row, theta, columns, rows, b, ORDER, B))
    else:
        tl.store(found + j, -1)
        tl.store(upper + j, 0.0)


@triton.jit(do_not_specialize=["table", "info", "Q", "V", "C", "found", "step", "rows", "b"])
def block_kernel(table, info, Q, V, C, found, step, rows, b, ORDER: tl.constexpr, B: tl.constexpr, COLS: tl.constexpr):
    """V = C Q in four rows of Q at a time, then random rows. A new row is written where it will stay and made
    orthogonal there, twice; barriers stand between threads that read and threads that write."""
    j = tl.program_id(0).to(tl.int64)
    count = tl.load(found + j)
    if count >= 0:
        n = tl.load(table + 3 * j).to(tl.int32)
        offset = tl.load(table + 3 * j + 1)
        q = Q + offset * rows
        v = V + offset * b
        K = tl.load(info + j * INFO_FIELDS + 12).to(tl.int32) + b
        i = tl.arange(0, B)[None, :, None]
        for first in range(0, n, COLS):
            c = first + tl.arange(0, COLS)[None, None, :]
            X = tl.zeros((1, B, COLS), tl.float32)
            for start in range(0, K, 4):
                k = start + tl.arange(0, 4)[:, None, None]
                share = tl.load(C + j * B * ORDER + i * ORDER + k, mask=k < K, other=0.0)
                basis = tl.load(q + k.to(tl.int64) * n + c, mask=(k < K) & (c < n), other=0.0)
                X += tl.sum(share * basis, axis=0, keep_dims=True)
            tl.store(v + i * n + c, X, mask=(i < b) & (c < n))
        one = tl.zeros((1, 1, 1), tl.int64)
        key = draw_key(tl.load(table + 3 * j + 2 + one), tl.load(step + j + one))
        floor = 1e-6 * tl.sqrt(n.to(tl.float64))
        for draw in range(0, b):
            if count < b:
                tl.debug_barrier()
                x = v + count * n
                h = tl.zeros((1, B, 1), tl.float32)
                for first in range(0, n, COLS):
                    c = first + tl.arange(0, COLS)[None, None, :]
                    w = tl.where(c < n, normal(key, draw * n + c), 0.0)
                    rows_before = tl.load(v + i * n + c, mask=(i < count) & (c < n), other=0.0)
                    h += tl.sum(rows_before * w, axis=2, keep_dims=True)
                    tl.store(x + c, w, mask=c < n)
                square = tl.zeros((1, 1, 1), tl.float64)
                for _ in range(2):
                    tl.debug_barrier()
                    again = tl.zeros((1, B, 1), tl.float32)
                    square = tl.zeros((1, 1, 1), tl.float64)
                    for first in range(0, n, COLS):
                        c = first + tl.arange(0, COLS)[None, None, :]
                        w = tl.load(x + c, mask=c < n, other=0.0)
                        rows_before = tl.load(v + i * n + c, mask=(i < count) & (c < n), other=0.0)
                        w -= tl.sum(h * rows_before, axis=1, keep_dims=True)
                        again += tl.sum(rows_before * w, axis=2, keep_dims=True)
                        wide = w.to(tl.float64)
                        square += tl.sum(wide * wide, axis=2, keep_dims=True)
                        tl.debug_barrier()
                        tl.store(x + c, w, mask=c < n)
                    h = again
                norm = tl.sqrt(tl.sum(tl.sum(tl.sum(square, axis=2), axis=1), axis=0))
                kept = norm > floor
                inverse = tl.where(kept, 1.0 / tl.where(kept, norm, 1.0), 0.0).to(tl.float32)
                tl.debug_barrier()
                for first in range(0, n, COLS):
                    c = first + tl.arange(0, COLS)[None, None, :]
                    w = tl.load(x + c, mask=c < n, other=0.0)
                    tl.debug_barrier()
                    tl.store(x + c, tl.where(kept, w * inverse, 0.0), mask=c < n)
                count += kept.to(tl.int32)


# One compilation of `small_kernel` per power of two above the rows of T: a warp holds 16 x 16 numbers, larger ones go
# through registers in slices.
ORDERS = (16, 32, 64, 128)
BLOCK_LIMIT = 8
HIP = torch.version.hip is not None


def small_options(order: int, b: int, hip: bool = HIP) -> dict[str, int]:
    warps = {16: 1, 32: 4, 64: 8, 128: 8}[order]
    return {
        "ORDER": order,
        "SLICE": {16: 16, 32: 32, 64: 32, 128: 16}[order],
        "B": 4 if b <= 4 else 8,
        "num_warps": max(1, warps // 2) if hip else warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def block_options(order: int, b: int, hip: bool = HIP) -> dict[str, int]:
    wide = b <= 4
    return {
        "ORDER": order,
        "B": 4 if wide else 8,
        "COLS": 1024 if wide else 512,
        "num_warps": 4 if hip else 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _describe(m: Sequence[int], n: Sequence[int], seed: int) -> tuple[list[int], None]:
    entries: list[int] = []
    offset = 0
    for rows, size in zip(m, n, strict=True):
        entries += (size, offset, signed_base(seed, rows, size))
        offset += size
    return entries, None


def next_block_(
    m: Sequence[int],
    n: Sequence[int],
    Q: Tensor,
    T: Tensor,
    info: Tensor,
    V: Tensor,
    step: Tensor,
    b: int,
    fresh: int,
    seed: int,
) -> Tensor:
    """The block of the next step, and an upper bound of sigma_max; see contracts.py. No host sync."""
    N, rows = len(n), T.shape[1]
    upper = torch.empty(N, dtype=torch.float64, device=V.device)
    if N == 0:
        return upper
    order = next((power for power in ORDERS if power >= rows), 0)
    if not order:
        raise NotImplementedError(f"the Triton next_block_ holds up to {ORDERS[-1]} basis rows, not {rows}")
    key = ("next_block_", tuple(m), tuple(n), seed)
    described = table(key, V.device, lambda: _describe(m, n, seed))
    small = small_options(order, b)
    scratch = V.new_empty(4 * N * order * order, dtype=torch.float64)
    C = V.new_empty(N * small["B"] * order)
    found = V.new_empty(N, dtype=torch.int32)
    with on(V.device):
        small_kernel[(N,)](T, info, upper, C, found, scratch, rows, b, fresh, **small)
        block_kernel[(N,)](described.tensor, info, Q, V, C, found, step, rows, b, **block_options(order, b))
    return upper


def supports(dtype: torch.dtype, b: int) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel works on float32 blocks, not for {str(dtype).removeprefix('torch.')}"
    if not 1 <= b <= BLOCK_LIMIT:
        return f"the Triton kernel serves blocks of 1 to {BLOCK_LIMIT} columns, not {b}"
    return None
