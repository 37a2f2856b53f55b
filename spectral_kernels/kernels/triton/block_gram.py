"""S = Y'Y in float64 of every flat block Y (b, m_j), for blocks too wide for the registers of one program.

A program has TILE x TILE numbers of S and PIECE rows; pieces are added in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ragged import on, table
from .reads import square

TILE = tl.constexpr(16)
PIECE = 1024
FIELDS = tl.constexpr(4)  # rows, place of Y, place of the first piece, pieces


@triton.jit(do_not_specialize=["table", "skip", "Y", "squares", "items", "b", "piece", "has_skip"])
def pieces_kernel(table, skip, Y, squares, items, b, piece, has_skip):
    """One tile of S, on or above the diagonal, of one piece."""
    item = tl.load(table + items + tl.program_id(0))
    tiles = tl.cdiv(b, TILE)
    row = tl.program_id(1) // tiles
    column = tl.program_id(1) % tiles
    go = row <= column
    if has_skip != 0:
        go = go & (tl.load(skip + (item >> 32)) == 0)
    if go:
        mine = table + (item >> 32) * FIELDS
        m = tl.load(mine).to(tl.int32)
        number = (item & 0xFFFFFFFF).to(tl.int32)
        first = number * piece
        out = squares + ((tl.load(mine + 2) + number) * tiles * tiles + tl.program_id(1)) * (TILE * TILE)
        y = Y + tl.load(mine + 1) * b
        square(y, row * TILE, column * TILE, first, tl.minimum(first + piece, m), m, b, out, TILE, 8)


@triton.jit(do_not_specialize=["table", "skip", "squares", "S", "b", "has_skip"])
def total_kernel(table, skip, squares, S, b, has_skip):
    """One tile of S, and the one across the diagonal."""
    j = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(b, TILE)
    row = tl.program_id(1) // tiles
    column = tl.program_id(1) % tiles
    if row <= column:
        mine = table + j * FIELDS
        count = tl.load(mine + 3).to(tl.int32)
        if has_skip != 0:
            count = count * (1 - tl.load(skip + j).to(tl.int32))
        at = tl.arange(0, TILE * TILE)[None, :]
        total = tl.zeros((8, TILE * TILE), tl.float64)
        for start in range(0, count, 8):
            k = start + tl.arange(0, 8)[:, None]
            here = squares + ((tl.load(mine + 2) + k) * tiles * tiles + tl.program_id(1)) * (TILE * TILE) + at
            total += tl.load(here, mask=k < count, other=0.0)
        e = tl.arange(0, TILE * TILE)
        r = row * TILE + e // TILE
        c = column * TILE + e % TILE
        keep = (r < b) & (c < b)
        numbers = tl.sum(total, axis=0)
        tl.store(S + j * b * b + r * b + c, numbers, mask=keep)
        tl.store(S + j * b * b + c * b + r, numbers, mask=keep)


OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _describe(sizes: Sequence[int]) -> tuple[list[int], tuple[int, int]]:
    fields: list[int] = []
    items: list[int] = []
    place = pieces = 0
    for j, size in enumerate(sizes):
        count = -(-size // PIECE)
        fields += (size, place, pieces, count)
        items += [j << 32 | number for number in range(count)]
        place, pieces = place + size, pieces + count
    return fields + items, (len(fields), pieces)


def gram(Y: Tensor, sizes: Sequence[int], b: int, skip: Tensor | None = None) -> Tensor:
    """(N, b, b) float64 from the flat blocks (b, sizes[j]), exactly symmetric, 0 where skipped. No host sync."""
    S = Y.new_empty((len(sizes), b, b), dtype=torch.float64)
    described = table(("gram", tuple(sizes)), Y.device, lambda: _describe(sizes))
    items, pieces = described.sizes
    tiles = (-(-b // TILE.value)) ** 2
    squares = Y.new_empty(pieces * tiles * TILE.value**2, dtype=torch.float64)
    gone, has_skip = (described.tensor if skip is None else skip).view(torch.uint8), int(skip is not None)
    with on(Y.device):
        if pieces:
            pieces_kernel[(pieces, tiles)](described.tensor, gone, Y, squares, items, b, PIECE, has_skip, **OPTIONS)
        if len(sizes):
            total_kernel[(len(sizes), tiles)](described.tensor, gone, squares, S, b, has_skip, **OPTIONS)
    return S
