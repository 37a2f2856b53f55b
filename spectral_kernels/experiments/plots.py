"""Axes that several figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .fits import Line, signed

COLORS = ("tab:blue", "tab:orange", "tab:gray", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


def panels(figure: Any, count: int, columns: int = 4) -> list[Any]:
    """That many axes in rows of `columns`, the figure sized for them."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure.set_size_inches(0.4 + 3.3 * columns, 0.3 + 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes[count:]:
        one.set_visible(False)
    return axes[:count]


def against_width(axes: Any, lines: Sequence[Line], title: str, *, legend: bool = True) -> None:
    """Every trial as a point, means as a line, both axes logarithmic; the fitted exponent in the legend."""
    for one, color in zip(lines, COLORS * 3, strict=False):
        label = f"{one.name}: {signed(one.exponent[0]) or 'no slope'}"
        axes.plot([w for w, _ in one.points], [v for _, v in one.points], ".", color=color, markersize=3, alpha=0.5)
        axes.plot(one.widths, [one.mean(w) for w in one.widths], color=color, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("width n")
    finish(axes, title, legend)


def against_batch(axes: Any, curves: dict[str, list[tuple[int, float]]], title: str, ylabel: str) -> None:
    """A curve per name against the batch size."""
    for (name, points), color in zip(curves.items(), COLORS * 3, strict=False):
        style = "--" if "trained" in name else "-"
        axes.plot([b for b, _ in points], [v for _, v in points], style, marker=".", color=color, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size B")
    axes.set_ylabel(ylabel)
    finish(axes, title, True)


def finish(axes: Any, title: str, legend: bool) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.25)
    if legend:
        axes.legend(fontsize=7, frameon=False)
