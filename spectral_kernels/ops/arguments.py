"""Argument checks and the way between what callers hold and the ragged lists of the words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.contracts import acc_dtype

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_QUANTIZED = tuple(getattr(torch, name) for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4"))


def check_matrix(A: Any, name: str = "A") -> None:
    """Raise TypeError or ValueError unless A is a dense float tensor of at least two dimensions."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(A).__name__}")
    if A.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, not {A.layout}")
    if A.dtype not in FLOATS:
        kind = "quantized" if A.dtype in _QUANTIZED else "complex" if A.dtype.is_complex else "not a served float type"
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; {A.dtype} is {kind}")
    if A.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions (..., fan_out, fan_in), not shape {tuple(A.shape)}")
    if type(A) is not Tensor and type(A).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor: sharded tensors are not served yet; pass a local tensor")


def check_tol(tol: Any, dtype: torch.dtype) -> float:
    least = 16 * torch.finfo(acc_dtype(dtype)).eps
    if not isinstance(tol, numbers.Real) or isinstance(tol, bool):
        raise TypeError(f"tol must be a number, not {type(tol).__name__}")
    if not least <= float(tol) < 1:
        raise ValueError(f"tol must lie in [{least:.2g}, 1) for {dtype}, not {tol}")
    return float(tol)


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    number = int(value)
    if number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {allowed}, not {number}")
    return number


def check_seed(seed: Any) -> int:
    return check_int("seed", seed, -(1 << 63), (1 << 63) - 1)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def check_number(name: str, value: Any, least: float = -math.inf, above: bool = False) -> float:
    """A finite real number >= least (> least with above)."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or number < least or (above and number == least):
        raise ValueError(f"{name} must be a finite number {'above' if above else 'of at least'} {least:g}, not {value}")
    return number


class Ragged(NamedTuple):
    """A caller's argument as a ragged list: stacks (k, m, n), and the batch shape of each (None: the argument was a
    list
    of plain matrices, whose results come back as one tensor)."""

    stacks: list[Tensor]
    batches: list[tuple[int, ...]]
    is_list: bool

    @property
    def plain(self) -> bool:
        """A list of matrices: one flat result."""
        return self.is_list and not any(self.batches)

    def scatter(self, flat: Tensor, *tail: Sequence[int]) -> list[Tensor]:
        """Cut a flat result into one tensor per stack, (*batch, *tail_i); tail: per-stack sizes behind the batch."""
        out, offset = [], 0
        for i, (stack, batch) in enumerate(zip(self.stacks, self.batches, strict=True)):
            shape = tuple(batch) + tuple(sizes[i] for sizes in tail)
            length = stack.shape[0] * math.prod(shape[len(batch) :])
            out.append(flat[offset : offset + length].view(shape))
            offset += length
        return out


def ragged(A: Any, dim: tuple[int, int] = (-2, -1)) -> Ragged:
    """Check A (a tensor or a list of tensors) and view it as a ragged list; `dim` for tensors only."""
    if isinstance(A, Tensor) or not isinstance(A, list | tuple):
        check_matrix(A)
        if dim != (-2, -1):
            A = A.movedim(_pair(dim, A.ndim), (-2, -1))
        return Ragged([_stack(A)], [tuple(A.shape[:-2])], False)
    for i, a in enumerate(A):
        check_matrix(a, f"A[{i}]")
        if a.dtype != A[0].dtype or a.device != A[0].device:
            raise ValueError(
                f"a list must hold one dtype and device: A[0] is {A[0].dtype} on {A[0].device}, "
                f"A[{i}] is {a.dtype} on {a.device}"
            )
        if dim != (-2, -1):
            raise ValueError("dim is for tensors; the matrices of a list lie in the last two dimensions")
    return Ragged([_stack(a) for a in A], [tuple(a.shape[:-2]) for a in A], True)


def _stack(A: Tensor) -> Tensor:
    if A.ndim == 3:
        return A
    if A.ndim == 2:
        return A.unsqueeze(0)
    return A.reshape(math.prod(A.shape[:-2]), *A.shape[-2:])  # by product: -1 is ambiguous for empty stacks


def _pair(dim: Any, ndim: int) -> tuple[int, int]:
    if not isinstance(dim, list | tuple) or len(dim) != 2:
        raise ValueError(f"dim must be a pair of dimensions, not {dim!r}")
    first, second = (check_int("dim", d, -ndim, ndim - 1) % ndim for d in dim)
    if first == second:
        raise ValueError(f"dim must name two different dimensions, not {tuple(dim)}")
    return first, second
