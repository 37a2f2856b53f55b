"""Section 5.3: NTP becomes muP by dividing its output by sqrt(n) and multiplying its rate by n, exactly.

Two networks n_0-n-n-1 from the same samples, float64, full-batch gradient descent on 200 images of two classes: one
under muP, one under NTP with output f / sqrt(n) and rate eta n. After every step outputs and weights (the last
layer's as W_3 / sqrt(n)) are compared. The paper's text scales the rate down; with eta / n the network hardly moves:
measured beside it. At n = 1 muP and NTP are the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bench.measure import Record, rounded
from ..diagnostics import measures
from . import network, plots, runs
from .data import Images
from .fits import markdown
from .network import backward, forward

FILE = "ntp-mup"
WIDTHS, STEPS, TRIALS, RATE = (1, 10, 50, 200), 30, 2, 0.1  # no powers of 4: their square roots would round nothing
CLOSE = 1e-10  # relative difference that counts as equal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=WIDTHS, steps=STEPS, trials=TRIALS)


def run(args: argparse.Namespace) -> int:
    study = runs.study(args, FILE, two_classes=True)
    images = study.images
    for width in sorted(set(args.widths)):
        key = {"width": width, "steps": args.steps, "rate": RATE}
        study.fill(key, args.trials, partial(compared, images, width, args.steps, seed=args.seed))
    return study.finish(FILE, text, draw)


def compared(images: Images, width: int, steps: int, trials: Sequence[int], *, seed: int = 0) -> Iterator[Record]:
    """Largest relative differences over all steps; the change of h_2 with the rate up by n, and down by n."""
    sizes = (images.inputs.shape[1], width, width, 1)
    x, y = images.inputs.double(), images.targets.double()
    mup = _start("mup", sizes, seed, width, trials)
    ntp = _start("ntp", sizes, seed, width, trials)
    down, first = [W.clone() for W in ntp], forward(ntp, x).h[1]
    same = [all(bool((a[i] == b[i]).all()) for a, b in zip(mup, ntp, strict=True)) for i in range(len(trials))]
    differences = [_difference(mup, ntp, x, width)]
    for _ in range(steps):
        _step("mup", mup, x, y, sizes, 1.0, RATE)
        _step("ntp", ntp, x, y, sizes, math.sqrt(width), RATE * width)
        _step("ntp", down, x, y, sizes, math.sqrt(width), RATE / width)
        differences.append(_difference(mup, ntp, x, width))
    curve = torch.stack(differences)  # (steps + 1, T)
    moved = {name: measures.feature_change(forward(W, x).h[1], first) for name, W in (("up", ntp), ("down", down))}
    for i in range(len(trials)):
        yield {
            "difference": rounded(float(curve[:, i].max())),
            "curve": [rounded(float(d)) for d in curve[:, i]],
            "moved up": rounded(float(moved["up"][i])),
            "moved down": rounded(float(moved["down"][i])),
            "same start": same[i],
        }


def _start(scheme: str, sizes: Sequence[int], seed: int, width: int, trials: Sequence[int]) -> list[Tensor]:
    stds = network.init_stds(scheme, sizes)
    return [s * W.double() for s, W in zip(stds, network.samples(sizes, seed, width, trials), strict=True)]


def _step(
    scheme: str, weights: list[Tensor], x: Tensor, y: Tensor, sizes: Sequence[int], divisor: float, rate: float
) -> None:
    """One step of descent on f / divisor: the chain rule through the last layer, W_3 / divisor."""
    scaled = [*weights[:-1], weights[-1] / divisor]
    grads = backward(scaled, forward(scaled, x), y).grads
    grads[-1] = grads[-1] / divisor
    for W, G, factor in zip(weights, grads, network.sgd_factors(scheme, sizes), strict=True):
        W -= rate * factor * G


def _difference(mup: list[Tensor], ntp: list[Tensor], x: Tensor, width: int) -> Tensor:
    """(T,): the largest relative difference of a weight matrix or of the outputs."""
    scaled = [*ntp[:-1], ntp[-1] / math.sqrt(width)]
    pairs = [*zip(mup, scaled, strict=True), (forward(mup, x).outputs, forward(scaled, x).outputs)]
    apart = torch.stack([torch.linalg.matrix_norm(a - b) for a, b in pairs])
    size = torch.stack([torch.linalg.matrix_norm(a) for a, _ in pairs])
    return (apart / size).where(apart != 0, 0.0).amax(0)  # a dead ReLU's outputs are 0 in both


def _mean(values: Iterable[float | None]) -> float:
    """Over the trials whose first features were not all zero."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def text(records: Sequence[Record]) -> str:
    parts = []
    for group in runs.groups(records, "crc", "seed", "steps").values():
        rows = []
        for (width,), found in runs.groups(group, "width").items():
            worst = max(math.inf if r["difference"] is None else r["difference"] for r in found)
            moved = [_mean(r[f"moved {way}"] for r in found) for way in ("up", "down")]
            start = "yes" if all(r["same start"] for r in found) else "no"
            rows.append(
                [str(width), f"{worst:.1e}", "yes" if worst <= CLOSE else "no", *map("{:.2g}".format, moved), start]
            )
        head = ["n", "largest relative difference", f"≤ {CLOSE:g}", "change of h₂, rate · n", "rate / n"]
        parts += [f"**{runs.title(group)}, float64.**", markdown([*head, "μP and NTP start equal"], rows)]
    return "\n\n".join(parts)


def draw(records: Sequence[Record], figure: Any) -> None:
    (axes,) = plots.panels(figure, 1)
    figure.set_size_inches(4.5, 3.2)
    for ((width,), found), color in zip(runs.groups(records, "width").items(), plots.COLORS, strict=False):
        for i, record in enumerate(found):
            points = [max(d, 1e-18) for d in record["curve"]]
            axes.plot(points, color=color, linewidth=1, label=f"n = {width}" if not i else None)
    axes.axhline(CLOSE, color="black", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    plots.finish(axes, "NTP (output/√n, rate·n) − μP, relative, float64", True)
