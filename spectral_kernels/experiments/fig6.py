"""Fig. 6: an input's own part of the update reaches as far as the whole update (Assumption 3).

    ||(1/B) dW_2^(i) h'_1(x_i)|| / ||dW_2 h'_1(x_i)||,   median over the inputs x_i

for one step of gradient descent at the initialization and one after the trainings of Fig. 2, B = 200: no decay with the
width. Medians, as small denominators give outliers. The paper finds it near 1 / sqrt(B).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench.measure import Record
from . import plots, trainings
from .fits import NO_DECAY, Line

FILE = trainings.NAME
QUANTITIES = {f"own {when}": when for when in ("before", "after")}
add_arguments = trainings.add_arguments


def run(args: argparse.Namespace) -> int:
    return trainings.run(args, "fig6", text, draw)


def lines(found: Sequence[Record]) -> list[Line]:
    return trainings.judged(found, QUANTITIES, NO_DECAY)


def text(records: Sequence[Record]) -> str:
    return trainings.tables(records, lines, "line, when")


def draw(records: Sequence[Record], figure: Any) -> None:
    title, by_line = trainings.widest(records)
    (axes,) = plots.panels(figure, 1)
    figure.set_size_inches(5, 3.4)
    plots.against_width(axes, [one for found in by_line.values() for one in lines(found)], "own part of the update")
    figure.suptitle(f"{title}; {trainings.VARY}", fontsize=8)
