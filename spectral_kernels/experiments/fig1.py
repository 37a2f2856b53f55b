"""Fig. 1: the gradient of a hidden layer has a low stable rank, and is aligned with the layer's input.

A network n_0-300-300-n_L (n_L = 10 with cross-entropy, or 1 for two classes), ReLU and tanh; one gradient of layer 2 on
a batch of B inputs, 10 trials of random weights and batches:

    stable rank   ||dW_2||_F^2 / ||dW_2||_2^2                  below 10 at every B; 1 at B = 1
    alignment     E ||dW_2 h'_1|| / (||dW_2||_2 ||h'_1||)      does not collapse; 1 at B = 1

and the same after training for --steps steps of gradient descent.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..bench.measure import Record
from . import gradients, plots
from .gradients import Curves, batch_table, curves, largest, mean

FILE = gradients.NAME
LOW = 10.0  # of the stable rank [paper]
EXACT = 1e-3  # of both quantities at B = 1
add_arguments = gradients.add_arguments


def run(args: argparse.Namespace) -> int:
    return gradients.run(args, "fig1", text, draw)


def text(records: Sequence[Record]) -> str:
    parts = []
    for title, group in gradients.blocks(records):
        ranks = curves(group, "stable rank", mean)
        aligned = curves(group, "alignment", mean)
        tables = [batch_table("stable rank of dW₂, mean", ranks), batch_table("alignment, mean", aligned)]
        parts += [f"**{title}.**", *tables, answers(curves(group, "stable rank", largest), group)]
    return "\n\n".join(parts)


def answers(most: Curves, group: Sequence[Record]) -> str:
    """The largest stable rank of all trials, and how far B = 1 is from 1 and 1."""
    top = max(value for points in most.values() for _, value in points)
    exact = max(
        abs(value - 1)
        for quantity in ("stable rank", "alignment")
        for pick in (largest, min)
        for points in curves(group, quantity, pick).values()
        for B, value in points
        if B == 1
    )
    low = min(value for points in curves(group, "alignment", min).values() for _, value in points)
    return (
        f"- Stable rank below {LOW:g} at every B and in every trial: **{_met(top < LOW)}** (largest {top:.3g}).\n"
        f"- Stable rank and alignment 1 at B = 1: **{_met(exact <= EXACT)}** (off by at most {exact:.1e}).\n"
        f"- Smallest alignment of all batch sizes and trials: {low:.2f}."
    )


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


def draw(records: Sequence[Record], figure: Any) -> None:
    blocks = list(gradients.blocks(records))
    panels = plots.panels(figure, 2 * len(blocks), columns=2)
    for (title, group), left, right in zip(blocks, panels[::2], panels[1::2], strict=True):
        plots.against_batch(left, curves(group, "stable rank", mean), title.split(", ")[0], "stable rank of dW₂")
        plots.against_batch(right, curves(group, "alignment", mean), title.split(", ")[1], "alignment")
        right.set_ylim(0, 1.05)
        left.set_ylim(bottom=0)
