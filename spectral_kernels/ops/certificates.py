"""From the projected matrix of a block Krylov run to bounds of sigma_max: small dense functions in float64.

Notation: A is scale * A, n its tracked side, B = A'A, lambda_1 = sigma_max^2 with eigenvector x1. A run of k reads
holds an orthonormal Q (n, K) whose first `fresh` columns span a uniformly distributed subspace, and

    B Q = Q T + V R E' + F,    T = Q'BQ,  E the last b columns of the identity,  ||F|| <= noise * theta (rounding,
    deflation)

Everything below is computed from theta_i, Z (T = Z diag(theta_i) Z'), `first` = rows of Z that belong to the fresh
columns, and `coupling` = R E'Z. Deflated columns are zero rows of T, zero columns of R: they drop out by themselves.

The one random event is ||y_1|| < c with y_1 = (fresh columns)' x1; its probability is at most delta, and outside it
every bound below holds for all k at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.contracts import INFO
from .estimate import BASIS_COLUMNS

Array = NDArray[np.float64]
RATIO = 1.05  # grid of the walk; the true supremum can exceed the result by one cell only where it is not monotone
CELLS = 24  # grid points tried at once
BISECTIONS = 12  # inside the last cell: 0.05 * 2^-12 of x - theta
GHOST = 1024  # in units of eps * theta; remainders of exhausted directions were seen up to 250
LEAST_START = 1e3  # in units of u: smaller start components are indistinguishable from rounding


class Rounding(NamedTuple):
    """Margins of a run in arithmetic of unit roundoff u.

    value: relative error of theta^(1/2); 16 u is the 2^-20 of float32, the largest seen was 14 u; sqrt(n) u / 8 covers
    longer dot products (random-walk growth: Higham and Mary 2019). noise: ||F|| / theta; the largest seen over
    bench/families.py was 18 u, and 49 u with m = 200000.
    """

    u: float
    value: Array
    noise: Array


def rounding(m: Sequence[int], n: Sequence[int], eps: float) -> Rounding:
    u = eps / 2
    rows, side = np.asarray(m, float), np.asarray(n, float)
    return Rounding(u, u * (16 + np.sqrt(side) / 8), u * (32 + np.sqrt(np.maximum(rows, side)) / 4))


@lru_cache(maxsize=4096)
def start_constant(n: int, fresh: int, delta: float) -> float:
    """c with P(||V'x|| < c) <= delta for a unit x and a uniformly distributed subspace V of dimension `fresh` of R^n.

    ||V'x||^2 ~ Beta(a, h), a = fresh/2, h = (n - fresh)/2. Its density is at most y^(a-1) / B(a, h) where h >= 1, so
    c^2 = (delta a B(a, h))^(1/a) is a lower quantile. h = 1/2 uses one column less, or the arcsine law for n = 2.
    """
    if fresh >= n:
        return 1.0
    if fresh == 0:
        return 0.0
    if n - fresh == 1:
        return math.sin(math.pi * delta / 2) if fresh == 1 else start_constant(n, fresh - 1, delta)
    a, h = fresh / 2, (n - fresh) / 2
    log = (math.log(delta) + math.log(a) + math.lgamma(a) + math.lgamma(h) - math.lgamma(a + h)) / a
    return math.exp(0.5 * min(log, 0.0))


def tangent(c: float) -> float:
    """t = tan of the angle whose cosine is c."""
    return math.inf if c <= 0 else math.sqrt(max((1 - c) * (1 + c), 0.0)) / c


class Projected(NamedTuple):
    """T of N runs of one order K: theta (N, K) ascending, first (N, fresh, K), coupling (N, b, K), blocks (N,) = K /
    b."""

    theta: Array
    first: Array
    coupling: Array
    blocks: Array

    @property
    def top(self) -> Array:
        return self.theta[:, -1]


def project(T: Array, K: int, b: int, fresh: int) -> Projected:
    """Eigenvalues and vectors of T[:, :K, :K] (N runs of one order) and the coupling R = T[:, K:K+b, K-b:K]."""
    square = T[:, :K, :K]
    theta, Z = np.linalg.eigh(0.5 * (square + square.transpose(0, 2, 1)))
    coupling = T[:, K : K + b, K - b : K] @ Z[:, K - b :]
    return Projected(theta, Z[:, :fresh], coupling, np.full(len(T), K / b))


def trustworthy(T: Array, columns: int, b: int, eps: float) -> int:
    """The columns before the first nearly deflated one: a block column whose remainder was rounding noise is not
    orthogonal to the rest, and brings ghosts. The relation B Q = Q T + V R E' holds at every step, so stopping early
    costs tightness only."""
    diagonal = np.abs(T.diagonal())
    for K in range(b, columns, b):
        remainder = np.abs(T[K : K + b, K - b : K].diagonal())
        if ((remainder > 0) & (remainder < GHOST * eps * diagonal[:K].max())).any():
            return K
    return columns


def half_step(P: Projected, u: float) -> Array:
    """(N,) est^2 = max over the Krylov space of ||Bz||^2 / ||Az||^2, a lower bound of lambda_1 that is at least theta.

    In the eigenbasis: lambda_max of Theta + Theta^(-1/2) coupling' coupling Theta^(-1/2), where theta_i > 64 u theta.
    """
    kept = P.theta > 64 * u * P.top[:, None]
    root = np.where(kept, np.sqrt(np.where(kept, P.theta, 1.0)), np.inf)
    C = P.coupling / root[:, None, :]
    small = np.where(kept, P.theta, 0.0)
    H = C.transpose(0, 2, 1) @ C
    diagonal = np.arange(H.shape[1])
    H[:, diagonal, diagonal] += small
    return np.maximum(np.linalg.eigvalsh(H)[:, -1], P.top)


def closed_form(P: Projected, half: Array, c: Array) -> Array:
    """(N,) upper bounds of lambda_1: the smaller of theta cosh^2(asinh(t) / (2k-1)) and est^2 cosh^2(asinh(t) / 2k).

    From the Chebyshev polynomials U_(2k-2), U_(2k-1) of sqrt(x / theta): tan angle(x1, V_1) >= sinh((2k-1) acosh(...)).
    """
    angle = np.arcsinh(np.array([tangent(x) for x in c]))
    first = P.top * np.cosh(np.minimum(angle / (2 * P.blocks - 1), 300)) ** 2
    return np.minimum(first, half * np.cosh(np.minimum(angle / (2 * P.blocks), 300)) ** 2)


def feasible(P: Projected, x: Array, c: Array, noise: Array) -> NDArray[np.bool_]:
    """(N, J): may x (N, J), all above theta, be lambda_1 when ||y_1|| >= c?

    y = Q'x1 solves (x - T) y = E R'w + F'x1 with ||y||^2 + ||w||^2 <= 1. So y_1 = N_1 w + rounding, and without
    rounding ||y_1||^2 <= lambda_max of the pencil (N_1'N_1, I + N'N), N = (x - T)^(-1) E R'. It is 1 / lambda_min(sum
    Y_j'Y_j) of the block recurrence, without its overflow and without inverting R.
    """
    d = 1 / (x[:, :, None] - P.theta[:, None, :])  # (N, J, K)
    first, coupling = P.first[:, None] * d[:, :, None], P.coupling[:, None]
    N1 = first @ coupling.swapaxes(-1, -2)  # (N, J, fresh, b)
    scaled = coupling * d[:, :, None]
    e, V = np.linalg.eigh(np.eye(coupling.shape[2]) + scaled @ scaled.swapaxes(-1, -2))
    whitened = (N1 @ V) / np.sqrt(np.maximum(e, 1.0))[:, :, None, :]
    reach = _norm(whitened)
    floor = (noise * P.top)[:, None]
    return reach * (1 + floor / (x - P.top[:, None])) + floor * _norm(first) >= c[:, None]


def _norm(M: Array) -> Array:
    """Spectral norms of the last two axes, short side first."""
    return np.sqrt(np.maximum(np.linalg.eigvalsh(M @ M.swapaxes(-1, -2))[..., -1], 0.0))


def polynomial(P: Projected, start: Array, c: Array, noise: Array) -> Array:
    """(N,) sup of the feasible x below the proved bound `start`.

    Feasibility is not monotone for b > 1: walk down from `start` on a grid geometric in x - theta until a feasible
    point appears, then bisect inside that cell. Where `start` itself is feasible, it stands.
    """
    top = P.top
    # from here up, rounding alone cannot make a point feasible
    high = np.maximum(start, top * (1 + 2 * noise / np.maximum(c, 1e-300)))
    least = np.maximum(noise, 2.0**-50)  # of (x - theta) / theta
    low = np.full_like(high, np.nan)
    open_ = high - top > least * top
    while open_.any():
        j = np.flatnonzero(open_)
        Q = Projected(P.theta[j], P.first[j], P.coupling[j], P.blocks[j])
        x = top[j, None] + (high - top)[j, None] * RATIO ** -np.arange(CELLS)
        hit = feasible(Q, x, c[j], noise[j])
        found, at = hit.any(1), hit.argmax(1)
        low[j[found]] = x[found, at[found]]
        high[j] = np.where(found, x[np.arange(len(j)), np.maximum(at - 1, 0)], x[:, -1])
        open_[j] = ~found & (high[j] - top[j] > least[j] * top[j])
    j = np.flatnonzero(~np.isnan(low) & (low < high))
    if len(j):
        Q = Projected(P.theta[j], P.first[j], P.coupling[j], P.blocks[j])
        for _ in range(BISECTIONS):
            middle = 0.5 * (low[j] + high[j])
            hit = feasible(Q, middle[:, None], c[j], noise[j])[:, 0]
            low[j], high[j] = np.where(hit, middle, low[j]), np.where(hit, high[j], middle)
    return high


def trace_bound(P: Projected, frob2: Array, margin: Rounding) -> Array:
    """(N,) deterministic: lambda_1 <= lambda_max [[T, E R'], [R E', tau I]] + rounding, tau = ||A||_F^2 - tr T >=
    ||rest||."""
    captured = P.theta.sum(1)
    tau = np.maximum(frob2 - captured, 0) + 2 * margin.noise * frob2
    return arrow(P, tau) + margin.noise * P.top


def arrow(P: Projected, tau: Array) -> Array:
    """(N,) lambda_max [[Theta, coupling'], [coupling, tau I]]."""
    N, b, K = P.coupling.shape
    M = np.zeros((N, K + b, K + b))
    M[:, np.arange(K), np.arange(K)] = P.theta
    M[:, np.arange(K, K + b), np.arange(K, K + b)] = tau[:, None]
    M[:, K:, :K], M[:, :K, K:] = P.coupling, P.coupling.transpose(0, 2, 1)
    return np.linalg.eigvalsh(M)[:, -1]


def gram_trace_bound(P: Projected, gram_frob2: Array, margin: Rounding) -> Array:
    """(N,) deterministic: as trace_bound with tau = (||B||_F^2 - ||T||_F^2 - 2 ||R||_F^2)^(1/2) >= ||rest||."""
    inside = (P.theta**2).sum(1) + 2 * (P.coupling**2).sum((1, 2))
    tau = np.sqrt(np.maximum(gram_frob2 - inside, 0) + 4 * margin.noise * gram_frob2)
    return arrow(P, tau) + margin.noise * P.top


class Bounds(NamedTuple):
    """sqrt of the bounds of lambda_1, rounding margins added, in units of scale * A; which bound won."""

    lower: Array
    upper: Array
    method: list[str]


def smallest(candidates: dict[str, Array]) -> tuple[Array, list[str]]:
    names = list(candidates)
    table = np.stack([np.where(np.isnan(v), np.inf, v) for v in candidates.values()])
    best = table.argmin(0)
    return table.min(0), [names[i] for i in best]


def lower_bound(P: Projected, margin: Rounding) -> Array:
    """(N,) sqrt of the half-step quotient, rounded down: at most sigma_max."""
    return np.sqrt(half_step(P, margin.u)) * (1 - margin.value)


def deterministic(P: Projected, frob2: Array, margin: Rounding) -> dict[str, Array]:
    """Upper bounds of sigma_max that always hold and cost nothing: name -> (N,)."""
    up = 1 + 4 * margin.value
    return {
        "frobenius": np.sqrt(frob2 * (1 + 2 * margin.noise)) * up,
        "trace_lanczos": np.sqrt(trace_bound(P, frob2, margin)) * up,
    }


def probabilistic(P: Projected, frob2: Array, n: Sequence[int], fresh: int, delta: float, margin: Rounding) -> Bounds:
    """Bracket of sigma_max whose upper side fails with probability at most delta, per matrix, over its start.

    A start component below 1e3 u is below what the arithmetic can see: then only the deterministic bounds stand.
    """
    c = np.array([start_constant(size, fresh, delta) for size in n])
    usable = c >= LEAST_START * margin.u
    start = closed_form(P, half_step(P, margin.u), np.where(usable, c, 1.0))
    walked = polynomial(P, start, np.where(usable, c, 1.0), margin.noise)
    up = 1 + 4 * margin.value
    upper, method = smallest(
        deterministic(P, frob2, margin)
        | {
            "chebyshev": np.where(usable & (start * (1 - 1e-12) <= walked), np.sqrt(walked) * up, np.inf),
            "block_poly": np.where(usable & (start * (1 - 1e-12) > walked), np.sqrt(walked) * up, np.inf),
        }
    )
    lower = lower_bound(P, margin)
    return Bounds(lower, np.maximum(upper, lower), method)


def upper_of_restarted(row: Sequence[float], n: int, b: int, *, fresh: int | None = None, delta: float = 1e-6) -> float:
    """Upper bound of sigma_max (unscaled), probability 1 - delta, from one row of `info` of a run that may have
    restarted.

    fresh: random columns of its start (None: all b). A restart keeps theta and gives up the rest of the space, so the
    closed form holds with the k of the first cycle: theta now >= theta then. Rounding of float32 is allowed for.
    """
    info = {name: float(row[i]) for name, i in INFO.items()}
    k = max(1, min(int(info["reads"]) - (info["scale"] != 1), BASIS_COLUMNS // b))
    c = start_constant(n, min(b if fresh is None else fresh, n), delta)
    upper = math.sqrt(info["frob2"])
    if c > 0:
        cosh = math.cosh(min(math.asinh(tangent(c)) / (2 * k - 1), 300.0))
        floor = math.sqrt(1 + 2 * float(rounding([n], [n], 2.0**-23).noise[0]) / c)
        upper = min(upper, math.sqrt(info["theta"]) * max(cosh, floor))
    return upper * (1 + 2.0**-18) / info["scale"]


def one_inf_bound(A: Tensor) -> Tensor:
    """(k,) float64, deterministic: sqrt(max column sum * max row sum) of |A| for A (k, m, n)."""
    k, m, n = A.shape
    one = torch.linalg.vector_norm(A, 1, dim=1, dtype=torch.float64).amax(1)
    inf = torch.linalg.vector_norm(A, 1, dim=2, dtype=torch.float64).amax(1)
    return one.sqrt() * inf.sqrt() * (1 + (m + n) * 2.0**-52)


def schatten_bounds(x: Tensor, squarings: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Deterministic: sigma_max <= S_q = (sum sigma_i^q)^(1/q) <= n^(1/q) sigma_max for q = 4, 8, ... by Gram squaring.

    x (k, m, n) float64. Yields (q, S_q rounded up, ||x'x||_F^2 rounded up). G <- G/f, lg <- 2 (lg + ln f), G <- G'G;
    S_(2^(j+1)) = exp((ln ||G||_F + lg) / 2^j) (Delattre et al. 2023). Each product errs by at most (m + n) sqrt(n) u
    of its norm, since ||G'G||_F >= ||G||_F^2 / sqrt(n); later ones count half as much each.
    """
    x = x if x.shape[2] <= x.shape[1] else x.mT
    _, m, n = x.shape
    margin = 4 * (m + n) * math.sqrt(max(n, 1)) * 2.0**-53
    G, log = x, x.new_zeros(x.shape[0])
    gram_frob2 = log
    for j in range(1, squarings + 1):
        f = torch.linalg.matrix_norm(G)
        safe = torch.where(f > 0, f, torch.ones_like(f))
        G = G / safe[:, None, None]
        log = 2 * (log + safe.log())
        G = G.mT @ G
        norm = torch.linalg.matrix_norm(G)
        value = torch.exp((torch.where(norm > 0, norm, torch.ones_like(norm)).log() + log) / 2**j)
        if j == 1:
            gram_frob2 = (norm * f.square()).square() * (1 + 2 * margin)
        yield 2 ** (j + 1), torch.where(f > 0, value, torch.zeros_like(value)) * (1 + margin), gram_frob2
