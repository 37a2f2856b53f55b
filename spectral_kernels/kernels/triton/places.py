"""Matrices for kernels that go entry by entry: where they are, and the programs of a launch.

`places` are tables of addresses and strides, `work` tables of sizes and work items: gradients that move in memory send
a few numbers per matrix, not the items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ragged import Table, table

ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ANY_FLOAT = {**ELEMENTS, torch.float64: tl.float64}  # of P and G
ALIGNED, UNIT, STRIDED = 0, 1, 2  # FORM: 16-byte loads, step 1, any step


@triton.jit
def item_of(work, items, skip, has_skip):
    """(matrix, number of the item in it, whether to touch it) of this program."""
    item = tl.load(work + items + tl.program_id(0))
    j = item >> 32
    go = 1
    if has_skip != 0:
        go = 1 - tl.load(skip + j).to(tl.int32)
    return j, (item & 0x7FFFFFFF).to(tl.int32), go


@triton.jit
def place_of(place, ELEMENT: tl.constexpr, FORM: tl.constexpr):
    """(address, distance of rows, of entries) of one matrix."""
    base = tl.load(place).to(tl.pointer_type(ELEMENT))
    ld = tl.load(place + 1)
    step = tl.load(place + 2)
    if FORM == 0:
        base = tl.multiple_of(base, 16)
        ld = tl.multiple_of(ld, 8)
    return base, ld, step


class Launch(NamedTuple):
    """Programs of one configuration: its key, the first of their items in the table, and their number."""

    config: tuple[int, ...]
    start: int
    items: int


def _run(a: Tensor) -> set[str]:
    """The orders in which the matrices of a stack are one run of memory."""
    _, m, n = a.shape
    _, sm, sn = a.stride()
    orders = set()
    if (n == 1 or sn == 1) and (m == 1 or sm == n):
        orders.add("rows")
    if (m == 1 or sm == 1) and (n == 1 or sn == m):
        orders.add("columns")
    return orders


def swapped(a: Tensor) -> bool:
    """Are the columns of the stack what lies together in memory?"""
    return a.stride(1) < a.stride(2) and a.shape[1] > 1


def _places(lists: Sequence[Sequence[Tensor]], order: str) -> tuple[list[int], Any]:
    """Address and strides of every matrix in every list, and (FORM, rows, entries a row) of each.

    order: what a kernel takes for a row: "rows" of the matrices, "lines" of memory, be they rows or columns, or
    "entries", all of a matrix where that is one run of memory.
    """
    entries: list[int] = []
    sizes: list[tuple[int, int, int]] = []
    for stacks in zip(*lists, strict=True):
        k, m, n = stacks[0].shape
        run = order == "entries" and bool(set.intersection(*map(_run, stacks)))
        swap = not run and order != "rows" and swapped(stacks[0])
        rows, length = (1, m * n) if run else (n, m) if swap else (m, n)
        strides = []
        for a in stacks:
            ld, step = (a.stride(2), a.stride(1)) if swap else (a.stride(1), a.stride(2))
            strides.append((0, 1) if run else (ld if rows > 1 else 0, step if length > 1 else 1))
        unit = run or (order != "entries" and all(step == 1 for _, step in strides))
        wide = unit and length % 8 == 0 and all(ld % 8 == 0 for ld, _ in strides)
        for i in range(k):
            addresses = [a.data_ptr() + i * a.stride(0) * a.element_size() for a in stacks]
            for address, (ld, step) in zip(addresses, strides, strict=True):
                entries += (address, ld, step)
            aligned = wide and all(address % 16 == 0 for address in addresses)
            sizes.append((ALIGNED if aligned else UNIT if unit else STRIDED, rows, length))
    return entries, tuple(sizes)


def places_of(lists: Sequence[Sequence[Tensor]], order: str, device: torch.device) -> Table:
    key = tuple((a.data_ptr(), a.dtype, a.shape, a.stride()) for A in lists for a in A)
    return table(("places", len(lists), order, key), device, lambda: _places(lists, order))


def launches_of(fields: list[int], work: dict[tuple[int, ...], list[int]]) -> tuple[list[int], tuple[Launch, ...]]:
    launches = []
    for config in sorted(work):
        launches.append(Launch(config, len(fields), len(work[config])))
        fields += work[config]
    return fields, tuple(launches)
