"""Rows mixed by small matrices: OUT = C X for flat blocks X (b, n_j) and one (rows, b) matrix C a block, and the C that
makes the rows of X orthonormal in order.

    G = X X' = K K' (Cholesky, float64)    X <- K^-1 X, twice

is Gram-Schmidt in order up to rounding (the second time is for what float32 lost in the first): a row whose remainder
is not above LEAST of its length becomes a zero row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_gram import gram
from .draws import draw_key, normal, signed_base
from .ragged import Table, on, table
from .wide_read import heights

LEAST = tl.constexpr(1e-12)  # square of the 1e-6 that reference_step.fill asks of a random row
FIELDS = tl.constexpr(5)  # m, n, places of m and of n, key less the step
HIP = torch.version.hip is not None
COLS = 64


@triton.jit(do_not_specialize=["table", "found", "C", "X", "OUT", "step", "items", "b", "rows", "side"])
def mix_kernel(
    table, found, C, X, OUT, step, items, b, rows, side,
    WIDE: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """COLS columns of OUT (rows, n) = C X, which may be X itself. side: 0 for blocks (b, m_j), 1 for (b, n_j).

    DRAWS: random rows from `found` on. A matrix with found = -1 is left alone."""
    item = tl.load(table + items + tl.program_id(0))
    j = item >> 32
    count = tl.load(found + j)
    if count >= 0:
        mine = table + j * FIELDS
        n = tl.load(mine + side).to(tl.int32)
        place = tl.load(mine + 2 + side)
        x = X + place * b
        out = OUT + place * rows
        own = C + j * b * b
        c = (item & 0xFFFFFFFF).to(tl.int32) * COLS + tl.arange(0, COLS)[None, :]
        wide = tl.arange(0, WIDE)[:, None]
        narrow = WIDE + tl.arange(0, 16)[:, None]
        W0 = tl.zeros((WIDE, COLS), tl.float32)
        W1 = tl.zeros((16, COLS), tl.float32)
        for k in range(0, b):
            row = tl.load(x + k * n + c, mask=c < n, other=0.0)
            W0 += tl.load(own + wide * b + k, mask=wide < rows, other=0.0) * row
            if NARROW > 0:
                W1 += tl.load(own + narrow * b + k, mask=narrow < rows, other=0.0) * row
        last = rows
        if DRAWS:
            last = count
        tl.debug_barrier()  # all that this program reads of X has been read
        tl.store(out + wide * n + c, W0, mask=(wide < last) & (c < n))
        if NARROW > 0:
            tl.store(out + narrow * n + c, W1, mask=(narrow < last) & (c < n))
        if DRAWS:
            zero = tl.zeros((1, COLS), tl.int64)
            key = draw_key(tl.load(mine + 4 + zero), tl.load(step + j + zero))
            for row in range(count, rows):
                tl.store(out + row * n + c, normal(key, (row - count) * n.to(tl.int64) + c), mask=c < n)


@triton.jit(do_not_specialize=["found", "G", "A", "D", "C", "b"])
def factor_kernel(found, G, A, D, C, b, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """C = K^-1 in float32 from G = K K', by eliminating below the diagonal of [G | I]; A, D: scratch as large as G."""
    j = tl.program_id(0).to(tl.int64)
    if tl.load(found + j) >= 0:
        g = G + j * b * b
        a = A + j * b * b
        d = D + j * b * b
        c = tl.arange(0, ORDER)[None, :]
        for start in range(0, b, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            keep = (r < b) & (c < b)
            tl.store(a + r * b + c, tl.load(g + r * b + c, mask=keep, other=0.0), mask=keep)
            tl.store(d + r * b + c, tl.where(r == c, 1.0, 0.0).to(tl.float64), mask=keep)
        for k in range(0, b):
            tl.debug_barrier()
            pivot = tl.load(a + k * b + k)
            kept = pivot > tl.load(g + k * b + k) * LEAST
            inverse = tl.where(kept, 1.0 / tl.where(kept, pivot, 1.0), 0.0)
            right = tl.load(a + k * b + c, mask=(c > k) & (c < b), other=0.0)
            done = tl.load(d + k * b + c, mask=c <= k, other=0.0)
            for start in range((k + 1) // SLICE * SLICE, b, SLICE):
                r = start + tl.arange(0, SLICE)[:, None]
                below = (r > k) & (r < b)
                share = tl.load(a + r * b + k, mask=below, other=0.0) * inverse
                at = a + r * b + c
                keep = below & (c > k) & (c < b)
                tl.store(at, tl.load(at, mask=keep, other=0.0) - share * right, mask=keep)
                at = d + r * b + c
                keep = below & (c <= k)
                tl.store(at, tl.load(at, mask=keep, other=0.0) - share * done, mask=keep)
        tl.debug_barrier()
        for start in range(0, b, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            keep = (r < b) & (c < b)
            pivot = tl.load(a + r * b + r, mask=r < b, other=0.0)
            kept = pivot > tl.load(g + r * b + r, mask=r < b, other=0.0) * LEAST
            length = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, pivot, 1.0)), 0.0)
            numbers = tl.load(d + r * b + c, mask=keep, other=0.0) * length
            tl.store(C + j * b * b + r * b + c, numbers.to(tl.float32), mask=keep)


