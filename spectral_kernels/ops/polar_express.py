"""Schedules for any interval of inputs: every step the best odd quintic for what the steps before it left."""

from __future__ import annotations

import math

import numpy as np

from .arguments import check_int, check_number
from .polynomials import MOST_STEPS, Schedule, Triple

# a first step fitted to less gains so steep a start that its own ripple eats the gain: the value of the paper's code,
# given by gram-newton-schulz 0.1.6 and heavyball 3.2.1 through their lists, which it reproduces to 4e-9
CUSHION = 0.02407327424182761
CONVERGED = (
    1 - 5e-6
)  # of lower / upper: there the fit is the classic quintic to rounding, and its equations are singular
LEAST_UPPER = 1e-30  # c / upper^5 stays in the range of float64
CLASSIC = (15 / 8, -10 / 8, 3 / 8)


def best_quintic(lower: float, upper: float) -> tuple[Triple, float]:
    """The odd quintic p closest to 1 on [lower, upper], 0 < lower <= upper: (a, b, c) and its error E.

    The error 1 - p equioscillates, +E, -E, +E, -E at lower, two turning points, upper (Remez 1934; the turning points
    are the roots of p', a quadratic in s^2).
    """
    k = lower / upper
    if k >= CONVERGED:
        triple, error = CLASSIC, 0.0
    else:
        q, r = (3 * k + 1) / 4, (k + 3) / 4
        error, last = math.inf, math.nan
        for _ in range(100):  # four to ten are enough: the exchange converges quadratically
            s = np.array([k, q, r, 1.0])
            a, b, c, error = np.linalg.solve(np.stack([s, s**3, s**5, [1, -1, 1, -1]], 1), np.ones(4)).tolist()
            if abs(error - last) <= 1e-15:
                break
            last = error
            root = math.sqrt(9 * b * b - 20 * a * c)
            q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        triple = (a, b, c)
    a, b, c = triple
    return (a / upper, b / upper**3, c / upper**5), abs(error)


def polar_express(
    lower: float = 1e-3, upper: float = 1.0, steps: int = 5, *, cushion: float = CUSHION, safety: float = 1.0
) -> Schedule:
    """The Polar-Express schedule for inputs in [lower, upper]: every step is the best quintic for the former's outputs.

    cushion: no step is fitted to less than [cushion u, u] of its inputs [l, u], and is recentred on those afterwards.
    safety s: every step but the last becomes a / s, b / s^3, c / s^5 and so stands inputs s times as large; the next
    steps are fitted to what it then gives. Each step's outputs lie in [p(l), 2 - p(l)]. At convergence a step is
    (15/8, -10/8, 3/8). 0 < lower <= upper, 1 <= steps < 100, 0 <= cushion < 1, safety >= 1.
    Source: Amsel, Persson, Musco, Gower, arXiv 2505.16932.
    """
    upper = check_number("upper", upper, 0, above=True)
    lower = check_number("lower", lower, 0, above=True)
    if lower > upper:
        raise ValueError(f"lower must not exceed upper, not {lower} > {upper}")
    steps = check_int("steps", steps, 1, MOST_STEPS)
    safety = check_number("safety", safety, 1)
    if check_number("cushion", cushion, 0) >= 1:
        raise ValueError(f"cushion must be a number in [0, 1), not {cushion}")
    if not LEAST_UPPER <= upper <= 1 / LEAST_UPPER:
        raise ValueError(f"upper must be in [{LEAST_UPPER:g}, {1 / LEAST_UPPER:g}], not {upper}")
    low, u = lower, upper
    triples: list[Triple] = []
    for i in range(steps):
        (a, b, c), _ = best_quintic(max(low, cushion * u), u)

        def p(s: float, a: float = a, b: float = b, c: float = c) -> float:
            return s * (a + b * s**2 + c * s**4)

        k = 2 / (p(low) + p(u)) if cushion * u > low else 1.0
        s = safety if i + 1 < steps else 1.0
        a, b, c = a * k / s, b * k / s**3, c * k / s**5
        triples.append((a, b, c))
        low = p(low, a, b, c)
        u = 2 - low
    name = f"polar_express({lower:g}, {upper:g}, {steps}" + (f", safety={safety:g})" if safety != 1 else ")")
    note = f"cushion {cushion:g}" + (f", safety {safety:g} in all steps but the last" if safety != 1 else "")
    return Schedule(name, tuple(triples), "exact", (lower, upper), paper="arXiv 2505.16932", note=note)


__all__ = ["CUSHION", "best_quintic", "polar_express"]
