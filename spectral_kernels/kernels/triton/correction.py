"""P <- (1 - decay) P - size (scale X - L'R) in one pass over the entries: a tile of L'R on top of a tile of X.

A tile is ROWS x COLS entries, rows along memory: where a matrix is stored column by column, L and R change places. The
product of rank r takes RANK rows of L and R at a time, so that any r is served by one compilation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import counts
from .places import ANY_FLOAT, ELEMENTS, Launch, item_of, launches_of, place_of, places_of, swapped
from .ragged import on, table

HIP = torch.version.hip is not None
FIELDS = tl.constexpr(4)  # of `work`: rows, entries a row, places of rows and of columns


@triton.jit(do_not_specialize=[
    "work", "places", "size", "scale", "decay", "L", "R", "skip", "items", "has_skip", "r", "beta", "alpha",
])  # fmt: skip
def correct_kernel(
    work, places, size, scale, decay, L, R, skip, items, has_skip, r, beta, alpha,
    PARAMETER: tl.constexpr, ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr, FORM: tl.constexpr,
    AHEAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix; L belongs to the rows, R to the entries of a row."""
    j, item, go = item_of(work, items, skip, has_skip)
    if go != 0:
        mine = work + j * FIELDS
        m = tl.load(mine).to(tl.int32)
        n = tl.load(mine + 1).to(tl.int32)
        if FORM == 0:
            n = tl.multiple_of(n, 8)
        across = tl.cdiv(n, COLS)
        row = (item // across) * ROWS + tl.arange(0, ROWS)
        column = (item % across) * COLS + tl.arange(0, COLS)
        left = L + tl.load(mine + 2) * r
        right = R + tl.load(mine + 3) * r
        C = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, r, RANK):
            k = start + tl.arange(0, RANK)
            x = tl.load(left + k[None, :] * m + row[:, None], mask=(k[None, :] < r) & (row[:, None] < m), other=0.0)
            z = tl.load(
                right + k[:, None] * n + column[None, :], mask=(k[:, None] < r) & (column[None, :] < n), other=0.0
            )
            C = tl.dot(x, z, C, input_precision=PRECISION, out_dtype=tl.float32)
        p_base, p_ld, p_step = place_of(places + 9 * j, PARAMETER, FORM)
        m_base, m_ld, m_step = place_of(places + 9 * j + 3, ELEMENT, FORM)
        g_base, g_ld, g_step = place_of(places + 9 * j + 6, GRADIENT, FORM)
        at = row[:, None].to(tl.int64)
        c = column[None, :].to(tl.int64)
        keep = (row[:, None] < m) & (column[None, :] < n)
        p_at = p_base + at * p_ld
        m_at = m_base + at * m_ld
        g_at = g_base + at * g_ld
        if FORM == 2:
            p_at += c * p_step
            m_at += c * m_step
            g_at += c * g_step
        else:
            p_at += c
            m_at += c
            g_at += c
        p = tl.load(p_at, mask=keep, other=0.0).to(ACC)
        x = tl.load(m_at, mask=keep, other=0.0).to(tl.float32).to(ACC)
        if AHEAD:
            g = tl.load(g_at, mask=keep, other=0.0)
            if GRADIENT != tl.float64:
                g = g.to(tl.float32)
            x = x * beta + g.to(ACC) * alpha
        x = x * tl.load(scale + j).to(ACC) - C.to(ACC)
        kept = (1.0 - tl.load(decay + j)).to(ACC)
        tl.store(p_at, (p * kept - tl.load(size + j).to(ACC) * x).to(PARAMETER), mask=keep)


ROWS, COLS = 64, 64


def correct_options(hip: bool = HIP) -> dict[str, object]:
    """How `correct_kernel` is compiled. NVIDIA: three TF32 products a float32 one; AMD's matrix cores take float32."""
    return {
        "ROWS": ROWS,
        "COLS": COLS,
        "RANK": 16,
        "PRECISION": "ieee" if hip else "tf32x3",
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def _describe(sizes: Sequence[tuple[int, int, int]], swaps: Sequence[bool]) -> tuple[list[int], tuple[Launch, ...]]:
    fields: list[int] = []
    work: dict[tuple[int, ...], list[int]] = {}
    sides = [0, 0]  # places of rows and columns of the matrix, whatever lies in a row of memory
    for j, ((form, rows, length), swap) in enumerate(zip(sizes, swaps, strict=True)):
        m, n = (length, rows) if swap else (rows, length)
        fields += (rows, length, *(reversed(sides) if swap else sides))
        items = -(-rows // ROWS) * -(-length // COLS)
        work.setdefault((form, int(swap)), []).extend(j << 32 | item for item in range(items))
        sides = [sides[0] + m, sides[1] + n]
    return launches_of(fields, work)


def correct_(
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    size: Tensor,
    scale: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    L: Tensor,
    R: Tensor,
    r: int,
) -> None:
    """apply_update_ with a correction of rank r > 0; see contracts.py. No host sync."""
    device, ahead = size.device, len(G) > 0
    if counts(P) == 0:
        return
    places = places_of((P, M, G if ahead else M), "lines", device)
    swaps = tuple(swapped(p) for p in P for _ in range(p.shape[0]))
    work = table(("correct", places.sizes, swaps), device, lambda: _describe(places.sizes, swaps))
    gone = (work.tensor if skip is None else skip).view(torch.uint8)
    dtypes = P[0].dtype, M[0].dtype, (G if ahead else M)[0].dtype
    with on(device):
        for (form, swap), start, items in work.sizes:
            if items:
                left, right = (R, L) if swap else (L, R)
                correct_kernel[(items,)](
                    work.tensor, places.tensor, size, scale, decay, left, right, gone, start, int(skip is not None), r,
                    beta, alpha, PARAMETER=ANY_FLOAT[dtypes[0]], ELEMENT=ELEMENTS[dtypes[1]],
                    GRADIENT=ANY_FLOAT[dtypes[2]], ACC=tl.float64 if dtypes[0] == torch.float64 else tl.float32,
                    FORM=form, AHEAD=ahead, **correct_options(),
                )  # fmt: skip
