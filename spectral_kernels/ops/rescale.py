"""`spectral_norm_`: a weight set to a spectral norm, in place."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import scaling
from ..kernels.contracts import acc_dtype
from . import arguments
from .arguments import ragged
from .norm import norms64

MODES = ("normalize", "cap")


def spectral_norm_(
    W: Any, target: float | str = 1.0, *, mode: str = "normalize", tol: float = 1e-3, seed: int = 0
) -> Any:
    """Rescale W in place so that ||W||_2 = target (mode="normalize"), or at most target (mode="cap"), within tol.

    W: (..., m, n) or a list of such; every matrix is rescaled by its own norm. target: a positive number, or the
    name of a rule of shapes ("rms_to_rms" = sqrt(fan_out / fan_in), "original", "match_rms_adamw"). Like torch.nn.init
    functions it records no gradient, and returns W. A zero matrix stays zero; a matrix with a NaN or an infinite entry
    is left as it is, with a warning.
    """
    batch = ragged(W)
    arguments.check_choice("mode", mode, MODES)
    if isinstance(target, numbers.Real):
        arguments.check_number("target", target, 0.0, above=True)
    elif not isinstance(target, str):
        raise TypeError(f"target must be a number or a rule name, not {type(target).__name__}")
    elif target not in scaling.RULES:
        raise ValueError(f"target must be a number or one of {', '.join(scaling.RULES)}, not {target!r}")
    if not batch.stacks:
        return W
    tol, seed = arguments.check_tol(tol, batch.stacks[0].dtype), arguments.check_seed(seed)
    tensors = list(W) if batch.is_list else [W]
    with torch.no_grad():
        batch = ragged([w.detach() for w in tensors])
        for w, norm in zip(tensors, batch.scatter(norms64(batch.stacks, tol, seed)), strict=True):
            _rescale(w, norm, target, mode)
    return W


def _rescale(w: Tensor, norm: Tensor, target: Any, mode: str) -> None:
    if w.numel() == 0:
        return
    bad = ~torch.isfinite(norm)
    if w.device.type == "cpu" and not torch.compiler.is_compiling() and bool(bad.any()):
        warnings.warn(
            f"spectral_norm_: {int(bad.sum())} of {norm.numel()} matrices of shape {tuple(w.shape[-2:])} hold NaN or "
            "infinite entries and were left as they are",
            stacklevel=3,
        )
    wanted = scaling.target(target, w.shape[-2], w.shape[-1])
    usable = ~bad & (norm > 0)
    if mode == "cap":
        usable &= norm > wanted
    factor = torch.where(usable, wanted / torch.where(usable, norm, torch.ones_like(norm)), torch.ones_like(norm))
    # two factors, the first a power of two: their product may leave the range of the dtype though w * factor does not
    exponent = torch.frexp(factor).exponent
    mantissa = torch.ldexp(factor, -exponent)
    limit = math.floor(math.log2(torch.finfo(acc_dtype(w.dtype)).max)) - 1
    first = exponent.clamp(-limit, limit)
    scaled = w.to(acc_dtype(w.dtype)) * torch.ldexp(torch.ones_like(factor), first)[..., None, None].to(
        acc_dtype(w.dtype)
    )
    rest = torch.ldexp(mantissa, exponent - first)[..., None, None].to(acc_dtype(w.dtype))
    w.copy_(torch.where(usable[..., None, None], (scaled * rest).to(w.dtype), w))
