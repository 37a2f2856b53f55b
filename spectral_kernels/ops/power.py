"""Block power iteration on the one-read kernel: the plain rival of block Krylov, and what `method="power"` runs.

V <- orth(A'A V), one read a step; Rayleigh-Ritz within the block of 4; the value is the half-step quotient
||A'A z|| / ||A z||. The same error estimate as block Krylov's stops it; without a Krylov space it takes more reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import composites, registry
from ..kernels.contracts import INFO, INFO_COLUMNS, STATS, acc_dtype, counts, sides
from ..kernels.reference import orthonormalize, runs
from .estimate import BLOCK, MIN_READS, Estimate, oriented

MOST_READS = 1000


class PowerEstimate(NamedTuple):
    estimate: Estimate  # info as block Krylov's; X and T empty
    V: Tensor  # flat (4, tracked_j): the final block, leading vector first


def estimate(
    stacks: Sequence[Tensor], *, tol: float = 1e-3, steps: int | None = None, seed: int = 0, b: int = BLOCK
) -> PowerEstimate:
    """sigma_max of a ragged list by block power iteration: `steps` reads, or until 10 * error estimate <= tol."""
    A = [oriented(a) for a in stacks]
    acc, device, N, n = acc_dtype(A[0].dtype), A[0].device, counts(A), sides(A, 2)
    words = registry.words(device.type, A[0].dtype, b)
    V = composites.start_blocks(A, b, seed)
    scale = torch.ones(N, dtype=acc, device=device)
    value = torch.zeros(N, dtype=torch.float64, device=device)
    skip = None
    special = value
    info = torch.zeros((N, INFO_COLUMNS), dtype=torch.float64, device=device)
    finished = torch.zeros(N, dtype=torch.bool, device=device)
    if N == 0:
        return PowerEstimate(Estimate(info, V, V), V)
    for reads in range(1, (steps or MOST_READS) + 1):
        W, S, stats, _ = words.gram_matvec(A, V, scale, skip, b, reads == 1, False)
        if reads == 1:
            amax, nan, inf = (stats[:, STATS[name]] for name in ("amax", "nan", "inf"))
            special = torch.where(nan > 0, torch.nan, torch.where(inf > 0, torch.inf, 0.0))
            finished = (nan > 0) | (inf > 0) | (amax == 0)
            rescaled = composites.safe_scale(amax, acc)
            if steps is not None or bool((rescaled != 1).any()):  # the same scale again costs a read, not a host sync
                scale = rescaled.to(acc)
                W, S, stats, _ = words.gram_matvec(A, V, scale, finished, b, True, False)
            info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
        V, estimated, error = _ritz(n, V, W, S, finished, b)
        value = torch.where(finished, value, estimated / scale.double())
        if steps is None and reads >= MIN_READS:
            finished = finished | (10 * error <= tol)
            if bool(finished.all()):
                break
        skip = finished
    info[:, INFO["sigma"]] = value + special
    info[:, INFO["theta"]] = (value * scale.double()).square()
    info[:, INFO["scale"]] = scale.double()
    info[:, INFO["reads"]] = 1  # its space holds the Krylov space of one read: what a bracket may rely on
    info[:, INFO["done"]] = finished.double()
    return PowerEstimate(Estimate(info, V, V), V)


def _ritz(n: list[int], V: Tensor, W: Tensor, S: Tensor, finished: Tensor, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Next block (flat), half-step estimate (N,) and error estimate (N,) of scale * A."""
    parts, values, errors, offset = [], [], [], 0
    for first, count, size in runs(n):
        mine = slice(first, first + count)
        gone = finished[mine, None, None]
        v, w = (x[offset * b : (offset + count * size) * b].view(count, b, size) for x in (V, W))
        offset += count * size
        w = w.masked_fill(gone, 0)
        theta, z = torch.linalg.eigh(S[mine].masked_fill(gone, 0))
        top, z = theta[:, -1].clamp(min=0), z.flip(2).mT  # (k, b, b): rows are coefficients, leading first
        rotated = z.to(w.dtype) @ w
        lead, before = rotated[:, 0].double(), (z[:, :1].to(v.dtype) @ v)[:, 0].double()
        safe = torch.where(top > 0, top, torch.ones_like(top))
        rho = torch.linalg.vector_norm(lead - top[:, None] * before, dim=1) / safe
        gap = ((top - theta[:, -2]) / safe).clamp(min=0) if b > 1 else torch.ones_like(top)
        values.append(torch.linalg.vector_norm(lead, dim=1) / safe.sqrt())
        errors.append(torch.where(rho > 0, 0.5 * rho.square() / (gap + rho).clamp(min=1e-300), rho))
        floor = 8 * torch.finfo(v.dtype).eps * top
        x, _ = orthonormalize(rotated, rotated[:, :0], floor)
        parts.append(torch.where(gone, v, x).reshape(-1))
    return torch.cat(parts), torch.cat(values), torch.cat(errors)
