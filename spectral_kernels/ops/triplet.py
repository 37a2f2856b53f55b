"""The opaque, differentiable op behind `spectral_norm`: values and final vectors, for autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels import registry
from ..kernels.contracts import NAMESPACE, acc_dtype, counts
from ..kernels.reference import runs
from .estimate import full_precision


def must_be_opaque(stacks: Sequence[Tensor]) -> bool:
    """True where Python below must not see the tensors: while compiling, under functorch, for fake and meta tensors."""
    return torch.compiler.is_compiling() or any(
        type(a) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(a)
        or a.device.type == "meta"
        for a in stacks
    )


def check_transforms(stacks: Sequence[Tensor], name: str = "spectral_norm") -> None:
    """Refuse what would go wrong silently or obscurely: torch.func's derivatives and forward-mode tangents."""
    if torch.compiler.is_compiling():
        return
    for a in stacks:
        level = a
        while torch._C._functorch.is_functorch_wrapped_tensor(level):
            if torch._C._functorch.is_gradtrackingtensor(level):
                raise RuntimeError(
                    f"{name} does not go with torch.func.grad, vjp or jvp; torch.autograd.grad and torch.vmap work"
                )
            level = torch._C._functorch.get_unwrapped(level)
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None:
            raise RuntimeError(f"{name} has no forward-mode derivative; reverse mode works")


def triplets(
    stacks: Sequence[Tensor],
    tol: float,
    steps: int,
    seed: int,
    method: str = "krylov",
    V0: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """values (N,), flat left (m_j) and right (n_j) vectors, acc dtype, unit or zero: one more read than the value."""
    from . import norm, power
    from .estimate import BLOCK, estimate, oriented

    A = [oriented(a) for a in stacks]
    acc, N = acc_dtype(A[0].dtype), counts(A)
    n = [a.shape[2] for a in A for _ in range(a.shape[0])]
    if N == 0:
        return tuple(A[0].new_empty(0, dtype=acc) for _ in range(3))  # type: ignore[return-value]
    if method == "power":
        run = power.estimate(stacks, tol=tol, steps=steps or None, seed=seed)
        values = norm.finish(run.estimate, stacks, tol, steps or None)
        x = torch.cat([v[:: BLOCK].reshape(-1) for v in _rows(run.V, n, BLOCK)])
    else:
        result = estimate(stacks, tol=tol, steps=steps or None, seed=seed, V0=V0, vectors=1)
        values = norm.finish(result, stacks, tol, steps or None)
        x = result.X
    # the other side: y = A x / ||A x||, at the matrix's own scale so that nothing leaves the range
    words = registry.words(A[0].device.type, A[0].dtype, 1)
    scale = unit_scale(values)
    _, S, _, y = words.gram_matvec(A, x, scale.to(acc), None, 1, False, True)
    length = S[:, 0, 0].sqrt()
    usable = torch.isfinite(values) & (length > 0)
    factor = torch.where(usable, 1 / torch.where(usable, length, torch.ones_like(length)), torch.zeros_like(length))
    m = [a.shape[1] for a in A for _ in range(a.shape[0])]
    y = torch.nan_to_num(y) * _per_matrix(factor.to(acc), m)
    x = x * _per_matrix(usable.to(acc), n)
    # give the long and the short side back as left and right
    left, right, at_x, at_y = [], [], 0, 0
    for a, o in zip(stacks, A, strict=True):
        k, long, short = o.shape
        ys, xs = y[at_y : at_y + k * long], x[at_x : at_x + k * short]
        at_y, at_x = at_y + k * long, at_x + k * short
        swapped = o is not a
        left.append(xs if swapped else ys)
        right.append(ys if swapped else xs)
    assert values.shape == (N,)
    return values, torch.cat(left), torch.cat(right)


def _rows(flat: Tensor, n: list[int], b: int) -> list[Tensor]:
    """(count * b, size) views, one per run of equal sizes."""
    out, offset = [], 0
    for _, count, size in runs(n):
        out.append(flat[offset * b : (offset + count * size) * b].view(count * b, size))
        offset += count * size
    return out


def unit_scale(values: Tensor) -> Tensor:
    """(N,) powers of two that bring the values near 1, float64; within what an acc multiplier can hold."""
    v = torch.where(torch.isfinite(values) & (values > 0), values, torch.ones_like(values)).double()
    limit = 126 if values.dtype == torch.float32 else 1000
    return torch.ldexp(torch.ones_like(v), (-torch.frexp(v).exponent).clamp(-limit, limit))


def _per_matrix(values: Tensor, sizes: list[int]) -> Tensor:
    repeats = torch.tensor(sizes, dtype=torch.int64, device=values.device)
    return torch.repeat_interleave(values, repeats, output_size=sum(sizes))


@torch.library.custom_op(f"{NAMESPACE}::spectral_norm", mutates_args=())
def spectral_norm_op(
    stacks: list[Tensor], tol: float, steps: int, seed: int, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """values (N,), left (sum m_j,), right (sum n_j,) of a ragged list; steps = 0: as many as tol needs."""
    with torch.no_grad(), full_precision(stacks):
        return triplets(stacks, tol, steps, seed, method)


@spectral_norm_op.register_fake
def _(stacks: list[Tensor], tol: float, steps: int, seed: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    acc, like = acc_dtype(stacks[0].dtype), stacks[0]
    m, n = (sum(a.shape[0] * a.shape[side] for a in stacks) for side in (1, 2))
    return tuple(like.new_empty((size,), dtype=acc) for size in (counts(stacks), m, n))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.shapes = [(tuple(a.shape), a.dtype) for a in inputs[0]]
    ctx.save_for_backward(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gs: Tensor | None, gu: Tensor | None, gv: Tensor | None) -> Any:
    if gu is not None or gv is not None:
        raise RuntimeError(
            "spectral_norm: its gradient u v' is not differentiable again (double backward), nor are the"
            " singular vectors"
        )
    if gs is None:
        return [None] * len(ctx.shapes), None, None, None, None
    u, v = ctx.saved_tensors
    grads, at, at_u, at_v = [], 0, 0, 0
    for (k, m, n), dtype in ctx.shapes:
        us, vs = u[at_u : at_u + k * m].view(k, m, 1), v[at_v : at_v + k * n].view(k, 1, n)
        grads.append((gs[at : at + k].view(k, 1, 1) * us * vs).to(dtype))
        at, at_u, at_v = at + k, at_u + k * m, at_v + k * n
    return grads, None, None, None, None


spectral_norm_op.register_autograd(_backward, setup_context=_setup)


@spectral_norm_op.register_vmap
def _(info: Any, in_dims: Any, stacks: list[Tensor], tol: float, steps: int, seed: int, method: str) -> Any:
    if len(stacks) != 1:
        raise NotImplementedError("torch.vmap over spectral_norm takes a tensor, not a list: pass the list directly")
    A, dim = stacks[0], in_dims[0][0]
    A = A.movedim(dim, 0)  # (B, k, m, n)
    B, k, m, n = A.shape
    s, u, v = spectral_norm_op([A.reshape(B * k, m, n)], tol, steps, seed, method)
    return (s.view(B, k), u.view(B, k * m), v.view(B, k * n)), (0, 0, 0)
