"""What an orthogonalization runs: schedule, method, normalizer and dtype, chosen once; and the calls of the words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.composites import SAFE_EXPONENT, safe_scale
from ..kernels.contracts import acc_dtype
from ..kernels.contracts_products import LEAST_HALVED
from . import arguments, schedules
from .exact import amax, exponents

METHODS = ("auto", "standard", "gram", "svd")
NORMALIZERS = ("auto", "frobenius", "schatten4", "spectral")
# Cost of a symmetric product in units of a whole one, for method="auto": half the tiles, and what it takes to mirror
# them; on CPUs as measured, from LEAST_HALVED on.
SYMMETRIC, SYMMETRIC_CPU = 0.55, 0.8
GAIN = 0.95  # the Gram matrix is taken where it costs less than this share of the standard iteration
SPECTRAL_TOL = 5e-3  # of the estimated norm; the margin by which it is raised is twice that
SAFE = 2.0 ** -SAFE_EXPONENT[torch.float32], 2.0 ** SAFE_EXPONENT[torch.float32]
CHUNK = 1 << 28  # entries of one call: what is computed on the way is a few times as large


@dataclass(frozen=True)
class Recipe:
    """How to orthogonalize: checked arguments, the schedule with its steps."""

    schedule: schedules.Schedule
    method: str = "auto"
    normalizer: str = "auto"
    compute_dtype: torch.dtype | None = None
    fast: bool = False  # float32 inputs in bfloat16 on GPUs

    @property
    def coefficients(self) -> list[float]:
        return [number for triple in self.schedule.steps for number in triple]

    @property
    def schatten4(self) -> bool:
        return self.normalizer in ("auto", "schatten4")


def recipe(
    schedule: Any,
    steps: int | None = None,
    method: str = "auto",
    normalizer: str = "auto",
    compute_dtype: Any = None,
    fast: bool = False,
) -> Recipe:
    """Check the arguments; ValueError naming what is known."""
    arguments.check_choice("method", method, METHODS)
    arguments.check_choice("normalizer", normalizer, NORMALIZERS)
    if compute_dtype is not None and compute_dtype not in arguments.FLOATS:
        raise ValueError(f"compute_dtype must be a float dtype, not {compute_dtype}")
    return Recipe(schedules.schedule(schedule, steps), method, normalizer, compute_dtype, fast)


def plain(schedule: Any) -> Any:
    """A schedule as a name or tuples of numbers, which are hashed, copied and stored as they are."""
    if isinstance(schedule, schedules.Schedule):
        return tuple(schedule.take(None).steps)
    if isinstance(schedule, list | tuple):
        return tuple(tuple(x) if isinstance(x, list | tuple) else x for x in schedule)
    return schedule


def products_dtype(made: Recipe, dtype: torch.dtype, device_type: str) -> torch.dtype:
    """What products are computed in: as asked for; else half inputs in their own dtype, but float32 on CPUs."""
    if made.compute_dtype is not None:
        return made.compute_dtype
    if device_type == "cpu":
        return acc_dtype(dtype)
    return torch.bfloat16 if made.fast and dtype == torch.float32 else dtype


@lru_cache(maxsize=4096)
def _way(
    schedule: schedules.Schedule, method: str, dtype: torch.dtype, device_type: str, m: int, n: int
) -> tuple[bool, tuple[int, ...]]:
    """(on the Gram matrix?, its restarts) for m <= n; ValueError where the schedule is not safe so."""
    if method == "auto":
        points = schedules.restarts_for(schedule, dtype)
        standard, gram = costs(len(schedule), len(points or ()), device_type, m, n)
        method = "gram" if points is not None and gram < GAIN * standard else "standard"
    return method == "gram", schedules.checked(schedule, None, dtype, method, None).restarts


def costs(steps: int, restarts: int, device_type: str, m: int, n: int) -> tuple[float, float]:
    """Operations of the standard iteration and of that on the Gram matrix, in units of 2 m^3."""
    half = SYMMETRIC
    if device_type == "cpu":
        half = 1.0 if m < LEAST_HALVED else SYMMETRIC_CPU
    aspect, parts = n / max(m, 1), restarts + 1
    standard = steps * (half * aspect + half + aspect)
    # per part: its Gram matrix and product with X; Q but in its first step, R but after its last
    gram = parts * (half * aspect + aspect) + half * (steps + (steps - parts) + 2 * (steps - parts))
    return standard, gram


def way(made: Recipe, x: Tensor) -> tuple[bool, tuple[int, ...], torch.dtype]:
    """(on the Gram matrix?, restarts, dtype of the products) for a stack with its shorter side first."""
    dtype = products_dtype(made, x.dtype, x.device.type)
    return *_way(made.schedule, made.method, dtype, x.device.type, x.shape[1], x.shape[2]), dtype


def short_first(x: Tensor) -> Tensor:
    """The stack, or its transpose, with m <= n."""
    return x if x.shape[1] <= x.shape[2] else x.mT


def norms(stacks: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N,) float64 powers of two that bring every matrix into a safe window, and largest entries, NaN and inf kept."""
    largest = torch.cat([amax(x) for x in stacks])
    if dtype == torch.float16:  # its own window is narrow: always to amax near 1
        return torch.ldexp(torch.ones_like(largest), exponents(largest).clamp(-126, 126)), largest
    if bool_on_host((largest > SAFE[0]) & (largest < SAFE[1])):
        return torch.ones_like(largest), largest  # the usual case, without the small operations below
    wide = dtype == stacks[0].dtype == torch.float64  # norms are summed in acc of the stacks
    return safe_scale(largest, torch.float64 if wide else torch.float32), largest


