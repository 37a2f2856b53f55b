"""W = A'(A V) of a ragged list, S = Y'Y and statistics, from one read of every matrix where rows are short enough.

    rows    Y and partial sums of W from the same registers: K <= 4096 entries a row, step 1 (or any step, slowly)
    long    longer rows: Y, then W, in two passes
    column  stored column by column (a transposed matrix): the same two passes, W from the second

A work item is a chunk of rows of one matrix. Chunks and tiles depend on shape, strides and alignment alone, partial
sums are added in a fixed order and nothing is atomic: a matrix gives the same bits alone and in any list. One launch
serves all matrices of a configuration, so a list takes two launches and one more per further configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..contracts import counts
from .ragged import on, table
from .reads import add_kernel, dots_kernel, finish_kernel, rows_kernel, square_kernel, sums_kernel

HIP = torch.version.hip is not None
ALIGNED, UNIT, STRIDED = 0, 1, 2  # FORM of reads.py
ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK_LIMIT = 16  # columns of V, four a program; more: wide_read.py
GROUP = 4
V_AT, Y_AT, M_AT, N_AT = 7, 8, 14, 15  # fields of the table


class Rows(NamedTuple):
    """Rows of at most `width` entries: warps of a program, tiles of `cols` entries, and how a matrix is cut."""

    width: int
    warps: int
    cols: int
    tiles: int
    chunks: int  # what an H100 runs at once: more chunks only load V again
    least: int  # fewest rows of a chunk of 4-byte entries, twice as many of 2 bytes: partial sums of W stay small


# V and W take 8 * width / (32 warps) registers of a thread, at most 128: with more warps a row has more partial sums to
# bring together (5 shuffles a warp, column and row), with fewer V and W do not fit. The pass alone on 128 MB, H100, of
# the copy's bandwidth: fp32 85 % at 256 columns, 84 at 768, 88 at 1024 and 2048, 78 at 4096; bf16, bound by
# instructions, 73, 70, 77, 75, 66 %. Tensor cores (three bf16 parts of V side by side, 16 rows a tile) reached 81 % at
# 256 but 41 to 54 % at 768 to 2048: 14 barriers a tile, and V fills the shared memory.
ROWS = (
    Rows(32, 1, 32, 1, 2112, 32),
    Rows(128, 1, 128, 1, 1584, 32),
    Rows(256, 1, 128, 2, 1056, 32),
    Rows(384, 1, 128, 3, 1056, 32),
    Rows(512, 1, 128, 4, 1056, 32),
    Rows(768, 2, 256, 3, 528, 32),
    Rows(1024, 2, 256, 4, 528, 32),
    Rows(1536, 4, 512, 3, 264, 64),
    Rows(2048, 4, 512, 4, 264, 64),  # 24 of 2048 x 2048: 81 % with 64 rows, 68 % with 32
    Rows(3072, 8, 1024, 3, 132, 32),
    Rows(4096, 8, 1024, 4, 132, 32),
)
SUM_ROWS = 32  # rows of a chunk of `sums_kernel`, by the same rule
MOST_ROWS = 1024
DOT_ROWS = 4  # rows of a program of `dots_kernel`
SUM_COLS = 512  # columns of a program of `sums_kernel`
PIECE = 2048  # rows of a program of `square_kernel`
WIDTH = 32  # numbers of a program of `add_kernel` and `finish_kernel`: a lone matrix has few of them, and many chunks


def _warps(warps: int, hip: bool) -> int:
    return max(1, warps // 2) if hip else warps  # AMD: 64 lanes each


def rows_options(
    config: Rows, itemsize: int, stats: bool, form: int = ALIGNED, hip: bool = HIP, moved: bool = False
) -> dict[str, int]:
    """How `rows_kernel` is compiled. Rows of a tile share a reduction; statistics, strides, G take registers."""
    rows = 8 if config.tiles * config.cols <= 128 else 2 if stats or (config.tiles == 4 and itemsize == 4) else 4
    if stats and config.tiles in (1, 4):
        rows = 4 if config.tiles == 1 else 1
    if (form == STRIDED and config.tiles > 1) or (moved and config.tiles > 2):
        rows = 1
    return {
        "TILES": config.tiles,
        "COLS": config.cols,
        "ROWS": rows,
        "STAGES": 2 if hip else 3,
        "num_warps": _warps(config.warps, hip),
        "enable_fp_fusion": True,
    }


def dots_options(hip: bool = HIP, moved: bool = False) -> dict[str, int]:
    stages, cols = 2 if hip else 3, 256 if moved else 512
    return {"COLS": cols, "ROWS": DOT_ROWS, "STAGES": stages, "num_warps": _warps(4, hip), "enable_fp_fusion": True}


def sums_options(hip: bool = HIP) -> dict[str, int]:
    stages = 2 if hip else 4
    return {"COLS": SUM_COLS, "ROWS": 4, "STAGES": stages, "num_warps": _warps(4, hip), "enable_fp_fusion": True}


ADD_OPTIONS = {"CHUNKS": 128, "WIDTH": WIDTH, "num_warps": 4, "enable_fp_fusion": True}  # 128 partial sums side by side
SQUARE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def form_of(address: int, entries: int, ld: int, step: int) -> int:
    if step != 1 and entries > 1:
        return STRIDED
    return ALIGNED if address % 16 == 0 and entries % 4 == 0 and ld % 4 == 0 else UNIT


class Launch(NamedTuple):
    """Programs of one configuration: kernel, place among ROWS, form, first item in the table and their number."""

    kernel: str
    config: int
    form: int
    start: int
    items: int


class Plan(NamedTuple):
    """What the launcher needs of a table: its launches in order, and the sizes of the scratch tensors."""

    launches: tuple[Launch, ...]
    y: int
    partial: int
    records: int
    squares: int
    hollow: bool


# kernel -> its place in the order of launches: a later one reads what an earlier one wrote
ORDER = ("rows", "long dots", "column sums", "add", "column dots", "long sums", "square", "finish")


def by_columns(a: Tensor) -> bool:
    """Is the stack stored column by column?"""
    return a.stride(1) == 1 and a.stride(2) != 1 and a.shape[1] > 1


class Momentum(NamedTuple):
    """What a read with a momentum stage needs beside M: MOMENTUM of reads.py, G's places and form of every matrix.

    With mode 0 M is read alone, in the tiles and the order of a read with the stage: the same bits.
    """

    mode: int
    beta: float
    alpha: float
    element: Any
    places: Tensor
    forms: tuple[int, ...]


def _describe(A: Sequence[Tensor], b: int, forms: tuple[int, ...] | None) -> tuple[list[int], Plan]:
    """The table: the fields of every matrix, then the items of every launch. forms: of G, where it is read too."""
    fields: list[int] = []
    work: dict[tuple[str, int, int], list[tuple[int, int, int]]] = {}  # launch -> (entries of an item, matrix, items)

    def add(kernel: str, config: int, form: int, entries: int, items: int) -> None:
        work.setdefault((kernel, config, form), []).append((entries, j, items))

    v = y = partial = record = square = j = 0
    for a in A:
        k, m, n = a.shape
        size, sm, sn = a.element_size(), a.stride(1), a.stride(2)
        column = by_columns(a)
        rows, entries, ld, step = (n, m, sn, sm) if column else (m, n, sm, sn)
        config = next((place for place, c in enumerate(ROWS) if n <= c.width), -1)
        kind = "column" if column else "rows" if config >= 0 else "long"
        part = (ROWS[config].least if kind == "rows" else SUM_ROWS) * (2 if size == 2 else 1)
        if kind == "rows":
            full = -(-rows // ROWS[config].chunks)
            part = min(max(part, -(-full // 8) * 8), MOST_ROWS)
        chunks = -(-rows // part) if m * n else 0
        blocks, dots = -(-entries // SUM_COLS), -(-rows // DOT_ROWS) if m * n else 0
        records = {"rows": chunks, "long": dots, "column": chunks * blocks}[kind]  # programs of the first pass
        inside = kind == "rows" and b <= GROUP  # S from the programs that compute Y
        pieces = chunks if inside else -(-m // PIECE) if m * n else 0
        for i in range(k):
            address = a.data_ptr() + i * a.stride(0) * size
            form = max(form_of(address, entries, ld, step), forms[j] if forms else ALIGNED)
            fields += (address, rows, entries, ld, step, part, chunks, v, y, partial, record, records)
            fields += (square, pieces, m, n)
            if kind == "rows":
                add("rows", config, form, part * entries, chunks)
            else:
                add(f"{kind} dots", 0, form, entries, dots)
                add(f"{kind} sums", 0, form, part, chunks * blocks)
            if kind == "column":
                add("add", 0, 0, 0, -(-b * m // WIDTH))
            if not inside:
                add("square", 0, 0, 0, pieces)
            add("finish", 0, 0, 0, 1 + (0 if kind == "column" else -(-b * n // WIDTH)))
            v, y, partial = v + b * n, y + b * m, partial + chunks * b * entries
            record, square, j = record + records, square + pieces, j + 1
    launches = []
    for kernel, config, form in sorted(work, key=lambda key: (ORDER.index(key[0]), key)):
        parts = sorted(work[kernel, config, form], key=lambda part: -part[0])  # long ones first: none is last and alone
        start = len(fields)
        fields += [j << 32 | item for _, j, items in parts for item in range(items)]
        if len(fields) > start:
            launches.append(Launch(kernel, config, form, start, len(fields) - start))
    return fields, Plan(tuple(launches), y, partial, record, square, any(a.shape[2] == 0 for a in A))


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
    """`gram_matvec` of A, or of what a momentum stage makes of A and G; M may be updated for blocks of one group.

    W = A'(A V), S = (A V)'(A V), statistics of the first read; see contracts.py. No host sync.
    """
    N = counts(A)
    W = torch.empty_like(V)
    S = V.new_empty((N, b, b), dtype=torch.float64)
    stats = V.new_empty((N, 4), dtype=torch.float64)
    if N == 0:
        return W, S, stats, V.new_empty(0)
    dtype = A[0].dtype
    forms = None if momentum is None else momentum.forms
    key = ("gram_matvec", b, dtype, forms, tuple((a.data_ptr(), a.shape, a.stride()) for a in A))
    described = table(key, V.device, lambda: _describe(A, b, forms))
    plan: Plan = described.sizes
    # no program writes the Y of a skipped matrix or of one without columns, which is 0
    fill = torch.zeros if with_y and (skip is not None or plan.hollow) else torch.empty
    Y = fill(plan.y, dtype=V.dtype, device=V.device)
    partial = V.new_empty(plan.partial)
    wide = 4 if b <= GROUP else 8 if b <= 8 else 16
    small = V.new_empty(4 * plan.records + wide * wide * plan.squares, dtype=torch.float64)
    records, squares = small[: 4 * plan.records], small[4 * plan.records :]
    gone = (described.tensor if skip is None else skip).view(torch.uint8)
    groups = -(-b // GROUP)
    common: dict[str, Any] = {"table": described.tensor, "skip": gone, "b": b, "has_skip": int(skip is not None)}
    reading = {"scale": scale, "ELEMENT": ELEMENTS[dtype], "GRADIENT": ELEMENTS[dtype]}
    reading |= {"places": described.tensor, "beta": 0.0, "alpha": 0.0, "MOMENTUM": 0}
    mode, moved = 0, momentum is not None  # mode: of a second pass, M is up to date
    if momentum is not None and momentum.mode:
        reading |= {"places": momentum.places, "beta": momentum.beta, "alpha": momentum.alpha}
        reading |= {"GRADIENT": momentum.element, "MOMENTUM": momentum.mode}
        mode = momentum.mode & ~1 if momentum.mode & 2 else 0
    with on(V.device):
        for kernel, config, form, start, items in plan.launches:
            many = groups if kernel.split()[-1] in ("rows", "dots", "sums") else 1
            grid, here = (items * many,), {**common, "items": start, "groups": many}
            first = {**here, **reading, "STATS": with_stats, "FORM": form}
            second = {**first, "STATS": False, "MOMENTUM": mode}
            if kernel == "rows":
                rows_kernel[grid](
                    V=V, partial=partial, records=records, squares=squares, Y=Y, **first,
                    **rows_options(ROWS[config], A[0].element_size(), with_stats, form, moved=moved),
                )  # fmt: skip
            elif kernel == "long dots":
                dots_kernel[grid](
                    U=V, OUT=Y, records=records, source=V_AT, target=Y_AT, **first, **dots_options(moved=moved)
                )
            elif kernel == "column dots":
                dots_kernel[grid](
                    U=Y, OUT=W, records=records, source=Y_AT, target=V_AT, **second, **dots_options(moved=moved)
                )
            elif kernel == "column sums":
                sums_kernel[grid](U=V, partial=partial, records=records, source=V_AT, **first, **sums_options())
            elif kernel == "long sums":
                sums_kernel[grid](U=Y, partial=partial, records=records, source=Y_AT, **second, **sums_options())
            elif kernel == "add":
                add_kernel[grid](partial=partial, OUT=Y, depth=N_AT, size=M_AT, target=Y_AT, **here, **ADD_OPTIONS)
            elif kernel == "square":
                square_kernel[grid](squares=squares, Y=Y, rows=PIECE, B=wide, **here, **SQUARE_OPTIONS)
            else:
                finish_kernel[grid](
                    partial=partial, records=records, squares=squares, W=W, S=S, stats=stats,
                    with_stats=int(with_stats), B=wide, **here, **ADD_OPTIONS,
                )  # fmt: skip
    return W, S, stats, Y if with_y else V.new_empty(0)
