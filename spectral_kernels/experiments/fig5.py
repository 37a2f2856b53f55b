"""Fig. 5: the activation keeps the size of features (Assumption 2).

    E ||phi(h_l)|| / ||h_l||,   l = 1, 2

before and after the trainings of Fig. 2: about 1 / sqrt(2) for ReLU, at every width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from ..bench.measure import Record
from . import plots, trainings
from .fits import Line, near
from .trainings import LINES

FILE = trainings.NAME
QUANTITIES = {f"phi{layer} {when}": f"h{layer} {when}" for layer in (1, 2) for when in ("before", "after")}
EXPECTED = 1 / math.sqrt(2)
add_arguments = trainings.add_arguments


def run(args: argparse.Namespace) -> int:
    return trainings.run(args, "fig5", text, draw)


def lines(found: Sequence[Record]) -> list[Line]:
    return trainings.judged(found, QUANTITIES, near(0.0))


def text(records: Sequence[Record]) -> str:
    """1 / sqrt(2) = 0.707."""
    return trainings.tables(records, lines, "line, layer, when")


def draw(records: Sequence[Record], figure: Any) -> None:
    title, by_line = trainings.widest(records)
    for axes, (name, found) in zip(plots.panels(figure, len(by_line)), by_line.items(), strict=True):
        plots.against_width(axes, lines(found), LINES[name].title)
        axes.axhline(EXPECTED, color="black", linestyle=":", linewidth=1)
        axes.set_ylim(0.3, 1.3)
    figure.suptitle(f"{title}; {trainings.VARY}; dotted: 1/√2", fontsize=8)
