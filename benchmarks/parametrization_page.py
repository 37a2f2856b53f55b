"""The tables of docs/parametrization.md, made from the result file that benchmarks/parametrization.py writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import MARKER
from spectral_kernels.bench.measure import Record, describe_value
from spectral_kernels.bench.runs import load, where

Records = Sequence[Record]


def small(x: float) -> str:
    return "< 1e-6" if x < 1e-6 else f"{x:.1e}".replace("e-0", "e-")


def forwards(record: Record) -> str:
    return str(record["forwards"]) if record["forwards"] < record["most"] else f"{record['most']} or more"


def shape(record: Record) -> str:
    return f"{5 * record['columns'] // 4} × {record['columns']}, float64"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def training(records: Records) -> str:
    one = records[0]
    rates = dict.fromkeys(r["rate"] for r in records)
    head = ["error", "reads", *(f"lr {rate:.0e}: mean, p99, max".replace("e-0", "e-") for rate in rates)]
    lines = []
    for way in dict.fromkeys(r["way"] for r in records):
        mine = [r for r in records if r["way"] == way]
        reads = dict.fromkeys(f"{r:.2g}" for r in sorted(r["reads"] for r in mine))
        errors = (", ".join(small(r[key]) for key in ("mean", "p99", "max")) for r in mine)
        lines.append([way, "–".join(reads), *errors])
    judged = [r for r in records if r["tol"]]
    missed, samples = sum(r["above_tol"] for r in judged), sum(r["samples"] for r in judged)
    return (
        f"Four layers with sides of {min(one['sides'])} to {max(one['sides'])}, {one['steps']} Adam steps, "
        f"{one['seeds']} seeds; {one['samples']:,} norms an entry:\n\n{table(head, lines)}\n\n"
        f"With `tol`, {missed} of {samples:,} norms were off by more than it."
    )


def replaced(records: Records) -> str:
    one = records[0]
    growths = dict.fromkeys(f"{r['growth']:g}" for r in records)
    ways = list(dict.fromkeys(r["way"] for r in records))
    lines = []
    for spectrum, hidden in dict.fromkeys((r["spectrum"], r["hidden"]) for r in records):
        mine = [r for r in records if r["spectrum"] == spectrum and r["hidden"] == hidden]
        counts = (" / ".join(forwards(r) for r in mine if r["way"] == way) for way in ways)
        lines.append([spectrum, "orthogonal" if hidden else "random", *counts])
    return (
        f"{shape(one)}, the new σ₁ being {' / '.join(growths)} times the old; the most of {one['starts']} starts:"
        f"\n\n{table(['spectrum', 'new leading vectors', *ways], lines)}"
    )


def share(records: Records) -> str:
    one = records[0]
    head = ["share per update", f"training at lr {one['rate']:g}: mean, p99", "forwards after the replacement, at most"]
    lines = [[f"{r['share']:.0%}", f"{small(r['mean'])}, {small(r['p99'])}", forwards(r)] for r in records]
    return table(head, lines)


def time(records: Records) -> str:
    lines = [[r["case"], r["way"], describe_value(r)] for r in records]
    return table(["training forward", "way", "torch's time / this (p20–p80)"], lines)


TABLES: dict[str, Callable[[Records], str]] = {
    "training": training,
    "replaced": replaced,
    "share": share,
    "time": time,
}


def tables(described: dict[str, Any], records: Records) -> dict[str, str]:
    """Subject of a marker -> what stands between it and the next."""
    made = {name: make([r for r in records if r["table"] == name]) for name, make in TABLES.items()}
    made["time"] = f"{where(described)}\n\n{made['time']}"
    return {f"parametrization_{name}": f"\n{text}\n\n" for name, text in made.items()}


def render(text: str, path: Path) -> str:
    """The page with its tables made anew from a result file; ValueError where it lacks the markers of one."""
    made = tables(*load(path))
    missing = made.keys() - {m["subject"] for m in MARKER.finditer(text)}
    if missing:
        raise ValueError(f"the page has no markers for {', '.join(sorted(missing))}")
    return MARKER.sub(lambda m: m[1] + made.get(m["subject"], m["body"]) + m[4], text)
