"""Schedules of orthogonalization: published coefficients, what they do, what arithmetic carries them, and new ones.

    schedule("polar_express")                         coefficients by name, or from your own triples
    properties(one)                                   the scalar polynomial: range, slope, headroom, resolution
    validate(one, dtype=torch.bfloat16)               the same in the arithmetic that will run, with reasons against it
    restarts_for(one, torch.float16)                  where method "gram" computes its Gram matrix anew
    polar_express(lower=0.01, steps=6, safety=1.02)   the best schedule for an interval

A schedule maps every singular value s of the normalized input by its steps s <- s (a + b s^2 + c s^4), towards 1.
"""

from __future__ import annotations

from .polar_express import polar_express
from .polynomials import Properties, Schedule, Triple, properties
from .published import ALIASES, PUBLISHED, schedule
from .validation import Validation, checked, restarts_for, validate

__all__ = [
    "ALIASES",
    "PUBLISHED",
    "Properties",
    "Schedule",
    "Triple",
    "Validation",
    "checked",
    "polar_express",
    "properties",
    "restarts_for",
    "schedule",
    "validate",
]
