"""Measured values against width: fitted exponents beside what the paper predicts, as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..bench.measure import Record
from ..diagnostics.measures import slope

NEAR = 0.15  # a fitted exponent this far from the predicted one still counts as it [ours]


class Bounds(NamedTuple):
    """What the exponent has to be: predicted (for the table) and the interval that counts as agreement."""

    predicted: float | None = None
    low: float = -math.inf
    high: float = math.inf

    def holds(self, exponent: float) -> bool:
        return self.low <= exponent <= self.high


def near(predicted: float) -> Bounds:
    return Bounds(predicted, predicted - NEAR, predicted + NEAR)


def at_most(high: float, predicted: float) -> Bounds:
    return Bounds(predicted, high=high)


NO_DECAY = Bounds(0.0, low=-NEAR)
UNKNOWN = Bounds()


class Line(NamedTuple):
    """One quantity: (width, value) of every trial, sorted by width."""

    name: str
    points: list[tuple[int, float]]
    bounds: Bounds = UNKNOWN

    @property
    def widths(self) -> list[int]:
        return sorted({width for width, _ in self.points})

    def mean(self, width: int) -> float:
        values = [value for w, value in self.points if w == width]
        return sum(values) / len(values) if values else math.nan

    @property
    def exponent(self) -> tuple[float, float]:
        """Fitted exponent over all trials and its standard error; NaN from fewer than two widths."""
        if len(self.widths) < 2:
            return math.nan, math.nan
        return slope([width for width, _ in self.points], [value for _, value in self.points])

    @property
    def verdict(self) -> str:
        exponent = self.exponent[0]
        if self.bounds == UNKNOWN or len(self.widths) < 2:
            return ""
        return "yes" if self.bounds.holds(exponent) else "no"  # NaN: no


def line(
    name: str, records: Iterable[Record], value: Callable[[Record], float | None], bounds: Bounds = UNKNOWN
) -> Line:
    """One point per record; a value of None, as of a run that diverged, is NaN."""
    points = [(r["width"], math.nan if value(r) is None else float(value(r) or 0.0)) for r in records]
    return Line(name, sorted(points, key=lambda p: p[0]), bounds)


def number(value: float) -> str:
    return "not finite" if not math.isfinite(value) else f"{value:.3g}"


def signed(value: float) -> str:
    return "" if not math.isfinite(value) else f"{value:+.2f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def table(lines: Sequence[Line], what: str = "quantity") -> str:
    """Mean over the trials at every width, fitted and predicted exponent, and whether they agree."""
    widths = sorted({width for one in lines for width in one.widths})
    judged = any(one.bounds != UNKNOWN for one in lines)
    head = [what, *(f"n = {width}" for width in widths), "slope"]
    head += ["predicted", "wanted", "holds"] if judged else []
    rows = []
    for one in lines:
        exponent, error = one.exponent
        fitted = signed(exponent) + (f" ± {error:.2f}" if math.isfinite(error) else "")
        cells = [one.name, *(number(one.mean(w)) if w in one.widths else "" for w in widths), fitted or "none"]
        if judged:
            predicted = "" if one.bounds.predicted is None else signed(one.bounds.predicted)
            cells += [predicted, wanted(one.bounds), one.verdict]
        rows.append(cells)
    return markdown(head, rows)


def wanted(bounds: Bounds) -> str:
    low, high = bounds.low, bounds.high
    if math.isfinite(low) and math.isfinite(high):
        return f"{signed(low)} to {signed(high)}"
    if math.isfinite(low):
        return f"≥ {signed(low)}"
    return f"≤ {signed(high)}" if math.isfinite(high) else ""
