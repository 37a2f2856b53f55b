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
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import MARKER, load, where
from spectral_kernels import AccuracyWarning
from spectral_kernels.bench import environment
from spectral_kernels.bench.measure import Record, describe_value, document, rounded
from spectral_kernels.bench.rivals import exact
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
ROWS, GROWTHS, STARTS = 80, (1.05, 1.5, 3.0), 10
SETTLE, MOST, NEAR = 60, 500, 1e-2  # forwards before the replacement, most after it, the error to come below
GAPS, GAP_STARTS = (0.003, 0.01, 0.03), 30
SHARES = (0.0, 0.1, 0.3, 1.0)  # ops/track.py FRESH
SINGLE = ((128, 128), (512, 512), (2048, 2048), (4096, 1024))
MODEL = (40, 256)  # layers, side


# -- reads of the weight


class Products(TorchDispatchMode):
    """Counts matrix-vector products, the only reads of torch's parametrization."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mv.default
        return func(*args, **(kwargs or {}))


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
def counted() -> Iterator[list[float]]:
    """One number, complete at the end: the reads of all weights, torch's and ours."""
    reads, total = Reads(), [0.0]
    words = track.registry.words
    with mock.patch.object(track.registry, "words", lambda *key: reads(words(*key))), Products() as products:
        yield total
    total[0] = reads.count + products.count


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
    reads = 0.0
    for step in range(steps):
        with parametrize.cached():  # the weight that the forward used is the one that is examined
            with counted() as total:
                used.append([layer.weight.detach().clone() for layer in layers])
            reads += total[0]
            batch = slice(64 * (step % 4), 64 * (step % 4) + 64)
            optimizer.zero_grad()
            (net(x[batch]) - goal[batch]).square().mean().backward()
            optimizer.step()
    norms = torch.stack([exact(torch.stack(weights)) for weights in zip(*used, strict=True)], 1)
    return (norms - 1).abs(), reads / (steps * len(layers))


def training(ways: Sequence[str] = tuple(WAYS), steps: int = STEPS, seeds: int = SEEDS) -> list[Record]:
    records = []
    for way in ways:
        for rate in RATES:
            runs = [trained(WAYS[way], rate, steps, seed) for seed in range(seeds)]
            record = {"table": "training", "way": way, "rate": rate, "steps": steps, "seeds": seeds, "status": "ok"}
            records.append(record | summary(torch.cat([errors.flatten() for errors, _ in runs])))
            records[-1]["reads"] = rounded(sum(reads for _, reads in runs) / seeds)
    return records


