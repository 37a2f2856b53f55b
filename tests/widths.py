"""Models of any width, and the size of a weight or an update that Condition 1 keeps fixed, from dense spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def mlp(n: int) -> nn.Module:
    return nn.Sequential(nn.Linear(32, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10))


class Convolutional(nn.Module):
    """Plain, depthwise, and grouped transposed convolutions."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, n, 3, padding=1)
        self.norm = nn.GroupNorm(1, n)
        self.depthwise = nn.Conv2d(n, n, 3, padding=1, groups=n)
        self.body = nn.Conv2d(n, n, 3, padding=1)
        self.up = nn.ConvTranspose2d(n, n, 2, stride=2, groups=4)
        self.head = nn.Linear(n, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu())
        return self.head(self.up(self.body(x).relu()).relu().mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, n)
        self.norm = nn.LayerNorm(n)
        self.attention = nn.MultiheadAttention(n, 4, batch_first=True)
        self.up, self.down = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.head = nn.Linear(n, 40, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head(x + self.down(self.up(x).relu())).mean(1)


# name: (model of a width, widths, one batch)
MODELS: dict[str, tuple[Callable[[int], nn.Module], Sequence[int], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (mlp, (128, 256, 512), lambda: (torch.randn(32, 32), torch.randint(10, (32,)))),
    "conv": (Convolutional, (64, 128, 256), lambda: (torch.randn(8, 3, 6, 6), torch.randint(10, (8,)))),
    "transformer": (Transformer, (128, 256, 512), lambda: (torch.randint(40, (8, 12)), torch.randint(40, (8,)))),
}


def slices(module: nn.Module, leaf: str, weight: Tensor) -> Tensor:
    """(..., fan_out, fan_in): the matrices of a weight of a Linear, a convolution or an attention."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:])  # (g, out/g, in/g, h, w), transposed: in, out
        return grouped.movedim((3, 4), (0, 1)) if isinstance(module, nn.Conv2d) else grouped.permute(3, 4, 0, 2, 1)
    return weight.reshape(3, -1, weight.shape[1]) if leaf == "in_proj_weight" else weight


def size(model: nn.Module, name: str, change: Tensor) -> float:
    """What is Θ(1) under Condition 1 for an update: sqrt(n / m) ||.||_2, times positions for slices; else an RMS."""
    path, _, leaf = name.rpartition(".")
    module, change = model.get_submodule(path), change.double()
    if leaf.endswith("bias") or isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return float(change.square().mean().sqrt())
    if isinstance(module, nn.Embedding):
        return float(change.square().mean(1).sqrt().max())
    A = slices(module, leaf, change)
    positions = A.shape[0] * A.shape[1] if A.ndim == 5 else 1
    gram = A @ A.mT if A.shape[-2] < A.shape[-1] else A.mT @ A
    norm = math.sqrt(float(torch.linalg.eigvalsh(gram).max()))
    return norm * positions * math.sqrt(A.shape[-1] / A.shape[-2])


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Exponent p of the least-squares fit values ~ widths^p."""
    x, y = (torch.tensor(list(v), dtype=torch.float64).log() for v in (widths, values))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())
