"""The picture of `inspect --plot`: a line per layer, spectral norm against sqrt(fan_out / fan_in), and stable rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .checkpoints import InputError
from .reporting import Inspection, plain

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
ROW_INCHES = 0.15  # a 6 point label and its space
MOST_ROWS = 400  # above, lines are thinned and every k-th layer is named: a picture of 60 inches is read by nobody
COLORS = ("#1f6f8b", "#d1495b", "#66a182", "#edae49", "#6c4f9c", "#8d6a4a")


def check(target: str) -> None:
    """Refuse a picture that could not be written, before anything is measured."""
    if Path(target).suffix.lower() not in FORMATS:
        raise InputError(f"--plot {target}: a picture's name ends in one of {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs the package matplotlib: pip install 'spectral-kernels[plot]'") from None


def draw(inspection: Inspection, target: str) -> None:
    """Save the picture of all matrices, in the order of the tables."""
    figure = picture(inspection)
    figure.savefig(target, dpi=110)


def picture(inspection: Inspection) -> Any:
    """A matplotlib Figure with two panels that share the layers as their vertical axis."""
    from matplotlib.figure import Figure

    rows = inspection.rows("matrices")
    names = list(rows)
    height = max(2.6, 1.4 + ROW_INCHES * min(len(names), MOST_ROWS))
    labels = [_short(plain(name)) for name in names]
    every = max(1, math.ceil(len(names) / MOST_ROWS))
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, report in enumerate(inspection.reports):
        color = COLORS[i % len(COLORS)]
        held = [(y, rows[name][i]) for y, name in enumerate(names) if rows[name][i] is not None]
        finite = [(y, row) for y, row in held if math.isfinite(row.sigma) and row.sigma > 0]
        at = [y for y, _ in finite]
        label = "spectral norm" if len(inspection.reports) == 1 else Path(report.path).name
        # layers that did not change lie on each other: every later file is a smaller dot inside the former
        dot = dict(ms=max(2.0, 3.5 + 2 * (len(inspection.reports) - 1 - i)), color=color, zorder=3 + i)
        left.plot([row.sigma for _, row in finite], at, "o", label=label, **dot)
        left.hlines(at, [row.lower for _, row in finite], [row.upper for _, row in finite], color=color, lw=1.4)
        right.plot([row.stable_rank for _, row in finite], at, "o", **dot)
        odd = [y for y, row in held if not math.isfinite(row.sigma)]
        if odd:  # at the edge of the panel: their norm is not a place on the axis
            left.plot(
                [0.99] * len(odd), odd, "x", color=color, transform=left.get_yaxis_transform(), label="nan or inf"
            )
    first = [next(r for r in rows[name] if r is not None) for name in names]
    goal = [(y, row.target) for y, row in enumerate(first) if math.isfinite(row.target) and row.target > 0]
    style = dict(ms=7, mew=1.2, color="#555555", zorder=2)
    left.plot([t for _, t in goal], [y for y, _ in goal], "|", label="√(fan_out / fan_in)", **style)
    left.set_yticks(range(0, len(names), every), labels[::every], fontsize=6)
    left.set_ylim(len(names) - 0.5, -0.5)
    for panel, title in ((left, "spectral norm"), (right, "stable rank")):
        panel.set_xscale("log")
        panel.set_xlabel(title, fontsize=8)
        panel.tick_params(axis="x", labelsize=7)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", which="major", color="#dddddd", lw=0.6)
        panel.grid(axis="y", color="#f0f0f0", lw=0.5)
        panel.set_axisbelow(True)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _short(name: str, most: int = 48) -> str:
    """A long name keeps its end, where the layer says what it is."""
    return name if len(name) <= most else "…" + name[-(most - 1) :]
