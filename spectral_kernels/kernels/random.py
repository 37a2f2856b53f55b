"""Start blocks from a counter-based generator: element i of a draw is a function of (seed, shape, step, i) alone.

The 64-bit mixer is splitmix64's finalizer (Steele, Lea, Flood 2014); two 32-bit uniforms of one word give two normals
(Box and Muller 1958). Every backend uses the same words; normals agree to rounding. The draw depends on neither
position nor neighbours, and is the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _C1, _C2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * _C1 & _MASK
    z = (z ^ (z >> 27)) * _C2 & _MASK
    return z ^ (z >> 31)


def base(seed: int, m: int, n: int) -> int:
    """The step's key less the step; m >= n or not, (m, n) and (n, m) are one shape."""
    z = mix((seed * _GOLDEN + 1) & _MASK)
    z = mix(z ^ max(m, n))
    return mix((z + min(m, n) * _GOLDEN) & _MASK)


def key(seed: int, m: int, n: int, step: int) -> int:
    """The 64-bit key of a draw."""
    return mix((base(seed, m, n) + step) & _MASK)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def normals(draw: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) float64 standard normals of the draw with this key."""
    pair = torch.arange((count + 1) // 2, dtype=torch.int64, device=device)
    return _normals(pair, torch.full((1,), _signed(draw), dtype=torch.int64, device=device))[0, :count]


def draws(bases: Sequence[int], steps: Tensor, count: int) -> Tensor:
    """(k, count) float64 standard normals: row j of the draw with `base` bases[j] and step steps[j] (int64, device)."""
    runs = [(z, len(list(same))) for z, same in groupby(bases)]  # filled on the device: nothing comes from the host
    start = torch.cat([torch.full((size,), _signed(z), dtype=torch.int64, device=steps.device) for z, size in runs])
    pair = torch.arange((count + 1) // 2, dtype=torch.int64, device=steps.device)
    return _normals(pair, _mix(start + steps))[:, :count]


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_C1)
    z = (z ^ _shift(z, 27)) * _signed(_C2)
    return z ^ _shift(z, 31)


def _normals(pair: Tensor, keys: Tensor) -> Tensor:
    """(k, 2 pairs) from the pair numbers and the keys (k,); int64 arithmetic wraps, as the mixer wants."""
    z = _mix(pair[None] * _signed(_GOLDEN) + keys[:, None])
    radius = (-2 * ((_shift(z, 32).double() + 0.5) * 2.0**-32).log()).sqrt()
    angle = ((z & 0xFFFFFFFF).double() + 0.5) * (2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 2).flatten(1)
