"""Other ways to orthogonalize matrices: each as fast as it can be had; its setting says what it computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .rivals import Tuned
from .timer import Clock, interleave, spread

Triples = Sequence[tuple[float, float, float]]


def newton_schulz(G: Tensor, triples: Triples) -> Tensor:
    """X <- aX + (bA + cA²)X, A = XX', from X = G / ||G||_F, for G (m, n) or (k, m, n): three products a step."""
    X = G / torch.linalg.matrix_norm(G, keepdim=True).clamp(min=1e-30)
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    add: Callable[..., Tensor] = torch.addmm if X.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        A = X @ X.mT
        X = add(X, add(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


def products(m: int, n: int, steps: int, copies: int = 1) -> float:
    """Floating point operations of `newton_schulz`, 2 a b c for a product of (a, b) and (b, c)."""
    short, long = min(m, n), max(m, n)
    return 2.0 * copies * steps * (2 * short**2 * long + short**3)


def flops_of(call: Callable[[], Any]) -> float:
    """Operations of all products of a call, as torch counts them: 2 a b c each; 0 for calls that torch does not see."""
    from torch.utils.flop_counter import FlopCounterMode

    def updated(_: Any, a: Any, b: Any, *args: Any, **options: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: updated}) as counter:
        call()
    return float(counter.get_total_flops())


def installed(name: str) -> Any:
    """The module, or None; rivals are optional, so they are never imported by name."""
    return import_module(name) if importlib.util.find_spec(name.partition(".")[0]) is not None else None


def compiled(G: Tensor, triples: Triples) -> Tuned:
    """`newton_schulz` under torch.compile; shapes are dynamic, so that few compilations serve all of them."""
    call = torch.compile(newton_schulz, dynamic=True)
    try:
        call(G, triples)
    except Exception as failure:  # no C++ compiler, or a Python that it does not know
        return Tuned(None, f"torch.compile fails here: {type(failure).__name__}")
    return Tuned(lambda: call(G, triples), "")


def pytorch_optimizer(
    G: Tensor, triples: Triples, accurate: Callable[[Any], bool], clock: Clock | None = None
) -> Tuned:
    """Its Newton–Schulz in float32 with these coefficients: the faster of its two forms, where both are accurate."""
    theirs = installed("pytorch_optimizer.optimizer.utils.matrix")
    if theirs is None:
        return Tuned(None, "pytorch-optimizer is not installed")
    options: dict[str, Any] = {"num_steps": len(triples), "weights": list(triples), "dtype": torch.float32}
    forms: dict[str, Callable[[], Any]] = {
        "its standard form, fp32": lambda: theirs.zero_power_via_newton_schulz_5(G, **options),
        "its Gram form, fp32": lambda: theirs.zero_power_via_gram_newton_schulz(G, **options),
    }
    sound = {name: call for name, call in forms.items() if accurate(call())}
    if not sound:
        return Tuned(None, "neither of its two forms is accurate in float32")
    times = interleave(sound, seconds=0.3, min_rounds=2, max_rounds=10, clock=clock)
    fastest = min(sound, key=lambda name: spread(times[name]).median)
    return Tuned(sound[fastest], fastest)


def heavyball(G: Tensor) -> Tuned:
    """Its default iteration, compiled as it compiles: bfloat16 and the coefficients youjiacheng_5, both fixed in it."""
    theirs = installed("heavyball.utils")
    if theirs is None:
        return Tuned(None, "heavyball is not installed")
    if theirs.compile_mode is not None:
        theirs.compile_mode = "default"  # its own choice tunes for GPUs
    try:
        theirs.zeropower_via_newtonschulz5(G)
        how = "not compiled" if theirs.compile_mode is None else "compiled"
    except Exception as failure:
        theirs.compile_mode = None
        how = f"not compiled: {type(failure).__name__}"
    return Tuned(lambda: theirs.zeropower_via_newtonschulz5(G), f"its bf16 and youjiacheng_5, {how}")


def gram_newton_schulz(G: Tensor, triples: Triples) -> Tuned:
    """The class of gram-newton-schulz without its GPU kernels; float16 is fixed in it."""
    theirs = installed("gram_newton_schulz")
    if theirs is None:
        return Tuned(None, "gram-newton-schulz is not installed")
    call = theirs.GramNewtonSchulz(
        ns_use_kernels=False, ns_coefficients=[list(t) for t in triples], compile_kwargs=None
    )
    return Tuned(lambda: call(G), "its fp16, torch's products, not compiled")
