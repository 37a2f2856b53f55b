"""How `inspect` shows what it measured: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import IO, Any

from . import __version__
from .comparison import Change
from .inspection import Matrix, Options, Report, Skipped, Vector

NAME_LEAST = 28  # columns of a terminal kept for names; below, lines run over its edge
DIGITS = 5  # of a printed norm; brackets are rounded outwards
CSV_COLUMNS = (
    *("file", "kind", "name", "shape", "dtype", "fan_out", "fan_in", "sigma", "lower", "upper", "target", "ratio"),
    *("stable_rank", "l2", "rms", "change", "delta", "delta_lower", "delta_upper", "delta_stable_rank", "note"),
)


@dataclass
class Inspection:
    """Reports of all files, and the changes of every later file against the first."""

    reports: list[Report]
    changes: list[dict[str, Change]] = field(default_factory=list)
    options: Options = field(default_factory=Options)

    def rows(self, kind: str) -> dict[str, list[Any]]:
        """name -> its row in every file, None where it is not; kind: "matrices", "vectors" or "skipped"."""
        tables = [{row.name: row for row in getattr(report, kind)} for report in self.reports]
        return {name: [t.get(name) for t in tables] for name in dict.fromkeys(name for t in tables for name in t)}

    def order(self, by: str, reverse: bool) -> None:
        """Sort the rows of every file: names upwards, as people count; numbers downwards, NaN before all."""
        rows = self.rows("matrices")

        def rank(name: str) -> tuple[bool, bool, float]:
            row = next(r for r in rows[name] if r is not None)
            if by == "change":
                change = self.changes[-1].get(name)
                value = None if change is None else change.delta
            else:
                value = row.fan_out * row.fan_in if by == "size" else getattr(row, by)
            return value is not None, value is not None and math.isnan(value), value if value is not None else 0.0

        names = sorted(rows, key=natural)
        if by != "name":
            names.sort(key=rank, reverse=True)
        if reverse:
            names.reverse()
        place = {name: i for i, name in enumerate(names)}
        for report in self.reports:
            report.matrices.sort(key=lambda row: place[row.name])
            report.vectors.sort(key=lambda row: natural(row.name), reverse=reverse and by == "name")
            report.skipped.sort(key=lambda row: natural(row.name))
        later = len(place)
        self.changes = [
            dict(sorted(c.items(), key=lambda item: (place.get(item[0], later), natural(item[0]))))
            for c in self.changes
        ]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def number(x: float | None, rounding: str = ROUND_HALF_EVEN) -> str:
    if x is None or not math.isfinite(x):
        return "" if x is None else str(x)
    return f"{float(Context(prec=DIGITS, rounding=rounding).create_decimal(x)):#.{DIGITS}g}".rstrip(".")


def bracket(lower: float | None, upper: float | None) -> str:
    if lower is None or upper is None or not math.isfinite(lower):
        return ""
    return f"{number(lower, ROUND_FLOOR)} .. {number(upper, ROUND_CEILING)}"


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def plain(name: str) -> str:
    """Names come from files: no control character reaches the terminal."""
    return name if name.isprintable() else ascii(name)[1:-1]


def show(inspection: Inspection, stream: IO[str]) -> None:
    """Print tables of the matrices, the vectors and what was skipped, and one line on the accuracy."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1

    wide = None if stream.isatty() else 1000  # into a file or a pipe no column is cut
    console = Terminal(file=stream, width=wide, markup=False, highlight=False, emoji=False, soft_wrap=False)
    if len(inspection.reports) == 1:
        report = inspection.reports[0]
        _table(console, _MATRIX_COLUMNS, [_matrix_cells(row) for row in report.matrices])
        _table(console, _VECTOR_COLUMNS, [_vector_cells(row) for row in report.vectors])
        _table(console, _SKIPPED_COLUMNS, [_skipped_cells(row) for row in report.skipped])
        counts = f"{len(report.matrices)} matrices, {len(report.vectors)} vectors, {len(report.skipped)} skipped"
    else:
        counts = _show_comparison(console, inspection)
    delta = inspection.options.delta
    console.print(f"{counts}. Norms: relative error up to {inspection.options.tol:g};", soft_wrap=True)
    console.print(
        f"the true one lies in its bracket with probability 1 - {delta:g} per matrix or more.", soft_wrap=True
    )
    if any("embed" in row.name.lower() for report in inspection.reports for row in report.matrices):
        console.print(
            "Embeddings are taken as stored, (vocabulary, width) = (fan_in, fan_out): turn their root around.",
            soft_wrap=True,
        )


_MATRIX_COLUMNS = ("<matrix", "<shape", "<dtype", ">sigma_max", ">bracket", ">√(out/in)", ">ratio", ">stable rank")
_VECTOR_COLUMNS = ("<vector", "<shape", "<dtype", ">l2 norm", ">rms")
_SKIPPED_COLUMNS = ("<skipped", "<shape", "<dtype", "<why")


def _matrix_cells(row: Matrix) -> tuple[str, ...]:
    edges = bracket(row.lower, row.upper)
    numbers = number(row.sigma), edges, number(row.target), number(row.ratio), number(row.stable_rank)
    return (plain(row.name), shape_text(row.shape), row.dtype, *numbers)


def _vector_cells(row: Vector) -> tuple[str, ...]:
    return plain(row.name), shape_text(row.shape), row.dtype, number(row.l2), number(row.rms)


def _skipped_cells(row: Skipped) -> tuple[str, ...]:
    return plain(row.name), shape_text(row.shape), row.dtype, row.reason


