"""Rows C7 and M of the optimizer: a whole step over a real model's parameters against fused AdamW.

The gradients are those of consecutive steps of a real training run of the same shapes (GPT-2 small on characters),
replayed forwards and backwards: the momentum turns as it does early in training, where few matrices ask for a second
read. What a step costs where all of them do is a case of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..ops import engine
from . import rivals, training
from .cases import Case, Goal, Problem, relative_error

ADAMW = "AdamW(fused=True)"
STATE = "AdamW's state"
WARM, RECORDED = 12, 12  # training steps before, and those whose gradients are replayed
LIMIT = 0.01  # of the norms that a step divided by, row C8's worst case
CHECKED = 6  # matrices compared with their SVD


def gpt2_small() -> nn.Module:
    """The parameters of GPT-2 small (Radford et al. 2019): 12 blocks, width 768, 50257 tokens, tied readout."""
    model = training.Transformer(768, layers=12, heads=12)
    model.characters = nn.Embedding(50257, 768)
    model.positions = nn.Embedding(1024, 768)
    model.readout = nn.Linear(768, 50257, bias=False)
    for embedding in (model.characters, model.positions):
        nn.init.normal_(embedding.weight, std=0.02)
    model.readout.weight = model.characters.weight
    return model


def record(model: nn.Module, steps: int, kept: int, batch: int = 4) -> list[list[Tensor]]:
    """Gradients of the last `kept` of `steps` training steps, in the order of model.parameters()."""
    import spectral_kernels as sk

    run = training.task("transformer", width=8, batch=batch)  # for its batches
    run.model = model
    optimizer = sk.optim.SpectralOptimizer(sk.optim.param_groups(model, lr=0.02), lr=0.02)
    found: list[list[Tensor]] = []

    def keep(step: int) -> None:
        if step >= steps - kept:
            found.append([torch.empty_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])

    training.train(run, optimizer, steps, on_step=keep)
    return found


class Replay:
    """`optimizer.step()` on one set of recorded gradients after the other."""

    def __init__(self, optimizer: Any, parameters: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> None:
        self.optimizer, self.parameters = optimizer, list(parameters)
        self.sets: Iterator[Sequence[Tensor]] = itertools.cycle([*gradients, *gradients[-2:0:-1]])

    def __call__(self) -> Any:
        for p, g in zip(self.parameters, next(self.sets), strict=True):
            p.grad = g
        self.optimizer.step()
        return self.optimizer

    def reads_per_matrix(self, steps: int) -> float:
        """Mean over matrices with a tracked block and steps."""
        seen = []
        for _ in range(steps):
            self()
            seen += [info.reads for _, info in self.optimizer.last_step() if info.tracked]
        return float(torch.cat(seen).mean()) if seen else 0.0


def sigma_error(optimizer: Any, checked: int = CHECKED) -> float:
    """Largest relative error of the norms that the last step divided by, over some matrices of all shapes."""
    found = [(p, info) for p, info in optimizer.last_step() if info.tracked]
    chosen = found[:: max(1, len(found) // checked)]
    errors = []
    for p, info in chosen:
        M = optimizer.state[p]["momentum_buffer"]
        errors.append(relative_error(info.sigma, rivals.exact(M[None])))
    return max(errors)


def finite(parameters: Sequence[Tensor]) -> float:
    """The error of a rival's step: 0, or inf where a parameter is not finite any more."""
    return 0.0 if all(bool(p.isfinite().all()) for p in parameters) else float("inf")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        x.numel() * x.element_size() for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)
    )


def twice(step: Replay) -> Callable[[], Any]:
    """The same step where every matrix is read a second time: what the worst gradients would cost."""

    def call() -> Any:
        with mock.patch.multiple(engine, READS=2, TOL=1e-12):  # no error is small enough
            return step()

    return call


