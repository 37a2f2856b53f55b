"""Trials as one stacked model against a loop over them: the same trainings, timed in turns.

Gradient descent under muP as in Fig. 2, --steps steps of --trials trials; median of the rounds' ratios, 20th to 80th
percentile beside it. For times that mean something, nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ..bench.measure import Record, rounded
from ..bench.timer import clock_for, interleave, ratio, spread
from . import plots, runs
from .data import Images
from .fits import line, markdown
from .trainings import LINES, trained

FILE = "stacking"
WIDTHS, STEPS, TRIALS = (64, 128, 256), 100, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, steps=STEPS, trials=TRIALS, stacks=False)


def run(args: argparse.Namespace) -> int:
    study = runs.study(args, FILE, two_classes=True)
    for width in sorted(set(args.widths)):
        key = {"width": width, "steps": args.steps, "trials": args.trials}
        study.fill(key, 1, partial(timed, study.images, width, args.trials, args.steps, seed=args.seed))
    return study.finish(FILE, text, draw)


def timed(
    images: Images, width: int, trials: int, steps: int, _: Sequence[int] = (0,), *, seed: int = 0, seconds: float = 1.0
) -> Iterator[Record]:
    """One record: time of a loop over the trials / time of one stack of them, and the seconds of both."""

    def train(numbers: Sequence[int]) -> None:
        list(trained(LINES["mup"], images, width, steps, numbers, seed))

    def loop() -> None:
        for trial in range(trials):
            train([trial])

    calls = {"stack": lambda: train(range(trials)), "loop": loop}
    samples = interleave(calls, seconds=seconds, min_rounds=3, clock=clock_for("cpu"))
    gain = ratio(samples, "loop", "stack")
    yield {
        "ratio": rounded(gain.median), "p20": rounded(gain.p20), "p80": rounded(gain.p80), "rounds": gain.rounds,
        **{f"{name} seconds": rounded(spread(times).median) for name, times in samples.items()},
    }  # fmt: skip


def text(records: Sequence[Record]) -> str:
    parts = []
    for group in runs.groups(records, "crc", "seed", "steps", "trials").values():
        rows = [
            [str(r["width"]), f"{r['loop seconds']:.3g} s", f"{r['stack seconds']:.3g} s",
             f"{r['ratio']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})"]
            for r in sorted(group, key=lambda r: r["width"])
        ]  # fmt: skip
        first = group[0]
        parts += [
            f"**{first['images']}, {first['steps']} steps of {first['trials']} trials, {first['machine']}.**",
            markdown(["n", "loop over trials", "one stack", "loop / stack"], rows),
        ]
    return "\n\n".join(parts)


def draw(records: Sequence[Record], figure: Any) -> None:
    (axes,) = plots.panels(figure, 1)
    plots.against_width(axes, [line("loop / stack", records, lambda r: r["ratio"])], "time of a loop / of a stack")
