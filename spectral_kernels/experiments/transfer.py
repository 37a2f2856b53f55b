"""Transfer of the learning rate: the best one at a narrow width is the best at a wide one under Condition 1.

Networks n_0-n-n-n_L, full batch, SGD and Adam, on a grid of rates 2^k, all rates of a trial in one stack:

    condition   initial sizes of muP, rates of Condition 1: eta m / n for SGD, eta / n for Adam
    SP          std sqrt(2 / n), one rate for all layers and widths (SGD: layer 1's is divided by n_0, as if the inputs
                were by sqrt(n_0); otherwise it limits the rate at all widths below n_0, and hides the others)

The best rate has the lowest training loss after --steps steps, geometric mean over the trials; where any trial diverged
it is infinite. The shift is counted in places of the grid between the narrowest and the widest network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ..bench.measure import Record, rounded
from . import network, plots, runs
from .data import Images
from .descent import ENTRYWISE, descend, factors, update
from .fits import markdown, number

FILE = "transfer"
WIDTHS, STEPS, TRIALS = (64, 128, 256, 512), 50, 2
WITHIN = 1  # places of the grid that the best rate may move by


class Method(NamedTuple):
    optimizer: str
    scheme: str
    grid: range  # of k, the rates 2^k
    title: str
    transfers: bool


METHODS = {
    "sgd": Method("sgd", "mup", range(-8, 5), "SGD, Condition 1", True),
    "sgd-sp": Method("sgd", "sp", range(-12, 1), "SGD, SP", False),
    "adam": Method("adam", "mup", range(-8, 5), "Adam, Condition 1", True),
    "adam-sp": Method("adam", "sp", range(-17, -4), "Adam, SP", False),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, steps=STEPS, trials=TRIALS)


def run(args: argparse.Namespace) -> int:
    study = runs.study(args, FILE, two_classes=True)
    images = study.images
    for width, name in runs.pairs(sorted(set(args.widths)), METHODS):
        key = {"method": name, "grid": list(METHODS[name].grid), "width": width, "steps": args.steps}
        with study.bar(f"{METHODS[name].title}, width {width}", args.steps) as tick:
            options = {"seed": args.seed, "tick": tick}
            study.fill(key, args.trials, partial(trained, images, METHODS[name], width, args.steps, **options))
    return study.finish(FILE, text, draw)


def trained(
    images: Images,
    method: Method,
    width: int,
    steps: int,
    trials: Sequence[int],
    *,
    seed: int = 0,
    tick: Callable[..., object] | None = None,
) -> Iterator[Record]:
    """A record per trial: the training loss of every rate of the grid; None where it is not finite."""
    sizes = (images.inputs.shape[1], width, width, images.outputs)
    x = images.inputs
    weights = network.initial(method.scheme, sizes, seed, width, trials)
    if method.optimizer not in ENTRYWISE and len(x) < x.shape[1]:
        x, basis = network.span(x)
        weights[0] = weights[0] @ basis.mT
    weights = [W.repeat_interleave(len(method.grid), 0) for W in weights]  # (T rates, m, n)
    rates = torch.tensor([2.0**k for k in method.grid]).repeat(len(trials))
    scale = factors(method.optimizer, method.scheme, sizes)
    if method.scheme == "sp":
        scale = [1 / sizes[0] if method.optimizer == "sgd" else 1.0, 1.0, 1.0]
    step = update(method.optimizer, weights, [rates * factor for factor in scale])
    last = descend(weights, x, images.targets, step, steps, on_step=tick)[-1].unflatten(0, (len(trials), -1))
    for losses in last:
        yield {"losses": [rounded(float(loss)) for loss in losses]}


def means(found: Sequence[Record]) -> list[float]:
    """Geometric mean over the trials at every rate; inf where one of them is not finite."""
    columns = zip(*(r["losses"] for r in found), strict=True)
    logs = [[math.inf if v is None else math.log(max(v, 1e-30)) for v in column] for column in columns]
    return [math.exp(m) if math.isfinite(m := sum(column) / len(column)) else math.inf for column in logs]


def best(found: Sequence[Record]) -> int:
    """The k of the lowest mean loss."""
    losses = means(found)
    return found[0]["grid"][min(range(len(losses)), key=losses.__getitem__)]


def text(records: Sequence[Record]) -> str:
    parts = []
    for group in runs.groups(records, "crc", "seed", "steps").values():
        rows, widths = [], sorted({r["width"] for r in group})
        for (name,), found in runs.groups(group, "method").items():
            by_width = {w: [r for r in found if r["width"] == w] for w in widths}
            ks = {w: best(rs) for w, rs in by_width.items() if rs}
            grid = found[0]["grid"]
            cells = [f"2^{ks[w]}: {number(min(means(by_width[w])))}" if w in ks else "" for w in widths]
            shift = ks[max(ks)] - ks[min(ks)]
            edge = ", at the grid's end" if {grid[0], grid[-1]} & set(ks.values()) else ""
            wanted = f"at most {WITHIN}" if METHODS[name].transfers else f"more than {WITHIN}"
            holds = "yes" if (abs(shift) <= WITHIN) == METHODS[name].transfers else "no"
            kept = means(by_width[max(ks)])[grid.index(ks[min(ks)])]
            shown = f"{shift:+d}".replace("+0", "0") + edge
            if len(ks) < 2:
                shown = holds = ""
            rows.append([METHODS[name].title, *cells, shown, wanted, holds, number(kept)])
        head = ["method", *(f"n = {w}" for w in widths), "shift", "wanted", "holds", "loss of the widest, rate kept"]
        parts += [f"**{runs.title(group)}.** Best rate: loss.", markdown(head, rows)]
    return "\n\n".join(parts)


def draw(records: Sequence[Record], figure: Any) -> None:
    group = list(runs.groups(records, "crc", "seed", "steps").values())[-1]
    by_method = runs.groups(group, "method")
    for axes, ((name,), found) in zip(plots.panels(figure, len(by_method)), by_method.items(), strict=True):
        for ((width,), rs), color in zip(runs.groups(found, "width").items(), plots.COLORS, strict=False):
            points = [(2.0**k, loss) for k, loss in zip(rs[0]["grid"], means(rs), strict=True) if loss < 10]
            axes.plot(*zip(*points, strict=True), ".-", color=color, linewidth=1, label=f"n = {width}")
            axes.axvline(2.0 ** best(rs), color=color, linestyle=":", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("base rate")
        axes.set_ylabel("training loss")
        plots.finish(axes, METHODS[name].title, True)
    figure.suptitle(runs.title(group), fontsize=8)
