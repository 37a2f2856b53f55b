"""`lr_transfer`: does the best learning rate of a narrow network serve a wide one?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn import functional as F

from ..ops import arguments
from . import runs
from .tables import Table, shown


@dataclass
class WidthCurve:
    """Loss against rate at one width: inf where a run diverged."""

    width: int
    lrs: list[float]
    losses: list[float]  # mean over seeds
    best: int | None  # index of the smallest loss; None where every run diverged
    optimum: float  # of a parabola through the best point and its neighbours over log lr, else the grid's best point
    shift: float  # of the optimum from that of the first width, in grid points

    @property
    def name(self) -> str:
        return str(self.width)

    @property
    def edge(self) -> bool:
        """The best point is the first or the last of the grid: the optimum may lie outside."""
        return self.best is None or self.best in (0, len(self.lrs) - 1)


class LrTransfer(Table[WidthCurve]):
    """A row per width."""

    def __init__(self, rows: Iterable[WidthCurve], records: list[dict[str, Any]]) -> None:
        super().__init__(rows)
        self.records = records

    @property
    def shift(self) -> float:
        """Grid points from the optimum of the narrowest to that of the widest network, signed; NaN without either."""
        return self.rows[-1].shift

    @property
    def spread(self) -> float:
        """Grid points between the smallest and the largest optimum of all widths."""
        shifts = [row.shift for row in self.rows]
        return math.nan if any(map(math.isnan, shifts)) else max(shifts) - min(shifts)

    def transfers(self, points: int = 1) -> bool:
        """The best grid point of every width lies within `points` of the narrowest network's, none at an edge."""
        found = [row.best for row in self.rows if row.best is not None and not row.edge]
        return len(found) == len(self.rows) and max(abs(i - found[0]) for i in found) <= points

    def plot(self, path: str | Path) -> Path:
        """Save a picture: loss against lr, a line per width, optima marked. Needs matplotlib."""
        from .plots import transfer

        return transfer(self, path)

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "edge": row.edge} for row in self.rows]
        return {"rows": rows, "shift": self.shift, "spread": self.spread, "records": self.records}

    def _cells(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        columns = ("width", *(f">{lr:.3g}" for lr in self.rows[0].lrs), ">best lr", ">shift", "note")
        cells = [
            (str(r.width), *map(shown, r.losses), shown(r.optimum), shown(r.shift), "edge" if r.edge else "")
            for r in self.rows
        ]
        return columns, cells  # type: ignore[return-value]


def lr_transfer(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    lrs: Sequence[float],
    steps: int = 100,
    *,
    batches: runs.Batches,
    optimizer: Callable[[nn.Module, float], Any],
    loss: runs.Loss = F.cross_entropy,
    seeds: Sequence[int] | int = 1,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> LrTransfer:
    """Train every width at every rate and compare where the loss is smallest.

    make_model(width): a fresh model, drawn from torch's random state, which is set per seed: all rates start from the
    same weights. optimizer(model, lr): any with zero_grad and step; sk.optim.param_groups gives Condition 1's rates.
    batches: a function of the step, or a list of (x, y) gone through in turn. lrs: at least three, evenly spaced on a
    log scale for shifts to have a unit.
    A run's loss: evaluate(model) at its end, else the mean of its last tenth of training losses; inf where a loss or
    the result was not finite. Raises ValueError for widths or lrs that are not different, positive numbers.
    """
    runs.check_callable("make_model", make_model)
    runs.check_callable("optimizer", optimizer)
    runs.check_callable("loss", loss)
    if evaluate is not None:
        runs.check_callable("evaluate", evaluate)
    sides, rates, trials = runs.check_widths(widths), runs.check_lrs(lrs), runs.check_seeds(seeds)
    arguments.check_int("steps", steps, 1)
    pick = runs.picker(batches)
    records: list[dict[str, Any]] = []
    for width, lr, seed in product(sides, rates, trials):
        with runs.seeded(seed):
            model = runs.built(make_model, width)
            losses = list(runs.training(model, optimizer(model, lr), steps, pick, loss))
            last = losses[-max(1, steps // 10) :]
            value = math.fsum(last) / len(last) if math.isfinite(losses[-1]) else math.inf
            if evaluate is not None and math.isfinite(value):
                value = float(evaluate(model))
        records.append({"width": width, "lr": lr, "seed": seed, "loss": value if math.isfinite(value) else math.inf})
    return LrTransfer(curves(records), records)


def curves(records: Sequence[dict[str, Any]]) -> list[WidthCurve]:
    """A curve per width from dicts of width, lr, seed and loss; the narrowest first, the others shifted against it."""
    held: dict[int, dict[float, list[float]]] = {}
    for record in records:
        held.setdefault(record["width"], {}).setdefault(record["lr"], []).append(record["loss"])
    rows: list[WidthCurve] = []
    for width in sorted(held):
        lrs = sorted(held[width])
        losses = [sum(held[width][lr]) / len(held[width][lr]) for lr in lrs]
        losses = [value if math.isfinite(value) else math.inf for value in losses]
        best = min(range(len(lrs)), key=losses.__getitem__)
        found = best if math.isfinite(losses[best]) else None
        rows.append(WidthCurve(width, lrs, losses, found, optimum(lrs, losses), math.nan))
    lrs = rows[0].lrs
    point = math.log(lrs[-1] / lrs[0]) / (len(lrs) - 1)
    for row in rows:
        row.shift = math.log(row.optimum / rows[0].optimum) / point
    return rows


def optimum(lrs: Sequence[float], losses: Sequence[float]) -> float:
    """The rate of the smallest loss: the vertex of the parabola over log lr through the best point and its two
    neighbours, the best point itself at an edge or beside a diverged run, NaN where all diverged. lrs: in order."""
    i = min(range(len(lrs)), key=losses.__getitem__)
    if not math.isfinite(losses[i]):
        return math.nan
    if not 0 < i < len(lrs) - 1 or not (math.isfinite(losses[i - 1]) and math.isfinite(losses[i + 1])):
        return lrs[i]
    a, b = (math.log(lrs[j] / lrs[i]) for j in (i - 1, i + 1))
    left, right = losses[i - 1] - losses[i], losses[i + 1] - losses[i]  # both >= 0
    # p t^2 + q t through (a, left), (0, 0), (b, right)
    p = (right / b - left / a) / (b - a)
    q = left / a - p * a
    return lrs[i] if p <= 0 else lrs[i] * math.exp(-q / (2 * p))
