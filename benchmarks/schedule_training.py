"""Does the schedule matter to a training? The same model, batches and steps with sk.optim.Muon, the schedule changed.

    python -m benchmarks.schedule_training --out benchmarks/results/schedule_training.json [--times] [--docs PAGE]

Every schedule has a grid of its own, of factor 2, around its best rate; two more seeds at that rate. Hidden matrices
have Muon, all others AdamW at 2**-9, as in benchmarks/training.py. The file is written after every run, and finished
runs are not run again. Times of an optimizer's step are taken in turns at the end.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training_page import number
from spectral_kernels.bench import environment, runs
from spectral_kernels.bench.measure import Record, rounded
from spectral_kernels.bench.timer import interleave, ratio
from spectral_kernels.bench.training import Task, task, train

MARKER = re.compile(r"(<!-- study:schedule-training -->\n)(?P<body>.*?)(<!-- /study -->)", re.DOTALL)
TASK, WIDTH, STEPS, ADAMW, SEEDS = "transformer", 128, 250, 2**-9, (0, 1, 2)
START = 2**-5  # of every grid
FIRST = "keller_quintic, 5 steps, frobenius"  # times are in units of its step


def schedules() -> dict[str, dict[str, Any]]:
    """Label -> options of sk.optim.Muon; shortest first."""
    import spectral_kernels as sk

    three = sk.schedules.polar_express(0.05, 1.0, 3, safety=1.01)
    four = sk.schedules.polar_express(0.01, 1.0, 4, safety=1.01)
    return {
        FIRST: {},
        "polar_express on [0.05, 1], 3 steps, frobenius": {"schedule": three},
        "polar_express on [0.05, 1], 3 steps, schatten4": {"schedule": three, "normalizer": "schatten4"},
        "polar_express on [0.01, 1], 4 steps, schatten4": {"schedule": four, "normalizer": "schatten4"},
        "polar_express, 5 steps, frobenius": {"schedule": "polar_express"},
        "polar_express, 5 steps, schatten4": {"schedule": "polar_express", "normalizer": "schatten4"},
        "polar_express_8_s101, 8 steps, schatten4": {"schedule": "polar_express_8_s101", "normalizer": "schatten4"},
    }


def build(run: Task, method: str, lr: float) -> runs.Pair:
    import spectral_kernels as sk

    options = schedules()[method]
    return runs.with_adamw(run, lambda matrices: sk.optim.Muon(matrices, lr, 0.0, **options), ADAMW)


def trained(method: str, lr: float, seed: int) -> Record:
    """One training as a record; the losses None where they are not finite."""
    run = task(TASK, width=WIDTH, seed=seed)
    losses, _ = runs.follow(run, build(run, method, lr), STEPS)
    last = losses[-runs.LAST :]
    return {
        "table": "run", "case": f"{TASK} {WIDTH}", "steps": STEPS, "method": method, "lr": lr, "seed": seed,
        "status": "ok", "train": rounded(sum(last) / len(last)), "validation": rounded(run.evaluate()),
        "commit": environment.commit(),
    }  # fmt: skip


def study(results: runs.Results) -> None:
    """Grids and seeds of every schedule."""
    for method in schedules():

        def measure(lr: float, seed: int = SEEDS[0], method: str = method) -> float:
            found = results.find(table="run", method=method, lr=lr, seed=seed)
            record = found[0] if found else results.add(trained(method, lr, seed))
            print(f"{method}, lr {lr:g}, seed {seed}: {record['validation']}", flush=True)
            return runs.loss_of(record)

        best = runs.search(measure, START)
        for seed in SEEDS[1:]:
            measure(best, seed)


def times(seconds: float = 40.0) -> Record:
    """Optimizer steps over that of the first schedule, in turns, on gradients of a training."""
    steps = {}
    for method in schedules():
        run = task(TASK, width=WIDTH, seed=0)
        optimizer = build(run, method, 0.0)
        train(run, optimizer, 3)
        steps[method] = optimizer.step
    samples = interleave(steps, seconds=seconds)
    found = {m: {k: rounded(v) for k, v in ratio(samples, m, FIRST)._asdict().items()} for m in steps}
    return {"table": "times", "case": f"{TASK} {WIDTH}", "steps": STEPS, "status": "ok", "methods": found}


def table(described: dict[str, Any], records: Sequence[Record]) -> str:
    """One line per schedule: best rate, losses over the seeds, time of a step."""
    timed = next((r["methods"] for r in records if r["table"] == "times"), {})
    lines = [
        "| schedule | best lr | validation loss | training loss | optimizer step | grid |",
        "|---|---|---|---|---|---|",
    ]
    trainings = [r for r in records if r["table"] == "run"]
    for method in dict.fromkeys(r["method"] for r in trainings):
        mine = [r for r in trainings if r["method"] == method]
        grid = sorted((r for r in mine if r["seed"] == SEEDS[0]), key=lambda r: r["lr"])
        best = min(grid, key=runs.loss_of)["lr"]
        at = [r for r in mine if r["lr"] == best]
        step = timed.get(method)
        shown = "" if step is None else f"{step['median']:.2f} ({step['p20']:.2f}–{step['p80']:.2f})"
        losses = [number([r[key] for r in at]) for key in ("validation", "train")]
        points = ", ".join(f"{r['lr']:.2g}: {number([r['validation']]).split()[0]}" for r in grid)
        lines.append(f"| {method} | {best:.2g} | {losses[0]} | {losses[1]} | {shown} | {points} |")
    case = trainings[0]
    note = (
        f"{case['case']}, {case['steps']} steps. Losses: mean (range) of {len(SEEDS)} seeds at the best rate of a "
        "factor-2 grid with one seed. Step: time over that of the first line, in turns, median (p20–p80)."
    )
    return "\n".join([runs.where(described), "", *lines, "", note])


def render(text: str, path: Path) -> str:
    """A page with its table replaced by that of the result file."""
    if not MARKER.search(text):
        raise ValueError("the page has no <!-- study:schedule-training --> ... <!-- /study --> markers")
    body = "\n" + table(*runs.load(path)) + "\n\n"
    return MARKER.sub(lambda found: found.group(1) + body + found.group(3), text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedule_training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="the result file; finished runs in it are kept")
    parser.add_argument("--times", action="store_true", help="also time the steps, on a machine that is otherwise idle")
    parser.add_argument("--docs", type=Path, help="a page with the markers, whose table is replaced")
    options = parser.parse_args(arguments)
    results = runs.Results(options.out)
    study(results)
    if options.times and not results.find(table="times"):
        results.add(times())
    if options.docs:
        options.docs.write_text(render(options.docs.read_text(encoding="utf-8"), options.out), encoding="utf-8")
    print(table(*runs.load(options.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
