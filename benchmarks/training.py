"""Whole trainings, the same model, batches and steps for every optimizer, each at the best rate of its own grid.

    python -m benchmarks.training --out benchmarks/results/training.json [--plot docs/figures/training.png]
                                  [--docs README.md]

A grid is start, start / 2, start · 2, ... and goes on until the rate with the lowest validation loss has both its
neighbours; the best rate is then run with two more seeds. All warm up over 5 % of the steps and decay linearly to zero;
no weight decay. The file is written after every run, and finished runs are not run again. Times are taken in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.training_page import draw, render, table
from spectral_kernels.bench import environment, runs
from spectral_kernels.bench.measure import Record, rounded
from spectral_kernels.bench.runs import (
    LAST,
    Muon,
    Pair,
    adamw,
    follow,
    load,
    loss_of,
    newton_schulz,
    schedule,
    search,
    with_adamw,
)
from spectral_kernels.bench.timer import interleave, ratio
from spectral_kernels.bench.training import Stepper, Task, groups, task, train

__all__ = ["Muon", "Pair", "Results", "loss_of", "muon", "newton_schulz", "schedule", "search", "study"]
SEEDS = (0, 1, 2)
POINTS = 50  # of a curve


class Case(NamedTuple):
    """A task at one width, its number of steps, and the rate at which each optimizer's grid starts."""

    task: str
    width: int
    steps: int
    starts: dict[str, float]

    @property
    def label(self) -> str:
        return f"{self.task} {self.width}"


CASES = (
    Case(
        "transformer", 128, 250, {"AdamW": 2**-9, "SGD": 2**-5, "Muon": 2**-5, "normalize": 2**-7, "frobenius": 2**-7}
    ),
    Case("mlp", 256, 250, {"AdamW": 2**-9, "SGD": 2**-2, "Muon": 2**-6, "normalize": 2**-5, "frobenius": 2**-4}),
)


# -- optimizers


def muon(run: Task, lr: float, other: float) -> Pair:
    """Muon on the hidden matrices; AdamW at the rate `other`, its own best, on first and last layer and vectors."""
    return with_adamw(run, lambda matrices: Muon(matrices, lr), other)


def spectral(direction: str) -> Callable[[Task, float, float], Stepper]:
    def build(run: Task, lr: float, other: float) -> Stepper:
        from spectral_kernels.optim import SpectralOptimizer

        return SpectralOptimizer(groups(run.model), lr, momentum=0.95, direction=direction)

    return build


METHODS: dict[str, Callable[[Task, float, float], Any]] = {  # AdamW first: Muon uses its rate
    "AdamW": lambda run, lr, other: adamw(run.model.parameters(), lr),
    "SGD": lambda run, lr, other: torch.optim.SGD(run.model.parameters(), lr, momentum=0.9),
    "Muon": muon,
    "normalize": spectral("normalize"),
    "frobenius": spectral("frobenius"),
}


# -- runs


def trained(case: Case, method: str, lr: float, seed: int, other: float) -> Record:
    """One training as a record; final losses None where they are not finite."""
    run = task(case.task, width=case.width, seed=seed)
    losses, times = follow(run, METHODS[method](run, lr, other), case.steps)
    width = max(1, case.steps // POINTS)
    curve = [
        [i + width // 2, rounded(times[i + width - 1]), rounded(sum(losses[i : i + width]) / width)]
        for i in range(0, len(losses) - width + 1, width)
    ]
    last = losses[-LAST:]
    return {
        "table": "run",
        "case": case.label,
        "steps": case.steps,
        "method": method,
        "lr": lr,
        "other": other if method == "Muon" else None,
        "seed": seed,
        "status": "ok",
        "train": rounded(sum(last) / len(last)),
        "validation": rounded(run.evaluate()),
        "seconds": rounded(times[-1]),
        "commit": environment.commit(),
        "curve": curve,
    }


class Results(runs.Results):
    """`get` runs what is not in the file yet."""

    def get(self, case: Case, method: str, lr: float, seed: int, other: float) -> Record:
        key = {"table": "run", "case": case.label, "steps": case.steps, "method": method, "lr": lr, "seed": seed}
        found = self.find(**key, other=other if method == "Muon" else None)
        return found[0] if found else self.add(trained(case, method, lr, seed, other))


def times(case: Case, rates: dict[str, float], seconds: float = 20.0) -> Record:
    """Time over AdamW's, in turns: the optimizer's step on gradients of a training, and a whole training step."""
    steps: dict[str, Callable[[], object]] = {}
    whole: dict[str, Callable[[], object]] = {}
    for method, lr in rates.items():
        run = task(case.task, width=case.width, seed=0)
        optimizer = METHODS[method](run, lr, rates["AdamW"])
        train(run, optimizer, 10)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same work, and the model stays as it is
        steps[method] = optimizer.step
        whole[method] = lambda run=run, optimizer=optimizer: train(run, optimizer, 1, first=10)
    taken = {"step": interleave(steps, seconds=seconds / 2), "whole": interleave(whole, seconds=seconds / 2)}
    made: Record = {"table": "times", "case": case.label, "steps": case.steps, "status": "ok"}
    made["methods"] = {
        method: {
            kind: {key: rounded(value) for key, value in ratio(samples, method, "AdamW")._asdict().items()}
            for kind, samples in taken.items()
        }
        for method in rates
    }
    return made


def study(results: Results, cases: Sequence[Case], methods: Sequence[str]) -> None:
    """Grids, seeds and times of every case."""
    for case in cases:
        rates: dict[str, float] = {}
        for method in methods:
            other = rates.get("AdamW", case.starts["AdamW"])

            def measure(lr: float, method: str = method, other: float = other, case: Case = case) -> float:
                record = results.get(case, method, lr, SEEDS[0], other)
                shown = f"{record['validation']} after {record['seconds']} s"
                print(f"{case.label}, {method}, lr {lr:g}: {shown}", flush=True)
                return loss_of(record)

            rates[method] = search(measure, case.starts[method])
            for seed in SEEDS[1:]:
                results.get(case, method, rates[method], seed, other)
        if not any(
            r["table"] == "times" and (r["case"], r["steps"]) == (case.label, case.steps) for r in results.records
        ):
            results.add(times(case, rates))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="the result file; finished runs in it are kept")
    parser.add_argument("--plot", type=Path, help="write the picture: loss against steps and against time")
    parser.add_argument("--docs", type=Path, help="a page with the markers, whose table is replaced")
    options = parser.parse_args(arguments)
    study(Results(options.out), CASES, tuple(METHODS))
    if options.plot:
        draw(load(options.out)[1], CASES[0].label, options.plot)
    if options.docs:
        options.docs.write_text(render(options.docs.read_text(encoding="utf-8"), options.out), encoding="utf-8")
    print(table(*load(options.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
