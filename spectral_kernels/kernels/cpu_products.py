"""The product words on CPUs, over torch's BLAS: half of every symmetric product, matrices one after the other, buffers
reused. See contracts_products.py.

Native code would have to beat the BLAS that torch brings; bf16 and fp16 products are left to the reference, which runs
them in float32: without special instructions they are hundreds of times slower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .contracts_products import LEAST_HALVED, factors_of, like, rounded, triples

PANEL = 256  # rows of a panel
MATRIX_BY_MATRIX = 256  # rows from which a stack is served one matrix after the other: its products fill the cores


def supports(word: str, device_type: str, dtype: torch.dtype, b: int) -> str | None:
    if device_type != "cpu":
        return f"serves CPU tensors, not {device_type}"
    if dtype not in (torch.float32, torch.float64):
        return f"computes in float32 and float64, not {dtype}"
    return None


def _apart(x: Tensor) -> bool:
    """Is a stack served matrix by matrix?"""
    return x.shape[0] == 1 or x.shape[1] >= MATRIX_BY_MATRIX


def _product(A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """A B of two matrices or two stacks."""
    return torch.mm(A, B, out=out) if A.ndim == 2 else torch.bmm(A, B, out=out)


def _symmetric(A: Tensor, B: Tensor, out: Tensor, exact: bool = False) -> Tensor:
    """A B where it is known to be symmetric, (m, n) by (n, m): the upper panels, and their mirror images.

    exact: corners of panels too, whose halves may be summed in another order.
    """
    m = A.shape[-2]
    if m < LEAST_HALVED:
        return _product(A, B, out)
    for i in range(0, m, PANEL):
        torch.mm(A[i : i + PANEL], B[:, i:], out=out[i : i + PANEL, i:])
        if exact:
            corner = out[i : i + PANEL, i : i + PANEL]
            corner.copy_(corner.triu() + corner.triu(1).mT)
        if i:
            out[i : i + PANEL, :i] = out[:i, i : i + PANEL].mT
    return out


def _multiply_add(B: Tensor, X: Tensor, a: float, out: Tensor) -> Tensor:
    """aX + BX."""
    return torch.addmm(X, B, X, beta=a, out=out) if X.ndim == 2 else torch.baddbmm(X, B, X, beta=a, out=out)


def _polynomial(A: Tensor, b: float, c: float, out: Tensor, exact: bool = False) -> Tensor:
    """b A + c A^2."""
    if c == 0:
        return torch.mul(A, b, out=out)
    if A.shape[-1] >= LEAST_HALVED:
        return _symmetric(A, A, out, exact).mul_(c).add_(A, alpha=b)
    if A.ndim == 2:
        return torch.addmm(A, A, A, beta=b, alpha=c, out=out)
    return torch.baddbmm(A, A, A, beta=b, alpha=c, out=out)


def _each(x: Tensor) -> Iterator[Tensor]:
    """The parts of a stack that one product serves: its matrices, or all of it."""
    if _apart(x):
        yield from x.unbind(0)
    else:
        yield x


def gram(X: Sequence[Tensor], factor: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    out = []
    for x, pair in zip(X, factors_of(X, factor), strict=True):
        mine, m = rounded(x, pair, dtype), x.shape[1]
        out.append(mine.new_empty((x.shape[0], m, m)))
        for a, o in zip(_each(mine), _each(out[-1]), strict=True):
            _symmetric(a, a.mT, o, exact=True)
    return out


def square_add(A: Sequence[Tensor], b: float, c: float) -> list[Tensor]:
    out = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in A]
    for a, o in zip(A, out, strict=True):
        for one, target in zip(_each(a), _each(o), strict=True):
            _polynomial(one, b, c, target, exact=True)
    return out


def multiply_add(
    B: Sequence[Tensor], X: Sequence[Tensor], factor: Tensor | None, a: float, symmetric: bool, dtype: torch.dtype
) -> list[Tensor]:
    out = []
    for b, x, pair in zip(B, X, factors_of(X, factor), strict=True):
        mine = rounded(x, pair, dtype)
        out.append(like(x, dtype))
        for left, right, o in zip(_each(b), _each(mine), _each(out[-1]), strict=True):
            value = _symmetric(left, right, o, exact=True) if symmetric else _product(left, right, o)
            if a:
                value.add_(right, alpha=a)
    return out


def multiply_update_(
    P: Sequence[Tensor],
    B: Sequence[Tensor],
    X: Sequence[Tensor],
    factor: Tensor | None,
    size: Tensor,
    decay: Tensor,
    skip: Tensor | None,
    dtype: torch.dtype,
) -> None:
    first = 0
    for p, b, x, pair in zip(P, B, X, factors_of(X, factor), strict=True):
        mine, k = rounded(x, pair, dtype), x.shape[0]
        own = slice(first, first + k)
        first += k
        gone = [False] * k if skip is None else skip[own].tolist()
        for i, (s, d) in enumerate(zip(size[own].tolist(), decay[own].tolist(), strict=True)):
            if not gone[i]:
                _update(p[i], b[i], mine[i], s, d)


def newton_schulz(
    X: Sequence[Tensor],
    factor: Tensor,
    schatten4: bool,
    coefficients: Sequence[float],
    gram: bool,
    restarts: Sequence[int],
    dtype: torch.dtype,
    P: Sequence[Tensor],
    size: Tensor | None,
    decay: Tensor | None,
    skip: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Large matrices one after the other, small ones of a shape in one batch: what is at work fits caches if it can."""
    plan = _Plan(triples(coefficients), schatten4, gram, frozenset(restarts), dtype)
    out = [] if P else [like(x, dtype) for x in X]
    factors = factor.tolist()
    gone = [False] * len(factors) if skip is None else skip.tolist()
    sizes = [0.0] * len(factors) if size is None else size.tolist()
    decays = [0.0] * len(factors) if decay is None else decay.tolist()
    for one, places in _units(X):
        rows = [row for row, _, _ in places]
        if all(gone[row] for row in rows):
            continue
        y, total, lead, Q = plan.run(one, [factors[row] for row in rows])
        for row, number in zip(rows, total, strict=True):
            factors[row] = [factors[row][0], number]
        if one.ndim == 2:
            ((row, j, i),) = places
            if P:
                _update(P[j][i], Q, y, sizes[row] * lead[0], decays[row])
            else:
                _product(_scaled(Q, lead), y, out[j][i])
            continue
        result = _product(_scaled(Q, lead), y, like(one, dtype))
        at = 0
        while at < len(places):  # stack by stack
            row, j, _ = places[at]
            k = X[j].shape[0]
            mine, own = result[at : at + k], slice(row, row + k)
            at += k
            if not P:
                out[j].copy_(mine)
                continue
            if not any(gone[own]) and len(set(sizes[own])) == 1 == len(set(decays[own])):
                _combine(P[j], mine, sizes[row], decays[row])
                continue
            for i in range(k):
                if not gone[row + i]:
                    _combine(P[j][i], mine[i], sizes[row + i], decays[row + i])
    return out, torch.tensor(factors, dtype=torch.float64, device="cpu").view(-1, 2)


