"""Families of test matrices whose largest singular value is known to float64 rounding.

Two kinds: a prescribed spectrum between random orthogonal factors (products of Householder reflectors, so cheap at any
size), and random entries, whose norm is the square root of the largest float64 eigenvalue of the smaller Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

REFLECTORS = 4  # spectral methods with Gaussian starts do not see the factors; four make every entry dense


class Case(NamedTuple):
    """A (m, n) float64 and its largest singular value."""

    A: Tensor
    sigma: float


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reflect_(A: Tensor, g: torch.Generator) -> Tensor:
    """A <- H_1 ... H_r A with random Householder reflectors: an orthogonal factor for O(r m n)."""
    for _ in range(REFLECTORS):
        h = torch.randn(A.shape[0], generator=g, dtype=A.dtype)
        h /= h.norm()
        A -= 2 * torch.outer(h, h @ A)
    return A


def with_spectrum(s: Tensor, m: int, n: int, g: torch.Generator) -> Case:
    """U diag(s) Vᵀ of size (m, n) for s (min(m, n),), in any order."""
    A = torch.zeros(m, n, dtype=torch.float64)
    A.diagonal().copy_(s)
    reflect_(A, g)
    reflect_(A.mT, g)
    return Case(A, float(s.max()) if s.numel() else 0.0)


def with_entries(A: Tensor) -> Case:
    """A as it is, its norm from the smaller Gram matrix in float64."""
    if A.numel() == 0:
        return Case(A, 0.0)
    gram = A @ A.mT if A.shape[0] <= A.shape[1] else A.mT @ A
    return Case(A, float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()))


def _index(p: int) -> Tensor:
    return torch.arange(p, dtype=torch.float64)


def _randn(m: int, n: int, g: torch.Generator) -> Tensor:
    return torch.randn(m, n, generator=g, dtype=torch.float64)


def _repeated(p: int, g: torch.Generator) -> Tensor:
    s = 1 - 0.5 * _index(p) / max(p, 1)
    s[:6] = 1
    return s


def _near_tie(p: int, g: torch.Generator) -> Tensor:
    s = 0.9 - 0.4 * _index(p) / max(p, 1)
    s[0], s[1:2] = 1, 1 - 1e-5
    return s


def _two_valued(p: int, g: torch.Generator) -> Tensor:
    return torch.where(_index(p) < p / 2, 1.0, 0.98).double()


def _few_valued(p: int, g: torch.Generator) -> Tensor:
    return 1 - 0.15 * torch.div(_index(p) * 6, max(p, 1), rounding_mode="floor")


def _spike(p: int, g: torch.Generator) -> Tensor:
    s = 0.97 * (1 - 0.7 * _index(p) / max(p, 1))
    s[0] = 1
    return s


def _close_second(p: int, g: torch.Generator) -> Tensor:
    """Fast decay behind a close second value: where an unlucky start settles on sigma_2 (docs/accuracy.md)."""
    s = 0.985 * 0.85 ** (_index(p) - 1)
    s[:1] = 1
    return s


def _low_rank(rank: int) -> Callable[[int, int, torch.Generator], Case]:
    def make(m: int, n: int, g: torch.Generator) -> Case:
        signal = _randn(m, rank, g) @ _randn(rank, n, g)
        return with_entries(signal / rank**0.5 + 0.5 * max(m, n) ** 0.5 / rank**0.5 * _randn(m, n, g) / 2)

    return make


def _heavy_tailed(m: int, n: int, g: torch.Generator) -> Case:
    chi = sum(_randn(m, n, g).square() for _ in range(3))
    return with_entries(_randn(m, n, g) / torch.sqrt(torch.as_tensor(chi / 3)))  # Student t, three degrees of freedom


def _sparse(m: int, n: int, g: torch.Generator) -> Case:
    kept = torch.rand(m, n, generator=g, dtype=torch.float64) < 0.05
    return with_entries(_randn(m, n, g) * kept)


def _graded(m: int, n: int, g: torch.Generator) -> Case:
    return with_entries(_randn(m, n, g) * torch.logspace(0, -4, m, dtype=torch.float64)[:, None])


def _trained(p: int, g: torch.Generator) -> Tensor:
    noise = 1 + 0.05 * torch.rand(p, generator=g, dtype=torch.float64)
    return (_index(p) + 2) ** -0.6 * noise


def _spectrum(make: Callable[[int, torch.Generator], Tensor]) -> Callable[[int, int, torch.Generator], Case]:
    return lambda m, n, g: with_spectrum(make(min(m, n), g), m, n, g)


# name -> (shape of a member as multiples of the size, maker)
FAMILIES: dict[str, tuple[tuple[float, float], Callable[[int, int, torch.Generator], Case]]] = {
    "flat": ((1, 1), lambda m, n, g: with_entries(_randn(m, n, g))),
    "tall": ((4, 1), lambda m, n, g: with_entries(_randn(m, n, g))),
    "wide": ((1, 4), lambda m, n, g: with_entries(_randn(m, n, g))),
    "clustered": ((1.25, 1), _spectrum(lambda p, g: (1 - 1e-3 * _index(p)).clamp(min=0))),
    "linear": ((1.25, 1), _spectrum(lambda p, g: 1 - _index(p) / max(p, 1))),
    "decaying": ((1, 1.25), _spectrum(lambda p, g: 1 / (1 + _index(p)))),
    "geometric": ((1, 1), _spectrum(lambda p, g: 0.97 ** _index(p))),
    "rank 8 + noise": ((1, 1), _low_rank(8)),
    "rank 1 + noise": ((1, 1.5), _low_rank(1)),
    "orthogonal": ((1.25, 1), _spectrum(lambda p, g: torch.ones(p, dtype=torch.float64))),
    "repeated top": ((1, 1.25), _spectrum(_repeated)),
    "two values": ((1, 1.25), _spectrum(_two_valued)),
    "seven values": ((1.25, 1), _spectrum(_few_valued)),
    "near tie": ((1.25, 1), _spectrum(_near_tie)),
    "close second": ((1, 1), _spectrum(_close_second)),
    "spike": ((1, 1), _spectrum(_spike)),
    "heavy tails": ((1.5, 1), _heavy_tailed),
    "sparse": ((1, 2), _sparse),
    "trained": ((3, 1), _spectrum(_trained)),
    "graded rows": ((1, 1), _graded),
}


def shape(name: str, size: int) -> tuple[int, int]:
    """(m, n) of the family's member whose shorter side is `size`."""
    (down, across), _ = FAMILIES[name]
    return int(down * size), int(across * size)


def make(name: str, size: int, seed: int, m: int | None = None, n: int | None = None) -> Case:
    """The member `seed` of a family: shorter side `size` in the family's own aspect ratio, or an (m, n) of your own."""
    rows, columns = shape(name, size)
    return FAMILIES[name][1](rows if m is None else m, columns if n is None else n, _generator(seed))
