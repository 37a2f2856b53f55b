"""Whole trainings, the same model, batches and steps for every optimizer, each at the best rate of its own grid.

    python -m benchmarks.training --out benchmarks/results/training.json [--plot docs/figures/training.png]
                                  [--docs README.md]

A grid is start, start / 2, start · 2, ... and goes on until the rate with the lowest validation loss has both its
neighbours; the best rate is then run with two more seeds. All warm up over 5 % of the steps and decay linearly to zero;
no weight decay. The file is written after every run, and finished runs are not run again. Times are taken in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import load
from benchmarks.training_page import draw, render, table
from spectral_kernels.bench import environment
from spectral_kernels.bench.measure import Record, document, rounded
from spectral_kernels.bench.timer import interleave, ratio
from spectral_kernels.bench.training import Stepper, Task, groups, task, train
from spectral_kernels.bench.training_data import text_crc

SEEDS = (0, 1, 2)
MOST = 7  # rates of one grid
LAST = 20  # steps whose mean is the final training loss
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


class Muon(torch.optim.Optimizer):
    """W <- W - lr sqrt(max(1, m/n)) NS(nesterov momentum), Newton-Schulz in float32 with Keller Jordan's quintic.

    Coefficients (3.4445, -4.7750, 2.0315) and five steps: kellerjordan.github.io/posts/muon; they send singular values
    into about [0.7, 1.2].
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for W in group["params"]:
                state = self.state[W]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(W)
                M = state["momentum_buffer"]
                M.mul_(group["momentum"]).add_(W.grad)
                update = newton_schulz(W.grad + group["momentum"] * M)
                W.add_(update, alpha=-group["lr"] * max(1, W.shape[0] / W.shape[1]) ** 0.5)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """U f(S) V' for G = U S V' (m, n), f(S) near 1: X <- a X + (b A + c A²) X, A = X X', from X = G / ||G||_F."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / torch.linalg.matrix_norm(G).clamp(min=1e-30)
    wide = X.shape[0] <= X.shape[1]
    X = X if wide else X.mT
    for _ in range(steps):
        A = X @ X.mT
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


class Pair:
    """Two optimizers as one: Muon leaves embeddings, readout and vectors to AdamW."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def muon(run: Task, lr: float, other: float) -> Pair:
    """Muon on the hidden matrices; AdamW at the rate `other`, its own best, on first and last layer and vectors."""
    hidden = [W for _, W in run.matrices()][:-1]
    if run.name == "mlp":
        hidden = hidden[1:]
    mine = {id(W) for W in hidden}
    return Pair(Muon(hidden, lr), adamw([p for p in run.model.parameters() if id(p) not in mine], other))


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


def schedule(step: int, steps: int) -> float:
    """Factor of the rate at a step: up over 5 % of the steps, then linearly down to 0 behind the last."""
    return min((step + 1) / max(1.0, 0.05 * steps), (steps - step) / steps)


def trained(case: Case, method: str, lr: float, seed: int, other: float) -> Record:
    """One training as a record; final losses None where they are not finite."""
    run = task(case.task, width=case.width, seed=seed)
    optimizer = METHODS[method](run, lr, other)
    peaks = [(group, group["lr"]) for group in optimizer.param_groups]
    times: list[float] = []

    def set_rates(step: int) -> None:
        for group, peak in peaks:
            group["lr"] = peak * schedule(step, case.steps)

    def on_step(step: int) -> None:
        times.append(time.perf_counter())
        set_rates(step + 1)

    set_rates(0)
    began = time.perf_counter()
    losses = train(run, optimizer, case.steps, on_step=on_step)
    width = max(1, case.steps // POINTS)
    curve = [
        [i + width // 2, rounded(times[i + width - 1] - began), rounded(sum(losses[i : i + width]) / width)]
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
        "seconds": rounded(times[-1] - began),
        "commit": environment.commit(),
        "curve": curve,
    }


def loss_of(record: Record) -> float:
    return math.inf if record["validation"] is None else record["validation"]


def search(measure: Callable[[float], float], start: float, most: int = MOST) -> float:
    """The rate start · 2^k with the lowest value whose neighbours were measured too, or the best of `most` rates."""
    found = {0: measure(start)}
    while len(found) < most:
        best = min(found, key=lambda k: (found[k], k))  # where all diverge, the smallest
        beside = [k for k in (best - 1, best + 1) if k not in found]
        if not beside:
            break
        found[beside[0]] = measure(start * 2.0 ** beside[0])
    return start * 2.0 ** min(found, key=lambda k: found[k])


class Results:
    """The records of a file, written after each one; `get` runs what is not there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.described = environment.describe() | {"text": text_crc()}
        self.records: list[Record] = []
        if path.is_file():
            before, self.records = load(path)
            for key in ("machine", "threads", "text"):
                if before[key] != self.described[key]:
                    raise ValueError(
                        f"{path} was made with {key} {before[key]}, not {self.described[key]}: move it away"
                    )

    def get(self, case: Case, method: str, lr: float, seed: int, other: float) -> Record:
        key = {"case": case.label, "steps": case.steps, "method": method, "lr": lr, "seed": seed}
        key["other"] = other if method == "Muon" else None
        for record in self.records:
            if record["table"] == "run" and key.items() <= record.items():
                return record
        return self.add(trained(case, method, lr, seed, other))

    def add(self, record: Record) -> Record:
        self.records.append(record)
        text = json.dumps(document(self.records, self.described), ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text.replace('{"table"', '\n{"table"') + "\n", encoding="utf-8")  # a record a line
        return record


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