def _units(X: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[tuple[int, int, int]]]]:
    """(matrix or stack, (row, number of the stack in X, number in the stack) of its matrices)."""
    small: dict[tuple[int, int], list[int]] = {}
    first: list[int] = []
    for j, x in enumerate(X):
        first.append(first[-1] + X[j - 1].shape[0] if j else 0)
        if x.shape[1] >= MATRIX_BY_MATRIX:
            for i in range(x.shape[0]):
                yield x[i], [(first[j] + i, j, i)]
        elif x.shape[0]:
            small.setdefault((x.shape[1], x.shape[2]), []).append(j)
    for members in small.values():
        places = [(first[j] + i, j, i) for j in members for i in range(X[j].shape[0])]
        if len(places) == 1:
            yield X[members[0]][0], places
        else:
            yield X[members[0]] if len(members) == 1 else torch.cat([X[j] for j in members]), places


def _combine(P: Tensor, D: Tensor, size: float, decay: float) -> None:
    """P <- (1 - decay) P - size D."""
    if P.dtype == D.dtype:
        P.mul_(1 - decay).add_(D, alpha=-size)
    else:
        wide = torch.promote_types(P.dtype, D.dtype)
        P.copy_((D.to(wide) * -size).add_(P.to(wide), alpha=1 - decay))


