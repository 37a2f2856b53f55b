"""The words of an optimizer's step in plain torch: the oracle of every other backend. See contracts.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import random
from .contracts import INFO, NORMS, acc_dtype, counts
from .reference import blocks, gram_matvec, orthonormalize, runs, supports  # noqa: F401  `supports` is the registry's


def _momentum(
    m: Tensor, g: Tensor, gone: Tensor | None, beta: float, alpha: float, nesterov: bool, update: bool, propagate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One stack: update m, return (X in acc, NaN flags, inf flags), flags (k,) of what came in."""
    acc = acc_dtype(m.dtype)
    grad = g.to(acc)
    usable = grad if propagate else torch.where(torch.isfinite(grad), grad, 0)
    new = m.to(acc)
    raw = grad if update else new  # without an update the momentum has been cleaned before
    if update:
        new = beta * new + alpha * usable
        raw = torch.where(torch.isfinite(grad), new, grad)
        if not propagate:
            new = torch.where(torch.isfinite(new), new, 0)
        stored = new.to(m.dtype)
        raw = torch.where(torch.isfinite(stored), raw, stored.to(acc))  # a half-precision one may overflow by rounding
        if not propagate:
            stored = torch.where(torch.isfinite(stored), stored, 0)
        if gone is not None:
            stored = torch.where(gone[:, None, None], m, stored)
        m.copy_(stored)
        new = stored.to(acc)
    if nesterov:
        new = beta * new + alpha * usable
        raw = torch.where(torch.isfinite(new), raw, new)
        if not propagate:
            new = torch.where(torch.isfinite(new), new, 0)
    return new, raw.isnan().any(-1).any(-1), raw.isinf().any(-1).any(-1)


