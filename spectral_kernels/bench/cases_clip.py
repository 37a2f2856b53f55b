"""Row C11: a whole step with clipped singular values against fused AdamW and against Muon in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case, Goal, Problem
from .cases_step import ADAMW, Replay, finite, gaussian_model, recorded_blocks
from .runs import Muon

MUON = "Muon, fp32 Newton–Schulz"
LIMIT = 0.1  # by which the largest singular value of a direction may exceed 1
CHECKED = 4  # matrices whose direction is decomposed
BLOCK = 4  # matrices of one transformer block
Made = tuple[nn.Module, list[list[Tensor]]]


@lru_cache(maxsize=1)
def two_blocks() -> Made:
    """The first 8 of the 48 matrices: a step of Muon over all of them takes too long here."""
    model, gradients = recorded_blocks()
    picked = list(model.parameters())[: 2 * BLOCK]
    part = gaussian_model([(1, *p.shape) for p in picked])
    with torch.no_grad():
        for p, q in zip(part.parameters(), picked, strict=True):
            p.copy_(q)
    return part, [step[: 2 * BLOCK] for step in gradients]


def excess(step: Callable[[], Any], lr: float) -> float:
    """How far the largest singular value of the directions of a further step is from 1, at most."""
    optimizer = step.optimizer  # type: ignore[attr-defined]
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    chosen = weights[:: max(1, len(weights) // CHECKED)]
    before = [p.detach().clone() for p in chosen]
    step()
    norms = [
        float(torch.linalg.matrix_norm((old.double() - p.detach().double()) / lr, 2))
        for old, p in zip(before, chosen, strict=True)
    ]
    return max(abs(norm - 1) for norm in norms)


def clip_problem(make: Callable[[], Made], rank: int, rival: str) -> Problem:
    """SpectralOptimizer(direction="clip").step() and the rival's on copies of the same parameters and gradients."""
    import spectral_kernels as sk

    model, gradients = make()
    model, lr = copy.deepcopy(model), 1e-3
    options: dict[str, Any] = {"direction": "clip", "rank": rank, "rule": "none"}
    ours = Replay(sk.optim.SpectralOptimizer(model.parameters(), lr, **options), list(model.parameters()), gradients)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    other = torch.optim.AdamW(copies, lr=1e-5, fused=True) if rival == ADAMW else Muon(copies, 1e-5)
    theirs = Replay(other, copies, gradients)
    for _ in range(4):  # past the first, cold steps
        ours()
    theirs()
    reads = ours.reads_per_matrix(len(gradients))
    moved = sum(p.numel() * p.element_size() for p in model.parameters())
    return Problem(
        ours=ours,
        rivals={rival: theirs},
        error=lambda _: excess(ours, lr),
        limit=LIMIT,
        checks={rival: lambda _: finite(copies)},
        settings={rival: f"{100 * (reads - 1):.0f} % of our matrices were read a second time"},
        bytes=6 * moved,
        reads=reads,
    )


def clip_cases() -> list[Case]:
    """Rank 8 has the targets; 4 and 32 show what a column costs."""
    cases = [
        Case(
            "C11",
            f"GPT-2 small, its 48 matrices, fp32, clip {rank}",
            lambda rank=rank: clip_problem(recorded_blocks, rank, ADAMW),  # type: ignore[misc]
            {ADAMW: Goal(0.5 if rank == 8 else None)},
            False,
            "step",
        )
        for rank in (4, 8, 32)
    ]
    muon = Case(
        "C11",
        "GPT-2 small, 8 of its matrices, fp32, clip 8",
        lambda: clip_problem(two_blocks, 8, MUON),
        {MUON: Goal(20.0)},
        False,
        "step",
    )
    return [*cases, muon]
