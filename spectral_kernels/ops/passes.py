"""What one call of the words does for a bucket of matrices without a block: norms, or an orthogonalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import registry
from ..kernels.composites_step import hold_back, rescale
from ..kernels.contracts import INFO, INFO_COLUMNS, NORMS, acc_dtype
from .newton_schulz import inverse, iterate
from .state import Options

if TYPE_CHECKING:
    from .engine import Entry


@dataclass
class Bucket:
    """Matrices that one call of a word serves."""

    P: list[Tensor] = field(default_factory=list)
    M: list[Tensor] = field(default_factory=list)
    G: list[Tensor] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # matrices of every entry
    norms: list[int] = field(default_factory=list)  # the norm of every matrix, a column of NORMS
    factors: list[float] = field(default_factory=list)


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor on the device, sent once: later steps send nothing. Kept for good: captured graphs read it."""
    host = torch.tensor(values, dtype=dtype, device="cpu")  # whatever the default device is
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def per_matrix(values: Sequence[float | Tensor], counts: Sequence[int], device: torch.device) -> Tensor:
    """(N,) float64 from one number or one-element tensor per entry."""
    if not any(isinstance(v, Tensor) for v in values) and len(set(values)) == 1:
        return torch.full((sum(counts),), float(values[0]), dtype=torch.float64, device=device)
    parts = []
    for value, count in zip(values, counts, strict=True):
        x = value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)
        parts.append(x.to(device, torch.float64, non_blocking=True).reshape(1).expand(count))
    return torch.cat(parts)


