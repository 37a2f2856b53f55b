"""`spectral_step_`: Eq. 17 of *A Spectral Condition for Feature Learning*, in place, for tensors and lists."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import scaling
from . import arguments
from .arguments import check_choice
from .engine import Entry, take
from .layout import Layout
from .newton_schulz import Recipe, plain, recipe
from .retract import retract_
from .schedules import checked
from .state import Options, direction_of, prepare

DIRECTIONS = ("normalize", "clip", "orthogonalize", "frobenius")
NONFINITE = ("skip", "strict", "propagate")
SAFETY = ("upper",)
MOST_COLUMNS = 128  # of a block that is asked for


def check_options(
    *,
    momentum: Any,
    direction: Any,
    rule: Any,
    safety: Any,
    retract: Any,
    nonfinite: Any,
    block: Any,
    rank: Any = None,
    threshold: Any = None,
    schedule: Any = None,
    momentum_dtype: Any = None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, what was given and what is allowed."""
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum must be a number, not {type(momentum).__name__}")
    if not 0.0 <= float(momentum) < 1.0:
        raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
    check_choice("direction", direction, DIRECTIONS)
    check_target("rule", rule)
    if retract is not None:
        check_target("retract", retract)
    if safety is not None:
        check_choice("safety", safety, SAFETY)
    check_choice("nonfinite", nonfinite, NONFINITE)
    _check_clip(direction, rank, threshold, safety)
    if schedule is not None and direction != "orthogonalize":
        raise ValueError(f"schedule goes with direction='orthogonalize', not with {direction!r}")
    if block is not None:
        arguments.check_int("block", block, 2 if rank is None else max(2, rank), MOST_COLUMNS)
    if momentum_dtype is not None and momentum_dtype not in arguments.FLOATS:
        raise ValueError(f"momentum_dtype must be a float dtype, not {momentum_dtype}")


def check_target(name: str, value: Any) -> None:
    """A rule of shapes by name, or a number above 0."""
    if isinstance(value, str):
        check_choice(name, value, scaling.RULES)
    else:
        arguments.check_number(name, value, 0.0, above=True)


def _check_clip(direction: str, rank: Any, threshold: Any, safety: Any) -> None:
    if safety is not None and direction in ("clip", "orthogonalize"):
        raise ValueError(f"safety={safety!r} goes with direction='normalize', not with {direction!r}")
    if direction != "clip":
        for name, value in (("rank", rank), ("threshold", threshold)):
            if value is not None:
                raise ValueError(f"{name}={value} goes with direction='clip', not with {direction!r}")
        return
    if (rank is None) == (threshold is None):
        given = "neither" if rank is None else f"rank={rank} and threshold={threshold}"
        raise ValueError(f"direction='clip' takes one of rank and threshold, {given} given")
    if rank is not None:
        arguments.check_int("rank", rank, 1, None)
    else:
        arguments.check_number("threshold", threshold, 0.0, above=True)


def recipe_of(direction: str, schedule: Any) -> Recipe | None:
    """How an update is orthogonalized, None for other directions; ValueError where the schedule is not safe."""
    return _recipe(plain(schedule)) if direction == "orthogonalize" else None


@lru_cache(maxsize=64)
def _recipe(schedule: Any) -> Recipe:
    made = recipe("polar_express" if schedule is None else schedule, fast=True)
    checked(made.schedule, None, torch.float32, "standard", None)
    return made


def check_rate(name: str, value: Any) -> None:
    """A number >= 0, or a tensor with one element; the value of one on an accelerator is not looked at."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if value.device.type != "cpu":
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a one-element tensor, not {type(value).__name__}")
    if not (float(value) >= 0.0 and math.isfinite(float(value))):
        words = "learning rate" if name == "lr" else name  # as torch says it
        raise ValueError(f"Invalid {words}: {value} (a finite number of at least 0 is allowed)")


def check_gradient(param: Tensor, grad: Tensor, who: str, name: str) -> None:
    """Raise RuntimeError, in torch's words where torch has some, unless this gradient can move this parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{who} does not support sparse gradients ({name} has one of layout {grad.layout})")
    if param.is_complex() or grad.is_complex():
        raise RuntimeError(f"{who} does not support complex parameters ({name} is {param.dtype})")
    if param.dtype not in arguments.FLOATS or grad.dtype not in arguments.FLOATS:
        raise RuntimeError(f"{who} serves float32, float64, bfloat16 and float16, not {param.dtype} ({name})")
    if type(param).__name__ == "DTensor" or type(grad).__name__ == "DTensor":
        raise RuntimeError(f"{who} does not serve DTensors yet ({name}); sharded parameters need sk.distributed")
    if grad.shape != param.shape:
        raise RuntimeError(f"the gradient of {name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}")
    if grad.device != param.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}, the parameter on {param.device}")


def guard(entries: Sequence[Entry], names: Sequence[str], nonfinite: str, error_if_nonfinite: bool) -> None:
    """Look at the gradients before anything moves: one read of them, and with error_if_nonfinite one host read."""
    if not entries or not (error_if_nonfinite or nonfinite == "strict"):
        return
    finite = [torch.isfinite(x) for x in torch._foreach_norm([e.grad for e in entries], math.inf)]
    if error_if_nonfinite:
        bad = [name for name, ok in zip(names, finite, strict=True) if not bool(ok)]
        if bad:
            raise RuntimeError(f"non-finite gradients of {', '.join(bad)}; nothing was changed")
    if nonfinite == "strict":
        for entry, ok in zip(entries, finite, strict=True):
            entry.skip = ~ok