def frobenius(x: Tensor, scale: Tensor) -> Tensor:
    """(k,) float64 Frobenius norms of scale * x, row by row, then over rows."""
    acc = acc_dtype(x.dtype)
    if x.dtype == acc and bool_on_host(scale == 1):
        rows = torch.linalg.vector_norm(x, dim=2)
    else:
        rows = torch.linalg.vector_norm(x.to(acc) * scale.to(acc)[:, None, None], dim=2)
    return torch.linalg.vector_norm(rows.double(), dim=1)


def bool_on_host(flags: Tensor) -> bool:
    """All of them? Asked on CPUs alone: elsewhere it would wait, and the answer is no."""
    return flags.device.type == "cpu" and bool(flags.all())


def inverse(x: Tensor) -> Tensor:
    """1 / x, and 1 where x is 0 or not finite."""
    usable = torch.isfinite(x) & (x > 0)
    return torch.where(usable, 1 / torch.where(usable, x, 1), 1)


def iterate(
    made: Recipe,
    X: Sequence[Tensor],
    factor: Tensor,
    P: Sequence[Tensor] = (),
    size: Tensor | None = None,
    decay: Tensor | None = None,
    skip: Tensor | None = None,
    look: Callable[[list[int]], list[Tensor]] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The word newton_schulz for stacks with the shorter side first, one call per method and dtype, and chunk.

    factor (N, 2) float64, P, size, decay, skip and the result as in kernels/contracts_products.py. look: gives the
    matrices of these stacks that are meant instead of X, whose shapes and dtypes they have, when their turn has come.
    """
    rows, first = [], 0
    for x in X:
        rows.append(slice(first, first + x.shape[0]))
        first += x.shape[0]
    groups: dict[tuple[Any, ...], list[int]] = {}
    filled: dict[tuple[Any, ...], int] = {}
    for j, x in enumerate(X):
        if x.numel() == 0:
            continue
        key = way(made, x)
        filled[key] = filled.get(key, 0) + x.numel()
        groups.setdefault((*key, filled[key] // CHUNK), []).append(j)
    out: list[Any] = [None] * len(X)
    used = factor.clone()
    for (gram, restarts, dtype, _), members in groups.items():
        words = registry.words(X[0].device.type, dtype, 1)
        own, *options = (
            t if t is None or len(members) == len(X) else torch.cat([t[rows[j]] for j in members])
            for t in (factor, size, decay, skip)
        )
        found, mine = words.newton_schulz(
            [X[j] for j in members] if look is None else look(members), own,
            made.schatten4, made.coefficients, gram, list(restarts), dtype,
            [P[j] for j in members] if P else [], *options,
        )  # fmt: skip
        for j, y in zip(members, found, strict=False):
            out[j] = y
        counts = [X[j].shape[0] for j in members]
        for j, u in zip(members, mine.split(counts), strict=True):
            used[rows[j]] = u
    if P:
        return [], used
    return [x.new_empty(x.shape) if y is None else y for x, y in zip(X, out, strict=True)], used