ORDERS = (16, 32, 64, 128)  # powers of two above b


def order_of(b: int) -> int:
    return next(power for power in ORDERS if power >= b)


def small_options(order: int, hip: bool = HIP) -> dict[str, int]:
    """Of kernels with one program a matrix, which holds SLICE rows of ORDER numbers in registers."""
    warps = {16: 1, 32: 4, 64: 8, 128: 8}[order]
    return {
        "ORDER": order,
        "SLICE": {16: 16, 32: 32, 64: 32, 128: 16}[order],
        "num_warps": max(1, warps // 2) if hip else warps,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def mix_options(rows: int) -> dict[str, int]:
    """Sums in float32 on the ordinary cores: b^2 n of them are little, and cancellation leaves TF32 too few bits."""
    wide, narrow = heights(rows)
    return {"WIDE": wide, "NARROW": narrow, "COLS": COLS, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def _describe(m: Sequence[int], n: Sequence[int], seed: int) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    fields: list[int] = []
    left = right = 0
    for rows, columns in zip(m, n, strict=True):
        fields += (rows, columns, left, right, signed_base(seed, rows, columns))
        left, right = left + rows, right + columns
    launches = []
    for sizes in (m, n):
        items = [j << 32 | panel for j, size in enumerate(sizes) for panel in range(-(-size // COLS))]
        launches.append((len(fields), len(items)))
        fields += items
    return fields, tuple(launches)


class Mixer:
    """Launches of both kernels for blocks of matrices (m_j, n_j); found (N,) int32: -1 where a matrix stays."""

    def __init__(self, m: Sequence[int], n: Sequence[int], b: int, seed: int, found: Tensor, step: Tensor) -> None:
        self._n, self._b, self._found, self._step = tuple(n), b, found, step
        key = ("mixing", tuple(m), self._n, seed)
        self.table: Table = table(key, found.device, lambda: _describe(m, n, seed))

    def mix(self, C: Tensor, X: Tensor, out: Tensor, rows: int, side: int, draws: bool = False) -> None:
        """out (rows, size_j) = the first rows of C (N, b, b) times X (b, size_j), m_j with side 0 and n_j with 1."""
        start, items = self.table.sizes[side]
        if items and rows:
            with on(X.device):
                mix_kernel[(items,)](
                    self.table.tensor, self._found, C, X, out, self._step, start, self._b, rows, side, DRAWS=draws,
                    **mix_options(rows),
                )  # fmt: skip

    def orthonormalize_(self, X: Tensor) -> None:
        """The rows of every block (b, n_j), in order."""
        N, b = len(self._n), self._b
        C = X.new_empty((N, b, b))
        A, D = (X.new_empty((N, b, b), dtype=torch.float64) for _ in range(2))
        for _ in range(2):
            G = gram(X, self._n, b)
            with on(X.device):
                factor_kernel[(N,)](self._found, G, A, D, C, b, **small_options(order_of(b)))
            self.mix(C, X, X, b, 1)
