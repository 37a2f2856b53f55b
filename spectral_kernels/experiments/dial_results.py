"""What the records of the dial's result files say: best runs, shares of the way, curves. Written by `dial.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..bench.measure import Record
from ..bench.runs import load

METHODS = ("AdamW", "SGD", "frobenius", "normalize", "clip 4", "clip 8", "clip 16", "clip 32", "clip 64", "Muon")
CLIP = re.compile(r"clip[ -]?([1-9]\d*)")
GRID_SEED = 0
SMOOTH = 4  # points of a curve whose mean is taken where a loss is read off it


def rank_of(method: str) -> int | None:
    """s of `clip s`; None for any other method."""
    found = CLIP.fullmatch(method)
    return int(found[1]) if found else None


def order(method: str) -> tuple[int, int]:
    """Sorts methods as METHODS has them, other clip ranks among those there."""
    rank = rank_of(method)
    if not rank and method not in METHODS:
        raise ValueError(f"the results name a method {method!r}, which is not one of {', '.join(METHODS)}")
    return (METHODS.index("clip 4"), rank) if rank else (METHODS.index(method), 0)


def best_of(records: Sequence[Record], width: int, steps: int, method: str) -> list[Record]:
    """The runs at the best rate of a grid, one per seed; first the one that the grid was made with."""
    key = {"table": "run", "width": width, "steps": steps, "method": method, "spikes": None}
    runs = [r for r in records if key.items() <= r.items()]
    finite = [r for r in runs if r["validation"] is not None and r["seed"] == GRID_SEED]
    if not finite:
        return []
    best = min(finite, key=lambda r: r["validation"])
    rest = [r for r in runs if (r["k"], r["other"]) == (best["k"], best["other"]) and r["seed"] != GRID_SEED]
    return [best, *sorted(rest, key=lambda r: r["seed"])]


class Part(NamedTuple):
    """All runs of one file with one width and number of steps."""

    described: dict[str, Any]
    records: list[Record]
    width: int
    steps: int
    several: bool = False  # files: the label names the machine

    @property
    def label(self) -> str:
        return f"width {self.width}, {self.steps} steps" + (f", {self.described['machine']}" if self.several else "")

    @property
    def methods(self) -> list[str]:
        """Those with a best run, in the order of the dial."""
        return sorted({r["method"] for r in self.runs() if self.best(r["method"])}, key=order)

    def runs(self, **key: Any) -> list[Record]:
        wanted = {"table": "run", "width": self.width, "steps": self.steps, **key}
        return [r for r in self.records if wanted.items() <= r.items()]

    def best(self, method: str) -> list[Record]:
        return best_of(self.records, self.width, self.steps, method)

    def loss(self, method: str) -> float:
        """Mean validation loss of the seeds at the best rate; inf without runs or where one is not finite."""
        losses = [math.inf if r["validation"] is None else r["validation"] for r in self.best(method)]
        return sum(losses) / len(losses) if losses else math.inf

    def share(self, method: str) -> float | None:
        """(normalize - method) / (normalize - Muon) in mean validation loss; None where an end is missing."""
        low, here, high = (self.loss(m) for m in ("normalize", method, "Muon"))
        if not all(map(math.isfinite, (low, here, high))) or low <= high:
            return None
        return (low - here) / (low - high)

    def rank_for(self, goal: float) -> float | None:
        """The rank with this share, between those measured linear in log s; normalize is rank 1. None: not reached."""
        shares = [(float(rank_of(m) or 0), self.share(m)) for m in self.methods if rank_of(m)]
        points = [(1.0, 0.0), *((rank, share) for rank, share in shares if share is not None)]
        for (a, low), (b, high) in zip(points, points[1:], strict=False):
            if low < goal <= high:
                return a * (b / a) ** ((goal - low) / (high - low))
        return None

    def curve(self, method: str) -> list[tuple[float, float]]:
        """(step, training loss) at the best rate, mean over the seeds; up to the first loss that is not finite."""
        points = []
        for column in zip(*(r["curve"] for r in self.best(method)), strict=False):
            if any(loss is None for _, loss in column):
                break
            points.append((float(column[0][0]), sum(loss for _, loss in column) / len(column)))
        return points

    def smooth(self, method: str) -> list[tuple[float, float]]:
        """The curve, each loss the mean of the last SMOOTH points up to it."""
        points = self.curve(method)
        out = []
        for i, (step, _) in enumerate(points):
            last = points[max(0, i + 1 - SMOOTH) : i + 1]
            out.append((step, sum(loss for _, loss in last) / len(last)))
        return out

    @property
    def times(self) -> dict[str, Any]:
        """method -> kind -> spread of the last timing, over AdamW's."""
        wanted = {"table": "times", "width": self.width, "steps": self.steps}
        found = [r for r in self.records if wanted.items() <= r.items()]
        return found[-1]["methods"] if found else {}

    def ratio(self, method: str) -> float | None:
        """A training step of the method over AdamW's."""
        return self.times[method]["whole"]["median"] if method in self.times else None

    def loss_in_time(self, method: str) -> float | None:
        """Training loss when AdamW's run is over, read off the smoothed curve; None without timing."""
        ratio, points = self.ratio(method), self.smooth(method)
        if ratio is None or not points:
            return None
        done = [loss for step, loss in points if (step + 1) * ratio <= self.steps]
        return done[-1] if done else None

    def time_to(self, method: str, loss: float) -> float | None:
        """Time until the smoothed training loss is this low, in runs of AdamW; None where it never is."""
        ratio = self.ratio(method)
        if ratio is None:
            return None
        return next((ratio * (step + 1) / self.steps for step, x in self.smooth(method) if x <= loss), None)


def parts_of(files: Sequence[Path]) -> Iterator[Part]:
    """Every width and number of steps of every file, narrow ones first."""
    found = []
    for file in files:
        described, records = load(file)
        for width, steps in dict.fromkeys((r["width"], r["steps"]) for r in records if r["table"] == "run"):
            found.append(Part(described, records, width, steps, len(files) > 1))
    return iter(sorted(found, key=lambda part: (part.width, part.steps)))