def _table(console: Any, columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    """Print a table; a column's first character says to which side it is flush."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table

    cells = list(cells)
    if not cells:
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="bold")
    rows = [[column[1:] for column in columns], *cells]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(columns))]
    widths[0] = min(widths[0], NAME_LEAST)  # names fold where room is short, numbers never do
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column[1:], justify="right" if column[0] == ">" else "left", overflow="fold", min_width=width)
    for row in cells:
        table.add_row(*row)
    least = sum(widths) + 2 * (len(widths) - 1)
    console.print(table, width=max(console.width, least), crop=False)
    console.print()


def _letter(i: int) -> str:
    return chr(ord("a") + i) if i < 26 else f"f{i + 1}"


def _show_comparison(console: Any, inspection: Inspection) -> str:
    """Files side by side: the norm in each, and the norm of what changed since the first."""
    reports, changes = inspection.reports, inspection.changes
    labels = [_letter(i) for i in range(len(reports))]
    for label, report in zip(labels, reports, strict=True):
        console.print(f"{label} = {plain(report.path)}", soft_wrap=True)
    console.print()
    pair = len(reports) == 2

    def cells(name: str, rows: list[Any], matrix: bool) -> tuple[str, ...]:
        row = next(r for r in rows if r is not None)
        out = [plain(name), shape_text(row.shape)]
        out += [number(None if r is None else r.sigma if matrix else r.l2) for r in rows]
        mine = [c.get(name) for c in changes]
        for change in mine:
            out.append(number(change.delta if change else None))
            if pair and matrix:
                edges = (change.lower, change.upper, change.stable_rank) if change else (None, None, None)
                relative = None if not change or change.delta is None or not row.target else change.delta / row.target
                out += [bracket(edges[0], edges[1]), number(relative), number(edges[2])]
        notes = [(label, change.note) for label, change in zip(labels[1:], mine, strict=True) if change and change.note]
        out.append("; ".join(note if pair else f"{label}: {note}" for label, note in notes))
        return tuple(out)

    for kind, head in (("matrices", "sigma"), ("vectors", "l2")):
        matrix = kind == "matrices"
        columns = [f"<{'matrix' if matrix else 'vector'}", "<shape", *(f">{head}({label})" for label in labels)]
        for label in labels[1:]:
            columns.append(f">||{label} - a||{'₂' if matrix else ''}")
            if pair and matrix:
                columns += [">bracket", ">/ √(out/in)", ">its stable rank"]
        rows = inspection.rows(kind)
        names = sorted(rows, key=natural) if not matrix else _common_order(inspection)
        _table(console, [*columns, "<note"], [cells(name, rows[name], matrix) for name in names])
    skipped = inspection.rows("skipped")
    first = {name: next(r for r in rows if r is not None) for name, rows in skipped.items()}
    _table(console, _SKIPPED_COLUMNS, [_skipped_cells(row) for row in first.values()])
    states = [change.status for c in changes for change in c.values()]
    named = ", ".join(f"{states.count(s)} {s}" for s in ("new", "missing", "reshaped") if s in states)
    return f"{states.count('measured')} layers compared{', ' + named if named else ''}, {len(skipped)} skipped"


def _common_order(inspection: Inspection) -> list[str]:
    """The order that `Inspection.order` gave the changes, for the matrices alone."""
    rows = inspection.rows("matrices")
    return [name for name in dict.fromkeys(n for c in inspection.changes for n in c) if name in rows]


def _strict(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become the strings "NaN", "Infinity", which float() and Number() take."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def write_json(inspection: Inspection, stream: IO[str]) -> None:
    first = inspection.reports[0]
    content = {
        "spectral_kernels": __version__,
        **{key: getattr(inspection.options, key) for key in ("tol", "delta", "seed")},
        "files": [asdict(report) for report in inspection.reports],
        "changes": [
            {"file": report.path, "against": first.path, "layers": [asdict(c) for c in change.values()]}
            for report, change in zip(inspection.reports[1:], inspection.changes, strict=True)
        ],
    }
    json.dump(_strict(content), stream, indent=1, allow_nan=False)
    stream.write("\n")


def write_csv(inspection: Inspection, stream: IO[str]) -> None:
    """One line per tensor and file; a layer that a later file lacks has a line of kind "missing" there."""
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for i, report in enumerate(inspection.reports):
        changes = inspection.changes[i - 1] if i else {}
        for kind, rows in (("matrix", report.matrices), ("vector", report.vectors), ("skipped", report.skipped)):
            for row in rows:  # type: ignore[attr-defined]
                line = {"file": report.path, "kind": kind, **asdict(row), "shape": shape_text(row.shape)}
                line["note"] = line.pop("reason", "")
                writer.writerow({**line, **_change_cells(changes.get(row.name))})
        for change in changes.values():
            if change.status == "missing":
                line = {"file": report.path, "kind": "missing", "name": change.name}
                writer.writerow({**line, **_change_cells(change)})


def _change_cells(change: Change | None) -> dict[str, Any]:
    if change is None:
        return {}
    cells = {"change": change.status, "delta": change.delta, "delta_lower": change.lower, "delta_upper": change.upper}
    return {**cells, "delta_stable_rank": change.stable_rank, **({"note": change.note} if change.note else {})}


def write(inspection: Inspection, form: str, target: str) -> None:
    """Write JSON or CSV to a path, or to stdout for "-"."""
    writer = {"json": write_json, "csv": write_csv}[form]
    if target == "-":
        writer(inspection, sys.stdout)
        return
    with open(target, "w", encoding="utf-8", newline="") as stream:
        writer(inspection, stream)
