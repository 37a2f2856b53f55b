"""The product words in plain torch, on any device: what every kernel is tested against. See contracts_products.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .contracts import acc_dtype
from .contracts_products import factors_of, like, rounded


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B in the accumulation dtype, of operands of one dtype."""
    if A.device.type == "cpu" or A.dtype in (torch.float32, torch.float64):
        wide = acc_dtype(A.dtype)
        return A.to(wide) @ B.to(wide)
    return torch.bmm(A, B, out_dtype=torch.float32)


def mirrored(A: Tensor) -> Tensor:
    """The upper triangle of A and its mirror image."""
    upper = A.triu()
    return upper + A.triu(1).mT


def gram(X: Sequence[Tensor], factor: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    parts = [rounded(x, pair, dtype) for x, pair in zip(X, factors_of(X, factor), strict=True)]
    return [mirrored(product(x, x.mT)).to(dtype) for x in parts]


def square_add(A: Sequence[Tensor], b: float, c: float) -> list[Tensor]:
    if c == 0:
        return [(a.to(acc_dtype(a.dtype)) * b).to(a.dtype).contiguous() for a in A]
    return [mirrored(product(a, a) * c + a.to(acc_dtype(a.dtype)) * b).to(a.dtype) for a in A]


def multiply_add(
    B: Sequence[Tensor], X: Sequence[Tensor], factor: Tensor | None, a: float, symmetric: bool, dtype: torch.dtype
) -> list[Tensor]:
    out = []
    for b, x, pair in zip(B, X, factors_of(X, factor), strict=True):
        mine = rounded(x, pair, dtype)
        value = product(b, mine)
        if a:
            value = value + mine.to(value.dtype) * a
        out.append(like(x, dtype).copy_(mirrored(value) if symmetric else value))
    return out


def multiply_update_(
    P: Sequence[Tensor],
    B: Sequence[Tensor],
    X: Sequence[Tensor],
    factor: Tensor | None,
    size: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    dtype: torch.dtype,
) -> None:
    counts = [p.shape[0] for p in P]
    skips = [None] * len(P) if skip is None else list(skip.split(counts))
    rest = zip(factors_of(X, factor), size.split(counts), decay.split(counts), skips, strict=True)
    for p, b, x, (pair, s, d, gone) in zip(P, B, X, rest, strict=True):
        value = product(b, rounded(x, pair, dtype))
        wide = torch.promote_types(value.dtype, acc_dtype(p.dtype))
        new = (p.to(wide) * (1 - d).to(wide)[:, None, None]).sub_(value.to(wide) * s.to(wide)[:, None, None])
        p.copy_(new if gone is None else torch.where(gone[:, None, None], p.to(wide), new))


def supports(word: str, device_type: str, dtype: torch.dtype, b: int) -> str | None:
    return None
