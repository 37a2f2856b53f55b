"""How far the norms that `SpectralOptimizer` divides by are from the exact ones, in every step of real training runs.

    python -m spectral_kernels.bench.tracking --out benchmarks/results/tracking.json [--docs docs/tracking.md] [--quick]

After every step the estimate of each matrix's ||X||_2 is compared with the float64 norm of the momentum X itself. The
rival is what public packages do: one power iteration per step, two products, started from the last step's vector, on
the same matrices of the same run. An error is 1 - estimate / exact: positive where the estimate is low, and so the step
too long.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.layout import kind_of
from . import environment
from .measure import rounded
from .rivals import exact
from .tracking_page import HEAD, line, write_table
from .training import Spikes, Task, groups, kinds, task, train
from .training_data import text_crc

UNSTEADY = 3  # first steps: reported, but left out of the statistics
ROUNDING = 2e-6  # an estimate may exceed the truth by this share: float32 products over sides up to 1024
P99, WORST, FIRST = 2e-3, 1e-2, 1e-2  # what is asked for (the first step: a cold start)
READS = {0.95: 1.7, 0.0: 2.05}  # momentum -> most mean reads per matrix and step
MOMENTA, BLOCKS = (0.95, 0.9, 0.0), (4, 8)


class Run(NamedTuple):
    """A training run to be observed; lr in units of the paper's rule."""

    task: str
    width: int
    steps: int
    lr: float
    spikes: Spikes | None = None

    @property
    def label(self) -> str:
        spiked = f", spikes of {self.spikes.size:g} × the norm" if self.spikes else ""
        return f"{self.task} {self.width}{spiked}"


RUNS = (
    Run("transformer", 128, 150, 0.02),
    Run("transformer", 192, 90, 0.02, Spikes(15, 3.0)),
    Run("transformer", 192, 90, 0.02, Spikes(15, 40.0)),
    Run("mlp", 256, 150, 0.05),
    Run("convnet", 32, 150, 0.05),
)
QUICK = (
    Run("transformer", 32, 12, 0.02),
    Run("transformer", 32, 12, 0.02, Spikes(5, 40.0)),
    Run("mlp", 64, 20, 0.05),
    Run("convnet", 8, 20, 0.05),
)


# -- what the optimizer says of its last step


class Observation(NamedTuple):
    """One parameter's k matrices: X (k, m, n), and per matrix the estimate of ||X||_2, its upper bound, the reads."""

    name: str
    X: Tensor
    sigma: Tensor
    reads: Tensor
    upper: Tensor


