"""W = A'(A V) of a ragged list: one launch reads every matrix once, one more adds partial sums in order.

    Y = scale A V            (m, b)    from a tile of rows, in registers
    W = sum over chunks of (scale A_chunk)' Y_chunk          from the same registers
    S = Y'Y in float64       from the Y just written
    ||scale A||_F^2,  max |A|,  NaN and inf flags            from the same tiles

A work item of the first launch is a chunk of consecutive rows of one matrix. Chunks and tiles depend on shape, strides
and alignment alone, partial sums are added in a fixed order and nothing is atomic: a matrix gives the same bits alone
and in any list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import counts
from .ragged import Table, on, table

ROW, COLUMN, STRIDED = 0, 1, 2  # inner stride 1 on n, aligned for wide loads | the same on m | anything else
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
    """Add a tile to the squares (float64) and the largest |entry| of its rows. Only a NaN makes the squares NaN."""
    squares += tl.sum(scaled * scaled, axis=2).to(tl.float64)
    size = tl.abs(x)
    return squares, tl.maximum(largest, tl.max(tl.where(size == size, size, 0.0), axis=2))


@triton.jit
def _chunk(
    mine, scale, v, w, y, record, b, chunk,
    ELEMENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, FORM: tl.constexpr, LONG: tl.constexpr,
    VECTOR: tl.constexpr, STATS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Y, the partial W and the statistics of a chunk of rows: tiles (ROWS, 1, COLS) against blocks (1, 4, COLS)."""
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
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 64, 0, True, VECTOR, STATS, STAGES)
        elif kind == 4:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 16, 128, 1, False, VECTOR, STATS, STAGES)
        elif kind == 5:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 8, 512, 1, False, VECTOR, STATS, STAGES)
        elif kind == 6:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 64, 1, True, VECTOR, STATS, STAGES)
        elif kind == 7:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 8, 128, 2, False, VECTOR, STATS, 1)
        else:
            _chunk(mine, f, v, w, y, record, b, chunk, ELEMENT, 32, 64, 2, True, VECTOR, STATS, 1)
        tl.debug_barrier()  # S comes from the Y that all threads of this program have written
        m = tl.load(mine + 1).to(tl.int32)
        first = chunk * tl.load(mine + 6).to(tl.int32)
        stop = tl.minimum(first + tl.load(mine + 6).to(tl.int32), m)
        left = tl.arange(0, 4)[None, :, None]
        right = tl.arange(0, 4)[None, None, :]
        S = tl.zeros((1, 4, 4), tl.float64)
        for start in range(first, stop, 128):
            r = start + tl.arange(0, 128)[:, None, None]
            one = tl.load(y + left * m + r, mask=(left < b) & (r < stop), other=0.0).to(tl.float64)
            two = tl.load(y + right * m + r, mask=(right < b) & (r < stop), other=0.0).to(tl.float64)
            S += tl.sum(one * two, axis=0, keep_dims=True)
        tl.store(record + left * 4 + right, S)


