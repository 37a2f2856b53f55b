"""Parts G2 and G7 of `make gpu`: a whole SpectralOptimizer step, normalized or clipped, eager and as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import spectral_kernels as sk

from .cases import Case, Goal, Problem
from .cases_step import ADAMW, LIMIT, finite, sigma_error
from .gpu_parts import CASE_SECONDS, Outcome, RunOnCuda, Step, outcome, step
from .shapes import Shapes

TARGET = 1 / 0.9  # a step takes at most 0.9 of AdamW's time
CLIP_RANK, CLIP_TARGET, MUON_TARGET = 32, 1 / 1.2, 5.0
CLIP_LIMIT = 0.05  # of the leading singular value: a clipped step follows many, each less closely
MUON = "torch.optim.Muon"
SETS = 4  # of gradients, taken in turn
RANK, TURN = 8, 0.02  # directions of a gradient, and by how much they turn from one set to the next
# Noise of as much energy as the directions, new in every step, would leave (1 - 0.95) / (1 + 0.95) of its energy in the
# momentum, relative to theirs; that of four sets in turn leaves a quarter.
NOISE = (4 * 0.05 / 1.95) ** 0.5
CHECKED = 4  # matrices compared with their SVD


class Model:
    """Matrices of a model and gradients: eight slowly turning directions of weight 1/k, under noise."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        g = torch.Generator(device=device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        self.parameters = [torch.nn.Parameter(0.02 * draw(m, n)) for k, m, n in shapes for _ in range(k)]
        self.sets: list[list[Tensor]] = [[] for _ in range(SETS)]
        for p in self.parameters:
            m, n = p.shape
            weights = 1 / torch.arange(1, RANK + 1, device=device)
            left, one, other = draw(m, RANK) / m**0.5 * weights, draw(RANK, n) / n**0.5, draw(RANK, n) / n**0.5
            noise = NOISE * float(weights.norm()) / (m * n) ** 0.5
            for t, gradients in enumerate(self.sets):
                right = math.cos(TURN * t) * one + math.sin(TURN * t) * other
                gradients.append(draw(m, n).mul_(noise).addmm_(left, right))

    def take(self, t: int) -> None:
        """The gradients of the t-th set, there and back again."""
        turn = t % (2 * SETS - 2)
        for p, gradient in zip(self.parameters, self.sets[min(turn, 2 * SETS - 2 - turn)], strict=True):
            p.grad = gradient


class Steps:
    """`optimizer.step()` on one set of gradients after the other: called, or replayed from a graph for each."""

    def __init__(self, place: RunOnCuda, model: Model, optimizer: Any, captured: bool) -> None:
        self.model, self.optimizer, self.t = model, optimizer, 0
        self.graphs: list[Callable[[], object]] = []
        for _ in range(4):  # past the first, cold steps
            self()
        self.reads = self._reads() if isinstance(optimizer, sk.optim.SpectralOptimizer) else 0.0
        for gradients in model.sets if captured else ():
            for p, gradient in zip(model.parameters, gradients, strict=True):
                p.grad = gradient
            self.graphs.append(place.capture(optimizer.step))

    def __call__(self) -> Any:
        self.t += 1
        if self.graphs:
            turn = self.t % (2 * SETS - 2)
            self.graphs[min(turn, 2 * SETS - 2 - turn)]()
        else:
            self.model.take(self.t)
            self.optimizer.step()
        return self.optimizer

    def _reads(self) -> float:
        """Mean over matrices and steps, once through all sets."""
        seen = []
        for _ in range(2 * SETS - 2):
            seen += [info.reads for _, info in self().last_step() if info.tracked]
        return float(torch.cat(seen).mean())

    def latest(self) -> Any:
        """The optimizer after the step that its `last_step` tells of: that of the graph captured last."""
        if self.graphs:
            self.graphs[-1]()
        return self.optimizer


def twin(model: Model, place: RunOnCuda) -> Model:
    """The same gradients for copies of the parameters."""
    other = Model((), place.device)
    other.parameters = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters]
    other.sets = model.sets
    return other


def problem(place: RunOnCuda, shapes: Shapes, embedding: bool, captured: bool) -> Problem:
    model = Model(shapes, place.device)
    theirs = twin(model, place)
    groups: list[dict[str, Any]] = [{"params": model.parameters[int(embedding) :]}]
    if embedding:
        groups.append({"params": model.parameters[:1], "kind": "embedding"})
    rate = torch.tensor(1e-4, device=place.device) if captured else 1e-4  # a graph reads it at every replay
    adamw = torch.optim.AdamW(theirs.parameters, lr=rate, fused=True, capturable=captured and place.device == "cuda")
    ours = Steps(place, model, sk.optim.SpectralOptimizer(groups, lr=1e-3), captured)
    rival = Steps(place, theirs, adamw, captured)
    return Problem(
        ours=ours,
        rivals={ADAMW: rival},
        error=lambda _: sigma_error(ours.latest(), CHECKED),
        limit=LIMIT,
        checks={ADAMW: lambda _: finite(theirs.parameters)},
        settings={ADAMW: f"{100 * (ours.reads - 1):.0f} % of our matrices were read a second time"},
        bytes=6.0 * sum(p.numel() * p.element_size() for p in model.parameters),
        reads=ours.reads,
    )


