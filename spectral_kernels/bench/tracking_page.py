"""The table of docs/tracking.md, made from the result that bench/tracking.py writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table:tracking -->", "<!-- /table -->"


def mean_reads(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[float, int], float]:
    """(momentum, block) -> mean reads over all matrices and steady steps of its runs."""
    sums: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        total = sums.setdefault((row["momentum"], row["block"]), [0.0, 0.0])
        total[0] += row["reads"] * row["samples"]
        total[1] += row["samples"]
    return {key: reads / samples for key, (reads, samples) in sums.items()}


def percent(x: float | None) -> str:
    if x is None:
        return "not finite"
    return "0" if x < 5e-7 else f"{100 * x:.2g} %"


HEAD = "run|momentum|block|p50|p90|p99|worst|reads|second reads|first step|power: p99|worst".split("|")


def line(row: Mapping[str, Any]) -> str:
    """A run as a line of the table."""
    errors, power = row["errors"], row["power"]
    cells = [row["run"], f"{row['momentum']:g}", str(row["block"])]
    cells += [percent(errors[key]) for key in ("p50", "p90", "p99", "worst")]
    cells += [f"{row['reads']:.2f}", f"{row['again']:.0%}", percent(row["first"][0]["worst"])]
    return "| " + " | ".join([*cells, percent(power["p99"]), percent(power["worst"])]) + " |"


def markdown(result: Mapping[str, Any]) -> str:
    """The table of docs/tracking.md and what of the limits is missed."""
    rows = result["rows"]
    samples = sum(row["samples"] for row in rows)
    head = [
        f"`{result['machine']}`, torch {result['versions']['torch']}, commit {result['commit']}, "
        f"text {result['text']}; {samples:,} norms, the first {result['unsteady']} steps left out.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
    ]
    above = [row["above"] for row in rows]
    excess = "not finite" if None in above else f"{max(above):.1e}"
    wrong = sum(row["bound"]["wrong"] for row in rows)
    tail = [f"Largest excess of an estimate over the truth, all steps: {excess}; wrong upper bounds: {wrong}."]
    means = (
        f"{reads:.2f} (momentum {momentum:g}, block {block})" for (momentum, block), reads in mean_reads(rows).items()
    )
    tail += ["", f"Mean reads over all runs: {', '.join(means)}."]
    missed = [
        f"- {row['run']}, momentum {row['momentum']:g}, block {row['block']}: {', '.join(row['missed'])}"
        for row in rows
        if row["missed"]
    ]
    return "\n".join(
        [*head, *map(line, rows), "", *tail, "", *(["Missed:", "", *missed] if missed else ["Every limit is met."])]
    )


def write_table(page: Path, result: Mapping[str, Any]) -> None:
    """Replace what stands between the markers of a page; raise ValueError where it has none."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}", encoding="utf-8")
