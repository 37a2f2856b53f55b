"""`spectral_norm`: sigma_max of tensors, stacks and ragged lists, differentiable, to a stated accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.contracts import INFO, acc_dtype
from . import arguments, dense, power, triplet
from .arguments import Ragged, ragged
from .estimate import (
    BASIS_COLUMNS,
    BLOCK,
    MIN_READS,
    MOST_READS,
    Estimate,
    estimate,
    full_precision,
    sigma,
    tracked,
)

_PLAIN = (Tensor, torch.nn.Parameter)
METHODS = ("krylov", "power", "gram", "svd")
DENSE_FINISH = 1024  # shorter sides up to this finish by a dense method where the reads did not suffice


class AccuracyWarning(UserWarning):
    """The read budget ended before the tolerance was proved; the message names the bracket."""


def spectral_norm(
    A: Tensor | Sequence[Tensor],
    tol: float = 1e-3,
    *,
    dim: tuple[int, int] = (-2, -1),
    keepdim: bool = False,
    method: str = "krylov",
    steps: int | None = None,
    seed: int = 0,
    v0: Tensor | Sequence[Tensor] | None = None,
    return_block: bool = False,
) -> Any:
    """The largest singular value of every matrix: sigma_max(A) = max ||A x|| / ||x||.

    A: (..., m, n), any float dtype, device and strides, or a list of such (one dtype and device; one launch).
    Returns (...): float64 for float64 input, float32 otherwise; for a list of matrices one tensor (len(A),), for a
    list with stacks a list.
    tol: relative error of the result, in [16 eps, 1); docs/accuracy.md has the measured probability of a miss.
    method: "krylov" (block Krylov, one read of A a step), "power" (block power iteration on the same kernel), "gram"
    (repeated squaring of the Gram matrix in float64: at most tol above, never below), "svd" (torch.linalg).
    steps: exactly so many reads instead of tol; nothing is sent to the host, so the call can be captured in a CUDA
    graph.
    v0: a block (..., 4, side) from a former call with return_block=True; a slightly changed matrix then takes one or
    two reads. Its last row is replaced by a random one, keyed by (seed, shape).
    NaN entries give NaN, infinite ones inf, for that matrix alone; an empty matrix 0. The gradient is u v' of the final
    vectors. Not the spectral radius. Source: Musco and Musco 2015 (block Krylov); docs/accuracy.md (stop rule).
    """
    if isinstance(A, Tensor) and type(A) in _PLAIN and method == "krylov" and v0 is None and not return_block:
        value = _fast(A, tol, dim, steps, seed)
        if value is not None:
            return value[..., None, None] if keepdim else value
    batch = ragged(A, dim)
    arguments.check_choice("method", method, METHODS)
    seed = arguments.check_seed(seed)
    if steps is not None:
        steps = arguments.check_int("steps", steps, 1, 4096)
    if not batch.stacks:
        return (torch.empty(0), []) if return_block else torch.empty(0)
    tol = arguments.check_tol(tol, batch.stacks[0].dtype)
    blocks = None if v0 is None else _check_blocks(v0, batch)
    if method != "krylov" and (v0 is not None or return_block):
        raise ValueError(f"v0 and return_block go with method='krylov', not {method!r}")
    if steps is not None and method in ("gram", "svd"):
        raise ValueError(f"steps goes with method='krylov' or 'power', not {method!r}")

    triplet.check_transforms(batch.stacks)
    needs_grad = torch.is_grad_enabled() and any(a.requires_grad for a in batch.stacks)
    X = None
    if method in ("gram", "svd"):
        with full_precision(batch.stacks):
            values = dense.spectral_norms(batch.stacks, method, tol)
    elif needs_grad or triplet.must_be_opaque(batch.stacks):
        if blocks is not None or return_block:
            raise ValueError("v0 and return_block do not go with autograd, vmap or torch.compile")
        values, _, _ = triplet.spectral_norm_op(batch.stacks, tol, steps or 0, seed, method)
    elif method == "power":
        with full_precision(batch.stacks):
            powered = power.estimate(batch.stacks, tol=tol, steps=steps, seed=seed)
        values = finish(powered.estimate, batch.stacks, tol, steps)
    else:
        result = estimate(
            batch.stacks, tol=tol, steps=steps, seed=seed, V0=blocks, vectors=BLOCK if return_block else 0
        )
        values = finish(result, batch.stacks, tol, steps, cold=blocks is None)
        X = result.X
    out = _shape(values, batch, keepdim, dim)
    if not return_block:
        return out
    assert X is not None
    parts = batch.scatter(X, [BLOCK] * len(batch.stacks), [tracked(a) for a in batch.stacks])
    return out, parts if batch.is_list else parts[0]


def _fast(A: Tensor, tol: float, dim: Any, steps: int | None, seed: int) -> Tensor | None:
    """A plain tensor without gradient, default options: straight to the kernel. None: take the general way."""
    if (
        type(tol) is not float
        or steps is not None
        or dim != (-2, -1)
        or type(seed) is not int
        or not -(1 << 63) <= seed < 1 << 63
        or (A.requires_grad and torch.is_grad_enabled())
        or not 4e-6 <= tol < 1  # looser than any dtype's reach: tighter ones are checked on the general way
        or A.dtype not in arguments.FLOATS
        or A.ndim not in (2, 3)
        or A.layout != torch.strided
        or triplet.must_be_opaque((A,))
    ):
        return None
    kernel = registry.short_cut("krylov_norm", "block_krylov", A.device.type, A.dtype, BLOCK)
    if kernel is None:
        return None
    values = kernel(A, BLOCK, MOST_READS, BASIS_COLUMNS, tol, MIN_READS, seed)
    proved = not (values < 0).any() if A.ndim == 3 else not values.item() < 0
    return values if proved else None


def norms64(stacks: Sequence[Tensor], tol: float, seed: int) -> Tensor:
    """(N,) float64 norms: finite also where they lie above the range of the matrices' dtype."""
    if triplet.must_be_opaque(stacks):
        return triplet.spectral_norm_op(list(stacks), tol, 0, seed, "krylov")[0].double()
    result = estimate(stacks, tol=tol, seed=seed)
    values = finish(result, stacks, tol, None).double()
    return torch.where(values.isinf(), result.info[:, INFO["sigma"]], values)


