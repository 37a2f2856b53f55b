"""Small real training runs, on which optimizers are tested and measured: the same models, batches and loop for all.

    run = task("transformer", width=128, seed=0)
    losses = train(run, torch.optim.AdamW(run.model.parameters(), 3e-3), 150)

Everything follows from (name, width, seed, batch): weights, the batch of each step, the injected spikes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import training_data as data

CONTEXT = 64  # characters the transformer sees
WINDOWS = 128  # of the validation text, evenly spaced
Batch = tuple[Tensor, Tensor]


# -- models


class Block(nn.Module):
    """Pre-norm attention and MLP: x + out(attention(norm x)), then x + down(gelu(up(norm x)))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (b, heads, t, d / heads)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters (b, t) -> logits (b, t, 96): learned positions, `layers` blocks of four matrices, untied readout."""

    def __init__(self, width: int, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: {width} is not a multiple of {heads} heads")
        self.characters = nn.Embedding(len(data.VOCABULARY), width)
        self.positions = nn.Embedding(CONTEXT, width)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # GPT-2's
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, len(data.VOCABULARY), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.characters(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x))


def mlp(width: int, layers: int = 3) -> nn.Sequential:
    """Images (b, 8, 8) -> logits (b, 10) by `layers` matrices with biases, all but the first and last width x width."""
    sides = [64, *[width] * (layers - 1), 10]
    parts: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip(sides, sides[1:], strict=False):
        parts += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def convnet(width: int, norm: str = "batch") -> nn.Sequential:
    """Images (b, 8, 8) -> logits (b, 10): three 3 x 3 convolutions, each with its norm, and a readout."""
    if norm not in ("batch", "group"):
        raise ValueError(f"norm: {norm!r} is neither 'batch' nor 'group'")
    parts: list[nn.Module] = [nn.Unflatten(1, (1, 8))]
    for fan_in, fan_out, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
        gains = nn.BatchNorm2d(fan_out) if norm == "batch" else nn.GroupNorm(min(4, fan_out), fan_out)
        parts += [nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), gains, nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def kinds(model: nn.Module) -> dict[str, str]:
    """Name of every parameter -> what it is: "matrix", "conv", "embedding", "gain" or "vector", from its module."""
    from ..optim.modules import named_roles

    return {entry.name: entry.role.kind for entry in named_roles(model)}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups, one per kind, as `sk.optim.SpectralOptimizer` takes them; other optimizers ignore `kind`."""
    made: dict[str, list[Tensor]] = {}
    named = dict(model.named_parameters())
    for name, kind in kinds(model).items():
        if name in named:  # a tied parameter counts once
            made.setdefault(kind, []).append(named[name])
    return [{"params": parameters, "kind": kind} for kind, parameters in made.items()]


# -- tasks


class Task:
    """A model with its data: `loss(step)` on the batch of (seed, step), `evaluate()` on a fixed validation set."""

    def __init__(self, name: str, model: nn.Module, batch: Callable[[int], Batch], validation: Batch) -> None:
        self.name, self.model = name, model
        self.batch, self.validation = batch, validation

    def loss(self, step: int) -> Tensor:
        """() mean cross-entropy in nats of the step's batch, ready for backward."""
        x, y = self.batch(step)
        return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy of the validation set, the model in eval mode meanwhile."""
        training = self.model.training
        self.model.eval()
        try:
            x, y = self.validation
            total = 0.0
            for a, b in zip(x.split(32), y.split(32), strict=True):
                total += float(F.cross_entropy(self.model(a).flatten(0, -2), b.flatten(), reduction="sum"))
        finally:
            self.model.train(training)
        return total / y.numel()

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Names and weights of the matrices and convolutions; embeddings are none."""
        named = dict(self.model.named_parameters())
        return ((name, named[name]) for name, kind in kinds(self.model).items() if kind in ("matrix", "conv"))


def drawn(seed: int, step: int, most: int, count: int) -> Tensor:
    """`count` numbers in [0, most), on the CPU whatever the device, so that all devices see the same batch."""
    return torch.randint(most, (count,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))


