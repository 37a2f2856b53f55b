"""Tiles of matrices for products: where matrices are, relative to the first of their list, and how a tile is loaded.

A list of tensors that came out of one allocation has the same places in every call, wherever it lies: its table stays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .places import ALIGNED, STRIDED, UNIT
from .ragged import Table, table

# FORM: those of places.py, whose rows lie along memory, and two whose columns do
ALIGNED_COLUMNS, UNIT_COLUMNS = 3, 4
PLACE = tl.constexpr(3)  # numbers of a place: entries from the first matrix of the list, distance of lines, of entries
FLAT = 64  # results of one allocation begin at multiples of so many entries


@triton.jit
def place_in(first, place, FORM: tl.constexpr):
    """(address, distance of lines, of entries) of one matrix of the list that begins at `first`."""
    base = first + tl.load(place)
    ld = tl.load(place + 1)
    step = 1
    if FORM == 2:
        step = tl.load(place + 2)
    if FORM % 3 == 0:
        base = tl.multiple_of(base, 16)
        ld = tl.multiple_of(ld, 8)
    return base, ld, step


@triton.jit
def entry(base, ld, step, i, j, FORM: tl.constexpr):
    """Address of entries (i, j)."""
    if FORM >= 3:
        at = base + j.to(tl.int64) * ld + i
    elif FORM == 2:
        at = base + i.to(tl.int64) * ld + j.to(tl.int64) * step
    else:
        at = base + i.to(tl.int64) * ld + j
    return at


@triton.jit
def scaled(x, f0, f1, ELEMENT: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr):
    """x times both factors, one after the other, rounded to ELEMENT."""
    if SCALED:
        x = (x.to(WIDE) * f0 * f1).to(ELEMENT)
    return x


@triton.jit
def factors(factor, j, has_factor, WIDE: tl.constexpr):
    """Both factors of matrix j, 1 where there are none."""
    f0 = tl.load(factor + 2 * j, mask=has_factor != 0, other=1.0).to(WIDE)
    f1 = tl.load(factor + 2 * j + 1, mask=has_factor != 0, other=1.0).to(WIDE)
    return f0, f1


def interpreted() -> bool:
    """Does the interpreter run the kernels? It multiplies bfloat16 by their bits."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def operand(dtype: torch.dtype, elements: dict[torch.dtype, Any]) -> Any:
    """What products take entries of dtype as."""
    return tl.float32 if dtype == torch.bfloat16 and interpreted() else elements[dtype]


def wide(dtype: torch.dtype) -> Any:
    """In what entries of dtype are scaled."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _place(a: Tensor, offset: int, misaligned: bool, symmetric: bool) -> tuple[list[int], list[int]]:
    """Places and FORMs of the matrices of a stack whose first lies `offset` entries from that of the list."""
    k, m, n = a.shape
    sk, sm, sn = a.stride()
    if symmetric and sm == 1 and sn != 1:
        sm, sn = sn, sm
    if sn == 1 or n == 1:
        form, length, ld, step = UNIT, n, sm, 1
    elif sm == 1 or m == 1:
        form, length, ld, step = UNIT_COLUMNS, m, sn, 1
    else:
        form, length, ld, step = STRIDED, n, sm, sn
    entries, forms = [], []
    per = 16 // a.element_size()
    for i in range(k):
        at = offset + i * sk
        entries += (at, ld, step)
        straight = not misaligned and form != STRIDED and length % 8 == 0 and ld % 8 == 0 and at % per == 0
        forms.append((ALIGNED if form == UNIT else ALIGNED_COLUMNS) if straight else form)
    return entries, forms


def tile_places(lists: Sequence[Sequence[Tensor]], symmetric: Sequence[bool], device: torch.device) -> Table:
    """Places of every matrix in every list, one list after the other for each matrix; sizes: FORMs, a list's at a time.

    symmetric: whose matrices are their own transposes, and may be read by rows where columns lie along memory.
    """
    firsts = [A[0].data_ptr() for A in lists]
    key = tuple(
        (tuple((a.data_ptr() - first, a.shape, a.stride()) for a in A), A[0].element_size(), first % 16, s)
        for A, first, s in zip(lists, firsts, symmetric, strict=True)
    )

    def build() -> tuple[list[int], Any]:
        columns, forms = [], []
        for A, first, own in zip(lists, firsts, symmetric, strict=True):
            places: list[int] = []
            kinds: list[int] = []
            for a in A:
                offset = (a.data_ptr() - first) // a.element_size()
                more, kind = _place(a, offset, first % 16 != 0, own)
                places += more
                kinds += kind
            columns.append([places[i : i + 3] for i in range(0, len(places), 3)])
            forms.append(tuple(kinds))
        entries = [number for row in zip(*columns, strict=True) for place in row for number in place]
        return entries, tuple(forms)

    return table(("tiles", key), device, build)


def allocate(shapes: Sequence[Tensor | tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Empty stacks out of one allocation: of these shapes, or like these tensors along memory (contracts: `like`)."""
    sizes = [math.prod(s.shape if isinstance(s, Tensor) else s) for s in shapes]
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // FLAT) * FLAT
    flat = torch.empty(total, dtype=dtype, device=device)
    out = []
    for s, start, size in zip(shapes, starts, sizes, strict=True):
        mine = flat[start : start + size]
        if isinstance(s, Tensor):
            k, m, n = s.shape
            turned = m > 1 and n > 1 and s.stride(1) < s.stride(2)
            out.append(mine.view(k, n, m).mT if turned else mine.view(k, m, n))
        else:
            out.append(mine.view(s))
    return out
