"""`Muon`: torch.optim.Muon's constructor, state and steps, for all matrices of a model at once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .. import scaling
from ..ops import arguments, newton_schulz
from ..ops.engine import Entry, Outcome
from ..ops.layout import Layout
from ..ops.newton_schulz import Recipe, plain
from ..ops.schedules import checked
from ..ops.state import Options
from ..ops.step import NONFINITE, check_gradient, check_rate, check_target, guard
from .base import Stepper, count, name_of, total

ALGORITHMS = ("muon", "adamw")
MOMENTA = ("ema", "heavy_ball")
A, B, C = 3.4445, -4.775, 2.0315  # Jordan et al. 2024, torch's defaults


class Muon(Stepper):
    """W <- (1 - lr weight_decay) W - lr rule(m, n) U f(S) V' of the momentum (of its Nesterov look-ahead) U S V'.

    In place of torch.optim.Muon: its arguments in its order, its defaults, and a state of one momentum_buffer per
    parameter, so that checkpoints move both ways. params: matrices (m, n) = (fan_out, fan_in); of more dimensions too:
    3-D a stack of matrices, 4-D and more a convolution (out, in / groups, *kernel), taken as the matrix
    (out, in * kernel), or, with flatten=False, as one matrix per kernel position (their update divided by the number of
    positions); flatten=True: a stack as one matrix too. num_heads, split_sizes: blocks of rows that are matrices of
    their own, as views; transposed: stored (fan_in, fan_out). `optim.muon_groups(model)` reads all this off a model.
    momentum_kind: "ema" M <- momentum M + (1 - momentum) G as torch, or "heavy_ball" M <- momentum M + G.
    ns_coefficients, ns_steps: one triple, repeated; schedule: a name, Schedule or triples in their place
    (sk.schedules). method, normalizer, compute_dtype as in sk.orthogonalize; normalizer is torch's by default,
    compute_dtype float32 on CPUs and bfloat16 on GPUs for float32 parameters. eps: taken for torch's sake, without
    effect: scales do not matter here. adjust_lr_fn: the rule, "original" (None) sqrt(max(1, m / n)), "match_rms_adamw"
    0.2 sqrt(max(m, n)), and "rms_to_rms" sqrt(m / n), "none".
    A group with algorithm="adamw" (vectors, embeddings, readout) is served by torch's fused AdamW with the group's lr,
    weight_decay, betas and adamw_eps; its parameters may have any shape.
    retract: afterwards every matrix, held back or not, is set to this spectral norm (a number or a rule), as
    MuonSphere does. nonfinite:
    a matrix whose gradient or momentum is not finite stays ("skip", "strict"), or becomes NaN as in torch
    ("propagate"); of a group for AdamW all parameters stay then (of one device and dtype). error_if_nonfinite:
    RuntimeError before anything changes. Gradients are never written to. Nothing waits for a GPU, but for
    error_if_nonfinite and retract.
    """

    _kept = (*Stepper._kept, "_orthogonalized", "_betas")
    _followed = ("method", "normalizer", "compute_dtype", "algorithm")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (A, B, C),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        schedule: Any = None,
        method: str = "auto",
        normalizer: str = "frobenius",
        compute_dtype: torch.dtype | None = None,
        momentum_kind: str = "ema",
        flatten: bool | None = None,
        num_heads: int | None = None,
        split_sizes: Sequence[int] | None = None,
        transposed: bool = False,
        retract: str | float | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        error_if_nonfinite: bool = False,
        algorithm: str = "muon",
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
    ) -> None:
        self.error_if_nonfinite = error_if_nonfinite
        self._orthogonalized: dict[torch.device, Tensor] = {}
        self._betas = betas  # not among the defaults: schedulers that cycle the momentum would take them for it
        _check_betas(betas)
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "schedule": plain(schedule), "method": method, "normalizer": normalizer, "compute_dtype": compute_dtype,
            "momentum_kind": momentum_kind, "flatten": flatten, "num_heads": num_heads, "split_sizes": split_sizes,
            "transposed": transposed,
            "retract": retract, "maximize": maximize, "nonfinite": nonfinite, "algorithm": algorithm,
            "adamw_eps": adamw_eps, "seed": 0,
        }  # fmt: skip
        self._check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's: parameters of a Muon group need two dimensions or more."""
        if isinstance(param_group, dict) and param_group.get("algorithm", self.defaults["algorithm"]) == "adamw":
            param_group.setdefault("betas", self._betas)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.ndim < 2 and group["algorithm"] == "muon":
                self.param_groups.pop()
                raise ValueError(
                    f"Muon only supports parameters of 2 dimensions and more whereas we found a parameter with size: "
                    f"{p.size()}; give it a group with algorithm='adamw'"
                )

    def _check(self, group: dict[str, Any]) -> None:
        for name, words in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
            value = group[name]
            if not isinstance(value, numbers.Real | Tensor):
                raise TypeError(f"{name} must be a number, not {type(value).__name__}")
            if isinstance(value, numbers.Real) and not 0.0 <= float(value):
                raise ValueError(f"{words} should be >= 0 but is: {value}")
        check_rate("lr", group["lr"])
        check_rate("weight_decay", group["weight_decay"])
        rule = group["adjust_lr_fn"]
        if rule is not None and rule not in scaling.RULES:
            known = ", ".join(scaling.RULES)
            raise ValueError(f"Adjust learning rate function {rule} is not supported: expected None or one of {known}")
        arguments.check_choice("algorithm", group["algorithm"], ALGORITHMS)
        arguments.check_choice("momentum_kind", group["momentum_kind"], MOMENTA)
        arguments.check_choice("nonfinite", group["nonfinite"], NONFINITE)
        if group["retract"] is not None:
            check_target("retract", group["retract"])
        if "betas" in group:
            _check_betas(group["betas"])
        arguments.check_number("adamw_eps", group["adamw_eps"], 0.0)
        _recipe(*_given(group))

    def _options(self, group: dict[str, Any]) -> Options:
        return Options(
            float(group["momentum"]), bool(group["nesterov"]), "orthogonalize", bool(group["maximize"]),
            group["nonfinite"] == "propagate", recipe=_recipe(*_given(group)), ema=group["momentum_kind"] == "ema",
        )  # fmt: skip

    def layout_of(self, group: dict[str, Any], p: Tensor) -> Layout:
        if group["algorithm"] != "muon" or p.ndim < 2:
            return Layout("vector")
        kind, flatten, split = "matrix" if p.ndim < 4 else "conv", group["flatten"], group["split_sizes"]
        flat = p.ndim > 2 and (flatten if flatten is not None else kind == "conv")
        return Layout(
            "matrix" if flat else kind, transposed=bool(group["transposed"]) and not flat, num_heads=group["num_heads"],
            split_sizes=None if split is None else tuple(split), flat=bool(flat),
        )  # fmt: skip

    def _role(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["flatten"], group["num_heads"], str(group["split_sizes"]), group["transposed"]

    def _rule(self, group: dict[str, Any]) -> str | float:
        return group["adjust_lr_fn"] or "original"

    def _steps(self, group: dict[str, Any]) -> bool:
        return bool(group["algorithm"] == "muon")

    def _prepare(self, entry: Entry, options: Options) -> None:
        if "momentum_buffer" not in entry.state:
            entry.state["momentum_buffer"] = entry.layout.buffer(entry.param, entry.param.dtype)
        entry.layout.check_buffer(entry.state["momentum_buffer"], entry.param.shape)

    def _device_of(self, key: str, p: Tensor) -> torch.device:
        return p.device

    def _note(self, options: Options, outcome: Outcome) -> None:
        for part in outcome.parts:
            if part.orthogonalized is not None:
                count(self._orthogonalized, part.orthogonalized)

    @property
    def orthogonalized(self) -> Tensor:
        """() int64 on the device: matrices orthogonalized so far; zero ones and those held back do not count."""
        return total(self._orthogonalized)

    def _own(self, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        own = super()._own(group, saved)
        if "betas" in group and "betas" not in saved:
            own["betas"] = group["betas"]
        if group["algorithm"] == "adamw" and "adamw_eps" not in saved and "eps" in saved:
            own["adamw_eps"] = saved["eps"]  # a group of torch.optim.AdamW
        return own

    def _check_loaded(self, given: dict[str, Any]) -> None:
        super()._check_loaded(given)
        for group, saved in zip(self.param_groups, given["param_groups"], strict=False):
            if group["algorithm"] == "adamw" and saved.get("amsgrad"):
                raise ValueError("the checkpoint's AdamW has amsgrad=True, which is not served; nothing was loaded")

    @torch._disable_dynamo
    def _step(self) -> None:
        plain = [(group, self._members(group)) for group in self.param_groups if group["algorithm"] == "adamw"]
        super()._step()
        for group, members in plain:
            self._adamw(group, members)

    def _members(self, group: dict[str, Any]) -> list[Tensor]:
        """Parameters of a group for AdamW that have a gradient; raises before anything moves."""
        entries, names = [], []
        for i, p in enumerate(group["params"]):
            if p.grad is not None and p.numel():
                names.append(name_of(group, i))
                check_gradient(p, p.grad, type(self).__name__, names[-1])
                entries.append(Entry(p, p.grad, {}, Layout("vector"), (), 0.0, 0.0))
        guard(entries, names, "skip", self.error_if_nonfinite)
        return [entry.param for entry in entries]

    def _adamw(self, group: dict[str, Any], members: Sequence[Tensor]) -> None:
        """One step of AdamW, torch's own; the state is that of torch.optim.AdamW."""
        lists: dict[Any, list[tuple[Tensor, ...]]] = {}
        for p in members:
            assert p.grad is not None
            state = self.state[p]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
            moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
            lists.setdefault((p.device, p.dtype), []).append((p, p.grad, *moments))
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            lr = lr.float()  # the only dtype of torch's fused kernels
        for tensors in lists.values():
            copies: list[tuple[Tensor, Tensor]] = []
            served = [_side_by_side(mine, copies) for mine in tensors]
            params, grads, means, squares, steps = map(list, zip(*served, strict=True))
            found = None
            if group["nonfinite"] != "propagate":
                bad = ~torch.isfinite(torch.stack(torch._foreach_norm(grads, math.inf))).all()
                found = bad.float()
                count(self._skipped, bad.long() * len(params))
            adamw(
                params, grads, means, squares, [], steps, fused=True, amsgrad=False, beta1=group["betas"][0],
                beta2=group["betas"][1], lr=lr, weight_decay=group["weight_decay"], eps=group["adamw_eps"],
                maximize=group["maximize"], found_inf=found,
            )  # fmt: skip
            for strided, dense in copies:
                strided.copy_(dense)


def _side_by_side(
    tensors: Sequence[Tensor], copies: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Parameter, gradient, moments and step as fused kernels take them: they walk memory, whatever the strides are.

    copies: gains (tensor, contiguous stand-in) for each that has to be written back.
    """
    p, grad, mean, square, step = tensors
    grad = grad.to(p.dtype)
    four = p, grad, mean, square
    if all(x.is_contiguous() for x in four):
        return p, grad, mean, square, step
    # an empty_like keeps strides only where they leave no gaps
    if all(x.stride() == p.stride() for x in four) and torch.empty_like(p, device="meta").stride() == p.stride():
        return p, grad, mean, square, step
    dense = p.contiguous(), grad.contiguous(), mean.contiguous(), square.contiguous()
    copies += [(x, d) for x, d in zip((p, mean, square), (dense[0], *dense[2:]), strict=True) if x is not d]
    return *dense, step


def _check_betas(betas: Sequence[float]) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), two of them, not {tuple(betas)}")


def _given(group: dict[str, Any]) -> tuple[Any, ...]:
    """What decides how a group is orthogonalized, hashable."""
    schedule = group["schedule"]
    if schedule is None:
        schedule, steps = tuple(group["ns_coefficients"]), group["ns_steps"]
    else:
        schedule, steps = plain(schedule), None
    return schedule, steps, group["method"], group["normalizer"], group["compute_dtype"]


@lru_cache(maxsize=256)
def _recipe(schedule: Any, steps: int | None, method: str, normalizer: str, dtype: torch.dtype | None) -> Recipe:
    made = newton_schulz.recipe(schedule, steps, method, normalizer, dtype, fast=True)
    if method == "svd":
        raise ValueError("method must be 'auto', 'standard' or 'gram' for Muon, not 'svd'")
    checked(made.schedule, None, dtype or torch.float32, "gram" if method == "gram" else "standard", None)
    return made
