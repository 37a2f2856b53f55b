"""The words that multiply matrices: ragged lists in one launch a configuration, tiles of symmetric results once.

One program computes a tile of SIDE x SIDE numbers; tiles are chosen by a matrix's own shape and dtype, and listed so
that programs which run at the same time share rows and columns in the cache. Of a symmetric result only tiles on and
above the diagonal are computed, and stored twice: as they are, and turned over in registers. Halves are multiplied as
they are and added up in float32; float32 is three TF32 products on NVIDIA, and float32 on AMD's matrix cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import counts
from .places import ANY_FLOAT, ELEMENTS, Launch, item_of, launches_of
from .ragged import on, table
from .tiles import PLACE, allocate, entry, factors, operand, place_in, scaled, tile_places, wide

HIP = torch.version.hip is not None


@triton.jit(do_not_specialize=[
    "work", "places", "B", "X", "OUT", "factor", "size", "decay", "skip", "items", "has_factor", "has_skip", "alpha",
    "beta", "one",
])  # fmt: skip
def product_kernel(
    work, places, B, X, OUT, factor, size, decay, skip, items, has_factor, has_skip, alpha, beta, one,
    GRAM: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, SYMMETRIC: tl.constexpr, UPDATE: tl.constexpr,
    ELEMENT: tl.constexpr, OPERAND: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, TARGET: tl.constexpr,
    FORM_B: tl.constexpr, FORM: tl.constexpr, FORM_OUT: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of alpha L R + beta fX: L R is (fX)(fX)' (GRAM), or B fX.

    EXACT: tensor cores cut off what does not fit when they accumulate, always towards zero: a product of DEPTH terms
    starts from zero and is added by an fma, whose factor `one` keeps the compiler from putting the two together again.
    """
    j, tile, go = item_of(work, items, skip, has_skip)
    if go != 0:
        m = tl.load(work + 2 * j).to(tl.int32)
        n = tl.load(work + 2 * j + 1).to(tl.int32)
        if FORM == 0:
            n = tl.multiple_of(n, 8)
        if FORM == 3 or FORM_B == 0:
            m = tl.multiple_of(m, 8)
        row = (tile >> 15) * SIDE
        column = (tile & 0x7FFF) * SIDE
        r = row + tl.arange(0, SIDE)
        c = column + tl.arange(0, SIDE)
        k = tl.arange(0, DEPTH)
        mine = places + 3 * PLACE * j
        b_base, b_ld, b_step = place_in(B, mine, FORM_B)
        x_base, x_ld, x_step = place_in(X, mine + PLACE, FORM)
        f0, f1 = factors(factor, j, has_factor, WIDE)
        if GRAM:
            depth = n
            if alpha == 0:  # no product
                depth = n * 0
            stop = m
            left = entry(x_base, x_ld, x_step, r[:, None], k[None, :], FORM)
            right = entry(x_base, x_ld, x_step, c[None, :], k[:, None], FORM)
            left_by = x_step
            right_by = x_step
            if FORM >= 3:
                left_by = x_ld
                right_by = x_ld
        else:
            depth = m
            stop = n
            left = entry(b_base, b_ld, b_step, r[:, None], k[None, :], FORM_B)
            right = entry(x_base, x_ld, x_step, k[:, None], c[None, :], FORM)
            left_by = b_step
            if FORM_B >= 3:
                left_by = b_ld
            right_by = x_ld
            if FORM >= 3:
                right_by = x_step
        P = tl.zeros((SIDE, SIDE), tl.float32)
        for start in range(0, depth, DEPTH):
            x = tl.load(left, mask=(r[:, None] < m) & (start + k[None, :] < depth), other=0.0)
            y = tl.load(right, mask=(start + k[:, None] < depth) & (c[None, :] < stop), other=0.0)
            if GRAM:
                x = scaled(x, f0, f1, ELEMENT, WIDE, SCALED)
            x = x.to(OPERAND)
            y = scaled(y, f0, f1, ELEMENT, WIDE, SCALED).to(OPERAND)
            if EXACT:
                part = tl.dot(x, y, input_precision=PRECISION, out_dtype=tl.float32)
                P = tl.fma(part, tl.zeros_like(part) + one, P)
            else:
                P = tl.dot(x, y, P, input_precision=PRECISION, out_dtype=tl.float32)
            left += DEPTH * left_by
            right += DEPTH * right_by
        P = P * alpha
        keep = (r[:, None] < m) & (c[None, :] < stop)
        if ADD:
            at = entry(x_base, x_ld, x_step, r[:, None], c[None, :], FORM)
            x = tl.load(at, mask=keep & (beta != 0), other=0.0)
            P += beta * scaled(x, f0, f1, ELEMENT, WIDE, SCALED).to(tl.float32)
        o_base, o_ld, o_step = place_in(OUT, mine + 2 * PLACE, FORM_OUT)
        at = entry(o_base, o_ld, o_step, r[:, None], c[None, :], FORM_OUT)
        if UPDATE:
            p = tl.load(at, mask=keep, other=0.0).to(ACC)
            p = p * (1.0 - tl.load(decay + j)).to(ACC) - tl.load(size + j).to(ACC) * P.to(ACC)
            tl.store(at, p.to(TARGET), mask=keep)
        else:
            result = P.to(TARGET)
            if SYMMETRIC:
                turned = tl.trans(result)
                if row == column:
                    result = tl.where(r[:, None] <= c[None, :], result, turned)
                else:
                    there = entry(o_base, o_ld, o_step, c[:, None], r[None, :], FORM_OUT)
                    tl.store(there, turned, mask=(c[:, None] < m) & (r[None, :] < m))
            tl.store(at, result, mask=keep)