def clip_problem(place: RunOnCuda, shapes: Shapes, rank: int) -> Problem:
    """Clipped, captured; AdamW captured too, Muon as torch has it."""
    model = Model(shapes, place.device)
    theirs, third = twin(model, place), twin(model, place)
    on_gpu = place.device == "cuda"
    rate = torch.tensor(1e-4, device=place.device)
    adamw = torch.optim.AdamW(theirs.parameters, lr=rate, fused=True, capturable=on_gpu)
    clip = sk.optim.SpectralOptimizer(model.parameters, lr=1e-3, direction="clip", rank=rank)
    ours = Steps(place, model, clip, True)
    muon = Steps(place, third, torch.optim.Muon(third.parameters, lr=1e-4), False)
    share = f"{100 * (ours.reads - 1):.0f} % of our matrices were read a second time"
    return Problem(
        ours=ours,
        rivals={ADAMW: Steps(place, theirs, adamw, True), MUON: muon},
        error=lambda _: sigma_error(ours.latest(), CHECKED),
        limit=CLIP_LIMIT,
        checks={ADAMW: lambda _: finite(theirs.parameters), MUON: lambda _: finite(third.parameters)},
        settings={ADAMW: share, MUON: f"bf16, eager; {share}"},
        bytes=6.0 * sum(p.numel() * p.element_size() for p in model.parameters),
        reads=ours.reads,
    )


def host_checks(place: RunOnCuda) -> Iterator[Outcome]:
    """No synchronization, and a replay equals an eager step from the same state, bit for bit."""
    model = Model(((2, 256, 128), (1, 128, 300), (1, 64, 64)), place.device)
    kinds: dict[str, dict[str, Any]] = {
        "step": {},
        "step, Nesterov, upper bound": {"nesterov": True, "safety": "upper"},
        "clip": {"direction": "clip", "rank": 8},
    }
    for name, options in kinds.items():
        optimizer = sk.optim.SpectralOptimizer(model.parameters, lr=1e-3, **options)
        for t in range(5):
            model.take(t)
            optimizer.step()
        try:
            with place.no_sync():
                optimizer.step()
            yield outcome("G2", f"no synchronization: {name}", "passed")
        except RuntimeError as seen:
            yield outcome("G2", f"no synchronization: {name}", "failed", str(seen).splitlines()[0])
        try:
            same = replays(place, model, optimizer)
            yield outcome("G2", f"graph replay equals the eager step: {name}", "passed" if same else "failed")
        except RuntimeError as seen:
            yield outcome("G2", f"graph replay equals the eager step: {name}", "failed", str(seen).splitlines()[0])


def replays(place: RunOnCuda, model: Model, optimizer: Any) -> bool:
    replay = place.capture(optimizer.step)
    state = [x for p in model.parameters for key, x in optimizer.state[p].items() if key != "step"]
    tensors = [*(p.data for p in model.parameters), *state]
    before = [x.clone() for x in tensors]
    replay()
    replayed = [x.clone() for x in tensors]
    for x, old in zip(tensors, before, strict=True):
        x.copy_(old)
    optimizer.step()
    moved = not any(torch.equal(x, old) for x, old in zip(replayed, before[: len(model.parameters)], strict=False))
    return moved and all(torch.equal(x, y) for x, y in zip(tensors, replayed, strict=True))


def g2(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """Llama-1B's matrices, then its embedding too; both providers captured, then both eager."""
    if place.device == "cuda":  # on a CPU a step may look at its numbers
        for found in host_checks(place):
            yield [found], "", []
    for name, shapes, embedding in place.step_models:
        for captured in (True, False):
            title = f"{name} fp32, {'captured' if captured else 'eager'}"
            if left() < CASE_SECONDS:
                yield [outcome("G2", title, "not run", "the deadline left too little time")], "", []
                continue

            def build(shapes: Shapes = shapes, embedding: bool = embedding, captured: bool = captured) -> Problem:
                return problem(place, shapes, embedding, captured)

            case = Case("G2", title, build, {ADAMW: Goal(TARGET)}, subject="step")
            yield step("G2", place, case, left, place.clock(), "step")
            if place.device == "cuda":
                torch.cuda.empty_cache()


def g7(place: RunOnCuda, left: Callable[[], float]) -> Iterator[Step]:
    """Clipped steps of the models without their embeddings."""
    rank = CLIP_RANK if place.device == "cuda" else 4
    for name, shapes, embedding in place.step_models:
        if embedding:
            continue
        title = f"{name} fp32, clip {rank}, captured"
        if left() < CASE_SECONDS:
            yield [outcome("G7", title, "not run", "the deadline left too little time")], "", []
            continue

        def build(shapes: Shapes = shapes) -> Problem:
            return clip_problem(place, shapes, rank)

        goals = {ADAMW: Goal(CLIP_TARGET), MUON: Goal(MUON_TARGET)}
        yield step("G7", place, Case("G7", title, build, goals, subject="step"), left, place.clock(), "step")
        if place.device == "cuda":
            torch.cuda.empty_cache()
