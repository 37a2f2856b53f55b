"""What `inspect` measures: the spectral norm of every matrix of a checkpoint, with its bracket and stable rank.

A tensor is read as the layers are stored: 2-D is one matrix (fan_out, fan_in); 3-D a stack, one row per matrix, unless
its name says "conv"; a convolution (out, in, k...) is the matrix (out, in * k...), as torch counts fan_in.
Matrices are taken in groups of bounded size, one ragged call per group: memory stays bounded however large the file is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import scaling
from .checkpoints import Checkpoint, Entry, InputError
from .kernels.contracts import INFO
from .ops import arguments
from .ops.bounds import spectral_bounds
from .ops.estimate import estimate
from .ops.norm import finish

if TYPE_CHECKING:
    from .ops.bounds import SpectralBounds

GROUP_BYTES = 64 << 20  # one ragged call: large enough to fill the cores with small matrices, small beside any memory


@dataclass(frozen=True)
class Matrix:
    """One matrix; `target` is sqrt(fan_out / fan_in) and `ratio` sigma / target. lower <= sigma <= upper."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fan_out: int
    fan_in: int
    sigma: float
    lower: float
    upper: float
    target: float
    ratio: float
    stable_rank: float


@dataclass(frozen=True)
class Vector:
    """A tensor of at most one dimension: its Euclidean norm, and that over the root of its length."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    l2: float
    rms: float


@dataclass(frozen=True)
class Skipped:
    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass
class Report:
    """The rows of one checkpoint, in storage order."""

    path: str
    matrices: list[Matrix] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    tol: float = 1e-3
    delta: float = 1e-6
    seed: int = 0
    group_bytes: int = GROUP_BYTES


Progress = Callable[[int], None]  # called with the number of bytes just dealt with


def as_stack(entry: Entry) -> tuple[int, int, int]:
    """(k, fan_out, fan_in) of a tensor of two or more dimensions."""
    shape = entry.shape
    if len(shape) == 3 and "conv" not in entry.name.lower():
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def matrices_of(entry: Entry) -> int:
    """Matrices of a tensor; a vector counts as one."""
    return as_stack(entry)[0] if len(entry.shape) >= 2 else 1


def row_names(entry: Entry) -> list[str]:
    """One name per matrix: the tensor's own, or name[i] for a stack of several."""
    k = as_stack(entry)[0]
    return [entry.name] if k == 1 else [f"{entry.name}[{i}]" for i in range(k)]


def unmeasured(entry: Entry) -> str | None:
    if entry.skip is None and len(entry.shape) >= 2 and as_stack(entry)[0] == 0:
        return "an empty stack"
    return entry.skip


@dataclass(frozen=True)
class Piece:
    """Matrices start to stop of a tensor (all of it, unless the stack is larger than a group)."""

    entry: Entry
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """(stop - start, fan_out, fan_in), a view."""
        return tensor.reshape(as_stack(self.entry))[self.start : self.stop]

    def names(self) -> list[str]:
        return row_names(self.entry)[self.start : self.stop]

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes * (self.stop - self.start) // matrices_of(self.entry)


