"""One step over any number of parameters: collect their matrices into ragged lists, one call of the words for each.

`take` knows neither optimizers nor arguments of a user: `ops/step.py` and `optim/` check and fill in what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.composites_step import clipped_step_, hold_back, tracked_step_
from ..kernels.contracts import INFO, NORMS, acc_dtype
from .estimate import full_precision, oriented
from .layout import Layout
from .newton_schulz import short_first, way
from .passes import Bucket, common, constant, normed, orthogonalized, withheld
from .state import Options, is_cold, is_orthogonalized, is_tracked

READS = 3  # at most, in a step with a tracked block; docs/tracking.md has the measurements
COLD_READS = 12
TOL = 0.1  # read again while 10 * error > tol: an estimated error above 1 %, or energy outside the block (contracts.py)
COLD_MIN_READS = 3
CLIP_TOL = 0.1  # clip: read again where ||D||_2 may exceed 1 by more (contracts.py: clip_); docs/clip.md
CLIP_COLD_TOL, CLIP_COLD_READS = 0.02, 6


@dataclass
class Seat:
    """What of a parameter stays from step to step: its views, as long as its memory and its state do."""

    param: Tensor
    buffer: Tensor  # the momentum
    at: int  # address of the parameter
    P: list[Tensor]  # the stacks, the tracked side last
    M: list[Tensor]
    turned: list[bool]  # stacks whose gradient is to be transposed
    copies: list[tuple[Tensor, Tensor]]  # (tensor, what stands for it and is copied back)
    columns: int  # of the block; 0 without one
    orthogonal: bool  # shorter side first instead
    count: int  # matrices
    norms: list[int]  # the norm of every matrix, a column of NORMS
    factors: list[float]
    plain: bool  # one matrix, as it is stored
    layout: Layout
    made_for: Any  # as its entry has it
    warm: bool = False  # the block has seen the matrix

    def holds(self, param: Tensor, buffer: Tensor | None) -> bool:
        """Whether the views still are those of this parameter and this momentum."""
        same = self.buffer is buffer and self.at == param.data_ptr()
        return same and self.param.stride() == param.stride() and not self.copies


@dataclass
class Entry:
    """One parameter of a step. lr, decay: numbers or one-element tensors; factors: one per stack of its layout."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    layout: Layout
    factors: Sequence[float]
    lr: float | Tensor
    decay: float | Tensor
    skip: Tensor | None = None  # () bool on the device: leave the parameter and its state alone
    seat: Seat | None = None  # filled in by `take`; a caller may bring that of the step before
    made_for: Any = None  # what else a seat depends on, kept with it for its caller to compare


class Result(NamedTuple):
    """What a step knew of one parameter: one row of info per matrix (kernels/contracts.py: INFO), its upper bounds."""

    info: Tensor  # (k, INFO_COLUMNS) float64
    upper: Tensor  # (k,) float64
    size: Tensor  # (k,) float64: the norm of the update


class Part(NamedTuple):
    """What one call of the words found, rows in the order of its entries."""

    entries: list[int]  # numbers in the list given to `take`
    counts: list[int]  # matrices of each
    tracked: bool
    info: Tensor
    upper: Tensor
    size: Tensor
    held: Tensor  # () int64: parameters that were held back
    orthogonalized: Tensor | None = None  # () int64: matrices that were, where that was asked for


class Outcome(NamedTuple):
    parts: list[Part]
    names: list[Any]  # what the caller calls the entries, filled in by the caller

    def results(self) -> dict[int, Result]:
        """One Result per entry, by its number."""
        found = {}
        for part in self.parts:
            rows = zip(*(x.split(part.counts) for x in (part.info, part.upper, part.size)), strict=True)
            found.update({i: Result(*row) for i, row in zip(part.entries, rows, strict=True)})
        return found


def take(entries: Sequence[Entry], options: Options) -> Outcome:
    """Momentum, norms and update of every entry, in place, without a host synchronization on GPUs."""
    buckets: dict[tuple[Any, ...], Bucket] = {}
    for i, entry in enumerate(entries):
        _sort(buckets, i, entry, options)
    outcome = Outcome([], [])
    with torch.no_grad():
        for (columns, orthogonal, single, cold, *_), bucket in buckets.items():
            with full_precision(bucket.M):
                found: tuple[Tensor, ...]
                if orthogonal:
                    found = orthogonalized(bucket, entries, options)
                elif columns:
                    found = _tracked(bucket, entries, options, columns, single, cold)
                else:
                    found = normed(bucket, entries, options)
            outcome.parts.append(Part(bucket.entries, bucket.counts, columns > 0, *found))
        for entry in entries:
            for strided, dense in entry.seat.copies if entry.seat else ():
                strided.copy_(dense)
        steps = [entry.state["step"] for entry in entries if "step" in entry.state and not _known_skip(entry)]
        if steps:
            torch._foreach_add_(steps, 1)
    return outcome


def _known_skip(entry: Entry) -> bool:
    """A parameter left alone whose counter can stay too; on a GPU the host does not know, and the counter goes on."""
    return entry.skip is not None and entry.skip.device.type == "cpu" and bool(entry.skip)


