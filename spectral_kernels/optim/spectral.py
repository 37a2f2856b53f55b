"""`SpectralOptimizer`: Eq. 17 of *A Spectral Condition for Feature Learning* for every parameter of a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.contracts import INFO
from ..ops import arguments
from ..ops.engine import Entry, Outcome, Seat, take
from ..ops.layout import Layout, kind_of
from ..ops.retract import retract_
from ..ops.state import Options, direction_of, prepare
from ..ops.step import check_gradient, check_options, check_rate, guard
from .description import Description, Row, Skipped
from .groups import ParamGroups
from .roles import role_of


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


class SpectralOptimizer(Optimizer):
    """delta W = -lr rule(fan_out, fan_in) M / ||M||_2, M <- momentum M + G, for every matrix of a model.

    params: as torch's optimizers take them; `optim.param_groups(model)` says what every parameter is, bare parameters
    are taken by their shape. lr: float or one-element tensor. direction: "normalize" (spectral norm), "frobenius", or
    "clip": every singular value divided by the one number `rank`, or by `threshold`, and cut at 1 (docs/clip.md).
    rule: "rms_to_rms" (Condition 1), "original", "match_rms_adamw", "none" or a number. weight_decay: decoupled,
    W <- (1 - lr weight_decay) W. block: directions followed per matrix (4; clip: rank + min(rank, 16)). safety="upper":
    divide by an upper
    bound that always holds. retract: after every step matrices are set to this spectral norm (a number or a rule).
    nonfinite: what a gradient with NaN or inf does: "skip" (the parameter stays bit for bit, finite entries enter the
    momentum), "strict" (the state stays too; one more read), "propagate" (as torch). error_if_nonfinite: RuntimeError
    before anything changes. momentum_dtype: None, that of the parameter. seed: of the blocks' random directions.

    A group may carry kind ("matrix", "conv", "vector", "gain", "embedding", "skip"), transposed, groups, num_heads or
    split_sizes: see ops/layout.py, and docs/optimizer.md for what is divided by which norm. Steps never
    wait for a GPU, but for error_if_nonfinite and retract.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = False,
        direction: str = "normalize",
        rank: int | None = None,
        threshold: float | None = None,
        rule: str | float = "rms_to_rms",
        weight_decay: float = 0.0,
        block: int | None = None,
        safety: str | None = None,
        retract: str | float | None = None,
        nonfinite: str = "skip",
        error_if_nonfinite: bool = False,
        maximize: bool = False,
        momentum_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        arguments.check_seed(seed)
        self.momentum_dtype = momentum_dtype
        self.error_if_nonfinite = error_if_nonfinite
        self._described = params.description if isinstance(params, ParamGroups) else None
        self._names = list(params.names) if isinstance(params, ParamGroups) else []  # in the order of the groups
        self._skipped: dict[torch.device, Tensor] = {}
        self._beyond: dict[torch.device, Tensor] = {}
        self._last: list[Outcome] = []
        self._seats: dict[Tensor, Seat] = {}
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "direction": direction, "rank": rank,
            "threshold": threshold, "rule": rule,
            "weight_decay": weight_decay, "block": block, "safety": safety, "retract": retract,
            "nonfinite": nonfinite, "maximize": maximize, "seed": seed, "kind": None, "transposed": False,
            "groups": 1, "num_heads": None, "split_sizes": None,
        }  # fmt: skip
        _check(defaults, momentum_dtype)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch adds it to the defaults here; no group of ours has it
                    group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        mine = ("momentum_dtype", "error_if_nonfinite", "_described", "_names", "_skipped", "_beyond")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in mine}, "_last": [], "_seats": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and the group's options are checked against the shapes of its parameters."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _check(group)
            for i, p in enumerate(group["params"]):
                _layout(group, p).check(p.shape, _name(group, i))
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
            if group["kind"] == "skip":
                continue
            options, lr, nonfinite = _options(group), group["lr"], group["nonfinite"]
            decay, scans = lr * group["weight_decay"], nonfinite == "strict" or self.error_if_nonfinite
            roles = (*(group[name] for name in _ROLE), str(group["split_sizes"]), group["rule"], options)
            entries, names = calls.setdefault((options, nonfinite), ([], []))
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None or p.numel() == 0:
                    continue
                if not _fits(p, grad):
                    check_gradient(p, grad, type(self).__name__, _name(group, i))
                state = self.state[p] if p in self.state else {}
                known = self._seats.get(p)
                if known is not None and known.made_for == roles and known.holds(p, state.get("momentum_buffer")):
                    entry = Entry(p, grad, state, known.layout, known.factors, lr, decay, seat=known)
                else:
                    _check(group, self.momentum_dtype)  # its options may have been changed
                    layout = _layout(group, p)
                    factors = layout.factors(p.shape, group["rule"])
                    entry = Entry(p, grad, state, layout, factors, lr, decay, made_for=roles)
                entries.append(entry)
                names.append(_name(group, i) if scans else "")
                if group["retract"] is not None and entry.layout.kind in ("matrix", "conv"):
                    retracted.append((p, state, entry.layout, group["retract"], group["seed"]))
        for (_, nonfinite), (entries, names) in calls.items():
            guard(entries, names, nonfinite, self.error_if_nonfinite)
        for (options, _), (entries, _) in calls.items():
            for entry in entries:
                if entry.seat is None:
                    prepare(entry.param, entry.state, entry.layout, options, self.momentum_dtype)
        self._last = []
        for (options, _), (entries, _) in calls.items():
            if not entries:
                continue
            new = [entry for entry in entries if entry.seat is None]
            for entry in new:
                self.state[entry.param] = entry.state
            outcome = take(entries, options)
            for entry in new:
                assert entry.seat is not None
                self._seats[entry.param] = entry.seat
            outcome.names.extend(entry.param for entry in entries)
            self._last.append(outcome)
            for part in outcome.parts:
                _count(self._skipped, part.held)
                if options.threshold is not None:
                    _count(self._beyond, part.info[:, INFO["beyond"]].sum().long())
        for seed in {r[4] for r in retracted}:
            retract_([r[:4] for r in retracted if r[4] == seed], seed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but nothing is loaded where a shape differs, and the state keeps its dtypes bit for bit.

        direction, rank, threshold, block and safety stay what this optimizer was built with: blocks of a checkpoint
        with another width are started anew.
        """
        final: dict[str, Any] = {}

        def look(_: Optimizer, given: dict[str, Any]) -> None:
            self._check_loaded(given)
            final.update(given)

        mine_stay = [{key: group[key] for key in _FOLLOWED} for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, kept in zip(self.param_groups, mine_stay, strict=True):
            group.update(kept)
        numbers = [i for group in final["param_groups"] for i in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, mine, strict=True):
            for key, value in final["state"].get(i, {}).items():
                if isinstance(value, Tensor):  # copies: steps write into them; `step` is read by the host
                    device = torch.device("cpu") if key == "step" else p.device
                    self.state[p][key] = value.detach().to(device, copy=True)

    def _check_loaded(self, given: dict[str, Any]) -> None:
        groups, saved = self.param_groups, given["param_groups"]
        if len(groups) != len(saved):
            return  # torch has a message for it
        for group, other in zip(groups, saved, strict=True):
            for i, (p, number) in enumerate(zip(group["params"], other["params"], strict=False)):
                state = given["state"].get(number, {})
                buffer = state.get("momentum_buffer")
                wanted = _layout(group, p).buffer_shape(p.shape)
                if buffer is not None and tuple(buffer.shape) != wanted:
                    raise ValueError(
                        f"the checkpoint's momentum_buffer of {_name(group, i)} has shape {tuple(buffer.shape)}, this "
                        f"parameter needs {wanted}; nothing was loaded"
                    )

    @property
    def skipped(self) -> Tensor:
        """() int64 on the device: parameters held back so far because a gradient or momentum was not finite."""
        return _total(self._skipped)

    @property
    def beyond(self) -> Tensor:
        """() int64 on the device: updates of a matrix so far whose threshold was exceeded by more values than its block
        follows, so that they were clipped at the last of these."""
        return _total(self._beyond)

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

    def describe(self) -> Description:
        """Who is treated how, and why; warns where the shape was all there was to go by and may mislead."""
        known = {} if self._described is None else {row.name: row for row in self._described}
        rows, skipped = [], []
        order = iter(self._names)
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                name = _name(group, i, f"group {g}, ")
                if known and "param_names" not in group:
                    name = next(order, name)
                if group["kind"] == "skip":
                    skipped.append(Skipped(name, tuple(p.shape), "kind 'skip'"))
                    continue
                given = group["kind"] is not None
                why = known[name].role.why if name in known else "given" if given else "shape alone"
                role = role_of(
                    p, kind=group["kind"] or kind_of(p.shape), transposed=group["transposed"], groups=group["groups"],
                    num_heads=group["num_heads"], split_sizes=group["split_sizes"], why=why,
                )  # fmt: skip
                layout = _layout(group, p)
                factor = layout.factors(p.shape, group["rule"])[0]
                rank = _ranks(layout, p.shape, group["rank"])
                rows.append(Row(name, tuple(p.shape), role, factor, float(group["lr"]) * factor, rank))
        if self._described is not None:
            skipped += self._described.skipped
        description = Description(rows, skipped)
        if description.by_shape:
            warnings.warn(
                f"{len(description.by_shape)} parameters are taken by their shape alone (an embedding would pass for a "
                "matrix): use optim.param_groups(model)",
                stacklevel=2,
            )
        return description

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralOptimizer:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = type(value)() if key in ("_last", "_seats") else copy.deepcopy(value, memo)
        return new


def _check(group: dict[str, Any], momentum_dtype: torch.dtype | None = None) -> None:
    names = ("momentum", "direction", "rank", "threshold", "rule", "safety", "retract", "nonfinite", "block")
    check_options(**{name: group[name] for name in names}, momentum_dtype=momentum_dtype)
    check_rate("lr", group["lr"])
    check_rate("weight_decay", group["weight_decay"])


def _count(counters: dict[torch.device, Tensor], number: Tensor) -> None:
    """Add () int64 in place: a captured step counts with every replay."""
    counters.setdefault(number.device, torch.zeros_like(number)).add_(number)


def _total(counters: dict[torch.device, Tensor]) -> Tensor:
    counts = list(counters.values())
    if not counts:
        return torch.zeros((), dtype=torch.int64)
    return torch.stack([c.to(counts[0].device) for c in counts]).sum()


_FOLLOWED = ("direction", "rank", "threshold", "block", "safety")
_ROLE = ("kind", "transposed", "groups", "num_heads")


def _fits(p: Tensor, grad: Tensor) -> bool:
    """The usual gradient, for which check_gradient has nothing to say."""
    plain = type(grad) is Tensor and type(p) in (Tensor, torch.nn.Parameter) and grad.layout == torch.strided
    return plain and grad.dtype == p.dtype in arguments.FLOATS and grad.shape == p.shape and grad.device == p.device


def _options(group: dict[str, Any]) -> Options:
    return Options(
        float(group["momentum"]), bool(group["nesterov"]), direction_of(group["direction"], group["rank"]),
        bool(group["maximize"]), group["nonfinite"] == "propagate", group["safety"] == "upper", group["block"],
        group["seed"], group["rank"], group["threshold"],
    )  # fmt: skip


def _ranks(layout: Layout, shape: torch.Size, rank: int | None) -> str:
    """The rank at which the matrices of a parameter are clipped: the group's, or their smaller side."""
    if rank is None or layout.kind not in ("matrix", "conv"):
        return ""
    shorts = sorted({min(m, n) for _, m, n in layout.sides(shape)})
    return ", ".join(dict.fromkeys(f"{min(rank, s)} = min(m, n)" if s < rank else str(rank) for s in shorts))


def _layout(group: dict[str, Any], p: Tensor) -> Layout:
    split = group["split_sizes"]
    return Layout(
        group["kind"] or kind_of(p.shape), bool(group["transposed"]), group["groups"], group["num_heads"],
        None if split is None else tuple(split),
    )  # fmt: skip


def _name(group: dict[str, Any], i: int, prefix: str = "") -> str:
    names = group.get("param_names")
    return names[i] if names else f"{prefix}parameter {i}"
