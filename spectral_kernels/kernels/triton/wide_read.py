"""W = A'(A V), S = Y'Y and statistics for blocks of 17 to 80 columns, on tensor cores, from two loads of every matrix.

    Y   (b, m) = V (scale A)'    the momentum, statistics; every entry of A is loaded once
    W   (b, n) = Y (scale A)     the second load, often from L2

Both are one kernel: OUT (b, size) = U (b, K) Z, Z (K, size) a matrix or its transpose, one program per PANEL columns
of Z and chunk of its rows, an accumulator of WIDE + NARROW rows in registers. Chunks (`part` of K) and panels depend on
the shape alone, and partial sums are added in order: a matrix gives the same bits alone and in any list. Blocks of up
to 16 columns are read by one_read.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import counts, sides
from . import one_read
from .block_gram import gram
from .momentum_tile import gradient, load
from .one_read import ALIGNED, BLOCK_LIMIT, ELEMENTS, HIP, M_AT, N_AT, V_AT, Y_AT, Momentum, by_columns, form_of
from .ragged import on, table
from .reads import (
    FIELDS,
    MOMENTUM_ARGUMENTS,
    RECORD,
    SCALARS,
    add_kernel,
    gather,
    item_of,
    matrix_of,
    record,
    statistics,
)


@triton.jit(do_not_specialize=[
    "table", "U", "scale", "skip", "partial", "records", "OUT", "source", "target", "one", *SCALARS,
    *MOMENTUM_ARGUMENTS,
])  # fmt: skip
def product_kernel(
    table, U, scale, skip, partial, records, OUT, source, target, one, items, groups, b, has_skip, places, beta, alpha,
    ELEMENT: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, PANEL: tl.constexpr,
    DEPTH: tl.constexpr, ALONG: tl.constexpr, FORM: tl.constexpr, STATS: tl.constexpr, MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ALONG: K lies along the rows of memory, not across. `source`, `target`: fields with the places of U and OUT.

    Tensor cores cut off what does not fit when they accumulate, always towards zero: a product of DEPTH terms starts
    from zero and is added by an fma, whose factor `one` keeps the compiler from putting the two together again.
    """
    j, item, group, read = item_of(table, items, groups, skip, has_skip)
    mine = table + j * FIELDS
    base, rows, n, ld, step = matrix_of(mine, ELEMENT, FORM)
    if ALONG:
        K = n
        size = rows
    else:
        K = rows
        size = n
    part = tl.multiple_of(tl.load(mine + 5).to(tl.int32), DEPTH)
    chunks = tl.maximum(tl.cdiv(K, part), 1)
    first = tl.multiple_of((item % chunks) * part, DEPTH)
    stop = first + (tl.minimum(first + part, K) - first) * read
    if ALONG and FORM == 0:
        stop = tl.multiple_of(stop, 4)
    u = U + tl.load(mine + source)
    f = tl.load(scale + j)
    g_base, g_ld, g_step = gradient(places, j, GRADIENT, FORM, MOMENTUM)
    i = (item // chunks) * PANEL + tl.arange(0, PANEL)[None, :]
    wide = tl.arange(0, WIDE)[:, None]
    W0 = tl.zeros((WIDE, PANEL), tl.float32)
    if NARROW > 0:
        narrow = WIDE + tl.arange(0, NARROW)[:, None]
        W1 = tl.zeros((NARROW, PANEL), tl.float32)
    flags = tl.zeros((DEPTH, PANEL), tl.int32)
    if STATS:
        squares = tl.zeros((DEPTH, PANEL), tl.float32)
        largest = tl.zeros((DEPTH, PANEL), tl.float32)
    for start in tl.range(first, stop, DEPTH, num_stages=STAGES):
        k = start + tl.arange(0, DEPTH)[:, None]
        keep = (k < stop) & (i < size)
        if ALONG:
            across = i
            along = k
        else:
            across = k
            along = i
        here = base + across.to(tl.int64) * ld
        there = g_base + across.to(tl.int64) * g_ld
        x, flags = load(here, along, step, there, g_step, keep, flags, beta, alpha, ELEMENT, FORM, MOMENTUM)
        s = x * f
        if STATS:
            squares, largest = statistics(x, s, squares, largest)
        at = start + tl.arange(0, DEPTH)[None, :]
        U0 = tl.load(u + wide * K + at, mask=(wide < b) & (at < stop), other=0.0)
        P0 = tl.dot(U0, s, input_precision=PRECISION, out_dtype=tl.float32)
        W0 = tl.fma(P0, tl.zeros_like(P0) + one, W0)
        if NARROW > 0:
            U1 = tl.load(u + narrow * K + at, mask=(narrow < b) & (at < stop), other=0.0)
            P1 = tl.dot(U1, s, input_precision=PRECISION, out_dtype=tl.float32)
            W1 = tl.fma(P1, tl.zeros_like(P1) + one, W1)
    out = OUT + tl.load(mine + target)
    if chunks > 1:
        out = partial + tl.load(mine + 9) + (item % chunks).to(tl.int64) * b * size
    tl.store(out + wide * size + i, W0, mask=(wide < b) & (i < size))
    if NARROW > 0:
        tl.store(out + narrow * size + i, W1, mask=(narrow < b) & (i < size))
    if STATS:
        here = records + RECORD * (tl.load(mine + 10) + item)
        record(here, squares[:, None, :], largest[:, None, :], flags[:, None, :], MOMENTUM)


@triton.jit(do_not_specialize=["table", "skip", "records", "stats", "has_skip"])
def statistics_kernel(table, skip, records, stats, has_skip):
    """The statistics of one matrix."""
    j = tl.program_id(0).to(tl.int64)
    mine = table + j * FIELDS
    count = tl.load(mine + 11).to(tl.int32)
    if has_skip != 0:
        count = count * (1 - tl.load(skip + j).to(tl.int32))
    gather(mine, records, stats + 4 * j, count)


WIDEST = 80  # columns of V
PANEL, DEPTH = 64, 32
SPREAD = 132  # programs that fill an H100: a lone matrix is cut along K into about as many, of SHORTEST rows or more
SHORTEST = 512
ADD_OPTIONS = {"CHUNKS": 8, "WIDTH": 256, "num_warps": 4, "enable_fp_fusion": True}


def heights(b: int) -> tuple[int, int]:
    """(WIDE, NARROW) of an accumulator of b rows."""
    return (16, 0) if b <= 16 else (32, 0) if b <= 32 else (32, 16) if b <= 48 else (64, 0) if b <= 64 else (64, 16)


def product_options(b: int, hip: bool = HIP) -> dict[str, object]:
    """How `product_kernel` is compiled. NVIDIA: three TF32 products a float32 one; AMD's matrix cores take float32."""
    wide, narrow = heights(b)
    return {
        "WIDE": wide,
        "NARROW": narrow,
        "PANEL": PANEL,
        "DEPTH": DEPTH,
        "PRECISION": "ieee" if hip else "tf32x3",
        "STAGES": 2 if hip else 3,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


class Launch(NamedTuple):
    """Programs of one configuration: Y or W, ALONG, FORM, first item in the table and their number."""

    result: str
    along: bool
    form: int
    start: int
    items: int


class Plan(NamedTuple):
    """Launches of a table, those that add partial sums apart, and the sizes of the scratch tensors."""

    products: tuple[Launch, ...]
    sums: dict[str, tuple[int, int]]  # result -> first item, items
    y: int
    partial: int
    records: int


def _describe(A: Sequence[Tensor], b: int, forms: tuple[int, ...] | None) -> tuple[list[int], Plan]:
    """The table: the fields of every matrix, as in one_read.py, then the items of every launch."""
    fields: list[int] = []
    work: dict[tuple[str, bool, int], list[int]] = {}
    adding: dict[str, list[int]] = {"W": [], "Y": []}
    v = y = partial = records = j = 0
    for a in A:
        k, m, n = a.shape
        size, sm, sn = a.element_size(), a.stride(1), a.stride(2)
        column = by_columns(a)
        rows, entries, ld, step = (n, m, sn, sm) if column else (m, n, sm, sn)
        part = max(SHORTEST, -(-m * n // (PANEL * SPREAD * DEPTH)) * DEPTH)
        cuts = {"Y": max(1, -(-n // part)), "W": max(1, -(-m // part))}
        lengths = {"Y": m, "W": n}
        panels = {result: -(-length // PANEL) for result, length in lengths.items()}
        programs = panels["Y"] * cuts["Y"]
        for i in range(k):
            address = a.data_ptr() + i * a.stride(0) * size
            form = max(form_of(address, entries, ld, step), forms[j] if forms else ALIGNED)
            fields += (address, rows, entries, ld, step, part, 0, v, y, partial, records, programs, 0, 0, m, n)
            for result, along in (("Y", not column), ("W", column)):
                count = panels[result] * cuts[result]
                work.setdefault((result, along, form), []).extend(j << 32 | item for item in range(count))
                if cuts[result] > 1:
                    count = -(-b * lengths[result] // ADD_OPTIONS["WIDTH"])
                    adding[result] += [j << 32 | item for item in range(count)]
            partial += b * max(cuts[result] * lengths[result] if cuts[result] > 1 else 0 for result in lengths)
            v, y, records, j = v + b * n, y + b * m, records + programs, j + 1
    launches = []
    for key in sorted(work):
        if work[key]:
            launches.append(Launch(*key, len(fields), len(work[key])))
            fields += work[key]
    sums = {}
    for result, items in adding.items():
        sums[result] = (len(fields), len(items))
        fields += items
    return fields, Plan(tuple(launches), sums, y, partial, records)


def gram_matvec(
    A: Sequence[Tensor], V: Tensor, scale: Tensor, skip: Tensor | None, b: int, with_stats: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W = A'(A V), S = (A V)'(A V), statistics of the first read; see contracts.py. No host sync."""
    return read(A, V, scale, skip, b, with_stats, with_y, None)


def read(
    A: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    skip: Tensor | None,
    b: int,
    with_stats: bool,
    with_y: bool,
    momentum: Momentum | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gram_matvec` of A, or of what a momentum stage makes of A and G, for blocks of any width."""
    if b <= BLOCK_LIMIT:
        return one_read.read(A, V, scale, skip, b, with_stats, with_y, momentum)
    N = counts(A)
    W = torch.empty_like(V)
    stats = V.new_zeros((N, 4), dtype=torch.float64)
    if N == 0:
        return W, V.new_empty((0, b, b), dtype=torch.float64), stats, V.new_empty(0)
    dtype = A[0].dtype
    forms = None if momentum is None else momentum.forms
    key = ("wide gram_matvec", b, dtype, forms, tuple((a.data_ptr(), a.shape, a.stride()) for a in A))
    described = table(key, V.device, lambda: _describe(A, b, forms))
    plan: Plan = described.sizes
    Y, partial = V.new_empty(plan.y), V.new_empty(plan.partial)
    records = V.new_empty(4 * plan.records, dtype=torch.float64)
    gone = (described.tensor if skip is None else skip).view(torch.uint8)
    common: dict[str, Any] = {"table": described.tensor, "skip": gone, "b": b, "has_skip": int(skip is not None)}
    reading = {"scale": scale, "partial": partial, "records": records, "ELEMENT": ELEMENTS[dtype]}
    reading |= {"GRADIENT": ELEMENTS[dtype], "places": described.tensor, "beta": 0.0, "alpha": 0.0}
    mode = again = 0
    if momentum is not None and momentum.mode:
        reading |= {"places": momentum.places, "beta": momentum.beta, "alpha": momentum.alpha}
        reading |= {"GRADIENT": momentum.element}
        mode = momentum.mode
        again = mode & ~1 if mode & 2 else 0  # of the second load, M is up to date

    def product(result: str) -> None:
        first = result == "Y"
        U, OUT, source, target = (V, Y, V_AT, Y_AT) if first else (Y, W, Y_AT, V_AT)
        for _, along, form, start, items in (launch for launch in plan.products if launch.result == result):
            product_kernel[(items,)](
                U=U, OUT=OUT, source=source, target=target, one=1.0, items=start, groups=1, ALONG=along, FORM=form,
                STATS=with_stats and first, MOMENTUM=mode if first else again, **common, **reading,
                **product_options(b),
            )  # fmt: skip
        start, items = plan.sums[result]
        if items:
            depth, size = (N_AT, M_AT) if first else (M_AT, N_AT)
            add_kernel[(items,)](
                partial=partial, OUT=OUT, depth=depth, size=size, target=target, items=start, groups=1, **common,
                **ADD_OPTIONS,
            )  # fmt: skip

    with on(V.device):
        product("Y")
        S = gram(Y, sides(A, 1), b, skip)
        product("W")
        if with_stats:
            statistics_kernel[(N,)](described.tensor, gone, records, stats, int(skip is not None), num_warps=4)
    return W, S, stats, Y if with_y else V.new_empty(0)


def supports(dtype: torch.dtype, b: int) -> str | None:
    if dtype not in ELEMENTS:
        return f"the Triton kernel reads float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= b <= WIDEST:
        return f"the Triton kernel serves blocks of 1 to {WIDEST} columns, not {b}"
    return None
