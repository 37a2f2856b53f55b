"""The estimator behind every public function: orient, start, run block Krylov, finish what did not converge."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import random, registry
from ..kernels.contracts import INFO, acc_dtype
from ..kernels.reference import orthonormalize

BLOCK = 4  # columns; chosen by docs/accuracy.md: 1 is dishonest, 8 costs more bytes per read than it saves reads
MOST_READS = 64
BASIS_COLUMNS = 128  # scratch: 132 n + a few n numbers per matrix
MIN_READS = 3  # one more while energy outside the basis could hide a larger value (docs/accuracy.md)


def full_precision(stacks: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Autocast off: it would run small products of the estimators in half precision."""
    kind = stacks[0].device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class Estimate(NamedTuple):
    """What a run of the estimator knows; rows in the order of the ragged list's matrices."""

    info: Tensor  # (N, INFO_COLUMNS) float64, see kernels/contracts.py
    X: Tensor  # flat (vectors, short_j) acc: leading Ritz vectors on the tracked side
    T: Tensor  # (N, K+b, K+b) float64 of scale * A, or empty


def oriented(A: Tensor) -> Tensor:
    """The stack (k, m, n), or its transpose, with the tracked side last.

    The shorter side, unless the rows along the longer one are contiguous, and the matrix is neither small nor thin:
    a read in the order of memory is 1.5 to 4 times faster, for a block as long as the longer side. csrc/cpu/matrix.h
    does the same.
    """
    _, m, n = A.shape
    short, long = (m, n) if m < n else (n, m)
    swap = n > m
    if short >= 128 and long <= 16 * short:
        _, sm, sn = A.stride()
        if sn == 1 and sm != 1:
            swap = False
        elif sm == 1 and sn != 1:
            swap = True
    return A.mT if swap else A


def tracked(A: Tensor) -> int:
    """Length of the rows of a block of this stack."""
    return oriented(A).shape[2]


def warm_blocks(kept: Sequence[Tensor], stacks: Sequence[Tensor], seed: int, fresh: int = BLOCK) -> Tensor:
    """Flat orthonormal blocks (fresh + b, n_j): `fresh` random rows, then the kept rows (k, b, n) of a former call.

    The random rows, keyed by (seed, shape), make a warm start as safe as a cold one: no direction can hide from them,
    and certificates rest on their span. A stop rule that sees kept rows alone trusts an old direction.
    """
    parts = []
    for a, v in zip(stacks, kept, strict=True):
        k, b, n = v.shape
        draws = random.normals(random.key(seed, a.shape[1], a.shape[2], 1), (fresh + b) * n, v.device)
        draw, spare = draws.view(1, fresh + b, n).expand(k, -1, -1).split((fresh, b), 1)
        given = v.double()
        length = torch.linalg.vector_norm(given, dim=2, keepdim=True)
        usable = torch.isfinite(length) & (length > 0)  # zero rows come from exhausted spaces: random ones instead
        given = torch.where(usable, given / torch.where(usable, length, 1.0), spare)
        rows = torch.cat((draw, given), 1)
        floor = torch.full((k,), 1e-6, dtype=torch.float64, device=v.device)
        parts.append(orthonormalize(rows, rows[:, :0], floor)[0].to(v.dtype).reshape(-1))
    return torch.cat(parts)


def estimate(
    stacks: Sequence[Tensor],
    *,
    tol: float = 1e-3,
    steps: int | None = None,
    b: int = BLOCK,
    rank: int = 1,
    seed: int = 0,
    V0: Sequence[Tensor] | None = None,
    vectors: int = 0,
    with_t: bool = False,
    min_reads: int | None = None,
) -> Estimate:
    """Run block Krylov over a ragged list of stacks (k, m, n), one dtype and device.

    steps: exactly so many reads (no host synchronization); otherwise as many as `tol` needs, at most MOST_READS.
    V0: one (k, rows, tracked) block per stack to start from, beside the random rows of a cold start. vectors: leading
    singular vectors to return, on the tracked side. with_t: return the projected matrices.
    """
    A = [oriented(a) for a in stacks]
    first = A[0]
    start = None
    if V0 is not None:
        start = warm_blocks(V0, A, seed)
        b = BLOCK + V0[0].shape[1]
    words = registry.words(first.device.type, first.dtype, b)
    reads = MOST_READS if steps is None else steps
    cap = max(BASIS_COLUMNS // b, 4) * b
    if with_t:
        cap = max(cap, reads * b)
    if min_reads is None:
        min_reads = MIN_READS if V0 is None else 1
    with full_precision(A):
        info, X, T = words.block_krylov(
            A, start, b, reads, cap, rank, 0.0 if steps is not None else tol, min_reads, seed, vectors, with_t
        )
    return Estimate(info, X, T)


def sigma(result: Estimate, dtype: torch.dtype) -> Tensor:
    """(N,) estimates in the dtype in which norms of `dtype` come back."""
    return result.info[:, INFO["sigma"]].to(acc_dtype(dtype)).contiguous()
