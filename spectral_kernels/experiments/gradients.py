"""The gradients of Figs. 1 and 3: n_0-300-300-n_L, one gradient of layer 2 per batch size, initialized and trained.

Parametrization 1 times sqrt(2); the paper names neither its initial scale nor its batch sizes. Every trial draws its
own weights and batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..bench.measure import Record, rounded
from ..diagnostics import measures
from . import network, runs
from .data import Images
from .descent import descend, factors, update
from .fits import markdown, number

NAME = "gradients"
WIDTH, TRIALS, STEPS, RATE = 300, 10, 200, 0.1
BATCHES = tuple(2**i for i in range(11))
SCHEME = "spectral"
TRAINING_BATCH = 128
IMAGES = 5000  # of a larger file: the first ones
MEASURED = ("stable rank", "alignment", "rank H", "rank G")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_arguments(parser, widths=(WIDTH,), steps=STEPS, trials=TRIALS)


def run(args: argparse.Namespace, name: str, table: runs.Table, draw: runs.Draw) -> int:
    """The gradients that the file does not hold, of both activations, then the figure `name`."""
    study = runs.study(args, NAME)
    images = study.images
    images = images._replace(inputs=images.inputs[:IMAGES], labels=images.labels[:IMAGES])
    for width, activation in runs.pairs(sorted(set(args.widths)), network.ACTIVATIONS):
        key = {"activation": activation, "width": width, "steps": args.steps}
        with study.bar(f"{activation}, width {width}", args.steps) as tick:

            def make(trials: list[int], key: dict = key, tick: Callable = tick) -> Iterator[Record]:
                return measured(images, key["activation"], key["width"], args.steps, trials, args.seed, tick)

            study.fill(key, args.trials, make)
    return study.finish(name, table, draw)


def measured(
    images: Images,
    activation: str,
    width: int,
    steps: int,
    trials: Sequence[int],
    seed: int = 0,
    tick: Callable[..., object] | None = None,
) -> Iterator[Record]:
    """A record per trial: the measured quantities at every batch size, before and after `steps` steps of training."""
    sizes = (images.inputs.shape[1], width, width, images.outputs)
    weights = network.initial(SCHEME, sizes, seed, width, trials)
    found = [at_batches(images, weights, activation, seed, width, trials)]
    rates = [RATE * factor for factor in factors("sgd", SCHEME, sizes)]
    batch = min(TRAINING_BATCH, len(images.inputs))
    losses = descend(
        weights, images.inputs, images.targets, update("sgd", weights, rates), steps,
        activation=activation, batch=batch, seed=seed, on_step=tick,
    )  # fmt: skip
    found.append(at_batches(images, weights, activation, seed, width, trials))
    for i in range(len(trials)):
        record: Record = {"loss": [rounded(float(losses[at, i])) for at in (0, -1)]}
        for when, columns in zip(("random", "trained"), found, strict=True):
            record[when] = {n: [[B, float(f"{c[i]:.6g}")] for B, c in by.items()] for n, by in columns.items()}
        yield record


def at_batches(
    images: Images, weights: Sequence[Tensor], activation: str, seed: int, width: int, trials: Sequence[int]
) -> dict[str, dict[int, Tensor]]:
    """quantity -> batch size -> (T,), each trial on a batch of its own, the small ones parts of the large ones."""
    shuffles = [torch.randperm(len(images.inputs), generator=network.generator(seed + 1, width, t)) for t in trials]
    order = torch.stack(shuffles)  # (T, B)
    columns: dict[str, dict[int, Tensor]] = {name: {} for name in MEASURED}
    for B in (b for b in BATCHES if b <= len(images.inputs)):
        chosen = order[:, :B]
        for name, value in quantities(images.inputs[chosen], images.targets[chosen], weights, activation).items():
            columns[name][B] = value
    return columns


@torch.no_grad()
def quantities(x: Tensor, targets: Tensor, weights: Sequence[Tensor], activation: str) -> dict[str, Tensor]:
    """(T,) each: stable ranks of dW_2, H'_1 and G_2 with dW_2 ~ G_2 H'_1', and E ||dW_2 h'|| / (||dW_2||_2 ||h'||).

    x (T, B, n_0). The gradient stands for dW_2: a factor does not matter. h' = h'_1 on both sides of the alignment,
    where Eq. 25 prints h above: see docs/paper.md.
    """
    passed = network.forward(weights, x, activation)
    back = network.backward(weights, passed, targets, activation)
    dW, h = back.grads[1], passed.inputs[1]
    ranks = {"stable rank": dW, "rank H": h, "rank G": back.g[1]}
    return {**{name: measures.stable_rank(A) for name, A in ranks.items()}, "alignment": measures.alignment(dW, h)}


Curves = dict[str, list[tuple[int, float]]]


def curves(records: Sequence[Record], quantity: str, pick: Callable[[list[float]], float]) -> Curves:
    """`relu, random` -> (B, mean or largest over the trials)"""
    found: Curves = {}
    for (activation,), group in runs.groups(records, "activation").items():
        for when in ("random", "trained"):
            by_batch: dict[int, list[float]] = {}
            for record in group:
                for B, value in record[when][quantity]:
                    by_batch.setdefault(B, []).append(float("nan") if value is None else value)
            found[f"{activation}, {when}"] = [(B, pick(values)) for B, values in sorted(by_batch.items())]
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def largest(values: list[float]) -> float:
    return max(values)


def blocks(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    for group in runs.groups(records, "crc", "seed", "width", "steps").values():
        shown = runs.title(group).replace(f"{group[0]['steps']} steps", f"{group[0]['steps']} steps for trained ones")
        yield f"{shown}, width {group[0]['width']}", group


def batch_table(what: str, rows: Curves) -> str:
    batches = sorted({B for points in rows.values() for B, _ in points})
    cells = [[name, *(number(dict(points)[B]) for B in batches)] for name, points in rows.items()]
    return markdown([what, *(f"B = {B}" for B in batches)], cells)
