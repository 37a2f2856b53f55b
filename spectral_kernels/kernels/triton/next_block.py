"""The block of the next step: two launches, one program per matrix in each.

    small   T = Z diag(lambda) Z' by Jacobi rotations; C = the leading T z, orthonormal in the basis; the upper bound
    block   V = C Q, then as many random rows, orthonormal to those before, as fill b rows

A round of Jacobi turns players / 2 disjoint pairs of columns at once; players - 1 rounds pair every two columns (a
round-robin tournament), and sweeps go on until what is off the diagonal is 1e-8 of T, less than T's own rounding. All
of it is in float64, through memory: a round reads one copy of T and writes the other. A block after one read has b
columns, hence b - 1 rounds a sweep, and three sweeps do; squaring T, as rayleigh_ritz.py does, would cost twenty
products for each of the b - fresh vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import random
from ..contracts import INFO_COLUMNS
from .ragged import on, table

INFO_FIELDS = tl.constexpr(INFO_COLUMNS)
SWEEPS = tl.constexpr(12)  # at most; four or five do
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
C1 = tl.constexpr(0xBF58476D1CE4E5B9)
C2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _partner(i, turn, players):
    """Who meets player i in this round: numbers that sum to `turn` modulo players - 1; the last takes who is left."""
    last = players - 1
    p = (turn - i + last) % last
    p = tl.where(p == i, last, p)
    p = tl.where(i == last, (turn * (players // 2)) % last, p)
    return tl.where(i < players, p, i)


@triton.jit
def _rotation(P, i, p, ORDER: tl.constexpr):
    """New column i = cos (column i) + sin (column p): what makes entry (i, p) zero. Both of a pair see the same."""
    apart = tl.load(P + p * (ORDER + 1)) - tl.load(P + i * (ORDER + 1))
    between = 2 * tl.load(P + tl.minimum(i, p) * ORDER + tl.maximum(i, p))
    turns = (p != i) & (between != 0)
    t = between / tl.where(turns, tl.abs(apart) + tl.sqrt(apart * apart + between * between), 1.0)
    t = tl.where((apart > 0) | ((apart == 0) & (i < p)), t, -t)
    cos = tl.rsqrt(1.0 + t * t)
    return tl.where(turns, cos, 1.0), tl.where(turns, -t * cos, 0.0)


@triton.jit
def _round(P, Z, new_P, new_Z, turn, players, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """One round: new_P = J' P J, new_Z = Z J. The rotations, roots and quotients in float64, cost the most: once a
    column, and for the rows of a tile that holds all of them not again."""
    c = tl.arange(0, ORDER)[None, :]
    pc = _partner(c, turn, players)
    cos_c, sin_c = _rotation(P, c, pc, ORDER)
    for start in range(0, players, SLICE):
        r = start + tl.arange(0, SLICE)[:, None]
        if SLICE == ORDER:
            pr, cos_r, sin_r = tl.trans(pc), tl.trans(cos_c), tl.trans(sin_c)
        else:
            pr = _partner(r, turn, players)
            cos_r, sin_r = _rotation(P, r, pr, ORDER)
        keep = (r < players) & (c < players)
        own = cos_c * tl.load(P + r * ORDER + c, mask=keep, other=0.0)
        own += sin_c * tl.load(P + r * ORDER + pc, mask=keep, other=0.0)
        other = cos_c * tl.load(P + pr * ORDER + c, mask=keep, other=0.0)
        other += sin_c * tl.load(P + pr * ORDER + pc, mask=keep, other=0.0)
        turned = tl.where((c == pr) & (c != r), 0.0, cos_r * own + sin_r * other)
        tl.store(new_P + r * ORDER + c, turned, mask=keep)
        vectors = cos_c * tl.load(Z + r * ORDER + c, mask=keep, other=0.0)
        vectors += sin_c * tl.load(Z + r * ORDER + pc, mask=keep, other=0.0)
        tl.store(new_Z + r * ORDER + c, vectors, mask=keep)
    tl.debug_barrier()


@triton.jit
def _rest(P, players, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """Sums of squares off the diagonal and of all of P."""
    c = tl.arange(0, ORDER)[None, :]
    off = tl.zeros((SLICE, ORDER), tl.float64)
    whole = tl.zeros((SLICE, ORDER), tl.float64)
    for start in range(0, players, SLICE):
        r = start + tl.arange(0, SLICE)[:, None]
        x = tl.load(P + r * ORDER + c, mask=(r < players) & (c < players), other=0.0)
        whole += x * x
        off += tl.where(r == c, 0.0, x * x)
    return tl.sum(tl.sum(off, axis=1), axis=0), tl.sum(tl.sum(whole, axis=1), axis=0)


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
        off, whole = _rest(P, players, ORDER, SLICE)
        for _ in range(SWEEPS):
            if off > whole * 1e-16:
                for turn in range(0, players - 1):
                    _round(P, Z, new_P, new_Z, turn, players, ORDER, SLICE)
                    P, new_P = new_P, P
                    Z, new_Z = new_Z, Z
                off, whole = _rest(P, players, ORDER, SLICE)
        own = C + j * B * ORDER
        # floor: 8 eps theta
        tl.store(found + j, _leading(t, P, Z, own, columns, rows, b, b - fresh, theta * 2.0**-20, ORDER, B))
        tl.store(upper + j, _upper(t, row, theta, columns, rows, b, ORDER, B))
    else:
        tl.store(found + j, -1)
        tl.store(upper + j, 0.0)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * C1
    z = (z ^ (z >> 27)) * C2
    return z ^ (z >> 31)


@triton.jit
def _normal(key, at):
    """Number `at` of a draw: random.py. Angles are reduced to an eighth of a turn; the series err by 2e-9 there."""
    z = _mix((at >> 1).to(tl.uint64) * GOLDEN + key)
    radius = tl.sqrt(-2.0 * tl.log(((z >> 32).to(tl.float64) + 0.5) * 2.0**-32)).to(tl.float32)
    a = z.to(tl.uint32).to(tl.int64)
    quarter = (a + (1 << 29)) >> 30
    x = (((a - (quarter << 30)).to(tl.float64) + 0.5) * (6.283185307179586 * 2.0**-32)).to(tl.float32)
    s = x * x
    sine = x * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 - s * (1 / 3628800)))))
    quarter = (quarter + 3 * (at & 1)) & 3  # an odd number is the sine: the cosine of a quarter turn less
    value = tl.where((quarter & 1) == 0, cosine, sine)
    return radius * tl.where((quarter == 1) | (quarter == 2), -value, value)


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
        key = _mix((tl.load(table + 3 * j + 2 + one) + tl.load(step + j + one) + 2).to(tl.uint64))
        floor = 1e-6 * tl.sqrt(n.to(tl.float64))
        for draw in range(0, b):
            if count < b:
                tl.debug_barrier()
                x = v + count * n
                h = tl.zeros((1, B, 1), tl.float32)
                for first in range(0, n, COLS):
                    c = first + tl.arange(0, COLS)[None, None, :]
                    w = tl.where(c < n, _normal(key, draw * n + c), 0.0)
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
        base = random.base(seed, rows, size)
        entries += (size, offset, base - (1 << 64) if base >> 63 else base)
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
