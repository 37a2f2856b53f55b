"""`spectral_bounds`: a proved bracket lower <= sigma_max <= upper from a few reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.contracts import INFO, acc_dtype
from . import arguments, certificates
from .arguments import ragged
from .estimate import BLOCK, oriented, warm_blocks
from .norm import _check_blocks

SQUARINGS = 6  # S_128: at most 1.067 sigma_max for n = 4096
TIGHT = 2.0**-10  # a deterministic upper side this close to the lower one is not squared any further
WIDEST = 16  # columns of a run


class SpectralBounds(NamedTuple):
    """lower <= sigma_max <= upper: always (kind "deterministic"), or the upper side with probability 1 - delta per
    matrix.

    lower, upper, reads have the batch shape; method names the bound that won, one per matrix in order; block holds the
    leading vectors (..., 4, side) as `spectral_norm(return_block=True)` gives them, for `v0` of a later call.
    """

    lower: Tensor
    upper: Tensor
    kind: str
    delta: float
    reads: Tensor
    method: tuple[str, ...]
    block: Any


def spectral_bounds(
    A: Tensor | Sequence[Tensor],
    *,
    delta: float = 1e-6,
    deterministic: bool = False,
    steps: int = 8,
    block: int = 4,
    seed: int = 0,
    v0: Tensor | Sequence[Tensor] | None = None,
) -> Any:
    """Proved bounds lower <= sigma_max(A) <= upper of every matrix, rounding included.

    A: (..., m, n) or a list of such, as for `spectral_norm`; a list of matrices gives one SpectralBounds of (len(A),)
    tensors, a list with stacks a list of SpectralBounds. The result is float64 for float64 input, float32 otherwise,
    rounded outward. delta: probability per matrix that the upper side fails, over seeds drawn after A is fixed; the
    lower side always holds. deterministic: an upper side that always holds (trace-Lanczos, Schatten norms by up to 6
    Gram squarings in float64, ...); delta is then 0. steps: reads. block: random columns of the start; with v0 (a
    block of a former call) they are drawn anew beside its columns, so a warm start is certified like a cold one: vary
    the seed from call to call. NaN entries give NaN, infinite ones inf on both sides, zero and empty matrices 0. Not
    an estimate: `spectral_norm` is. Source: docs/accuracy.md; ops/certificates.py has the formulas.
    """
    batch = ragged(A)
    delta = arguments.check_number("delta", delta, 0.0, above=True)
    if delta >= 1:
        raise ValueError(f"delta must lie in (0, 1), not {delta}")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, not {deterministic!r}")
    steps = arguments.check_int("steps", steps, 1, 64)
    block = arguments.check_int("block", block, 1, WIDEST - BLOCK)
    seed = arguments.check_seed(seed)
    kind = "deterministic" if deterministic else "probabilistic"
    delta = 0.0 if deterministic else delta
    if not batch.stacks:
        return SpectralBounds(torch.empty(0), torch.empty(0), kind, delta, torch.empty(0, dtype=torch.int64), (), [])

    with torch.no_grad():
        stacks = [oriented(a.detach()) for a in batch.stacks]
        kept = None if v0 is None else _check_blocks(v0, batch)
        b = block if kept is None else block + BLOCK
        start = None if kept is None else warm_blocks(kept, stacks, seed, block)
        words = registry.words(stacks[0].device.type, stacks[0].dtype, b)
        info, X, T = words.block_krylov(stacks, start, b, steps, steps * b, 1, 0.0, 1, seed, b, True)
        lower, upper, method = _bracket(stacks, info.cpu(), T.cpu(), b, block, delta, deterministic)
        reads = info[:, INFO["reads"]].to(torch.int64)

    lowers, uppers, reads_of = batch.scatter(lower), batch.scatter(upper), batch.scatter(reads)
    blocks = _leading(batch.scatter(X, [b] * len(stacks), [a.shape[2] for a in stacks]))
    if not batch.is_list:
        return SpectralBounds(lowers[0], uppers[0], kind, delta, reads_of[0], method, blocks[0])
    if batch.plain:
        return SpectralBounds(lower, upper, kind, delta, reads, method, blocks)
    out, first = [], 0
    for i, a in enumerate(stacks):
        mine = method[first : first + a.shape[0]]
        first += a.shape[0]
        out.append(SpectralBounds(lowers[i], uppers[i], kind, delta, reads_of[i], mine, blocks[i]))
    return out


def _leading(blocks: list[Tensor]) -> list[Tensor]:
    """The first 4 rows; zero rows where a run had fewer."""
    lacking = [max(0, BLOCK - x.shape[-2]) for x in blocks]
    pad = torch.nn.functional.pad
    return [pad(x[..., :BLOCK, :], (0, 0, 0, more)) for x, more in zip(blocks, lacking, strict=True)]


def _bracket(
    stacks: Sequence[Tensor], info: Tensor, T: Tensor, b: int, fresh: int, delta: float, deterministic: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """(N,) lower and upper in acc on the matrices' device, rounded outward, and the method names."""
    acc = acc_dtype(stacks[0].dtype)
    N = info.shape[0]
    column = {name: info[:, i].numpy() for name, i in INFO.items()}
    nan, inf = column["nan"] > 0, column["inf"] > 0
    trivial = np.where(nan, np.nan, np.where(inf, np.inf, 0.0))
    lower, upper, method = trivial.copy(), trivial.copy(), ["exact"] * N
    size = [(a.shape[1], a.shape[2]) for a in stacks for _ in range(a.shape[0])]
    eps = torch.finfo(acc).eps
    used = [certificates.trustworthy(t, int(K), b, eps) for t, K in zip(T.numpy(), column["columns"], strict=True)]
    ready = ~nan & ~inf & (column["theta"] > 0)
    # one batch per order of T: the arithmetic of a matrix does not depend on its neighbours
    for K in sorted({K for K, go in zip(used, ready, strict=True) if go}):
        j = np.flatnonzero(ready & (np.array(used) == K))
        m, n = zip(*(size[i] for i in j), strict=True)
        margin = certificates.rounding(m, n, eps)
        P = certificates.project(T.numpy()[j], K, b, fresh)
        if deterministic:
            found = _always(stacks, j, P, column["frob2"][j], column["scale"], margin)
        else:
            found = certificates.probabilistic(P, column["frob2"][j], n, fresh, delta, margin)
        scale = column["scale"][j]
        lower[j], upper[j] = _unscale(found.lower, scale, -np.inf), _unscale(found.upper, scale, np.inf)
        for i, name in zip(j, found.method, strict=True):
            method[i] = name
    device = stacks[0].device
    return _outward(lower, acc, -torch.inf).to(device), _outward(upper, acc, torch.inf).to(device), tuple(method)


