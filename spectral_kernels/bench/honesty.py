"""How often `spectral_norm(A, tol)` misses its tolerance, over families of matrices, seeds and starts.

    python -m spectral_kernels.bench.honesty --out benchmarks/results/honesty.json [--docs docs/accuracy.md]

Every seed draws its own member of every family (shorter side 100 to 400) and its own starts. The truth of float32
samples is the norm of the rounded matrix. A miss is a relative error above tol; errors are counted in units of tol.
A second table has the tightness of `spectral_bounds`: upper / sigma_max - 1, and how often the bracket was wrong.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..ops.bounds import spectral_bounds
from ..ops.estimate import estimate
from ..ops.norm import spectral_norm
from . import environment, families

TOLS: dict[float, torch.dtype] = {1e-2: torch.float32, 1e-3: torch.float32, 1e-4: torch.float32, 1e-6: torch.float64}
SEEDS, STARTS = 100, 2
LEAST, MOST = 100, 400  # shorter sides; below about 80 the Krylov space is exhausted before the rule is tested
BOUNDS_SEEDS = 10
BOUNDS: dict[str, dict[str, Any]] = {
    "4 reads": {"steps": 4},
    "8 reads": {"steps": 8},
    "16 reads": {"steps": 16},
    "8 reads, block 8": {"steps": 8, "block": 8},
    "deterministic": {"deterministic": True},
}
SHARE, WORST = 1e-3, 5.0  # what is promised: share of misses, largest error in units of tol
BEGIN, END = "<!-- table:honesty -->", "<!-- /table -->"


def size_of(seed: int, least: int, most: int) -> int:
    """Sizes that cycle through the whole range, odd ones included."""
    return least + (seed * 61) % (most - least + 1)


def study(
    *,
    names: Sequence[str] = tuple(families.FAMILIES),
    seeds: int = SEEDS,
    starts: int = STARTS,
    sizes: tuple[int, int] = (LEAST, MOST),
    tols: Sequence[float] = tuple(TOLS),
) -> dict[str, Any]:
    """Run the study; the result is ready for JSON: one row per tol and family, and one total per tol."""
    began = time.perf_counter()
    errors: dict[tuple[float, str], list[float]] = {(tol, name): [] for tol in tols for name in names}
    reads: dict[tuple[float, str], list[float]] = {(tol, name): [] for tol in tols for name in names}
    unproved = dict.fromkeys(tols, 0)
    for seed in range(seeds):
        cases = [families.make(name, size_of(seed, *sizes), seed) for name in names]
        for dtype in {TOLS[tol] for tol in tols}:
            A = [case.A.to(dtype) for case in cases]
            if dtype == torch.float64:
                exact = [case.sigma for case in cases]
            else:
                exact = [families.with_entries(a.double()).sigma for a in A]
            truth = torch.tensor(exact, dtype=torch.float64)
            for tol in (tol for tol in tols if TOLS[tol] == dtype):
                for start in range(starts):
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        values = spectral_norm(A, tol, seed=starts * seed + start).double()
                    unproved[tol] += len(caught)
                    info = estimate([a[None] for a in A], tol=tol, seed=starts * seed + start).info
                    for i, name in enumerate(names):
                        errors[tol, name].append(abs(float(values[i] / truth[i]) - 1) / tol)
                        reads[tol, name].append(float(info[i, 4]))
    rows = [
        {"tol": tol, "dtype": _short(TOLS[tol]), "family": name}
        | _summary(errors[tol, name])
        | {"reads": round(sum(reads[tol, name]) / len(reads[tol, name]), 2)}
        for tol, name in errors
    ]
    totals = [
        {"tol": tol, "dtype": _short(TOLS[tol])}
        | _summary([e for name in names for e in errors[tol, name]])
        | {"warnings": unproved[tol]}
        for tol in tols
    ]
    return {
        "subject": "honesty",
        "seeds": seeds,
        "starts": starts,
        "sizes": list(sizes),
        "promised": {"share": SHARE, "worst": WORST},
        "machine": environment.machine(),
        "commit": environment.commit(),
        "seconds": round(time.perf_counter() - began, 1),
        "totals": totals,
        "rows": rows,
        "bounds": tightness(names, BOUNDS_SEEDS if seeds >= SEEDS else 2, sizes[1]),
    }


def tightness(names: Sequence[str], seeds: int, size: int) -> list[dict[str, Any]]:
    """Per family: mean of upper / sigma_max - 1 of float32 matrices per setting, and how many brackets are wrong."""
    rows = []
    for name in names:
        cases = [families.make(name, size, seed).A.float() for seed in range(seeds)]
        exact = [families.with_entries(a.double()).sigma for a in cases]
        truth = torch.tensor(exact, dtype=torch.float64)
        row: dict[str, Any] = {"family": name, "size": size, "samples": seeds, "wrong": 0}
        for label, options in BOUNDS.items():
            got = spectral_bounds(cases, seed=size, **options)
            row[label] = float((got.upper.double() / truth - 1).mean())
            row["wrong"] += int((got.lower > truth * (1 + 1e-13)).sum() + (got.upper < truth * (1 - 1e-13)).sum())
        rows.append(row)
    return rows


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(errors: Sequence[float]) -> dict[str, Any]:
    missed = sum(not e <= 1 for e in errors)  # NaN is a miss
    return {
        "samples": len(errors),
        "missed": missed,
        "share": missed / len(errors),
        "worst": max(errors, key=lambda e: (e != e, e)),
    }


def kept(result: dict[str, Any]) -> bool:
    """Whether the promise holds for every tol."""
    honest = all(t["share"] <= SHARE and t["worst"] <= WORST for t in result["totals"])
    return honest and not any(row["wrong"] for row in result["bounds"])


def markdown(result: dict[str, Any]) -> str:
    """The table of docs/accuracy.md: a line per family; misses, worst error in units of tol and mean reads per tol."""
    tols = [t["tol"] for t in result["totals"]]
    cell = {(row["tol"], row["family"]): row for row in result["rows"]}
    names = list(dict.fromkeys(row["family"] for row in result["rows"]))
    least, most = result["sizes"]
    heads = [f"tol {t['tol']:.0e}, {t['dtype']}" for t in result["totals"]]
    lines = [
        f"{len(names)} families, {result['seeds']} matrices of each (shorter side {least} to {most}), "
        f"{result['starts']} starts per matrix. Entries: "
        "misses (relative error above tol) / worst error in units of tol / mean reads.",
        "",
        "| family | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(tols),
    ]
    for name in names:
        entries = [cell[tol, name] for tol in tols]
        text = [f"{e['missed']} / {e['worst']:.2g} / {e['reads']:.1f}" for e in entries]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    text = [f"**{t['missed']} of {t['samples']:,} / {t['worst']:.2g}**" for t in result["totals"]]
    lines.append("| **all** | " + " | ".join(text) + " |")
    return "\n".join(lines + ["", *_bounds_lines(result["bounds"])])


def _bounds_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    wrong, samples = sum(r["wrong"] for r in rows), sum(r["samples"] for r in rows) * len(BOUNDS)
    lines = [
        f"`spectral_bounds`, delta = 1e-6, float32, shorter side {rows[0]['size']}: "
        "mean of upper / sigma_max - 1 in percent; "
        f"{wrong} of {samples:,} brackets were wrong.",
        "",
        "| family | " + " | ".join(BOUNDS) + " |",
        "|---|" + "---|" * len(BOUNDS),
    ]
    return lines + [
        f"| {r['family']} | " + " | ".join(f"{100 * r[label]:.2g}" for label in BOUNDS) + " |" for r in rows
    ]


def write_table(page: Path, result: dict[str, Any]) -> None:
    """Replace what stands between the markers of a page; raise ValueError where it has none."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)  # the next one: other tables may follow
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spectral_kernels.bench.honesty", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--docs", type=Path, help="a page with the two markers, whose table is replaced")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--starts", type=int, default=STARTS)
    options = parser.parse_args(arguments)
    result = study(seeds=options.seeds, starts=options.starts)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.docs:
        write_table(options.docs, result)
    print(markdown(result))
    verdict = "kept" if kept(result) else "BROKEN"
    print(f"\n{result['seconds']} s; the promise ({SHARE:.1%} misses, {WORST:g} tol) is {verdict}")
    return 0 if kept(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