def matrices_of(X: Tensor, kind: str, groups: int = 1) -> Tensor:
    """(k, m, n): a matrix as a stack of one; a gradient (out, in, *kernel) as one matrix per position and group."""
    if kind != "conv":
        return X if X.ndim == 3 else X.unsqueeze(0)
    if X.ndim == 3:  # a momentum, kept in this shape
        return X
    out, fan_in = X.shape[:2]
    flat = X.reshape(groups, out // groups, fan_in, -1)
    return flat.permute(3, 0, 1, 2).reshape(-1, out // groups, fan_in)


def observed(optimizer: Any, names: Mapping[Any, str]) -> list[Observation]:
    """The last step of a `SpectralOptimizer`, one entry per parameter of kind matrix or conv."""
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for parameter, info in optimizer.last_step():
        group = group_of[parameter]
        kind = group.get("kind") or kind_of(parameter.shape)
        if kind not in ("matrix", "conv"):
            continue
        buffer = optimizer.state[parameter].get("momentum_buffer")
        X = parameter.grad if buffer is None else buffer
        numbers = (info.sigma, info.reads, info.upper)
        sigma, reads, upper = (torch.as_tensor(x).detach().double().cpu().flatten() for x in numbers)
        X = matrices_of(X.detach(), kind, group.get("groups") or 1)
        found.append(Observation(names[parameter], X, sigma, reads, upper))
    return found


# -- the rival


class WarmPower:
    """One power iteration per step and matrix, from the vector of the step before: two products, nothing shared."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.vectors: dict[str, Tensor] = {}

    def __call__(self, name: str, X: Tensor) -> Tensor:
        """(k,) float64: ||X' y|| / ||y||, y = X v, for X (k, m, n); v becomes X' y / ||X' y||."""
        v = self.vectors.get(name)
        if v is None:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + len(self.vectors))
            v = torch.randn(X.shape[0], X.shape[2], 1, generator=generator).to(X)
        y = X @ (v / torch.linalg.vector_norm(v, dim=1, keepdim=True))
        w = X.mT @ y
        norms = [torch.linalg.vector_norm(z.double(), dim=(1, 2)).cpu() for z in (w, y)]
        alive = norms[0] > 0  # a zero matrix keeps its vector
        self.vectors[name] = torch.where(alive[:, None, None].to(X.device), w, v)
        return torch.where(alive, norms[0] / norms[1], torch.zeros_like(norms[0]))


# -- statistics


class Trace(NamedTuple):
    """All steps of a run, each (steps, N) float64 over the N matrices of the model."""

    exact: Tensor
    sigma: Tensor
    reads: Tensor
    upper: Tensor
    power: Tensor


def shortfall(sigma: Tensor, truth: Tensor) -> Tensor:
    """1 - sigma / truth; of a zero matrix 0 where sigma is 0 too. A sigma that is not finite is infinitely wrong."""
    error = torch.where(truth > 0, 1 - sigma / truth, torch.where(sigma == 0, 0.0, -torch.inf))
    return torch.where(torch.isfinite(sigma), error, torch.inf)


def spread_of(errors: Tensor) -> dict[str, float | None]:
    """Mean, percentiles and worst of |errors|, and `above`: the most by which an estimate exceeds the truth."""
    size = errors.abs().flatten()
    ordered = size.sort().values

    def percentile(p: float) -> float:
        return float(
            ordered[min(len(ordered) - 1, int(p * len(ordered)))]
        )  # an error that did occur, not a mean of two

    found = {"mean": float(size.mean()), "p50": percentile(0.5), "p90": percentile(0.9), "p99": percentile(0.99)}
    found |= {"worst": float(ordered[-1]), "above": max(0.0, float(-errors.min()))}
    return {key: rounded(value) for key, value in found.items()}


def summary(trace: Trace) -> dict[str, Any]:
    """The statistics of a run: steady ones from step UNSTEADY on, the steps before it one by one."""
    errors, rival = shortfall(trace.sigma, trace.exact), shortfall(trace.power, trace.exact)
    steady = slice(UNSTEADY, None)
    below = trace.upper < trace.exact * (1 - ROUNDING)
    return {
        "matrices": trace.exact.shape[1],
        "samples": errors[steady].numel(),
        "errors": spread_of(errors[steady]),
        "power": spread_of(rival[steady]),
        "reads": rounded(float(trace.reads[steady].mean())),
        "again": rounded(float((trace.reads[steady] > 1).double().mean())),
        "first": [
            {"worst": rounded(float(e.abs().max())), "mean": rounded(float(e.abs().mean())), "reads": rounded(float(r))}
            for e, r in zip(errors[:UNSTEADY], trace.reads[:UNSTEADY].mean(1), strict=True)
        ],
        "above": rounded(max(0.0, float(-errors.min()))),  # every step
        "bound": {"wrong": int(below.sum()), "mean": rounded(_tightness(trace))},
    }


def _tightness(trace: Trace) -> float:
    """Mean of upper / exact - 1 over the matrices that are not zero."""
    alive = trace.exact > 0
    return float((trace.upper[alive] / trace.exact[alive] - 1).mean()) if bool(alive.any()) else 0.0


def misses(row: Mapping[str, Any]) -> list[str]:
    """In words, what of the accuracy and the reads asked for a run does not reach; empty: all of it is met."""
    errors, found = row["errors"], []
    limits = [
        ("p99", errors["p99"], P99),
        ("worst", errors["worst"], WORST),
        ("above", row["above"], ROUNDING),
        ("first step", row["first"][0]["worst"], FIRST),
        ("reads", row["reads"], READS.get(row["momentum"], 2.05)),
        ("wrong upper bounds", row["bound"]["wrong"], 0),
    ]
    for name, value, limit in limits:
        if value is None or value > limit:  # None: it was not finite
            found.append(f"{name} {'not finite' if value is None else f'{value:.2g}'} > {limit:g}")
    return found


# -- the study


def optimizer_for(model: nn.Module, run: Run, momentum: float, block: int) -> torch.optim.Optimizer:
    from ..optim import SpectralOptimizer

    return SpectralOptimizer(groups(model), lr=run.lr, momentum=momentum, block=block)


def follow(
    trained: Task, optimizer: torch.optim.Optimizer, steps: int, *, spikes: Spikes | None = None
) -> tuple[Trace, list[float]]:
    """Train, and compare after every step; the trace and the training losses."""
    names = {parameter: name for name, parameter in trained.model.named_parameters()}
    wanted = [name for name, kind in kinds(trained.model).items() if kind in ("matrix", "conv")]
    rival = WarmPower()
    rows: list[list[Tensor]] = []

    def look(step: int) -> None:
        seen = {o.name: o for o in observed(optimizer, names)}
        if seen.keys() != set(wanted):
            raise RuntimeError(f"step {step}: the optimizer told of {sorted(seen)}, not of {sorted(wanted)}")
        ordered = [seen[name] for name in wanted]
        truth = [exact(o.X).cpu() for o in ordered]
        power = [rival(o.name, o.X) for o in ordered]
        numbers = (truth, *([getattr(o, key) for o in ordered] for key in ("sigma", "reads", "upper")), power)
        rows.append([torch.cat(list(column)) for column in numbers])

    losses = train(trained, optimizer, steps, on_step=look, spikes=spikes)
    return Trace(*(torch.stack(column) for column in zip(*rows, strict=True))), losses


def study(
    runs: Sequence[Run] = RUNS,
    momenta: Sequence[float] = MOMENTA,
    blocks: Sequence[int] = BLOCKS,
    *,
    say: Any = None,
) -> dict[str, Any]:
    """Every run with every momentum and block; the result is ready for JSON, one row per training."""
    began, rows = time.perf_counter(), []
    for run in runs:
        for momentum in momenta:
            for block in blocks:
                start = time.perf_counter()
                trained = task(run.task, width=run.width, seed=0)
                optimizer = optimizer_for(trained.model, run, momentum, block)
                trace, losses = follow(trained, optimizer, run.steps, spikes=run.spikes)
                row = {
                    "run": run.label,
                    "task": run.task,
                    "width": run.width,
                    "steps": run.steps,
                    "spikes": run.spikes._asdict() if run.spikes else None,
                    "momentum": momentum,
                    "block": block,
                    **summary(trace),
                    "losses": [rounded(losses[0]), rounded(sum(losses[-10:]) / len(losses[-10:]))],
                    "seconds": round(time.perf_counter() - start, 1),
                }
                rows.append(row | {"missed": misses(row)})
                if say:
                    say(line(rows[-1]))
    return {
        "subject": "tracking",
        "asked": {
            "p99": P99,
            "worst": WORST,
            "first": FIRST,
            "above": ROUNDING,
            "reads": {str(k): v for k, v in READS.items()},
        },
        "unsteady": UNSTEADY,
        "text": text_crc(),
        "machine": environment.machine(),
        "versions": {"torch": torch.__version__},
        "commit": environment.commit(),
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spectral_kernels.bench.tracking", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--docs", type=Path, help="a page with the two markers, whose table is replaced")
    parser.add_argument("--quick", action="store_true", help="small models, few steps, block 4 (half a minute)")
    options = parser.parse_args(arguments)
    choice: dict[str, Any] = {"runs": QUICK, "momenta": (0.95, 0.0), "blocks": (4,)} if options.quick else {}
    print("| " + " | ".join(HEAD) + " |")
    result = study(**choice, say=lambda text: print(text, flush=True))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs:
        write_table(options.docs, result)
    missed = [row for row in result["rows"] if row["missed"]]
    print(
        *(f"{row['run']}, {row['momentum']:g}, {row['block']}: {', '.join(row['missed'])}" for row in missed), sep="\n"
    )
    print(f"{result['seconds']} s; {len(missed)} of {len(result['rows'])} runs miss a limit")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