def step_problem(
    make: Callable[[], tuple[nn.Module, list[list[Tensor]]]], momentum: float = 0.95, again: bool = False
) -> Problem:
    """SpectralOptimizer.step() and AdamW's on copies of the same parameters and the same gradients."""
    import spectral_kernels as sk

    model, gradients = make()
    model = copy.deepcopy(model)
    groups = sk.optim.param_groups(model, lr=1e-3)
    ours = Replay(sk.optim.SpectralOptimizer(groups, lr=1e-3, momentum=momentum), list(model.parameters()), gradients)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    theirs = Replay(torch.optim.AdamW(copies, lr=1e-5, fused=True), copies, gradients)
    for _ in range(4):  # past the first, cold steps
        ours()
        theirs()
    reads = 2.0 if again else ours.reads_per_matrix(len(gradients))
    moved = sum(p.numel() * p.element_size() for p in model.parameters())
    return Problem(
        ours=twice(ours) if again else ours,
        rivals={ADAMW: theirs},
        error=sigma_error,
        limit=LIMIT,
        checks={ADAMW: lambda _: finite(copies)},
        settings={ADAMW: f"momentum {momentum:g}; {100 * (reads - 1):.0f} % of our matrices were read a second time"},
        bytes=6 * moved,
        reads=reads,
    )


def gaussian_model(shapes: Sequence[tuple[int, int, int]]) -> nn.Module:
    """A list of matrices (copies, m, n) as a model: for sizes that no training run fits here."""
    layers = [nn.Linear(n, m, bias=False) for k, m, n in shapes for _ in range(k)]
    return nn.ModuleList(layers)


@lru_cache(maxsize=1)  # 8 GB, shared by the cases
def recorded_gpt2() -> tuple[nn.Module, list[list[Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gpt2_small()
    return model, record(model, WARM + RECORDED, RECORDED)


def recorded_blocks() -> tuple[nn.Module, list[list[Tensor]]]:
    """The 48 matrices of its blocks alone: 340 MB."""
    model, gradients = recorded_gpt2()
    chosen = [i for i, (name, p) in enumerate(model.named_parameters()) if p.ndim == 2 and "blocks" in name]
    weights = list(model.parameters())
    picked = gaussian_model([(1, *weights[i].shape) for i in chosen])
    with torch.no_grad():
        for p, i in zip(picked.parameters(), chosen, strict=True):
            p.copy_(weights[i])
    return picked, [[step[i] for i in chosen] for step in gradients]


def step_cases() -> list[Case]:
    goals = {ADAMW: Goal(1.0)}
    return [
        Case("C7", "GPT-2 small, all parameters, fp32", lambda: step_problem(recorded_gpt2), goals, False, "step"),
        Case("C7", "GPT-2 small, its 48 matrices, fp32", lambda: step_problem(recorded_blocks), goals, False, "step"),
        Case(
            "C7",
            "GPT-2 small, its 48 matrices, fp32, no momentum",
            lambda: step_problem(recorded_blocks, 0.0),
            {ADAMW: Goal()},
            False,
            "step",
        ),
        Case(
            "C7",
            "GPT-2 small, its 48 matrices, fp32, every one read twice",
            lambda: step_problem(recorded_blocks, again=True),
            {ADAMW: Goal()},
            False,
            "step",
        ),
    ]


def state_share(width: int = 256) -> float:
    """Bytes of our state over AdamW's, for a transformer of this width."""
    import spectral_kernels as sk

    run = training.task("transformer", width=width)
    run.loss(0).backward()
    ours = sk.optim.SpectralOptimizer(sk.optim.param_groups(run.model), lr=1e-3)
    theirs = torch.optim.AdamW(run.model.parameters())
    ours.step()
    theirs.step()
    return state_bytes(ours) / state_bytes(theirs)


def state_cases() -> list[tuple[Case, int]]:
    """(case, width) of row M."""

    def build() -> Problem:
        raise NotImplementedError("row M is counted, not timed")

    return [
        (Case("M", f"transformer, width {width}", build, {STATE: Goal(0.55, "memory")}, subject="step"), width)
        for width in (256, 768)
    ]
