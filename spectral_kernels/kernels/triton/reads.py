"""The kernels that pass over matrices. Every program serves four columns of the block and one chunk of one matrix.

A matrix is seen as I rows of K entries, `ld` apart, `step` between entries; `table` holds FIELDS numbers of each.
V, W, Y are flat blocks (b, size); programs of the other columns of a block stand next to each other in the launch, so
that L2 serves all but the first of them. With MOMENTUM what is read is X of momentum_tile.py, in the registers in which
M and G arrive; the pass that updates M stores it, and its rounded entries are what it goes on with.
"""

import triton
import triton.language as tl

from .momentum_tile import gradient, load

# address, I, K, ld, step, rows a chunk, chunks, places of V, Y, partial, records; records, place of S, pieces, m, n
FIELDS = tl.constexpr(16)
RECORD = tl.constexpr(4)  # ||.||_F^2, largest entry, NaN and inf flags of a program of the first pass


@triton.jit
def statistics(x, s, squares, largest):
    """Sums of squares and largest |entry| so far, one of each per place of the tile. A NaN shows in the squares."""
    size = tl.abs(x)
    return squares + s * s, tl.maximum(largest, tl.where(size == size, size, 0.0))


@triton.jit
def record(records, squares, largest, flags, MOMENTUM: tl.constexpr):
    """Axis by axis: the last of the widest in float64."""
    total = tl.sum(tl.sum(tl.sum(squares.to(tl.float64), axis=2), axis=1), axis=0)
    amax = tl.max(tl.max(tl.max(largest, axis=2), axis=1), axis=0).to(tl.float64)
    tl.store(records, total)
    tl.store(records + 1, amax)
    if MOMENTUM != 0:
        tl.store(records + 2, tl.max(tl.max(tl.max(flags & 1, axis=2), axis=1), axis=0).to(tl.float64))
        tl.store(records + 3, tl.max(tl.max(tl.max(flags >> 1, axis=2), axis=1), axis=0).to(tl.float64))
    else:
        tl.store(records + 2, (total != total).to(tl.float64))
        tl.store(records + 3, (amax == float("inf")).to(tl.float64))


