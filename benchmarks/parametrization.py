"""Spectral normalization against torch's own: error of the norm while training, after a replaced weight, and time.

    python -m benchmarks.parametrization --out benchmarks/results/parametrization.json [--docs docs/parametrization.md]

The error of a layer is | ||weight||_2 - 1 | of the normalized weight that a forward used, against a float64 norm. Every
table of the page stands between `<!-- table:parametrization_... -->` and `<!-- /table -->` and is made from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize

from benchmarks.parametrization_page import render, tables
from spectral_kernels import AccuracyWarning
from spectral_kernels.bench import environment
from spectral_kernels.bench.measure import Record, document, rounded
from spectral_kernels.bench.rivals import exact
from spectral_kernels.bench.runs import load
from spectral_kernels.bench.timer import interleave, ratio
from spectral_kernels.kernels.contracts import INFO
from spectral_kernels.ops import track
from spectral_kernels.parametrizations import spectral_norm, spectral_norm_model

TOL = 1e-3
Register = Callable[[nn.Module], nn.Module]
WAYS: dict[str, Register] = {
    "torch, 1 iteration": torchs.spectral_norm,
    "torch, 5 iterations": lambda module: torchs.spectral_norm(module, n_power_iterations=5),
    "1 read": spectral_norm,
    "2 reads": lambda module: spectral_norm(module, n_power_iterations=2),
    "`tol=1e-3`": lambda module: spectral_norm(module, tol=TOL),
}
SIDES = (96, 192, 128, 160, 96)  # of the trained layers: 96 -> 192 -> ... -> 96
RATES, STEPS, SEEDS = (2e-3, 2e-2), 150, 2
SPECTRA: dict[str, Tensor] = {
    "linear, 1 … 0.2": torch.linspace(1, 0.2, 64, dtype=torch.float64),
    "1/i": 1 / torch.arange(1, 65, dtype=torch.float64),
}
GROWTHS, STARTS = (1.05, 1.5, 3.0), 10
SETTLE, MOST, NEAR = 60, 500, 1e-2  # forwards before the replacement, most after it, the error to come below
SHARES = (0.0, 0.1, 0.3, 1.0)  # ops/track.py FRESH
SINGLE = ((128, 128), (512, 512), (2048, 2048), (4096, 1024))
MODEL = (40, 256)  # layers, side


# -- reads of the weight


class Reads:
    """Passes words on and counts the reads they are asked for."""

    def __init__(self) -> None:
        self.count = 0.0

    def __call__(self, words: Any) -> Reads:
        self.words = words
        return self

    def gram_matvec(self, A: Sequence[Tensor], *args: Any) -> Any:
        self.count += sum(len(a) for a in A)
        return self.words.gram_matvec(A, *args)

    def block_krylov(self, *args: Any) -> Any:
        result = self.words.block_krylov(*args)
        self.count += float(result[0][:, INFO["reads"]].sum())
        return result


@contextlib.contextmanager
def counted() -> Iterator[Reads]:
    """Counts the reads of all weights; those of torch's parametrization are its matrix-vector products."""
    reads = Reads()
    words, mv = track.registry.words, torch.mv

    def product(*args: Any) -> Tensor:
        reads.count += 1
        return mv(*args)

    with (
        mock.patch.object(track.registry, "words", lambda *key: reads(words(*key))),
        mock.patch.object(torch, "mv", product),
    ):
        yield reads


# -- training


