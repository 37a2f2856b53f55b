"""What `schedules` shows: a table of coefficient lists, and f(sigma) drawn in the terminal, as JSON or as a picture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from . import __version__
from .checkpoints import InputError
from .ops import schedules
from .ops.arguments import check_int
from .ops.polynomials import MOST_STEPS
from .ops.schedules import Properties, Schedule, Validation

LEAST = 1e-4  # the smallest input of the drawings
COLUMNS = ("schedule", "steps", "slope", "output from 0.01", "headroom", "0.5 from", "noise", "gram restarts")
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column


class Row(NamedTuple):
    """One list in one arithmetic; refused: why it has no such number of steps, all else is None then."""

    name: str
    schedule: Schedule
    properties: Properties | None
    validation: Validation | None
    restarts: tuple[int, ...] | None
    refused: str


def collect(names: Sequence[str], steps: int | None, dtype: torch.dtype, method: str) -> list[Row]:
    """The rows of the names, or of every published list; InputError where a named one cannot be had."""
    rows = []
    try:
        steps = None if steps is None else check_int("--steps", steps, 1, MOST_STEPS)
    except ValueError as error:
        raise InputError(str(error)) from None
    for name in names or schedules.PUBLISHED:
        try:
            one = schedules.schedule(name, steps)
        except ValueError as error:
            if names:
                raise InputError(str(error)) from None
            rows.append(Row(name, schedules.PUBLISHED[name], None, None, None, str(error)))
            continue
        checked = schedules.validate(one, dtype=dtype, method=method)
        restarts = schedules.restarts_for(one, dtype)
        rows.append(Row(name, one, schedules.properties(one), checked, restarts, ""))
    return rows


def drawn(names: Sequence[str], steps: int | None) -> list[tuple[str, Schedule]]:
    """(name, schedule) of what is drawn: the names, by default the alias, at its own number of steps if need be."""
    if names:
        return [(name, schedules.schedule(name, steps)) for name in names]
    alias = next(iter(schedules.ALIASES))
    try:
        return [(alias, schedules.schedule(alias, steps))]
    except ValueError:
        return [(alias, schedules.schedule(alias))]


def cells(row: Row) -> tuple[str, ...]:
    """The texts of a row, the verdict last."""
    if row.properties is None or row.validation is None:
        return (row.name, str(len(row.schedule)), *[""] * (len(COLUMNS) - 2), row.refused)
    p, v = row.properties, row.validation
    low, high = p.output_from_0_01
    reach = "never" if p.reaching_0_5 is None else f"{p.reaching_0_5:.3g}"
    headroom = f"{math.floor(p.largest_safe_sigma * 1e7) / 1e7:.8g}"  # downwards: inputs up to it are safe
    restarts = "not safe" if row.restarts is None else ", ".join(map(str, row.restarts)) or "none"
    numbers = (f"{p.slope:.4g}", f"{low:.4f} .. {high:.4f}", headroom, reach)
    noise = f"{v.noise:.2g}" if math.isfinite(v.noise) else ""
    return (row.name, str(len(row.schedule)), *numbers, noise, restarts, "safe" if v.safe else "; ".join(v.reasons))


def show(rows: Sequence[Row], pictures: Sequence[tuple[str, Schedule]], words: str, stream: IO[str]) -> None:
    """Print the table, what its numbers are, and the drawings."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1

    wide = None if stream.isatty() else 1000  # into a file or a pipe no column is cut
    console = Terminal(file=stream, width=wide, markup=False, highlight=False, emoji=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    texts = [cells(row) for row in rows]
    for i, column in enumerate((*COLUMNS, words)):
        last = i == len(COLUMNS)
        width = None if last else max(len(column), *(len(text[i]) for text in texts))
        right = 0 < i < len(COLUMNS) - 1
        table.add_column(column, justify="right" if right else "left", width=width, overflow="fold")
    for text in texts:
        table.add_row(*text)
    console.print(table, soft_wrap=False)
    for line in _LEGEND:
        console.print(line, soft_wrap=True)
    plain = not _takes_braille(stream)
    for name, one in pictures:
        console.print(f"\n{name}, {len(one)} steps: f(sigma)", soft_wrap=True)
        for line in draw(one, plain=plain):
            console.print(line, soft_wrap=True)


_LEGEND = (
    "",
    "Inputs are singular values over the normalizer. slope: gain of the smallest; headroom: largest input up to which",
    "outputs lie in (0, 2]; 0.5 from: inputs from there to 1 come out as 0.5 or more; noise: largest output of a value",
    "that is exactly zero; gram restarts: steps after which method gram computes its Gram matrix anew, in this dtype.",
)


def _takes_braille(stream: IO[str]) -> bool:
    try:
        "\u28ff".encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def draw(one: Schedule, width: int = 64, height: int = 12, plain: bool = False) -> list[str]:
    """f(sigma) for sigma from 1e-4 to 1, on a logarithmic axis: `height` lines of `width` braille characters."""
    sigma = np.geomspace(LEAST, 1, 2 * width)
    f = np.clip(one(sigma), -2, 2)
    top, bottom = max(1.2, float(f.max())), min(0.0, float(f.min()))
    at = np.rint((top - f) / (top - bottom) * (4 * height - 1)).astype(int)  # dots from the top
    codes = np.zeros((height, width), dtype=int)
    for x in range(2 * width):
        start = at[max(x - 1, 0)]  # a steep piece is drawn from where the last dot was
        step = 1 if at[x] >= start else -1
        for y in range(start + step if start != at[x] else at[x], at[x] + step, step):
            codes[y // 4, x // 2] |= DOTS[y % 4][x % 2]
    marks = {round((top - value) / (top - bottom) * (4 * height - 1)) // 4: f"{value:g}" for value in (0.0, 0.5, 1.0)}
    filled = [["*" if code else " " for code in line] for line in codes] if plain else None
    lines = []
    for i, line in enumerate(codes):
        body = "".join(filled[i]) if filled else "".join(chr(0x2800 + code) if code else " " for code in line)
        lines.append(f"{marks.get(i, ''):>4} |{body}".rstrip())
    axis = [" "] * (width + 6)
    for k in range(5):
        text = f"{LEAST * 10**k:g}"
        middle = round(k / 4 * (width - 1)) + 6
        start = min(max(middle - len(text) // 2, 0), len(axis) - len(text))
        axis[start : start + len(text)] = text
    return [*lines, "     +" + "-" * width, "".join(axis).rstrip()]


def write_json(rows: Sequence[Row], dtype: str, method: str, stream: IO[str]) -> None:
    """Everything measured; null where there is no number."""
    content = {
        "spectral_kernels": __version__,
        "dtype": dtype,
        "method": method,
        "schedules": [_entry(r) for r in rows],
    }
    json.dump(content, stream, indent=1, allow_nan=False)
    stream.write("\n")


def _entry(row: Row) -> dict[str, Any]:
    one = row.schedule
    held: dict[str, Any] = {
        "name": one.name,
        "asked_as": row.name,
        "steps": one.steps,
        "tail": one.tail,
        "interval": one.interval,
    }
    held |= {"source": one.source, "paper": one.paper, "note": one.note, "refused": row.refused or None}
    for key, found in (("properties", row.properties), ("validation", row.validation)):
        held[key] = None if found is None else {k: _finite(v) for k, v in found._asdict().items()}
    return held | {"restarts_for_gram": row.restarts}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(pictures: Sequence[tuple[str, Schedule]]) -> Any:
    """A matplotlib Figure: f(sigma) of every schedule, up to a quarter beyond 1, and where each ends to be safe."""
    from matplotlib.figure import Figure

    from .inspection_plot import COLORS

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    sigma = np.unique(np.concatenate([np.geomspace(LEAST, 1.25, 2000), np.linspace(0.9, 1.25, 2000)]))
    lowest = 0.0
    for i, (name, one) in enumerate(pictures):
        color = COLORS[i % len(COLORS)]
        end = schedules.properties(one).largest_safe_sigma
        held = sigma[sigma <= max(end, 1.0)]
        f = np.clip(one(held), -2, 2)
        lowest = min(lowest, float(f.min()))
        axes.plot(held, f, color=color, lw=1.4, label=f"{name}, {len(one)} steps")
        if end < sigma[-1]:
            axes.axvline(end, color=color, lw=0.8, ls=":")
    axes.axhline(1, color="#555555", lw=0.6)
    axes.set_xscale("log")
    axes.set_xlim(LEAST, 1.25)
    axes.set_ylim(lowest - 0.05 if lowest < 0 else 0, 1.5)
    axes.set_xlabel("singular value of the input, over its normalizer (dotted: the headroom ends)", fontsize=8)
    axes.set_ylabel("output", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#eeeeee", lw=0.6)
    axes.legend(fontsize=8, frameon=False)
    return figure


def run(args: argparse.Namespace, writing: Any) -> None:
    """Measure, then write what args asks for; `writing(target)` is the context in which a file is written."""
    rows = collect(args.names, args.steps, getattr(torch, args.dtype), args.method)
    pictures = drawn(args.names, args.steps)
    if args.plot is not None:
        with writing(args.plot):
            picture(pictures).savefig(args.plot, dpi=110)
    if args.json not in (None, "-"):
        with writing(args.json), open(args.json, "w", encoding="utf-8") as stream:
            write_json(rows, args.dtype, args.method, stream)
    if args.json == "-":
        write_json(rows, args.dtype, args.method, sys.stdout)
    else:
        show(rows, pictures, f"{args.method} in {args.dtype}", sys.stdout)
