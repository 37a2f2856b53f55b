"""Appendix B: the sizes of one update, in every norm, scale alike with the width.

Networks n_0-n-n-1 under muP (Condition 1 rates for Adam and sign), full batch, layer 2. dW is one step's update at the
initialization and after --steps steps, of SGD, Adam and sign:

    Lemma 1, Prop. 3   ||dW||_F / ||dW||_2 is flat in the width
    Prop. 2            the leading singular values of dW / ||dW||_F converge
    Prop. 4            ||W||_2 and ||W||_F / sqrt(n) are flat, before and after training
    Desideratum 1      ||h_l||_2 / sqrt(n) is flat for hidden layers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bench.measure import Record, rounded
from ..ops.norm import spectral_norm
from . import network, plots, runs
from .data import Images
from .descent import constant, descend, factors, linear, update
from .fits import UNKNOWN, Line, line, near, table
from .network import backward, forward

FILE = "appb"
WIDTHS, STEPS, TRIALS = (64, 128, 256, 512), 200, 3
OPTIMIZERS = {"sgd": 0.1, "adam": 0.02, "sign": 0.02}  # base rates
LEADING = 3  # singular values of Prop. 2
TIMES = ("at init", "trained")
LAYER = 1  # of weights[1] = W_2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, steps=STEPS, trials=TRIALS)


def run(args: argparse.Namespace) -> int:
    study = runs.study(args, FILE, two_classes=True)
    images = study.images
    for width, optimizer in runs.pairs(sorted(set(args.widths)), OPTIMIZERS):
        key = {"optimizer": optimizer, "rate": OPTIMIZERS[optimizer], "width": width, "steps": args.steps}
        with study.bar(f"{optimizer}, width {width}", args.steps) as tick:
            options = {"seed": args.seed, "tick": tick}
            study.fill(key, args.trials, partial(measured, images, optimizer, width, args.steps, **options))
    return study.finish(FILE, text, draw)


@torch.no_grad()
def measured(
    images: Images,
    optimizer: str,
    width: int,
    steps: int,
    trials: Sequence[int],
    *,
    seed: int = 0,
    tick: Callable[..., object] | None = None,
) -> Iterator[Record]:
    sizes = (images.inputs.shape[1], width, width, 1)
    x, y = images.inputs, images.targets
    weights = network.initial("mup", sizes, seed, width, trials)
    if optimizer == "sgd" and len(x) < x.shape[1]:
        x, basis = network.span(x)
        weights[0] = weights[0] @ basis.mT
    step = update(optimizer, weights, [OPTIMIZERS[optimizer] * f for f in factors(optimizer, "mup", sizes)])
    found = {}
    for when in TIMES:
        W, passed = weights[LAYER].clone(), forward(weights, x)
        step(backward(weights, passed, y).grads, 1.0)
        found[when] = sizes_of(W, weights[LAYER] - W, passed)
        if when == TIMES[0]:
            schedule = constant if optimizer == "sgd" else partial(_halved, linear)
            descend(weights, x, y, step, steps, schedule=schedule, on_step=tick)
    for i in range(len(trials)):
        yield {
            when: {k: [rounded(float(v)) for v in c[i].reshape(-1)] for k, c in found[when].items()} for when in TIMES
        }


def _halved(schedule: Callable[[int, int], float], step: int, steps: int) -> float:
    """Down to half the rate, not to none: a step is measured afterwards."""
    return 0.5 + 0.5 * schedule(step, steps)


def sizes_of(W: Tensor, dW: Tensor, passed: network.Pass) -> dict[str, Tensor]:
    """name -> (T,) or (T, LEADING): what Lemma 1, Props. 2 to 4 and Desideratum 1 speak of."""
    values = torch.linalg.svdvals(dW)  # (T, n), largest first
    frobenius = torch.linalg.matrix_norm(dW)
    root = W.shape[-1] ** 0.5
    return {
        "F/2": frobenius / values[:, 0],
        "leading": values[:, :LEADING] / frobenius[:, None],
        "W 2": spectral_norm(W, tol=1e-4),
        "W F": torch.linalg.matrix_norm(W) / root,
        "h1": torch.linalg.vector_norm(passed.h[0], dim=-1).mean(-1) / root,
        "h2": torch.linalg.vector_norm(passed.h[1], dim=-1).mean(-1) / root,
    }


CLAIMS = {
    "F/2": "Lemma 1, Prop. 3: ‖ΔW‖_F/‖ΔW‖₂",
    "W 2": "Prop. 4: ‖W‖₂",
    "W F": "Prop. 4: ‖W‖_F/√n",
    "h1": "Desideratum 1: ‖h₁‖/√n",
    "h2": "Desideratum 1: ‖h₂‖/√n",
}


def lines(records: Sequence[Record], quantity: str, place: int = 0) -> list[Line]:
    """One per optimizer and time."""
    found = []
    for (optimizer,), group in runs.groups(records, "optimizer").items():
        for when in TIMES:
            values = [{**r, "value": (r[when][quantity] + [None] * LEADING)[place]} for r in group]
            found.append(line(f"{optimizer} {when}", values, lambda r: r["value"], near(0.0)))
    return found


def text(records: Sequence[Record]) -> str:
    parts = []
    for group in runs.groups(records, "crc", "seed", "steps").values():
        parts.append(f"**{runs.title(group)}.**")
        parts += [table(lines(group, quantity), words) for quantity, words in CLAIMS.items()]
        leading = [
            one._replace(name=f"σ{place + 1} {one.name}", bounds=UNKNOWN if place else near(0.0))
            for place in range(min(LEADING, *(r["width"] for r in group)))
            for one in lines(group, "leading", place)
        ]
        parts.append(table(leading, "Prop. 2: singular values of ΔW/‖ΔW‖_F"))
    return "\n\n".join(parts)


def draw(records: Sequence[Record], figure: Any) -> None:
    panels = plots.panels(figure, 4)
    for axes, quantity in zip(panels[:3], ("F/2", "W 2", "W F"), strict=True):
        plots.against_width(axes, lines(records, quantity), CLAIMS[quantity])
    leading = [one for place in (0, 1, 2) for one in _sgd(lines(records, "leading", place), place)]
    plots.against_width(panels[3], leading, "Prop. 2: ΔW/‖ΔW‖_F of SGD")


def _sgd(found: list[Line], place: int) -> list[Line]:
    return [one._replace(name=f"σ{place + 1} {one.name}") for one in found if one.name.startswith("sgd")]
