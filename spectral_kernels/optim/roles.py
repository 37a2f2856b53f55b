"""What a parameter is to Condition 1: its kind, and which matrices (fan_out, fan_in) it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import scaling
from ..ops import arguments
from ..ops.layout import KINDS, kind_of

OPTIONS = ("kind", "transposed", "groups", "num_heads", "split_sizes")  # of a parameter group, see role_of
BY_SHAPE = "shape alone"


@dataclass(frozen=True)
class Role:
    """fan_out, fan_in: of one matrix: one slice of one group of a convolution, one block (the smallest) of a split.

    blocks: rows of every block of a split along fan_out, () where there is none.
    """

    kind: str
    fan_out: int
    fan_in: int
    positions: int = 1
    transposed: bool = False
    groups: int = 1
    num_heads: int | None = None
    blocks: tuple[int, ...] = ()
    why: str = BY_SHAPE

    def rate_factor(self, rule: str) -> float:
        """scaling.rate_factor of this parameter; heads share a gradient as the groups of a convolution do."""
        if self.kind == "skip":
            return 0.0
        sharing = self.groups * (self.num_heads or 1)
        return scaling.rate_factor(rule, self.kind, self.fan_out, self.fan_in, self.positions, sharing)

    def options(self) -> dict[str, Any]:
        """The group options of SpectralOptimizer that say the same."""
        out: dict[str, Any] = {"kind": self.kind}
        if self.transposed:
            out["transposed"] = True
        if self.groups != 1:
            out["groups"] = self.groups
        if self.num_heads is not None:
            out["num_heads"] = self.num_heads
        elif self.blocks and self.kind == "matrix":
            out["split_sizes"] = list(self.blocks)
        return out


def role_of(
    parameter: Tensor | Sequence[int],
    *,
    kind: str | None = None,
    transposed: bool = False,
    groups: int = 1,
    num_heads: int | None = None,
    split_sizes: Sequence[int] | None = None,
    why: str = BY_SHAPE,
) -> Role:
    """The role of a parameter (or a shape) under these options; kind=None: by shape.

    matrix: (..., fan_out, fan_in), a stack in front; conv: (out, in / groups, *kernel), one or more kernel dimensions;
    vector and gain: any shape, all entries together; embedding: (..., vocabulary, width).
    transposed: a matrix stored (..., fan_in, fan_out), a convolution stored (in, out / groups, *kernel).
    num_heads: that many equal blocks of rows (along fan_out); split_sizes: the rows of each block. Vectors take
    split_sizes too. Raises ValueError where an option does not fit the shape.
    """
    shape = tuple(parameter.shape if isinstance(parameter, Tensor) else parameter)
    if kind is None:
        kind = kind_of(shape)
    arguments.check_choice("kind", kind, KINDS)
    arguments.check_int("groups", groups, 1)
    least = {"matrix": 2, "conv": 3, "embedding": 2}.get(kind, 0)
    if len(shape) < least:
        raise ValueError(f"kind {kind!r} needs at least {least} dimensions, not shape {shape}")
    if groups != 1 and kind != "conv":
        raise ValueError(f"groups={groups} goes with kind 'conv', not {kind!r}")
    if transposed and kind not in ("matrix", "conv"):
        raise ValueError(f"transposed goes with kinds 'matrix' and 'conv', not {kind!r}")
    size = math.prod(shape)
    positions = 1
    if kind == "conv":
        fan_out, fan_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        if shape[0] % groups:
            raise ValueError(f"groups={groups} does not divide the {shape[0]} channels of shape {shape}")
        fan_out, fan_in = (fan_out, fan_in // groups) if transposed else (fan_out // groups, fan_in)
        positions = math.prod(shape[2:])
    elif kind == "matrix":
        fan_out, fan_in = shape[-2:] if not transposed else shape[:-3:-1]
    elif kind == "embedding":
        fan_out = shape[-1]
        fan_in = math.prod(shape[:-1])
    else:
        fan_out, fan_in = size, size if kind == "gain" else 1
    blocks = _blocks(kind, fan_out, num_heads, split_sizes)
    return Role(kind, min(blocks, default=fan_out), fan_in, positions, transposed, groups, num_heads, blocks, why)


def _blocks(kind: str, rows: int, num_heads: int | None, split_sizes: Sequence[int] | None) -> tuple[int, ...]:
    if num_heads is None and split_sizes is None:
        return ()
    if num_heads is not None and split_sizes is not None:
        raise ValueError("give num_heads or split_sizes, not both")
    if kind != "matrix" and (kind != "vector" or num_heads is not None):
        raise ValueError(f"num_heads and split_sizes go with kind 'matrix', not {kind!r}")
    if num_heads is not None:
        if rows % arguments.check_int("num_heads", num_heads, 1):
            raise ValueError(f"num_heads={num_heads} does not divide the {rows} rows")
        return (rows // num_heads,) * num_heads
    assert split_sizes is not None
    blocks = tuple(arguments.check_int("split_sizes", s, 1) for s in split_sizes)
    if sum(blocks) != rows:
        raise ValueError(f"split_sizes={list(blocks)} must add up to the {rows} rows")
    return blocks


def matrices(parameter: Tensor, role: Role) -> list[Tensor]:
    """Views (..., fan_out, fan_in) of a matrix or convolution, one per block; any strides, nothing is copied."""
    if role.kind == "matrix":
        stack = parameter.mT if role.transposed else parameter
        return list(stack.split(role.blocks, -2)) if role.blocks else [stack]
    if role.kind == "conv":
        grouped = parameter.unflatten(0, (role.groups, -1))  # (g, m, n, *kernel), transposed: (g, n, m, *kernel)
        kernel = range(3, grouped.ndim)
        return [grouped.permute(*kernel, 0, 2, 1) if role.transposed else grouped.permute(*kernel, 0, 1, 2)]
    raise ValueError(f"a parameter of kind {role.kind!r} holds no matrices")
