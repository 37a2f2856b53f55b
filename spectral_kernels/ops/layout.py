"""How a parameter is seen as matrices: views, never copies, in the order in which every part of a step walks them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import scaling

KINDS = ("matrix", "vector", "gain", "embedding", "conv", "skip")


@dataclass(frozen=True)
class Layout:
    """What a parameter is.

    kind: "matrix" (..., fan_out, fan_in), leading dimensions a stack; "conv" (out, in / groups, *kernel), a matrix per
    kernel position and group; "vector" (m,), an m x 1 matrix; "gain" (m,), a diagonal matrix; "embedding" (vocabulary,
    d). transposed: stored (fan_in, fan_out), or (in, out / groups, *kernel). num_heads, split_sizes: a matrix treated
    as that many blocks of rows, equal or of these sizes.
    """

    kind: str = "matrix"
    transposed: bool = False
    groups: int = 1
    num_heads: int | None = None
    split_sizes: tuple[int, ...] | None = None
    flat: bool = False  # a matrix (shape[0], all the rest)

    def check(self, shape: Sequence[int], name: str = "parameter") -> None:
        """Raise ValueError where a parameter of this shape cannot be seen so."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, not {self.kind!r}")
        if len(shape) < {"matrix": 2, "conv": 3, "embedding": 2}.get(self.kind, 0):
            raise ValueError(f"{name} of shape {tuple(shape)} cannot be of kind {self.kind!r}")
        if self.num_heads is not None and self.split_sizes is not None:
            raise ValueError(f"{name}: num_heads and split_sizes exclude each other")
        rows = shape[0 if self.flat else -1 if self.transposed else -2] if self.kind == "matrix" else math.prod(shape)
        fits = self.kind == "matrix" or (self.kind == "vector" and self.num_heads is None and len(shape) == 1)
        if (self.num_heads is not None or self.split_sizes is not None) and not fits:
            raise ValueError(f"{name}: num_heads and split_sizes are for matrices, not for kind {self.kind!r}")
        if self.num_heads is not None and (self.num_heads < 1 or rows % self.num_heads):
            raise ValueError(f"{name}: {rows} rows do not divide into num_heads={self.num_heads} blocks")
        if self.split_sizes is not None and (sum(self.split_sizes) != rows or min(self.split_sizes) < 1):
            raise ValueError(f"{name}: split_sizes {tuple(self.split_sizes)} must be positive and sum to {rows} rows")
        if self.kind == "conv" and (self.groups < 1 or shape[0] % self.groups):
            raise ValueError(f"{name}: {shape[0]} channels do not divide into groups={self.groups}")

    def stacks(self, W: Tensor) -> list[Tensor]:
        """Views (k, fan_out, fan_in) of a weight or its gradient; RuntimeError where its strides allow none."""
        if self.kind in ("vector", "gain"):
            whole = W.view(1, 1, 1) if W.ndim == 0 else W[None, None] if W.ndim == 1 else W.view(1, -1, W.shape[-1])
            return [whole] if self.split_sizes is None else list(whole.split(list(self.split_sizes), -1))
        if self.kind == "embedding":
            return [W.view(1, -1, W.shape[-1])]
        if self.kind == "conv":
            flat = W.view(*W.shape[:2], math.prod(W.shape[2:]))
            out = flat.unflatten(0, (self.groups, -1))  # (g, out/g, in/g, K), or (g, in/g, out/g, K)
            four = out.permute(3, 0, 2, 1) if self.transposed else out.permute(3, 0, 1, 2)
            return _along_the_shorter(four)
        matrix = W.mT if self.transposed else W.view(W.shape[0], -1) if self.flat else W
        parts = [matrix] if self.split_sizes is None else matrix.split(list(self.split_sizes), -2)
        if self.num_heads is not None:
            return [x for part in parts for x in _stack(part.unflatten(-2, (self.num_heads, -1)))]
        return [x for part in parts for x in _stack(part)]

    def dense(self, W: Tensor) -> Tensor:
        """W, or a contiguous copy where `stacks` of its strides would not be those of a contiguous weight."""
        if W.is_contiguous():
            return W
        try:
            found = [tuple(s.shape) for s in self.stacks(W)]
        except RuntimeError:
            return W.contiguous()
        return W if found == self.sides(W.shape) else W.contiguous()

    def buffer(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the momentum of a weight: its shape, or contiguous per slice (K g, out / g, in / g) of a kernel."""
        if self.kind != "conv":
            return torch.zeros_like(self.dense(W), dtype=dtype, memory_format=torch.preserve_format)
        return W.new_zeros(self.buffer_shape(W.shape), dtype=dtype)

    def buffer_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if self.kind != "conv":
            return tuple(shape)
        first, second = shape[0] // self.groups, shape[1]
        sides = (second, first) if self.transposed else (first, second)
        return (math.prod(shape[2:]) * self.groups, *sides)

    def check_buffer(self, M: Tensor, shape: Sequence[int]) -> None:
        """Raise ValueError where this momentum is that of another layout."""
        if tuple(M.shape) != self.buffer_shape(shape):
            raise ValueError(
                f"the momentum_buffer of a parameter of shape {tuple(shape)} has shape {tuple(M.shape)}, its layout "
                f"needs {self.buffer_shape(shape)}: what a parameter is cannot change once it has a state"
            )

    def buffer_dense(self, M: Tensor) -> Tensor:
        """`dense` of a momentum buffer."""
        return M if self.kind == "conv" else self.dense(M)

    def buffer_stacks(self, M: Tensor) -> list[Tensor]:
        """Views of a momentum buffer, in the order of `stacks`."""
        if self.kind != "conv":
            return self.stacks(M)
        return _along_the_shorter(M.unflatten(0, (-1, self.groups)))

    def sides(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """(k, fan_out, fan_in) of every stack."""
        return list(_sides(self, tuple(shape)))

    def factors(self, shape: Sequence[int], rule: str | float) -> list[float]:
        """What the update of every stack is multiplied with: the rule of its shape; facts in docs/param_groups.md."""
        if self.kind == "gain":
            return [0.2 if rule == "match_rms_adamw" else 1.0 if isinstance(rule, str) else float(rule)]
        if self.kind == "vector":
            return [scaling.target(rule, max(1, rows), 1) for rows in self.split_sizes or (math.prod(shape),)]
        if self.kind == "embedding":
            return [scaling.target(rule, max(1, shape[-1]), 1)]
        positions = math.prod(shape[2:]) if self.kind == "conv" else 1
        return [scaling.target(rule, max(1, m), max(1, n)) / max(1, positions) for _, m, n in self.sides(shape)]


def kind_of(shape: Sequence[int]) -> str:
    """What a bare parameter is taken for: 0-D, 1-D vector; 2-D matrix; 3-D stack of matrices; 4-D, 5-D convolution."""
    kinds = ("vector", "vector", "matrix", "matrix", "conv", "conv")
    if len(shape) >= len(kinds):
        raise ValueError(f"a parameter of shape {tuple(shape)} has no kind by shape: say which of {', '.join(KINDS)}")
    return kinds[len(shape)]


@lru_cache(maxsize=4096)
def _sides(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    views = layout.stacks(torch.empty(shape, device="meta"))
    return tuple((s.shape[0], s.shape[1], s.shape[2]) for s in views)


def _along_the_shorter(four: Tensor) -> list[Tensor]:
    """(K, g, m, n) as a list of stacks, few of them."""
    return list(four.unbind(0) if four.shape[0] < four.shape[1] else four.unbind(1))


def _stack(W: Tensor) -> list[Tensor]:
    if W.ndim == 2:
        return [W[None]]
    if W.ndim == 3:
        return [W]
    try:
        return [W.view(-1, *W.shape[-2:])]
    except RuntimeError:  # leading dimensions that are no single one in memory
        return [x for part in W.unbind(0) for x in _stack(part)]
