"""Section 3.4 and Theorems 1 and 2: the condition is the only maximal scaling.

Networks n_0-n-n-1 under muP, with one layer's initial size or rate multiplied by (n / 64)^delta, one step of full-batch
descent. Sizes that must be Theta(1) for the network to be stable and for every layer to learn:

    ||h_l||_2 / sqrt(n_l)   for hidden layers, ||W_L||_2 sqrt(n) for the last
    ||dW_l h'_{l-1}||_2 / sqrt(n_l)   each layer's own part of the change of its output

The step is that of a network whose initial outputs are subtracted: under muP they vanish like 1 / sqrt(n), and at these
widths would still hide the limit. Shown are the exponents in the width of what grows fastest (blows up) and of what
decays fastest (freezes): only delta = 0 does neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bench.measure import Record, rounded
from ..ops.norm import spectral_norm
from . import network, plots, runs
from .data import Images
from .descent import factors, update
from .fits import line, markdown, signed
from .network import BASE_WIDTH, backward, forward

FILE = "uniqueness"
WIDTHS, TRIALS, RATE = (64, 128, 256, 512), 2, 0.1
DELTAS = (-1.0, -0.5, 0.0, 0.5, 1.0)
CHANGED = tuple((what, layer) for what in ("sigma", "eta") for layer in (1, 2, 3))
NAMES = {"sigma": "σ", "eta": "η"}
FLAT = 0.25  # exponents within this of 0, half of the smallest delta, are neither [ours]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, trials=TRIALS)


def run(args: argparse.Namespace) -> int:
    study = runs.study(args, FILE, two_classes=True)
    images = study.images
    total = len(set(args.widths)) * len(CHANGED) * len(DELTAS)
    with study.bar("one step each", total) as tick:
        for width, (what, layer), delta in runs.pairs(sorted(set(args.widths)), CHANGED, DELTAS):
            key = {"what": what, "layer": layer, "delta": delta, "width": width}
            study.fill(key, args.trials, partial(measured, images, what, layer, delta, width, seed=args.seed))
            tick()
    return study.finish(FILE, text, draw)


@torch.no_grad()
def measured(
    images: Images, what: str, layer: int, delta: float, width: int, trials: Sequence[int], *, seed: int = 0
) -> Iterator[Record]:
    """A record per trial of the sizes before the step, `size 1..3`, and of the layers' own parts, `part 1..3`."""
    sizes = (images.inputs.shape[1], width, width, 1)
    power = (width / BASE_WIDTH) ** delta
    x, y = images.inputs, images.targets
    weights = network.initial("mup", sizes, seed, width, trials)
    rates = [RATE * factor for factor in factors("sgd", "mup", sizes)]
    if what == "sigma":
        weights[layer - 1] *= power
    else:
        rates[layer - 1] *= power
    if len(x) < x.shape[1]:
        x, basis = network.span(x)
        weights[0] = weights[0] @ basis.mT
    start = [W.clone() for W in weights]
    passed = forward(weights, x)
    residuals = y + passed.outputs  # y - f of a network whose initial outputs are subtracted
    update("sgd", weights, rates)(backward(weights, passed, residuals).grads, 1.0)
    found: dict[str, Tensor] = {}
    for i, (W, W0, inputs) in enumerate(zip(weights, start, passed.inputs, strict=True)):
        root = W.shape[1] ** 0.5
        last = i == len(weights) - 1
        size = spectral_norm(W0, tol=1e-4) * W.shape[2] ** 0.5 if last else _rms(passed.h[i], root)
        found |= {f"size {i + 1}": size, f"part {i + 1}": _rms(inputs @ (W - W0).mT, root)}
    for i in range(len(trials)):
        yield {name: rounded(float(value[i])) for name, value in found.items()}


def _rms(h: Tensor, root: float) -> Tensor:
    """(T, B, n) -> (T,): mean over the inputs of ||h|| / sqrt(n)"""
    return torch.linalg.vector_norm(h, dim=-1).mean(-1) / root


def exponents(found: Sequence[Record]) -> dict[str, float]:
    """Quantity -> its exponent in the width."""
    names = [name for name in found[0] if name.startswith(("size ", "part "))]
    return {name: line(name, found, lambda r, n=name: r[n]).exponent[0] for name in names}  # type: ignore[misc]


def extremes(found: Sequence[Record]) -> tuple[float, float]:
    """(most negative, most positive) exponent."""
    values = exponents(found).values()
    return min(values), max(values)


def verdict(low: float, high: float) -> str:
    words = [w for w, holds in (("blows up", high > FLAT), ("freezes", low < -FLAT)) if holds]
    return " and ".join(words) or "neither"


def text(records: Sequence[Record]) -> str:
    parts = []
    for group in runs.groups(records, "crc", "seed").values():
        rows, alone = [], True
        for (what, layer), found in runs.groups(group, "what", "layer").items():
            cells = []
            for (delta,), chosen in sorted(runs.groups(found, "delta").items()):
                low, high = extremes(chosen)
                words = verdict(low, high)
                alone &= (words == "neither") == (delta == 0)
                cells.append(f"{words} ({signed(low)}, {signed(high)})")
            rows.append([f"{NAMES[what]} of layer {layer}", *cells])
        widths = sorted({r["width"] for r in group})
        head = ["times (n / 64)^δ", *(f"δ = {d:+g}" if d else "δ = 0" for d in sorted({r["delta"] for r in group}))]
        met = "no answer from one width" if len(widths) < 2 else "**met**" if alone else "**missed**"
        parts += [
            f"**{runs.title(group)}, widths {' '.join(map(str, widths))}, one step.** (lowest, highest exponent)",
            markdown(head, rows),
            f"- Only δ = 0 neither blows up nor freezes (exponents within ±{FLAT:g}): {met}.",
        ]
    return "\n\n".join(parts)


def draw(records: Sequence[Record], figure: Any) -> None:
    """Two heat maps: the highest exponent, what blows up, and the lowest, what freezes."""
    group = list(runs.groups(records, "crc", "seed").values())[-1]
    deltas = sorted({r["delta"] for r in group})
    by_change = runs.groups(group, "what", "layer")
    for place, (axes, words) in enumerate(zip(plots.panels(figure, 2), ("freezes", "blows up"), strict=True)):
        cells = [
            [extremes([r for r in found if r["delta"] == d])[place] for d in deltas] for found in by_change.values()
        ]
        axes.imshow(cells, cmap="coolwarm", vmin=-1, vmax=1, aspect="auto")
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                axes.text(j, i, signed(value), ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(deltas)), [f"{d:+g}" for d in deltas])
        axes.set_yticks(range(len(by_change)), [f"{NAMES[what]}{layer}" for what, layer in by_change])
        axes.set_xlabel("δ")
        axes.set_title(f"{words}: {'lowest' if not place else 'highest'} exponent", fontsize=9, loc="left")
