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
from .fits import NO_DECAY, UNKNOWN, Line, line, table
from .trainings import LINES

FILE = trainings.NAME
QUANTITIES = ("own before", "own after")
add_arguments = trainings.add_arguments


def run(args: argparse.Namespace) -> int:
    return trainings.run(args, "fig6", text, draw)


def lines(found: Sequence[Record]) -> list[Line]:
    bounds = NO_DECAY if found[0]["line"] in ("mup", "ntp") else UNKNOWN
    name = LINES[found[0]["line"]].title
    return [line(f"{name} {q.removeprefix('own ')}", found, lambda r, k=q: r[k], bounds) for q in QUANTITIES]  # type: ignore[misc]


def text(records: Sequence[Record]) -> str:
    return "\n\n".join(
        f"**{title}.**\n\n" + table([one for found in by_line.values() for one in lines(found)], "line, when")
        for title, by_line in trainings.blocks(records, shared=True)
    )


def draw(records: Sequence[Record], figure: Any) -> None:
    title, by_line = trainings.widest(records)
    (axes,) = plots.panels(figure, 1)
    figure.set_size_inches(5, 3.4)
    plots.against_width(axes, [one for found in by_line.values() for one in lines(found)], "own part of the update")
    figure.suptitle(f"{title}; {trainings.VARY}", fontsize=8)