LARGE, SMALL = 128, 64  # SIDE
FILLING = 132  # tiles of a matrix from which they are large: those fill the multiprocessors of an H100
GROUP = 8  # rows of tiles that go column by column together
MOST_TILES = 1 << 15  # a side
ALIGNED = (0, 3)  # FORMs of tiles.py


def side_of(rows: int, columns: int, symmetric: bool, aligned: bool) -> int:
    """SIDE for a result of this shape; large tiles of matrices that are not aligned need too many addresses."""
    across, down = -(-columns // LARGE), -(-rows // LARGE)
    tiles = down * (down + 1) // 2 if symmetric else across * down
    return LARGE if tiles >= FILLING and aligned else SMALL


def product_options(side: int, half: bool, direct: bool, hip: bool = HIP) -> dict[str, object]:
    """How `product_kernel` is compiled. half: operands of two bytes; direct: X goes to the product as it is stored."""
    return {
        "SIDE": side,
        "DEPTH": (64 if direct else 32) if half else 16,
        "EXACT": not half,
        "PRECISION": "ieee" if hip else "tf32x3",
        "num_warps": 8 if side == LARGE else 4,
        "num_stages": 2 if hip or not (half and direct) else 3,
        "enable_fp_fusion": True,
    }


def tiles_of(rows: int, columns: int, side: int, symmetric: bool) -> list[int]:
    """row << 15 | column of every tile, GROUP rows of tiles at a time."""
    down, across = -(-rows // side), -(-columns // side)
    if max(down, across) > MOST_TILES:
        raise NotImplementedError(f"the Triton kernel serves sides of up to {MOST_TILES * side}, not {rows, columns}")
    return [
        i << 15 | j
        for top in range(0, down, GROUP)
        for j in range(top if symmetric else 0, across)
        for i in range(top, min(top + GROUP, down))
        if not symmetric or j >= i
    ]


def _describe(
    shapes: tuple[tuple[int, int, int], ...], forms: Any, gram: bool, symmetric: bool, size: int
) -> tuple[list[int], tuple[Launch, ...]]:
    """Rows and columns of every X, then the items of every launch, longest sums first; size: bytes of its entries."""
    sizes = [(m, n) for k, m, n in shapes for _ in range(k)]
    work: dict[tuple[int, ...], list[int]] = {}
    listed: dict[tuple[int, int, int], list[int]] = {}
    for j in sorted(range(len(sizes)), key=lambda j: -sizes[j][1 if gram else 0]):
        m, n = sizes[j]
        columns = m if gram else n
        mine = tuple(form[j] for form in forms)
        side = side_of(m, columns, symmetric, size < 8 and all(form in ALIGNED for form in mine))
        if (m, columns, side) not in listed:
            listed[m, columns, side] = tiles_of(m, columns, side, symmetric)
        work.setdefault((side, *mine), []).extend(j << 32 | tile for tile in listed[m, columns, side])
    return launches_of([number for pair in sizes for number in pair], work)


def _launch(
    B: Sequence[Tensor],
    X: Sequence[Tensor],
    out: Sequence[Tensor],
    factor: Tensor | None,
    dtype: torch.dtype,
    alpha: float = 1.0,
    beta: float = 0.0,
    gram: bool = False,
    add: bool = False,
    symmetric: bool = False,
    update: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> None:
    """out = alpha L R + beta fX for every matrix, or out <- (1 - decay) out - size L R."""
    if counts(X) == 0:
        return
    device = X[0].device
    places = tile_places((B, X, out), (True, gram and add, False), device)
    shapes = tuple(tuple(x.shape) for x in X)
    size = X[0].element_size()
    key = ("products", shapes, places.sizes, gram, symmetric, size == 8)
    work = table(key, device, lambda: _describe(shapes, places.sizes, gram, symmetric, size))
    tensor = work.tensor
    step, decay, skip = (tensor, tensor, None) if update is None else update
    gone = (tensor if skip is None else skip).view(torch.uint8)
    direct, target = factor is None and X[0].dtype == dtype, out[0].dtype
    half = dtype != torch.float32
    with on(device):
        for (side, *forms), start, items in work.sizes:
            if items:
                product_kernel[(items,)](
                    tensor, places.tensor, B[0], X[0], out[0], tensor if factor is None else factor, step, decay, gone,
                    start, int(factor is not None), int(skip is not None), alpha, beta, 1.0, GRAM=gram,
                    SCALED=not direct, ADD=add, SYMMETRIC=symmetric, UPDATE=update is not None,
                    ELEMENT=ELEMENTS[dtype], OPERAND=operand(dtype, ELEMENTS), WIDE=wide(X[0].dtype), ACC=wide(target),
                    TARGET=ANY_FLOAT[target], FORM_B=forms[0], FORM=forms[1], FORM_OUT=forms[2],
                    **product_options(side, half, direct),
                )  # fmt: skip


def gram(X: Sequence[Tensor], factor: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """(fX)(fX)' of every matrix; see contracts_products.py. No host sync."""
    if not X:
        return []
    out = allocate([(x.shape[0], x.shape[1], x.shape[1]) for x in X], dtype, X[0].device)
    _launch(out, X, out, factor, dtype, gram=True, symmetric=True)
    return out


def square_add(A: Sequence[Tensor], b: float, c: float) -> list[Tensor]:
    """b A + c A^2 of every symmetric matrix; see contracts_products.py. No host sync."""
    if not A:
        return []
    out = allocate([tuple(a.shape) for a in A], A[0].dtype, A[0].device)
    _launch(A, A, out, None, A[0].dtype, alpha=c, beta=b, gram=True, add=True, symmetric=True)
    return out


def multiply_add(
    B: Sequence[Tensor], X: Sequence[Tensor], factor: Tensor | None, a: float, symmetric: bool, dtype: torch.dtype
) -> list[Tensor]:
    """a fX + B fX of every matrix; see contracts_products.py. No host sync."""
    if not X:
        return []
    out = allocate(X, dtype, X[0].device)
    _launch(B, X, out, factor, dtype, beta=a, add=True, symmetric=symmetric)
    return out


def multiply_update_(
    P: Sequence[Tensor],
    B: Sequence[Tensor],
    X: Sequence[Tensor],
    factor: Tensor | None,
    size: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """P <- (1 - decay) P - size B fX of every matrix; see contracts_products.py. No host sync."""
    _launch(B, X, P, factor, dtype, update=(size, decay, skip))


def supports(dtype: torch.dtype, b: int) -> str | None:
    """dtype: what products are computed in; X and P may be of any float dtype."""
    if dtype not in ELEMENTS:
        return f"the Triton kernel multiplies float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None