def groups(entries: Iterable[Entry], limit: int) -> Iterator[list[Piece]]:
    """Pieces of at most `limit` bytes together (one matrix may exceed it alone), one file and dtype per group."""
    held: dict[tuple[object, str], list[Piece]] = {}
    sizes: dict[tuple[object, str], int] = {}
    for entry in entries:
        key = entry.file, entry.dtype
        k = matrices_of(entry)
        each = max(1, entry.nbytes // k)
        step = max(1, limit // each)
        for start in range(0, k, step):
            stop = min(k, start + step)
            if key in held and sizes[key] + each * (stop - start) > limit:
                yield held.pop(key)
            if key not in held:
                held[key], sizes[key] = [], 0
            held[key].append(Piece(entry, start, stop))
            sizes[key] += each * (stop - start)
    yield from held.values()


@dataclass(frozen=True)
class Norms:
    sigma: float
    lower: float
    upper: float
    stable_rank: float


def measure(stacks: Sequence[Tensor], options: Options) -> list[Norms]:
    """Norms of every matrix of a ragged list of stacks (k, m, n), in order: the value to tol, and a proved bracket.

    The value and the bracket's lower side are both lower estimates of sigma_max: the larger one is reported.
    """
    result = estimate(stacks, tol=options.tol, seed=options.seed)
    values = finish(result, stacks, options.tol, None).tolist()
    bounds: list[SpectralBounds] = spectral_bounds(list(stacks), delta=options.delta, seed=options.seed)
    lowers = torch.cat([part.lower for part in bounds]).tolist()
    uppers = torch.cat([part.upper for part in bounds]).tolist()
    info = result.info.tolist()
    out = []
    for value, lower, upper, row in zip(values, lowers, uppers, info, strict=True):
        if not math.isfinite(value):
            out.append(Norms(value, value, value, math.nan))
            continue
        sigma = max(value, lower)
        scaled = sigma * row[INFO["scale"]]
        rank = max(1.0, row[INFO["frob2"]] / scaled**2) if scaled > 0 else 0.0
        out.append(Norms(sigma, lower, max(upper, sigma), rank))
    return out


def inspect_checkpoint(checkpoint: Checkpoint, options: Options, progress: Progress = lambda _: None) -> Report:
    """Measure every tensor of a checkpoint, one bounded group at a time."""
    report = Report(str(checkpoint.path))
    reasons = {entry: unmeasured(entry) for entry in checkpoint.entries}
    report.skipped = [Skipped(e.name, e.shape, e.dtype, why) for e, why in reasons.items() if why is not None]
    served = [entry for entry, why in reasons.items() if why is None]
    rows: dict[Entry, list[Matrix]] = {}
    plain: dict[Entry, Vector] = {}
    for group in groups([entry for entry in served if len(entry.shape) >= 2], options.group_bytes):
        tensors = checkpoint.read([piece.entry for piece in group])
        stacks = [piece.of(tensor) for piece, tensor in zip(group, tensors, strict=True)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            norms = iter(measure(stacks, options))
        report.notes += [str(warning.message) for warning in caught]
        for piece in group:
            _, m, n = as_stack(piece.entry)
            for name in piece.names():
                rows.setdefault(piece.entry, []).append(_matrix(name, piece.entry, m, n, next(norms)))
        progress(sum(piece.nbytes for piece in group))
    for group in groups([entry for entry in served if len(entry.shape) < 2], options.group_bytes):
        tensors = checkpoint.read([piece.entry for piece in group])
        for piece, tensor in zip(group, tensors, strict=True):
            l2 = length(tensor)
            rms = l2 / math.sqrt(tensor.numel()) if tensor.numel() else 0.0
            plain[piece.entry] = Vector(piece.entry.name, piece.entry.shape, piece.entry.dtype, l2, rms)
            progress(piece.entry.nbytes)
    report.matrices = [row for entry in served if len(entry.shape) >= 2 for row in rows[entry]]
    report.vectors = [plain[entry] for entry in served if len(entry.shape) < 2]
    return report


def _matrix(name: str, entry: Entry, m: int, n: int, norms: Norms) -> Matrix:
    target = scaling.rms_to_rms(m, n) if n else math.nan
    ratio = norms.sigma / target if target else math.nan
    shape = entry.shape if name == entry.name else (m, n)
    return Matrix(
        name, shape, entry.dtype, m, n, norms.sigma, norms.lower, norms.upper, target, ratio, norms.stable_rank
    )


def length(x: Tensor) -> float:
    """Euclidean norm in float64, at the scale of the largest entry; NaN for a NaN, inf for an infinity without NaN."""
    if x.numel() == 0:
        return 0.0
    wide = x.double().abs()
    top = float(wide.max())  # NaN if there is one
    if top == 0 or not math.isfinite(top):
        return top
    return top * float((wide / top).square().sum().sqrt())


def check_options(checkpoints: Sequence[Checkpoint], options: Options) -> None:
    """Refuse a tolerance that some tensor's arithmetic cannot reach, before anything is measured."""
    for checkpoint in checkpoints:
        for entry in checkpoint.entries:
            if entry.skip is None and len(entry.shape) >= 2:
                try:
                    arguments.check_tol(options.tol, getattr(torch, entry.dtype))
                except ValueError as error:
                    raise InputError(f"--{error} ({entry.name} in {checkpoint.path})") from None
