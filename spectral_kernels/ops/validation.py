"""Whether an arithmetic carries a schedule: the real recursion on test matrices, beside the polynomial in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from . import arithmetic
from .arguments import check_choice, check_int
from .arithmetic import ROUNDOFF, Matrix
from .polynomials import OUTPUT_LIMIT, Schedule, compose, properties
from .published import schedule as resolved

METHODS = ("standard", "gram")
# The largest input that a matrix of norm 1 can become on its way into the compute dtype: norms are taken in float64,
# the scale and the scaled entries are rounded in float32, the entries to the dtype.
#   bfloat16: entries 2^-8 (a constant matrix of 254 entries: 1.00387)
#   float16:  entries 2^-11, and 2^-25 each where subnormal: 2^-11 in the norm for 2^28 entries
#   float32:  entries and scale 2^-23; sums of n products may carry n 2^-24 into sigma^2: 2^-13 in sigma for n = 2^12
#   float64:  entries 2^-53; 2^-23 leaves room for a scale in float32
LARGEST_INPUT = {
    torch.bfloat16: 1 + 2.0**-8,
    torch.float16: 1 + 2.0**-10,
    torch.float32: 1 + 2.0**-13,
    torch.float64: 1 + 2.0**-23,
}
LEAST_INPUT = 0.05  # outputs are held to the polynomial from here on; below, bfloat16 Gram matrices resolve little
# Most that an output may leave what the polynomial takes within 5 percent of its input. Measured over all lists and
# dtypes: below 0.014 with method "standard" (99 Keller steps in bfloat16), below 0.018 with "gram" and its restarts. It
# finds what random matrices show; Gram matrices that may diverge on others are found by `arithmetic.worst_gram`.
DEVIATION_LIMIT = 0.1
WITHIN = 0.05
LARGEST = {torch.float16: 65504.0}
LONG = 10  # steps; up to here all sets of restart points of one size are compared for the smallest deviation


class Validation(NamedTuple):
    """What `validate` measured, "in that arithmetic" being rounded to the compute dtype after every product.

    safe: no reason against it. reasons: sentences. restarts: the points used. output: (least, largest) output in that
    arithmetic of inputs in [0.05, largest input]. headroom: the polynomial's largest safe input. deviation: the largest
    |output in that arithmetic - output of the polynomial| for inputs in [0.05, 1]. noise: the largest output of an
    exactly zero singular value: the spurious singular values of a rank-1 input; as measured on 24 rank-1 matrices
    of 4 x 8 to 64 x 128 and one of 48 x 96 with 8 zero values. Where well below 1 it falls as matrices grow.
    """

    safe: bool
    reasons: tuple[str, ...]
    restarts: tuple[int, ...]
    output: tuple[float, float]
    headroom: float
    deviation: float
    noise: float


def validate(
    schedule: Any,
    steps: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    method: str = "standard",
    restarts: Sequence[int] | None = None,
) -> Validation:
    """Measure a schedule in the arithmetic that will run, and say what speaks against it.

    schedule, steps: as `schedule()` takes them. dtype: of the operands; sums are float32 (float64 for float64).
    method: "standard", X <- aX + (bA + cA^2) X with A = XX', or "gram", the same on the shorter side alone.
    restarts: steps after which "gram" applies Q and computes the Gram matrix anew; None: `restarts_for`. Cached.
    """
    check_choice("method", method, METHODS)
    if dtype not in ROUNDOFF:
        raise ValueError(f"dtype must be one of {', '.join(map(str, ROUNDOFF))}, not {dtype}")
    given = None if restarts is None else {check_int("restarts", k, -(10**6), 10**6) for k in restarts}
    points = None if given is None else tuple(sorted(given))
    return _validate(resolved(schedule, steps).take(None), dtype, method, points)


def checked(
    schedule: Any, steps: int | None, dtype: torch.dtype, method: str, restarts: Sequence[int] | None
) -> Validation:
    """The validation of a safe combination; ValueError with the reasons against an unsafe one."""
    found = validate(schedule, steps, dtype=dtype, method=method, restarts=restarts)
    if not found.safe:
        one = resolved(schedule, steps)
        where = f"{len(one)} steps, {_short(dtype)}, method {method!r}"
        raise ValueError(f"schedule {one.name!r} is not safe ({where}): {'; '.join(found.reasons)}")
    return found


def restarts_for(schedule: Any, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The fewest restart points with which method "gram" validates, among those the ones of least deviation; cached.

    None where no points do. Of more than 10 steps not all sets are tried. All points 1, 2, ..., T - 1 make "gram" do
    the work of "standard" and more.
    """
    if dtype not in ROUNDOFF:
        raise ValueError(f"dtype must be one of {', '.join(map(str, ROUNDOFF))}, not {dtype}")
    return _restarts_for(resolved(schedule).take(None), dtype)


