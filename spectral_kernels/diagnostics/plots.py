"""Pictures of the checks across widths. matplotlib is imported where a picture is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coordinates import CoordinateCheck
    from .transfer import LrTransfer

FORMATS = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")
COLUMNS = 4


def blank(path: str | Path, columns: int, rows: int = 1) -> tuple[Path, Any, Any]:
    """(path, figure, axes); ValueError for a name that is no picture's, ImportError without matplotlib."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValueError(f"path: a picture's name ends in one of {', '.join(FORMATS)}, not {str(path)!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need the package matplotlib: pip install 'spectral-kernels[plot]'") from None
    figure = Figure(figsize=(0.6 + 3.2 * columns, 0.4 + 2.8 * rows), layout="constrained")
    return target, figure, figure.subplots(rows, columns, squeeze=False)


def shade(i: int, count: int) -> Any:
    """Colors from dark to light, in order."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * i / max(1, count - 1))


def coordinates(check: CoordinateCheck, path: str | Path) -> Path:
    """RMS(h) (dashed) and RMS(h - h0) (solid) against width, a panel per module, a color per step."""
    names = list(check.verdicts)
    columns = min(COLUMNS, len(names))
    target, figure, axes = blank(path, columns, math.ceil(len(names) / columns))
    steps = sorted({record["step"] for record in check.records})
    for ax, name in zip(axes.flat, names, strict=False):
        for i, step in enumerate(steps):
            mine = [r for r in check.records if r["name"] == name and r["step"] == step]
            color = shade(i, len(steps))
            for quantity, style in (("size", "--"), ("change", "-")):
                points = _means(mine, quantity)
                if points:
                    label = f"step {step}" if quantity == ("size" if step == 0 else "change") else None
                    ax.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=color, label=label)
        ax.set(xscale="log", yscale="log", xlabel="width")
        ax.set_xscale("log", base=2)
        verdict = check.verdicts[name]
        ax.set_title(f"{name}: {verdict}", fontsize=9, color="black" if verdict == "passes" else "tab:red")
        ax.grid(alpha=0.25)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    axes[0, 0].set_ylabel("RMS of h (dashed), of its change (solid)", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(target, dpi=110)
    return target


def transfer(found: LrTransfer, path: str | Path) -> Path:
    """Loss against lr, a line per width, its optimum marked; diverged runs have no point."""
    target, figure, axes = blank(path, 1)
    ax = axes[0, 0]
    for i, row in enumerate(found.rows):
        points = [(lr, loss) for lr, loss in zip(row.lrs, row.losses, strict=True) if math.isfinite(loss)]
        color = shade(i, len(found.rows))
        if points:
            ax.plot(*zip(*points, strict=True), "-o", ms=3, color=color, label=str(row.width))
            ax.axvline(row.optimum, color=color, lw=0.8, ls=":")
    ax.set(xscale="log", xlabel="lr", ylabel="loss")
    finite = [loss for row in found.rows for loss in row.losses if math.isfinite(loss)]
    if finite and min(finite) > 0:
        ax.set_yscale("log")
    ax.legend(title="width", fontsize=7, title_fontsize=7, frameon=False)
    ax.grid(alpha=0.25)
    figure.savefig(target, dpi=110)
    return target


def _means(records: Sequence[dict[str, Any]], quantity: str) -> list[tuple[int, float]]:
    """(width, geometric mean over seeds) where every seed has a place on a log axis."""
    held: dict[int, list[float]] = {}
    for record in records:
        held.setdefault(record["width"], []).append(record[quantity])
    kept = {w: v for w, v in held.items() if all(math.isfinite(x) and x > 0 for x in v)}
    return [(w, math.exp(math.fsum(map(math.log, v)) / len(v))) for w, v in sorted(kept.items())]
