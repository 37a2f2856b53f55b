"""Parameter groups with the rates of Condition 1, for torch's optimizers and others, and for SpectralOptimizer."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .. import scaling
from ..ops import arguments
from .description import Description, Row, Skipped, describe_parameters
from .modules import Named, Overrides, named_roles
from .roles import KINDS, Role

# Where weight decay is added to the gradient, it must compare with the gradient; where it multiplies the weight by
# 1 - lr wd or joins an update of unit entries, with that update: the decay is divided by that rule's factor. [ours]
_DECAY_ENTERS = {
    **dict.fromkeys(("adam", "sparseadam", "adamax", "nadam", "radam", "rmsprop", "adagrad", "lars"), "sgd"),
    "lamb": "entrywise",
}


class ParamGroups(list[dict[str, Any]]):
    """A list of parameter groups that knows what it was made from; `print(groups.describe())`.

    names: those of the parameters, group after group (the description has them in the model's order).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], description: Description, names: Iterable[str]) -> None:
        super().__init__(groups)
        self.description = description
        self.names = list(names)

    def describe(self) -> Description:
        return self.description


def describe(groups: ParamGroups) -> Description:
    """Every parameter of groups made by param_groups: name, shape, kind, why, fan_out, fan_in, factor, lr."""
    if not isinstance(groups, ParamGroups):
        raise TypeError(f"describe takes what param_groups returns, not {type(groups).__name__}")
    return groups.description


def param_groups(
    model: nn.Module,
    optimizer: str | type = "spectral",
    lr: float | Tensor | None = None,
    *,
    weight_decay: float | Mapping[str, float] | None = None,
    decoupled: bool | None = None,
    eps: float | None = None,
    kinds: Collection[str] | None = None,
    overrides: Overrides | None = None,
    named: bool = False,
) -> ParamGroups:
    """Groups for any optimizer's constructor: lr = base lr x factor of Condition 1, so that one lr serves all widths.

    optimizer: a name or class ("adamw", torch.optim.SGD, "lion", "muon", ...) or an update rule of
    scaling.UPDATE_RULES. "spectral": lr stays as it is, since SpectralOptimizer applies the factor; groups carry kind,
    transposed, groups, num_heads, split_sizes, and lr and weight_decay only where given here: else the optimizer's own
    are taken. Other groups carry their "kind" and "factor"; lr is 1e-3 and weight_decay 0 where not given.
    weight_decay: for all, or per kind, {"matrix": 0.1}, others 0. Divided by what the rate shrinks by, so that weights
    decay at base lr x weight_decay (decoupled: AdamW, Lion, Muon), or compare with the gradient (added to it: Adam).
    decoupled: which of the two, where the optimizer lets one choose (torch's NAdam, RAdam, Adam).
    eps: of entrywise optimizers, for a gradient of unit size: a group has eps / fan_out, the size of gradient entries.
    None leaves it to the optimizer.
    kinds: take these alone, so that two optimizers can share a model; the others are described as left out.
    overrides: {name pattern: {"kind": ..., "transposed": ..., "groups": ..., "num_heads": ..., "split_sizes": ...}}.
    named: params are (name, parameter) pairs, as torch's optimizers accept.
    Frozen parameters are left out; shared ones come once. Parameters of one kind and factor are one group, in the
    model's order, whatever the values of lr and weight_decay: a checkpoint loads after they change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    name, rule = _rule_of(optimizer)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, not shape {tuple(lr.shape)}")
    elif lr is not None:
        arguments.check_number("lr", lr, 0.0)
    if eps is not None and rule != "entrywise":
        raise ValueError(f"eps goes with entrywise optimizers, not {name!r} ({rule})")
    if eps is not None:
        arguments.check_number("eps", eps, 0.0)
    if isinstance(kinds, str):
        raise TypeError("kinds must be a collection of kinds, not str")
    for kind in kinds or ():
        arguments.check_choice("kinds", kind, KINDS)
    decays = _decays(0.0 if weight_decay is None else weight_decay)
    enters = rule if decoupled else _DECAY_ENTERS.get(name, rule) if decoupled is None else "sgd"
    spectral = name == "spectral"
    rate: Any = lr if lr is not None else math.nan if spectral else 1e-3  # NaN: not known here

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    names: dict[tuple[Any, ...], list[str]] = {}
    rows, skipped = [], []
    options: dict[str, Any]
    key: tuple[Any, ...]
    for entry in named_roles(model, overrides):
        parameter, role = entry.parameter, entry.role
        reason = _left_out(entry, KINDS if kinds is None else kinds)
        if reason:
            skipped.append(Skipped(entry.name, tuple(parameter.shape), reason))
            continue
        factor = role.rate_factor(rule) / _own_factor(name, parameter)
        decay = decays[role.kind]
        if spectral:
            options = {"lr": lr, "weight_decay": None if weight_decay is None else decay}
            options = {key: value for key, value in options.items() if value is not None} | role.options()
            key = role.kind, role.transposed, role.groups, role.num_heads, options.get("split_sizes") and role.blocks
        else:
            entered = factor if enters == rule else role.rate_factor(enters)
            options = {"lr": rate * factor, "weight_decay": decay / entered, "kind": role.kind, "factor": factor}
            if eps is not None:
                options["eps"] = eps / _gradient_size(role)
            # not by the values that a user gives: a checkpoint must load after a change of the decay
            key = role.kind, factor, entered, eps is None or _gradient_size(role)
        group = groups.setdefault(key, {"params": [], **options})
        group["params"].append((entry.name, parameter) if named else parameter)
        names.setdefault(key, []).append(entry.name)
        rows.append(Row(entry.name, tuple(parameter.shape), role, factor, float(rate) * factor))
    return ParamGroups(groups.values(), describe_parameters(rows, skipped), sum(names.values(), []))


def muon_groups(
    model: nn.Module,
    *,
    adamw: Collection[str] = (),
    overrides: Overrides | None = None,
    named: bool = False,
    **adamw_options: Any,
) -> ParamGroups:
    """Groups for `Muon`: matrices and convolutions, and with algorithm="adamw" embeddings, vectors and what is named.

    adamw: name patterns (fnmatch) of matrices that AdamW is to have, such as the readout. adamw_options: of its group
    (lr, weight_decay, betas, adamw_eps). overrides, named: as in param_groups. num_heads, split_sizes and
    transposed storage become options of the groups; frozen and empty parameters are left out, shared ones come once.
    """
    if isinstance(adamw, str):
        raise TypeError("adamw must be a collection of name patterns, not str")
    if "lr" in adamw_options:
        arguments.check_number("lr", adamw_options["lr"], 0.0)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    names: dict[tuple[Any, ...], list[str]] = {}
    rows, skipped, used = [], [], set()
    for entry in named_roles(model, overrides):
        parameter, role = entry.parameter, entry.role
        reason = _left_out(entry, KINDS)
        if reason:
            skipped.append(Skipped(entry.name, tuple(parameter.shape), reason))
            continue
        matched = [pattern for pattern in adamw if fnmatchcase(entry.name, pattern)]
        used.update(matched)
        options: dict[str, Any] = {"algorithm": "adamw", **adamw_options}
        if role.kind in ("matrix", "conv") and not matched:
            options = {"algorithm": "muon"}
            options |= {k: v for k, v in role.options().items() if k in ("transposed", "num_heads", "split_sizes")}
        key = tuple((k, str(v)) for k, v in sorted(options.items()))
        groups.setdefault(key, {"params": [], **options})["params"].append(
            (entry.name, parameter) if named else parameter
        )
        names.setdefault(key, []).append(entry.name)
        rows.append(Row(entry.name, tuple(parameter.shape), role, 1.0, float(options.get("lr", math.nan))))
    for pattern in adamw:
        if pattern not in used:
            raise ValueError(f"adamw: {pattern!r} matches no parameter")
    return ParamGroups(groups.values(), describe_parameters(rows, skipped), sum(names.values(), []))


def _rule_of(optimizer: str | type) -> tuple[str, str]:
    """(name, update rule): of a class, the first of its bases that is known."""
    if isinstance(optimizer, type):
        names = [base.__name__.lower() for base in optimizer.__mro__]
    elif isinstance(optimizer, str):
        names = [optimizer.lower()]
    else:
        raise TypeError(f"optimizer must be a name or a class, not {type(optimizer).__name__}")
    for name in names:
        rule = scaling.OPTIMIZER_RULES.get(name, name if name in scaling.UPDATE_RULES else None)
        if rule is not None:
            return "spectral" if rule == "spectral" else name, rule
    known = ", ".join([*scaling.OPTIMIZER_RULES, *scaling.UPDATE_RULES])
    raise ValueError(f"no update rule is known for optimizer {optimizer!r}: expected one of {known}")


def _decays(weight_decay: float | Mapping[str, float]) -> dict[str, float]:
    given = {kind: weight_decay for kind in KINDS} if isinstance(weight_decay, numbers.Real) else weight_decay
    if not isinstance(given, Mapping):
        raise TypeError(f"weight_decay must be a number or a mapping of kinds, not {type(weight_decay).__name__}")
    for kind in given:
        arguments.check_choice("weight_decay's kind", kind, KINDS)
    return {kind: arguments.check_number("weight_decay", given.get(kind, 0.0), 0.0) for kind in KINDS}


def _left_out(entry: Named, kinds: Collection[str]) -> str | None:
    if not entry.parameter.requires_grad:
        return "requires_grad=False"
    if entry.parameter.numel() == 0:
        return "empty"
    if entry.role.kind == "skip":
        if entry.role.why != "override":
            shape = tuple(entry.parameter.shape)
            raise ValueError(f"{entry.name}: no kind is known for shape {shape}; name one in overrides")
        return "kind 'skip'"
    return None if entry.role.kind in kinds else f"kind {entry.role.kind!r}"


def _own_factor(name: str, parameter: Tensor) -> float:
    """torch.optim.Muon multiplies its rate with sqrt(max(1, rows / columns)) itself."""
    return scaling.original(*parameter.shape[:2]) if name == "muon" and parameter.ndim >= 2 else 1.0


def _gradient_size(role: Role) -> int:
    """A gradient's entries are 1 / this: the number of output channels. [derived, Eq. 19]"""
    return role.fan_out * role.groups * (role.num_heads or 1)
