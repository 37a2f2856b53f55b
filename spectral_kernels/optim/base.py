"""What the optimizers of this package share: parameters in seats, one call of `take` for all of them, and counts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.contracts import INFO
from ..ops import arguments
from ..ops.engine import Entry, Outcome, Seat, seat, take
from ..ops.layout import Layout
from ..ops.retract import retract_
from ..ops.state import Options
from ..ops.step import check_gradient, guard


class StepInfo(NamedTuple):
    """What the last step knew of one parameter, one number per matrix, float64, on its device."""

    sigma: Tensor  # norm of the momentum that the update was divided by (before a safety margin)
    upper: Tensor  # an upper bound of it that always holds
    size: Tensor  # norm of the update: lr x factor; 0 where nothing moved
    reads: Tensor  # passes over the momentum, that of its own update included
    error: Tensor  # estimated relative error of sigma
    frob: Tensor  # Frobenius norm
    tau: Tensor  # clip: the value at which singular values are clipped; else 0
    beyond: Tensor  # clip: 1 where more values exceed the threshold than the block holds: tau is above it then
    tracked: bool  # sigma is a spectral norm followed by a block


class Stepper(Optimizer):
    """An optimizer whose step is `ops.engine.take`. A subclass says what a group means; groups have lr, weight_decay,
    nonfinite, retract and seed."""

    error_if_nonfinite: bool
    _kept: ClassVar[tuple[str, ...]] = ("error_if_nonfinite", "_skipped")  # attributes that travel with a pickle
    _followed: ClassVar[tuple[str, ...]] = ()  # options of a group that a checkpoint does not change

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._skipped: dict[torch.device, Tensor] = {}
        self._last: list[Outcome] = []
        self._seats: dict[Tensor, Seat] = {}
        super().__init__(params, defaults)

    # -- what a subclass says

    def _check(self, group: dict[str, Any]) -> None:
        """Raise where the options of a group are not allowed."""
        raise NotImplementedError

    def _options(self, group: dict[str, Any]) -> Options:
        raise NotImplementedError

    def layout_of(self, group: dict[str, Any], p: Tensor) -> Layout:
        raise NotImplementedError

    def _rule(self, group: dict[str, Any]) -> str | float:
        raise NotImplementedError

    def _role(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What the layout of a parameter depends on."""
        raise NotImplementedError

    def _prepare(self, entry: Entry, options: Options) -> None:
        """Fill in what is missing of its state."""
        raise NotImplementedError

    def _steps(self, group: dict[str, Any]) -> bool:
        """Does `take` serve this group?"""
        return True

    def _device_of(self, key: str, p: Tensor) -> torch.device:
        """Where a tensor of the state lies; `step` is read by the host."""
        return torch.device("cpu") if key == "step" else p.device

    def _note(self, options: Options, outcome: Outcome) -> None:
        """Count what a subclass counts."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch adds it to the defaults here; no group of ours has it
                    group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        mine = {name: self.__dict__[name] for name in self._kept}
        return {**super().__getstate__(), **mine, "_last": [], "_seats": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and the group's options are checked against the shapes of its parameters."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check(group)
            for i, p in enumerate(group["params"]):
                self.layout_of(group, p).check(p.shape, name_of(group, i))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step over all parameters that have a gradient. closure: evaluates the model anew and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo  # as torch's optimizers do; torch.compiler.disable imports the compiler at once
    def _step(self) -> None:
        calls: dict[tuple[Options, str], tuple[list[Entry], list[str]]] = {}
        retracted = []
        for group in self.param_groups:
            if not self._steps(group):
                continue
            options, lr, nonfinite = self._options(group), group["lr"], group["nonfinite"]
            decay, scans = lr * group["weight_decay"], nonfinite == "strict" or self.error_if_nonfinite
            rule = self._rule(group)
            roles = (*self._role(group), rule, options)
            entries, names = calls.setdefault((options, nonfinite), ([], []))
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None or p.numel() == 0:
                    continue
                if not fits(p, grad):
                    check_gradient(p, grad, type(self).__name__, name_of(group, i))
                state = self.state[p] if p in self.state else {}
                known = self._seats.get(p)
                if known is not None and known.made_for == roles and known.holds(p, state.get("momentum_buffer")):
                    entry = Entry(p, grad, state, known.layout, known.factors, lr, decay, seat=known)
                else:
                    self._check(group)  # its options may have been changed
                    layout = self.layout_of(group, p)
                    layout.check(p.shape, name_of(group, i))
                    factors = layout.factors(p.shape, rule)
                    entry = Entry(p, grad, state, layout, factors, lr, decay, made_for=roles)
                entries.append(entry)
                names.append(name_of(group, i) if scans else "")
                if group["retract"] is not None and entry.layout.kind in ("matrix", "conv"):
                    retracted.append((p, state, entry.layout, group["retract"], group["seed"]))
        for (_, nonfinite), (entries, names) in calls.items():
            guard(entries, names, nonfinite, self.error_if_nonfinite)
        new = []
        for (options, _), (entries, _) in calls.items():
            for entry in entries:
                if entry.seat is None:
                    self._prepare(entry, options)
                    entry.seat = seat(entry, options)
                    new.append(entry)
        for entry in new:  # nothing is refused from here on
            assert entry.seat is not None
            self.state[entry.param], self._seats[entry.param] = entry.state, entry.seat
        self._last = []
        for (options, _), (entries, _) in calls.items():
            if not entries:
                continue
            outcome = take(entries, options)
            outcome.names.extend(entry.param for entry in entries)
            self._last.append(outcome)
            for part in outcome.parts:
                count(self._skipped, part.held)
            self._note(options, outcome)
        for seed in {r[4] for r in retracted}:
            retract_([r[:4] for r in retracted if r[4] == seed], seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but nothing is loaded where a shape differs, and the state keeps its dtypes bit for bit.

        What decides which state there is (direction, rank, block, ...; Muon: algorithm, ...) stays as it was built.
        """
        final: dict[str, Any] = {}
        own: list[dict[str, Any]] = []

        def look(_: Optimizer, given: dict[str, Any]) -> None:
            self._check_loaded(given)
            final.update(given)
            own[:] = map(self._own, self.param_groups, given["param_groups"])

        handle = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, kept in zip(self.param_groups, own, strict=True):
            group.update(kept)
        numbers = [i for group in final["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, mine, strict=True):
            for key, value in final["state"].get(i, {}).items():
                if isinstance(value, Tensor):  # copies: steps write into them
                    device = self._device_of(key, p)
                    self.state[p][key] = value.detach().to(device, copy=True)

    def _own(self, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """Options that a group keeps when `saved` is loaded: those it follows, and those that `saved` does not have."""
        mine = (key for key in self.defaults if key in group)
        return {key: group[key] for key in mine if key in self._followed or key not in saved}

    def _check_loaded(self, given: dict[str, Any]) -> None:
        groups, saved = self.param_groups, given["param_groups"]
        if len(groups) != len(saved):
            return  # torch has a message for it
        for group, other in zip(groups, saved, strict=True):
            for i, (p, number) in enumerate(zip(group["params"], other["params"], strict=False)):
                state = given["state"].get(number, {})
                wanted = {"momentum_buffer": self.layout_of(group, p).buffer_shape(p.shape)}
                wanted |= {key: tuple(p.shape) for key in ("exp_avg", "exp_avg_sq")}
                for key, shape in wanted.items():
                    if key in state and tuple(state[key].shape) != shape:
                        raise ValueError(
                            f"the checkpoint's {key} of {name_of(group, i)} has shape {tuple(state[key].shape)}, "
                            f"this parameter needs {shape}; nothing was loaded"
                        )

    @property
    def skipped(self) -> Tensor:
        """() int64 on the device: parameters held back so far because a gradient or momentum was not finite."""
        return total(self._skipped)

    def last_step(self) -> Iterator[tuple[Tensor, StepInfo]]:
        """(parameter, StepInfo) of every parameter that the last step moved; nothing is sent to the host."""
        for outcome in self._last:
            tracked = {i: part.tracked for part in outcome.parts for i in part.entries}
            for i, (info, upper, size) in sorted(outcome.results().items()):
                sigma, scale = info[:, INFO["sigma"]], info[:, INFO["scale"]]
                frob = info[:, INFO["frob2"]].sqrt() / torch.where(scale > 0, scale, 1)
                moved = torch.where(sigma > 0, size, 0)
                unit = torch.where(scale > 0, scale, 1)
                clip = (info[:, INFO["tau"]] / unit, info[:, INFO["beyond"]])
                rest = (info[:, INFO["reads"]], info[:, INFO["error"]], frob, *clip, tracked[i])
                yield outcome.names[i], StepInfo(sigma, upper, moved, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = type(value)() if key in ("_last", "_seats") else copy.deepcopy(value, memo)
        return new


def count(counters: dict[torch.device, Tensor], number: Tensor) -> None:
    """Add () int64 in place: a captured step counts with every replay."""
    counters.setdefault(number.device, torch.zeros_like(number)).add_(number)


def total(counters: dict[torch.device, Tensor]) -> Tensor:
    counts = list(counters.values())
    if not counts:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([c.to(counts[0].device) for c in counts]).sum()


def fits(p: Tensor, grad: Tensor) -> bool:
    """The usual gradient, for which check_gradient has nothing to say."""
    plain = type(grad) is Tensor and type(p) in (Tensor, torch.nn.Parameter) and grad.layout == torch.strided
    return plain and grad.dtype == p.dtype in arguments.FLOATS and grad.shape == p.shape and grad.device == p.device


def name_of(group: dict[str, Any], i: int, prefix: str = "") -> str:
    names = group.get("param_names")
    return names[i] if names else f"{prefix}parameter {i}"
