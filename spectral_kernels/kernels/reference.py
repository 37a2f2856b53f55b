"""The words in plain torch: short enough to check by eye, and the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .contracts import INFO, acc_dtype, counts


def supports(word: str, device_type: str, dtype: torch.dtype, b: int) -> str | None:
    return None


def blocks(flat: Tensor, rows: int, A: Sequence[Tensor], dim: int) -> Iterator[Tensor]:
    """Views (k_i, rows, size_i) of a flat tensor, one per stack of the ragged list."""
    offset = 0
    for a in A:
        shape = (a.shape[0], rows, a.shape[dim])
        length = shape[0] * shape[1] * shape[2]
        yield flat[offset : offset + length].view(shape)
        offset += length


def gram_matvec(
    A: Sequence[Tensor], V: Tensor, scale: Tensor, skip: Tensor | None, b: int, with_stats: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W = A'(A V), S = (A V)'(A V), statistics of the first read. Two matrix products; see contracts.py."""
    acc, N = V.dtype, counts(A)
    W = torch.empty_like(V)
    S = V.new_zeros((N, b, b), dtype=torch.float64)
    stats = V.new_zeros((N, 4), dtype=torch.float64)
    Y = V.new_empty(sum(a.shape[0] * a.shape[1] for a in A) * b if with_y else 0)
    out_y = blocks(Y, b, A, 1) if with_y else iter([None] * len(A))
    first = 0
    for a, v, w, y_out in zip(A, blocks(V, b, A, 2), blocks(W, b, A, 2), out_y, strict=True):
        mine = slice(first, first + a.shape[0])
        first += a.shape[0]
        x = a.to(acc) * scale[mine, None, None]
        y = torch.matmul(v, x.mT)  # (k, b, m)
        torch.matmul(y, x, out=w)
        S[mine] = torch.matmul(y.double(), y.double().mT)
        if with_stats and a.shape[1] * a.shape[2]:
            stats[mine, 0] = x.double().square().sum((1, 2))
            stats[mine, 1] = torch.nan_to_num(a.double().abs(), nan=0.0, posinf=torch.inf).amax((1, 2))
            stats[mine, 2] = a.isnan().any(-1).any(-1).double()
            stats[mine, 3] = a.isinf().any(-1).any(-1).double()
        if y_out is not None:
            y_out.copy_(y)
        if skip is not None:
            gone = skip[mine, None, None]
            w.masked_fill_(gone, 0)
            if y_out is not None:
                y_out.masked_fill_(gone, 0)
    if skip is not None:
        S.masked_fill_(skip[:, None, None], 0)
        stats.masked_fill_(skip[:, None], 0)
    return W, S, stats, Y


