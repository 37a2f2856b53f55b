"""What published schedules do to real and made spectra, what a tighter normalizer saves, the noise of rank-1 inputs.

    python -m benchmarks.schedules --out benchmarks/results/schedules.json
    python -m benchmarks.report        # the tables of README.md and docs/orthogonalize.md

Everything is float64: a schedule acts on singular values alone, so each family is a set of those, and f is applied to
them over the normalizer. Singular values below 1e-6 of the largest are left out: they are rounding of float32 data.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.schedules_page import TABLES, tables
from spectral_kernels.bench import environment, training
from spectral_kernels.bench.cases import checkpoint_matrices, gaussian
from spectral_kernels.bench.cases_step import record
from spectral_kernels.bench.measure import Record, document, rounded
from spectral_kernels.bench.runs import load
from spectral_kernels.ops import schedules
from spectral_kernels.ops.newton_schulz import SPECTRAL_TOL
from spectral_kernels.ops.schedules import Schedule

RESOLVED = 1e-6
MOMENTUM = 0.95
LOWERS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # to which generated schedules are fitted
STEPS = range(3, 9)
SAFETY = 1.02
LOWER = 1e-3  # of the published lists
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "frobenius": lambda s: s.norm(),
    "schatten4": lambda s: s.pow(4).sum() ** 0.25,
    "spectral": lambda s: s.max() * (1 + 2 * SPECTRAL_TOL),
}
Families = Mapping[str, Sequence[Tensor]]


# -- spectra


def spectra(matrices: Iterable[Tensor]) -> list[Tensor]:
    """Singular values of each matrix in float64, divided by the largest, those that float32 resolves."""
    found = []
    for matrix in matrices:
        s = torch.linalg.svdvals(matrix.double())
        if float(s[0]) > 0:
            found.append((s / s[0])[s > RESOLVED * s[0]])
    return found


def in_training(width: int = 192, steps: int = 40) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients, momenta) of the hidden matrices of a small transformer after some steps, as Muon sees them.

    The momentum is a moving average of all gradients so far with Nesterov's look-ahead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = training.Transformer(width)
    chosen = [i for i, (name, p) in enumerate(model.named_parameters()) if p.ndim == 2 and "blocks" in name]
    recorded = record(model, steps, steps, batch=16)
    gradients, momenta = [], []
    for i in chosen:
        buffer = torch.zeros_like(recorded[0][i])
        for step in recorded:
            buffer.lerp_(step[i], 1 - MOMENTUM)
        gradients.append(recorded[-1][i])
        momenta.append(recorded[-1][i].lerp(buffer, MOMENTUM))
    return gradients, momenta


def families() -> Families:
    """Name -> singular values of its matrices, the largest being 1."""
    gradients, momenta = in_training()
    low = [gaussian(256, 16, seed=seed) @ gaussian(16, 256, seed=seed + 9) for seed in range(4)]
    return {
        "momenta of training": spectra(momenta),
        "gradients of training": spectra(gradients),
        "weights of a checkpoint": spectra(checkpoint_matrices()),
        "Gaussian 1:1": spectra(gaussian(256, 256, seed=seed) for seed in range(4)),
        "Gaussian 1:1, side 1024": spectra([gaussian(1024, 1024)]),
        "Gaussian 1:4": spectra(gaussian(256, 1024, seed=seed) for seed in range(4)),
        "decaying, 1/i": [1 / torch.arange(1, 257, dtype=torch.float64)],
        "rank 16 of 256": spectra(low),
    }


def normalized(spectrum: Sequence[Tensor], normalizer: str) -> list[Tensor]:
    return [s / NORMALIZERS[normalizer](s) for s in spectrum]


# -- what a schedule makes of them


def outputs(one: Schedule, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.from_numpy(one(s.numpy())) for s in inputs]


def defect(found: Sequence[Tensor]) -> float:
    """Root mean square of f² - 1, which is ||XX' - I||_F / sqrt(m), over all values."""
    return float((torch.cat(list(found)).square() - 1).square().mean().sqrt())


