"""The words of a step that go entry by entry: one pass over every matrix, one launch per kind of memory layout.

    momentum_norms_   M <- beta M + alpha G; squares, largest entries, flags and longest rows of M or its look-ahead
    apply_update_     P <- (1 - decay) P - size (scale X - L'R)

Items and their order depend on a matrix's shape alone, partial results are put together in order and nothing is
atomic: a matrix gives the same bits alone and in any list. With a correction of low rank the update goes tile by tile:
correction.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import NORMS, counts
from .correction import correct_
from .momentum_tile import moved
from .places import ANY_FLOAT, ELEMENTS, STRIDED, Launch, item_of, launches_of, place_of, places_of
from .ragged import on, table

RECORD = tl.constexpr(5)  # of a work item of `norms_kernel`: the columns of NORMS
FIELDS = tl.constexpr(6)  # of `work`: rows, entries a row, rows an item, segments a row, first record, records


@triton.jit(do_not_specialize=["work", "places", "scale", "skip", "records", "items", "has_skip", "beta", "alpha"])
def norms_kernel(
    work, places, scale, skip, records, items, has_skip, beta, alpha,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, FORM: tl.constexpr, UPDATE: tl.constexpr, AHEAD: tl.constexpr,
    PROPAGATE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Rows of one segment of columns: the momentum, and a record of what was read."""
    j, item, go = item_of(work, items, skip, has_skip)
    if go != 0:
        mine = work + j * FIELDS
        segments = tl.load(mine + 3).to(tl.int32)
        part = tl.load(mine + 2).to(tl.int32)
        first = (item // segments) * part
        stop = tl.minimum(first + part, tl.load(mine).to(tl.int32))
        K = tl.load(mine + 1).to(tl.int32)
        if FORM == 0:
            K = tl.multiple_of(K, 8)
        left = (item % segments) * SEGMENT
        right = tl.minimum(left + SEGMENT, K)
        m_base, m_ld, m_step = place_of(places + 6 * j, ELEMENT, FORM)
        g_base, g_ld, g_step = place_of(places + 6 * j + 3, GRADIENT, FORM)
        f = tl.load(scale + j)
        largest = tl.zeros((ROWS, COLS), tl.float32)
        flags = tl.zeros((ROWS, COLS), tl.int32)
        frob2 = tl.zeros((ROWS,), tl.float64)
        row2 = tl.zeros((ROWS,), tl.float64)
        for start in range(first, stop, ROWS):
            r = start + tl.arange(0, ROWS)[:, None]
            squares = tl.zeros((ROWS, COLS), tl.float32)
            for column in range(left, right, COLS):
                c = column + tl.arange(0, COLS)[None, :]
                keep = (r < stop) & (c < right)
                m_at = m_base + r.to(tl.int64) * m_ld
                g_at = g_base + r.to(tl.int64) * g_ld
                if FORM == 2:
                    m_at += c.to(tl.int64) * m_step
                    g_at += c.to(tl.int64) * g_step
                else:
                    m_at += c
                    g_at += c
                m = tl.load(m_at, mask=keep, other=0.0).to(tl.float32)
                g = m
                if UPDATE or AHEAD:
                    g = tl.load(g_at, mask=keep, other=0.0).to(tl.float32)
                x, stored, code = moved(m, g, beta, alpha, ELEMENT, UPDATE, AHEAD, PROPAGATE)
                if UPDATE:
                    tl.store(m_at, stored, mask=keep)
                size = tl.abs(x)
                largest = tl.maximum(largest, tl.where(x == x, size, 0.0))
                flags = flags | code
                s = x * f
                squares += s * s
            sums = tl.sum(squares.to(tl.float64), axis=1)
            frob2 += sums
            row2 = tl.maximum(row2, sums)
        out = records + RECORD * (tl.load(mine + 4) + item)
        tl.store(out, tl.sum(frob2, axis=0))
        tl.store(out + 1, tl.max(tl.max(largest, axis=1), axis=0).to(tl.float64))
        tl.store(out + 2, tl.max(tl.max(flags & 1, axis=1), axis=0).to(tl.float64))
        tl.store(out + 3, tl.max(tl.max(flags >> 1, axis=1), axis=0).to(tl.float64))
        tl.store(out + 4, tl.max(row2, axis=0))


@triton.jit(do_not_specialize=["work", "skip", "records", "norms", "has_skip"])
def norms_finish_kernel(work, skip, records, norms, has_skip):
    """One matrix: its records, in order. A row of several segments is one record each: they add up to the row."""
    j = tl.program_id(0).to(tl.int64)
    mine = work + j * FIELDS
    segments = tl.load(mine + 3).to(tl.int32)
    blocks = tl.load(mine + 5).to(tl.int32) // segments
    if has_skip != 0:
        blocks = blocks * (1 - tl.load(skip + j).to(tl.int32))
    frob2 = tl.zeros((128,), tl.float64)
    amax = tl.zeros((128,), tl.float64)
    nan = tl.zeros((128,), tl.float64)
    inf = tl.zeros((128,), tl.float64)
    row2 = tl.zeros((128,), tl.float64)
    for start in range(0, blocks, 128):
        k = start + tl.arange(0, 128)
        row = tl.zeros((128,), tl.float64)
        for segment in range(0, segments):
            here = records + RECORD * (tl.load(mine + 4) + k.to(tl.int64) * segments + segment)
            frob2 += tl.load(here, mask=k < blocks, other=0.0)
            amax = tl.maximum(amax, tl.load(here + 1, mask=k < blocks, other=0.0))
            nan = tl.maximum(nan, tl.load(here + 2, mask=k < blocks, other=0.0))
            inf = tl.maximum(inf, tl.load(here + 3, mask=k < blocks, other=0.0))
            row += tl.load(here + 4, mask=k < blocks, other=0.0)
        row2 = tl.maximum(row2, row)
    out = norms + RECORD * j
    tl.store(out, tl.sum(frob2, axis=0))
    tl.store(out + 1, tl.max(amax, axis=0))
    tl.store(out + 2, tl.max(nan, axis=0))
    tl.store(out + 3, tl.max(inf, axis=0))
    tl.store(out + 4, tl.max(row2, axis=0))


@triton.jit(do_not_specialize=[
    "work", "places", "size", "scale", "decay", "skip", "items", "has_skip", "tiles", "beta", "alpha",
])  # fmt: skip
def apply_kernel(
    work, places, size, scale, decay, skip, items, has_skip, tiles, beta, alpha,
    PARAMETER: tl.constexpr, ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr, FORM: tl.constexpr,
    AHEAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """tiles * TILE entries of one matrix, in the order of its memory where that is one run."""
    j, item, go = item_of(work, items, skip, has_skip)
    if go != 0:
        K = tl.load(work + 2 * j + 1)
        length = tl.load(work + 2 * j) * K
        if FORM == 0:
            length = tl.multiple_of(length, 8)
        here = item.to(tl.int64) * (tiles * TILE)
        p_base, p_ld, p_step = place_of(places + 9 * j, PARAMETER, FORM)
        m_base, m_ld, m_step = place_of(places + 9 * j + 3, ELEMENT, FORM)
        g_base, g_ld, g_step = place_of(places + 9 * j + 6, GRADIENT, FORM)
        f = tl.load(scale + j).to(ACC)
        pull = tl.load(size + j).to(ACC)
        kept = (1.0 - tl.load(decay + j)).to(ACC)
        for _ in range(0, tiles):
            e = tl.arange(0, TILE)
            left = length - here
            if FORM == 0:
                left = tl.multiple_of(left, 8)
            keep = e < left
            if FORM == 2:
                row = here // K
                e = (here - row * K).to(tl.int32) + e
                r = row + e // K.to(tl.int32)
                c = (e % K.to(tl.int32)).to(tl.int64)
                p_at = p_base + r * p_ld + c * p_step
                m_at = m_base + r * m_ld + c * m_step
                g_at = g_base + r * g_ld + c * g_step
            else:
                p_at = p_base + here + e
                m_at = m_base + here + e
                g_at = g_base + here + e
            p = tl.load(p_at, mask=keep, other=0.0).to(ACC)
            x = tl.load(m_at, mask=keep, other=0.0).to(tl.float32).to(ACC)
            if AHEAD:
                g = tl.load(g_at, mask=keep, other=0.0)
                if GRADIENT != tl.float64:
                    g = g.to(tl.float32)
                x = x * beta + g.to(ACC) * alpha
            tl.store(p_at, (p * kept - pull * (x * f)).to(PARAMETER), mask=keep)
            here += TILE


# (ROWS, COLS) of a tile, chosen by the length of a row: 2048 entries are 16 registers of a thread for M and as many
# for G. Rows beyond SEGMENT are cut, so that no sum in float32 has more than 32 terms a lane.
TILES = ((32, 32, 32), (2048, 8, 256), (1 << 62, 1, 2048))  # longest row, ROWS, COLS
SEGMENT = {32: 8192, 256: 8192, 2048: 65536}
ITEM = 32768  # entries of an item, about
TILE = 2048
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def norms_options(rows: int, cols: int, form: int) -> dict[str, int]:
    """Half as many rows where every entry needs addresses of its own."""
    rows = max(1, rows // 2) if form == STRIDED else rows
    return {"ROWS": rows, "COLS": cols, "SEGMENT": SEGMENT[cols], **OPTIONS}


APPLY_OPTIONS = {"TILE": TILE, **OPTIONS}


def _describe_norms(sizes: Sequence[tuple[int, int, int]]) -> tuple[list[int], tuple[tuple[Launch, ...], int]]:
    fields: list[int] = []
    work: dict[tuple[int, ...], list[int]] = {}
    records = 0
    for j, (form, number, length) in enumerate(sizes):
        _, rows, cols = next(t for t in TILES if length <= t[0])
        segments = max(1, -(-length // SEGMENT[cols]))
        part = 1 if segments > 1 else max(rows, ITEM // max(length, 1) // rows * rows)
        count = -(-number // part) * segments if number * length else 0
        fields += (number, length, part, segments, records, count)
        if count:
            work.setdefault((form, rows, cols), []).extend(j << 32 | item for item in range(count))
        records += count
    fields, launches = launches_of(fields, work)
    return fields, (launches, records)


def momentum_norms_(
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    scale: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    update: bool,
    propagate: bool,
) -> Tensor:
    """M <- beta M + alpha G and the norms that need no block; see contracts.py. No host sync."""
    N, device = counts(M), scale.device
    norms = torch.empty((N, len(NORMS)), dtype=torch.float64, device=device)
    if N == 0:
        return norms
    places = places_of((M, G), "rows", device)
    work = table(("norms", places.sizes), device, lambda: _describe_norms(places.sizes))
    launches, total = work.sizes
    records = norms.new_empty(5 * total)
    gone = (work.tensor if skip is None else skip).view(torch.uint8)
    with on(device):
        for (form, rows, cols), start, items in launches:
            norms_kernel[(items,)](
                work.tensor, places.tensor, scale, gone, records, start, int(skip is not None), beta, alpha,
                ELEMENT=ELEMENTS[M[0].dtype], GRADIENT=ANY_FLOAT[G[0].dtype], FORM=form, UPDATE=update, AHEAD=nesterov,
                PROPAGATE=propagate, **norms_options(rows, cols, form),
            )  # fmt: skip
        norms_finish_kernel[(N,)](work.tensor, gone, records, norms, int(skip is not None), num_warps=4)
    return norms


def _describe_apply(sizes: Sequence[tuple[int, int, int]], tiles: int) -> tuple[list[int], tuple[Launch, ...]]:
    fields = [number for _, *both in sizes for number in both]
    work: dict[tuple[int, ...], list[int]] = {}
    for j, (form, rows, length) in enumerate(sizes):
        work.setdefault((form,), []).extend(j << 32 | item for item in range(-(-rows * length // (tiles * TILE))))
    return launches_of(fields, work)


def apply_update_(
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    size: Tensor,
    scale: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    L: Tensor | None = None,
    R: Tensor | None = None,
    r: int = 0,
) -> None:
    """P <- (1 - decay) P - size (scale X - L'R), one pass; see contracts.py. No host sync."""
    if L is not None and R is not None and r:
        return correct_(P, M, G, size, scale, decay, skip, beta, alpha, L, R, r)
    N, device, ahead = counts(P), size.device, len(G) > 0
    if N == 0:
        return
    places = places_of((P, M, G if ahead else M), "entries", device)
    # entry by entry: the size of an item shows in no bit
    tiles = min(8, max(1, sum(p.numel() for p in P) >> 25))
    work = table(("apply", places.sizes, tiles), device, lambda: _describe_apply(places.sizes, tiles))
    gone = (work.tensor if skip is None else skip).view(torch.uint8)
    dtypes = P[0].dtype, M[0].dtype, (G if ahead else M)[0].dtype
    with on(device):
        for (form,), start, items in work.sizes:
            if items:
                apply_kernel[(items,)](
                    work.tensor, places.tensor, size, scale, decay, gone, start, int(skip is not None), tiles, beta,
                    alpha, PARAMETER=ANY_FLOAT[dtypes[0]], ELEMENT=ELEMENTS[dtypes[1]], GRADIENT=ANY_FLOAT[dtypes[2]],
                    ACC=tl.float64 if dtypes[0] == torch.float64 else tl.float32, FORM=form, AHEAD=ahead,
                    **APPLY_OPTIONS,
                )  # fmt: skip


def supports(dtype: torch.dtype, b: int) -> str | None:
    """dtype: that of M; P and G may be of any float dtype."""
    if dtype not in ELEMENTS:
        return f"the Triton kernel keeps float32, bfloat16 and float16 momenta, not {str(dtype).removeprefix('torch.')}"
    return None
