"""A schedule of odd quintics, and what their composition does to one singular value, in float64."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import check_choice, check_int

Triple = tuple[float, float, float]
Array = NDArray[np.float64]

TAILS = ("exact", "truncate", "repeat_last", "cycle")
MOST_STEPS = 99  # as torch.optim.Muon
OUTPUT_LIMIT = 2.0  # an output beyond it is a divergence: |output| > 1e3 follows within 0.025 for every published list


def triple(given: Any) -> Triple:
    """(a, b, c) as floats; TypeError or ValueError for anything but three finite numbers."""
    whole = isinstance(given, Sequence) and all(isinstance(x, numbers.Real) for x in given)
    if not whole or isinstance(given, str):
        raise TypeError(f"schedule: a step must be a triple of numbers (a, b, c), not {given!r}")
    if len(given) != 3 or not all(map(math.isfinite, given)):
        raise ValueError(f"schedule: a step must be three finite numbers (a, b, c), not {tuple(given)}")
    a, b, c = map(float, given)
    return a, b, c


@dataclass(frozen=True)
class Schedule:
    """Coefficients of one step after another: s <- s (a + b s^2 + c s^4) on a singular value s.

    steps: one triple (a, b, c) per step. tail: how other numbers of steps are made of the list: "exact" (not at all),
    "truncate" (fewer only), "repeat_last" (past the end the last triple again), "cycle" (past the end from the start).
    interval: the inputs it was made for, in units of the normalizer; from 0 where its source states none.
    ValueError, TypeError: no steps, more than 99, another tail, or steps that are not three finite numbers.
    """

    name: str
    steps: tuple[Triple, ...]
    tail: str = "exact"
    interval: tuple[float, float] = (0.0, 1.0)
    source: tuple[str, ...] = ()
    paper: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        check_choice("tail", self.tail, TAILS)
        steps = tuple(map(triple, self.steps))
        if not 1 <= len(steps) <= MOST_STEPS:
            raise ValueError(f"schedule must have at least one and at most {MOST_STEPS} steps, not {len(steps)}")
        object.__setattr__(self, "steps", steps)

    def __call__(self, sigma: ArrayLike) -> Array:
        """The output for inputs sigma, float64 of the same shape; inf where it leaves the range of float64."""
        return compose(self.steps, sigma)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def slope(self) -> float:
        """The gain of the smallest inputs, the product of a over the steps."""
        return math.prod(a for a, _, _ in self.steps)

    def take(self, steps: int | None) -> Schedule:
        """The schedule of that many steps by its tail rule, the result's tail being "exact"; None: the list as it is.

        ValueError where the rule gives no such schedule.
        """
        held = len(self.steps)
        count = held if steps is None else check_int("steps", steps, 1, MOST_STEPS)
        if count > held and self.tail == "truncate":
            raise ValueError(f"steps must be in [1, {held}] for schedule {self.name!r}, not {count}: it ends there")
        if count != held and self.tail == "exact":
            raise ValueError(
                f"steps must be {held} or None for schedule {self.name!r}, not {count}: its coefficients hold together"
            )
        if self.tail == "cycle":
            triples = tuple(self.steps[i % held] for i in range(count))
        else:
            triples = self.steps[:count] + self.steps[-1:] * (count - held)
        return self if count == held and self.tail == "exact" else replace(self, steps=triples, tail="exact")


def compose(steps: tuple[Triple, ...], sigma: ArrayLike) -> Array:
    """The polynomials of the steps one after another; inf for what overflows."""
    x = np.array(sigma, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b, c in steps:
            r = x * x
            x = x * (a + r * (b + r * c))
        return np.where(np.isnan(x) & ~np.isnan(sigma), np.inf, x)  # inf - inf and 0 inf


def _magnitude(steps: tuple[Triple, ...], sigma: Any) -> Array:
    return np.abs(compose(steps, sigma))


class Properties(NamedTuple):
    """What a schedule does, by its scalar polynomial in float64; rounding of the products is `validate`'s matter.

    output: (least, largest) for inputs in [1e-3, 1]; output_from_0_01 and output_from_0_1: in [0.01, 1], [0.1, 1].
    slope: gain of the smallest inputs. largest_safe_sigma: the headroom, largest S with 0 < output <= 2 on (0, S].
    divergence_sigma: smallest input with |output| > 2 (inf: none below 1e6). sign_flip_sigma: smallest input with
    output <= 0 below the divergence, None without one. reaching_0_5 (0_7, 0_9): the smallest input from which on all
    outputs up to the input 1 are at least that, None: never. max_intermediate: largest |value| after any step for
    inputs in [0, 1].
    """

    output: tuple[float, float]
    output_from_0_01: tuple[float, float]
    output_from_0_1: tuple[float, float]
    slope: float
    largest_safe_sigma: float
    divergence_sigma: float
    sign_flip_sigma: float | None
    reaching_0_5: float | None
    reaching_0_7: float | None
    reaching_0_9: float | None
    max_intermediate: float


@lru_cache(maxsize=1024)
def properties(schedule: Schedule) -> Properties:
    """The properties of the list as it is (`Schedule.take` for other numbers of steps); cached."""
    steps = schedule.steps

    def output(sigma: Any) -> Array:
        return compose(steps, sigma)

    divergence = _first(lambda s: ~(np.abs(output(s)) <= OUTPUT_LIMIT), _SCAN)
    flip = _first(lambda s: ~(output(s) > 0), _SCAN[_SCAN < divergence])
    after_each = [partial(_magnitude, steps[: i + 1]) for i in range(len(steps))]
    return Properties(
        output=extremes(output, 1e-3, 1.0),
        output_from_0_01=extremes(output, 0.01, 1.0),
        output_from_0_1=extremes(output, 0.1, 1.0),
        slope=schedule.slope,
        largest_safe_sigma=min(divergence, flip),
        divergence_sigma=divergence,
        sign_flip_sigma=None if math.isinf(flip) else flip,
        reaching_0_5=_reaching(output, 0.5),
        reaching_0_7=_reaching(output, 0.7),
        reaching_0_9=_reaching(output, 0.9),
        max_intermediate=max(extremes(after, 0.0, 1.0)[1] for after in after_each),
    )


# dense where outputs turn fast: up to a few units linearly, over all magnitudes below and above
_SCAN = np.unique(np.concatenate([np.geomspace(1e-9, 1e-2, 4000), np.linspace(1e-4, 4, 40001), np.geomspace(4, 1e6)]))
_TO_ONE = np.unique(
    np.concatenate([np.geomspace(1e-9, 1, 30001), np.linspace(1e-4, 1, 10001), 1 - np.geomspace(1e-9, 0.1, 2000)])
)


def extremes(output: Callable[[Any], Array], lower: float, upper: float) -> tuple[float, float]:
    """The least and the largest value on [lower, upper], every best point of a dense grid refined four times."""
    grid = np.linspace(lower, upper, 8001)
    if lower > 0:
        grid = np.unique(np.concatenate([grid, np.geomspace(lower, upper, 8001)]))
    return _lowest(output, grid), -_lowest(lambda s: -output(s), grid)


def _lowest(output: Callable[[Any], Array], grid: Array) -> float:
    values = output(grid)
    best = float(values.min())
    for i in np.argsort(values)[:4]:
        around = grid
        for _ in range(4):
            around = np.linspace(around[max(i - 1, 0)], around[min(i + 1, len(around) - 1)], 129)
            found = output(around)
            i = int(found.argmin())
        best = min(best, float(found[i]))
    return best


def _first(bad: Callable[[Any], Any], grid: Array) -> float:
    """The smallest bad input, by bisection between two points of the grid; inf without one, 0 if the first is bad."""
    found = np.flatnonzero(bad(grid))
    if not found.size:
        return math.inf
    return _bisect(bad, grid[found[0] - 1], grid[found[0]]) if found[0] else 0.0


def _reaching(output: Callable[[Any], Array], threshold: float) -> float | None:
    low = np.flatnonzero(~(output(_TO_ONE) >= threshold))
    if not low.size:
        return 0.0
    if low[-1] == len(_TO_ONE) - 1:
        return None
    return _bisect(lambda s: output(s) >= threshold, _TO_ONE[low[-1]], _TO_ONE[low[-1] + 1])


def _bisect(after: Callable[[Any], Any], low: float, high: float) -> float:
    """Where `after` turns true between low (false) and high (true), to the last bits of float64."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if after(middle) else (middle, high)
    return float(high)


__all__ = ["MOST_STEPS", "OUTPUT_LIMIT", "Properties", "Schedule", "Triple", "compose", "extremes", "properties"]
