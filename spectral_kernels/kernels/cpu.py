"""The native CPU backend: loads the library built from csrc/ and fills the vocabulary with its ops."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import contracts  # noqa: F401  the schemas must stand before the library adds kernels to them

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK_LIMIT = 128


@lru_cache(maxsize=1)
def load() -> str | None:
    """Load the native library once. None, or the reason why it is not there."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(glob.glob(os.path.join(folder, "_C_cpu*.so")))
    if not found:
        reason = os.path.join(folder, "_C_cpu.txt")  # written by a build that failed or was skipped
        if os.path.exists(reason):
            with open(reason) as file:
                return "the native library is not built: " + " ".join(file.read().split())
        return "the native library is not built (reinstall with SPECTRAL_KERNELS_NATIVE=1 to see why)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


def supports(word: str, device_type: str, dtype: torch.dtype, b: int) -> str | None:
    if device_type != "cpu":
        return f"serves CPU tensors, not {device_type}"
    if dtype not in FLOATS:
        return f"serves fp32, fp64, bf16 and fp16, not {dtype}"
    if not 1 <= b <= BLOCK_LIMIT:
        return f"serves blocks of 1 to {BLOCK_LIMIT} columns, not {b}"
    return load()


def gram_matvec(
    A: Sequence[Tensor], V: Tensor, scale: Tensor, skip: Tensor | None, b: int, with_stats: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.spectral_kernels.gram_matvec.default(A, V, scale, skip, b, with_stats, with_y)


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
    torch.ops.spectral_kernels.rayleigh_ritz_.default(n, Q, V, T, info, W, S, scale, b, columns, rank, tol, min_reads)


def block_krylov(
    A: Sequence[Tensor],
    V0: Tensor | None,
    b: int,
    steps: int,
    cap: int,
    rank: int,
    tol: float,
    min_reads: int,
    seed: int,
    vectors: int,
    with_t: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.spectral_kernels.block_krylov.default(
        A, V0, b, steps, cap, rank, tol, min_reads, seed, vectors, with_t
    )


def krylov_norm(A: Tensor, b: int, steps: int, cap: int, tol: float, min_reads: int, seed: int) -> Tensor:
    return torch.ops.spectral_kernels.krylov_norm.default(A, b, steps, cap, tol, min_reads, seed)


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
    return torch.ops.spectral_kernels.momentum_gram_matvec_.default(
        M, G, V, scale, skip, beta, alpha, nesterov, update, propagate, b, with_y
    )


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
    return torch.ops.spectral_kernels.momentum_norms_.default(
        M, G, scale, skip, beta, alpha, nesterov, update, propagate
    )


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
    torch.ops.spectral_kernels.apply_update_.default(P, M, G, size, scale, decay, skip, beta, alpha, L, R, r)


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
    return torch.ops.spectral_kernels.next_block_.default(m, n, Q, T, info, V, step, b, fresh, seed)


def tracked_step_(
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    step: Tensor,
    size: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    propagate: bool,
    upper: bool,
    b: int,
    fresh: int,
    reads: int,
    tol: float,
    min_reads: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    return torch.ops.spectral_kernels.tracked_step_.default(
        P,
        M,
        G,
        V,
        scale,
        step,
        size,
        decay,
        skip,
        beta,
        alpha,
        nesterov,
        propagate,
        upper,
        b,
        fresh,
        reads,
        tol,
        min_reads,
        seed,
    )


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
    torch.ops.spectral_kernels.clip_.default(
        m, n, V, L, R, info, W, S, Y, scale, rank, limit, before, step, b, r, fresh, tol, seed
    )


def clipped_step_(
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    before: Tensor,
    step: Tensor,
    size: Tensor,
    decay: Tensor,
    rank: Tensor,
    limit: Tensor | None,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    propagate: bool,
    b: int,
    r: int,
    fresh: int,
    reads: int,
    tol: float,
    seed: int,
) -> Tensor:
    return torch.ops.spectral_kernels.clipped_step_.default(
        P,
        M,
        G,
        V,
        scale,
        before,
        step,
        size,
        decay,
        rank,
        limit,
        skip,
        beta,
        alpha,
        nesterov,
        propagate,
        b,
        r,
        fresh,
        reads,
        tol,
        seed,
    )