@triton.jit
def _pass(
    base, ld, step, first, stop, m, n, scale, v, y, w, records, group, b, places, j, beta, alpha,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, TILES: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    FORM: tl.constexpr, STATS: tl.constexpr, MOMENTUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Y and the partial W of rows [first, stop): whole rows in TILES tiles, V and W in registers."""
    i = group * 4 + tl.arange(0, 4)[None, :, None]
    c = tl.arange(0, COLS)[None, None, :]
    V0 = tl.load(v + i * n + c, mask=(i < b) & (c < n), other=0.0)
    W0 = tl.zeros((1, 4, COLS), tl.float32)
    if TILES > 1:
        V1 = tl.load(v + i * n + c + COLS, mask=(i < b) & (c + COLS < n), other=0.0)
        W1 = tl.zeros((1, 4, COLS), tl.float32)
    if TILES > 2:
        V2 = tl.load(v + i * n + c + 2 * COLS, mask=(i < b) & (c + 2 * COLS < n), other=0.0)
        W2 = tl.zeros((1, 4, COLS), tl.float32)
    if TILES > 3:
        V3 = tl.load(v + i * n + c + 3 * COLS, mask=(i < b) & (c + 3 * COLS < n), other=0.0)
        W3 = tl.zeros((1, 4, COLS), tl.float32)
    flags = tl.zeros((1, 1, 1), tl.int32)
    if STATS:
        squares = tl.zeros((ROWS, 1, COLS), tl.float32)
        largest = tl.zeros((ROWS, 1, COLS), tl.float32)
    if MOMENTUM != 0:
        flags = tl.zeros((ROWS, 1, COLS), tl.int32)
    g_base, g_ld, g_step = gradient(places, j, GRADIENT, FORM, MOMENTUM)
    for start in tl.range(first, stop, ROWS, num_stages=STAGES):
        r = start + tl.arange(0, ROWS)[:, None, None]
        here = base + r.to(tl.int64) * ld
        there = g_base + r.to(tl.int64) * g_ld
        keep = (r < stop) & (c < n)
        x0, flags = load(here, c, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
        s0 = x0 * scale
        P = s0 * V0
        if TILES > 1:
            keep = (r < stop) & (c + COLS < n)
            x1, flags = load(here, c + COLS, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
            s1 = x1 * scale
            P += s1 * V1
        if TILES > 2:
            keep = (r < stop) & (c + 2 * COLS < n)
            x2, flags = load(here, c + 2 * COLS, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
            s2 = x2 * scale
            P += s2 * V2
        if TILES > 3:
            keep = (r < stop) & (c + 3 * COLS < n)
            x3, flags = load(here, c + 3 * COLS, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
            s3 = x3 * scale
            P += s3 * V3
        if STATS:
            squares, largest = statistics(x0, s0, squares, largest)
            if TILES > 1:
                squares, largest = statistics(x1, s1, squares, largest)
            if TILES > 2:
                squares, largest = statistics(x2, s2, squares, largest)
            if TILES > 3:
                squares, largest = statistics(x3, s3, squares, largest)
        Y = tl.sum(P, axis=2, keep_dims=True)  # (ROWS, 4, 1): the only step in which threads wait for each other
        W0 += tl.sum(s0 * Y, axis=0, keep_dims=True)
        if TILES > 1:
            W1 += tl.sum(s1 * Y, axis=0, keep_dims=True)
        if TILES > 2:
            W2 += tl.sum(s2 * Y, axis=0, keep_dims=True)
        if TILES > 3:
            W3 += tl.sum(s3 * Y, axis=0, keep_dims=True)
        tl.store(y + i * m + r, Y, mask=(i < b) & (r < stop))
    tl.store(w + i * n + c, W0, mask=(i < b) & (c < n))
    if TILES > 1:
        tl.store(w + i * n + c + COLS, W1, mask=(i < b) & (c + COLS < n))
    if TILES > 2:
        tl.store(w + i * n + c + 2 * COLS, W2, mask=(i < b) & (c + 2 * COLS < n))
    if TILES > 3:
        tl.store(w + i * n + c + 3 * COLS, W3, mask=(i < b) & (c + 3 * COLS < n))
    if STATS:
        if group == 0:
            record(records, squares, largest, flags, MOMENTUM)


@triton.jit
def square(y, one, two, first, stop, m, b, out, B: tl.constexpr, ROWS: tl.constexpr):
    """(B, B) of Y'Y from row and column (one, two) on, over rows [first, stop) of Y, in float64."""
    left = one + tl.arange(0, B)[None, :, None]
    right = two + tl.arange(0, B)[None, None, :]
    S = tl.zeros((1, B, B), tl.float64)
    for start in range(first, stop, ROWS):
        r = start + tl.arange(0, ROWS)[:, None, None]
        x = tl.load(y + left * m + r, mask=(left < b) & (r < stop), other=0.0).to(tl.float64)
        z = tl.load(y + right * m + r, mask=(right < b) & (r < stop), other=0.0).to(tl.float64)
        S += tl.sum(x * z, axis=0, keep_dims=True)
    tl.store(out + (left - one) * B + right - two, S)


@triton.jit
def item_of(table, items, groups, skip, has_skip):
    """(matrix, chunk, group of four columns, whether to read it) of this program."""
    program = tl.program_id(0)
    item = tl.load(table + items + program // groups)
    j = item >> 32
    read = 1
    if has_skip != 0:
        read = 1 - tl.load(skip + j).to(tl.int32)
    return j, (item & 0xFFFFFFFF).to(tl.int32), program % groups, read


@triton.jit
def matrix_of(mine, ELEMENT: tl.constexpr, FORM: tl.constexpr):
    """(address, rows, entries a row, ld, step), with what the launcher checked: multiples of 4 entries, 16 bytes."""
    base = tl.load(mine).to(tl.pointer_type(ELEMENT))
    rows = tl.load(mine + 1).to(tl.int32)
    n = tl.load(mine + 2).to(tl.int32)
    ld = tl.load(mine + 3)
    if FORM == 0:
        base = tl.multiple_of(base, 16)
        n = tl.multiple_of(n, 4)
        ld = tl.multiple_of(ld, 4)
    return base, rows, n, ld, tl.load(mine + 4)


SCALARS = ["items", "groups", "b", "has_skip"]
MOMENTUM_ARGUMENTS = ["places", "beta", "alpha"]


@triton.jit(do_not_specialize=[
    "table", "V", "scale", "skip", "partial", "records", "squares", "Y", *SCALARS, *MOMENTUM_ARGUMENTS,
])  # fmt: skip
def rows_kernel(
    table, V, scale, skip, partial, records, squares, Y, items, groups, b, has_skip, places, beta, alpha,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, TILES: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    FORM: tl.constexpr, STATS: tl.constexpr, MOMENTUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One read: Y, and W as one partial sum per chunk of rows. Rows of at most TILES * COLS entries."""
    j, chunk, group, read = item_of(table, items, groups, skip, has_skip)
    if read != 0:
        mine = table + j * FIELDS
        base, m, n, ld, step = matrix_of(mine, ELEMENT, FORM)
        first = chunk * tl.load(mine + 5).to(tl.int32)
        stop = tl.minimum(first + tl.load(mine + 5).to(tl.int32), m)
        y = Y + tl.load(mine + 8)
        _pass(
            base, ld, step, first, stop, m, n, tl.load(scale + j), V + tl.load(mine + 7), y,
            partial + tl.load(mine + 9) + chunk.to(tl.int64) * b * n, records + RECORD * (tl.load(mine + 10) + chunk),
            group, b, places, j, beta, alpha, ELEMENT, GRADIENT, TILES, COLS, ROWS, FORM, STATS, MOMENTUM, STAGES,
        )  # fmt: skip
        if groups == 1:
            tl.debug_barrier()  # S comes from the Y that all threads of this program have written
            square(y, 0, 0, first, stop, m, b, squares + (tl.load(mine + 12) + chunk) * 16, 4, 32)


@triton.jit(do_not_specialize=[
    "table", "U", "scale", "skip", "records", "OUT", "source", "target", *SCALARS, *MOMENTUM_ARGUMENTS,
])  # fmt: skip
def dots_kernel(
    table, U, scale, skip, records, OUT, source, target, items, groups, b, has_skip, places, beta, alpha,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr,
    STATS: tl.constexpr, MOMENTUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT (b, I) = U (b, K) (scale A)': whole rows. `source`, `target`: the fields with the places of U and OUT."""
    j, chunk, group, read = item_of(table, items, groups, skip, has_skip)
    mine = table + j * FIELDS
    base, rows, n, ld, step = matrix_of(mine, ELEMENT, FORM)
    u = U + tl.load(mine + source)
    f = tl.load(scale + j)
    r = chunk * ROWS + tl.arange(0, ROWS)[:, None, None]
    i = group * 4 + tl.arange(0, 4)[None, :, None]
    here = base + r.to(tl.int64) * ld
    g_base, g_ld, g_step = gradient(places, j, GRADIENT, FORM, MOMENTUM)
    there = g_base + r.to(tl.int64) * g_ld
    if read == 0:
        n = 0
    P = tl.zeros((ROWS, 4, COLS), tl.float32)
    squares = tl.zeros((ROWS, 1, COLS), tl.float32)
    largest = tl.zeros((ROWS, 1, COLS), tl.float32)
    flags = tl.zeros((ROWS, 1, COLS), tl.int32)
    for start in tl.range(0, n, COLS, num_stages=STAGES):
        c = start + tl.arange(0, COLS)[None, None, :]
        keep = (r < rows) & (c < n)
        x, flags = load(here, c, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
        s = x * f
        P += s * tl.load(u + i * n + c, mask=(i < b) & (c < n), other=0.0)
        if STATS:
            squares, largest = statistics(x, s, squares, largest)
    out = tl.sum(P, axis=2, keep_dims=True)
    tl.store(OUT + tl.load(mine + target) + i * rows + r, out, mask=(i < b) & (r < rows))
    if STATS:
        if group == 0:
            record(records + RECORD * (tl.load(mine + 10) + chunk), squares, largest, flags, MOMENTUM)


@triton.jit(do_not_specialize=[
    "table", "U", "scale", "skip", "partial", "records", "source", *SCALARS, *MOMENTUM_ARGUMENTS,
])  # fmt: skip
def sums_kernel(
    table, U, scale, skip, partial, records, source, items, groups, b, has_skip, places, beta, alpha,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr,
    STATS: tl.constexpr, MOMENTUM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial (chunk, b, K) = U (b, I) (scale A) over a chunk of rows and COLS columns."""
    j, item, group, read = item_of(table, items, groups, skip, has_skip)
    if read != 0:
        mine = table + j * FIELDS
        base, rows, n, ld, step = matrix_of(mine, ELEMENT, FORM)
        u = U + tl.load(mine + source)
        f = tl.load(scale + j)
        blocks = tl.cdiv(n, COLS)
        chunk = item // blocks
        first = chunk * tl.load(mine + 5).to(tl.int32)
        stop = tl.minimum(first + tl.load(mine + 5).to(tl.int32), rows)
        i = group * 4 + tl.arange(0, 4)[None, :, None]
        c = (item % blocks) * COLS + tl.arange(0, COLS)[None, None, :]
        total = tl.zeros((1, 4, COLS), tl.float32)
        squares = tl.zeros((1, 1, COLS), tl.float32)
        largest = tl.zeros((1, 1, COLS), tl.float32)
        flags = tl.zeros((1, 1, COLS), tl.int32)
        g_base, g_ld, g_step = gradient(places, j, GRADIENT, FORM, MOMENTUM)
        for start in tl.range(first, stop, ROWS, num_stages=STAGES):
            for k in tl.static_range(ROWS):
                r = start + tl.full((1, 1, 1), k, tl.int32)
                here = base + r.to(tl.int64) * ld
                there = g_base + r.to(tl.int64) * g_ld
                keep = (r < stop) & (c < n)
                x, flags = load(here, c, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
                s = x * f
                total += s * tl.load(u + i * rows + r, mask=(i < b) & (r < stop), other=0.0)
                if STATS:
                    squares, largest = statistics(x, s, squares, largest)
        out = partial + tl.load(mine + 9) + chunk.to(tl.int64) * b * n
        tl.store(out + i * n + c, total, mask=(i < b) & (c < n))
        if STATS:
            if group == 0:
                record(records + RECORD * (tl.load(mine + 10) + item), squares, largest, flags, MOMENTUM)


@triton.jit(do_not_specialize=["table", "skip", "squares", "Y", "rows", *SCALARS])
def square_kernel(table, skip, squares, Y, rows, items, groups, b, has_skip, B: tl.constexpr):
    """S of `rows` rows of Y, where no program holds all columns of them."""
    j, piece, group, read = item_of(table, items, groups, skip, has_skip)
    if read != 0:
        mine = table + j * FIELDS
        m = tl.load(mine + 14).to(tl.int32)
        first = piece * rows
        stop = tl.minimum(first + rows, m)
        out = squares + (tl.load(mine + 12) + piece) * B * B
        square(Y + tl.load(mine + 8), 0, 0, first, stop, m, b, out, B, 128 // B)


@triton.jit
def _add(partial, mine, out, length, block, chunks, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH numbers of a sum over the chunks of a matrix, in order; zeros without a chunk."""
    here = partial + tl.load(mine + 9)
    at = block.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        k = start + tl.arange(0, CHUNKS)[:, None]
        total += tl.load(here + k.to(tl.int64) * length + at, mask=(k < chunks) & (at < length), other=0.0)
    tl.store(out + at, tl.sum(total, axis=0)[None, :], mask=at < length)


@triton.jit(do_not_specialize=["table", "skip", "partial", "OUT", "depth", "size", "target", *SCALARS])
def add_kernel(
    table, skip, partial, OUT, depth, size, target, items, groups, b, has_skip,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of OUT from the partial sums. Fields: `depth` what was cut in chunks, `size`, `target` of OUT."""
    j, block, group, read = item_of(table, items, groups, skip, has_skip)
    mine = table + j * FIELDS
    chunks = tl.cdiv(tl.load(mine + depth), tl.load(mine + 5)).to(tl.int32) * read
    _add(partial, mine, OUT + tl.load(mine + target), tl.load(mine + size) * b, block, chunks, CHUNKS, WIDTH)


@triton.jit
def gather(mine, records, stats, count):
    """The statistics of one matrix from `count` records, in order."""
    frob2 = tl.zeros((256,), tl.float64)
    amax = tl.zeros((256,), tl.float64)
    nan = tl.zeros((256,), tl.float64)
    inf = tl.zeros((256,), tl.float64)
    for start in range(0, count, 256):
        k = start + tl.arange(0, 256)
        here = records + RECORD * (tl.load(mine + 10) + k)
        frob2 += tl.load(here, mask=k < count, other=0.0)
        amax = tl.maximum(amax, tl.load(here + 1, mask=k < count, other=0.0))
        nan = tl.maximum(nan, tl.load(here + 2, mask=k < count, other=0.0))
        inf = tl.maximum(inf, tl.load(here + 3, mask=k < count, other=0.0))
    tl.store(stats, tl.sum(frob2, axis=0))
    tl.store(stats + 1, tl.max(amax, axis=0))
    tl.store(stats + 2, tl.max(nan, axis=0))
    tl.store(stats + 3, tl.max(inf, axis=0))


@triton.jit
def _small(table, j, read, records, squares, S, stats, b, with_stats, B: tl.constexpr):
    """S and the statistics of one matrix from their partial sums, in order."""
    MANY: tl.constexpr = 2048 // (B * B)
    mine = table + j * FIELDS
    pieces = tl.load(mine + 13).to(tl.int32) * read
    at = tl.arange(0, B * B)[None, :]
    total = tl.zeros((MANY, B * B), tl.float64)
    for start in range(0, pieces, MANY):
        k = start + tl.arange(0, MANY)[:, None]
        here = squares + (tl.load(mine + 12) + k) * B * B + at
        total += tl.load(here, mask=k < pieces, other=0.0)
    c = tl.arange(0, B * B)
    tl.store(S + j * b * b + (c // B) * b + c % B, tl.sum(total, axis=0), mask=(c // B < b) & (c % B < b))
    gather(mine, records, stats + 4 * j, tl.load(mine + 11).to(tl.int32) * read * with_stats)


@triton.jit(do_not_specialize=[
    "table", "skip", "partial", "records", "squares", "W", "S", "stats", "with_stats", *SCALARS,
])  # fmt: skip
def finish_kernel(
    table, skip, partial, records, squares, W, S, stats, with_stats, items, groups, b, has_skip,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A block of W from its partial sums; with block 0 also S and the statistics. Block -1: those alone."""
    j, item, group, read = item_of(table, items, groups, skip, has_skip)
    block = item - 1
    if block >= 0:
        mine = table + j * FIELDS
        chunks = tl.load(mine + 6).to(tl.int32) * read
        _add(partial, mine, W + tl.load(mine + 7), tl.load(mine + 15) * b, block, chunks, CHUNKS, WIDTH)
    else:
        _small(table, j, read, records, squares, S, stats, b, with_stats, B)
