"""`spectral-kernels bench`: the rows of the table on this machine, as a table, JSON and a picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .cases import ROWS, Case, cpu_cases
from .environment import describe
from .measure import Record, describe_target, describe_value, document, failures, measure
from .memory import measure_memory, memory_cases

WRONG_RESULT, BAD_REQUEST = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a selection of rows C1, C4, C5 and C6, under a minute")
    parser.add_argument("--rows", metavar="C1,C4", help=f"only these rows: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number to a file")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios (needs matplotlib)")


def selected(rows: str | None, quick: bool) -> list[Case]:
    """Cases asked for; ValueError names an unknown row."""
    wanted = list(ROWS) if rows is None else [r.strip().upper() for r in rows.split(",") if r.strip()]
    unknown = [r for r in wanted if r not in ROWS]
    if unknown or not wanted:
        raise ValueError(f"--rows {rows}: expected some of {', '.join(ROWS)}")
    listed = cpu_cases() + [case for case, _, _ in memory_cases()]
    chosen = [c for c in listed if c.row in wanted and (c.quick or not quick)]
    if not chosen:
        raise ValueError(f"--quick has none of {', '.join(wanted)}; leave it out")
    return chosen


def run(args: argparse.Namespace, console: Console | None = None) -> int:
    """Measure, print, write. 0: measured; 1: a result of ours was wrong; 2: the request cannot be served."""
    console = console or Console()
    try:
        cases = selected(args.rows, args.quick)
        check_outputs(args.json, args.plot)
    except ValueError as reason:
        print(f"spectral-kernels bench: {reason}", file=sys.stderr)
        return BAD_REQUEST
    records = measure_all(cases, args.quick, console)
    environment = describe()
    console.print(table(records, environment))
    for record in records:
        if record["status"] == "skipped":
            console.print(f"skipped {record['row']} {record['case']}: {record['reason']}", highlight=False)
    if args.json:
        args.json.write_text(json.dumps(document(records, environment), indent=1) + "\n")
        console.print(f"numbers: {args.json}", highlight=False, soft_wrap=True)
    if args.plot:
        plot(records, environment, args.plot)
        console.print(f"picture: {args.plot}", highlight=False, soft_wrap=True)
    wrong = failures(records)
    for record in wrong:
        print(f"WRONG {record['row']} {record['case']}: {record['reason']}", file=sys.stderr)
    return WRONG_RESULT if wrong else 0


def check_outputs(json_path: Path | None, plot_path: Path | None) -> None:
    """Before minutes of measuring: can the results be written?"""
    for path in (json_path, plot_path):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist")
        if path is not None and path.is_dir():
            raise ValueError(f"{path}: is a folder")
    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib (extra `plot`)")


def measure_all(cases: list[Case], quick: bool, console: Console) -> list[Record]:
    memory = {case.name: (shape, copies) for case, shape, copies in memory_cases()}
    seconds, least = (0.6, 3) if quick else (2.0, 5)
    records: list[Record] = []
    with console.status("measuring") as status:
        for case in cases:
            status.update(f"{case.row}  {case.name}")
            if case.row == "M":
                records += measure_memory(case, *memory[case.name])
            else:
                records += measure(case, seconds=seconds, min_rounds=least)
    return records


def table(records: list[Record], environment: dict[str, Any]) -> Table:
    where = f"{environment['machine']}, {environment['threads']} threads, torch {environment['versions']['torch']}"
    title = f"rival's time / ours, in turns: median (p20–p80)\n{where}"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    out.add_column("case", overflow="fold")
    for name in ("ours", "rival", "ratio", "error", "target"):
        out.add_column(name, justify="right", no_wrap=True)
    previous = None
    for r in records:
        if previous is not None and r["row"] != previous:
            out.add_section()
        previous = r["row"]
        times = [duration(r.get(k)) for k in ("ours_seconds", "rival_seconds")]
        error = "" if r.get("error") is None else f"{r['error']:.0e}"
        losing = r["status"] == "ok" and (r["met"] is False or (r["measure"] == "speedup" and r["value"] < 1))
        style = "bold red" if r["status"] == "wrong" else "yellow" if losing else None
        value = describe_value(r) if r["status"] == "ok" else r["status"]
        name = f"{r['row']} {r['case']}" + (f" vs {r['rival']}" if r["rival"] else "")
        out.add_row(name, *times, value, error, goal(r), style=style)
    return out


def goal(record: Record) -> str:
    """`≥ 60× ✓`, short enough for a narrow terminal."""
    return describe_target(record).replace(": met", " ✓").replace(": missed", " ✗")


def duration(spread: dict[str, float] | None) -> str:
    if not spread:
        return ""
    t = spread["median"]
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if t >= unit:
            return f"{t / unit:.3g} {name}"
    return f"{t / 1e-9:.3g} ns"


def plot(records: list[Record], environment: dict[str, Any], path: Path) -> None:
    """Bars of the speedups on a logarithmic axis; 1 is the rival's speed, and what loses stays in the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in records if r["measure"] == "speedup" and r["status"] == "ok"]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * max(len(shown), 1)), layout="constrained")
    labels = [f"{r['row']}  {r['case']}  vs {r['rival']}" for r in shown]
    values = [r["value"] for r in shown]
    at = range(len(shown))
    spans = [[max(0.0, v - r["p20"]) for v, r in zip(values, shown, strict=True)]]
    spans.append([max(0.0, r["p80"] - v) for v, r in zip(values, shown, strict=True)])
    colors = ["tab:blue" if v >= 1 else "tab:red" for v in values]
    # bars grow from 1: to the right faster, to the left slower
    axes.barh(at, [v - 1 for v in values], left=1, xerr=spans, color=colors, height=0.7, ecolor="0.3")
    for i, r in enumerate(shown):
        if r["target"] is not None:
            axes.plot([r["target"]] * 2, [i - 0.45, i + 0.45], color="black", linewidth=1.5)
    axes.set_xscale("log")
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_yticks(list(at), labels)
    axes.invert_yaxis()
    axes.set_xlabel("rival's time / ours (log scale); black marks: targets")
    axes.set_title(f"{environment['machine']}, {environment['threads']} threads", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
