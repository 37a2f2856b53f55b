"""`orthogonalize`: G = U S V' becomes U f(S) V' with f near 1, by Newton–Schulz iterations or an exact SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.contracts import NAMESPACE, acc_dtype
from ..kernels.contracts_products import triples
from . import arguments, newton_schulz, opaque, triplet
from .arguments import ragged
from .estimate import full_precision
from .exact import amax, exponents, power, unit_svd
from .newton_schulz import Recipe, frobenius, inverse, iterate, norms, short_first
from .norm import norms64
from .schedules import Schedule


class OrthogonalizeInfo(NamedTuple):
    """What is known of a result, one number per matrix, in the shape of the batch; lists of such for a list."""

    norm: Any  # float64: what the matrix was divided by before the first step; 0 for zero, NaN or inf for such input
    defect: Any  # ||XX' - I||_F / sqrt(min(m, n)) of the result X, on its shorter side: root mean square of f(s)^2 - 1
    orthogonalized: Any  # bool: False for a zero matrix, which stays zero, and a non-finite one, which becomes NaN


def orthogonalize(
    G: Tensor | Sequence[Tensor],
    schedule: str | Schedule | Sequence[Any] = "polar_express",
    *,
    steps: int | None = None,
    method: str = "auto",
    normalizer: str = "auto",
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
    return_info: bool = False,
) -> Any:
    """U f(S) V' of the SVD G = U S V': every singular value near 1, as Muon wants it.

    G: (..., m, n), any float dtype, or a list of such; a tensor (a list) of G's shape and dtype comes back. schedule:
    the name of a published list of coefficients, a Schedule, or triples (a, b, c), a step each (docs/orthogonalize.md
    says which; `spectral-kernels schedules` lists them). steps: how many, by the schedule's own rule. A combination of
    schedule, steps, method and dtype that could flip a sign or diverge is refused (sk.schedules.validate).
    method: "standard" X <- aX + (bA + cA^2)X, A = XX'; "gram" iterates on the m x m matrix XX' of the shorter side,
    for wide or tall matrices; "svd" is exact, f = 1 (0 for values that are rounding), in float64; "auto" chooses
    between the first two. normalizer: what G is divided by first, so that singular values lie in (0, 1]: "frobenius",
    "schatten4" (the root of ||GG'||_F, never smaller than the largest singular value nor larger than the Frobenius
    norm, no further read; this is "auto"), or "spectral", the estimated norm, raised by 1 % (a few reads).
    compute_dtype: of the products; None: G's dtype, float32 for half inputs on CPUs. Scales do not matter, entries of
    1e-38 and 1e38 included: powers of two give the same bits. A matrix with NaN or infinite entries becomes NaN, alone;
    a zero matrix stays zero.
    return_info: also an OrthogonalizeInfo. The gradient is that of what is computed, polynomial and normalizer, by the
    steps in reverse, recomputed in float32 (float64 for such inputs); for "svd" that of the exact polar factor; for
    zero and non-finite matrices it is zero; not differentiable again.
    Source: Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar Express, arXiv 2505.16932).
    """
    batch = ragged(G)
    made = newton_schulz.recipe(schedule, steps, method, normalizer, compute_dtype)
    seed = arguments.check_seed(seed)
    if not batch.stacks:
        return ([], OrthogonalizeInfo([], [], [])) if return_info else []
    triplet.check_transforms(batch.stacks, "orthogonalize")
    opaque_ = triplet.must_be_opaque(batch.stacks)
    if method != "svd" and not opaque_:
        for x in batch.stacks:  # refuse before anything runs
            newton_schulz.way(made, short_first(x))
    needs_grad = torch.is_grad_enabled() and any(a.requires_grad for a in batch.stacks)
    run = orthogonalize_op if needs_grad or opaque_ else _orthogonalize
    parts, norm = run(batch.stacks, made.coefficients, method, normalizer, compute_dtype, seed)
    out = [x.reshape(*shape, *x.shape[1:]) for x, shape in zip(parts, batch.batches, strict=True)]
    result = out if batch.is_list else out[0]
    if not return_info:
        return result
    with torch.no_grad(), full_precision(parts):
        columns = norm, torch.cat([_defect(x.detach()) for x in parts]), torch.isfinite(norm) & (norm > 0)
    scattered = [batch.scatter(column) for column in columns]
    return result, OrthogonalizeInfo(*(s if batch.is_list else s[0] for s in scattered))


def _defect(X: Tensor) -> Tensor:
    """(k,) float64 ||XX' - I||_F / sqrt(m), m <= n."""
    k, m, n = short_first(X).shape
    if 0 in (k, m, n):
        return X.new_zeros(k, dtype=torch.float64)
    x = short_first(X).to(acc_dtype(X.dtype))
    gram = x @ x.mT
    gram.diagonal(dim1=1, dim2=2).sub_(1)
    return torch.linalg.matrix_norm(gram).double() / m**0.5


