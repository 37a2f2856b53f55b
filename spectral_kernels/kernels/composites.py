"""Composites with a default written over the words; a backend may replace one by a single kernel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import random
from .contracts import INFO, INFO_COLUMNS, STATS, acc_dtype, counts, sides
from .reference import orthonormalize, runs

# A read at scale 1 is exact enough while every product of four entries stays far inside the range of acc.
SAFE_EXPONENT = {torch.float32: 20, torch.float64: 200}
# Subnormal matrices need factors above the largest power of two of acc: brought to amax = 2^-SAFE instead of 1.
LARGEST_EXPONENT = {torch.float32: 126, torch.float64: 1000}


def start_block(m: int, n: int, b: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(b, n) orthonormal rows drawn from (seed, shape): a uniformly distributed subspace (Gaussian rows)."""
    draw = random.normals(random.key(seed, m, n, 0), b * n, device).view(1, b, n)
    floor = torch.full((1,), 1e-6 * max(n, 1) ** 0.5, dtype=torch.float64, device=device)
    block, _ = orthonormalize(draw, draw[:, :0], floor)
    return block[0].to(dtype)


def start_blocks(A: Sequence[Tensor], b: int, seed: int) -> Tensor:
    """Flat (b, n_j): every matrix of a shape starts from the same block."""
    parts = [_kept_block(m, n, b, seed, acc_dtype(a.dtype), a.device).repeat(k) for a in A for k, m, n in [a.shape]]
    return torch.cat(parts)


_blocks: OrderedDict[Hashable, Tensor] = OrderedDict()  # the flat start blocks used last
_captured: dict[Hashable, Tensor] = {}  # those that captured CUDA graphs read