def summary(errors: Tensor) -> Record:
    return {
        "samples": errors.numel(),
        "mean": rounded(float(errors.mean())),
        "p99": rounded(float(errors.quantile(0.99))),
        "max": rounded(float(errors.max())),
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
    """A layer whose weight has the singular values s and whose vectors have long found them."""
    torch.manual_seed(seed)
    module = nn.Linear(len(s), ROWS, bias=False, dtype=torch.float64)
    module.weight.data = (frame(ROWS, len(s), None) * s) @ frame(len(s), len(s), None).mT
    register(module)
    for _ in range(SETTLE):
        module.weight  # noqa: B018  one update
    return module


def replaced(module: nn.Module, s: Tensor, hidden: bool, bound: float, seed: int) -> tuple[int, float]:
    """(forwards whose error was above bound before the first that was not, error of the first forward).

    The new weight has the singular values s, s[0] the largest, and random vectors; hidden: the leading ones orthogonal
    to all that the module tracks. The module stays as it was.
    """
    module = copy.deepcopy(module)
    torch.manual_seed(1000 + seed)
    layer: Any = module.parametrizations.weight[0]  # type: ignore[union-attr,index]
    tracked = torch.cat((layer._v[None], getattr(layer, "_block", layer._v[None])))
    U = frame(ROWS, len(s), layer._u[None] if hidden else None)
    V = frame(len(s), len(s), tracked if hidden else None)
    W = module.parametrizations.weight.original  # type: ignore[union-attr]
    first = 0.0
    with torch.no_grad():
        W.copy_((U * s) @ V.mT)
        for forwards in range(MOST):
            estimate = torch.linalg.vector_norm(W) / torch.linalg.vector_norm(module.weight)
            error = abs(float(s[0] / estimate) - 1)
            first = first if forwards else error
            if error <= bound:
                return forwards, first
    return MOST, first


def replacements(starts: int = STARTS, growths: Sequence[float] = GROWTHS) -> list[Record]:
    records = []
    for spectrum, old in SPECTRA.items():
        for way in (way for way in WAYS if way != "torch, 5 iterations"):
            modules = [settled(WAYS[way], old, seed) for seed in range(starts)]
            for hidden in (True, False):
                for growth in growths:
                    new = torch.cat((growth * old[:1], old[1:]))
                    counts = [replaced(module, new, hidden, NEAR, seed)[0] for seed, module in enumerate(modules)]
                    record = {"table": "replaced", "spectrum": spectrum, "way": way, "hidden": hidden, "growth": growth}
                    records.append(record | {"starts": starts, "forwards": max(counts), "status": "ok"})
    return records


def gaps(starts: int = GAP_STARTS) -> list[Record]:
    """What `tol` misses: a hidden leading direction that is only a little larger than the next one."""
    records = []
    old = SPECTRA["linear, 1 … 0.2"]
    modules = [settled(WAYS["`tol=1e-3`"], old, seed) for seed in range(starts)]
    for gap in GAPS:
        new = torch.cat(((1 + gap) * old[1:2], old[1:]))
        found = [replaced(module, new, True, TOL, seed) for seed, module in enumerate(modules)]
        record = {"table": "gaps", "gap": gap, "starts": starts, "missed": sum(n > 0 for n, _ in found)}
        worst = {"forwards": max(n for n, _ in found), "error": rounded(max(error for _, error in found))}
        records.append(record | worst | {"status": "ok"})
    return records


# -- the share of fresh randomness


def shares(steps: int = STEPS, starts: int = STARTS) -> list[Record]:
    records = []
    old = SPECTRA["linear, 1 … 0.2"]
    new = torch.cat((GROWTHS[0] * old[:1], old[1:]))
    for share in SHARES:
        with mock.patch.object(track, "FRESH", share):
            for rate in RATES:
                errors, _ = trained(WAYS["1 read"], rate, steps, 0)
                record = {"table": "share", "share": share, "rate": rate, "steps": steps, "status": "ok"}
                records.append(record | summary(errors.flatten()))
            counts = [replaced(settled(WAYS["1 read"], old, k), new, True, NEAR, k)[0] for k in range(starts)]
        records[-1] |= {"starts": starts, "forwards": max(counts)}
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


# -- tables


def small(x: float) -> str:
    return "< 1e-6" if x < 1e-6 else f"{x:.1e}".replace("e-0", "e-")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def training_table(records: Sequence[Record]) -> str:
    rates = list(dict.fromkeys(r["rate"] for r in records))
    ways = list(dict.fromkeys(r["way"] for r in records))
    one = records[0]
    head = ["‖weight‖₂ − 1", "reads", *(f"lr {small(rate).replace('.0', '')}: mean, p99, max" for rate in rates)]
    lines = []
    for way in ways:
        mine = [r for r in records if r["way"] == way]
        reads = sorted({f"{r['reads']:.2g}" for r in mine})
        lines.append([way, "–".join(reads), *(", ".join(small(r[k]) for k in ("mean", "p99", "max")) for r in mine)])
    caption = (
        f"Four layers with sides of {min(SIDES)} to {max(SIDES)}, {one['steps']} Adam steps, {one['seeds']} seeds; "
        f"{one['samples']:,} norms an entry:"
    )
    return f"{caption}\n\n{table(head, lines)}"


def replaced_table(records: Sequence[Record]) -> str:
    growths = list(dict.fromkeys(r["growth"] for r in records))
    ways = list(dict.fromkeys(r["way"] for r in records))
    lines = []
    for spectrum, hidden in dict.fromkeys((r["spectrum"], r["hidden"]) for r in records):
        mine = [r for r in records if r["spectrum"] == spectrum and r["hidden"] == hidden]
        text = [
            " / ".join(f"{r['forwards']}" if r["forwards"] < MOST else f"{MOST}+" for r in mine if r["way"] == way)
            for way in ways
        ]
        lines.append([spectrum, "orthogonal" if hidden else "random", *text])
    caption = (
        f"Forwards before the error is below {NEAR:.0%}, the most of {records[0]['starts']} starts; {ROWS} × 64, "
        f"float64, the new σ₁ being {' / '.join(f'{g:g}' for g in growths)} times the old:"
    )
    return f"{caption}\n\n{table(['spectrum', 'new leading vectors', *ways], lines)}"


def gaps_table(records: Sequence[Record]) -> str:
    head = ["new σ₁ / σ₂ − 1", "starts that missed", "largest error", "forwards until found, at most"]
    lines = [
        [f"{r['gap']:.1%}", f"{r['missed']} of {r['starts']}", small(r["error"]), str(r["forwards"])] for r in records
    ]
    return table(head, lines)


def share_table(records: Sequence[Record]) -> str:
    rates = list(dict.fromkeys(r["rate"] for r in records))
    head = ["share", *(f"lr {small(rate).replace('.0', '')}: mean, p99" for rate in rates), "forwards, replaced weight"]
    lines = []
    for share in dict.fromkeys(r["share"] for r in records):
        mine = [r for r in records if r["share"] == share]
        forwards = mine[-1]["forwards"]
        text = [f"{small(r['mean'])}, {small(r['p99'])}" for r in mine]
        lines.append([f"{share:.0%}", *text, str(forwards) if forwards < MOST else f"{MOST}+"])
    return table(head, lines)


def time_table(records: Sequence[Record]) -> str:
    lines = [[r["case"], r["way"], describe_value(r)] for r in records]
    return table(["training forward", "way", "torch's time / this (p20–p80)"], lines)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "training": training_table,
    "replaced": replaced_table,
    "gaps": gaps_table,
    "share": share_table,
    "time": time_table,
}


