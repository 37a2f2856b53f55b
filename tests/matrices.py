"""Test matrices with a known largest singular value: the families of the honesty study, and edge shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_kernels.bench.families import FAMILIES, Case, make, reflect_, with_entries, with_spectrum

__all__ = ["EDGE_SHAPES", "FAMILIES", "Case", "cases", "exact", "make", "reflect_", "with_entries", "with_spectrum"]

EDGE_SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (2, 2), (2, 9), (3, 3), (4, 4), (5, 4), (4, 5), (6, 5)]


def cases(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Iterator[tuple[str, Tensor, float]]:
    """(family, A, sigma_max of these bits) for one member of every family."""
    for name in FAMILIES:
        case = make(name, size, seed)
        A = case.A.to(dtype)
        yield name, A, case.sigma if dtype == torch.float64 else exact(A)


def exact(A: Tensor) -> float:
    """sigma_max of these bits, from a float64 SVD at the scale of the largest entry."""
    if A.numel() == 0:
        return 0.0
    top = float(A.double().abs().max())
    return top * float(torch.linalg.svdvals(A.double() / top)[0]) if top else 0.0