def _kept_block(m: int, n: int, b: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`start_block`, flat: forty small launches on a GPU, so the last ones are kept."""
    key = (m, n, b, seed, dtype, device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _blocks.get(key)
    if found is None:
        found = start_block(m, n, b, seed, dtype, device).reshape(-1)
        if capturing:  # its memory belongs to the graph
            return found
        _blocks[key] = found
        if len(_blocks) > 64:
            _blocks.popitem(last=False)
    elif capturing:
        _captured[key] = found
    return found


def safe_scale(amax: Tensor, acc: torch.dtype) -> Tensor:
    """(N,) powers of two, float64: 1 where amax lies in the safe window (or is 0 or not finite), else near 1 / amax."""
    limit = SAFE_EXPONENT[acc]
    inside = (amax >= 2.0**-limit) & (amax <= 2.0**limit)
    usable = torch.isfinite(amax) & (amax > 0)
    exponent = -torch.frexp(torch.where(usable, amax, torch.ones_like(amax))).exponent + 1
    exponent = exponent.clamp(-LARGEST_EXPONENT[acc], LARGEST_EXPONENT[acc])
    return torch.where(inside | ~usable, torch.ones_like(amax), torch.ldexp(torch.ones_like(amax), exponent))


def block_krylov(
    words: Any,
    A: Sequence[Tensor],
    V0: Tensor | None,
    b: int,
    steps: int,
    cap: int,
    rank: int,
    tol: float,
    min_reads: int,
    seed: int,
    vectors: int,
    with_t: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The estimator as a loop over `gram_matvec` and `rayleigh_ritz_`; see contracts.py.

    With tol = 0 nothing is sent to the host (capturable); with tol > 0 one flag per read is.
    """
    acc, device, N = acc_dtype(A[0].dtype), A[0].device, counts(A)
    n = sides(A, 2)
    most = min(cap, steps * b)  # basis columns
    rows = most + b
    V = start_blocks(A, b, seed) if V0 is None else V0.clone()
    Q = torch.zeros(rows * sum(n), dtype=acc, device=device)
    T = torch.zeros((N, rows, rows), dtype=torch.float64, device=device)
    info = torch.zeros((N, INFO_COLUMNS), dtype=torch.float64, device=device)
    info[:, INFO["scale"]] = 1.0
    store(Q, V, n, b, rows)

    if N == 0:
        return info, Q.new_empty(0), T if with_t else T.new_empty(0)
    rayleigh_ritz_ = words.rayleigh_ritz_for(most, rank)
    columns = 0
    scale = torch.ones(N, dtype=acc, device=device)
    for read in range(steps):
        skip = info[:, INFO["done"]] > 0
        W, S, stats, _ = words.gram_matvec(A, V, scale, skip if read else None, b, read == 0, False)
        if read == 0:
            scale, W, S, stats = _first_read(words, A, V, W, S, stats, b, tol > 0, n, info)
        info[:, INFO["reads"]] += (info[:, INFO["done"]] == 0).double()
        rayleigh_ritz_(n, Q, V, T, info, W, S, scale, b, columns, rank, tol, min_reads)
        columns += b
        if tol > 0 and bool((info[:, INFO["done"]] > 0).all()):
            break
        if columns == most and read + 1 < steps:
            columns = _restart(Q, T, info, n, b, most)

    X = _ritz_vectors(Q, T, info, n, vectors, rows) if vectors else Q.new_empty(0)
    return info, X, T if with_t else T.new_empty(0)


def per_entry(flags: Tensor, n: Sequence[int], b: int) -> Tensor:
    """(b * sum n_j,): the flag of its matrix for every entry of a flat block; nothing comes from the host."""
    parts = [flags[first : first + count, None].expand(count, b * size) for first, count, size in runs(n)]
    return torch.cat([part.reshape(-1) for part in parts])


def store(Q: Tensor, V: Tensor, n: Sequence[int], b: int, rows: int) -> None:
    """Rows [0, b) of every matrix's Q := its block of V."""
    offset = 0
    for _, count, size in runs(n):
        q = Q[offset * rows : (offset + count * size) * rows].view(count, rows, size)
        q[:, :b] = V[offset * b : (offset + count * size) * b].view(count, b, size)
        offset += count * size


def _first_read(
    words: Any,
    A: Sequence[Tensor],
    V: Tensor,
    W: Tensor,
    S: Tensor,
    stats: Tensor,
    b: int,
    may_sync: bool,
    n: Sequence[int],
    info: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics into info; matrices out of the safe window are read once more at their own scale."""
    acc = V.dtype
    nan, inf = stats[:, STATS["nan"]] > 0, stats[:, STATS["inf"]] > 0
    amax = stats[:, STATS["amax"]]
    scale = safe_scale(amax, acc)
    again = (scale != 1) & ~nan & ~inf
    info[:, INFO["amax"]] = amax
    info[:, INFO["nan"]] = nan.double()
    info[:, INFO["inf"]] = inf.double()
    if not may_sync or bool(again.any()):
        W2, S2, stats2, _ = words.gram_matvec(A, V, scale.to(acc), ~again, b, True, False)
        W = torch.where(per_entry(again, n, b), W2, W)
        S = torch.where(again[:, None, None], S2, S)
        stats = torch.where(again[:, None], stats2, stats)
        info[:, INFO["reads"]] += again.double()
    info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
    info[:, INFO["scale"]] = scale
    finished = nan | inf | (amax == 0)
    info[:, INFO["done"]] = finished.double()
    info[:, INFO["reads"]] += finished.double()  # the loop counts the reads of matrices that go on
    sigma = torch.where(nan, torch.nan, torch.where(inf, torch.inf, 0.0))
    info[:, INFO["sigma"]] = torch.where(finished, sigma, info[:, INFO["sigma"]])
    return scale.to(acc), W, S, stats


def _restart(Q: Tensor, T: Tensor, info: Tensor, n: Sequence[int], b: int, most: int) -> int:
    """Thick restart: keep the leading quarter of the Ritz vectors and the pending block. Returns the new `columns`."""
    keep = max(b, most // (4 * b) * b)
    rows = T.shape[1]
    offset = 0
    for first, count, size in runs(n):
        mine = slice(first, first + count)
        q = Q[offset * rows : (offset + count * size) * rows].view(count, rows, size)
        offset += count * size
        values, vectors = torch.linalg.eigh(T[mine, :most, :most])
        z = vectors[:, :, -keep:].flip(2)  # (k, most, keep), descending
        coupling = T[mine, most : most + b, :most] @ z
        live = (info[mine, INFO["done"]] == 0)[:, None, None]
        t = torch.zeros_like(T[mine])
        t.diagonal(dim1=1, dim2=2)[:, :keep] = values[:, -keep:].flip(1)
        t[:, keep : keep + b, :keep] = coupling
        t[:, :keep, keep : keep + b] = coupling.mT
        T[mine] = torch.where(live, t, T[mine])
        basis = torch.zeros_like(q)
        basis[:, :keep] = z.mT.to(q.dtype) @ q[:, :most]
        basis[:, keep : keep + b] = q[:, most : most + b]
        q.copy_(torch.where(live, basis, q))
    return keep


def _ritz_vectors(Q: Tensor, T: Tensor, info: Tensor, n: Sequence[int], vectors: int, rows: int) -> Tensor:
    """Flat (vectors, n_j): the leading Ritz vectors of every matrix."""
    inside = torch.arange(rows, device=T.device)[None] < info[:, INFO["columns"], None]
    projected = T * (inside[:, :, None] & inside[:, None, :])
    _, z = torch.linalg.eigh(projected)
    z = z[:, :, -vectors:].flip(2)  # (N, rows, vectors)
    parts, offset = [], 0
    for first, count, size in runs(n):
        q = Q[offset * rows : (offset + count * size) * rows].view(count, rows, size)
        offset += count * size
        x = z[first : first + count].mT.to(q.dtype) @ q
        x = x / torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        parts.append(x.reshape(-1))
    return torch.cat(parts)
