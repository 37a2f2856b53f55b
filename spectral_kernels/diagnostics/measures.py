"""The quantities of *A Spectral Condition for Feature Learning* (arXiv 2310.17813) as pure functions of tensors.

A, W, dW: (..., m, n). h: (..., B, n), the features of B inputs as rows. Leading dimensions are a batch (trials, layers)
and broadcast. Results (...,) in float32, in float64 for float64; no gradient. An input whose features are all zero is
left out of a mean; where nothing is left, or a matrix is zero, the result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.contracts import acc_dtype
from ..ops import arguments
from ..ops import subspace as _subspace
from ..ops.norm import spectral_norm

TOL = 1e-4  # relative error of every spectral norm here
NORMS = ("spectral", "frobenius")


def stable_rank(A: Tensor) -> Tensor:
    """||A||_F^2 / ||A||_2^2: from 1 to min(m, n), 0 for a zero matrix. [paper, Fig. 1; of features (B, d): Fig. 3]"""
    return _subspace.stable_rank(A, tol=TOL)


@torch.no_grad()
def alignment(A: Tensor, h: Tensor) -> Tensor:
    """Mean over inputs of ||A h|| / (||A||_2 ||h||): 1 where every input is a leading singular vector of A.

    A = dW and h = h'_{l-1} give Fig. 1 and Eq. 25, the last weight and its input Fig. 2 C. [paper]
    """
    A, h = _real("A", A), _real("h", h)
    unit = A / spectral_norm(A, tol=TOL)[..., None, None]  # first, so that tiny updates do not underflow
    return mean_ratio(length(h @ unit.mT), length(h))


@torch.no_grad()
def feature_change(h: Tensor, h0: Tensor) -> Tensor:
    """Mean over inputs of ||h - h0|| / ||h0||. [paper, Fig. 2 A]"""
    h, h0 = _real("h", h), _real("h0", h0)
    return mean_ratio(length(h - h0), length(h0))


@torch.no_grad()
def relative_change(W: Tensor, W0: Tensor, norm: str = "spectral") -> Tensor:
    """||W - W0|| / ||W0||; norm: "spectral" or "frobenius". [paper, Fig. 2 B and D]"""
    W, W0 = _real("W", W), _real("W0", W0)
    measure = _norm(norm)
    return measure(W - W0) / measure(W0)


@torch.no_grad()
def sum_ratio(A: Tensor, dA: Tensor) -> Tensor:
    """||A + dA||_2 / (||A||_2 + ||dA||_2): 0 where they cancel, 1 where they are aligned. [paper, Assumption 1]"""
    A, dA = _real("A", A), _real("dA", dA)
    return _norm("spectral")(A + dA) / (_norm("spectral")(A) + _norm("spectral")(dA))


@torch.no_grad()
def feature_sum_ratio(h: Tensor, dh: Tensor) -> Tensor:
    """Mean over inputs of ||h + dh|| / (||h|| + ||dh||). [paper, Assumption 1 for features]"""
    h, dh = _real("h", h), _real("dh", dh)
    return mean_ratio(length(h + dh), length(h) + length(dh))


@torch.no_grad()
def activation_ratio(phi_h: Tensor, h: Tensor) -> Tensor:
    """Mean over inputs of ||phi(h)|| / ||h||: about 1 / sqrt(2) for ReLU. [paper, Assumption 2]"""
    return mean_ratio(length(_real("phi_h", phi_h)), length(_real("h", h)))


@torch.no_grad()
def contributions(g: Tensor, h: Tensor) -> Tensor:
    """Median over inputs of ||(1/B) dW^(i) h_i|| / ||dW h_i||, where dW = (1/B) sum_i dW^(i), dW^(i) ~ g_i h_i'.

    g: (..., B, m) gradients of the B losses with respect to the layer's output, in any common scale; h: (..., B, n) the
    layer's input. No dW^(i) is formed: the ratio is ||g_i|| ||h_i||^2 / ||sum_j g_j <h_j, h_i>||. An input that the
    batch does not move counts as infinite; one without gradient or features is left out. [paper, Assumption 3, Fig. 6]
    """
    g, h = _real("g", g), _real("h", h)
    if g.shape[-2] != h.shape[-2]:
        raise ValueError(f"g and h must hold the same inputs, not {g.shape[-2]} and {h.shape[-2]} rows")
    own = length(g) * length(h).square()
    small = h.shape[-2] <= h.shape[-1]  # B x B products, or those of dW's size
    ratio = own / length(h @ h.mT @ g if small else h @ (h.mT @ g))
    return ratio.where(own > 0, torch.nan).nanmedian(-1).values


class Slope(NamedTuple):
    """y ~ x^slope; error: standard error of the slope, NaN from fewer than three points."""

    slope: float
    error: float


def slope(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> Slope:
    """Least-squares fit of log y on log x: exponent and its standard error.

    x: positive, at least two different values (one may come several times, as for trials); y: as many. Where a y is
    zero, negative or not finite, it has no place on the axes: both results are NaN.
    """
    a, b = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (x, y))
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"x and y must be sequences of one length, not of shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not bool((a > 0).all() & a.isfinite().all()) or len(a.unique()) < 2:
        raise ValueError(f"x must hold positive numbers, at least two of them different, not {a.tolist()}")
    if not bool((b > 0).all() & b.isfinite().all()):
        return Slope(math.nan, math.nan)
    a, b = a.log(), b.log()
    a, b = a - a.mean(), b - b.mean()
    spread = float(a.square().sum())
    p = float(a @ b) / spread
    free = len(a) - 2
    error = math.sqrt(float((b - p * a).square().sum()) / free / spread) if free > 0 else math.nan
    return Slope(p, error)


def _real(name: str, x: Tensor) -> Tensor:
    arguments.check_matrix(x, name)
    return x.detach().to(acc_dtype(x.dtype))


def length(x: Tensor) -> Tensor:
    """(..., B, n) -> (..., B)"""
    return torch.linalg.vector_norm(x, dim=-1)


def mean_ratio(above: Tensor, below: Tensor) -> Tensor:
    """(..., B) -> (...,): mean of the ratios whose denominator is not zero; NaN features stay visible."""
    kept = below != 0
    return (above / below).masked_fill(~kept, 0).sum(-1) / kept.sum(-1)


def _norm(name: str) -> Callable[[Tensor], Tensor]:
    if arguments.check_choice("norm", name, NORMS) == "frobenius":
        return torch.linalg.matrix_norm
    return lambda A: spectral_norm(A, tol=TOL)