def tables(described: dict[str, Any], records: Sequence[Record]) -> dict[str, str]:
    """Marker -> text of its table."""
    made = {name: make([r for r in records if r["table"] == name]) for name, make in TABLES.items()}
    made["time"] = f"{where(described)}\n\n{made['time']}"
    return {f"parametrization_{name}": f"\n{text}\n\n" for name, text in made.items()}


def render(text: str, path: Path) -> str:
    """The page with its tables made anew from a result file; ValueError where it lacks a marker of one."""
    made = tables(*load(path))
    missing = made.keys() - {m["subject"] for m in MARKER.finditer(text)}
    if missing:
        raise ValueError(f"the page has no markers for {', '.join(sorted(missing))}")
    return MARKER.sub(lambda m: m[1] + made.get(m["subject"], m["body"]) + m[4], text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parametrization", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    parser.add_argument("--docs", type=Path, help="a page with the markers, whose tables are replaced")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)  # no entry of a table may rest on an unproved norm
        records = [*times(), *training(), *replacements(), *gaps(), *shares()]
    seconds = round(time.perf_counter() - began, 1)
    result = document(records, environment.describe() | {"seconds": seconds})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.docs:
        text = render(options.docs.read_text(encoding="utf-8"), options.out)
        options.docs.write_text(text, encoding="utf-8")
    print("\n".join(tables(*load(options.out)).values()), f"{seconds} s", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