def text_batches(seed: int, batch: int, device: torch.device) -> tuple[Callable[[int], Batch], Batch]:
    split = data.characters()
    train, held = (part[0].to(device) for part in split)
    along = torch.arange(CONTEXT + 1, device=device)

    def windows(text: Tensor, starts: Tensor) -> Batch:
        found = text[starts.to(device)[:, None] + along]  # (b, t + 1)
        return found[:, :-1], found[:, 1:]

    fixed = torch.linspace(0, len(held) - CONTEXT - 1, WINDOWS).long()
    return lambda step: windows(train, drawn(seed, step, len(train) - CONTEXT, batch)), windows(held, fixed)


def digit_batches(seed: int, batch: int, device: torch.device) -> tuple[Callable[[int], Batch], Batch]:
    split = data.digits()
    images, labels = (part.to(device) for part in split.train)

    def pick(step: int) -> Batch:
        chosen = drawn(seed, step, len(labels), batch).to(device)
        return images[chosen], labels[chosen]

    held = [part.to(device) for part in split.validation]
    return pick, (held[0], held[1])


TASKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any], int]] = {  # model, data, batch
    "transformer": (Transformer, text_batches, 16),
    "mlp": (mlp, digit_batches, 64),
    "convnet": (convnet, digit_batches, 64),
}


def task(
    name: str, *, width: int, seed: int = 0, batch: int | None = None, device: torch.device | str = "cpu", **model: Any
) -> Task:
    """The task `name` ("transformer", "mlp" or "convnet") at a width; `model`: layers, heads or norm of the model.

    Weights are torch's default ones for the seed (embeddings: std 0.02), drawn on the CPU; the process's own random
    state stays as it was. Digits need scikit-learn.
    """
    if name not in TASKS:
        raise ValueError(f"task: {name!r} is not one of {', '.join(TASKS)}")
    build, batches, usual = TASKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(width, **model)
    made, validation = batches(seed, usual if batch is None else batch, torch.device(device))
    return Task(name, net.to(device), made, validation)


# -- the loop


class Stepper(Protocol):
    """What the loop asks of an optimizer."""

    def zero_grad(self) -> None: ...

    def step(self) -> Any: ...


class Spikes(NamedTuple):
    """Every `every`-th step a rank-one term of `size` times the gradient's Frobenius norm joins each gradient."""

    every: int
    size: float

    def hits(self, step: int) -> bool:
        return step % self.every == self.every - 1


@torch.no_grad()
def spike_(model: nn.Module, size: float, seed: int, step: int) -> nn.Module:
    """G <- G + size ||G||_F u v' in every gradient of two or more dimensions; u, v random unit vectors.

    G is taken as (rows, rest): each kernel position of a convolution gets a rank-one term with the same u.
    """
    for index, parameter in enumerate(model.parameters()):
        if parameter.grad is None or parameter.ndim < 2:
            continue
        G = parameter.grad
        generator = torch.Generator().manual_seed(1_000_003 * (1_000_003 * seed + step) + index)
        u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (G.shape[0], G[0].numel()))
        rank_one = torch.outer(u / u.norm(), v / v.norm()).view(G.shape).to(G)
        G.add_(rank_one * (size * torch.linalg.vector_norm(G)))
    return model


def train(
    run: Task,
    optimizer: Stepper,
    steps: int,
    *,
    first: int = 0,
    on_step: Callable[[int], Any] | None = None,
    spikes: Spikes | None = None,
    seed: int = 0,
) -> list[float]:
    """The training losses of steps first, first + 1, ..., each taken before its update; one host synchronization.

    on_step(step) is called after the update, the gradients still there. seed: of the spikes' directions.
    """
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = run.loss(step)
        loss.backward()
        losses.append(loss.detach())
        if spikes is not None and spikes.hits(step):
            spike_(run.model, spikes.size, seed, step)
        optimizer.step()
        if on_step is not None:
            on_step(step)
    return torch.stack(losses).tolist() if losses else []