def spectral_step_(
    W: Any,
    G: Any,
    lr: float | Tensor,
    *,
    momentum: float = 0.95,
    nesterov: bool = False,
    direction: str = "normalize",
    rank: int | None = None,
    threshold: float | None = None,
    schedule: Any = None,
    rule: str | float = "rms_to_rms",
    weight_decay: float | Tensor = 0.0,
    num_heads: int | None = None,
    split_sizes: Sequence[int] | None = None,
    retract: str | float | None = None,
    safety: str | None = None,
    nonfinite: str = "skip",
    error_if_nonfinite: bool = False,
    maximize: bool = False,
    block: int | None = None,
    momentum_dtype: torch.dtype | None = None,
    seed: int = 0,
    state: Any = None,
    return_info: bool = False,
) -> Any:
    """W <- (1 - lr weight_decay) W - lr rule(m, n) M / ||M||, M <- momentum M + G; in place, W is returned.

    W, G: tensors (..., m, n) = (..., fan_out, fan_in) or lists of such, one device per list; every matrix has its own
    norm. direction: "normalize" divides by the spectral norm (Eq. 17), "frobenius" by the Frobenius norm; "clip" puts
    D = sum of min(sigma_i / tau, 1) u_i v_i' in the place of M / ||M||, tau the singular value number `rank` (1 to
    min(m, n): from Eq. 17 to the polar factor) or `threshold` (docs/clip.md); "orthogonalize" puts
    U f(S) V' there, by `schedule`, "polar_express" if None (docs/orthogonalize.md). rule:
    "rms_to_rms" = sqrt(m / n), "original", "match_rms_adamw", "none", or a number. nesterov: M + the look-ahead
    momentum M + G. num_heads, split_sizes: blocks of rows that are matrices of their own. retract: afterwards every
    matrix is set to this spectral norm (a number or a rule). safety="upper" divides by an upper bound of the norm that
    always holds. state: a dict (a list of dicts), empty at first, filled in place with tensors; without one every call
    is a first step. block: directions that are followed per matrix, by default 4, for clip rank + min(rank, 16), or 32
    with a threshold: where more values exceed it, tau is the last one followed, and info says so.

    The norm is a lower estimate, on average 1 to 2 reads of M; docs/tracking.md has its measured errors. A W whose
    gradient or new momentum is not finite stays bit for bit, non-finite entries do not enter M; nonfinite="strict"
    scans first and keeps the state too, "propagate" does what torch's optimizers do; error_if_nonfinite raises
    RuntimeError before anything changes. return_info: also a Result per tensor (info, upper bounds of the norm, size
    of the update; ops/engine.py).
    """
    is_list = isinstance(W, list | tuple)
    weights, grads = (list(W), list(G)) if is_list else ([W], [G])
    states = [{} for _ in weights] if state is None else list(state) if is_list else [state]
    if not (len(weights) == len(grads) == len(states)):
        raise ValueError(f"{len(weights)} weights, {len(grads)} gradients and {len(states)} states do not match")
    check_options(
        momentum=momentum, direction=direction, rule=rule, safety=safety, retract=retract, nonfinite=nonfinite,
        block=block, rank=rank, threshold=threshold, schedule=schedule, momentum_dtype=momentum_dtype,
    )  # fmt: skip
    check_rate("lr", lr)
    check_rate("weight_decay", weight_decay)
    arguments.check_seed(seed)
    layout = Layout("matrix", num_heads=num_heads, split_sizes=None if split_sizes is None else tuple(split_sizes))
    options = Options(
        float(momentum), nesterov, direction_of(direction, rank), maximize, nonfinite == "propagate",
        safety == "upper", block, seed, rank, None if threshold is None else float(threshold),
        recipe_of(direction, schedule),
    )  # fmt: skip
    names = [f"W[{i}]" if is_list else "W" for i in range(len(weights))]
    for name, w, g in zip(names, weights, grads, strict=True):
        arguments.check_matrix(w, name)
        if not isinstance(g, Tensor):
            raise TypeError(f"the gradient of {name} must be a torch.Tensor, not {type(g).__name__}")
        if w.device != weights[0].device:
            raise ValueError(
                f"a list must lie on one device: {names[0]} is on {weights[0].device}, {name} on {w.device}"
            )
        check_gradient(w, g, "spectral_step_", name)
        layout.check(w.shape, name)
        short = min((min(m, n) for _, m, n in layout.sides(w.shape)), default=0)
        if rank is not None and w.numel() and rank > short:
            raise ValueError(f"rank must be 1 to min(m, n) = {short} for {name} of shape {tuple(w.shape)}, not {rank}")
    decay = lr * weight_decay
    entries = [
        Entry(w, g, s, layout, layout.factors(w.shape, rule), lr, decay)
        for w, g, s in zip(weights, grads, states, strict=True)
    ]
    guard(entries, names, nonfinite, error_if_nonfinite)
    for entry in entries:
        prepare(entry.param, entry.state, layout, options, momentum_dtype)
    outcome = take(entries, options)
    if retract is not None:
        retract_([(e.param, e.state, layout, retract) for e in entries], seed)
    if not return_info:
        return W
    results = outcome.results()
    return W, [results[i] for i in range(len(entries))] if is_list else results[0]