@triton.jit(do_not_specialize=[
    "table", "skip", "partial", "records", "W", "S", "stats", "items", "b", "has_skip", "with_stats",
])  # fmt: skip
def add_kernel(
    table, skip, partial, records, W, S, stats, items, b, has_skip, with_stats,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a matrix's chunks, in order: a block of W; with block 0 also S and the statistics."""
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


# Configurations. One launch has one number of warps, so one serves all kinds; nothing here has been timed on a GPU yet.
#   16 warps: the 4 x 4096 numbers of V and of W are 32 registers each of the 128 that a thread of 512 can have (AMD: 8
#     warps of 64). Tiles hold up to 4096 entries, 8 a thread; 4 stages keep three tiles in flight through shared memory
#     (48 KB in float32; AMD: 2 stages for 64 KB of LDS). Narrower tiles for some kinds keep the whole free of spills.
#   kind 0-3: inner stride 1 on n.  kind 4-6: inner stride 1 on m, 8 to 32 consecutive rows a load.  kind 7-8: other.
#   4096 columns are the widest row that one read serves; beyond (beyond 512 for kind 4-6, 128 for other) a panel of 32
#     rows is loaded twice, and whether L2 serves the second load depends on the number of panels in flight.
KINDS = {ROW: ((128, 32), (1024, 4), (4096, 1)), COLUMN: ((128, 16), (512, 8)), STRIDED: ((128, 8),)}
FIRST_KIND = {ROW: 0, COLUMN: 4, STRIDED: 7}
PANEL = 32  # rows of a long chunk
VECTOR = 4  # entries a load: 16 bytes of float32, 8 bytes of the half types (16 would double the registers of V and W)
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK_LIMIT = 4  # columns of V: the block is padded to 4 in registers


HIP = torch.version.hip is not None


def read_options(hip: bool = HIP) -> dict[str, int]:
    """How `read_kernel` is compiled: STAGES is a constant of the kernel, the rest are the compiler's options."""
    return {"STAGES": 2 if hip else 4, "num_warps": 8 if hip else 16, "enable_fp_fusion": True}


ADD_OPTIONS = {"CHUNKS": 16, "WIDTH": 256, "num_warps": 4, "enable_fp_fusion": True}  # 16 partial sums side by side


def _form(address: int, m: int, n: int, sm: int, sn: int, itemsize: int) -> int:
    if address % 16 == 0 and sn == 1 and n % VECTOR == 0 and sm % VECTOR == 0:
        return ROW
    if address % 16 == 0 and sm == 1 and m % VECTOR == 0 and sn % VECTOR == 0:
        return COLUMN
    return STRIDED


def _chunks(m: int, n: int, form: int) -> tuple[int, int]:
    """(kind, rows of a chunk), from the shape and the form alone.

    About 256 chunks a matrix fill a GPU; at least 32 rows each keep the partial sums (4 n float32) at 1/8 of a matrix
    or less, at most 2048 rows each keep a serial sum short.
    """
    rows = min(max(32, -(-m // 256)), 2048)
    for place, (width, tile) in enumerate(KINDS[form]):
        if n <= width:
            unit = max(tile, VECTOR)
            return FIRST_KIND[form] + place, -(-rows // unit) * unit
    return FIRST_KIND[form] + len(KINDS[form]), PANEL


def _describe(A: Sequence[Tensor], b: int) -> tuple[list[int], tuple[int, ...]]:
    """The table: FIELDS numbers per matrix, then the items of `read_kernel`, then those of `add_kernel`."""
    fields: list[int] = []
    reads: list[tuple[int, int, int]] = []  # (entries of a chunk, matrix, chunks)
    adds: list[int] = []
    v = y = partial = records = j = 0
    hollow = int(any(a.shape[2] == 0 for a in A))
    for a in A:
        k, m, n = a.shape
        size = a.element_size()
        for i in range(k):
            address = a.data_ptr() + i * a.stride(0) * size
            form = _form(address, m, n, a.stride(1), a.stride(2), size)
            kind, rows = _chunks(m, n, form)
            chunks = -(-m // rows) if n else 0
            fields += (address, m, n, a.stride(1), a.stride(2), kind, rows, chunks, v, y, partial, records)
            reads.append((rows * n, j, chunks))
            adds += (j << 32 | block for block in range(max(1, -(-b * n // ADD_OPTIONS["WIDTH"]))))
            v += b * n
            y += b * m
            partial += chunks * b * n
            records += chunks
            j += 1
    reads.sort(key=lambda read: -read[0])  # the long chunks first: none starts last and alone
    items = [j << 32 | chunk for _, j, chunks in reads for chunk in range(chunks)]
    return fields + items + adds, (len(fields), len(items), len(adds), y, partial, records, hollow)


def _table(A: Sequence[Tensor], b: int, device: torch.device) -> Table:
    key = ("gram_matvec", b, A[0].dtype, tuple((a.data_ptr(), a.shape, a.stride()) for a in A))
    return table(key, device, lambda: _describe(A, b))


def gram_matvec(
    A: Sequence[Tensor], V: Tensor, scale: Tensor, skip: Tensor | None, b: int, with_stats: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W = A'(A V), S = (A V)'(A V), statistics of the first read; see contracts.py. Two launches, no host sync."""
    N = counts(A)
    W = torch.empty_like(V)
    S = V.new_empty((N, b, b), dtype=torch.float64)
    stats = V.new_empty((N, 4), dtype=torch.float64)
    if N == 0:
        return W, S, stats, V.new_empty(0)
    described = _table(A, b, V.device)
    start, reads, adds, rows, partials, chunks, hollow = described.sizes
    # no chunk writes the Y of a skipped matrix or of one without columns, which is 0
    fill = torch.zeros if with_y and (skip is not None or hollow) else torch.empty
    Y = fill(rows, dtype=V.dtype, device=V.device)
    partial = V.new_empty(partials)
    records = V.new_empty(chunks * RECORD.value, dtype=torch.float64)
    gone = described.tensor if skip is None else skip
    gone = gone.view(torch.uint8)
    with on(V.device):
        if reads:
            read_kernel[(reads,)](
                described.tensor, V, scale, gone, partial, records, Y, start, b, int(skip is not None),
                ELEMENT=ELEMENTS[A[0].dtype], VECTOR=VECTOR, STATS=with_stats, **read_options(),
            )  # fmt: skip
        add_kernel[(adds,)](
            described.tensor, gone, partial, records, W, S, stats, start + reads, b, int(skip is not None),
            int(with_stats), **ADD_OPTIONS,
        )  # fmt: skip
    return W, S, stats, Y if with_y else V.new_empty(0)


def supports(dtype: torch.dtype, b: int) -> str | None:
    if dtype not in ELEMENTS:
        return f"the Triton kernel reads float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= b <= BLOCK_LIMIT:
        return f"the Triton kernel holds blocks of 1 to {BLOCK_LIMIT} columns in registers, not {b}"
    return None
