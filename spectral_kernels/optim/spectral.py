"""`SpectralOptimizer`: Eq. 17 of *A Spectral Condition for Feature Learning* for every parameter of a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..kernels.contracts import INFO
from ..ops import arguments
from ..ops.engine import Entry, Outcome
from ..ops.layout import Layout, kind_of
from ..ops.newton_schulz import plain
from ..ops.state import Options, direction_of, prepare
from ..ops.step import check_options, check_rate, recipe_of
from .base import Stepper, count, name_of, total
from .description import Description, Row, Skipped
from .groups import ParamGroups
from .roles import role_of

_DIRECTION = ("direction", "rank", "threshold", "schedule")


class SpectralOptimizer(Stepper):
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

    _kept = (*Stepper._kept, "momentum_dtype", "_described", "_names", "_beyond")
    _followed = (*_DIRECTION, "block", "safety")  # blocks of a checkpoint with another width are started anew

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
        schedule: Any = None,
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
        self._beyond: dict[torch.device, Tensor] = {}
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "direction": direction, "rank": rank,
            "threshold": threshold, "schedule": plain(schedule), "rule": rule,
            "weight_decay": weight_decay, "block": block, "safety": safety, "retract": retract,
            "nonfinite": nonfinite, "maximize": maximize, "seed": seed, "kind": None, "transposed": False,
            "groups": 1, "num_heads": None, "split_sizes": None,
        }  # fmt: skip
        self._check(defaults)
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        names = ("momentum", "rule", "safety", "retract", "nonfinite", "block", *_DIRECTION)
        check_options(**{name: group[name] for name in names}, momentum_dtype=self.momentum_dtype)
        recipe_of(group["direction"], group["schedule"])
        check_rate("lr", group["lr"])
        check_rate("weight_decay", group["weight_decay"])

    def _options(self, group: dict[str, Any]) -> Options:
        return Options(
            float(group["momentum"]), bool(group["nesterov"]), direction_of(group["direction"], group["rank"]),
            bool(group["maximize"]), group["nonfinite"] == "propagate", group["safety"] == "upper", group["block"],
            group["seed"], group["rank"], group["threshold"], recipe_of(group["direction"], group["schedule"]),
        )  # fmt: skip

    def layout_of(self, group: dict[str, Any], p: Tensor) -> Layout:
        split = group["split_sizes"]
        return Layout(
            group["kind"] or kind_of(p.shape), bool(group["transposed"]), group["groups"], group["num_heads"],
            None if split is None else tuple(split),
        )  # fmt: skip

    def _role(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (*(group[name] for name in _ROLE), str(group["split_sizes"]))

    def _rule(self, group: dict[str, Any]) -> str | float:
        rule: str | float = group["rule"]
        return rule

    def _prepare(self, entry: Entry, options: Options) -> None:
        prepare(entry.param, entry.state, entry.layout, options, self.momentum_dtype)

    def _steps(self, group: dict[str, Any]) -> bool:
        return bool(group["kind"] != "skip")

    def _note(self, options: Options, outcome: Outcome) -> None:
        if options.threshold is not None:
            for part in outcome.parts:
                count(self._beyond, part.info[:, INFO["beyond"]].sum().long())

    @property
    def beyond(self) -> Tensor:
        """() int64 on the device: updates of a matrix so far whose threshold was exceeded by more values than its block
        follows, so that they were clipped at the last of these."""
        return total(self._beyond)

    def describe(self) -> Description:
        """Who is treated how, and why; warns where the shape was all there was to go by and may mislead."""
        known = {} if self._described is None else {row.name: row for row in self._described}
        rows, skipped = [], []
        order = iter(self._names)
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                name = name_of(group, i, f"group {g}, ")
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
                layout = self.layout_of(group, p)
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


_ROLE = ("kind", "transposed", "groups", "num_heads")


def _ranks(layout: Layout, shape: torch.Size, rank: int | None) -> str:
    """The rank at which the matrices of a parameter are clipped: the group's, or their smaller side."""
    if rank is None or layout.kind not in ("matrix", "conv"):
        return ""
    shorts = sorted({min(m, n) for _, m, n in layout.sides(shape)})
    return ", ".join(dict.fromkeys(f"{min(rank, s)} = min(m, n)" if s < rank else str(rank) for s in shorts))