def common(bucket: Bucket, entries: Sequence[Entry]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """size (N,), decay (N,), skip (N,) or None, and the entry of every matrix where one has several."""
    device = bucket.M[0].device
    mine = [entries[i] for i in bucket.entries]
    lr = per_matrix([e.lr for e in mine], bucket.counts, device)
    size = lr * constant(tuple(bucket.factors), torch.float64, device)
    decay = per_matrix([e.decay for e in mine], bucket.counts, device)
    skip = None
    if any(e.skip is not None for e in mine):
        none = torch.zeros((), dtype=torch.bool, device=device)
        flags = [(none if e.skip is None else e.skip).expand(c) for e, c in zip(mine, bucket.counts, strict=True)]
        skip = torch.cat(flags)
    owner = None
    if max(bucket.counts) > 1:
        numbers = tuple(i for i, c in enumerate(bucket.counts) for _ in range(c))
        owner = constant(numbers, torch.int64, device)
    return size, decay, skip, owner


class Moved(NamedTuple):
    """What the momentum pass of a bucket found, repeated at another scale where it had to be."""

    norms: Tensor  # (N, 5): kernels/contracts.py, NORMS
    at: Tensor  # the scale of the norms, (N,) acc
    bad: Tensor  # not finite
    held: Tensor | None  # matrices whose parameter stays
    info: Tensor


def momentum_pass(bucket: Bucket, states: Sequence[dict[str, Any]], options: Options, skip: Tensor | None,
                  owner: Tensor | None) -> Moved:  # fmt: skip
    """The momentum of every matrix, and norms of it; the scales of the next pass are stored where a state has some."""
    M, G, first = bucket.M, bucket.G, bucket.M[0]
    acc = acc_dtype(first.dtype)
    words = registry.words(first.device.type, first.dtype, 4)
    moved = (options.momentum, options.alpha, options.nesterov)
    kept = bool(states) and "tracker" in states[0]
    if kept:
        trackers = torch.cat([s["tracker"] for s in states])
        scale = torch.where(trackers[:, 0] > 0, trackers[:, 0], 1).to(acc)
    else:
        scale = torch.ones(sum(bucket.counts), dtype=acc, device=first.device)
    norms = words.momentum_norms_(M, G, scale, skip, *moved, True, options.propagate)
    amax = norms[:, NORMS["amax"]]
    at, again = rescale(scale, amax, acc)
    flags = norms[:, NORMS["nan"] : NORMS["inf"] + 1]  # a repeated pass sees the cleaned momentum
    bad = (flags > 0).any(1)
    if first.device.type != "cpu" or bool(again.any()):
        second = words.momentum_norms_(M, G, at, ~again, *moved, False, options.propagate)
        norms = torch.where(again[:, None], second, norms)
    if kept:
        idle = (amax == 0) if skip is None else skip | (amax == 0)
        new = torch.stack((torch.where(idle, trackers[:, 0], at.double()), trackers[:, 1]), 1)
        torch._foreach_copy_([s["tracker"] for s in states], list(new.split(bucket.counts)))
    return Moved(norms, at, bad, hold_back(bad, skip, owner, options.propagate), info(norms, flags, at, again))


def normed(bucket: Bucket, entries: Sequence[Entry], options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms that need no block: l2 of a vector, Frobenius, largest entry, largest row."""
    first = bucket.M[0]
    size, decay, skip, owner = common(bucket, entries)
    states = [entries[i].state for i in bucket.entries]
    found = momentum_pass(bucket, states, options, skip, owner)
    at = found.at
    columns = constant(tuple(bucket.norms), torch.int64, first.device)
    chosen = found.norms.gather(1, columns[:, None])[:, 0]
    largest = columns == NORMS["amax"]
    norm = torch.where(largest, found.norms[:, NORMS["amax"]] * at.double(), chosen.sqrt())  # of scale * X
    moves = norm > 0
    ratio = torch.where(moves, size / torch.where(moves, norm, 1), 0)
    value = norm / at.double()
    if options.propagate:
        ratio, value = (torch.where(found.bad, torch.nan, x) for x in (ratio, value))
    found.info[:, INFO["sigma"]] = value
    words = registry.words(first.device.type, first.dtype, 4)
    words.apply_update_(
        bucket.P, bucket.M, bucket.G if options.nesterov else [], ratio.to(acc_dtype(first.dtype)), at, decay,
        found.held, options.momentum, options.alpha,
    )  # fmt: skip
    return found.info, value, *withheld(found.held, size, owner, len(states))


def orthogonalized(bucket: Bucket, entries: Sequence[Entry], options: Options) -> tuple[Tensor, ...]:
    """P <- (1 - decay) P - size U f(S) V' of the momentum; `sigma` is what it was divided by.

    Last, how many matrices were orthogonalized: not those that are zero, not finite or held back.
    """
    assert options.recipe is not None
    size, decay, skip, owner = common(bucket, entries)
    states = [entries[i].state for i in bucket.entries]
    found = momentum_pass(bucket, states, options, skip, owner)
    M, G, at = bucket.M, bucket.G, found.at.double()
    norm = found.norms[:, NORMS["frob2"]].sqrt()
    factor = torch.stack((at, inverse(norm)), 1)

    def ahead(members: Sequence[int]) -> list[Tensor]:
        wide = [acc_dtype(M[j].dtype) for j in members]
        parts = [M[j].to(w) * options.momentum for j, w in zip(members, wide, strict=True)]
        for j, part in zip(members, parts, strict=True):
            part.add_(G[j].to(part.dtype), alpha=options.alpha)
        return parts

    _, used = iterate(
        options.recipe, M, factor, bucket.P, size, decay, found.held, look=ahead if options.nesterov else None
    )
    value = torch.where(norm > 0, 1 / used[:, 0] / used[:, 1], 0)
    if options.propagate:
        value = torch.where(found.bad, torch.nan, value)
    found.info[:, INFO["sigma"]] = value
    done = (norm > 0) & ~found.bad
    if found.held is not None:
        done &= ~found.held
    return found.info, value, *withheld(found.held, size, owner, len(states)), done.sum()


def withheld(held: Tensor | None, size: Tensor, owner: Tensor | None, entries: int) -> tuple[Tensor, Tensor]:
    """size (N,) with 0 for the matrices that were held back, and the number of entries () int64 that were."""
    if held is None:
        return size, size.new_zeros((), dtype=torch.int64)
    each = held if owner is None else torch.zeros(entries, device=held.device).index_add_(0, owner, held.float()) > 0
    return torch.where(held, 0, size), each.sum()


def info(norms: Tensor, flags: Tensor, at: Tensor, again: Tensor) -> Tensor:
    """Rows of info for matrices without a block; flags (N, 2): NaN, inf."""
    info = norms.new_zeros((norms.shape[0], INFO_COLUMNS))
    for name in ("frob2", "amax"):
        info[:, INFO[name]] = norms[:, NORMS[name]]
    info[:, INFO["nan"]], info[:, INFO["inf"]] = flags.unbind(1)
    info[:, INFO["reads"]] = 1.0 + again.double()
    info[:, INFO["scale"]] = at.double()
    info[:, INFO["done"]] = 1.0
    return info
