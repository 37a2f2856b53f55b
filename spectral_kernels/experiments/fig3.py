"""Fig. 3: why the stable rank of a gradient is low: so are those of its two factors.

    dW_2 ~ G_2 H'_1',    H'_1 (d x B) the layer's inputs, G_2 (d x B) the gradients of its outputs

In the networks and batches of Fig. 1: both stable ranks stay far below min(300, B).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench.measure import Record
from . import gradients, plots
from .gradients import batch_table, curves, mean

FILE = gradients.NAME
WORDS = {"rank H": "stable rank of H'₁", "rank G": "stable rank of G₂"}
add_arguments = gradients.add_arguments


def run(args: argparse.Namespace) -> int:
    return gradients.run(args, "fig3", text, draw)


def text(records: Sequence[Record]) -> str:
    parts = []
    for title, group in gradients.blocks(records):
        tables = [batch_table(f"{words}, mean", curves(group, q, mean)) for q, words in WORDS.items()]
        parts += [f"**{title}.**", *tables, answers(group)]
    return "\n\n".join(parts)


def answers(group: Sequence[Record]) -> str:
    """Each at the largest batch, as a share of the largest rank it could have."""
    width, lines = group[0]["width"], []
    for q, words in WORDS.items():
        last = [points[-1] for points in curves(group, q, max).values()]
        batch, top = last[0][0], max(value for _, value in last)
        possible = min(width, batch)
        lines.append(f"- Largest {words} at B = {batch}: {top:.3g}, {100 * top / possible:.0f} % of min(n, B).")
    return "\n".join(lines)


def draw(records: Sequence[Record], figure: Any) -> None:
    blocks = list(gradients.blocks(records))
    panels = plots.panels(figure, 2 * len(blocks), columns=2)
    for (title, group), *pair in zip(blocks, panels[::2], panels[1::2], strict=True):
        for axes, (quantity, words) in zip(pair, WORDS.items(), strict=True):
            plots.against_batch(axes, curves(group, quantity, mean), title.split(", ")[0], words)
            axes.set_ylim(bottom=0)
