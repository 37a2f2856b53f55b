"""The words on GPUs, in Triton; also on CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported.

Triton itself is imported with the first call of a word, not with this package.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = ("gram_matvec", "rayleigh_ritz_")
rank_limit = 15  # Ritz values that rayleigh_ritz_ follows
column_limit = 128  # basis columns (K = columns + b) of rayleigh_ritz_, one tile of registers


def supports(word: str, device_type: str, dtype: torch.dtype, b: int) -> str | None:
    """None, or why the Triton kernel of `word` does not serve blocks of b columns of this dtype on this device."""
    if word not in WORDS:
        return f"there is no Triton kernel for {word}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "Triton compiles for GPUs; CPU tensors need TRITON_INTERPRET=1 (slow, for tests)"
    if device_type == "cuda" and interpreted:
        return "TRITON_INTERPRET=1 is set: the interpreter reads CPU tensors only"
    if device_type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, not on {device_type}"
    if word == "gram_matvec":
        from .one_read import supports as of_word
    else:
        from .rayleigh_ritz import supports as of_word
    return of_word(dtype, b)


def gram_matvec(
    A: Sequence[Tensor], V: Tensor, scale: Tensor, skip: Tensor | None, b: int, with_stats: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .one_read import gram_matvec as kernel

    return kernel(A, V, scale, skip, b, with_stats, with_y)


def rayleigh_ritz_(
    n: Sequence[int],
    Q: Tensor,
    V: Tensor,
    T: Tensor,
    info: Tensor,
    W: Tensor,
    S: Tensor,
    scale: Tensor,
    b: int,
    columns: int,
    rank: int,
    tol: float,
    min_reads: int,
) -> None:
    from .rayleigh_ritz import rayleigh_ritz_ as kernel

    kernel(n, Q, V, T, info, W, S, scale, b, columns, rank, tol, min_reads)
