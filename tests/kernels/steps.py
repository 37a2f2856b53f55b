"""What the tests of the optimizer step's words share: pairwise cases, roundings, momentum in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_kernels.kernels.contracts import acc_dtype, sides
from tests.kernels.lists import LAYOUTS, SHAPES

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> integers of the same size
GRADIENTS = {  # a gradient is only read, so its entries may share memory, as those of an expanded one do
    "contiguous": LAYOUTS["contiguous"],
    "transposed": LAYOUTS["transposed"],
    "both strided": LAYOUTS["both strided"],
    "convolution": LAYOUTS["stack strided"],  # (kh kw, out, in) of a contiguous (out, in, kh, kw)
    "channels last": lambda a: a.movedim(0, 1).contiguous().movedim(1, 0),  # the same of (out, kh, kw, in)
    "expanded": lambda a: a[:, :, :1].contiguous().expand(a.shape),
}


def pair(i: int, x: int, j: int, y: int) -> tuple[int, int, int, int]:
    return (i, x, j, y) if i < j else (j, y, i, x)


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases in which every pair of values of any two factors occurs, greedily few; the same on every machine."""
    at, sizes = range(len(factors)), [range(len(factor)) for factor in factors]
    missing = {
        pair(i, x, j, y) for i, j in itertools.combinations(at, 2) for x, y in itertools.product(sizes[i], sizes[j])
    }
    cases: list[tuple[Any, ...]] = []
    while missing:
        i, x, j, y = min(missing)
        case = {i: x, j: y}
        for k in [k for k in at if k not in case]:
            gains = [sum(pair(k, v, o, c) in missing for o, c in case.items()) for v in sizes[k]]
            turn = len(cases) % len(gains)  # ties take turns, so that no value is favoured
            order = [(gain, (v - turn) % len(gains)) for v, gain in enumerate(gains)]
            case[k] = order.index(max(order))
        missing -= {pair(i, case[i], j, case[j]) for i, j in itertools.combinations(at, 2)}
        cases.append(tuple(factors[k][case[k]] for k in at))
    return cases


def gradient(family: str, layout: str, dtype: torch.dtype, device: str = "cpu", seed: int = 9) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    draws = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES[family]]
    return [GRADIENTS[layout](a.to(device)) for a in draws]


def copies(A: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides, offset and neighbours in memory."""
    return [surroundings(a).clone().as_strided(a.shape, a.stride(), a.storage_offset()) for a in A]


def surroundings(a: Tensor) -> Tensor:
    """All memory that a's storage holds, as a flat tensor of a's dtype."""
    return a.as_strided((a.untyped_storage().nbytes() // a.element_size(),), (1,), 0)


def bits(a: Tensor) -> Tensor:
    return a.contiguous().view(BITS[a.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def untouched_outside(now: Tensor, before: Tensor) -> bool:
    """Memory between the rows and entries of a strided tensor has not changed."""
    inside = torch.zeros(surroundings(now).shape, dtype=torch.bool, device=now.device)
    inside.as_strided(now.shape, now.stride(), now.storage_offset()).fill_(True)
    return same_bits(surroundings(now)[~inside], surroundings(before)[~inside])


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbouring numbers of `dtype` around x (float64): 2^(exponent of x) eps, not below the smallest."""
    info = torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)
    return torch.where(x == 0, 0, power).clamp(min=info.tiny) * info.eps


def matrices(A: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(j, matrix) through the list."""
    return enumerate(x for a in A for x in a.unbind(0))


def flat_parts(flat: Tensor, rows: int, sizes: list[int]) -> list[Tensor]:
    """Views (rows, n_j) of a flat tensor."""
    parts = flat.split([rows * n for n in sizes])
    return [part.view(rows, n) for part, n in zip(parts, sizes, strict=True)]


def blocks_of(V: Tensor, b: int, A: list[Tensor]) -> list[Tensor]:
    return flat_parts(V, b, sides(A, 2))


def powers(N: int, dtype: torch.dtype, device: str, seed: int = 4) -> Tensor:
    """(N,) powers of two from 1/8 to 8."""
    g = torch.Generator().manual_seed(seed)
    return (2.0 ** torch.randint(-3, 4, (N,), generator=g)).to(dtype).to(device)


def corrections(M: list[Tensor], r: int, seed: int = 11) -> tuple[Tensor, Tensor]:
    """Flat (r, m_j) and (r, n_j) in the accumulation dtype of M."""
    g = torch.Generator().manual_seed(seed)
    acc, device = acc_dtype(M[0].dtype), M[0].device
    left, right = (torch.randn(r * sum(sides(M, dim)), generator=g).to(acc).to(device) for dim in (1, 2))
    return left, right
