"""What an orthogonalized step must be: the scalar polynomial of a schedule applied to exact singular values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_kernels.ops import schedules

KELLER = ((3.4445, -4.775, 2.0315),) * 5  # torch.optim.Muon's defaults


def polar(X: Tensor, steps: Sequence[tuple[float, float, float]] = KELLER, power: int = 2) -> Tensor:
    """U f(S / |S|_power) V' of (..., m, n) in float64; zero matrices stay zero."""
    X = X.double()
    largest = X.abs().amax((-2, -1), keepdim=True)
    U, S, Vh = torch.linalg.svd(X / torch.where(largest > 0, largest, 1), full_matrices=False)
    norm = torch.linalg.vector_norm(S, power, dim=-1, keepdim=True)
    s = S / torch.where(norm > 0, norm, 1)
    for a, b, c in steps:
        s = s * (a + b * s**2 + c * s**4)
    return (U * s[..., None, :]) @ Vh


def triples(name: str) -> tuple[tuple[float, float, float], ...]:
    return tuple(schedules.schedule(name, None).take(None).steps)


def distance(X: Tensor, Y: Tensor) -> float:
    """||X - Y||_F / ||Y||_F of all entries: the root mean square of the difference over that of Y."""
    return float((X.double() - Y.double()).norm() / Y.double().norm())


def spectrum(m: int, n: int, values: Sequence[float] | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """m x n with these singular values, the rest zero."""
    s = torch.as_tensor(values, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(side, len(s), dtype=torch.float64)).Q for side in (m, n))
    return (U * s @ V.mT).to(dtype)
