"""`SpectralMonitor`: what a run of SpectralOptimizer knows of its norms, as a flat dict of floats for any logger."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import scaling
from ..kernels.contracts import INFO, acc_dtype
from ..ops import arguments
from ..ops.estimate import BLOCK, estimate, tracked
from ..ops.layout import Layout
from ..ops.state import direction_of, is_tracked
from ..optim.spectral import SpectralOptimizer

COLD_READS = 16  # of a weight, where no block of it was kept, as ops/retract.py has it
WARM_READS = 3  # beside the kept block and as many random directions: 24 directions in all
STEP = ("momentum_norm", "update_norm", "momentum_stable_rank", "reads", "error")
WEIGHT = ("weight_norm", "weight_ratio", "weight_stable_rank")
OF_MATRICES = ("weight_stable_rank",)
OF_BLOCKS = ("momentum_stable_rank", "reads", "error")


class SpectralMonitor:
    """Norms, stable ranks, reads and skipped updates of every parameter, once per `every` steps.

        monitor = SpectralMonitor(optimizer, model)
        for step, batch in enumerate(batches):
            ...; loss.backward(); optimizer.step()
            if row := monitor.step():
                log(row)

    Keys are prefix + quantity + "/" + parameter's name, and over all parameters that have the quantity prefix +
    quantity + ".min", ".mean" and ".max". A parameter of several matrices (a stack, the slices of a convolution) has
    its largest, of reads its mean. Quantities, in the norm of the parameter's kind (docs/optimizer.md):
      momentum_norm         that of the momentum, an estimate from below: what the last step divided by, but for clip
      update_norm           lr x factor of the last step, 0 where nothing moved
      momentum_stable_rank  ||M||_F^2 / ||M||_2^2, where a block follows the matrix
      reads                 of the same: passes over the momentum per step, mean since the last row
      error                 of the same: largest estimated relative error of momentum_norm since the last row; for
                            clip by how much the norm of a direction may have exceeded 1
      weight_norm           that of the weight, from below: 3 reads a row from a kept block, 16 in its first
      weight_ratio          the same over Condition 1: sqrt(m / n), of slices scaling.init_norm, sqrt(m) for vectors
      weight_stable_rank    ||W||_F^2 / ||W||_2^2 of matrices
    and prefix + "skipped", updates held back since the last row because something was not finite. Without a value, as
    for a parameter whose gradient was None in the last step, a number is NaN: keys change only with the parameters.

    every: steps per row. weights=False: no weight is read. per_parameter=False: only the keys over all parameters.
    seed: of the random directions. model: where names come from; else param_groups or named parameters given to the
    optimizer have them, else they are "group0.param3". Training stays as it is, bit for bit. A row is one transfer to
    the host; between rows nothing is sent, two small kernels per list of matrices and step keep count. Steps captured
    in a CUDA graph are not counted on replay: reads and error are then those of the last step. The monitor has no
    state to save and keeps neither optimizer nor model alive.
    """

    def __init__(
        self,
        optimizer: SpectralOptimizer,
        model: nn.Module | None = None,
        *,
        every: int = 10,
        weights: bool = True,
        per_parameter: bool = True,
        prefix: str = "spectral/",
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, SpectralOptimizer):
            raise TypeError(f"optimizer must be a SpectralOptimizer, not {type(optimizer).__name__}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, not {type(model).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a string, not {type(prefix).__name__}")
        self.every = arguments.check_int("every", every, 1)
        self.weights, self.per_parameter, self.prefix = bool(weights), bool(per_parameter), prefix
        self.seed = arguments.check_seed(seed)
        self._optimizer = weakref.ref(optimizer)
        self._model = None if model is None else weakref.ref(model)
        self._calls = 0
        self._tallies: dict[tuple[Any, ...], _Tally] = {}
        self._blocks: Any = WeakIdKeyDictionary()  # parameter -> flat block of its weight's directions
        self._skipped = optimizer.skipped.clone()

        mine = weakref.ref(self)

        def collect(stepped: Any, args: Any, kwargs: Any) -> None:
            monitor = mine()
            if monitor is not None and monitor._optimizer() is stepped:  # a deep copy has this hook too
                monitor._collect(stepped)

        handle = optimizer.register_step_post_hook(collect)
        self._detach = weakref.finalize(self, handle.remove)
        self._detach.atexit = False

    def step(self) -> dict[str, float] | None:
        """Once per training step, after the optimizer's: every `every`-th call returns a row, the others None."""
        self._calls += 1
        return self.row() if self._calls % self.every == 0 else None

    def close(self) -> None:
        """Take the hook off the optimizer; so does the end of the monitor's life."""
        self._detach()

    @torch._disable_dynamo
    @torch.no_grad()
    def row(self) -> dict[str, float]:
        """A row now, in whichever step; it begins the next interval. One transfer to the host."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this monitor does not exist any more")
        watched = self._watched(optimizer)
        parcel = _Parcel()
        skipped = optimizer.skipped.clone()
        difference = parcel.add(skipped - self._skipped.to(skipped.device, non_blocking=True))
        sources = [
            *self._last_step(optimizer, parcel),
            *(t.send(parcel) for t in self._tallies.values()),
            *(self._weights(watched, parcel) if self.weights else ()),
        ]
        host = parcel.send()
        self._skipped, self._tallies = skipped, {}
        known: dict[int, dict[str, float]] = {id(w.param): {} for w in watched}
        for source in sources:
            for key, found in source.read(host):
                if key in known:
                    _merge(known[key], found)
        return self._flat(watched, known, float(host[difference][0]))

    @torch._disable_dynamo
    @torch.no_grad()
    def _collect(self, optimizer: SpectralOptimizer | None) -> None:
        """Count reads and errors of a step, on the device."""
        if optimizer is None:
            return
        for outcome in optimizer._last:
            for part in outcome.parts:
                if part.info.is_cuda and torch.cuda.is_current_stream_capturing():
                    return  # replays would write to tensors that only this monitor keeps
                keys = tuple(id(outcome.names[i]) for i in part.entries)
                reads, error = part.info[:, INFO["reads"]], part.info[:, INFO["error"]]
                tally = self._tallies.get((keys, reads.device))
                if tally is None:
                    self._tallies[keys, reads.device] = _Tally(keys, part.counts, 1, reads.clone(), error.clone())
                else:
                    tally.steps += 1
                    tally.reads.add_(reads)
                    torch.fmax(tally.error, error, out=tally.error)

    def _watched(self, optimizer: SpectralOptimizer) -> list[_Watched]:
        """Every parameter that the optimizer may move, under a name of its own."""
        model = None if self._model is None else self._model()
        named = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        out: dict[str, _Watched] = {}
        told = iter(optimizer._names)  # by param_groups
        for g, group in enumerate(optimizer.param_groups):
            given = group.get("param_names")
            for i, p in enumerate(group["params"]):
                other = given[i] if given else next(told, f"group{g}.param{i}")
                if group["kind"] == "skip" or p.numel() == 0:
                    continue
                name = named.get(id(p), other)
                if name in out:  # of two models
                    name = f"group{g}.param{i}"
                layout = optimizer.layout_of(group, p)
                direction = direction_of(group["direction"], group["rank"])
                followed = is_tracked(layout, layout.stacks(p.detach()), direction)
                out[name] = _Watched(name, p, layout, followed)
        return list(out.values())

    @staticmethod
    def _last_step(optimizer: SpectralOptimizer, parcel: _Parcel) -> Iterator[_LastStep]:
        propagates = {
            id(p) for group in optimizer.param_groups if group["nonfinite"] == "propagate" for p in group["params"]
        }
        for outcome in optimizer._last:
            for part in outcome.parts:
                keys = [id(outcome.names[i]) for i in part.entries]
                rows = parcel.add(part.info), parcel.add(part.size)
                yield _LastStep(keys, part.counts, part.tracked, propagates, *rows)

    def _weights(self, watched: Sequence[_Watched], parcel: _Parcel) -> Iterator[_Weights]:
        lists: dict[tuple[Any, ...], list[_Watched]] = {}
        for w in watched:
            p = w.param.detach()
            if w.layout.kind not in ("matrix", "conv"):
                norms = torch.cat([_norm(w.layout.kind, s) for s in w.layout.stacks(p)])
                yield _Weights([id(w.param)], [norms.shape[0]], w.targets(), parcel.add(norms))
                continue
            block = self._blocks.get(w.param)
            size = sum(s.shape[0] * BLOCK * tracked(s) for s in w.layout.stacks(p))
            warm = block is not None and block.numel() == size
            warm = warm and block.device == p.device and block.dtype == acc_dtype(p.dtype)
            lists.setdefault((p.dtype, p.device, warm), []).append(w)
        for (*_, warm), members in lists.items():
            yield self._estimated(members, warm, parcel)

    def _estimated(self, members: Sequence[_Watched], warm: bool, parcel: _Parcel) -> _Weights:
        stacks = [w.layout.stacks(w.param.detach()) for w in members]
        flat = [s for mine in stacks for s in mine]
        sizes = [s.shape[0] * BLOCK * tracked(s) for s in flat]
        start = None
        if warm:
            kept = torch.cat([self._blocks[w.param] for w in members]).split(sizes)
            start = [part.view(s.shape[0], BLOCK, tracked(s)) for part, s in zip(kept, flat, strict=True)]
        steps = WARM_READS if warm else COLD_READS
        found = estimate(flat, steps=steps, V0=start, vectors=BLOCK, seed=self.seed)
        ends = [sum(s.shape[0] * BLOCK * tracked(s) for s in mine) for mine in stacks]
        for w, block in zip(members, found.X.split(ends), strict=True):
            self._blocks[w.param] = block.clone()
        counts = [sum(s.shape[0] for s in mine) for mine in stacks]
        targets = [t for w in members for t in w.targets()]
        norm = parcel.add(found.info[:, INFO["sigma"]])
        return _Weights([id(w.param) for w in members], counts, targets, norm, parcel.add(found.info))

    def _flat(
        self, watched: Sequence[_Watched], known: dict[int, dict[str, float]], skipped: float
    ) -> dict[str, float]:
        row = {f"{self.prefix}skipped": skipped}
        each: dict[str, float] = {}
        for quantity in (*STEP, *WEIGHT) if self.weights else STEP:
            values = []
            for w in watched:
                if w.has(quantity):
                    value = known[id(w.param)].get(quantity, math.nan)
                    each[f"{self.prefix}{quantity}/{w.name}"] = value
                    values.append(value)
            finite = [v for v in values if not math.isnan(v)] or [math.nan]
            whole = {"min": min(finite), "mean": math.fsum(finite) / len(finite), "max": max(finite)}
            row |= {f"{self.prefix}{quantity}.{name}": value for name, value in whole.items()}
        return row | each if self.per_parameter else row


class _Parcel:
    """Tensors that go to the host together."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.length = 0

    def add(self, x: Tensor) -> slice:
        """Where x, flat, will be found in what `send` returns."""
        self.parts.append(x.reshape(-1).double())
        first, self.length = self.length, self.length + x.numel()
        return slice(first, self.length)

    def send(self) -> np.ndarray:
        device = next((x.device for x in self.parts if x.device.type != "cpu"), self.parts[0].device)
        return to_host(torch.cat([x.to(device, non_blocking=True) for x in self.parts]))


