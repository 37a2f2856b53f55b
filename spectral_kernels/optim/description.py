"""Who is treated how, and why: the table of param_groups and of optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .roles import BY_SHAPE, Role


@dataclass(frozen=True)
class Row:
    """A parameter that is trained; lr: what reaches it, factor included; NaN where the optimizer's own is not known."""

    name: str
    shape: tuple[int, ...]
    role: Role
    factor: float
    lr: float
    rank: str = ""  # of direction "clip": per kind of matrix, clamped to its smaller side


@dataclass(frozen=True)
class Skipped:
    name: str
    shape: tuple[int, ...]
    reason: str


NamedRow = TypeVar("NamedRow")


class Rows(Generic[NamedRow]):
    """Rows with a `name`, in order; rows[name] is the first of that name."""

    def __init__(self, rows: Iterable[NamedRow]) -> None:
        self.rows = list(rows)

    def __iter__(self) -> Iterator[NamedRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> NamedRow:
        for row in self.rows:
            if row.name == name:  # type: ignore[attr-defined]
                return row
        raise KeyError(name)


class Description(Rows[Row]):
    """Rows of parameters, and what was left out; prints as a table, iterates over its rows."""

    def __init__(self, rows: Iterable[Row], skipped: Iterable[Skipped] = ()) -> None:
        super().__init__(rows)
        self.skipped = list(skipped)

    @property
    def by_shape(self) -> list[str]:
        """Names of the parameters whose shape was all there was to go by."""
        return [row.name for row in self.rows if row.role.why == BY_SHAPE]

    def __str__(self) -> str:
        columns: tuple[str, ...] = ("parameter", "shape", "kind", "why", ">fan_out", ">fan_in", ">matrices")
        columns = (*columns, ">factor", ">lr")
        cells = [_cells(row) for row in self.rows]
        if any(row.rank for row in self.rows):
            columns = (*columns, ">rank")
            cells = [(*line, row.rank) for line, row in zip(cells, self.rows, strict=True)]
        parts = [text_table(columns, cells)] if self.rows else []
        if self.skipped:
            cells = [(row.name, shape_text(row.shape), row.reason) for row in self.skipped]
            parts.append(text_table(("left out", "shape", "reason"), cells))
        if self.by_shape:
            parts.append(f"By {BY_SHAPE}: {', '.join(self.by_shape)}. Name the kind where the shape misleads.")
        return "\n\n".join(parts)

    __repr__ = __str__


def describe_parameters(rows: Iterable[Row], skipped: Iterable[Skipped] = ()) -> Description:
    """The description of these rows."""
    return Description(rows, skipped)


def _cells(row: Row) -> tuple[str, ...]:
    role = row.role
    kind = f"{role.kind}, transposed" if role.transposed else role.kind
    fan_out = "+".join(map(str, role.blocks)) if len(set(role.blocks)) > 1 else str(role.fan_out)
    held = matrices_held(row.shape, role)
    count = "" if held is None else str(held)
    return (
        *(row.name, shape_text(row.shape), kind, role.why, fan_out, str(role.fan_in), count),
        *(f"{row.factor:.4g}", "" if math.isnan(row.lr) else f"{row.lr:.4g}"),
    )


def matrices_held(shape: Sequence[int], role: Role) -> int | None:
    """How many matrices (fan_out, fan_in) a parameter is treated as; None for kinds that are not matrices."""
    if role.kind == "conv":
        return role.positions * role.groups
    if role.kind != "matrix":
        return None
    stack = 1
    for side in shape[:-2]:
        stack *= side
    return stack * max(1, len(role.blocks))


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def text_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Aligned plain text; a column whose title starts with ">" is flush right."""
    rows = [[title.lstrip(">") for title in columns], *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    rows.insert(1, ["-" * width for width in widths])
    sides = [">" if title[0] == ">" else "<" for title in columns]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