def _orthogonalize(
    stacks: list[Tensor],
    coefficients: list[float],
    method: str,
    normalizer: str,
    compute_dtype: torch.dtype | None,
    seed: int,
) -> tuple[list[Tensor], Tensor]:
    """A new stack for each, and (N,) float64 what every matrix was divided by."""
    with torch.no_grad(), full_precision(stacks):
        if method == "svd":
            parts = [_by_svd(a) for a in stacks]
            return [part for part, _ in parts], torch.cat([norm for _, norm in parts])
        made = Recipe(Schedule("given", tuple(triples(coefficients))), method, normalizer, compute_dtype)
        dtype = newton_schulz.products_dtype(made, stacks[0].dtype, stacks[0].device.type)
        X = [short_first(a) for a in stacks]
        unit: Tensor | None = None
        if stacks[0].dtype == torch.float64 != dtype:  # entries may lie beyond the range of the products
            unit = exponents(torch.cat([amax(x) for x in X]))
            X = [power(x, e[:, None, None]) for x, e in zip(X, unit.split([x.shape[0] for x in X]), strict=True)]
        scale, largest = norms(X, dtype)
        divisor = _divisor(X, scale, largest, normalizer, dtype, seed)
        out, used = iterate(made, X, torch.stack((scale, inverse(divisor)), 1))
        norm = 1 / used[:, 0] / used[:, 1]
        if unit is not None:
            norm = power(norm, -unit)
        usual = torch.isfinite(largest) & (largest > 0)
        bad: Tensor | None = None
        if not newton_schulz.bool_on_host(usual):
            bad, norm = ~torch.isfinite(largest), torch.where(usual, norm, largest)
        results, first = [], 0
        for a, y in zip(stacks, out, strict=True):
            k = a.shape[0]
            y = y.to(a.dtype)
            if bad is not None:
                y = y.masked_fill(bad[first : first + k, None, None], torch.nan)
            results.append((y if y.shape == a.shape else y.mT).contiguous())
            first += k
        return results, norm


def _divisor(
    X: Sequence[Tensor], scale: Tensor, largest: Tensor, normalizer: str, dtype: torch.dtype, seed: int
) -> Tensor:
    """(N,) float64: what scale * X is divided by before its first Gram matrix."""
    if normalizer == "spectral":
        margin = 1 + 2 * newton_schulz.SPECTRAL_TOL
        return norms64(list(X), newton_schulz.SPECTRAL_TOL, seed) * scale * margin
    half = dtype in (torch.bfloat16, torch.float16)
    if normalizer == "frobenius" or half:
        return torch.cat([frobenius(x, s) for x, s in zip(X, scale.split([x.shape[0] for x in X]), strict=True)])
    return torch.ones_like(largest)  # the Schatten-4 norm follows from the first Gram matrix


