"""Ragged lists for the contract tests: shapes, strides, and the kernels that this machine can run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectral_kernels.kernels import registry
from spectral_kernels.kernels.contracts import acc_dtype, counts

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = {  # (k, m, n) of the stacks of a list
    "empty": [(0, 4, 3), (2, 0, 5), (2, 5, 0)],
    "vectors": [(1, 1, 1), (2, 1, 70), (2, 70, 1), (1, 1, 3), (1, 3, 1)],
    "odd": [(1, 65, 33), (1, 33, 65), (1, 255, 129), (1, 17, 16), (1, 15, 31)],
    "tall": [(1, 8192, 48)],
    "wide": [(1, 48, 8192)],
    "chunks": [(1, 515, 300), (1, 300, 1030), (1, 257, 1100)],
    "stacks": [(5, 24, 40), (3, 130, 64), (7, 8, 8)],
    "three hundred": [(1, 3 + i % 40, 2 + (7 * i) % 37) for i in range(300)],
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda a: a.contiguous(),
    "transposed": lambda a: a.mT.contiguous().mT,
    "padded rows": lambda a: torch.cat((a, a[..., :3]), -1)[..., : a.shape[-1]],
    "every other": lambda a: a.repeat_interleave(2, -1)[..., ::2],
    "both strided": lambda a: a.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2],
    "stack strided": lambda a: a.movedim(0, -1).contiguous().movedim(-1, 0),
}


def served() -> list[tuple[str, str]]:
    """(backend, device) pairs whose kernels run here; interpreted Triton has tests of its own."""
    pairs = [("reference", "cpu"), ("cpu", "cpu")]
    if torch.cuda.is_available():
        pairs += [("reference", "cuda"), ("triton", "cuda")]
    return pairs


def kernel(word: str, backend: str, device: str, dtype: torch.dtype, b: int) -> Callable:
    """The kernel; a backend that declines skips the test, with its own reason."""
    import pytest

    row = registry.table()[word].get(backend)
    reason = f"{backend} has no {word}" if row is None else row.supports(word, device, dtype, b)
    if reason is not None:
        pytest.skip(reason)
    return row.fn


def ragged(family: str, layout: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = SHAPES[family]
    return [LAYOUTS[layout](torch.randn(s, generator=g, dtype=torch.float64).to(dtype)).to(device) for s in shapes]


def flat_block(A: list[Tensor], b: int, seed: int = 1) -> Tensor:
    """Random V, flat (b, n_j), float32 values in the accumulation dtype."""
    g = torch.Generator().manual_seed(seed)
    size = b * sum(a.shape[0] * a.shape[2] for a in A)
    return torch.randn(size, generator=g).to(acc_dtype(A[0].dtype)).to(A[0].device)


def ones(A: list[Tensor]) -> Tensor:
    return torch.ones(counts(A), dtype=acc_dtype(A[0].dtype), device=A[0].device)