def to_host(x: Tensor) -> np.ndarray:
    """The one place where a monitor waits for a device."""
    return x.cpu().numpy()


Found = Iterator[tuple[int, dict[str, float]]]  # (id of a parameter, quantities)


@dataclass
class _Watched:
    name: str
    param: Tensor
    layout: Layout
    followed: bool  # by a block: other norms have no estimated error

    def has(self, quantity: str) -> bool:
        if quantity in OF_BLOCKS:
            return self.followed
        return quantity not in OF_MATRICES or self.layout.kind in ("matrix", "conv")

    def targets(self) -> list[float]:
        """Condition 1 for the weight's norm, one number per matrix."""
        shape, layout = self.param.shape, self.layout
        sides = layout.sides(shape)
        if layout.kind == "conv":
            positions = math.prod(shape[2:])
            goals = [scaling.init_norm(m, n, positions) for _, m, n in sides]
        else:
            goals = layout.factors(shape, "rms_to_rms")
        return [goal for goal, (k, _, _) in zip(goals, sides, strict=True) for _ in range(k)]


@dataclass
class _Tally:
    """Reads and errors of the parameters that one list of matrices served, since the last row."""

    keys: Sequence[int]
    counts: Sequence[int]
    steps: int
    reads: Tensor  # (N,) sum over steps
    error: Tensor  # (N,) largest
    where: list[slice] = field(default_factory=list)

    def send(self, parcel: _Parcel) -> _Tally:
        self.where = [parcel.add(self.reads), parcel.add(self.error)]
        return self

    def read(self, host: np.ndarray) -> Found:
        reads, error = (host[where] for where in self.where)
        for key, one in _rows(self.keys, self.counts):
            yield key, {"counted": float(self.steps), "sum": float(reads[one].mean()), "error": _largest(error[one])}