@lru_cache(maxsize=1024)
def _restarts_for(one: Schedule, dtype: torch.dtype) -> tuple[int, ...] | None:
    if _scalar_reasons(one, dtype):
        return None
    count = len(one)

    def worst(points: tuple[int, ...]) -> tuple[float, float, float]:
        return arithmetic.worst_gram(one.steps, dtype, points, LARGEST_INPUT[dtype])

    needed = tuple(range(1, count))
    for k in range(1, count):  # the first segment as long as it may be, then the next: no other set has fewer points
        fewer = tuple(p for p in needed if p != k)
        needed = needed if _worst_reasons(worst(fewer), dtype) else fewer
    for sets in _candidates(count, needed):
        sound = {points: found for points in sets if not _worst_reasons(found := worst(points), dtype)}
        for points in islice(sorted(sound, key=lambda p: sound[p][1]), 3):
            if _validate(one, dtype, "gram", points).safe:
                return points
    return None


def _candidates(count: int, needed: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Sets of points to choose from, one size after another; of long lists only some, ever denser."""
    if count <= LONG:
        for size in range(len(needed), count):
            yield list(combinations(range(1, count), size))
        return
    yield [needed]
    for apart in (16, 8, 4, 2, 1):
        yield [tuple(sorted({*needed, *range(apart, count, apart)}))]


@lru_cache(maxsize=1024)
def _validate(one: Schedule, dtype: torch.dtype, method: str, restarts: tuple[int, ...] | None) -> Validation:
    reasons = _scalar_reasons(one, dtype)
    points = restarts or ()
    if method == "standard":
        if points:
            reasons.append(f"restarts {list(points)} are for method 'gram', and 'standard' has none")
    elif outside := [k for k in points if not 1 <= k < len(one)]:
        last = len(one) - 1
        reasons.append(
            f"restarts {outside} are not between steps: {len(one)} steps have " + (f"1 to {last}" if last else "none")
        )
    elif restarts is None:
        found = None if reasons else _restarts_for(one, dtype)
        points = tuple(range(1, len(one))) if found is None else found
    if method == "gram" and not reasons:
        worst = arithmetic.worst_gram(one.steps, dtype, points, LARGEST_INPUT[dtype])
        reasons += _worst_reasons(worst, dtype, points)
    sigma, measured, noise, finite = _measure(one, dtype, method, points)
    exact = compose(one.steps, sigma)
    held = (sigma >= LEAST_INPUT) & (sigma <= LARGEST_INPUT[dtype])
    deviation = float(np.abs(measured - exact)[held & (sigma <= 1)].max())
    if not finite:
        reasons.append(f"values leave the range of {_short(dtype)}")
    elif not reasons:
        reasons += _measured_reasons(one, dtype, sigma[held], measured[held])
    output = float(measured[held].min()), float(measured[held].max())
    headroom = properties(one).largest_safe_sigma
    return Validation(not reasons, tuple(reasons), points, output, headroom, deviation, noise)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------ reasons


def _scalar_reasons(one: Schedule, dtype: torch.dtype) -> list[str]:
    """What the polynomial itself does below the largest input of the dtype."""
    found, top = properties(one), LARGEST_INPUT[dtype]
    if found.largest_safe_sigma >= top:
        return []
    rounding = f"; rounding to {_short(dtype)} may make an input of 1 one of 1 + {top - 1:.2g}"
    flip = found.sign_flip_sigma
    if flip is not None and flip < top:
        worst = float(compose(one.steps, np.linspace(flip, top, 1001)).min())
        said, at = f"it flips the sign of inputs above {flip:.7g} (outputs down to {worst:.3g})", flip
    else:
        at = found.divergence_sigma
        said = f"it diverges: outputs pass {OUTPUT_LIMIT:g} for inputs above {at:.8g}"
    return [said + (rounding if at > 1 else "")]


def _worst_reasons(worst: tuple[float, float, float], dtype: torch.dtype, points: tuple[int, ...] = ()) -> list[str]:
    largest, _, gain = worst
    name, at = _short(dtype), f"restarts {list(points)}" if points else "no restarts"
    if largest > OUTPUT_LIMIT:
        return [
            f"with {at} the rounding of the Gram matrix in {name} may grow until it diverges "
            f"(a singular value comes out as {largest:.3g})"
        ]
    if gain > LARGEST.get(dtype, np.inf):
        return [f"with {at} the gain of small singular values reaches {gain:.5g}; {name} ends at {LARGEST[dtype]:g}"]
    return []


def _measured_reasons(one: Schedule, dtype: torch.dtype, sigma: Matrix, measured: Matrix) -> list[str]:
    if (flipped := measured <= 0).any():
        s, f = sigma[flipped][0], measured[flipped][0]
        return [f"in {_short(dtype)} the input {s:.4g} comes out reversed, as {f:.3g}"]
    near = compose(one.steps, np.minimum(sigma * np.linspace(1 - WITHIN, 1 + WITHIN, 41)[:, None], sigma.max()))
    low, high = near.min(0), near.max(0)
    beyond = np.maximum(low - measured, measured - high)
    i = int(beyond.argmax())
    if beyond[i] <= DEVIATION_LIMIT:
        return []
    return [
        f"in {_short(dtype)} the input {sigma[i]:.4g} comes out as {measured[i]:.3g}; within {WITHIN:.0%} of it the "
        f"polynomial takes {low[i]:.3g} to {high[i]:.3g}"
    ]


# -------------------------------------------------------------------------------------------------------- measurement


@cache
def _spread(top: float) -> tuple[Matrix, Matrix, Matrix]:
    """U (48, 48), sigma (48,), V (96, 48): the largest input, 39 values from 1 to 1e-4, 8 exact zeros."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.standard_normal((48, 48)))[0]
    V = np.linalg.qr(random.standard_normal((96, 48)))[0]
    sigma = np.concatenate([[top], np.geomspace(1, 1e-4, 39), np.zeros(8)])
    return U, sigma, V


@cache
def _rank_one() -> list[Matrix]:
    """Stacks (8, m, 2m) of Gaussian u v' of norm 1."""
    random, out = np.random.default_rng(1), []
    for m in (4, 16, 64):
        X = random.standard_normal((8, m, 1)) * random.standard_normal((8, 1, 2 * m))
        out.append(X / np.linalg.norm(X, axis=(1, 2), keepdims=True))
    return out


def _measure(
    one: Schedule, dtype: torch.dtype, method: str, points: tuple[int, ...]
) -> tuple[Matrix, Matrix, float, bool]:
    """Inputs and outputs of the spread matrix's nonzero values, the noise, and whether all was finite."""

    def run(X: Matrix) -> Matrix:
        if method == "gram":
            return arithmetic.gram(X, one.steps, dtype, points).astype(np.float64)
        return arithmetic.standard(X, one.steps, dtype).astype(np.float64)

    U, sigma, V = _spread(LARGEST_INPUT[dtype])
    outputs = [run((U * sigma) @ V.T), *map(run, _rank_one())]
    if not all(np.isfinite(Y).all() for Y in outputs):
        return sigma[:40], np.full(40, np.nan), np.nan, False
    inner = U.T @ outputs[0] @ V
    spurious = [np.linalg.norm(inner[40:, 40:], 2)]
    spurious += [np.linalg.svd(Y, compute_uv=False)[:, 1].max() for Y in outputs[1:]]
    return sigma[:40], np.diagonal(inner)[:40], float(max(spurious)), True


__all__ = ["METHODS", "Validation", "checked", "restarts_for", "validate"]
