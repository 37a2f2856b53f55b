"""`spectral_clip`: singular values above the s-th, or above a threshold, lowered to it; the others stay."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.contracts import NAMESPACE, acc_dtype
from . import arguments, opaque, triplet
from .arguments import ragged
from .estimate import full_precision
from .exact import amax, exponents, power, unit_svd
from .subspace import leading_subspace

METHODS = ("auto", "block", "svd")
# Time of the SVD over that of the block, one CPU thread, float32, four families from Gaussian (the slowest to converge)
# to decaying values, at a rank of 1/16 of the side: 1 to 6 for 256, 1.7 to 7 for 512, 1.5 to 16 for 1024, but 0.4 to 2
# for 128; at 1/8 of 256 and 512 0.3 to 3, at 1/32 of 192 0.8 to 7.
LEAST_SIDE = 256
SHARE = 16
FIRST_RANK = 8  # of a threshold, which does not say how many values exceed it
WIDEST = 80  # columns of the widest block of leading_subspace: longer sides do not change what it does


def spectral_clip(
    A: Tensor | Sequence[Tensor],
    rank: int | None = None,
    *,
    threshold: float | None = None,
    method: str = "auto",
    tol: float = 1e-3,
    seed: int = 0,
) -> Any:
    """Singular values clipped: sum sigma_i u_i v_i' -> sum min(sigma_i, tau) u_i v_i', tau = sigma_rank or threshold.

    A: (..., m, n), any float dtype, or a list of such; a tensor (a list) of A's shape and dtype comes back. rank: 1
    (nothing is clipped) to min(m, n) (every value becomes the smallest). threshold > 0: in units of the singular
    values; matrices with sigma_max <= threshold come back bit for bit. Not divided by tau.
    method: "block" subtracts U (S - tau)_+ V' of the leading triplets; "svd" is exact, in float64; "auto" takes the
    block for shorter sides from 256 and ranks up to 1/16 of them. A threshold starts at rank 8 and doubles it until
    all values above are found.
    Error of "block": ||result - exact||_2 <= 2 tol sigma_max (2e-4 sigma_max for less tol where A is not float64), by
    measurement over matrix families; relative to tau that is sigma_max / tau times as much. What the triplets neglect
    of a clipped direction stays unclipped: the largest singular value of the result is at most
    tau (1 + tol sigma_max / tau). Half results are rounded to their dtype.
    A matrix with NaN or infinite entries becomes NaN, alone. The gradient is that of spectral functions, by a float64
    SVD in backward for every method; at repeated values and kinks one valid generalized derivative, for non-finite
    matrices zero; not differentiable again. Source: Daleckii and Krein 1965; Noferini 2017 (rectangular).
    """
    batch = ragged(A)
    arguments.check_choice("method", method, METHODS)
    seed = arguments.check_seed(seed)
    if (rank is None) == (threshold is None):
        given = "neither" if rank is None else f"both (rank={rank!r}, threshold={threshold!r})"
        raise ValueError(f"spectral_clip takes either rank or threshold, not {given}")
    if rank is not None:
        shorts = [min(a.shape[1:]) for a in batch.stacks if 0 not in a.shape[1:]]
        rank = arguments.check_int("rank", rank, 1, min(shorts) if shorts else None)
    else:
        threshold = _check_threshold(threshold)
    if not batch.stacks:
        return []
    tol = arguments.check_tol(tol, batch.stacks[0].dtype)
    triplet.check_transforms(batch.stacks, "spectral_clip")
    if rank == 1:  # sigma_1 is the largest already
        parts = [_poisoned(a) for a in batch.stacks]
    else:
        needs_grad = torch.is_grad_enabled() and any(a.requires_grad for a in batch.stacks)
        run = spectral_clip_op if needs_grad or triplet.must_be_opaque(batch.stacks) else _clip
        parts = run(batch.stacks, rank or 0, threshold or 0.0, method, tol, seed)
    parts = [x.reshape(*shape, *x.shape[1:]) for x, shape in zip(parts, batch.batches, strict=True)]
    return parts if batch.is_list else parts[0]


def widest_block(short: int) -> int:
    """The highest rank that method="auto" clips by a block, 0: all by an SVD."""
    return short // SHARE if short >= LEAST_SIDE else 0


def method_of(short: int) -> str:
    """What method="auto" does with a shorter side, in words."""
    widest = widest_block(short)
    if not widest:
        return f"shorter side {short}: method svd at any rank (below {LEAST_SIDE})"
    return f"shorter side {short}: method block up to rank {widest} (1/{SHARE} of the side), svd above"


def _check_threshold(threshold: Any) -> float:
    if not isinstance(threshold, numbers.Real) or isinstance(threshold, bool):
        raise TypeError(f"threshold must be a number, not {type(threshold).__name__}")
    number = float(threshold)
    if not 0 < number < math.inf:  # comparisons alone: torch.compile may pass a symbol
        raise ValueError(f"threshold must be a finite number above 0, not {threshold}")
    return number


def _poisoned(A: Tensor) -> Tensor:
    """A copy of A, matrices with a non-finite entry all NaN."""
    return A.masked_fill(~torch.isfinite(amax(A.detach()))[:, None, None], torch.nan)


# --------------------------------------------------------------------------------------------------------- by an SVD


def _limit(threshold: float, e: Tensor) -> Tensor:
    """(k, 1) the threshold at the scale 2^e."""
    return power(torch.full_like(e, threshold, dtype=torch.float64), e)[:, None]


def _by_svd(A: Tensor, rank: int, threshold: float) -> Tensor:
    U, S, Vh, e, finite = unit_svd(A)
    limit = _limit(threshold, e)
    tau = S[:, rank - 1 : rank] if rank else limit
    x = power((U * torch.minimum(S, tau)[:, None]) @ Vh, -e[:, None, None]).to(A.dtype)
    if not rank:
        x = torch.where(_below(S, limit)[:, None, None], A, x)
    return torch.where(finite[:, None, None], x, torch.nan).contiguous()


def _below(S: Tensor, limit: Tensor) -> Tensor:
    """(k,) True where no value exceeds the limit, which is beyond doubt only up to rounding."""
    return S[:, 0] <= limit[:, 0] * (1 + 64 * torch.finfo(S.dtype).eps)


# ------------------------------------------------------------------------------------------------------- by a block


def _clip(stacks: list[Tensor], rank: int, threshold: float, method: str, tol: float, seed: int) -> list[Tensor]:
    """A new stack for each; rank = 0: clipped at the threshold."""
    # values at tolerance t have vectors at about sqrt(t): errors of the result were below 0.05 sqrt(t) sigma_max
    tol = max(16 * torch.finfo(acc_dtype(stacks[0].dtype)).eps, min(tol, 100 * tol**2))
    with torch.no_grad(), full_precision(stacks):
        out = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in stacks]
        pending: list[tuple[int, Tensor, Tensor, int]] = []  # stack, rows (k,), exponents (k,), rank
        scaled = list(stacks)
        for i, a in enumerate(stacks):
            if a.numel() == 0:
                continue
            short = min(a.shape[1:])
            r = rank or min(FIRST_RANK, short)
            if method == "svd" or (method == "auto" and r > widest_block(short)):
                out[i] = _by_svd(a, rank, threshold)
                continue
            scaled[i], e = _windowed(a)
            pending.append((i, torch.arange(a.shape[0], device=a.device), e, r))
        while pending:
            pending = _round(stacks, scaled, out, pending, rank, threshold, method, tol, seed)
        return out


def _windowed(A: Tensor) -> tuple[Tensor, Tensor]:
    """A times powers of two where its values or their products could leave the range; the exponents (k,)."""
    acc = acc_dtype(A.dtype)
    e = exponents(amax(A))
    e = torch.where(e.abs() > (60 if acc == torch.float32 else 480), e, 0)
    return (power(A, e[:, None, None]).to(acc) if bool(e.any()) else A), e


def _round(
    stacks: list[Tensor],
    scaled: list[Tensor],
    out: list[Tensor],
    pending: list[tuple[int, Tensor, Tensor, int]],
    rank: int,
    threshold: float,
    method: str,
    tol: float,
    seed: int,
) -> list[tuple[int, Tensor, Tensor, int]]:
    """Clip what is pending; what has more values above the threshold than its block comes back, at twice the rank."""
    # one launch for a list; only sides shorter than a block are apart, as they would narrow the blocks of the others
    groups: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor, int]]] = {}
    for entry in pending:
        x = scaled[entry[0]]
        groups.setdefault((entry[3], min(WIDEST, *x.shape[1:]), x.dtype), []).append(entry)
    left = []
    for (r, _, _), members in groups.items():
        xs = [x if len(rows) == x.shape[0] else x[rows] for x, rows in ((scaled[i], rows) for i, rows, _, _ in members)]
        for (i, rows, e, _), x, (U, S, Vh) in zip(members, xs, leading_subspace(xs, r, tol, seed=seed), strict=True):
            a, short = stacks[i], min(x.shape[1:])
            limit = S[:, -1:] if rank else _limit(threshold, e)
            excess = (S.double() - limit).clamp(min=0).to(S.dtype)
            clipped = torch.baddbmm(x.to(S.dtype), U * excess[:, None], Vh, alpha=-1)
            if scaled[i] is not a:
                clipped = power(clipped, -e[:, None, None])
            clipped = clipped.to(a.dtype)
            more = torch.zeros_like(rows, dtype=torch.bool)
            if not rank:
                clipped = torch.where(_below(S, limit)[:, None, None], a[rows], clipped)
                more = (S[:, -1] > limit[:, 0]) & (r < short)
            out[i][rows] = clipped
            if bool(more.any()):
                wider = min(2 * r, short)
                if method == "auto" and wider > widest_block(short):
                    out[i][rows[more]] = _by_svd(a[rows[more]], 0, threshold)
                else:
                    left.append((i, rows[more], e[more], wider))
    return left


# ------------------------------------------------------------------------------------------------------- derivative


def _pull_back(A: Tensor, H: Tensor, rank: int, threshold: float) -> Tensor:
    """The adjoint derivative of the clip at the stack A, applied to H.

    With P = U'HV, f the clip, F_ij = (f_i - f_j) / (s_i - s_j), G_ij = (f_i + f_j) / (s_i + s_j):
    U (F o sym P + G o skew P) V' + (I - UU') H V diag(f / s) V', and for a rank also sum_(i < rank) P_ii u_s v_s',
    since tau = sigma_rank moves too. All quotients lie in [0, 1]: no gap of the values is divided by alone.
    """
    if A.numel() == 0:
        return torch.zeros_like(A)
    if A.shape[1] < A.shape[2]:
        return _pull_back(A.mT, H.mT, rank, threshold).mT
    U, S, Vh, e, finite = unit_svd(A)
    limit = _limit(threshold, e)
    H = H.double()
    tau = S[:, rank - 1 : rank] if rank else limit
    f = torch.minimum(S, tau)
    # by index for a rank: of values equal to tau, those before the s-th count as above, the limit of separate ones
    above = (torch.arange(S.shape[1], device=S.device) < rank - 1).expand_as(S) if rank else S > tau
    i, j = above[:, :, None], above[:, None]
    total, difference = S[:, :, None] + S[:, None], (S[:, :, None] - S[:, None]).abs()
    both = f[:, :, None] + f[:, None]
    apart = difference > 32 * torch.finfo(S.dtype).eps * S[:, :1, None]  # else rounding alone would choose the quotient
    G = torch.where((i | j) & (total > 0), both / torch.where(total > 0, total, 1), 1)
    across = torch.where(apart, (f[:, :, None] - f[:, None]).abs() / torch.where(apart, difference, 1), 0)
    F = torch.where(i & j, 0, torch.where(i | j, across, 1))
    ratio = torch.where(above & (S > 0), f / torch.where(S > 0, S, 1), 1)
    HV = H @ Vh.mT  # (k, m, n)
    P = U.mT @ HV
    inner = (F * (P + P.mT) + G * (P - P.mT)) / 2
    if rank:
        inner[:, rank - 1, rank - 1] += (P.diagonal(dim1=1, dim2=2) * above).sum(1)
    grad = (U @ inner + (HV - U @ P) * ratio[:, None]) @ Vh
    return torch.where(finite[:, None, None], grad, 0).to(A.dtype)


@torch.library.custom_op(f"{NAMESPACE}::spectral_clip", mutates_args=())
def spectral_clip_op(
    stacks: list[Tensor], rank: int, threshold: float, method: str, tol: float, seed: int
) -> list[Tensor]:
    """The clipped stacks; rank = 0: at the threshold."""
    return _clip(stacks, rank, threshold, method, tol, seed)


@torch.library.custom_op(f"{NAMESPACE}::spectral_clip_backward", mutates_args=())
def spectral_clip_backward_op(stacks: list[Tensor], grads: list[Tensor], rank: int, threshold: float) -> list[Tensor]:
    with torch.no_grad(), full_precision(stacks):
        return [_pull_back(a, h, rank, threshold).contiguous() for a, h in zip(stacks, grads, strict=True)]


@spectral_clip_op.register_fake
def _(stacks: list[Tensor], rank: int, threshold: float, method: str, tol: float, seed: int) -> list[Tensor]:
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in stacks]


@spectral_clip_backward_op.register_fake
def _(stacks: list[Tensor], grads: list[Tensor], rank: int, threshold: float) -> list[Tensor]:
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in stacks]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[0])
    ctx.rank, ctx.threshold = inputs[1], inputs[2]


def _backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    found = opaque.gradients(ctx, grads, spectral_clip_backward_op, ctx.rank, ctx.threshold)
    return found, None, None, None, None, None


spectral_clip_op.register_autograd(_backward, setup_context=_setup)
spectral_clip_backward_op.register_autograd(opaque.refusal("spectral_clip"))


@spectral_clip_op.register_vmap
def _(info: Any, in_dims: Any, stacks: list[Tensor], *options: Any) -> Any:
    (A,) = opaque.mapped_first(info, in_dims[0], stacks, "spectral_clip")
    (x,) = spectral_clip_op([A.flatten(0, 1)], *options)
    return [x.view(A.shape)], [0]


@spectral_clip_backward_op.register_vmap
def _(info: Any, in_dims: Any, stacks: list[Tensor], grads: list[Tensor], *options: Any) -> Any:
    (A,) = opaque.mapped_first(info, in_dims[0], stacks, "spectral_clip")
    (H,) = opaque.mapped_first(info, in_dims[1], grads, "spectral_clip")
    (x,) = spectral_clip_backward_op([A.flatten(0, 1)], [H.flatten(0, 1)], *options)
    return [x.view(A.shape)], [0]


__all__ = ["METHODS", "method_of", "spectral_clip", "widest_block"]
