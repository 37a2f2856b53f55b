"""Condition 1 of *A Spectral Condition for Feature Learning* (arXiv 2310.17813) as pure functions of shapes.

fan_out and fan_in are rows and columns of a weight stored as torch.nn.Linear stores it.
"""

from __future__ import annotations

import math

RULES = ("rms_to_rms", "original", "match_rms_adamw", "none")


def rms_to_rms(fan_out: int, fan_in: int) -> float:
    """sqrt(fan_out / fan_in): the spectral norm of an operator that keeps RMS sizes. [paper, Condition 1]"""
    return math.sqrt(fan_out / fan_in)


def original(fan_out: int, fan_in: int) -> float:
    """sqrt(max(1, fan_out / fan_in)). [Jordan et al. 2024, Muon]"""
    return math.sqrt(max(1.0, fan_out / fan_in))


def match_rms_adamw(fan_out: int, fan_in: int) -> float:
    """0.2 sqrt(max(fan_out, fan_in)): an orthogonal update of AdamW's usual RMS. [Liu et al. 2025, Moonlight]"""
    return 0.2 * math.sqrt(max(fan_out, fan_in))


def target(rule: str | float, fan_out: int, fan_in: int) -> float:
    """A spectral-norm target: a number as it is, or the value of a rule name for this shape."""
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}: expected a number or one of {', '.join(RULES)}")
        return {"rms_to_rms": rms_to_rms, "original": original, "match_rms_adamw": match_rms_adamw}.get(
            rule, lambda *_: 1.0
        )(fan_out, fan_in)
    return float(rule)
