"""What an optimizer keeps of a parameter from step to step, and what all parameters of a call share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.composites import start_block
from ..kernels.contracts import acc_dtype
from .estimate import oriented, tracked
from .layout import Layout
from .newton_schulz import Recipe

COLD_STEPS = 3  # the first steps of a parameter read as often as a cold estimate needs
THRESHOLD_BLOCK = 32  # columns where a threshold does not say how many values exceed it


@dataclass(frozen=True)
class Options:
    """What all parameters of a call share."""

    momentum: float = 0.95
    nesterov: bool = False
    direction: str = "normalize"
    maximize: bool = False
    propagate: bool = False
    upper: bool = False
    block: int | None = None  # columns; None: what the direction asks for
    seed: int = 0
    rank: int | None = None  # clip at this singular value
    threshold: float | None = None  # or at this number
    recipe: Recipe | None = None  # of an orthogonalization
    ema: bool = False  # momentum M + (1 - momentum) G

    @property
    def alpha(self) -> float:
        gain = 1.0 - self.momentum if self.ema else 1.0
        return -gain if self.maximize else gain

    def columns(self, M: Sequence[Tensor]) -> int:
        """Width of the block of a parameter with these stacks."""
        if self.direction != "clip":
            return 4 if self.block is None else self.block
        s = THRESHOLD_BLOCK if self.rank is None else self.rank
        wanted = self.block or (s if self.rank is None else max(4, s + min(s, 16)))
        return max(1, min(wanted, max(min(m.shape[1:]) for m in M)))

    def fresh(self, b: int, short: int) -> int:
        """Columns drawn anew after a read; none where the block holds every direction, none of those to be clipped."""
        if self.direction != "clip":
            return max(1, b // 4)
        return 0 if b >= short else min(1 if b <= 4 else 2, b - (self.rank or 0))


def direction_of(direction: str, rank: int | None) -> str:
    """The direction as it is computed: clipping at the first singular value is dividing by it."""
    return "normalize" if direction == "clip" and rank == 1 else direction


def is_tracked(layout: Layout, stacks: Sequence[Tensor], direction: str) -> bool:
    """Does a block follow this parameter? Not where another norm is asked for or is the spectral norm itself."""
    if layout.kind not in ("matrix", "conv") or direction not in ("normalize", "clip"):
        return False
    return any(min(s.shape[1:]) > (direction == "normalize") for s in stacks)


def is_orthogonalized(layout: Layout, direction: str) -> bool:
    return direction == "orthogonalize" and layout.kind in ("matrix", "conv")


def prepare(param: Tensor, state: dict[str, Any], layout: Layout, options: Options, dtype: torch.dtype | None) -> None:
    """Fill in what is missing of a parameter's state: step, momentum_buffer, tracker and, where followed, block.

    A block that does not fit the matrices, of another width above all, is started anew, with a warning.
    """
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = layout.buffer(param, dtype or param.dtype)
    layout.check_buffer(state["momentum_buffer"], param.shape)
    M = layout.buffer_stacks(layout.buffer_dense(state["momentum_buffer"]))
    N = sum(m.shape[0] for m in M)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    # per matrix: the power of two it was read at (0: never), random blocks drawn so far; clip: what the block missed
    followed = is_tracked(layout, M, options.direction)
    width = 4 if followed and options.direction == "clip" else 2
    tracker = state.get("tracker")
    if tracker is None or tuple(tracker.shape) != (N, width):
        state["tracker"] = torch.zeros((N, width), dtype=torch.float64, device=param.device)
        if tracker is not None and tracker.shape[0] == N:
            state["tracker"][:, :2] = tracker[:, :2]
    if not followed:
        return
    block, shape = state.get("block"), block_shape(M, options.columns(M))
    if block is not None and tuple(block.shape) == shape:
        return
    if block is not None:
        warnings.warn(
            f"the block of a parameter of shape {tuple(param.shape)} is {tuple(block.shape)}, now it must be {shape}: "
            "it is started anew",
            UserWarning,
            stacklevel=3,
        )
    state["block"] = start(M, options)
    state["tracker"][:, 0] = 0  # a first read, of a momentum that is there already too
    state["tracker"][:, 2:] = 0


def start(M: Sequence[Tensor], options: Options) -> Tensor:
    """Random blocks of all matrices of a parameter: (k, b, n), or flat where the tracked sides n differ."""
    parts, b = [], options.columns(M)
    for m in map(oriented, M):
        k, rows, n = m.shape
        one = start_block(rows, n, b, options.seed, acc_dtype(m.dtype), m.device)
        parts.append(one.expand(k, -1, -1))
    return torch.cat([p.reshape(-1) for p in parts]).view(block_shape(M, b))


def block_shape(M: Sequence[Tensor], b: int) -> tuple[int, ...]:
    """The shape that `start` gives the blocks of a parameter with these momentum stacks."""
    sides = [(m.shape[0], tracked(m)) for m in M]
    if len({n for _, n in sides}) == 1:
        return (sum(k for k, _ in sides), b, sides[0][1])
    return (sum(k * b * n for k, n in sides),)


def is_cold(state: dict[str, Any]) -> bool:
    """No block to trust yet. Where the tracker lies on the host it is asked too: gradients may come late."""
    if float(state["step"]) < COLD_STEPS:
        return True
    tracker = state["tracker"]
    return tracker.device.type == "cpu" and bool((tracker[:, 0] == 0).any())
