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
from .fits import UNKNOWN, Line, line, near, table
from .trainings import LINES

FILE = trainings.NAME
QUANTITIES = [f"phi{layer} {when}" for layer in (1, 2) for when in ("before", "after")]
EXPECTED = 1 / math.sqrt(2)
add_arguments = trainings.add_arguments


def run(args: argparse.Namespace) -> int:
    return trainings.run(args, "fig5", text, draw)


def lines(found: Sequence[Record]) -> list[Line]:
    bounds = near(0.0) if found[0]["line"] in ("mup", "ntp") else UNKNOWN
    name = LINES[found[0]["line"]].title
    return [line(f"{name} {q.replace('phi', 'h')}", found, lambda r, k=q: r[k], bounds) for q in QUANTITIES]  # type: ignore[misc]


def text(records: Sequence[Record]) -> str:
    """1 / sqrt(2) = 0.707."""
    return "\n\n".join(
        f"**{title}.**\n\n" + table([one for found in by_line.values() for one in lines(found)], "line, layer, when")
        for title, by_line in trainings.blocks(records, shared=True)
    )


def draw(records: Sequence[Record], figure: Any) -> None:
    title, by_line = trainings.widest(records)
    for axes, (name, found) in zip(plots.panels(figure, len(by_line)), by_line.items(), strict=True):
        plots.against_width(axes, lines(found), LINES[name].title)
        axes.axhline(EXPECTED, color="black", linestyle=":", linewidth=1)
        axes.set_ylim(0.3, 1.3)
    figure.suptitle(f"{title}; {trainings.VARY}; dotted: 1/√2", fontsize=8)
