"""Modules that are linear in their weight: how to apply any weight of that shape, and its norm as an operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import scaling
from ..kernels.contracts import acc_dtype
from ..ops.norm import spectral_norm
from ..optim.modules import named_roles
from ..optim.roles import Role, matrices
from .measures import TOL

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = {nn.ConvTranspose1d: F.conv_transpose1d, nn.ConvTranspose2d: F.conv_transpose2d}
_TRANSPOSED |= {nn.ConvTranspose3d: F.conv_transpose3d}


def linear_modules(model: nn.Module) -> dict[str, tuple[nn.Module, Role]]:
    """Name -> (module, role of its weight) of the modules that `apply` serves."""
    roles = {id(entry.parameter): entry.role for entry in named_roles(model)}
    out = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, Tensor) and serves(module):
            role = roles[id(weight)]
            if isinstance(module, nn.Embedding) != (role.kind == "embedding"):  # tied: each use has its own norm
                role = named_roles(module)[0].role
            out[name] = module, role
    return out


def serves(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *_TRANSPOSED)
    return isinstance(module, kinds) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers: x W + b, W (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def apply(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """The module's output for this weight and input, without its bias and its hooks."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    if isinstance(module, nn.Embedding):
        return F.embedding(x, weight, module.padding_idx)
    if isinstance(module, CONVOLUTIONS):
        return module._conv_forward(x, weight, None)  # type: ignore[operator]
    if _is_conv1d(module):
        return x @ weight
    transposed = next(f for kind, f in _TRANSPOSED.items() if isinstance(module, kind))
    m: Any = module
    return transposed(x, weight, None, m.stride, m.padding, m.output_padding, m.groups, m.dilation)


def is_image(module: nn.Module) -> bool:
    """Features are (B, channels, *positions), one vector per input; else (..., n), one per position."""
    return isinstance(module, (*CONVOLUTIONS, *_TRANSPOSED))


def rows_of(x: Tensor, image: bool) -> Tensor:
    """(B, n) from features of any shape: one row per input of a convolution, per position of anything else."""
    x = x.detach().to(acc_dtype(x.dtype))
    return x.reshape(x.shape[0], -1) if image else x.reshape(-1, x.shape[-1] if x.ndim else 1)


def target_of(role: Role, update: bool) -> float:
    """Condition 1 for one matrix: sqrt(m / n); slices of a kernel as in scaling; embeddings sqrt(m)."""
    fan_out, fan_in = max(role.blocks, default=role.fan_out), role.fan_in
    if role.kind == "embedding":
        return scaling.rms_to_rms(fan_out, 1)
    if update:
        return scaling.normalized_factor(fan_out, fan_in, role.positions)
    return scaling.init_norm(fan_out, fan_in, role.positions)


def views(weight: Tensor, role: Role) -> list[Tensor]:
    """(..., fan_out, fan_in) of a matrix, convolution or embedding, in accumulation precision."""
    weight = weight.detach()
    found = [weight] if role.kind == "embedding" else matrices(weight, role)
    return [v.to(acc_dtype(v.dtype)) for v in found]


def norms(weights: Sequence[Tensor], roles: Sequence[Role], seed: int = 0) -> list[Tensor]:
    """Flat norms of every parameter's matrices (slices of a kernel: (positions * groups,)), one call per dtype.

    Matrices and slices: ||A||_2 to a relative 1e-4; embeddings: the longest row.
    """
    out: list[Tensor] = [torch.empty(0)] * len(weights)
    calls: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for i, (weight, role) in enumerate(zip(weights, roles, strict=True)):
        for view in views(weight, role):
            if role.kind == "embedding":
                out[i] = torch.linalg.vector_norm(view, dim=-1).amax().reshape(1)
            else:
                calls.setdefault((view.dtype, view.device), []).append((i, view))
    for held in calls.values():
        found = spectral_norm([view.flatten(0, -3) if view.ndim > 3 else view for _, view in held], TOL, seed=seed)
        for (i, _), value in zip(held, found, strict=True):
            out[i] = torch.cat([out[i].to(value), value.reshape(-1)])
    return out


def operator_norm(norms_of: Tensor, role: Role) -> Tensor:
    """() what no ||A h|| / ||h|| exceeds: the sum over the slices of a kernel, the largest of its groups."""
    if role.kind == "conv":
        return norms_of.view(role.positions, role.groups).sum(0).amax()
    return norms_of.amax()
