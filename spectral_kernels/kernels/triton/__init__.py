"""The words on GPUs, in Triton; also on CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported.

Triton itself is imported with the first call of a word, not with this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

# word -> the module of this package that has it
WORDS = {
    "gram_matvec": "wide_read",
    "rayleigh_ritz_": "rayleigh_ritz",
    "momentum_gram_matvec_": "momentum",
    "momentum_norms_": "step",
    "apply_update_": "step",
    "next_block_": "next_block",
    "clip_": "clip",
    "gram": "products",
    "square_add": "products",
    "multiply_add": "products",
    "multiply_update_": "products",
    "newton_schulz": "on_chip",
}
rank_limit = 15  # Ritz values that rayleigh_ritz_ follows
# basis columns: K = columns + b of rayleigh_ritz_, one tile of registers; rows of T of next_block_
column_limit = 128


def supports(word: str, device_type: str, dtype: torch.dtype, b: int) -> str | None:
    """None, or why the Triton kernel of `word` does not serve blocks of b columns of this dtype on this device.

    dtype: of the matrices; of the products, for the words of contracts_products.py.
    """
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
    reason: str | None = importlib.import_module(f".{WORDS[word]}", __name__).supports(dtype, b)
    return reason


def gram_matvec(
    A: Sequence[Tensor], V: Tensor, scale: Tensor, skip: Tensor | None, b: int, with_stats: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .wide_read import gram_matvec as kernel

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


def momentum_gram_matvec_(
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    update: bool,
    propagate: bool,
    b: int,
    with_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .momentum import momentum_gram_matvec_ as kernel

    return kernel(M, G, V, scale, skip, beta, alpha, nesterov, update, propagate, b, with_y)


def momentum_norms_(
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    scale: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    update: bool,
    propagate: bool,
) -> Tensor:
    from .step import momentum_norms_ as kernel

    return kernel(M, G, scale, skip, beta, alpha, nesterov, update, propagate)


def apply_update_(
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    size: Tensor,
    scale: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    L: Tensor | None = None,
    R: Tensor | None = None,
    r: int = 0,
) -> None:
    from .step import apply_update_ as kernel

    kernel(P, M, G, size, scale, decay, skip, beta, alpha, L, R, r)


def next_block_(
    m: Sequence[int],
    n: Sequence[int],
    Q: Tensor,
    T: Tensor,
    info: Tensor,
    V: Tensor,
    step: Tensor,
    b: int,
    fresh: int,
    seed: int,
) -> Tensor:
    from .next_block import next_block_ as kernel

    return kernel(m, n, Q, T, info, V, step, b, fresh, seed)


def clip_(
    m: Sequence[int],
    n: Sequence[int],
    V: Tensor,
    L: Tensor,
    R: Tensor,
    info: Tensor,
    W: Tensor,
    S: Tensor,
    Y: Tensor,
    scale: Tensor,
    rank: Tensor,
    limit: Tensor | None,
    before: Tensor,
    step: Tensor,
    b: int,
    r: int,
    fresh: int,
    tol: float,
    seed: int,
) -> None:
    from .clip import clip_ as kernel

    kernel(m, n, V, L, R, info, W, S, Y, scale, rank, limit, before, step, b, r, fresh, tol, seed)


def gram(X: Sequence[Tensor], factor: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    from .products import gram as kernel

    return kernel(X, factor, dtype)


def square_add(A: Sequence[Tensor], b: float, c: float) -> list[Tensor]:
    from .products import square_add as kernel

    return kernel(A, b, c)


def multiply_add(
    B: Sequence[Tensor], X: Sequence[Tensor], factor: Tensor | None, a: float, symmetric: bool, dtype: torch.dtype
) -> list[Tensor]:
    from .products import multiply_add as kernel

    return kernel(B, X, factor, a, symmetric, dtype)


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
    from .products import multiply_update_ as kernel

    kernel(P, B, X, factor, size, decay, skip, dtype)


def newton_schulz(
    X: Sequence[Tensor],
    factor: Tensor,
    schatten4: bool,
    coefficients: Sequence[float],
    gram: bool,
    restarts: Sequence[int],
    dtype: torch.dtype,
    P: Sequence[Tensor],
    size: Tensor | None,
    decay: Tensor | None,
    skip: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    from .on_chip import newton_schulz as kernel

    return kernel(X, factor, schatten4, coefficients, gram, restarts, dtype, P, size, decay, skip)
