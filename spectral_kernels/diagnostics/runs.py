"""What checks across widths share: their arguments, and the short trainings they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import arguments

Batch = tuple[Any, Any]  # (what the model takes, targets)
Batches = Callable[[int], Batch] | Sequence[Batch]
Loss = Callable[[Any, Any], Tensor]


def check_widths(widths: Sequence[int], least: int = 2) -> list[int]:
    """The widths in order; at least `least` of them, different, whole and positive."""
    given = _listed("widths", widths)
    found = sorted({arguments.check_int("widths", w, 1) for w in given})
    if len(found) != len(given) or len(found) < least:
        raise ValueError(f"widths must be at least {least} different numbers, not {given}")
    return found


def check_lrs(lrs: Sequence[float], least: int = 3) -> list[float]:
    """The rates in order; at least `least` of them, different, positive and finite."""
    given = _listed("lrs", lrs)
    found = sorted({arguments.check_number("lrs", lr, 0.0, above=True) for lr in given})
    if len(found) != len(given) or len(found) < least:
        raise ValueError(f"lrs must be at least {least} different numbers, not {given}")
    return found


def check_seeds(seeds: Sequence[int] | int) -> list[int]:
    """A number of seeds as 0 to n - 1, or the seeds given."""
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        return list(range(arguments.check_int("seeds", seeds, 1)))
    given = [arguments.check_seed(seed) for seed in _listed("seeds", seeds)]
    if not given:
        raise ValueError("seeds must hold at least one seed")
    return given


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence, not {type(values).__name__}")
    return list(values)


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")


def picker(batches: Batches) -> Callable[[int], Batch]:
    """step -> batch, from a function of the step or a sequence that is gone through in turn."""
    if callable(batches):
        return batches
    if not isinstance(batches, Sequence) or isinstance(batches, str) or not batches:
        raise TypeError(f"batches must be a function of the step or a list of (x, y), not {type(batches).__name__}")
    if any(not isinstance(b, tuple | list) or len(b) != 2 for b in batches):
        raise ValueError("batches must hold pairs (x, y)")
    held = batches
    return lambda step: held[step % len(held)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random state of a seed, and afterwards the caller's own again."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def built(make_model: Callable[[int], nn.Module], width: int) -> nn.Module:
    model = make_model(width)
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_model must return a torch.nn.Module, not {type(model).__name__}")
    return model


def training(
    model: nn.Module, optimizer: Any, steps: int, batch: Callable[[int], Batch], loss: Loss
) -> Iterator[float]:
    """The loss of every step, taken before its update; ends where a loss is not finite, which is the last one told."""
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        value = loss(model(x), y)
        found = float(value.detach())
        if math.isfinite(found):
            value.backward()
            optimizer.step()
        yield found
        if not math.isfinite(found):
            return
