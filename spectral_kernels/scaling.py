"""Condition 1 of *A Spectral Condition for Feature Learning* (arXiv 2310.17813) as pure functions of shapes.

fan_out and fan_in are rows and columns of a weight stored as torch.nn.Linear stores it; of a grouped convolution, those
of one group. A convolution has `positions` kernel positions, each a matrix of its own (a slice).
Marks: [paper], [derived] from its statements, [ours] beyond it.
"""

from __future__ import annotations

import math

RULES = ("rms_to_rms", "original", "match_rms_adamw", "none")

# What an optimizer does to a gradient of any size: what its base rate has to be multiplied with follows from this.
UPDATE_RULES = ("sgd", "entrywise", "frobenius", "spectral", "orthogonal", "frobenius_proportional")
KINDS = ("matrix", "conv", "vector", "gain", "embedding", "scalar")

OPTIMIZER_RULES = {
    **dict.fromkeys(("sgd", "asgd"), "sgd"),
    **dict.fromkeys(("adam", "adamw", "sparseadam", "adamax", "nadam", "radam"), "entrywise"),
    **dict.fromkeys(("lion", "sign", "signsgd", "rmsprop", "adagrad"), "entrywise"),
    **dict.fromkeys(("lars", "lamb", "fromage", "nero", "madam", "adafactor"), "frobenius_proportional"),
    "muon": "orthogonal",
    "spectral": "spectral",
    "spectraloptimizer": "spectral",
}


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


def init_std(fan_out: int, fan_in: int, positions: int = 1) -> float:
    """min(1, sqrt(m / n)) / sqrt(n), n = fan_in * positions. [paper, Parametrization 1; n of a convolution: ours]"""
    n = fan_in * positions
    return min(1.0, math.sqrt(fan_out / n)) / math.sqrt(n)


def init_norm(fan_out: int, fan_in: int, positions: int = 1) -> float:
    """sqrt(m / n), n = fan_in * positions: the spectral norm of every slice at initialization. [paper, Eq. 16]

    Slices drawn independently add in quadrature, so sqrt(m / fan_in) / sqrt(positions) each keeps the output RMS that a
    matrix (m, fan_in) has. Updates of slices are aligned and add up: see normalized_factor. [ours]
    """
    return rms_to_rms(fan_out, fan_in * positions)


def sgd_factor(fan_out: int, fan_in: int, positions: int = 1, groups: int = 1) -> float:
    """m g / (n K). [paper, Parametrization 1; K: ours]

    The g groups of a convolution share <dW, grad W> = 1 (Eq. 19), so a group's gradient is 1 / g as large; g = width
    and m = n = 1 give the factor of a norm gain. [ours]
    """
    return fan_out * groups / (fan_in * positions)


def entrywise_factor(fan_out: int, fan_in: int, positions: int = 1, groups: int = 1) -> float:
    """1 / (n K): the RMS entry of dW in Table 1. [derived; K: ours]"""
    return 1 / (fan_in * positions)


def normalized_factor(fan_out: int, fan_in: int, positions: int = 1, groups: int = 1) -> float:
    """sqrt(m / n) / K, for every slice normalized by itself: aligned slices add up. [paper, Eq. 17; K: ours]"""
    return rms_to_rms(fan_out, fan_in) / positions


def proportional_factor(fan_out: int, fan_in: int, positions: int = 1, groups: int = 1) -> float:
    """1 / sqrt(min(m, n K)): a low-rank dW beside a full-rank W. [paper, section 5.4; K: ours]"""
    return 1 / math.sqrt(min(fan_out, fan_in * positions))


def rate_factor(rule: str, kind: str, fan_out: int, fan_in: int = 1, positions: int = 1, groups: int = 1) -> float:
    """What Condition 1 multiplies the base rate of an optimizer with, for one parameter.

    rule: one of UPDATE_RULES. kind: one of KINDS. A vector is a matrix (m, 1) [paper, App. D]; an embedding (fan_out
    its width) has one-hot inputs, so its fan_in counts as 1 [derived], but for rules proportional to the weight's norm;
    a gain is a diagonal matrix: 1 where the rule divides by the largest entry (spectral, orthogonal) [ours].
    """
    if rule not in UPDATE_RULES:
        raise ValueError(f"unknown update rule {rule!r}: expected one of {', '.join(UPDATE_RULES)}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "scalar" or (kind == "gain" and rule in ("spectral", "orthogonal")):
        return 1.0
    if kind in ("vector", "gain") or (kind == "embedding" and rule != "frobenius_proportional"):
        fan_in = 1
    return {
        "sgd": sgd_factor,
        "entrywise": entrywise_factor,
        "frobenius_proportional": proportional_factor,
    }.get(rule, normalized_factor)(fan_out, fan_in, positions, groups)
