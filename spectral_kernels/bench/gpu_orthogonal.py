"""Parts G4 and G5 of `make gpu`: `orthogonalize` in half precision, stacks of small matrices and large single ones.

Ours and torch.compile of plain Newton–Schulz run as CUDA graphs, on the same schedule and Frobenius normalization. A
result is compared with the same steps in float64. Operations are those of plain Newton–Schulz for every provider, three
products a step, so that shares of the measured product rate compare times; ours are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import spectral_kernels as sk

from . import rivals_orthogonal as others
from .cases import Case, Goal, Problem
from .cases_orthogonal import GRAM, direction_error
from .gpu_parts import CASE_SECONDS, Outcome, RunOnCuda, Step, outcome, step
from .measure import ceilings
from .rivals import Tuned
from .timer import clock_for, interleave, spread

COMPILED = "torch.compile of plain torch"
SCHEDULE, STEPS = "polar_express", 5
LIMIT = 0.1  # relative, of a whole matrix in bfloat16, small singular values of square Gaussians included
SMALL_TARGET, LARGE_TARGET, GRAM_TARGET = 3.0, 1.5, 1.0
STACKS = ((4096, 32, 32), (2048, 64, 64), (512, 128, 512), (64, 256, 256))
LARGE = ((1, 1024, 1024), (1, 2048, 2048), (1, 4096, 4096), (1, 8192, 8192), (1, 4096, 16384), (16, 1024, 1024))
REHEARSED = ((2, 8, 12),)
HALF = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float16,)}  # the interpreter multiplies no bfloat16
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@lru_cache(maxsize=4)
def half_ceilings(device: str, side: int, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth as in `ceilings`, and the product rate of this dtype."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = interleave({"gemm": lambda: a @ a}, seconds=0.3, min_rounds=3, max_rounds=20, clock=clock_for(device))
    return {**ceilings(device, side), "gemm_flop_per_s": 2 * side**3 / spread(times["gemm"]).median}


def compiled(place: RunOnCuda, G: Tensor, triples: others.Triples) -> Tuned:
    """Plain Newton–Schulz compiled for this very shape, as a CUDA graph; on a CPU, as it is."""
    if place.device != "cuda":
        return Tuned(lambda: others.newton_schulz(G, triples), "not compiled")
    call = torch.compile(others.newton_schulz, dynamic=False)
    try:
        call(G, triples)
        return Tuned(place.capture(lambda: call(G, triples)), f"{NAMES[G.dtype]}, its shape alone, captured")
    except Exception as failure:
        return Tuned(None, f"torch.compile fails here: {type(failure).__name__}")


def gram_newton_schulz(place: RunOnCuda, G: Tensor, triples: others.Triples) -> Tuned:
    """gram-newton-schulz with its own kernels where they run; captured where that works."""
    theirs = others.installed("gram_newton_schulz")
    if theirs is None:
        return Tuned(None, "gram-newton-schulz is not installed")
    steps = [list(t) for t in triples]
    for kernels in (True, False) if place.device == "cuda" else (False,):
        try:
            call = theirs.GramNewtonSchulz(ns_use_kernels=kernels, ns_coefficients=steps)
            call(G)
        except Exception:
            continue
        run = partial(call, G)
        how = "with its kernels" if kernels else "its kernels do not run here: torch's products"
        try:
            return Tuned(place.capture(run), f"{how}, captured")
        except Exception:
            return Tuned(run, f"{how}, eager")
    return Tuned(None, "gram-newton-schulz is installed and does not run here")


def problem(place: RunOnCuda, shape: tuple[int, ...], dtype: torch.dtype, with_gram: bool) -> Problem:
    one = sk.schedules.schedule(SCHEDULE, STEPS)
    g = torch.Generator(device=place.device).manual_seed(0)
    G = torch.randn(shape, generator=g, device=place.device).to(dtype)
    truth = others.newton_schulz(G.double(), one.steps)

    def ours() -> Any:
        return sk.orthogonalize(G, SCHEDULE, steps=STEPS, normalizer="frobenius", compute_dtype=dtype)

    found = {COMPILED: compiled(place, G, one.steps)}
    if with_gram:
        found[GRAM] = gram_newton_schulz(place, G, one.steps)
    calls = {name: tuned.call for name, tuned in found.items() if tuned.call is not None}
    k, m, n = shape
    flops = others.products(m, n, STEPS, k)
    return Problem(
        ours=place.capture(ours),
        rivals=calls,
        error=lambda X: direction_error(X, truth),
        limit=LIMIT,
        settings={name: found[name].setting for name in calls},
        missing={name: tuned.setting for name, tuned in found.items() if tuned.call is None},
        flops=flops,
        work=dict.fromkeys(calls, flops),
    )


def host_checks(place: RunOnCuda) -> Iterator[Outcome]:
    """No synchronization, and a replay on other numbers equals an eager call, bit for bit."""
    kinds = {"on chip": [(3, 64, 96), (1, 100, 40)], "large": [(1, 300, 200)], "both": [(1, 160, 320), (2, 32, 32)]}
    for name, shapes in kinds.items():
        stacks = [torch.randn(shape, device=place.device, dtype=torch.bfloat16) for shape in shapes]

        def call(stacks: list[Tensor] = stacks) -> list[Tensor]:
            return sk.orthogonalize(stacks, SCHEDULE, steps=STEPS, normalizer="frobenius")

        call()
        try:
            with place.no_sync():
                call()
            yield outcome("G4", f"no synchronization: {name}", "passed")
            replay: Callable[[], Any] = place.capture(call)
            for a in stacks:
                a.copy_(a.flip(0) * 2.5 + 0.25)
            replayed = [x.clone() for x in replay()]
            same = all(torch.equal(x, y) for x, y in zip(replayed, call(), strict=True))
            yield outcome("G4", f"graph replay equals the eager call: {name}", "passed" if same else "failed")
        except RuntimeError as seen:
            yield outcome("G4", f"no synchronization and capture: {name}", "failed", str(seen).splitlines()[0])


def cases(place: RunOnCuda, row: str) -> Iterator[Case]:
    """The small ones in bfloat16; of the large ones, one in float16 too."""
    shapes = REHEARSED if place.device != "cuda" else STACKS if row == "G4" else LARGE
    goals = {COMPILED: Goal(SMALL_TARGET)}
    if row == "G5":
        goals = {COMPILED: Goal(LARGE_TARGET), GRAM: Goal(GRAM_TARGET)}
    main, *more = HALF[place.device]
    listed = [(shape, main) for shape in shapes]
    listed += [(LARGE[2], dtype) for dtype in more if row == "G5"]
    for shape, dtype in listed:
        name = "×".join(str(side) for side in (shape[1:] if shape[0] == 1 else shape))

        def build(shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype) -> Problem:
            return problem(place, shape, dtype, row == "G5")

        yield Case(row, f"{name} {NAMES[dtype]}", build, goals, subject="orthogonalize")


def part(row: str, place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    for case in cases(place, row):
        if left() < CASE_SECONDS:
            yield [outcome(row, case.name, "not run", "the deadline left too little time")], "", []
            continue
        ceiling = half_ceilings(place.device, place.side, HALF[place.device][0])
        yield step(row, place, case, left, place.clock(), "orthogonalize", ceiling)
        if place.device == "cuda":
            torch.cuda.empty_cache()


def g4(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """Stacks with a short side of up to 256; before them, what only a device shows."""
    if place.device == "cuda":  # on a CPU a call may look at its numbers
        for found in host_checks(place):
            yield [found], "", []
    yield from part("G4", place, left)


def g5(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """Short sides from 1024 to 8192."""
    yield from part("G5", place, left)