@dataclass
class _LastStep:
    keys: Sequence[int]
    counts: Sequence[int]
    tracked: bool
    propagates: set[int]
    info: slice
    size: slice

    def read(self, host: np.ndarray) -> Found:
        size = host[self.size]
        info = host[self.info].reshape(len(size), -1)
        sigma, rank = info[:, INFO["sigma"]], _stable_rank(info)
        bad = (info[:, INFO["nan"]] + info[:, INFO["inf"]]) > 0
        moved = np.where(sigma > 0, size, 0.0)
        for key, one in _rows(self.keys, self.counts):
            found = {"momentum_norm": _largest(sigma[one]), "update_norm": _largest(moved[one])}
            if bad[one].any():
                found = {**found, "update_norm": 0.0} if key not in self.propagates else dict.fromkeys(found, math.nan)
            if self.tracked:
                found |= {"momentum_stable_rank": _largest(rank[one]), "error": _largest(info[one, INFO["error"]])}
                found["last reads"] = float(info[one, INFO["reads"]].mean())
            yield key, found


@dataclass
class _Weights:
    keys: Sequence[int]
    counts: Sequence[int]
    targets: Sequence[float]
    norm: slice
    info: slice | None = None

    def read(self, host: np.ndarray) -> Found:
        norm = host[self.norm]
        ratio = norm / np.asarray(self.targets)
        rank = None if self.info is None else _stable_rank(host[self.info].reshape(len(norm), -1))
        for key, one in _rows(self.keys, self.counts):
            found = {"weight_norm": _largest(norm[one]), "weight_ratio": _largest(ratio[one])}
            yield key, found if rank is None else found | {"weight_stable_rank": _largest(rank[one])}


