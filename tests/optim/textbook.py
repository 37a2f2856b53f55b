"""Eq. 17 with exact singular values, which every step of SpectralOptimizer is compared with; data and models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def textbook_step_(W: Tensor, G: Tensor, M: Tensor, lr: float, momentum: float, kind: str, groups: int = 1) -> None:
    """M <- momentum M + G; W <- W - lr rule M / ||M|| for a matrix, a convolution, a vector, a gain or an embedding."""
    M.mul_(momentum).add_(G)
    if kind == "conv":  # a matrix (out / g, in / g) per kernel position and group
        X = M.reshape(groups, -1, *M.shape[1:]).movedim((3, 4), (0, 1))
        norm = torch.linalg.svdvals(X)[..., :1, None]
        step = math.sqrt(X.shape[-2] / X.shape[-1]) / (X.shape[0] * X.shape[1]) * X / norm
        W -= lr * step.movedim((0, 1), (3, 4)).reshape(W.shape)
    elif kind == "matrix":
        W -= lr * math.sqrt(M.shape[-2] / M.shape[-1]) * M / torch.linalg.svdvals(M)[..., :1, None]
    elif kind == "vector":
        W -= lr * math.sqrt(M.numel()) * M / M.norm()
    elif kind == "gain":
        W -= lr * M / M.abs().max()
    elif kind == "embedding":
        W -= lr * math.sqrt(M.shape[-1]) * M / M.norm(dim=-1).max()


def batches(size: int = 64, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of digits, images (size, 8, 8) float32 and labels; made-up ones where scikit-learn is missing."""
    images, labels = _digits()
    draw = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(labels), generator=draw).split(size)[:-1]:
            yield images[index], labels[index]


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from spectral_kernels.bench.training_data import digits

        return digits().train  # type: ignore[return-value]
    except ImportError:
        draw = torch.Generator().manual_seed(5)
        labels = torch.randint(10, (1600,), generator=draw)
        means = torch.randn(10, 8, 8, generator=draw)
        return means[labels] + torch.randn(1600, 8, 8, generator=draw), labels


def mlp(width: int = 32, bias: bool = True) -> nn.Sequential:
    layers = [nn.Flatten(), nn.Linear(64, width, bias), nn.ReLU(), nn.Linear(width, width, bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10, bias))


def convolutional() -> nn.Sequential:
    """(batch, 8, 8) images to ten classes; a plain and a grouped convolution."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 16, 2, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int, data: Iterator, after: Callable | None = None):
    """Plain training; returns the losses."""
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model, next(data))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
        if after is not None:
            after()
    return losses


def snapshot(*things: object) -> list[object]:
    """Everything that a step may touch, as copies: parameters, optimizers' states and groups."""
    found: list[object] = []
    for thing in things:
        if isinstance(thing, torch.optim.Optimizer):
            state = thing.state_dict()["state"]
            found.append(
                {i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for i, s in state.items()}
            )
            found += [p.detach().clone() for group in thing.param_groups for p in group["params"]]
        else:
            found += [p.detach().clone() for p in thing.parameters()]  # type: ignore[attr-defined]
    return found


def same(a: object, b: object) -> bool:
    """Bit for bit, keys and dtypes included (NaN equals NaN)."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]
    return a == b