def trained(register: Register, rate: float, steps: int, seed: int) -> tuple[Tensor, float]:
    """(steps, layers) errors of a regression trained by Adam, and mean reads of a weight per forward."""
    torch.manual_seed(seed)
    layers = [nn.Linear(n, m) for n, m in zip(SIDES, SIDES[1:], strict=False)]
    teacher, x = torch.randn(SIDES[0], SIDES[-1]) / SIDES[0] ** 0.5, torch.randn(256, SIDES[0])
    goal = (x @ teacher).tanh()
    net = nn.Sequential(*[part for layer in layers for part in (register(layer), nn.LeakyReLU())][:-1])
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    used: list[list[Tensor]] = []
    with counted() as reads:
        for step in range(steps):
            batch = slice(64 * (step % 4), 64 * (step % 4) + 64)
            with parametrize.cached():  # the weight that the forward uses is the one that is examined
                used.append([layer.weight.detach().clone() for layer in layers])
                optimizer.zero_grad()
                (net(x[batch]) - goal[batch]).square().mean().backward()
            optimizer.step()
    norms = torch.stack([exact(torch.stack(weights)) for weights in zip(*used, strict=True)], 1)
    return (norms - 1).abs(), reads.count / (steps * len(layers))


def training(ways: Sequence[str] = tuple(WAYS), steps: int = STEPS, seeds: int = SEEDS) -> list[Record]:
    records = []
    for way in ways:
        for rate in RATES:
            runs = [trained(WAYS[way], rate, steps, seed) for seed in range(seeds)]
            record = {"table": "training", "way": way, "rate": rate, "steps": steps, "seeds": seeds, "status": "ok"}
            errors = torch.cat([errors.flatten() for errors, _ in runs])
            reads = {"reads": rounded(sum(reads for _, reads in runs) / seeds), "tol": TOL if "tol" in way else None}
            records.append(record | {"sides": SIDES} | reads | summary(errors))
    return records


def summary(errors: Tensor) -> Record:
    return {
        "samples": errors.numel(),
        "mean": rounded(float(errors.mean())),
        "p99": rounded(float(errors.quantile(0.99))),
        "max": rounded(float(errors.max())),
        "above_tol": int((errors > TOL).sum()),
    }


# -- replaced weights


def frame(rows: int, columns: int, away_from: Tensor | None) -> Tensor:
    """Random orthonormal columns (rows, columns); the first is orthogonal to the rows of away_from (k, rows)."""
    X = torch.randn(rows, columns, dtype=torch.float64)
    if away_from is not None:
        Q = torch.linalg.qr(away_from.mT)[0]
        for _ in range(2):
            X[:, 0] -= Q @ (Q.mT @ X[:, 0])
    return torch.linalg.qr(X)[0]


def settled(register: Register, s: Tensor, seed: int) -> nn.Module:
    """A layer (5/4 n, n) whose weight has the n singular values s, and whose vectors have long found them."""
    torch.manual_seed(seed)
    rows = 5 * len(s) // 4
    module = nn.Linear(len(s), rows, bias=False, dtype=torch.float64)
    module.weight.data = (frame(rows, len(s), None) * s) @ frame(len(s), len(s), None).mT
    register(module)
    for _ in range(SETTLE):
        module.weight  # noqa: B018  one update
    return module


def replaced(module: nn.Module, s: Tensor, hidden: bool, seed: int) -> int:
    """Forwards whose error was above NEAR before the first that was not, at most MOST.

    The new weight has the singular values s, s[0] the largest, and random vectors; hidden: the leading ones orthogonal
    to all that the module tracks. The module stays as it was.
    """
    module = copy.deepcopy(module)
    torch.manual_seed(1000 + seed)
    layer: Any = module.parametrizations.weight[0]  # type: ignore[union-attr,index]
    tracked = torch.cat((layer._v[None], getattr(layer, "_block", layer._v[None])))
    U = frame(len(layer._u), len(s), layer._u[None] if hidden else None)
    V = frame(len(s), len(s), tracked if hidden else None)
    W = module.parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        W.copy_((U * s) @ V.mT)
        for forwards in range(MOST):
            estimate = torch.linalg.vector_norm(W) / torch.linalg.vector_norm(module.weight)
            if abs(float(s[0] / estimate) - 1) <= NEAR:
                return forwards
    return MOST


