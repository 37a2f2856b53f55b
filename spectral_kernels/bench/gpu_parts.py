"""The parts of `make gpu` and the two places they run in: a CUDA device, and its rehearsal on a CPU over tiny shapes.

A part yields (outcomes, subject, records) after every step. A rehearsal replaces what a CPU lacks: device events by
wall time, the driver's sync detector by one that watches for values read by the host, a captured graph by the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_kernels as sk

from . import environment, rivals, shapes
from .cases import TOL, Case, Goal, Problem, gram_matvec_cases, relative_error
from .measure import Record, ceilings, failures, measure, met, rounded, start
from .timer import Call, Clock, HostClock, clock_for

Outcome = dict[str, str]
Step = tuple[list[Outcome], str, list[Record]]
CASE_SECONDS = 12.0  # a case is begun only with so much left


def outcome(part: str, check: str, status: str, detail: str = "") -> Outcome:
    """status: passed | failed | not run."""
    return {"part": part, "check": check, "status": status, "detail": detail}


def failed(o: Outcome) -> bool:
    return o["status"] != "passed"


class RunOnCuda:
    """The current CUDA device."""

    device = "cuda"
    shrink = 1
    models: dict[str, shapes.Shapes] = {"gpt2-small": shapes.GPT2_SMALL, "minilm": shapes.MINILM}
    spectra: tuple[tuple[int, str], ...] = ((0, "Gaussian"), (16, "16 directions on Gaussian"))
    # name, matrices and whether the first is an embedding: whole optimizer steps
    step_models: tuple[tuple[str, shapes.Shapes, bool], ...] = (
        ("Llama-1B, matrices", shapes.LLAMA_1B[1:], False),
        ("Llama-1B, all", shapes.LLAMA_1B, True),
    )
    side = 4096
    steps = 8
    seconds = 1.0
    rounds = 5

    def environment(self) -> dict[str, Any]:
        return environment.describe("cuda")

    def forced(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def clock(self) -> Clock:
        return clock_for("cuda")

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Any synchronization of the host with the device raises RuntimeError inside."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def capture(self, call: Call) -> Call:
        """The call as a CUDA graph; its result is the same memory at every replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> object:
            graph.replay()
            return result

        replay.inputs = call  # type: ignore[attr-defined]  # the graph reads their memory: keep it

        return replay

    def peak_extra_bytes(self, call: Call) -> int | None:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class HostRead(RuntimeError):
    """A value of a tensor was asked for."""


