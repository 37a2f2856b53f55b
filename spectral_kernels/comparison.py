"""What `inspect a b` adds: the change of every layer between two checkpoints, and its spectral norm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoints import Checkpoint, Entry
from .inspection import Options, Piece, Progress, groups, length, measure, row_names, unmeasured
from .kernels.contracts import acc_dtype


@dataclass(frozen=True)
class Change:
    """A layer of a later checkpoint against the first one.

    status: "measured", "new", "missing", "reshaped" or "skipped". For a matrix `delta` is ||dW||_2 with its bracket and
    stable rank; for a vector it is the Euclidean norm of the difference, and the other three are None.
    """

    name: str
    status: str
    note: str = ""
    delta: float | None = None
    lower: float | None = None
    upper: float | None = None
    stable_rank: float | None = None


def compare(
    first: Checkpoint, later: Checkpoint, options: Options, progress: Progress = lambda _: None
) -> dict[str, Change]:
    """Row name -> Change of `later` against `first`, for every row of either; those of first come first."""
    before = {entry.name: entry for entry in first.entries}
    after = {entry.name: entry for entry in later.entries}
    changes: dict[str, Change] = {}
    common: list[Entry] = []
    for name in dict.fromkeys((*before, *after)):
        status, note = _relation(before.get(name), after.get(name))
        entry = before.get(name) or after[name]
        whole = len(entry.shape) < 2 or unmeasured(entry) is not None
        changes.update((row, Change(row, status, note)) for row in ([name] if whole else row_names(entry)))
        if status == "measured":
            common.append(entry)
    for group in groups(common, options.group_bytes // 2):  # differences of half tensors take twice the bytes
        for change in _differences(group, first, later, after, options):
            note = changes[change.name].note
            changes[change.name] = Change(**{**vars(change), "note": note})
        progress(sum(piece.nbytes for piece in group))
    return changes


def _relation(before: Entry | None, after: Entry | None) -> tuple[str, str]:
    if before is None:
        return "new", "new"
    if after is None:
        return "missing", "missing"
    if before.shape != after.shape:
        shapes = ("x".join(map(str, entry.shape)) or "scalar" for entry in (before, after))
        return "reshaped", "shape changed: {} -> {}".format(*shapes)
    why = unmeasured(before) or unmeasured(after)
    if why:
        return "skipped", why
    return "measured", f"{before.dtype} -> {after.dtype}" if before.dtype != after.dtype else ""


def _differences(
    group: list[Piece], first: Checkpoint, later: Checkpoint, after: dict[str, Entry], options: Options
) -> Iterator[Change]:
    """Changes of one group; dW is taken in float32, or in float64 where either side is float64."""
    old = first.read([piece.entry for piece in group])
    new = later.read([after[piece.entry.name] for piece in group])
    by_dtype: dict[torch.dtype, tuple[list[str], list[Tensor]]] = {}
    for piece, a, b in zip(group, old, new, strict=True):
        wide = torch.promote_types(acc_dtype(a.dtype), acc_dtype(b.dtype))
        if len(piece.entry.shape) < 2:
            yield Change(piece.entry.name, "measured", delta=length(b.to(wide) - a.to(wide)))
        else:
            rows, stacks = by_dtype.setdefault(wide, ([], []))
            rows += piece.names()
            stacks.append(piece.of(b).to(wide, copy=True).sub_(piece.of(a)))
    for rows, stacks in by_dtype.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bracket beside the value says what is proved
            norms = measure(stacks, options)
        for row, n in zip(rows, norms, strict=True):
            yield Change(row, "measured", "", n.sigma, n.lower, n.upper, n.stable_rank)