def _update(P: Tensor, Q: Tensor, X: Tensor, size: float, decay: float) -> None:
    """P <- (1 - decay) P - size Q X."""
    if P.dtype == Q.dtype:
        P.addmm_(Q, X, beta=1 - decay, alpha=-size)
    else:
        _combine(P, torch.mm(Q, X), size, decay)


def _scaled(A: Tensor, factors: Sequence[float]) -> Tensor:
    """A times a number per matrix, in place."""
    if A.ndim == 2:
        return A if factors[0] == 1 else A.mul_(factors[0])
    return A.mul_(torch.tensor(factors, dtype=A.dtype, device="cpu")[:, None, None])


class _Plan:
    """What all matrices of a call share, and buffers: fresh memory costs a page fault for every 4 KB."""

    def __init__(
        self,
        steps: Sequence[tuple[float, float, float]],
        schatten4: bool,
        gram: bool,
        restarts: frozenset[int],
        dtype: torch.dtype,
    ) -> None:
        self.steps, self.schatten4, self.gram, self.restarts, self.dtype = steps, schatten4, gram, restarts, dtype
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], turned: bool = False) -> Tensor:
        """A buffer by name; turned: columns contiguous."""
        size = math.prod(shape)
        have = self.kept.get(name)
        if have is None or have.numel() < size:
            have = self.kept[name] = torch.empty(size, dtype=self.dtype, device="cpu")
        flat = have[:size]
        *k, m, n = shape
        return flat.view(*k, n, m).mT if turned else flat.view(*shape)

    def run(self, x: Tensor, pairs: Sequence[Sequence[float]]) -> tuple[Tensor, list[float], list[float], Tensor]:
        """(X, all factors, f, Q) with f Q X the result for a matrix (m, n) or a stack: the last product is left."""
        lead = [pair[1] for pair in pairs]
        y = self.brought(x, [pair[0] for pair in pairs])
        *k, m, _ = y.shape
        square, turned = (*k, m, m), m > 1 and x.stride(-2) < x.stride(-1)
        R = _scaled(_symmetric(y, y.mT, self.take("R", square)), [f * f for f in lead])
        if self.schatten4:
            # in float64: squares of squares of 2^24 entries near 2^20 leave the range of float32
            norms = torch.linalg.vector_norm(R, dim=(-2, -1), dtype=torch.float64).view(-1).tolist()
            more = [1 / math.sqrt(norm) if norm > 0 else 1.0 for norm in norms]
            _scaled(R, [f * f for f in more])
            lead = [f * g for f, g in zip(lead, more, strict=True)]
        ones = [1.0] * len(lead)
        pending: list[float] = lead
        Q: Tensor | None = None
        small = m < LEAST_HALVED and not self.gram
        for t, (a, b, c) in enumerate(self.steps, 1):
            Z = _polynomial(R, b, c, self.take("Z", square))
            if small and 1 < t < len(self.steps):  # overhead counts: three calls a step
                y = _multiply_add(Z, y, a, self.take(f"X{t % 2}", y.shape, turned))
                _symmetric(y, y.mT, R)
                continue
            _shifted(Z, a)
            if not self.gram:
                Q = Z
            elif Q is None:
                Q = self.take(f"Q{t % 2}", square).copy_(Z)
            else:
                Q = _symmetric(Z, Q, self.take(f"Q{t % 2}", square))
            if t == len(self.steps):
                break
            if self.gram and t not in self.restarts:
                half = _symmetric(Z, R, self.take("half", square))
                _symmetric(Z, half, R)
            else:
                y = _product(_scaled(Q, pending), y, self.take(f"X{t % 2}", y.shape, turned))
                _symmetric(y, y.mT, R)
                pending, Q = ones, None
        assert Q is not None
        return y, lead, pending, Q

    def brought(self, x: Tensor, powers: Sequence[float]) -> Tensor:
        """x times a power of two per matrix, which changes no bits, in the dtype of the products."""
        if all(power == 1 for power in powers):
            return x.to(self.dtype)
        wide = torch.promote_types(x.dtype, self.dtype)
        shape = (1, 1) if x.ndim == 2 else (-1, 1, 1)
        return (x.to(wide) * torch.tensor(powers, dtype=wide, device="cpu").view(shape)).to(self.dtype)


def _shifted(A: Tensor, a: float) -> Tensor:
    """a I + A, in place."""
    A.diagonal(dim1=-2, dim2=-1).add_(a)
    return A
