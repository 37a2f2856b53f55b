"""W = A'(A V) of a ragged list in one launch that reads every matrix once, and one launch that adds partial sums in order.

    Y = scale A V            (m, b)    from a tile of rows, in registers
    W = sum over chunks of (scale A_chunk)' Y_chunk          from the same registers
    S = Y'Y = V'W            ||scale A||_F^2,  max |A|,  NaN and inf flags

A work item of the first launch is a chunk of consecutive rows of one matrix. Chunks and tiles depend on shape, strides and
alignment alone, partial sums are added in a fixed order and nothing is atomic: a matrix gives the same bits alone and in
any list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import counts
from .ragged import Table, on, table

FIELDS = tl.constexpr(12)  # int64 numbers per matrix in the table, see `_describe`
RECORD = tl.constexpr(32)  # float64 numbers a chunk reports: S (4, 4), then ||.||_F^2, max |.|, the rest unused


@triton.jit
def _tile(base, r, c, stop, n, sm, sn, FORM: tl.constexpr):
    """Rows r (ROWS, 1, 1) and columns c (1, 1, COLS), zeros beyond. A stride known to be 1 is left out: wide loads."""
    keep = (r < stop) & (c < n)
    if FORM == 0:
        return tl.load(base + r.to(tl.int64) * sm + c, mask=keep, other=0.0).to(tl.float32)
    elif FORM == 1:
        return tl.load(base + r + c.to(tl.int64) * sn, mask=keep, other=0.0).to(tl.float32)
    else:
        return tl.load(base + r.to(tl.int64) * sm + c.to(tl.int64) * sn, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _statistics(x, scaled, squares, largest):
    """Add a tile to the squares (float64) and the largest |entry| of its rows. Only a NaN entry makes the squares NaN."""
    squares += tl.sum(scaled * scaled, axis=2).to(tl.float64)
    size = tl.abs(x)
    return squares, tl.maximum(largest, tl.max(tl.where(size == size, size, 0.0), axis=2))


@triton.jit
def _chunk(
    mine, scale, v, w, y, record, b, chunk,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, FORM: tl.constexpr, LONG: tl.constexpr,
    VECTOR: tl.constexpr, STATS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Y, the partial W and the statistics of one chunk of rows, in tiles (ROWS, 1, COLS) against blocks (1, 4, COLS)."""
    base = tl.load(mine).to(tl.pointer_type(ELEMENT))
    m = tl.load(mine + 1).to(tl.int32)
    n = tl.load(mine + 2).to(tl.int32)
    sm = tl.load(mine + 3)
    sn = tl.load(mine + 4)
    first = chunk * tl.load(mine + 6).to(tl.int32)
    stop = tl.minimum(first + tl.load(mine + 6).to(tl.int32), m)
    if FORM != 2:  # what `_form` checked on the host
        base = tl.multiple_of(base, 16)
    if FORM == 0:
        n = tl.multiple_of(n, VECTOR)
        sm = tl.multiple_of(sm, VECTOR)
    if FORM == 1:
        first = tl.multiple_of(first, VECTOR)
        stop = tl.multiple_of(stop, VECTOR)
        sn = tl.multiple_of(sn, VECTOR)
    i = tl.arange(0, 4)[None, :, None]
    squares = tl.zeros((ROWS, 1), tl.float64)
    largest = tl.zeros((ROWS, 1), tl.float32)
    if LONG:  # one panel of rows: Y over all columns, then W from a second load of the panel, which L2 may serve
        r = first + tl.arange(0, ROWS)[:, None, None]
        Y = tl.zeros((ROWS, 4, 1), tl.float32)
        for start in tl.range(0, n, COLS, num_stages=STAGES):
            c = start + tl.arange(0, COLS)[None, None, :]
            x = _tile(base, r, c, stop, n, sm, sn, FORM)
            V = tl.load(v + i * n + c, mask=(i < b) & (c < n), other=0.0)  # (1, 4, COLS)
            scaled = x * scale
            if STATS:
                squares, largest = _statistics(x, scaled, squares, largest)
            Y += tl.sum(scaled * V, axis=2, keep_dims=True)
        tl.store(y + i * m + r, Y, mask=(i < b) & (r < stop))
        for start in tl.range(0, n, COLS, num_stages=STAGES):
            c = start + tl.arange(0, COLS)[None, None, :]
            scaled = _tile(base, r, c, stop, n, sm, sn, FORM) * scale
            W = tl.sum(scaled * Y, axis=0, keep_dims=True)
            tl.store(w + i * n + c, W, mask=(i < b) & (c < n))
    else:  # full rows: V and the partial W stay in registers
        c = tl.arange(0, COLS)[None, None, :]
        V = tl.load(v + i * n + c, mask=(i < b) & (c < n), other=0.0)
        W = tl.zeros((1, 4, COLS), tl.float32)
        for start in tl.range(first, stop, ROWS, num_stages=STAGES):
            r = start + tl.arange(0, ROWS)[:, None, None]
            x = _tile(base, r, c, stop, n, sm, sn, FORM)
            scaled = x * scale
            if STATS:
                squares, largest = _statistics(x, scaled, squares, largest)
            Y = tl.sum(scaled * V, axis=2, keep_dims=True)  # (ROWS, 4, 1)
            W += tl.sum(scaled * Y, axis=0, keep_dims=True)
            tl.store(y + i * m + r, Y, mask=(i < b) & (r < stop))
        tl.store(w + i * n + c, W, mask=(i < b) & (c < n))
    if STATS:
        tl.store(record + 16, tl.sum(tl.sum(squares, axis=1), axis=0))
        tl.store(record + 17, tl.max(tl.max(largest, axis=1), axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["table", "V", "scale", "skip", "partial", "records", "Y", "items", "b", "has_skip"])
def read_kernel(
    table, V, scale, skip, partial, records, Y, items, b, has_skip,
    ELEMENT: tl.constexpr, VECTOR: tl.constexpr, STATS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one matrix. `items`: where the work items start in the table."""
    item = tl.load(table + items + tl.program_id(0))
    j = item >> 32
    chunk = (item & 0xFFFFFFFF).to(tl.int32)
    read = 1
    if has_skip != 0:
        read = 1 - tl.load(skip + j).to(tl.int32)
    if read != 0:
        mine = table + j * FIELDS
        kind = tl.load(mine + 5)
        f = tl.load(scale + j)
        m = tl.load(mine + 1).to(tl.int32)
        rows = tl.load(mine + 6).to(tl.int32)
        v = V + tl.load(mine + 8)
        y = Y + tl.load(mine + 9)
        w = partial + tl.load(mine + 10) + chunk.to(tl.int64) * b * tl.load(mine + 2)
        record = records + (tl.load(mine + 11) + chunk) * RECORD
        if kind == 0:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 128, 0, False, VECTOR, STATS, STAGES)
        elif kind == 1:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 4, 1024, 0, False, VECTOR, STATS, STAGES)
        elif kind == 2:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 1, 4096, 0, False, VECTOR, STATS, STAGES)
        elif kind == 3:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 128, 0, True, VECTOR, STATS, STAGES)
        elif kind == 4:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 128, 1, False, VECTOR, STATS, STAGES)
        elif kind == 5:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 8, 512, 1, False, VECTOR, STATS, STAGES)
        elif kind == 6:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 128, 1, True, VECTOR, STATS, STAGES)
        elif kind == 7:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 128, 2, False, VECTOR, STATS, STAGES)
        else:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 128, 2, True, VECTOR, STATS, STAGES)
        tl.debug_barrier()  # S comes from the Y that all threads of this program have written
        first = chunk * rows
        stop = tl.minimum(first + rows, m)
        left = tl.arange(0, 4)[None, :, None]
        right = tl.arange(0, 4)[None, None, :]
        S = tl.zeros((1, 4, 4), tl.float64)
        for start in range(first, stop, 128):
            r = start + tl.arange(0, 128)[:, None, None]
            one = tl.load(y + left * m + r, mask=(left < b) & (r < stop), other=0.0).to(tl.float64)
            two = tl.load(y + right * m + r, mask=(right < b) & (r < stop), other=0.0).to(tl.float64)
            S += tl.sum(one * two, axis=0, keep_dims=True)
        tl.store(record + left * 4 + right, S)


@triton.jit(do_not_specialize=["table", "skip", "partial", "records", "W", "S", "stats", "items", "b", "has_skip", "with_stats"])
def add_kernel(
    table, skip, partial, records, W, S, stats, items, b, has_skip, with_stats,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of all chunks of one matrix, in order: a block of W, and with block 0 also S and the statistics."""
    item = tl.load(table + items + tl.program_id(0))
    j = item >> 32
    block = (item & 0xFFFFFFFF).to(tl.int32)
    mine = table + j * FIELDS
    size = tl.load(mine + 2) * b
    chunks = tl.load(mine + 7).to(tl.int32)
    if has_skip != 0:
        if tl.load(skip + j).to(tl.int32) != 0:
            chunks = 0
    here = partial + tl.load(mine + 10)
    at = block.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        k = start + tl.arange(0, CHUNKS)[:, None]
        total += tl.load(here + k.to(tl.int64) * size + at, mask=(k < chunks) & (at < size), other=0.0)
    tl.store(W + tl.load(mine + 8) + at, tl.sum(total, axis=0)[None, :], mask=at < size)
    if block == 0:
        record = records + tl.load(mine + 11) * RECORD
        used = 16 + 2 * with_stats
        c = tl.arange(0, 32)[None, :]
        sums = tl.zeros((CHUNKS, 32), tl.float64)
        largest = tl.zeros((CHUNKS, 32), tl.float64)
        for start in range(0, chunks, CHUNKS):
            k = start + tl.arange(0, CHUNKS)[:, None]
            x = tl.load(record + k.to(tl.int64) * RECORD + c, mask=(k < chunks) & (c < used), other=0.0)
            sums += x
            largest = tl.maximum(largest, tl.where(c == 17, x, 0.0))
        c = tl.arange(0, 32)
        sums = tl.sum(sums, axis=0)
        tl.store(S + j * b * b + (c // 4) * b + c % 4, sums, mask=(c < 16) & (c // 4 < b) & (c % 4 < b))
        frob2 = tl.sum(tl.where(c == 16, sums, 0.0), axis=0)
        amax = tl.max(tl.max(largest, axis=1), axis=0)
        tl.store(stats + 4 * j, frob2)
        tl.store(stats + 4 * j + 1, amax)
        tl.store(stats + 4 * j + 2, (frob2 != frob2).to(tl.float64))
        tl.store(stats + 4 * j + 3, (amax == float("inf")).to(tl.float64))
