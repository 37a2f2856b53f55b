"""Table and picture of the whole trainings, made from the result file that benchmarks/training.py writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectral_kernels.bench.measure import Record
from spectral_kernels.bench.runs import load, where

MARKER = re.compile(r"(<!-- study:training -->\n)(?P<body>.*?)(<!-- /study -->)", re.DOTALL)
NAMES = {
    "normalize": "`SpectralOptimizer`, normalize",
    "frobenius": "`SpectralOptimizer`, frobenius",
    "AdamW": "AdamW (fused)",
    "SGD": "SGD, momentum 0.9",
    "Muon": "Muon (fp32) + AdamW",
}
HEAD = (
    "training",
    "optimizer",
    "best lr",
    "validation loss",
    "training loss",
    "training step",
    "optimizer step",
    "grid",
)


def best_of(records: Sequence[Record], case: str, method: str) -> list[Record]:
    """The runs at the best rate of a grid, one per seed; first the one that the grid was made with."""
    runs = [r for r in records if r["table"] == "run" and (r["case"], r["method"]) == (case, method)]
    finite = [r for r in runs if r["validation"] is not None and r["seed"] == runs[0]["seed"]]
    if not finite:
        return []
    best = min(finite, key=lambda r: r["validation"])
    return [best, *(r for r in runs if r["lr"] == best["lr"] and r["other"] == best["other"] and r is not best)]


def number(values: Sequence[float | None]) -> str:
    """Mean and range over the seeds."""
    found = [v for v in values if v is not None]
    if len(found) < len(values):
        return "not finite"
    return f"{sum(found) / len(found):.3f} ({min(found):.3f}–{max(found):.3f})"


def times(record: Record, method: str, kind: str) -> str:
    found = record["methods"].get(method)
    if not found:
        return ""
    one = found[kind]
    return f"{one['median']:.2f} ({one['p20']:.2f}–{one['p80']:.2f})"


def grid(records: Sequence[Record], case: str, method: str) -> str:
    """Rate: validation loss of every run of the first seed, by rate."""
    runs = [r for r in records if r["table"] == "run" and (r["case"], r["method"]) == (case, method)]
    runs = sorted((r for r in runs if r["seed"] == runs[0]["seed"]), key=lambda r: r["lr"])
    lost = "not finite"
    return ", ".join(
        f"{r['lr']:.2g}: {lost if r['validation'] is None else format(r['validation'], '.3f')}" for r in runs
    )


def table(described: dict[str, Any], records: Sequence[Record]) -> str:
    """Every case and optimizer, in the order of the validation loss."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in records):
        timed = next((r for r in records if r["table"] == "times" and r["case"] == case), {"methods": {}})
        methods = dict.fromkeys(r["method"] for r in records if r["table"] == "run" and r["case"] == case)
        found = {method: best_of(records, case, method) for method in methods}
        mean = {m: sum(r["validation"] or 1e9 for r in runs) / len(runs) if runs else 1e9 for m, runs in found.items()}
        steps = next(r["steps"] for r in records if r["case"] == case)
        for method in sorted(methods, key=lambda m: mean[m]):
            runs = found[method]
            cells = [f"{case}, {steps} steps", NAMES[method], f"{runs[0]['lr']:.2g}" if runs else "none"]
            cells += [number([r[key] for r in runs]) if runs else "not finite" for key in ("validation", "train")]
            cells += [times(timed, method, "whole"), times(timed, method, "step"), grid(records, case, method)]
            lines.append("| " + " | ".join(cells) + " |")
    seeds = len(dict.fromkeys(r["seed"] for r in records if r["table"] == "run"))
    note = (
        f"Losses: mean (range) of {seeds} seeds at the best rate of a factor-2 grid with one seed. "
        "Steps: time / AdamW's, in turns, median (p20–p80). Grid: rate: validation loss."
    )
    head = "| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD)
    return "\n".join([where(described), "", head, *lines, "", note])


def render(text: str, path: Path) -> str:
    """The page with its table made anew from a result file; ValueError where it has no markers."""
    if not MARKER.search(text):
        raise ValueError("the page has no lines <!-- study:training --> and <!-- /study -->")
    made = table(*load(path))
    return MARKER.sub(lambda m: f"{m[1]}\n{made}\n\n{m[3]}", text)


def draw(records: Sequence[Record], case: str, path: Path) -> None:
    """Two panels for one case: training loss at the best rate against steps and against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    steps, seconds = figure.subplots(1, 2, sharey=True)
    lows = []
    for method in dict.fromkeys(r["method"] for r in records if r["table"] == "run" and r["case"] == case):
        runs = best_of(records, case, method)
        if not runs:
            continue
        curve = [point for point in runs[0]["curve"] if point[2] is not None]
        label = f"{NAMES[method].replace('`', '')}: lr {runs[0]['lr']:.2g}"
        steps.plot([p[0] for p in curve], [p[2] for p in curve], label=label, linewidth=1.3)
        seconds.plot([p[1] for p in curve], [p[2] for p in curve], linewidth=1.3)
        lows.append(min(p[2] for p in curve))
    if lows:
        steps.set_ylim(min(lows) - 0.1, 2 * min(lows) + 1)
    steps.set_xlabel("step")
    steps.set_ylabel("training loss (nats)")
    seconds.set_xlabel("seconds")
    steps.legend(fontsize=7, frameon=False)
    steps.set_title(case, fontsize=9, loc="left")
    for axes in (steps, seconds):
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
