"""All steps of Newton–Schulz in one program a matrix, for short sides of up to 128 rows.

    R = (fX)(fX)'    W = a + bR + cR^2, Q <- W Q, R <- W W R, T times    Q fX

R, Q and W are padded to ORDER rows; they lie in scratch memory of the program, which stays in the cache, and go through
registers slice by slice. Rows and columns beyond those of X are zero, and nothing else ever multiplies what the
diagonals of W and Q hold there. X is read from memory at the start and at the end, and never written.

Products of R, Q and W keep float32: three TF32 products for one on NVIDIA, AMD's matrix cores take float32; those of
X with itself have operands of `dtype` and are added up in float32. What is lost there grows by a^2 a step in the
smallest eigenvalues of R: before the gain since the last Gram matrix exceeds MOST_GAIN, R is computed anew as the Gram
matrix of QX, which reads X once more. In half precision both methods of the contract are served so, far below the
roundings of the results, and restart points of half precision are not needed. In float32 Q, up to a thousand in norm,
costs the method "gram" three digits: it alone is served, with its own restarts.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import composites_products
from ..contracts import counts
from ..contracts_products import triples
from . import products
from .places import ANY_FLOAT, ELEMENTS, Launch, launches_of
from .ragged import on, table
from .tiles import PLACE, allocate, entry, factors, operand, place_in, scaled, tile_places, wide

HIP = torch.version.hip is not None
ORDERS = (16, 32, 64, 128)
MOST_GAIN = 450.0  # of the smallest singular values: their squares, 2^-24 of the largest one's, stay below 1/50
STEP = tl.constexpr(4)  # fields of a step: a, b, c as bits of float64, and whether a Gram matrix comes after it


@triton.jit
def number(steps, t):
    return tl.load(steps + t).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def columns(base, ld, step, i, j, m, n, f0, f1, FORM: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr,
            OPERAND: tl.constexpr):  # fmt: skip
    """Entries (i, j) of fX, zero outside."""
    x = tl.load(entry(base, ld, step, i, j, FORM), mask=(i < m) & (j < n), other=0.0)
    return scaled(x, f0, f1, ELEMENT, WIDE, True).to(OPERAND)


@triton.jit
def product(left, right, m, ORDER: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """left right' of two matrices of the scratch memory; both are symmetric up to rounding."""
    i = tl.arange(0, ORDER)
    k = tl.arange(0, SLICE)
    P = tl.zeros((ORDER, ORDER), tl.float32)
    for start in tl.range(0, m, SLICE, num_stages=STAGES):
        x = tl.load(left + i[:, None] * ORDER + (start + k[None, :]))
        y = tl.load(right + i[None, :] * ORDER + (start + k[:, None]))
        P = tl.dot(x, y, P, input_precision=PRECISION, out_dtype=tl.float32)
    return P


