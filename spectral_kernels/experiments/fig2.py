"""Fig. 2: features and weights move by as much at every width under the spectral condition, and freeze under NTP.

Networks n_0-n-n-1 without biases, ReLU, trained by full-batch gradient descent on 200 images of two classes with
targets of -1 and +1, at widths n, under muP, NTP and SP. At the end:

    A   E ||h_2 - h_2^0|| / ||h_2^0||          relative change of features
    B   ||W_2 - W_2^0||_2 / ||W_2^0||_2        relative change of weights, spectral norm
    C   E ||W_3 h_2'|| / (||W_3||_2 ||h_2'||)  alignment of the final layer with its input
    D   ||W_2 - W_2^0||_F / ||W_2^0||_F        relative change of weights, Frobenius norm

muP: n^0, n^0, n^0, n^(-1/2). NTP: n^(-1/2), n^(-1/2), n^(-1/2), n^(-1). SP has no such limit: its line has no
prediction. --lines adds Eq. 17, Adam with and without Condition 1 rates, and Muon.

    spectral-kernels paper fig2 --data cifar-10-batches-bin --widths 64 128 256 512 1024 --steps 1000 --out results
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench.measure import Record
from . import plots, trainings
from .fits import NEAR, Bounds, Line, at_most, line, markdown, near, number, table
from .trainings import LINES, LOW

FILE = trainings.NAME
AXES = {
    "A": "A: features, E ‖h₂−h₂⁰‖/‖h₂⁰‖",
    "B": "B: ‖W₂−W₂⁰‖₂/‖W₂⁰‖₂",
    "C": "C: alignment of the final layer",
    "D": "D: ‖W₂−W₂⁰‖_F/‖W₂⁰‖_F",
}
_FLAT = {axis: near(0.0) for axis in "ABC"}
WANTED: dict[str, dict[str, Bounds]] = {
    "mup": {**_FLAT, "D": near(-0.5)},
    "ntp": {**{axis: at_most(-0.25, -0.5) for axis in "ABC"}, "D": at_most(-0.75, -1.0)},
    "sp": {},
    "spectral": _FLAT,  # D follows the stable rank of many steps' sum, which only plain gradients keep low
    "muon": _FLAT,
    "adam": _FLAT,
    "adam-plain": {},
}

add_arguments = trainings.add_arguments


def run(args: argparse.Namespace) -> int:
    return trainings.run(args, "fig2", text, draw)


def lines(records: Sequence[Record], axis: str, by_title: bool = True) -> Line:
    """One axis of the figure for the records of one line."""
    name = LINES[records[0]["line"]].title
    bounds = WANTED[records[0]["line"]].get(axis, Bounds())
    return line(name if by_title else f"{name} {axis}", records, lambda r: r[axis], bounds)


def obeys(found: Sequence[Record]) -> bool:
    """Features and weights move by as much at every width, whatever the line was expected to do."""
    exponents = [line(axis, found, lambda r, a=axis: r[a]).exponent[0] for axis in "AB"]  # type: ignore[misc]
    return all(abs(exponent) <= NEAR for exponent in exponents)


def text(records: Sequence[Record]) -> str:
    """Slopes of the four axes, and the losses reached."""
    parts = []
    for title, by_line in trainings.blocks(records):
        rows = [lines(found, axis, by_title=False) for found in by_line.values() for axis in AXES]
        parts += [f"**{title}.**", table(rows, "line, axis"), _losses(by_line)]
    return "\n\n".join(parts)


def _losses(by_line: dict[str, list[Record]]) -> str:
    widths = sorted({r["width"] for found in by_line.values() for r in found})
    rows = []
    for name, found in by_line.items():
        losses = line("", found, lambda r: r["loss"])
        init = line("", found, lambda r: r["C at init"])
        reached = sum(r["below"] is not None for r in found)
        cells = [LINES[name].title, *(number(losses.mean(w)) if w in losses.widths else "" for w in widths)]
        cells += [f"{reached} of {len(found)}", f"{init.exponent[0]:+.2f}", "yes" if obeys(found) else "no"]
        rows.append(cells)
    head = ["training loss at the end", *(f"n = {w}" for w in widths), f"below {LOW} at some step"]
    return markdown([*head, "slope of C at init (−0.50)", f"A and B flat to ±{NEAR}"], rows)


def draw(records: Sequence[Record], figure: Any) -> None:
    """A row of four panels per number of steps and set of images."""
    blocks = list(trainings.blocks(records))
    panels = plots.panels(figure, 4 * len(blocks))
    for i, (_, by_line) in enumerate(blocks):
        for axes, (axis, words) in zip(panels[4 * i : 4 * i + 4], AXES.items(), strict=True):
            plots.against_width(axes, [lines(found, axis) for found in by_line.values()], words)
    figure.suptitle("\n".join(["; ".join([title, trainings.VARY]) for title, _ in blocks]), fontsize=8)
