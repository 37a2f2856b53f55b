"""Fig. 4: weights and their total changes do not cancel (Assumption 1).

    ||W||_2 / (||W^0||_2 + ||W - W^0||_2)   and   E ||h|| / (||h^0|| + ||h - h^0||)

at the end of the trainings of Fig. 2, for every layer: at most 1, and the paper assumes no decay with the width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench.measure import Record
from . import plots, trainings
from .fits import NO_DECAY, Line
from .trainings import LINES

FILE = trainings.NAME
QUANTITIES = {f"sum {kind}{layer}": f"{kind}{layer}" for kind in "Wh" for layer in (1, 2, 3)}
add_arguments = trainings.add_arguments


def run(args: argparse.Namespace) -> int:
    return trainings.run(args, "fig4", text, draw)


def lines(found: Sequence[Record]) -> list[Line]:
    return trainings.judged(found, QUANTITIES, NO_DECAY)


def text(records: Sequence[Record]) -> str:
    return trainings.tables(records, lines, "line, layer")


def draw(records: Sequence[Record], figure: Any) -> None:
    title, by_line = trainings.widest(records)
    for axes, (name, found) in zip(plots.panels(figure, len(by_line)), by_line.items(), strict=True):
        plots.against_width(axes, lines(found), LINES[name].title)
        axes.set_ylim(0.1, 1.3)
    figure.suptitle(f"{title}; {trainings.VARY}", fontsize=8)
