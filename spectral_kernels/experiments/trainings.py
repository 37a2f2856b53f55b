"""The trainings of Figs. 2, 4, 5 and 6: n_0-n-n-1 without biases, ReLU, 200 images of two classes, full batch.

A line is a scheme and an optimizer. What the figures show is measured at the end of each training and kept in the
result file, so that the four figures share them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..bench.measure import Record, rounded
from ..diagnostics import measures
from . import network, runs
from .data import Images
from .descent import ENTRYWISE, constant, descend, factors, linear, update
from .fits import UNKNOWN, Bounds, Line, line, table
from .network import Pass, backward, forward

NAME = "trainings"
WIDTHS, STEPS, TRIALS = (64, 128, 256, 512), 1000, 3
LOW = 0.01  # of the training loss [paper, Fig. 2: all networks get below]


class Kind(NamedTuple):
    """One line: how weights and rates depend on the width, the rule, and its base rate."""

    scheme: str
    optimizer: str
    rate: float
    title: str


LINES = {
    "mup": Kind("mup", "sgd", 0.1, "μP"),
    "ntp": Kind("ntp", "sgd", 0.1, "NTP"),
    "sp": Kind("sp", "sgd", 0.1, "SP"),
    "spectral": Kind("mup", "spectral", 0.02, "Eq. 17, SpectralOptimizer"),
    "muon": Kind("mup", "muon", 0.02, "Muon, Condition 1 rates"),
    "adam": Kind("mup", "adam", 0.02, "Adam, Condition 1 rates"),
    "adam-plain": Kind("mup", "adam plain", 0.02, "Adam, one rate"),
}
VARY = "trials vary the initialization only"
BY_DEFAULT = ("mup", "ntp", "sp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, steps=STEPS, trials=TRIALS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--lines", nargs="+", choices=LINES, default=list(BY_DEFAULT), metavar="LINE",
        help=f"some of {', '.join(LINES)} (default {' '.join(BY_DEFAULT)})",
    )  # fmt: skip


def run(args: argparse.Namespace, name: str, table: runs.Table, draw: runs.Draw) -> int:
    """The trainings that the file does not hold, then the figure `name`."""
    study = runs.study(args, NAME, two_classes=True)
    images = study.images
    for width, name_of in runs.pairs(sorted(set(args.widths)), dict.fromkeys(args.lines)):
        kind = LINES[name_of]
        key = {"line": name_of, "rate": kind.rate, "width": width, "steps": args.steps}
        with study.bar(f"{kind.title}, width {width}", args.steps) as tick:
            options = {"seed": args.seed, "device": args.device, "tick": tick}
            study.fill(key, args.trials, partial(trained, kind, images, width, args.steps, **options))
    return study.finish(name, table, draw)


def trained(
    kind: Kind,
    images: Images,
    width: int,
    steps: int,
    trials: Sequence[int],
    seed: int = 0,
    device: str = "cpu",
    tick: Callable[..., object] | None = None,
) -> Iterator[Record]:
    """Train the trials of one width as one stack; a record each of what Figs. 2, 4, 5 and 6 show."""
    sizes = (images.inputs.shape[1], width, width, 1)
    x, y = images.inputs.to(device), images.targets.to(device)
    start = [W.to(device) for W in network.initial(kind.scheme, sizes, seed, width, trials)]
    basis = None
    weights = [W.clone() for W in start]
    if kind.optimizer not in ENTRYWISE and len(x) < x.shape[1]:
        coordinates, basis = network.span(images.inputs)
        x, basis = coordinates.to(device), basis.to(device)
        weights[0] = weights[0] @ basis.mT
    first = [W.clone() for W in weights]
    before = forward(first, x)
    rates = [kind.rate * factor for factor in factors(kind.optimizer, kind.scheme, sizes)]
    step = update(kind.optimizer, weights, rates)
    schedule = constant if kind.optimizer == "sgd" else linear
    found = descend(weights, x, y, step, steps, schedule=schedule, on_step=tick)
    after = forward(weights, x)
    moved = [W - W0 for W, W0 in zip(weights, first, strict=True)]
    if basis is not None:
        moved[0] = moved[0] @ basis
    columns = measured(start, moved, before, after)
    for name, weights_then, passed in (("before", first, before), ("after", weights, after)):
        g = backward(weights_then, passed, y).g[1]
        columns[f"own {name}"] = measures.contributions(g, passed.inputs[1])
    for i in range(len(trials)):
        low = (found[:, i] < LOW).nonzero()
        yield {
            "loss": rounded(float(found[-1, i])),
            "below": int(low[0]) if len(low) else None,
            **{name: rounded(float(column[i])) for name, column in columns.items()},
        }


def measured(start: list[Tensor], moved: list[Tensor], before: Pass, after: Pass) -> dict[str, Tensor]:
    """name -> (T,): the axes of Fig. 2, and of Figs. 4 and 5 for every layer. start, moved: (T, m, n) W^0, W - W^0."""
    end = start[1] + moved[1]
    columns = {
        "A": measures.feature_change(after.h[1], before.h[1]),
        "B": measures.relative_change(end, start[1]),
        "C": measures.alignment(start[2] + moved[2], after.inputs[2]),
        "C at init": measures.alignment(start[2], before.inputs[2]),
        "D": measures.relative_change(end, start[1], "frobenius"),
    }
    for layer in range(len(start)):
        columns[f"sum W{layer + 1}"] = measures.sum_ratio(start[layer], moved[layer])
        h0 = before.h[layer]
        columns[f"sum h{layer + 1}"] = measures.feature_sum_ratio(h0, after.h[layer] - h0)
        if layer:
            for name, passed in (("before", before), ("after", after)):
                ratio = measures.activation_ratio(passed.inputs[layer], passed.h[layer - 1])
                columns[f"phi{layer} {name}"] = ratio
    return columns


def line_title(record: Record) -> str:
    return LINES[record["line"]].title


def order(name: str) -> int:
    return list(LINES).index(name)


def blocks(records: Sequence[Record], *, shared: bool = False) -> Iterator[tuple[str, dict[str, list[Record]]]]:
    """Per set of images and number of steps: a title, and the records of every line in the order of LINES.

    shared: only the lines of gradient descent, of which the paper's assumptions speak, where there are any.
    """
    if shared:
        records = [r for r in records if r["line"] in BY_DEFAULT] or records
    for group in runs.groups(records, "crc", "seed", "steps").values():
        by_line = {name: found for (name,), found in runs.groups(group, "line").items()}
        yield runs.title(group), {name: by_line[name] for name in sorted(by_line, key=order)}


def widest(records: Sequence[Record]) -> tuple[str, dict[str, list[Record]]]:
    """The block with most trainings, which Figs. 4 to 6 draw."""
    return max(blocks(records, shared=True), key=lambda block: sum(map(len, block[1].values())))


def judged(found: Sequence[Record], quantities: Mapping[str, str], bounds: Bounds) -> list[Line]:
    """An assumption's quantities (key -> words) of one line; the paper speaks of muP and NTP, others are shown."""
    kind = found[0]["line"]
    wanted, name = bounds if kind in ("mup", "ntp") else UNKNOWN, LINES[kind].title
    return [line(f"{name} {words}", found, lambda r, k=key: r[k], wanted) for key, words in quantities.items()]  # type: ignore[misc]


def tables(records: Sequence[Record], lines: Callable[[Sequence[Record]], list[Line]], what: str) -> str:
    """A table per block of the lines that the paper's assumptions speak of."""
    return "\n\n".join(
        f"**{title}.**\n\n" + table([one for found in by_line.values() for one in lines(found)], what)
        for title, by_line in blocks(records, shared=True)
    )