def _always(
    stacks: Sequence[Tensor],
    chosen: np.ndarray,
    P: certificates.Projected,
    frob2: np.ndarray,
    scale: np.ndarray,
    margin: certificates.Rounding,
) -> certificates.Bounds:
    """Deterministic bracket: the free bounds, then Gram squaring of the matrices where they are not tight."""
    lower = certificates.lower_bound(P, margin)
    table = certificates.deterministic(P, frob2, margin)
    shape = lower.shape
    table |= {name: np.full(shape, np.inf) for name in ("one_inf", "gram_trace", "schatten")}
    first = 0
    place = {int(i): p for p, i in enumerate(chosen)}
    for a in stacks:
        mine = [i for i in range(first, first + a.shape[0]) if i in place]
        p = np.array([place[i] for i in mine], dtype=int)
        rows = torch.tensor([i - first for i in mine], device=a.device)
        first += a.shape[0]
        if not mine:
            continue
        free = np.minimum(table["frobenius"][p], table["trace_lanczos"][p])
        rough = free > lower[p] * (1 + TIGHT)
        if not rough.any():
            continue
        p, rows = p[rough], rows[torch.from_numpy(rough).to(a.device)]
        factor = torch.from_numpy(scale[[int(chosen[q]) for q in p]]).to(a.device)
        x = a[rows].double() * factor[:, None, None]
        table["one_inf"][p] = certificates.one_inf_bound(x).cpu().numpy()
        part = certificates.Projected(P.theta[p], P.first[p], P.coupling[p], P.blocks[p])
        few = certificates.Rounding(margin.u, margin.value[p], margin.noise[p])
        for q, value, gram_frob2 in certificates.schatten_bounds(x, SQUARINGS):
            table["schatten"][p] = value.cpu().numpy()
            if q == 4:
                free_gram = certificates.gram_trace_bound(part, gram_frob2.cpu().numpy(), few)
                table["gram_trace"][p] = np.sqrt(free_gram) * (1 + 4 * few.value)
            if (np.minimum(table["gram_trace"][p], table["schatten"][p]) <= lower[p] * (1 + TIGHT)).all():
                break
    upper, method = certificates.smallest(table)
    return certificates.Bounds(lower, np.maximum(upper, lower), method)


def _unscale(value: np.ndarray, scale: np.ndarray, toward: float) -> np.ndarray:
    """value / scale in float64; where that is subnormal and inexact, the next number on the safe side."""
    with np.errstate(over="ignore", under="ignore"):
        out = value / scale
        wrong = out * scale > value if toward < 0 else out * scale < value
    return np.where(wrong, np.nextafter(out, toward), out)


def _outward(value: np.ndarray, acc: torch.dtype, toward: float) -> Tensor:
    """Cast, then step to the next number where the cast went the wrong way."""
    exact = torch.from_numpy(value)
    cast = exact.to(acc)
    wrong = cast.double() > exact if toward < 0 else cast.double() < exact
    return torch.where(wrong, torch.nextafter(cast, torch.full_like(cast, toward)), cast)
