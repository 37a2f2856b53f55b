"""Start blocks from a counter-based generator: element i of a draw is a function of (seed, shape, step, i) alone.

The 64-bit mixer is splitmix64's finalizer (Steele, Lea, Flood 2014); two 32-bit uniforms of one word give two normals
(Box and Muller 1958). Every backend uses the same words; normals agree to rounding. The draw depends on neither
position nor neighbours, and is the same on every rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _C1, _C2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * _C1 & _MASK
    z = (z ^ (z >> 27)) * _C2 & _MASK
    return z ^ (z >> 31)


def key(seed: int, m: int, n: int, step: int) -> int:
    """The 64-bit key of a draw; m >= n or not, (m, n) and (n, m) are one shape."""
    z = mix((seed * _GOLDEN + 1) & _MASK)
    z = mix(z ^ max(m, n))
    z = mix((z + min(m, n) * _GOLDEN) & _MASK)
    return mix((z + step) & _MASK)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def normals(draw: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) float64 standard normals of the draw with this key."""
    pair = torch.arange((count + 1) // 2, dtype=torch.int64, device=device)
    z = pair * _signed(_GOLDEN) + _signed(draw)  # int64 arithmetic wraps, as the mixer wants
    z = (z ^ _shift(z, 30)) * _signed(_C1)
    z = (z ^ _shift(z, 27)) * _signed(_C2)
    z = z ^ _shift(z, 31)
    radius = (-2 * ((_shift(z, 32).double() + 0.5) * 2.0**-32).log()).sqrt()
    angle = ((z & 0xFFFFFFFF).double() + 0.5) * (2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1).flatten()[:count]
