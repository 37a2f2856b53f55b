"""Updates of stacked weights: gradient descent, Adam and sign as written here; Eq. 17 and Muon by the package's own.

Every model of a stack has a base rate of its own, so that a grid of rates is one stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import scaling
from .network import BASE_WIDTH, Pass, backward, forward, layers_of, losses, sgd_factors

ENTRYWISE = ("adam", "adam plain", "sign")  # they see the coordinates of W_1: no span of the inputs
OPTIMIZERS = ("sgd", *ENTRYWISE, "spectral", "muon")
BETAS, EPS = (0.9, 0.999), 1e-12  # entries of a gradient are of size 1 / m: eps must stay below them

Update = Callable[[list[Tensor], float], None]  # gradients, schedule


def factors(optimizer: str, scheme: str, sizes: Sequence[int]) -> list[float]:
    """What the base rate is multiplied with in each layer: of SGD by the scheme; of others by Condition 1.

    spectral and muon, [paper, Eq. 17] and [derived]: sqrt(m / n); adam and sign [derived]: 1 / n. adam plain: one rate
    for all layers and widths, the hidden layer's at width 64.
    """
    if optimizer == "sgd":
        return sgd_factors(scheme, sizes)
    if optimizer == "adam plain":
        return [1 / BASE_WIDTH for _ in sizes[1:]]
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    rule = {"spectral": "spectral", "muon": "orthogonal"}.get(optimizer, "entrywise")
    return [scaling.rate_factor(rule, "matrix", m, n) for m, n in layers_of(sizes)]


def update(optimizer: str, weights: list[Tensor], rates: Sequence[Tensor | float]) -> Update:
    """The rule that moves `weights` in place; rates: per layer, a number or (T,), one per model of the stack."""
    if optimizer == "sgd":
        return _Descent(weights, rates, lambda layer, G: G)
    if optimizer == "sign":
        return _Descent(weights, rates, lambda layer, G: G.sign())
    if optimizer in ("adam", "adam plain"):
        return _Descent(weights, rates, _Adam())
    return _Packaged(optimizer, weights, rates)


class _Descent:
    """W <- W - schedule rate direction(layer, G)"""

    def __init__(
        self, weights: list[Tensor], rates: Sequence[Tensor | float], direction: Callable[[int, Tensor], Tensor]
    ) -> None:
        self.weights, self.direction = weights, direction
        self.rates = [r[:, None, None] if isinstance(r, Tensor) else r for r in rates]

    def __call__(self, grads: list[Tensor], schedule: float = 1.0) -> None:
        for layer, (W, G, rate) in enumerate(zip(self.weights, grads, self.rates, strict=True)):
            D = self.direction(layer, G)
            if isinstance(rate, Tensor):
                W.addcmul_(D, rate, value=-schedule)
            else:
                W.add_(D, alpha=-schedule * rate)


class _Adam:
    """m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), without decay. [Kingma and Ba 2015]"""

    def __init__(self) -> None:
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        self.steps: dict[int, int] = {}

    def __call__(self, layer: int, G: Tensor) -> Tensor:
        a, b = BETAS
        m, v = self.moments.setdefault(layer, (torch.zeros_like(G), torch.zeros_like(G)))
        t = self.steps[layer] = self.steps.get(layer, 0) + 1
        m.lerp_(G, 1 - a)
        v.mul_(b).addcmul_(G, G, value=1 - b)
        return m / (1 - a**t) / ((v / (1 - b**t)).sqrt() + EPS)


class _Packaged:
    """`sk.optim.SpectralOptimizer` or `sk.optim.Muon`, the stack of every layer in a group of its own, no momentum."""

    def __init__(self, optimizer: str, weights: list[Tensor], rates: Sequence[Tensor | float]) -> None:
        from ..optim import Muon, SpectralOptimizer

        self.weights = weights
        groups = [{"params": [W], "lr": float(rate)} for W, rate in zip(weights, rates, strict=True)]
        self.optimizer: Any
        if optimizer == "spectral":
            self.optimizer = SpectralOptimizer(groups, rule="none", momentum=0.0)
        elif optimizer == "muon":
            self.optimizer = Muon(
                groups, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="none", schedule="polar_express"
            )
        else:
            raise ValueError(f"unknown optimizer {optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def __call__(self, grads: list[Tensor], schedule: float = 1.0) -> None:
        for W, G in zip(self.weights, grads, strict=True):
            W.grad = G
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = schedule * rate
        self.optimizer.step()
        for W in self.weights:
            W.grad = None


def constant(step: int, steps: int) -> float:
    return 1.0


def linear(step: int, steps: int) -> float:
    """From 1 down to 0: a normalized update is as long at the end as at the start, only its rate can make it stop."""
    return 1 - step / steps


@torch.no_grad()
def descend(
    weights: list[Tensor],
    x: Tensor,
    targets: Tensor,
    step: Update,
    steps: int,
    *,
    activation: str = "relu",
    schedule: Callable[[int, int], float] = constant,
    batch: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, Pass], object] | None = None,
) -> Tensor:
    """Train in place; the losses before every step and after the last, (steps + 1, T).

    batch: None, the whole data at every step; else that many inputs, drawn anew at every step, for all trials alike.
    The last loss is that of the whole data. on_step: called with the pass of every step before the weights move.
    """
    found = []
    random = torch.Generator().manual_seed(seed)
    for i in range(steps):
        inputs, wanted = x, targets
        if batch is not None:
            chosen = torch.randint(len(x), (batch,), generator=random)
            inputs, wanted = x[chosen], targets[chosen]
        passed = forward(weights, inputs, activation)
        found.append(losses(passed.outputs, wanted))
        if on_step is not None:
            on_step(i, passed)
        step(backward(weights, passed, wanted, activation).grads, schedule(i, steps))
    found.append(losses(forward(weights, x, activation).outputs, targets))
    return torch.stack(found)