@triton.jit
def applied(q, base, ld, step, start, m, n, f0, f1, FORM: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr,
            ORDER: tl.constexpr, SLICE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """DEPTH columns of Q fX."""
    i = tl.arange(0, ORDER)
    k = tl.arange(0, SLICE)
    c = tl.arange(0, DEPTH)
    Y = tl.zeros((ORDER, DEPTH), tl.float32)
    for row in tl.range(0, m, SLICE, num_stages=STAGES):
        x = columns(base, ld, step, row + k[:, None], start + c[None, :], m, n, f0, f1, FORM, ELEMENT, WIDE, tl.float32)
        own = tl.load(q + i[:, None] * ORDER + (row + k[None, :]))
        Y = tl.dot(own, x, Y, input_precision=PRECISION, out_dtype=tl.float32)
    return Y


@triton.jit
def write(target, P, ORDER: tl.constexpr):
    """P to scratch memory, once all threads have read what lay there; visible to all of them afterwards."""
    i = tl.arange(0, ORDER)
    tl.debug_barrier()
    tl.store(target + i[:, None] * ORDER + i[None, :], P)
    tl.debug_barrier()


@triton.jit
def read(source, ORDER: tl.constexpr):
    i = tl.arange(0, ORDER)
    return tl.load(source + i[:, None] * ORDER + i[None, :])


@triton.jit(do_not_specialize=[
    "work", "places", "steps", "X", "OUT", "scratch", "factor", "used", "size", "decay", "skip", "start", "items",
    "has_skip", "count", "schatten4", "one",
])  # fmt: skip
def newton_schulz_kernel(
    work, places, steps, X, OUT, scratch, factor, used, size, decay, skip, start, items, has_skip, count, schatten4,
    one, ELEMENT: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, UPDATE: tl.constexpr, ACC: tl.constexpr,
    TARGET: tl.constexpr, FORM: tl.constexpr, FORM_OUT: tl.constexpr, ORDER: tl.constexpr, SLICE: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One matrix after the other. Tensor cores cut off where they accumulate: an fma adds chunks (see products.py)."""
    SQUARE: tl.constexpr = ORDER * ORDER
    r = tl.multiple_of(scratch + tl.program_id(0).to(tl.int64) * (3 * SQUARE), 16)
    q = r + SQUARE
    w = q + SQUARE
    i = tl.arange(0, ORDER)
    d = tl.arange(0, DEPTH)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        j = tl.load(work + start + item)
        m = tl.load(work + 2 * j).to(tl.int32)
        n = tl.load(work + 2 * j + 1).to(tl.int32)
        if FORM == 0:
            n = tl.multiple_of(n, 8)
        if FORM == 3:
            m = tl.multiple_of(m, 8)
        base, ld, step = place_in(X, places + 2 * PLACE * j, FORM)
        f0, f1 = factors(factor, j, 1, WIDE)
        R = tl.zeros((ORDER, ORDER), tl.float32)
        for first in tl.range(0, n, DEPTH, num_stages=STAGES):
            x = columns(base, ld, step, i[:, None], first + d[None, :], m, n, f0, f1, FORM, ELEMENT, WIDE, OPERAND)
            P = tl.dot(x, tl.trans(x), input_precision=PRECISION, out_dtype=tl.float32)
            R = tl.fma(P, tl.zeros_like(P) + one, R)
        inverse = tl.full((), 1.0, tl.float32)
        if schatten4 != 0:
            norm = tl.sqrt(tl.sum(tl.sum(R * R, axis=1), axis=0))
            inverse = tl.where(norm > 0, 1.0 / tl.sqrt(tl.where(norm > 0, norm, 1.0)), 1.0)
            R = R * (inverse * inverse)
        tl.store(used + 2 * j, tl.load(factor + 2 * j).to(tl.float64))
        tl.store(used + 2 * j + 1, tl.load(factor + 2 * j + 1).to(tl.float64) * inverse.to(tl.float64))
        write(r, R, ORDER)
        for t in range(0, count):
            a = number(steps, STEP * t)
            W = product(r, r, m, ORDER, SLICE, PRECISION, STAGES) * number(steps, STEP * t + 2)
            W += read(r, ORDER) * number(steps, STEP * t + 1)  # symmetric up to rounding
            W = tl.where(i[:, None] == i[None, :], W + a, W)
            write(w, W, ORDER)
            if t == 0:
                write(q, W, ORDER)
            else:
                write(q, product(w, q, m, ORDER, SLICE, PRECISION, STAGES), ORDER)
            after = tl.load(steps + STEP * t + 3)
            if after == 1:
                R = tl.zeros((ORDER, ORDER), tl.float32)
                for first in range(0, n, DEPTH):
                    Y = applied(q, base, ld, step, first, m, n, f0, f1, FORM, ELEMENT, WIDE, ORDER, SLICE, DEPTH,
                                PRECISION, STAGES) * inverse  # fmt: skip
                    P = tl.dot(Y, tl.trans(Y), input_precision=PRECISION, out_dtype=tl.float32)
                    R = tl.fma(P, tl.zeros_like(P) + one, R)
                write(r, R, ORDER)
            if after == 0:
                write(r, product(w, r, m, ORDER, SLICE, PRECISION, STAGES), ORDER)
                write(r, product(w, r, m, ORDER, SLICE, PRECISION, STAGES), ORDER)
        go = 1
        if has_skip != 0:
            go = 1 - tl.load(skip + j).to(tl.int32)
        o_base, o_ld, o_step = place_in(OUT, places + 2 * PLACE * j + PLACE, FORM_OUT)
        for first in range(0, n * go, DEPTH):
            Y = applied(q, base, ld, step, first, m, n, f0, f1, FORM, ELEMENT, WIDE, ORDER, SLICE, DEPTH, PRECISION,
                        STAGES) * inverse  # fmt: skip
            at = entry(o_base, o_ld, o_step, i[:, None], first + d[None, :], FORM_OUT)
            keep = (i[:, None] < m) & (first + d[None, :] < n)
            if UPDATE:
                p = tl.load(at, mask=keep, other=0.0).to(ACC)
                p = p * (1.0 - tl.load(decay + j)).to(ACC) - tl.load(size + j).to(ACC) * Y.to(ACC)
                tl.store(at, p.to(TARGET), mask=keep)
            else:
                tl.store(at, Y.to(TARGET), mask=keep)
        tl.debug_barrier()


DEPTH, SLICE = 32, 16
WARPS = {16: 1, 32: 4, 64: 4, 128: 8}
RESIDENT = {16: 16, 32: 4, 64: 2, 128: 1}  # programs of a multiprocessor


def order_of(m: int) -> int:
    return next(order for order in ORDERS if order >= m)


def on_chip_options(order: int, hip: bool = HIP) -> dict[str, object]:
    """How `newton_schulz_kernel` is compiled. Fewer columns at a time where registers would not do."""
    return {
        "ORDER": order,
        "SLICE": SLICE,
        "DEPTH": DEPTH // 2 if hip and order == ORDERS[-1] else DEPTH,
        "PRECISION": "ieee" if hip else "tf32x3",
        "STAGES": 2,
        "num_warps": WARPS[order],
        "enable_fp_fusion": True,
    }


def restarts_of(coefficients: Sequence[float]) -> tuple[int, ...]:
    """Steps after which R is computed anew, so that no step works on an R that has gained more than MOST_GAIN."""
    slopes = [abs(a) for a, _, _ in triples(coefficients)]
    points, gain = [], 1.0
    for t, slope in enumerate(slopes[:-1], 1):
        gain *= slope
        if gain > MOST_GAIN:
            points.append(t)
            gain = 1.0
    return tuple(points)


def _steps(coefficients: tuple[float, ...], restarts: tuple[int, ...]) -> tuple[list[int], None]:
    """The steps in bits; what follows a step: 0 two products, 1 a Gram matrix, 2 nothing."""
    entries: list[int] = []
    steps = triples(coefficients)
    for t, step in enumerate(steps, 1):
        entries += (struct.unpack("<q", struct.pack("<d", number))[0] for number in step)
        entries.append(2 if t == len(steps) else int(t in restarts))
    return entries, None


def _describe(shapes: tuple[tuple[int, int, int], ...], forms: Any) -> tuple[list[int], tuple[Launch, ...]]:
    """Rows and columns of every matrix, then the items of every launch, longest matrices first."""
    sizes = [(m, n) for k, m, n in shapes for _ in range(k)]
    work: dict[tuple[int, ...], list[int]] = {}
    for j in sorted(range(len(sizes)), key=lambda j: -sizes[j][1]):
        m, n = sizes[j]
        if m and n:
            work.setdefault((order_of(m), *(form[j] for form in forms)), []).append(j)
    return launches_of([number for size in sizes for number in size], work)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _run(
    X: Sequence[Tensor],
    factor: Tensor,
    schatten4: bool,
    coefficients: Sequence[float],
    restarts: tuple[int, ...],
    dtype: torch.dtype,
    P: Sequence[Tensor],
    size: Tensor | None,
    decay: Tensor | None,
    skip: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Every matrix has at most ORDERS[-1] rows."""
    device = factor.device
    out = list(P) if P else allocate(X, dtype, device)
    used = factor.to(torch.float64, copy=True)
    if counts(X) == 0:
        return ([] if P else out), used
    given = tuple(coefficients)
    steps = table(("newton_schulz", given, restarts), device, lambda: _steps(given, restarts)).tensor
    places = tile_places((X, out), (False, False), device)
    shapes = tuple(tuple(x.shape) for x in X)
    work = table(("on chip", shapes, places.sizes), device, lambda: _describe(shapes, places.sizes))
    gone = (work.tensor if skip is None else skip).view(torch.uint8)
    target = out[0].dtype
    with on(device):
        for (order, form, form_out), start, items in work.sizes:
            programs = min(items, RESIDENT[order] * _multiprocessors(device))
            scratch = torch.empty(programs * 3 * order * order, dtype=torch.float32, device=device)
            newton_schulz_kernel[(programs,)](
                work.tensor, places.tensor, steps, X[0], out[0], scratch, factor, used,
                used if size is None else size, used if decay is None else decay, gone, start, items,
                int(skip is not None), len(coefficients) // 3, int(schatten4), 1.0, ELEMENT=ELEMENTS[dtype],
                OPERAND=operand(dtype, ELEMENTS), WIDE=wide(X[0].dtype), UPDATE=len(P) > 0,
                ACC=wide(target), TARGET=ANY_FLOAT[target], FORM=form, FORM_OUT=form_out, **on_chip_options(order),
            )  # fmt: skip
    return ([] if P else out), used


def newton_schulz(
    X: Sequence[Tensor],
    factor: Tensor,
    schatten4: bool,
    coefficients: Sequence[float],
    gram: bool,
    restarts: Sequence[int],
    dtype: torch.dtype,
    P: Sequence[Tensor],
    size: Tensor | None,
    decay: Tensor | None,
    skip: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """All steps; see contracts_products.py. What does not stay on chip goes over products.py. No host sync."""
    rest = (schatten4, coefficients, gram, restarts, dtype)
    single = dtype == torch.float32
    points = tuple(restarts) if single else restarts_of(coefficients)
    small = [x.shape[1] <= ORDERS[-1] and (gram or not single) for x in X]
    if all(small):
        return _run(X, factor, schatten4, coefficients, points, dtype, P, size, decay, skip)
    if not any(small):
        return composites_products.newton_schulz(products, X, factor, *rest, P, size, decay, skip)
    rows, first = [], 0
    for x in X:
        rows.append(slice(first, first + x.shape[0]))
        first += x.shape[0]
    out: list[Tensor | None] = [None] * len(X)
    used = torch.empty((first, 2), dtype=torch.float64, device=factor.device)
    for here in (True, False):
        members = [i for i, mine in enumerate(small) if mine is here]

        def of(t: Tensor | None, members: list[int] = members) -> Tensor | None:
            return None if t is None else torch.cat([t[rows[i]] for i in members])

        picked = [X[i] for i in members], of(factor)
        last = [P[i] for i in members] if P else [], of(size), of(decay), of(skip)
        if here:
            found, own = _run(*picked, schatten4, coefficients, points, dtype, *last)  # type: ignore[arg-type]
        else:
            found, own = composites_products.newton_schulz(products, *picked, *rest, *last)  # type: ignore[arg-type]
        for i, y in zip(members, found, strict=False):
            out[i] = y
        for i, u in zip(members, own.split([X[i].shape[0] for i in members]), strict=True):
            used[rows[i]] = u
    return ([] if P else out), used  # type: ignore[return-value]


def supports(dtype: torch.dtype, b: int) -> str | None:
    return products.supports(dtype, b)