class _Detector(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise HostRead(f"{func}: on a GPU the host would wait here")
        return func(*args, **(kwargs or {}))


class Rehearsal(RunOnCuda):
    """The same parts on the CPU; every claim it could make is about the logic alone."""

    device = "cpu"
    shrink = 256
    models = {"tiny": ((1, 8, 6), (1, 6, 12))}
    step_models = (("tiny, matrices", ((1, 8, 6), (1, 6, 12)), False),)
    spectra = ((4, "4 directions on Gaussian"),)
    side = 32
    steps = 2  # the interpreter takes 0.2 s for each
    seconds = 0.0
    rounds = 2

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def environment(self) -> dict[str, Any]:
        return {**environment.describe("cpu"), "machine": "rehearsal", "rehearsal": True}

    def forced(self) -> contextlib.AbstractContextManager:
        return sk.force(self.backend)

    def clock(self) -> Clock:
        return HostClock()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        with _Detector():
            yield

    def capture(self, call: Call) -> Call:
        return call

    def peak_extra_bytes(self, call: Call) -> int | None:
        return None


def inputs(place: RunOnCuda) -> dict[str, list[Tensor]]:
    """What must work without the host: a matrix, a half-precision one, a ragged list."""
    g = torch.Generator().manual_seed(5)
    n = max(place.side // 8, 8)
    drawn = [torch.randn(shape, generator=g) for shape in ((2 * n, n), (n, 3 * n))]
    one = torch.randn(place.side // 4, place.side // 4, generator=g)
    return {
        "fp32 matrix": [one.to(place.device)],
        "bf16 matrix": [one.to(place.device, torch.bfloat16)],
        "ragged list": [a.to(place.device) for a in drawn],
    }


def host(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """`spectral_norm(A, steps=8)`: no synchronization; captured and replayed on changed input with the eager bits."""
    probe = torch.ones(4, device=place.device)
    try:
        with place.no_sync():
            float(probe.sum())
        yield [outcome("host", "the detector sees a synchronization", "failed", "it let one pass")], "", []
    except RuntimeError as seen:
        yield [outcome("host", "the detector sees a synchronization", "passed", str(seen).splitlines()[0])], "", []
    for name, matrices in inputs(place).items():
        argument = matrices[0] if len(matrices) == 1 else matrices

        def call(argument: Any = argument) -> Tensor:
            return sk.spectral_norm(argument, steps=place.steps)

        call()  # compiles kernels and loads libraries
        try:
            with place.no_sync():
                call()
            yield [outcome("host", f"no synchronization: {name}", "passed")], "", []
        except RuntimeError as seen:
            yield [outcome("host", f"no synchronization: {name}", "failed", str(seen).splitlines()[0])], "", []
        try:
            detail = replay_differs(place, call, matrices)
        except RuntimeError as seen:
            detail = f"capture: {str(seen).splitlines()[0]}"
        yield (
            [outcome("host", f"graph replay equals the eager call: {name}", "failed" if detail else "passed", detail)],
            "",
            [],
        )


def replay_differs(place: RunOnCuda, call: Call, matrices: list[Tensor]) -> str:
    """Capture, change the inputs in place, replay; what is wrong with the result, or nothing."""
    replay = place.capture(call)
    first = torch.as_tensor(replay()).clone()
    for a in matrices:
        a.copy_(a.flip(0) * 2.5 + 0.25)
    again = torch.as_tensor(replay()).clone()
    eager = torch.as_tensor(call())
    if torch.equal(again, first):
        return "the replay did not see the changed input"
    if not torch.equal(again, eager):
        return f"replay {again.reshape(-1)[:3].tolist()} against eager {eager.reshape(-1)[:3].tolist()}"
    truth = torch.stack([rivals.exact(a) for a in matrices])
    error = relative_error(eager, truth)
    return (
        "" if error < 0.05 else f"the values are off by {error:.2g}"
    )  # 0.05: eight reads of a flat spectrum err by 1e-2


def g1(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """One read of 64 MiB and more, every provider as a CUDA graph."""
    clock = place.clock()
    for case in gram_matvec_cases("G1", place.device, place.shrink, clock, place.capture):
        yield step("G1", place, case, left, clock, "gram_matvec")


def g3(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """A model's matrices as a ragged list against two bmm a step, both at the fewest steps that reach the tolerance."""
    clock = place.clock()
    for model, wanted in place.models.items():
        for spikes, spectrum in place.spectra:
            name = f"{model} fp32, {spectrum}"
            if left() < CASE_SECONDS:
                yield [outcome("G3", name, "not run", "the deadline left too little time")], "", []
                continue
            stacks = shapes.sample(wanted, spikes=spikes, device=place.device)
            for case in g3_cases(place, name, stacks):
                yield step("G3", place, case, left, clock, "norm")
    if left() >= CASE_SECONDS:
        yield [], "norm", memory(place)


def g3_cases(place: RunOnCuda, name: str, stacks: list[Tensor]) -> list[Case]:
    """Both captured, at their fewest steps; then our call as a user writes it (tol, eager) against the same graph."""
    truth = torch.cat([rivals.exact(s) for s in stacks])
    matrices = [a for s in stacks for a in s.unbind(0)]
    loop = rivals.SubspaceLoop(stacks)
    theirs = rivals.fewest_steps(loop, truth, TOL)
    ours = rivals.fewest_steps(lambda steps: sk.spectral_norm(matrices, steps=steps), truth, TOL, most=64)
    rival = "two-bmm loop in a CUDA graph"
    moved = sum(a.numel() * a.element_size() for a in matrices)

    def problem(call: Call, reads: float | None) -> Problem:
        out = Problem(
            call, {}, lambda value: relative_error(value, truth), TOL, reads=reads, bytes=moved * (reads or 0)
        )
        if theirs is None:
            out.missing[rival] = "does not reach the tolerance"
        else:
            out.rivals[rival] = place.capture(lambda: loop(theirs))
            out.settings[rival] = f"{theirs} steps of two bmm, block of 4"
        return out

    def captured() -> Problem:
        steps = ours or 64
        return problem(place.capture(lambda: sk.spectral_norm(matrices, steps=steps)), steps)

    def eager() -> Problem:
        return problem(lambda: sk.spectral_norm(matrices, TOL), None)

    return [
        Case("G3", f"{name}, captured", captured, {rival: Goal(5)}),
        Case("G3", f"{name}, tol={TOL:g}, eager", eager, {rival: Goal()}),
    ]


def memory(place: RunOnCuda) -> list[Record]:
    """Row M on the device: largest growth of the allocator during a call, over the matrix."""
    A = torch.randn(place.side, place.side, generator=torch.Generator().manual_seed(0)).to(place.device)
    extra = place.peak_extra_bytes(lambda: sk.spectral_norm(A, TOL))
    if extra is None:
        return []
    goal = Goal(0.05, "memory")
    case = Case("M", f"{place.side}×{place.side} fp32", lambda: Problem(int, {}, float, 0.0), {})
    error = relative_error(sk.spectral_norm(A, TOL), rivals.exact(A))
    record = {**start(case, None, goal), "error": rounded(error), "error_limit": TOL, "bytes": extra}
    if not error <= TOL:
        return [{**record, "status": "wrong", "reason": f"error {error:.2g} above {TOL:.2g}"}]
    share = extra / (A.numel() * A.element_size())
    return [{**record, "status": "ok", "value": rounded(share), "met": met(share, goal)}]


def step(
    part: str,
    place: RunOnCuda,
    case: Case,
    left: Callable[[], float],
    clock: Clock,
    subject: str,
    ceiling: dict[str, float] | None = None,
) -> Step:
    """One measured case; a wrong result or an error is a failure of the part. ceiling: None for that of float32."""
    if left() < CASE_SECONDS:
        return [outcome(part, case.name, "not run", "the deadline left too little time")], "", []
    try:
        ceiling = ceiling or ceilings(place.device, place.side)
        records = measure(case, seconds=place.seconds, min_rounds=place.rounds, clock=clock, ceiling=ceiling)
    except (RuntimeError, ValueError) as seen:
        return [outcome(part, case.name, "failed", f"{type(seen).__name__}: {str(seen).splitlines()[0]}")], "", []
    wrong = failures(records)
    if wrong:
        return [outcome(part, case.name, "failed", wrong[0]["reason"])], subject, records
    return [outcome(part, case.name, "passed", f"error {records[0]['error']:.1e}")], subject, records