def _moved(
    M: Sequence[Tensor], G: Sequence[Tensor], skip: Tensor | None, *options: object
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    first = 0
    for m, g in zip(M, G, strict=True):
        mine = slice(first, first + m.shape[0])
        first += m.shape[0]
        yield mine, *_momentum(m, g, None if skip is None else skip[mine], *options)  # type: ignore[arg-type]


def momentum_gram_matvec_(
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    update: bool,
    propagate: bool,
    b: int,
    with_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M <- beta M + alpha G, then gram_matvec of M or of the look-ahead. See contracts.py."""
    nan = torch.zeros(counts(M), dtype=torch.float64, device=V.device)
    inf = torch.zeros_like(nan)
    X = []
    for mine, x, is_nan, is_inf in _moved(M, G, skip, beta, alpha, nesterov, update, propagate):
        X.append(x)
        nan[mine], inf[mine] = is_nan.double(), is_inf.double()
    W, S, stats, Y = gram_matvec(X, V, scale, skip, b, True, with_y)
    keep = 1.0 if skip is None else (~skip).double()
    stats[:, NORMS["nan"]], stats[:, NORMS["inf"]] = nan * keep, inf * keep
    return W, S, stats, Y


def momentum_norms_(
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    scale: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    update: bool,
    propagate: bool,
) -> Tensor:
    """M <- beta M + alpha G and the norms of M or of the look-ahead that need no block. See contracts.py."""
    norms = torch.zeros((counts(M), len(NORMS)), dtype=torch.float64, device=scale.device)
    for mine, x, is_nan, is_inf in _moved(M, G, skip, beta, alpha, nesterov, update, propagate):
        norms[mine, NORMS["nan"]], norms[mine, NORMS["inf"]] = is_nan.double(), is_inf.double()
        if x.shape[1] * x.shape[2]:
            square = (x * scale[mine, None, None]).double().square().sum(2)
            norms[mine, NORMS["frob2"]] = square.sum(1)
            norms[mine, NORMS["amax"]] = torch.nan_to_num(x.double().abs(), nan=0.0, posinf=torch.inf).amax((1, 2))
            norms[mine, NORMS["row2"]] = square.amax(1)
    return norms if skip is None else norms.masked_fill_(skip[:, None], 0)


def apply_update_(
    P: Sequence[Tensor],
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    size: Tensor,
    scale: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    L: Tensor | None = None,
    R: Tensor | None = None,
    r: int = 0,
) -> None:
    """P <- (1 - decay) P - size (scale X - L'R), X = M or, with gradients, beta M + alpha G. See contracts.py."""
    first = 0
    lefts, rights = ([None] * len(P) if x is None else blocks(x, r, P, dim) for x, dim in ((L, 1), (R, 2)))
    for i, (p, m, left, right) in enumerate(zip(P, M, lefts, rights, strict=True)):
        mine = slice(first, first + p.shape[0])
        first += p.shape[0]
        acc = torch.promote_types(acc_dtype(p.dtype), acc_dtype(m.dtype))
        x = m.to(acc)
        if len(G):
            x = beta * x + alpha * G[i].to(acc)
        new = p.to(acc) * (1 - decay[mine, None, None]).to(acc)
        x = x * scale[mine, None, None].to(acc)
        if left is not None and right is not None:
            x = x - left.to(acc).mT @ right.to(acc)
        new = new - size[mine, None, None].to(acc) * x
        new = new.to(p.dtype)
        if skip is not None:
            new = torch.where(skip[mine, None, None], p, new)
        p.copy_(new)


def next_block_(
    m: Sequence[int],
    n: Sequence[int],
    Q: Tensor,
    T: Tensor,
    info: Tensor,
    V: Tensor,
    step: Tensor,
    b: int,
    fresh: int,
    seed: int,
) -> Tensor:
    """The block of the next step, and an upper bound of sigma_max. See contracts.py."""
    rows, order = T.shape[1], T.shape[1] - b
    eps = torch.finfo(V.dtype).eps
    theta = info[:, INFO["theta"]]
    live = (theta > 0) & torch.isfinite(info[:, INFO["sigma"]])
    columns = info[:, INFO["columns"]].long()
    index = torch.arange(rows, device=T.device)
    inside = index[None] < columns[:, None]  # (N, rows)
    behind = (index[None] >= columns[:, None]) & (index[None] < columns[:, None] + b)
    projected = T * (inside[:, :, None] & inside[:, None, :])
    projected = torch.where(live[:, None, None], projected, 0)[:, :order, :order]
    _, vectors = torch.linalg.eigh(projected)
    reach = torch.where(live[:, None, None], T * ((inside | behind)[:, :, None] & inside[:, None, :]), 0)
    leading = reach[:, :, :order] @ vectors[:, :, order - (b - fresh) :].flip(2)  # A'A z in the basis, (N, rows, kept)
    kept, _ = orthonormalize(leading.mT, leading.mT[:, :0], 8 * eps * theta.clamp(min=0))

    shapes = [(max(x, y), min(x, y)) for x, y in zip(m, n, strict=True)]
    offset = 0
    for first, count, size in runs(n):
        mine = slice(first, first + count)
        q = Q[offset * rows : (offset + count * size) * rows].view(count, rows, size)
        v = V[offset * b : (offset + count * size) * b].view(count, b, size)
        offset += count * size
        draws = random.draws([random.base(seed, *shape) for shape in shapes[mine]], 2 + step[mine], b * size)
        x = kept[mine].to(q.dtype) @ torch.where(live[mine, None, None], q, 0)
        block = fill(x, draws.view(count, b, size))
        v.copy_(torch.where(live[mine, None, None], block.to(v.dtype), v))

    coupling = torch.where(behind[:, :, None] & inside[:, None, :], T, 0).square().sum((1, 2)).sqrt()
    frob2 = info[:, INFO["frob2"]]
    room = 64 * eps * frob2
    tau = (frob2 - info[:, INFO["trace"]]).clamp(min=0) + room
    square = (theta + tau) / 2 + torch.hypot((theta - tau) / 2, coupling) + room
    bound = torch.minimum(square, frob2 + room).sqrt() / info[:, INFO["scale"]]
    return torch.where(live, bound, 0)


def fill(x: Tensor, draws: Tensor) -> Tensor:
    """(k, b, n): the nonzero rows of x (k, kept, n), then as many draws (k, b, n), orthonormalized, as fill b rows."""
    k, b, n = draws.shape
    floor = torch.full((k,), 1e-6 * max(n, 1) ** 0.5, dtype=torch.float64, device=x.device)
    new, _ = orthonormalize(draws.to(x.dtype), x, floor)
    rows = torch.cat((x, new), 1)
    empty = (rows == 0).all(2)
    order = torch.argsort(empty.to(torch.uint8), dim=1, stable=True)[:, :b]
    return torch.gather(rows, 1, order[:, :, None].expand(-1, -1, n))