def _rows(keys: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    first = 0
    for key, count in zip(keys, counts, strict=True):
        yield key, slice(first, first + count)
        first += count


def _merge(known: dict[str, float], found: dict[str, float]) -> None:
    """A parameter may have been in several lists since the last row."""
    for quantity, value in found.items():
        if quantity in ("counted", "sum"):
            value += known.get(quantity, 0.0)
        elif quantity == "error":
            value = float(np.fmax(value, known.get(quantity, math.nan)))
        known[quantity] = value
    if "last reads" in known or "counted" in known:
        known["reads"] = known["sum"] / known["counted"] if "counted" in known else known["last reads"]


def _largest(x: np.ndarray) -> float:
    """NaN where one is NaN."""
    return float(x.max())


def _stable_rank(info: np.ndarray) -> np.ndarray:
    """||A||_F^2 / ||A||_2^2 from rows of info; NaN for zero matrices."""
    with np.errstate(all="ignore"):
        return info[:, INFO["frob2"]] / (info[:, INFO["scale"]] * info[:, INFO["sigma"]]) ** 2


def _norm(kind: str, stack: Tensor) -> Tensor:
    """(k, m, n) -> (k,): the norms that need no estimate: l2 of a vector, largest entry, largest row."""
    acc = acc_dtype(stack.dtype)
    if kind == "embedding":
        return torch.linalg.vector_norm(stack, dim=2, dtype=acc).amax(1)
    return torch.linalg.vector_norm(stack, math.inf if kind == "gain" else 2, dim=(1, 2), dtype=acc)
