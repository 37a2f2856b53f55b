"""Leading singular vectors: `singular_triplet`, `leading_subspace`, and `stable_rank`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.contracts import INFO, acc_dtype, counts
from ..kernels.reference import blocks as blocks_of
from . import arguments
from .arguments import Ragged, ragged
from .estimate import BLOCK, estimate, full_precision, oriented, sigma
from .norm import _check_blocks, finish
from .triplet import must_be_opaque, spectral_norm_op, triplets, unit_scale


class SingularTriplet(NamedTuple):
    """A v = s u: u (..., m) and v (..., n) of unit length, s (...)."""

    u: Tensor
    s: Tensor
    v: Tensor


class LeadingSubspace(NamedTuple):
    """U (..., m, rank), S (..., rank) descending, Vh (..., rank, n): A is close to U diag(S) Vh on its leading part."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def singular_triplet(
    A: Tensor | Sequence[Tensor],
    tol: float = 1e-3,
    *,
    steps: int | None = None,
    seed: int = 0,
    v0: Tensor | Sequence[Tensor] | None = None,
) -> Any:
    """The leading singular triplet of every matrix: s = sigma_max to `tol`, and unit vectors with A v = s u.

    A, tol, steps, seed, v0: as in spectral_norm; results in float64 for float64 input, else float32; a list gives a
    list. Vectors converge slower than values: their angle is of order sqrt(tol) where singular values lie close, and
    any vector of a repeated singular value may come. Zero and non-finite matrices have zero vectors. Not
    differentiable.
    """
    batch = ragged(A)
    if not batch.stacks:
        return []
    tol, seed = arguments.check_tol(tol, batch.stacks[0].dtype), arguments.check_seed(seed)
    if steps is not None:
        steps = arguments.check_int("steps", steps, 1, 4096)
    blocks = None if v0 is None else _check_blocks(v0, batch)
    with torch.no_grad(), full_precision(batch.stacks):
        if must_be_opaque(batch.stacks):
            if blocks is not None:
                raise ValueError("v0 does not go with vmap or torch.compile")
            values, u, v = spectral_norm_op(batch.stacks, tol, steps or 0, seed, "krylov")
        else:
            values, u, v = triplets(batch.stacks, tol, steps or 0, seed, V0=blocks)
    parts = [
        SingularTriplet(*t)
        for t in zip(
            batch.scatter(u, [a.shape[1] for a in batch.stacks]),
            batch.scatter(values),
            batch.scatter(v, [a.shape[2] for a in batch.stacks]),
            strict=True,
        )
    ]
    return parts if batch.is_list else parts[0]


def stable_rank(A: Tensor | Sequence[Tensor], tol: float = 1e-3, *, seed: int = 0) -> Any:
    """||A||_F^2 / ||A||_2^2 of every matrix: between 1 and min(m, n), 0 for a zero or empty matrix.

    Relative error 2 tol at most. Both norms come from the same reads. Shapes and lists as in spectral_norm; not
    differentiable.
    """
    batch = ragged(A)
    if not batch.stacks:
        return torch.empty(0)
    tol, seed = arguments.check_tol(tol, batch.stacks[0].dtype), arguments.check_seed(seed)
    with torch.no_grad(), full_precision(batch.stacks):
        if must_be_opaque(batch.stacks):
            return _stable_rank_by_norm(batch, tol, seed)
        result = estimate(batch.stacks, tol=tol, seed=seed)
        finish(result, batch.stacks, tol, None)
        scaled = result.info[:, INFO["sigma"]] * result.info[:, INFO["scale"]]
        special = result.info[:, INFO["nan"]] + result.info[:, INFO["inf"]] > 0
        ratio = result.info[:, INFO["frob2"]] / scaled.square()
        ratio = torch.where(scaled > 0, ratio, torch.zeros_like(ratio)).masked_fill(special, torch.nan)
        flat = ratio.to(acc_dtype(batch.stacks[0].dtype))
    parts = batch.scatter(flat)
    return flat if batch.plain else parts if batch.is_list else parts[0]


