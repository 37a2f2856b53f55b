"""Multilayer perceptrons without biases, all trials of one width as one stacked model.

    h_1 = W_1 x,   h_l = W_l h'_{l-1},   h'_l = phi(h_l)        weights (T, m, n), features (T, B, n)

The loss of an input is 1/2 (f - y)^2 for targets of -1 and +1, cross-entropy for ten classes; of a batch, the mean.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import scaling

BASE_WIDTH = 64  # at which rates that are constant in the width equal those of the scheme beside them
GAIN = math.sqrt(2)  # of every initialization, for ReLU [paper, Fig. 2]
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    # phi, and phi' as a function of h and phi(h)
    "relu": (torch.relu, lambda h, out: (h > 0).to(h.dtype)),
    "tanh": (torch.tanh, lambda h, out: 1 - out * out),
}


# -- a scheme: initial sizes and rates of every layer


def layers_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(n_0, ..., n_L) -> [(m, n) of W_1, ..., W_L]"""
    return [(m, n) for n, m in zip(sizes, sizes[1:], strict=False)]


def scales(scheme: str, sizes: Sequence[int]) -> list[scaling.Scales]:
    """(sigma, eta) of W_1, ..., W_L before the gain: scaling.parametrization, of input, hidden and output layers."""
    shapes = layers_of(sizes)
    layers = ["input", *("hidden" for _ in shapes[2:]), "output"]
    return [scaling.parametrization(scheme, m, n, layer=layer) for (m, n), layer in zip(shapes, layers, strict=True)]


def init_stds(scheme: str, sizes: Sequence[int]) -> list[float]:
    """sqrt(2) sigma per layer; mup: sqrt(2 / n_0), sqrt(2 / n), sqrt(2) / n. [paper, Fig. 2]"""
    return [GAIN * scale.sigma for scale in scales(scheme, sizes)]


def sgd_factors(scheme: str, sizes: Sequence[int]) -> list[float]:
    """What the base rate of SGD is multiplied with: m / n; ntp: 1 / n [paper]; sp: at any width ntp's at 64 [ours]."""
    if scheme == "sp":
        return [1 / sizes[0], *(1 / BASE_WIDTH for _ in sizes[2:])]
    return [scale.eta for scale in scales(scheme, sizes)]


def generator(seed: int, width: int, trial: int) -> torch.Generator:
    """Of one trial's random numbers: the same in every scheme, alone or stacked."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {width} {trial}".encode()))


def samples(sizes: Sequence[int], seed: int, width: int, trials: Sequence[int]) -> list[Tensor]:
    """Standard normal weights (T, m, n) per layer, one generator per trial."""
    drawn = []
    for trial in trials:
        random = generator(seed, width, trial)
        drawn.append([torch.randn(m, n, generator=random) for m, n in layers_of(sizes)])
    return [torch.stack(layer) for layer in zip(*drawn, strict=True)]


def initial(scheme: str, sizes: Sequence[int], seed: int, width: int, trials: Sequence[int]) -> list[Tensor]:
    """The weights of a scheme before training: its standard deviations times the samples of every trial."""
    stds = init_stds(scheme, sizes)
    return [std * W for std, W in zip(stds, samples(sizes, seed, width, trials), strict=True)]


# -- forward and backward


class Pass(NamedTuple):
    """inputs: h'_0, ..., h'_{L-1}; h: h_1, ..., h_L; each (T, B, n_l), h'_0 = x also (B, n_0)."""

    inputs: list[Tensor]
    h: list[Tensor]

    @property
    def outputs(self) -> Tensor:
        return self.h[-1]


def forward(weights: Sequence[Tensor], x: Tensor, activation: str = "relu") -> Pass:
    """Features before and after the activation; x (B, n_0), or (T, B, n_0) with a batch of each trial's own."""
    phi = ACTIVATIONS[activation][0]
    inputs, h = [x], [_times(x, weights[0])]
    for W in weights[1:]:
        inputs.append(phi(h[-1]))
        h.append(inputs[-1] @ W.mT)
    return Pass(inputs, h)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """(T, B, n_L) -> (T,): the mean over the batch; targets (B, 1) or (T, B, 1) floats, or labels (B,), (T, B)."""
    if targets.is_floating_point():
        return (outputs - targets).square().sum(-1).mean(-1) / 2
    return -_chosen(outputs.log_softmax(-1), targets).mean(-1)


def _chosen(values: Tensor, labels: Tensor) -> Tensor:
    """(T, B, c) at (B,) or (T, B) -> (T, B)"""
    return values.gather(-1, labels.expand(values.shape[:-1]).unsqueeze(-1)).squeeze(-1)


class Backward(NamedTuple):
    """grads: (T, m, n) per layer, of the mean loss; g: (T, B, m) per layer, of each input's own loss by h_l."""

    grads: list[Tensor]
    g: list[Tensor]


def backward(weights: Sequence[Tensor], passed: Pass, targets: Tensor, activation: str = "relu") -> Backward:
    """grad W_l = (1/B) sum_i g_l(x_i) h'_{l-1}(x_i)',   g_{l-1} = phi'(h_{l-1}) * W_l' g_l."""
    slope = ACTIVATIONS[activation][1]
    outputs = passed.outputs
    if targets.is_floating_point():
        last = outputs - targets
    else:
        last = outputs.softmax(-1) - F.one_hot(targets, outputs.shape[-1]).to(outputs.dtype)
    g = [last]
    for layer in range(len(weights) - 1, 0, -1):
        g.append(g[-1] @ weights[layer] * slope(passed.h[layer - 1], passed.inputs[layer]))
    g.reverse()
    batch = outputs.shape[-2]
    return Backward([_grad(g_l, h, batch) for g_l, h in zip(g, passed.inputs, strict=True)], g)


def _times(x: Tensor, W: Tensor) -> Tensor:
    """x W': inputs that all trials share (B, n) are multiplied by all of their weights at once."""
    if x.ndim > 2:
        return x @ W.mT
    trials, m, n = W.shape
    return (x @ W.reshape(trials * m, n).mT).unflatten(-1, (trials, m)).transpose(0, 1)  # (T, B, m)


def _grad(g: Tensor, x: Tensor, batch: int) -> Tensor:
    if x.ndim > 2:
        return g.mT @ x / batch
    trials, _, m = g.shape
    return (g.mT.reshape(trials * m, batch) @ x).unflatten(0, (trials, m)) / batch


# -- inputs that span few directions


class Span(NamedTuple):
    """inputs (B, n_0) = coordinates (B, r) @ basis (r, n_0), the rows of basis orthonormal."""

    coordinates: Tensor
    basis: Tensor


def span(inputs: Tensor) -> Span:
    """Coordinates of B < n_0 inputs in an orthonormal basis of their span.

    Every gradient of W_1 lies in that span: descent on W_1 basis' (n, r) is descent on W_1 (n, n_0), and the rest of
    W_1 neither moves nor reaches a feature. So it is for rules that only scale or orthogonalize a gradient, not for
    entrywise ones. [derived]
    """
    basis, R = torch.linalg.qr(inputs.double().mT)  # (n_0, r), (r, B)
    return Span(R.mT.to(inputs.dtype).contiguous(), basis.mT.to(inputs.dtype).contiguous())