def finish(result: Estimate, stacks: Sequence[Tensor], tol: float, steps: int | None, cold: bool = True) -> Tensor:
    """(N,) values; where the reads ended too early: a dense method for small matrices, else a warning."""
    values = sigma(result, stacks[0].dtype)
    info = result.info
    if steps is not None or info.shape[0] == 0 or bool(info[:, INFO["done"]].all()):
        return values
    unfinished = (info[:, INFO["done"]] == 0).tolist()
    first = 0
    for a in stacks:
        for i in range(a.shape[0]):
            j = first + i
            if not unfinished[j]:
                continue
            if min(a.shape[1:]) <= DENSE_FINISH:
                values[j] = dense.spectral_norms([a[i : i + 1]], "svd", tol)[0]
            else:
                _warn(result, j, a, tol, cold)
        first += a.shape[0]
    return values


def _warn(result: Estimate, j: int, a: Tensor, tol: float, cold: bool) -> None:
    from .certificates import upper_of_restarted

    row = result.info[j]
    lower = float(row[INFO["sigma"]])
    width = BLOCK if cold else 2 * BLOCK  # a warm start runs its kept rows beside as many fresh ones
    upper = upper_of_restarted(row.tolist(), tracked(a), width, fresh=BLOCK)
    warnings.warn(
        f"spectral_norm: {int(row[INFO['reads']])} reads did not prove tol={tol:g} for a {tuple(a.shape[1:])} matrix; "
        f"sigma_max lies in [{lower:.9g}, {upper:.9g}] (upper side with probability 1 - 1e-6)",
        AccuracyWarning,
        stacklevel=4,
    )


def _check_blocks(v0: Any, batch: Ragged) -> list[Tensor]:
    given = list(v0) if isinstance(v0, list | tuple) else [v0]
    if len(given) != len(batch.stacks):
        raise ValueError(f"v0 must hold one block per entry of A: {len(batch.stacks)}, not {len(given)}")
    out = []
    for v, a, shape in zip(given, batch.stacks, batch.batches, strict=True):
        wanted = (*shape, BLOCK, tracked(a))
        if not isinstance(v, Tensor):
            raise TypeError(f"v0 must be a tensor or a list of tensors, not {type(v).__name__}")
        if tuple(v.shape) != wanted or v.dtype != acc_dtype(a.dtype) or v.device != a.device:
            raise ValueError(
                f"v0 must have shape {wanted}, {acc_dtype(a.dtype)} on {a.device}, "
                f"not {tuple(v.shape)}, {v.dtype} on {v.device}"
            )
        out.append(v.reshape(a.shape[0], *wanted[-2:]))
    return out


def _shape(values: Tensor, batch: Ragged, keepdim: bool, dim: tuple[int, int]) -> Any:
    if batch.plain:
        return values[:, None, None] if keepdim else values
    parts = batch.scatter(values)
    if keepdim:
        parts = [p[..., None, None].movedim((-2, -1), dim) for p in parts]
    return parts if batch.is_list else parts[0]