def runs(n: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first matrix, number of matrices, n) for every run of equal sizes: a run is served as one batch."""
    start = 0
    for j in range(1, len(n) + 1):
        if j == len(n) or n[j] != n[start]:
            yield start, j - start, n[start]
            start = j


def orthonormalize(W: Tensor, Q: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """W (k, b, n) -> orthonormal rows against Q (k, K, n) and among themselves, and R (k, b, b) with W = (..) + R' X.

    Twice classical Gram-Schmidt against Q, then row by row twice against the rows before and Q again: what is left
    of nearly collinear rows may lie in the basis. Rows whose remainder is not above `floor` (k,) become zero rows.
    """
    for _ in range(2):
        W = W - (W @ Q.mT) @ Q
    b = W.shape[1]
    X = torch.zeros_like(W)
    R = W.new_zeros((W.shape[0], b, b), dtype=torch.float64)
    for c in range(b):
        w = W[:, c : c + 1]
        for _ in range(2):
            h = w @ X.mT  # (k, 1, b)
            w = w - h @ X
            w = w - (w @ Q.mT) @ Q
            R[:, :, c] += h[:, 0].double()
        norm = torch.linalg.vector_norm(w.double(), dim=2)[:, 0]
        kept = norm > floor
        norm = torch.where(kept, norm, torch.zeros_like(norm))
        inverse = torch.where(kept, 1 / torch.where(kept, norm, torch.ones_like(norm)), torch.zeros_like(norm))
        X[:, c] = w[:, 0] * inverse[:, None].to(w.dtype)
        R[:, c, c] = norm
    return X, R


def rayleigh_ritz_(
    n: Sequence[int],
    Q: Tensor,
    V: Tensor,
    T: Tensor,
    info: Tensor,
    W: Tensor,
    S: Tensor,
    scale: Tensor,
    b: int,
    columns: int,
    rank: int,
    tol: float,
    min_reads: int,
) -> None:
    """One step of block Krylov after its read: extend T and Q, estimate, decide. See contracts.py."""
    K = columns + b
    rows = T.shape[1]
    eps = torch.finfo(acc_dtype(V.dtype)).eps
    offset = 0
    for first, count, size in runs(n):
        mine = slice(first, first + count)
        live = info[mine, INFO["done"]] == 0
        q = Q[offset * rows : (offset + count * size) * rows].view(count, rows, size)
        v = V[offset * b : (offset + count * size) * b].view(count, b, size)
        w = W[offset * b : (offset + count * size) * b].view(count, b, size)
        offset += count * size
        t = T[mine]
        s = S[mine]
        # what a finished matrix holds may be anything: work on zeros in its place, and write nothing back
        w = torch.where(live[:, None, None], w, torch.zeros_like(w))
        s = torch.where(live[:, None, None], s, torch.zeros_like(s))
        projected = t[:, :K, :K].clone()
        projected[:, columns:, columns:] = 0.5 * (s + s.mT)
        projected = torch.where(live[:, None, None], projected, torch.zeros_like(projected))
        largest = torch.linalg.vector_norm(w.double(), dim=2).amax(1)
        floor = 8 * eps * torch.maximum(projected.diagonal(dim1=1, dim2=2).amax(1), largest)
        x, R = orthonormalize(w, torch.where(live[:, None, None], q[:, :K], torch.zeros_like(q[:, :K])), floor)

        values, vectors = torch.linalg.eigh(projected)
        top = values[:, -min(rank, K) :].flip(1)  # (k, rank), descending
        z = vectors[:, columns:, -min(rank, K) :].flip(2)  # last block of the Ritz vectors
        theta = top[:, 0].clamp(min=0)
        one = torch.ones_like(theta)
        safe = torch.where(theta > 0, theta, one)
        residual = torch.linalg.vector_norm(R @ z, dim=1) / safe[:, None]
        below = values[:, -min(rank, K) - 1] if K > rank else torch.zeros_like(theta)
        gap = ((top - below[:, None]) / safe[:, None]).clamp(min=0)
        square = residual.square()
        error = torch.where(square > 0, 0.5 * square / (gap + residual).clamp(min=1e-300), square).amax(1)
        rho = residual[:, 0]
        trace = projected.diagonal(dim1=1, dim2=2).sum(1)
        hidden = info[mine, INFO["frob2"]] - trace > 0.5 * theta  # a larger value could hide outside the basis
        enough = K >= b * (min_reads + hidden.long())  # blocks: a first read repeated at another scale teaches nothing
        done = (theta <= 0) | (enough & (10 * error <= tol) & (tol > 0)) | (K >= size)
        done |= R.diagonal(dim1=1, dim2=2).amax(1) <= 0

        new = info[mine].clone()
        new[:, INFO["theta"]] = theta
        new[:, INFO["rho"]] = rho
        new[:, INFO["error"]] = error
        new[:, INFO["sigma"]] = (theta * (1 + rho.square())).sqrt() / scale[mine].double()
        new[:, INFO["trace"]] = trace
        new[:, INFO["columns"]] = K
        new[:, INFO["done"]] = done.double()
        info[mine] = torch.where(live[:, None], new, info[mine])
        extended = t.clone()
        extended[:, :K, :K] = projected
        extended[:, K : K + b, columns:K] = R
        extended[:, columns:K, K : K + b] = R.mT
        T[mine] = torch.where(live[:, None, None], extended, t)
        q[:, K : K + b] = torch.where(live[:, None, None], x, q[:, K : K + b])
        v.copy_(torch.where(live[:, None, None], x, v))