def seat(entry: Entry, options: Options) -> Seat:
    """The views of an entry whose state is prepared."""
    layout, state = entry.layout, entry.state
    param, buffer = entry.param.detach(), state["momentum_buffer"]
    p, m = layout.dense(param), layout.buffer_dense(buffer)
    P, M = layout.stacks(p), layout.buffer_stacks(m)
    tracked = "block" in state and is_tracked(layout, M, options.direction)
    orthogonal = is_orthogonalized(layout, options.direction)
    if orthogonal and options.recipe is not None:
        for x in M:  # a schedule that is not safe in the dtype of these products is refused before anything moves
            way(options.recipe, short_first(x))
    count = sum(x.shape[0] for x in M)
    sides = [oriented(x) if tracked else short_first(x) if orthogonal else x for x in M]
    turned = [side.stride() != x.stride() or side.shape != x.shape for side, x in zip(sides, M, strict=True)]
    return Seat(
        param,
        buffer,
        param.data_ptr(),
        [x.mT if turn else x for x, turn in zip(P, turned, strict=True)],
        sides,
        turned,
        [(x, d) for x, d in ((param, p), (buffer, m)) if x is not d],
        options.columns(M) if tracked else 0,
        orthogonal,
        count,
        [{"gain": NORMS["amax"], "embedding": NORMS["row2"]}.get(layout.kind, NORMS["frob2"])] * count,
        [factor for factor, x in zip(entry.factors, M, strict=True) for _ in range(x.shape[0])],
        layout == Layout("matrix") and param.ndim == 2 and not turned[0],
        layout,
        entry.made_for,
    )


def _sort(buckets: dict[tuple[Any, ...], Bucket], i: int, entry: Entry, options: Options) -> None:
    """Put the matrices of an entry into its bucket."""
    if entry.seat is None:
        entry.seat = seat(entry, options)
    mine, grad, layout = entry.seat, entry.grad, entry.layout
    if mine.plain and grad.is_contiguous():
        G = [grad[None]]
    else:
        G = layout.stacks(layout.dense(grad))
        G = [g.mT if turn else g for g, turn in zip(G, mine.turned, strict=True)]
    cold = mine.columns > 0 and not mine.warm and is_cold(entry.state)
    mine.warm = mine.columns > 0 and not cold
    kinds = (mine.param.dtype, mine.buffer.dtype, grad.dtype, mine.param.device)
    key = (mine.columns, mine.orthogonal, mine.count == 1, cold, *kinds)
    bucket = buckets.get(key)
    if bucket is None:
        bucket = buckets[key] = Bucket()
    bucket.P += mine.P
    bucket.M += mine.M
    bucket.G += G
    bucket.factors += mine.factors
    bucket.entries.append(i)
    bucket.counts.append(mine.count)
    bucket.norms += mine.norms


def _tracked(
    bucket: Bucket, entries: Sequence[Entry], options: Options, b: int, single: bool, cold: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = bucket.M[0]
    acc = acc_dtype(first.dtype)
    size, decay, skip, owner = common(bucket, entries)
    states = [entries[i].state for i in bucket.entries]
    trackers = torch.cat([s["tracker"] for s in states])
    V = torch.cat([s["block"].reshape(-1) for s in states]).to(acc)
    scale, draws = trackers[:, 0].to(acc), trackers[:, 1].long()
    words = registry.words(first.device.type, first.dtype, b)
    moved = (skip, options.momentum, options.alpha, options.nesterov, options.propagate)
    if options.direction == "clip":
        shorts = [min(m.shape[1:]) for m in bucket.M for _ in range(m.shape[0])]
        rank = constant(tuple(min(options.rank or b, max(1, s)) for s in shorts), torch.int64, first.device)
        limit = None if options.threshold is None else torch.full_like(size, options.threshold)
        before = trackers[:, 2:].contiguous()
        clip: tuple[Any, ...] = (
            bucket.P, bucket.M, bucket.G, V, scale, before, draws, size, decay, rank, limit, *moved, b,
            min(options.rank or b, b), options.fresh(b, max(shorts, default=b)),
            *((CLIP_COLD_READS, CLIP_COLD_TOL) if cold else (READS, CLIP_TOL)), options.seed,
        )  # fmt: skip
        clipped = words.clipped_step_ if single else partial(clipped_step_, words, owner=owner)
        info = clipped(*clip)
        at, sigma = info[:, INFO["scale"]], info[:, INFO["sigma"]]
        tau = info[:, INFO["tau"]] / at
        bound = (info[:, INFO["theta"]] + info[:, INFO["outside"]]).sqrt() / at
        moved_by = size * torch.where(sigma < tau, sigma / tau, 1)
    else:
        rule = (COLD_READS, TOL, COLD_MIN_READS) if cold else (READS, TOL, 1)
        arguments = (
            bucket.P, bucket.M, bucket.G, V, scale, draws, size, decay, *moved, options.upper, b,
            options.fresh(b, b), *rule, options.seed,
        )  # fmt: skip
        if single:
            info, bound = words.tracked_step_(*arguments)
        else:  # a bad entry anywhere in a parameter holds all its matrices back
            info, bound = tracked_step_(words, *arguments, owner=owner)
        before, moved_by = trackers[:, 2:], size
    drawn = trackers[:, 1] + (1.0 if skip is None else (~skip).double())
    new = torch.cat((torch.stack((scale.double(), drawn), 1), before), 1)
    torch._foreach_copy_([s["tracker"] for s in states], list(new.split(bucket.counts)))
    blocks = [s["block"] for s in states]
    parts = V.split([x.numel() for x in blocks])
    torch._foreach_copy_(blocks, [part.view(x.shape) for part, x in zip(parts, blocks, strict=True)])
    bad = (info[:, INFO["nan"]] + info[:, INFO["inf"]]) > 0
    held = hold_back(bad, skip, owner, options.propagate)
    return info, bound, *withheld(held, moved_by, owner, len(states))