def replacements(starts: int = STARTS, growths: Sequence[float] = GROWTHS) -> list[Record]:
    records = []
    for spectrum, old in SPECTRA.items():
        for way in (way for way in WAYS if way != "torch, 5 iterations"):
            modules = [settled(WAYS[way], old, seed) for seed in range(starts)]
            for hidden in (True, False):
                for growth in growths:
                    new = torch.cat((growth * old[:1], old[1:]))
                    counts = [replaced(module, new, hidden, seed) for seed, module in enumerate(modules)]
                    record = {"table": "replaced", "spectrum": spectrum, "way": way, "hidden": hidden, "growth": growth}
                    record |= {"columns": len(old), "near": NEAR, "most": MOST, "status": "ok"}
                    records.append(record | {"starts": starts, "forwards": max(counts)})
    return records


# -- the share of fresh randomness


def shares(steps: int = STEPS, starts: int = STARTS) -> list[Record]:
    records = []
    old = SPECTRA["linear, 1 … 0.2"]
    new = torch.cat((GROWTHS[0] * old[:1], old[1:]))
    for share in SHARES:
        with mock.patch.object(track, "FRESH", share):
            errors, _ = trained(WAYS["1 read"], RATES[0], steps, 0)
            counts = [replaced(settled(WAYS["1 read"], old, k), new, True, k) for k in range(starts)]
        record = {"table": "share", "share": share, "rate": RATES[0], "steps": steps, "status": "ok"}
        forwards = {"growth": GROWTHS[0], "starts": starts, "most": MOST, "forwards": max(counts)}
        records.append(record | summary(errors.flatten()) | forwards)
    return records


# -- time


def times(
    single: Sequence[tuple[int, int]] = SINGLE, model: tuple[int, int] = MODEL, seconds: float = 1.5
) -> list[Record]:
    """Training forwards in turns: torch's time over ours, one layer's weight alone, then a model of many layers."""
    records = []
    for m, n in single:
        torch.manual_seed(0)
        linear = nn.Linear(n, m, bias=False)
        layers = {way: WAYS[way](copy.deepcopy(linear)) for way in ("torch, 1 iteration", "1 read")}
        calls = {way: lambda layer=layer: layer.weight for way, layer in layers.items()}
        records += in_turns(f"one layer, {m} × {n}", calls, seconds)
    count, side = model
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Linear(side, side) for _ in range(count)])
    models = {way: copy.deepcopy(plain) for way in ("torch, 1 iteration", "1 read", "1 read, `spectral_norm_model`")}
    for way, net in models.items():
        spectral_norm_model(net) if "model" in way else [WAYS[way](layer) for layer in net]
    x = torch.randn(1, side)
    calls = {way: lambda net=net: net(x) for way, net in models.items()}
    return records + in_turns(f"{count} layers, {side} × {side}", calls, seconds)


def in_turns(case: str, calls: dict[str, Callable[[], object]], seconds: float) -> list[Record]:
    samples = interleave(calls, seconds=seconds)
    rival = next(iter(calls))
    records = []
    for way in list(calls)[1:]:
        r = ratio(samples, rival, way)
        record = {"table": "time", "case": case, "way": way, "rival": rival, "measure": "speedup", "status": "ok"}
        values = {"value": rounded(r.median), "p20": rounded(r.p20), "p80": rounded(r.p80), "rounds": r.rounds}
        records.append(record | values)
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parametrization", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    parser.add_argument("--docs", type=Path, help="a page with the markers, whose tables are replaced")
    options = parser.parse_args(arguments)
    began, described = time.perf_counter(), environment.describe()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)  # no entry of a table may rest on an unproved norm
        records = times()
        torch.set_num_threads(1)  # small matrices
        records += [*training(), *replacements(), *shares()]
    seconds = round(time.perf_counter() - began, 1)
    result = document(records, described | {"seconds": seconds})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs:
        text = render(options.docs.read_text(encoding="utf-8"), options.out)
        options.docs.write_text(text, encoding="utf-8")
    print("\n".join(tables(*load(options.out)).values()), f"{seconds} s", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
