"""Rows C9 and C10: a step of Muon against torch.optim.Muon, and `orthogonalize` against Newton–Schulz in plain torch.

A result is compared with U f(S) V' in float64, f being the schedule's polynomial: every provider is held to what its
own coefficients should give. Operations are counted by torch, 2 a b c for a product of (a, b) and (b, c).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import schedules
from . import rivals_orthogonal as others
from . import training
from .cases import Case, Goal, Problem, gaussian, label
from .cases_step import Replay, gaussian_model, record
from .rivals import Tuned

SUBJECT = "orthogonalize"
MUON, PLAIN, COMPILED = "torch.optim.Muon", "plain torch, fp32", "torch.compile of it"
PYTORCH_OPTIMIZER, HEAVYBALL, GRAM = "pytorch-optimizer", "heavyball", "gram-newton-schulz"
SCHEDULE = "polar_express"
LIMIT = 1e-4  # relative, of a whole matrix: what float32 loses in five steps is a few 1e-6, in Gram space 3e-5
RIVALS = 5e-3  # of float32 rivals: their sums of millions of squares are off by 1e-4 and more, and with them all else
HALF = 0.05  # of rivals that compute in half precision
STEP_LIMIT, STEP_HALF = 0.03, 1.0  # of a step on gradients: rounding of singular values near zero is amplified too
SHORT = (64, 128, 256, 512, 1024, 2048)
WIDE, SQUARE = Goal(1.3), Goal(1.0)  # aspect 1:4 and 1:1
STACKS = ((64, 64, 256), (32, 128, 128), (16, 128, 512))
MOST_COMPILED = 1024  # short side up to which rivals beside plain torch are timed: beyond, products are all there is
HALF_AT = {HEAVYBALL: (512, 2048), GRAM: (128, 512)}  # compiling one takes long, and fp16 products on many CPUs too


def oracle(G: Tensor, one: schedules.Schedule) -> Tensor:
    """U f(S / ||S||) V' in float64 for G (..., m, n): from the eigenvectors of the Gram matrix of the shorter side."""
    if G.shape[-2] > G.shape[-1]:
        return oracle(G.mT, one).mT
    x = G.double()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-300)
    values, U = torch.linalg.eigh(x @ x.mT)
    s = values.clamp(min=0).sqrt()
    gain = torch.where(s > 0, torch.from_numpy(one(s.numpy())) / s.clamp(min=1e-300), one.slope)
    return ((U * gain[..., None, :]) @ U.mT) @ x


def direction_error(X: Any, truth: Tensor) -> float:
    """max over matrices of ||X - truth||_F / ||truth||_F; a wrong shape or a NaN is an infinite error."""
    if not isinstance(X, Tensor) or X.shape != truth.shape or not bool(X.isfinite().all()):
        return float("inf")
    away = torch.linalg.matrix_norm(X.double() - truth)
    return float((away / torch.linalg.matrix_norm(truth).clamp(min=1e-300)).max())


# -- C10


def orthogonalize_problem(G: Tensor, names: tuple[str, ...] = (PLAIN,)) -> Problem:
    """`orthogonalize` of G (m, n) or (k, m, n) with Frobenius normalization, and the same schedule elsewhere."""
    import spectral_kernels as sk

    one = schedules.schedule(SCHEDULE)
    truth = oracle(G, one)

    def error(X: Any) -> float:
        return direction_error(X, truth)

    def ours() -> Any:
        return sk.orthogonalize(G, SCHEDULE, normalizer="frobenius")

    makers: dict[str, Callable[[], Tuned]] = {
        PLAIN: lambda: Tuned(lambda: others.newton_schulz(G, one.steps), ""),
        COMPILED: lambda: others.compiled(G, one.steps),
        PYTORCH_OPTIMIZER: lambda: others.pytorch_optimizer(G, one.steps, lambda X: error(X) <= RIVALS),
        HEAVYBALL: lambda: others.heavyball(G),
        GRAM: lambda: others.gram_newton_schulz(G, one.steps),
    }
    checks: dict[str, Callable[[Any], float]] = {}
    if HEAVYBALL in names:
        its_own = oracle(G, schedules.schedule("youjiacheng_5"))
        checks[HEAVYBALL] = lambda X: direction_error(X, its_own)
    found = {name: makers[name]() for name in names}
    calls = {name: tuned.call for name, tuned in found.items() if tuned.call is not None}
    settings = {name: found[name].setting for name in calls}
    for name in calls.keys() & {HEAVYBALL, GRAM}:
        settings[name] += f", error {checks.get(name, error)(calls[name]()):.0e}"
    *copies, m, n = G.shape
    plain = others.products(m, n, len(one), copies[0] if copies else 1)
    work = {"ours": others.flops_of(ours), **{name: plain for name in calls}}
    if PYTORCH_OPTIMIZER in calls:
        work[PYTORCH_OPTIMIZER] = others.flops_of(calls[PYTORCH_OPTIMIZER])
    if GRAM in calls:
        work[GRAM] = others.flops_of(calls[GRAM])
    return Problem(
        ours=ours,
        rivals=calls,
        error=error,
        limit=LIMIT,
        limits={name: HALF if name in HALF_AT else RIVALS for name in calls},
        checks=checks,
        settings=settings,
        missing={name: tuned.setting for name, tuned in found.items() if tuned.call is None},
        flops=work["ours"],
        work=work,
    )


