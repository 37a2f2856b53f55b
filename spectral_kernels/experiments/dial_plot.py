"""The pictures of docs/clip.md: loss against steps, against time and against rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints import InputError
from .dial_results import Part, parts_of, rank_of

COLORS = {"AdamW": "black", "SGD": "0.6", "frobenius": "tab:olive", "normalize": "tab:brown", "Muon": "tab:red"}
STYLES = {"AdamW": "--", "SGD": ":", "frobenius": ":"}


def draw(files: Sequence[Path], folder: Path) -> list[Path]:
    """Write dial-steps.png, dial-rank.png and, where times were taken, dial-time.png; returns their paths."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs the package matplotlib: pip install 'spectral-kernels[plot]'") from None
    parts = [part for part in parts_of(files) if part.methods]
    timed = [part for part in parts if part.times]
    pictures = {"steps": parts, "time": timed, "rank": parts}
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, shown in pictures.items():
        if not shown:
            continue
        columns = len(shown) + (name == "rank")
        figure = Figure(figsize=(1 + 3.8 * columns, 3.4), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for part, one in zip(shown, axes, strict=False):
            _rank(one, part) if name == "rank" else _curves(one, part, name)
        if name == "rank":
            _shares(axes[-1], shown)
        axes[0].legend(fontsize=7, frameon=False)
        for one in axes:
            one.grid(alpha=0.25)
        made.append(folder / f"dial-{name}.png")
        figure.savefig(made[-1], dpi=110)
    return made


def color(method: str, part: Part) -> Any:
    """Clip ranks go from blue to red as the dial does."""
    from matplotlib import colormaps

    ranks = [m for m in part.methods if rank_of(m)]
    return COLORS[method] if method in COLORS else colormaps["viridis"]((ranks.index(method) + 1) / (len(ranks) + 1))


def _curves(axes: Any, part: Part, against: str) -> None:
    lows = []
    for method in part.methods:
        points, ratio = part.smooth(method), part.ratio(method)
        if not points or (against == "time" and ratio is None):
            continue
        scale = (ratio or 1.0) if against == "time" else 1.0
        label = f"{method}: rate {part.best(method)[0]['lr']:.2g}"
        style = {"color": color(method, part), "linestyle": STYLES.get(method, "-"), "linewidth": 1.3}
        axes.plot([scale * step for step, _ in points], [loss for _, loss in points], label=label, **style)
        lows.append(points[-1][1])
    if lows:
        axes.set_ylim(min(lows) - 0.1, 2 * min(lows) + 0.5)
    if against == "time":
        axes.set_xlim(0, 2 * part.steps)  # what takes longer is cut off
    axes.set_title(part.label, fontsize=9, loc="left")
    axes.set_xlabel("step" if against == "steps" else "time (training steps of AdamW)")
    axes.set_ylabel("training loss (nats)")


def _rank(axes: Any, part: Part) -> None:
    """Validation loss of every seed at the best rate against s; AdamW as a line."""
    places = {m: 1 if m == "normalize" else part.width if m == "Muon" else rank_of(m) for m in part.methods}
    dial = [m for m in part.methods if places[m]]
    for method in dial:
        losses = [r["validation"] for r in part.best(method) if r["validation"] is not None]
        axes.plot([places[method]] * len(losses), losses, ".", color=color(method, part), markersize=5)
    means = [part.loss(m) for m in dial]
    axes.plot([places[m] for m in dial], means, color="0.5", linewidth=1, label="normalize, clip, Muon")
    if "AdamW" in part.methods:
        axes.axhline(part.loss("AdamW"), color="black", linestyle="--", linewidth=1, label="AdamW")
    _ticks(axes, {str(places[m]): places[m] for m in dial})
    axes.set_xlabel("rank s at which singular values are clipped")
    axes.set_ylabel("validation loss (nats)")
    axes.set_title(part.label, fontsize=9, loc="left")


def _ticks(axes: Any, places: dict[str, Any]) -> None:
    """Logarithmic, with these labels."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), list(places))
    axes.set_xticks([], minor=True)


def _shares(axes: Any, parts: Sequence[Part]) -> None:
    """Share of the way from normalize to Muon against s / n, a line per width."""
    for part in parts:
        points = [(rank / part.width, part.share(m)) for m in part.methods if (rank := rank_of(m))]
        known = [(x, 100 * y) for x, y in points if y is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], "o-", markersize=3, linewidth=1, label=part.label)
    ranks = {rank / part.width for part in parts for m in part.methods if (rank := rank_of(m))}
    _ticks(axes, {f"1/{1 / x:g}": x for x in ranks})
    axes.set_xlabel("s / n")
    axes.set_ylabel("% of the way from normalize to Muon")
    axes.legend(fontsize=7, frameon=False)