def _by_svd(A: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor, zero on the null space; (k,) the largest singular value."""
    if A.numel() == 0:
        return A.new_zeros(A.shape), A.new_zeros(A.shape[0], dtype=torch.float64)
    U, S, Vh, e, finite = unit_svd(A)
    x = (U * (_kept(S, A) > 0)[:, None]) @ Vh
    norm = torch.where(finite, power(S[:, 0], -e), amax(A))
    return torch.where(finite[:, None, None], x, torch.nan).to(A.dtype).contiguous(), norm


def _kept(S: Tensor, A: Tensor) -> Tensor:
    """Singular values, zero where they are rounding: at most max(m, n) eps of the largest."""
    return torch.where(S > max(A.shape[1:]) * torch.finfo(S.dtype).eps * S[:, :1], S, 0)


# ------------------------------------------------------------------------------------------------------- derivative


def _pull_back(A: Tensor, H: Tensor, coefficients: Sequence[float], method: str, normalizer: str, seed: int) -> Tensor:
    """The adjoint derivative of the orthogonalization at the stack A, applied to H.

    Of a step X' = (a + B) X, B = bA + cA^2, A = XX':  aH + BH + (E + E') X  with D = HX', E = bD + c (DA + AD); of
    X / t, t' = dt/dX:  (H - <H, X / t> t') / t.
    """
    if A.numel() == 0:
        return torch.zeros_like(A)
    if A.shape[1] > A.shape[2]:
        return _pull_back(A.mT, H.mT, coefficients, method, normalizer, seed).mT
    if method == "svd":
        return _polar_pull_back(A, H)
    acc = acc_dtype(A.dtype)
    scale, largest = norms([A], acc)
    usable = (torch.isfinite(largest) & (largest > 0))[:, None, None]
    scale = scale.to(acc)[:, None, None]
    X = torch.where(usable, A.to(acc) * scale, torch.eye(*A.shape[1:], dtype=acc, device=A.device))
    norm, slope = _normalizer(X, normalizer, seed)
    X = start = X / norm
    kept = []
    for a, b, c in triples(coefficients):
        gram = X @ X.mT
        B = b * gram + c * (gram @ gram)
        kept.append((X, gram, B))
        X = a * X + B @ X
    H = torch.where(usable, H.to(acc), 0)
    for (a, b, c), (X, gram, B) in zip(reversed(triples(coefficients)), reversed(kept), strict=True):
        D = H @ X.mT
        E = b * D + c * (D @ gram + gram @ D)
        H = a * H + B @ H + (E + E.mT) @ X
    H = (H - (H * start).sum((1, 2), keepdim=True) * slope) / norm
    return torch.where(usable, H * scale, 0).to(A.dtype)


def _normalizer(X: Tensor, normalizer: str, seed: int) -> tuple[Tensor, Tensor]:
    """(k, 1, 1) what X is divided by, and its derivative (k, m, n)."""
    if normalizer == "frobenius":
        norm = torch.linalg.matrix_norm(X)[:, None, None]
        return norm, X / norm
    if normalizer == "spectral":
        margin = 1 + 2 * newton_schulz.SPECTRAL_TOL
        values, u, v = triplet.triplets([X], newton_schulz.SPECTRAL_TOL, 0, seed)
        k, m, n = X.shape
        return values[:, None, None] * margin, u.view(k, m, 1) * v.view(k, 1, n) * margin
    gram = X @ X.mT
    # in float64: squares of squares may leave the range of float32
    norm = torch.linalg.vector_norm(gram, dim=(1, 2), dtype=torch.float64).sqrt().to(X.dtype)[:, None, None]
    return norm, gram @ X / norm**3


def _polar_pull_back(A: Tensor, H: Tensor) -> Tensor:
    """U (P - P') / (s_i + s_j) V' + U S^-1 U'H (I - VV'), P = U'HV: of UV', where A has full rank m <= n.

    Between the null space and itself it is taken as zero.
    """
    U, S, Vh, e, finite = unit_svd(A)
    S = _kept(S, A)
    H = H.double()
    UH = U.mT @ H
    P = UH @ Vh.mT
    total = S[:, :, None] + S[:, None]
    inner = torch.where(total > 0, (P - P.mT) / torch.where(total > 0, total, 1), 0)
    rest = (UH - P @ Vh) * torch.where(S > 0, 1 / torch.where(S > 0, S, 1), 0)[:, :, None]
    grad = power(U @ (inner @ Vh + rest), e[:, None, None])
    return torch.where(finite[:, None, None], grad, 0).to(A.dtype)


@torch.library.custom_op(f"{NAMESPACE}::orthogonalize", mutates_args=())
def orthogonalize_op(
    stacks: list[Tensor],
    coefficients: list[float],
    method: str,
    normalizer: str,
    compute_dtype: torch.dtype | None,
    seed: int,
) -> tuple[list[Tensor], Tensor]:
    """The orthogonalized stacks, and (N,) what their matrices were divided by."""
    return _orthogonalize(stacks, coefficients, method, normalizer, compute_dtype, seed)


@torch.library.custom_op(f"{NAMESPACE}::orthogonalize_backward", mutates_args=())
def orthogonalize_backward_op(
    stacks: list[Tensor], grads: list[Tensor], coefficients: list[float], method: str, normalizer: str, seed: int
) -> list[Tensor]:
    with torch.no_grad(), full_precision(stacks):
        return [
            _pull_back(a, h, coefficients, method, normalizer, seed).contiguous()
            for a, h in zip(stacks, grads, strict=True)
        ]


@orthogonalize_op.register_fake
def _(stacks, coefficients, method, normalizer, compute_dtype, seed):  # type: ignore[no-untyped-def]
    out = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in stacks]
    return out, stacks[0].new_empty(sum(a.shape[0] for a in stacks), dtype=torch.float64)


@orthogonalize_backward_op.register_fake
def _(stacks, grads, coefficients, method, normalizer, seed):  # type: ignore[no-untyped-def]
    return [torch.empty_like(a, memory_format=torch.contiguous_format) for a in stacks]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[0])
    _, ctx.coefficients, ctx.method, ctx.normalizer, _, ctx.seed = inputs
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grads: list[Tensor | None], _: Any) -> Any:
    options = (ctx.coefficients, ctx.method, ctx.normalizer, ctx.seed)
    return opaque.gradients(ctx, grads, orthogonalize_backward_op, *options), None, None, None, None, None


orthogonalize_op.register_autograd(_backward, setup_context=_setup)
orthogonalize_backward_op.register_autograd(opaque.refusal("orthogonalize"))


@orthogonalize_op.register_vmap
def _(info: Any, in_dims: Any, stacks: list[Tensor], *options: Any) -> Any:
    (A,) = opaque.mapped_first(info, in_dims[0], stacks, "orthogonalize")
    (x,), norm = orthogonalize_op([A.flatten(0, 1)], *options)
    return ([x.view(A.shape)], norm.view(A.shape[:2])), ([0], 0)


@orthogonalize_backward_op.register_vmap
def _(info: Any, in_dims: Any, stacks: list[Tensor], grads: list[Tensor], *options: Any) -> Any:
    (A,) = opaque.mapped_first(info, in_dims[0], stacks, "orthogonalize")
    (H,) = opaque.mapped_first(info, in_dims[1], grads, "orthogonalize")
    (x,) = orthogonalize_backward_op([A.flatten(0, 1)], [H.flatten(0, 1)], *options)
    return [x.view(A.shape)], [0]