def _completed(x: Tensor) -> Tensor:
    """Flat orthonormal rows of x (k, b, n): zero rows (deflated directions) become a completion of the basis."""
    return torch.linalg.qr(x.mT.double()).Q.mT.to(x.dtype).reshape(-1)


def _stable_rank_by_norm(batch: Ragged, tol: float, seed: int) -> Any:
    """The same from the opaque op, for torch.compile and vmap: the Frobenius norm costs a read of its own."""
    values, _, _ = spectral_norm_op(batch.stacks, tol, 0, seed, "krylov")
    unit = [
        p[..., None, None] for p in Ragged(batch.stacks, [(a.shape[0],) for a in batch.stacks], True).scatter(values)
    ]
    usable = [torch.where(torch.isfinite(s) & (s > 0), s, torch.ones_like(s)) for s in unit]
    ratio = torch.cat([(a / s).square().sum((1, 2)) for a, s in zip(batch.stacks, usable, strict=True)])
    flat = torch.where(values > 0, ratio, torch.zeros_like(ratio)).masked_fill(~torch.isfinite(values), torch.nan)
    parts = batch.scatter(flat)
    return flat if batch.plain else parts if batch.is_list else parts[0]


def leading_subspace(A: Tensor | Sequence[Tensor], rank: int, tol: float = 1e-3, *, seed: int = 0) -> Any:
    """The `rank` leading singular triplets, for low-rank optimizers: A ~ U diag(S) Vh.

    A: (..., m, n) or a list; rank: 1 to min(m, n). tol: relative error of every leading singular value where the
    spectrum lets it be reached in the read budget; the subspace converges where sigma_rank is separated from
    sigma_(rank+1). U and Vh have orthonormal columns and rows (to 1e-5 in float32). Non-finite matrices give NaN.
    Not differentiable.
    """
    batch = ragged(A)
    if not batch.stacks:
        return []
    short = min(min(a.shape[1:]) for a in batch.stacks)
    rank = arguments.check_int("rank", rank, 1, short)
    tol, seed = arguments.check_tol(tol, batch.stacks[0].dtype), arguments.check_seed(seed)
    stacks, A_ = batch.stacks, [oriented(a) for a in batch.stacks]
    b = min(max(BLOCK, rank + min(rank, 16)), 64, short) if rank <= 64 else rank
    with torch.no_grad(), full_precision(stacks):
        result = estimate(stacks, tol=tol, b=b, rank=rank, seed=seed, vectors=b)
        finite = torch.isfinite(sigma(result, stacks[0].dtype))
        # Rayleigh-Ritz on A X: one more read gives Y = A X; its small SVD the triplets
        words = registry.words(A_[0].device.type, A_[0].dtype, b)
        scale = unit_scale(sigma(result, stacks[0].dtype)).to(result.X.dtype)
        X = torch.cat([_completed(x) for x in blocks_of(result.X, b, A_, 2)])
        _, _, _, Y = words.gram_matvec(A_, X, scale, ~finite, b, False, True)
        parts, at_x, at_y, at = [], 0, 0, 0
        for a, o, shape in zip(stacks, A_, batch.batches, strict=True):
            k, m, n = o.shape
            x, y = X[at_x : at_x + k * b * n].view(k, b, n), Y[at_y : at_y + k * b * m].view(k, b, m)
            bad, unit = ~finite[at : at + k], scale[at : at + k]
            at_x, at_y, at = at_x + k * b * n, at_y + k * b * m, at + k
            U, S, Wh = torch.linalg.svd(y.mT, full_matrices=False)  # y' = U S Wh; A = y' x restricted to the block
            U, S = U[:, :, :rank], S[:, :rank] / unit[:, None]
            Vh = Wh[:, :rank] @ x
            U, S, Vh = (t.masked_fill(bad.view(-1, *[1] * (t.ndim - 1)), torch.nan) for t in (U, S, Vh))
            if o is not a:
                U, Vh = Vh.mT, U.mT
            parts.append(LeadingSubspace(*(t.reshape(*shape, *t.shape[1:]) for t in (U, S, Vh))))
    assert counts(A_) == at
    return parts if batch.is_list else parts[0]


__all__ = ["LeadingSubspace", "SingularTriplet", "leading_subspace", "singular_triplet", "stable_rank"]
