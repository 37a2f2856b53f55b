"""`coordinate_check`: do features keep their size, and do they move as much, when a network gets wider?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import arguments
from . import runs
from .hooks import first_tensor
from .measures import slope
from .tables import Table, check_names, shown

TOLERANCE = 0.25  # of a slope: half way from the 0 of Condition 1 to the 1/2 and more of SP and NTP
DOUBT = 2.0  # standard errors: 71 of 72 checks of MLPs under Condition 1 pass so, none of 36 under SP and NTP
MODEL = "(model)"
PASSES, GROWS, VANISHES, BROKEN = "passes", "grows", "vanishes", "not finite"


@dataclass
class Coordinate:
    """One module at one step: RMS entries against width, as exponents; error: standard error of the slope."""

    name: str
    step: int  # updates made
    quantity: str  # "size": of h; "change": of h - h0
    slope: float
    error: float
    low: float  # what passes, up to two standard errors
    high: float
    verdict: str


class CoordinateCheck(Table[Coordinate]):
    """Rows per module, step and quantity; `records` are the measured sizes, dicts of width, seed, step, name, size,
    change."""

    def __init__(self, rows: Iterable[Coordinate], records: list[dict[str, Any]], tolerance: float) -> None:
        super().__init__(rows)
        self.records, self.tolerance = records, tolerance

    @property
    def verdicts(self) -> dict[str, str]:
        """Module -> "passes", or what its first row that fails says of size or change, rows without a number first."""
        out = {row.name: PASSES for row in self.rows}
        for row in sorted(self.rows, key=lambda row: row.verdict != BROKEN):
            if out[row.name] == PASSES != row.verdict:
                out[row.name] = f"{row.quantity} {row.verdict}"
        return out

    @property
    def passed(self) -> bool:
        """Every module passes at every step."""
        return all(row.verdict == PASSES for row in self.rows)

    @property
    def slopes(self) -> dict[str, dict[str, list[float]]]:
        """Module -> {"size": [slope of step 0, 1, ...], "change": [of step 1, 2, ...]}."""
        out: dict[str, dict[str, list[float]]] = {}
        for row in self.rows:
            out.setdefault(row.name, {"size": [], "change": []})[row.quantity].append(row.slope)
        return out

    def plot(self, path: str | Path) -> Path:
        """Save a picture: size and change against width, a panel per module. Needs matplotlib."""
        from .plots import coordinates

        return coordinates(self, path)

    def to_dict(self) -> dict[str, Any]:
        out = {"passed": self.passed, "tolerance": self.tolerance, "verdicts": self.verdicts}
        return {**out, "rows": [asdict(row) for row in self.rows], "records": self.records}

    def _cells(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        columns = (
            "module",
            ">size, step 0",
            ">size, last",
            ">change, step 1",
            ">change, last",
            ">+-",
            ">worst",
            "verdict",
        )
        cells: list[Sequence[str]] = []
        for name, said in self.verdicts.items():
            size, change = self.slopes[name]["size"], self.slopes[name]["change"]
            mine = [row for row in self.rows if row.name == name]
            worst = max((max(r.slope - r.high, r.low - r.slope) for r in mine), default=math.nan)
            error = max((r.error for r in mine if r.step == mine[-1].step), default=math.nan)
            numbers = (size[0], size[-1], change[0] if change else math.nan, change[-1] if change else math.nan)
            cells.append((name, *map(shown, (*numbers, error, worst + self.tolerance)), said))
        return columns, cells

    def __str__(self) -> str:
        said = "passed" if self.passed else "FAILED"
        return f"{super().__str__()}\n\nslopes against width, tolerance {self.tolerance:g}: {said}"


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    steps: int = 5,
    *,
    batches: runs.Batches,
    optimizer: Callable[[nn.Module], Any],
    loss: runs.Loss = F.cross_entropy,
    seeds: Sequence[int] | int = 5,
    names: Iterable[str] | None = None,
    tolerance: float = TOLERANCE,
) -> CoordinateCheck:
    """Train a model at several widths for a few steps, and fit how feature sizes depend on the width.

    make_model(width): a fresh model, drawn from torch's random state, which is set per seed. optimizer(model): any
    with zero_grad and step. batches: a function of the step, or a list of (x, y) gone through in turn; features are
    those of batch 0. loss(model(x), y): a mean. seeds: how many, or which. names: modules (default: all whose output is
    or begins with a tensor of its own; "(model)" is the model). steps=0: sizes at initialization alone.
    A row per module, step and quantity: the exponent p of RMS(h) ~ width^p ("size") and of RMS(h - h0) ("change"), all
    seeds in one fit. Condition 1 asks for 0 of both. A row fails where its slope is further than `tolerance` from it by
    more than two standard errors, so more seeds see sharper; where the output itself does not get wider (logits) its
    size may go as low as -1/2, what random readouts give. Features that never move (inputs)
    have no change. No base model is needed; widths of 64 and more, 8-fold apart, tell most.
    Dropout masks are the same at every step; buffers stay those of the training.
    [paper, Desideratum 1; tolerance: ours]
    """
    runs.check_callable("make_model", make_model)
    runs.check_callable("optimizer", optimizer)
    runs.check_callable("loss", loss)
    sides, trials = runs.check_widths(widths), runs.check_seeds(seeds)
    arguments.check_int("steps", steps, 0)
    arguments.check_number("tolerance", tolerance, 0.0, above=True)
    pick = runs.picker(batches)
    asked = None if names is None else [names] if isinstance(names, str) else list(names)
    records: list[dict[str, Any]] = []
    wider: dict[str, set[int]] = {}  # module -> how many features an input has, per width
    for width, seed in product(sides, trials):
        with runs.seeded(seed):
            model = runs.built(make_model, width)
            stepper = optimizer(model)
            x = pick(0)[0]
            start = _features(model, asked, x)
            for name, h in start.items():
                wider.setdefault(name, set()).add(h.numel() // max(1, len(h)))
            told = runs.training(model, stepper, steps, pick, loss)
            for step in range(steps + 1):
                now = start if step == 0 else _features(model, asked, x) if next(told, None) is not None else {}
                for name, h0 in start.items():
                    size, change = math.nan, math.nan  # after a run that ended
                    if name in now:
                        size, change = _rms(now[name]), _rms(now[name] - h0)
                    key = {"width": width, "seed": seed, "step": step, "name": name}
                    records.append({**key, "size": size, "change": change})
    return CoordinateCheck(_rows(records, wider, steps, tolerance), records, tolerance)


def _rows(records: list[dict[str, Any]], wider: dict[str, set[int]], steps: int, tolerance: float) -> list[Coordinate]:
    held: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        held.setdefault((record["name"], record["step"]), []).append(record)
    rows = []
    for name, sizes in wider.items():
        still = all(record["change"] == 0 for step in range(steps + 1) for record in held[name, step])
        for step in range(steps + 1):
            for quantity in ("size", "change"):
                if quantity == "change" and (step == 0 or still):
                    continue
                mine = held[name, step]
                fit = slope([r["width"] for r in mine], [r[quantity] for r in mine])
                low = -tolerance - (0.5 if quantity == "size" and len(sizes) == 1 else 0.0)
                rows.append(Coordinate(name, step, quantity, *fit, low, tolerance, _verdict(*fit, low, tolerance)))
    return rows


def _verdict(p: float, error: float, low: float, high: float) -> str:
    doubt = 0.0 if math.isnan(error) else DOUBT * error  # of two points there is none
    low, high = low - doubt, high + doubt
    return BROKEN if math.isnan(p) else GROWS if p > high else VANISHES if p < low else PASSES


def _features(model: nn.Module, names: Sequence[str] | None, x: Any) -> dict[str, Tensor]:
    """Name -> output of every module for one batch, in float64; the model's buffers and the random state stay."""
    modules = dict(model.named_modules())
    chosen = list(modules) if names is None else check_names(names, list(modules), "module")
    found: dict[str, Tensor] = {}
    seen: list[Tensor] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            h = first_tensor(output)
            handed_on = (
                names is None and next(module.children(), None) is not None and any(h is other for other in seen)
            )
            if h is not None and h.is_floating_point() and not handed_on:  # a container's output is its last module's
                seen.append(h)
                found[name or MODEL] = h.detach().double().clone().reshape(h.shape or (1,))  # the last of several calls

        return hook

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    handles = [modules[name].register_forward_hook(keep(name)) for name in chosen]
    try:
        with torch.no_grad(), runs.seeded(0):
            model(x)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("no module of the model returns a tensor: nothing to check")
    return found


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
