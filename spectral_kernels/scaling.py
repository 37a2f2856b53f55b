"""Condition 1 of *A Spectral Condition for Feature Learning* (arXiv 2310.17813) as pure functions of shapes.

fan_out and fan_in are rows and columns of a weight stored as torch.nn.Linear stores it; of a grouped convolution, those
of one group. A convolution has `positions` kernel positions, each a matrix of its own (a slice).
Marks: [paper], [derived] from its statements, [ours] beyond it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

RULES = ("rms_to_rms", "original", "match_rms_adamw", "none")

# What an optimizer does to a gradient of any size: what its base rate has to be multiplied with follows from this.
UPDATE_RULES = ("sgd", "entrywise", "frobenius", "spectral", "orthogonal", "frobenius_proportional")
KINDS = ("matrix", "conv", "vector", "gain", "embedding", "scalar")
PARAMETRIZATIONS = ("spectral", "sp", "ntp", "mup")
LAYERS = ("input", "hidden", "output")
VECTORS = ("dense", "sparse")  # entries of size one, or a single one (one-hot)
SIZES = ("spectral", "frobenius", "rms_entry")

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


def _check(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: expected one of {', '.join(allowed)}")
    return value


def init_norm(fan_out: int, fan_in: int, positions: int = 1) -> float:
    """sqrt(m / n), n = fan_in * positions: the spectral norm of every slice at initialization. [paper, Eq. 16]

    Slices drawn independently add in quadrature, so sqrt(m / fan_in) / sqrt(positions) each keeps the output RMS that a
    matrix (m, fan_in) has. Updates of slices are aligned and add up: see update_norm. [ours]
    """
    return rms_to_rms(fan_out, fan_in * positions)


def init_gain(sample_norm: float, fan_out: int, fan_in: int, positions: int = 1, sigma: float = 1.0) -> float:
    """sigma sqrt(m / n) / ||W'||_2: what Eq. 16 multiplies a sample W' with. [paper, Eq. 16]"""
    return sigma * init_norm(fan_out, fan_in, positions) / sample_norm


def update_norm(fan_out: int, fan_in: int, positions: int = 1) -> float:
    """sqrt(m / n) / K: the spectral norm of an update, of every slice. [paper, Condition 1; K: ours]"""
    return rms_to_rms(fan_out, fan_in) / positions


def gradient_norm(fan_out: int, fan_in: int) -> float:
    """sqrt(n / m): the spectral norm of a gradient under Condition 1. [paper, Eq. 20]"""
    return rms_to_rms(fan_in, fan_out)


def vector_factor(size: int, vector: str = "dense") -> float:
    """What the plain norm of a vector is multiplied with: 1 / sqrt(size) (RMS), sparse 1. [paper, App. E]"""
    return 1.0 if _check("vector", vector, VECTORS) == "sparse" else 1 / math.sqrt(size)


def natural_factor(fan_out: int, fan_in: int, inputs: str = "dense", outputs: str = "dense") -> float:
    """What ||A||_2 is multiplied with to be the largest output for an input of one, both by their natural norms.

    dense to dense sqrt(n / m), sparse to dense 1 / sqrt(m), dense to sparse sqrt(n), sparse to sparse 1. Condition 2:
    the product is of size one for weights and updates. [paper, App. E; Eq. 30 prints the first one inverted]
    """
    return vector_factor(fan_out, outputs) / vector_factor(fan_in, inputs)


def natural_target(fan_out: int, fan_in: int, inputs: str = "dense", outputs: str = "dense") -> float:
    """||W||_2 and ||dW||_2 under Condition 2: sqrt(m / n), a sparse side counting as 1. [paper, App. E]"""
    return 1 / natural_factor(fan_out, fan_in, inputs, outputs)


class Scales(NamedTuple):
    """Standard deviation of the initial entries, and what the base rate of SGD is multiplied with."""

    sigma: float
    eta: float


def gaussian_norm(fan_out: int, fan_in: int, sigma: float = 1.0) -> float:
    """sigma (sqrt(m) + sqrt(n)): the spectral norm of a large Gaussian matrix. [paper, Parametrization 1]"""
    return sigma * (math.sqrt(fan_out) + math.sqrt(fan_in))


def gaussian_stable_rank(fan_out: int, fan_in: int) -> float:
    """m n / (sqrt(m) + sqrt(n))^2: ||A||_F^2 / ||A||_2^2 of a large Gaussian matrix. [derived]"""
    return fan_out * fan_in / gaussian_norm(fan_out, fan_in) ** 2


def init_std(fan_out: int, fan_in: int, positions: int = 1) -> float:
    """min(1, sqrt(m / n)) / sqrt(n), n = fan_in * positions. [paper, Parametrization 1; n of a convolution: ours]"""
    n = fan_in * positions
    return min(1.0, math.sqrt(fan_out / n)) / math.sqrt(n)


def exact_init_std(fan_out: int, fan_in: int, positions: int = 1) -> float:
    """sqrt(m / n) / (sqrt(m) + sqrt(n)): init_std before it is simplified; norms are sqrt(m / n). [paper]"""
    n = fan_in * positions
    return rms_to_rms(fan_out, n) / gaussian_norm(fan_out, n)


def mup_std(fan_out: int, fan_in: int, positions: int = 1, layer: str = "hidden") -> float:
    """init_std where an input's fan_in and an output's fan_out, which no width changes, count as 1 inside the min.

    1 / sqrt(n), hidden as Parametrization 1, 1 / n. [paper, n_0 = n_L = 1; as figure 2 takes n_0 = 3072]
    """
    n = fan_in * positions
    inside = (1 if layer == "output" else fan_out) / (1 if layer == "input" else n)
    return min(1.0, math.sqrt(inside)) / math.sqrt(n)


def parametrization(
    name: str, fan_out: int, fan_in: int, positions: int = 1, groups: int = 1, *, layer: str = "hidden"
) -> Scales:
    """(sigma, eta) of one layer's Gaussian entries and SGD rate.

    "spectral": init_std, m / n (Parametrization 1). "sp": 1 / sqrt(n), 1. "ntp": 1 / sqrt(n), 1 / n. "mup": mup_std,
    m / n; `layer` is "input", "hidden" or "output" and matters to it alone. For ReLU all sigma may be times sqrt(2).
    Other optimizers than SGD: rate_factor. [paper, Parametrization 1 and section 5; positions and groups: ours]
    """
    _check("parametrization", name, PARAMETRIZATIONS)
    _check("layer", layer, LAYERS)
    n = fan_in * positions
    if name in ("sp", "ntp"):
        return Scales(1 / math.sqrt(n), 1.0 if name == "sp" else 1 / n)
    sigma = mup_std(fan_out, fan_in, positions, layer) if name == "mup" else init_std(fan_out, fan_in, positions)
    return Scales(sigma, sgd_factor(fan_out, fan_in, positions, groups))


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
    return update_norm(fan_out, fan_in, positions)


def proportional_factor(fan_out: int, fan_in: int, positions: int = 1, groups: int = 1) -> float:
    """1 / sqrt(min(m, n K)): ||dW||_F / ||W||_F under Condition 1. [paper, section 5.4; K: ours]

    Equal Frobenius norms, as LARS and its kin have them, make the spectral norm of a low-rank dW beside a full-rank W
    too large by the root of the rank.
    """
    return 1 / math.sqrt(min(fan_out, fan_in * positions))


def rate_factor(rule: str, kind: str, fan_out: int, fan_in: int = 1, positions: int = 1, groups: int = 1) -> float:
    """What Condition 1 multiplies the base rate of an optimizer with, for one parameter.

    rule: one of UPDATE_RULES. kind: one of KINDS. A vector is a matrix (m, 1) [paper, App. D]; an embedding (fan_out
    its width) has one-hot inputs, so its fan_in counts as 1 [derived], but for rules proportional to the weight's norm;
    a gain is a diagonal matrix: 1 where the rule divides by the largest entry (spectral, orthogonal) [ours].
    """
    _check("update rule", rule, UPDATE_RULES)
    _check("kind", kind, KINDS)
    if kind == "scalar" or (kind == "gain" and rule in ("spectral", "orthogonal")):
        return 1.0
    if kind in ("vector", "gain") or (kind == "embedding" and rule != "frobenius_proportional"):
        fan_in = 1
    return {
        "sgd": sgd_factor,
        "entrywise": entrywise_factor,
        "frobenius_proportional": proportional_factor,
    }.get(rule, normalized_factor)(fan_out, fan_in, positions, groups)


class Sizes(NamedTuple):
    """How large a matrix is, in three ways, and what connects them."""

    stable_rank: float
    spectral: float
    frobenius: float
    rms_entry: float


def convert(size: float, given: str, wanted: str, fan_out: int, fan_in: int, stable_rank: float) -> float:
    """One of SIZES from another: ||A||_F = ||A||_2 sqrt(stable rank) = rms_entry sqrt(m n). [paper, Table 1]"""
    spectral = dict(zip(SIZES, (1.0, math.sqrt(stable_rank), math.sqrt(stable_rank / (fan_out * fan_in))), strict=True))
    return size * spectral[_check("size", wanted, SIZES)] / spectral[_check("size", given, SIZES)]


def sizes(fan_out: int, fan_in: int, stable_rank: float, spectral: float | None = None) -> Sizes:
    """All sizes of a matrix from its stable rank and spectral norm (None: sqrt(m / n)). [paper, Table 1]"""
    norm = rms_to_rms(fan_out, fan_in) if spectral is None else spectral
    return Sizes(stable_rank, *(convert(norm, "spectral", to, fan_out, fan_in, stable_rank) for to in SIZES))


def weight_sizes(fan_out: int, fan_in: int) -> Sizes:
    """Table 1's W at initialization, of stable rank min(m, n), up to constants. [paper, Table 1]"""
    return sizes(fan_out, fan_in, min(fan_out, fan_in))


def update_sizes(fan_out: int, fan_in: int) -> Sizes:
    """Table 1's dW, of stable rank 1, up to constants; its RMS entry is 1 / n. [paper, Table 1]"""
    return sizes(fan_out, fan_in, 1)