def shapes() -> list[tuple[int, ...]]:
    """(m, n) of aspect 1:4 and 1:1, and small ones as stacks."""
    return [shape for n in SHORT for shape in ((n, 4 * n), (n, n))] + list(STACKS)


def rivals_at(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Who is timed at a shape."""
    names: tuple[str, ...] = (PLAIN,)
    if min(shape[-2:]) <= MOST_COMPILED:
        names += (COMPILED, PYTORCH_OPTIMIZER)
    return names + tuple(name for name, at in HALF_AT.items() if shape == at)


def orthogonalize_cases() -> list[Case]:
    cases = []
    for shape in shapes():
        target = SQUARE if shape[-2] == shape[-1] else WIDE
        names = rivals_at(shape)

        def build(shape: tuple[int, ...] = shape, names: tuple[str, ...] = names) -> Problem:
            return orthogonalize_problem(gaussian(*shape), names)

        goals = {name: target if name == PLAIN else Goal() for name in names}
        cases.append(Case("C10", f"Gaussian {label(shape)}", build, goals, False, SUBJECT))
    return cases


# -- C9


@cache
def recorded_block(width: int, steps: int = 12, kept: int = 6) -> tuple[nn.Module, list[list[Tensor]]]:
    """The four matrices of one transformer block, and their gradients in the last `kept` of `steps` training steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = training.Transformer(width, layers=1, heads=width // 64)
    gradients = record(model, steps, kept)
    chosen = [i for i, (name, p) in enumerate(model.named_parameters()) if p.ndim == 2 and "blocks" in name]
    return holding([list(model.parameters())[i] for i in chosen]), [[g[i] for i in chosen] for g in gradients]


def holding(matrices: list[Any]) -> nn.Module:
    """A model of copies of these matrices."""
    model = gaussian_model([(1, *p.shape) for p in matrices])
    with torch.no_grad():
        for p, given in zip(model.parameters(), matrices, strict=True):
            p.copy_(given)
    return model


def step_error(step: Replay) -> float:
    """The largest error of the directions of a further step, all matrices, against the oracle of their momentum."""
    (group,) = step.optimizer.param_groups
    one = schedules.schedule([group["ns_coefficients"]] * group["ns_steps"])
    before = [p.detach().double() for p in group["params"]]
    step()
    errors = []
    for p, old in zip(group["params"], before, strict=True):
        buffer = step.optimizer.state[p]["momentum_buffer"].double()
        look = torch.lerp(p.grad.double(), buffer, group["momentum"])
        m, n = p.shape
        moved = (old - p.detach().double()) / (group["lr"] * max(1.0, m / n) ** 0.5)
        errors.append(direction_error(moved, oracle(look, one)))
    return max(errors)


@contextlib.contextmanager
def without_onednn(off: bool) -> Iterator[None]:
    """Torch without oneDNN: the bfloat16 products of processors for which oneDNN has none."""
    if not off:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch sets other backends' flags too and warns of them
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def bf16_products() -> str:
    """What this processor has for products in bfloat16."""
    found = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    for name, question in found.items():
        if getattr(torch.cpu, question, lambda: False)():
            return f"bf16 products in hardware ({name})"
    return "bf16 products in software"


def muon_problem(width: int, off: bool = False, lr: float = 0.02) -> Problem:
    """`sk.optim.Muon` and torch's, on copies of the same parameters and the same recorded gradients."""
    import spectral_kernels as sk

    recorded, gradients = recorded_block(width)

    def replay(kind: Any) -> Replay:
        parameters = list(holding(list(recorded.parameters())).parameters())
        return Replay(kind(parameters, lr=lr, weight_decay=0.0), parameters, gradients)

    ours, theirs = replay(sk.optim.Muon), replay(torch.optim.Muon)

    def call() -> Any:
        with without_onednn(off):
            return theirs()

    def error(_: Any) -> float:
        with without_onednn(off):
            return step_error(theirs)

    work = {"ours": others.flops_of(ours), MUON: others.flops_of(theirs)}
    how = "oneDNN off" if off else bf16_products()
    return Problem(
        ours=ours,
        rivals={MUON: call},
        error=lambda _: step_error(ours),
        limit=STEP_LIMIT,
        limits={MUON: STEP_HALF},
        checks={MUON: error},
        settings={MUON: f"{how}; its error {error(None):.0e}"},
        flops=work["ours"],
        work=work,
    )


def muon_cases() -> list[Case]:
    """GPT-2 small's block as it is here; a small one, also as where torch finds no fast bfloat16 products."""
    blocks = (
        ("a block of GPT-2 small, fp32", 768, False, Goal(50)),
        ("a block of width 192, fp32", 192, False, Goal()),
        ("a block of width 192, fp32, as without AVX-512", 192, True, Goal()),
    )
    return [
        Case("C9", name, partial(muon_problem, width, off), {MUON: goal}, False, SUBJECT)
        for name, width, off, goal in blocks
    ]
