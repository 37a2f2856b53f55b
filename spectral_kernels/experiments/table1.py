"""Table 1: one scaling in four measures, for weights at initialization and for one update.

Networks n_0-n-n-1 under muP, full batch, one gradient step: stable rank, spectral norm, Frobenius norm and RMS entry of
W and dW in layers 2 (n x n) and 3 (1 x n), as exponents in the width. Beside them, per layer, Eqs. 19 and 20:
<dW, grad W> is Theta(1), ||grad W||_2 is Theta(sqrt(n / m)). The step is that of a network whose initial
outputs are subtracted: under muP they vanish like 1 / sqrt(n), and at these widths would still hide the limit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bench.measure import Record, rounded
from ..diagnostics import measures
from ..ops.norm import spectral_norm
from . import network, plots, runs
from .data import Images
from .descent import factors
from .fits import Bounds, Line, line, near, table
from .network import backward, forward

FILE = "table1"
WIDTHS, TRIALS, RATE = (64, 128, 256, 512), 3, 0.1
MEASURES = ("stable rank", "spectral", "Frobenius", "RMS entry")
PREDICTED = {  # exponents in the width; layer 2 is n x n, layer 3 is 1 x n
    "W2": (1.0, 0.0, 0.5, -0.5),
    "dW2": (0.0, 0.0, 0.0, -1.0),
    "W3": (0.0, -0.5, -0.5, -1.0),
    "dW3": (0.0, -0.5, -0.5, -1.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, trials=TRIALS)


def run(args: argparse.Namespace) -> int:
    study = runs.study(args, FILE, two_classes=True)
    images = study.images
    for width in sorted(set(args.widths)):
        study.fill({"width": width}, args.trials, partial(measured, images, width, seed=args.seed))
    return study.finish(FILE, text, draw)


@torch.no_grad()
def measured(images: Images, width: int, trials: Sequence[int], *, seed: int = 0) -> Iterator[Record]:
    sizes = (images.inputs.shape[1], width, width, 1)
    weights = network.initial("mup", sizes, seed, width, trials)
    passed = forward(weights, images.inputs)
    grads = backward(weights, passed, images.targets + passed.outputs).grads  # initial outputs subtracted
    found: dict[str, Tensor] = {}
    for i, (W, G, factor) in enumerate(zip(weights, grads, factors("sgd", "mup", sizes), strict=True), 1):
        m, n = W.shape[1:]
        if i > 1:
            found |= {f"W{i} {name}": value for name, value in four(W).items()}
            found |= {f"dW{i} {name}": value for name, value in four(RATE * factor * G).items()}
        found[f"Eq. 19, layer {i}"] = RATE * factor * G.square().sum((-2, -1))
        found[f"Eq. 20, layer {i}"] = spectral_norm(G, tol=1e-4) / math.sqrt(n / m)
    for i in range(len(trials)):
        yield {name: rounded(float(value[i])) for name, value in found.items()}


def four(A: Tensor) -> dict[str, Tensor]:
    """(T,) each: the measures of the table."""
    frobenius = torch.linalg.matrix_norm(A)
    entry = frobenius / math.sqrt(A.shape[-2] * A.shape[-1])
    return dict(zip(MEASURES, (measures.stable_rank(A), spectral_norm(A, tol=1e-4), frobenius, entry), strict=True))


def lines(records: Sequence[Record]) -> list[Line]:
    wanted: dict[str, Bounds] = {
        f"{matrix} {name}": near(exponent)
        for matrix, exponents in PREDICTED.items()
        for name, exponent in zip(MEASURES, exponents, strict=True)
    }
    wanted |= {f"Eq. {equation}, layer {i}": near(0.0) for equation in (19, 20) for i in (1, 2, 3)}
    return [
        line(name.replace("dW", "ΔW"), records, lambda r, n=name: r[n], bounds)  # type: ignore[misc]
        for name, bounds in wanted.items()
    ]


def text(records: Sequence[Record]) -> str:
    return "\n\n".join(
        f"**{runs.title(group)}, one step from the initialization.**\n\n{table(lines(group))}"
        for group in runs.groups(records, "crc", "seed").values()
    )


def draw(records: Sequence[Record], figure: Any) -> None:
    group = list(runs.groups(records, "crc", "seed").values())[-1]
    panels = plots.panels(figure, 3)
    found = lines(group)
    for axes, words in zip(panels, ("W", "ΔW", "Eq"), strict=True):
        chosen = [one for one in found if one.name.startswith(words)]
        titles = {"W": "W at initialization", "ΔW": "ΔW of one step", "Eq": "Eqs. 19 and 20"}
        plots.against_width(axes, chosen, titles[words])