def cosine(found: Sequence[Tensor]) -> float:
    """Mean over matrices of <X, UV'> / (||X|| ||UV'||), UV' being the polar factor of what is resolved."""
    return sum(float(f.sum() / (f.norm() * len(f) ** 0.5)) for f in found) / len(found)


def judged(one: Schedule, inputs: Sequence[Tensor]) -> Record:
    found = outputs(one, inputs)
    f = torch.cat(found)
    low, middle = (float(f.quantile(q)) for q in (0.05, 0.5))
    numbers = {"min": float(f.min()), "p5": low, "median": middle, "max": float(f.max())}
    numbers |= {"defect": defect(found), "cosine": cosine(found), "below_half": float((f < 0.5).double().mean())}
    return {key: rounded(value) for key, value in numbers.items()} | {"values": len(f)}


def ranges(given: Families, names: Sequence[str] = tuple(schedules.PUBLISHED)) -> list[Record]:
    """Every safe schedule, normalizer and family; unsafe schedules with the reasons against them."""
    records: list[Record] = []
    for name in names:
        one = schedules.schedule(name)
        checked = schedules.validate(one)
        if not checked.safe:
            records.append({"table": "refused", "schedule": name, "status": "ok", "reasons": checked.reasons})
            continue
        for normalizer in NORMALIZERS:
            for family, spectrum in given.items():
                made = judged(one, normalized(spectrum, normalizer))
                record = {"table": "range", "schedule": name, "steps": len(one), "normalizer": normalizer}
                records.append(record | {"family": family, "matrices": len(spectrum), "status": "ok"} | made)
    return records


def savings(given: Families, steps: Iterable[int] = STEPS, lowers: Sequence[float] = LOWERS) -> list[Record]:
    """Defect of generated schedules by number of steps: fitted to LOWER, and to the best of `lowers` for the family."""
    made = {
        (count, lower): schedules.polar_express(lower, steps=count, safety=SAFETY)
        for count in steps
        for lower in lowers
    }
    records = []
    for family, spectrum in given.items():
        for normalizer in NORMALIZERS:
            inputs = normalized(spectrum, normalizer)
            found = {key: defect(outputs(one, inputs)) for key, one in made.items()}
            for count in dict.fromkeys(count for count, _ in made):
                best = min(lowers, key=lambda lower, count=count, found=found: found[count, lower])
                record = {"table": "saving", "family": family, "normalizer": normalizer, "steps": count}
                numbers = {"defect": rounded(found[count, LOWER]), "fitted": rounded(found[count, best])}
                records.append(record | numbers | {"lower": best, "status": "ok"})
    return records


def noises(names: Sequence[str] = tuple(schedules.PUBLISHED)) -> list[Record]:
    """The largest output of a zero singular value, by schedule, dtype of the products and method."""
    records = []
    for name in names:
        one = schedules.schedule(name)
        for dtype in DTYPES:
            for method in ("standard", "gram"):
                found = schedules.validate(one, dtype=dtype, method=method)
                record = {"table": "noise", "schedule": name, "steps": len(one), "method": method, "status": "ok"}
                record |= {"dtype": str(dtype).removeprefix("torch."), "safe": found.safe}
                restarts = found.restarts if method == "gram" and found.safe else None
                records.append(record | {"noise": rounded(found.noise), "restarts": restarts})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    options = parser.parse_args(arguments)
    began, described = time.perf_counter(), environment.describe()
    given = families()
    records = [*ranges(given), *savings(given), *noises()]
    seconds = round(time.perf_counter() - began, 1)
    text = json.dumps(document(records, described | {"seconds": seconds}), ensure_ascii=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text.replace('{"table"', '\n{"table"') + "\n", encoding="utf-8")  # a record a line
    made = tables(*load(options.out))
    print(*(made[name] for name in TABLES), f"{seconds} s", sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
