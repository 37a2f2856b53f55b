"""`spectral_report`: does every layer obey Condition 1, and how far did it move since the last call?"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.contracts import acc_dtype
from ..optim.description import Skipped, matrices_held, shape_text, text_table
from ..optim.modules import Named, named_roles
from .linear import norms, target_of, views
from .tables import Table, shown

FACTOR = (
    4.0  # Theta(1) as a range, 1/4 to 4: Parametrization 1 gives up to 2, times sqrt(2) for ReLU, torch's default 1.2
)
NAN = math.nan
CHANGES = (">|dW|", ">|dW| ratio", ">srank dW")
OBEYS, LARGE, SMALL, BROKEN = "obeys", "too large", "too small", "not finite"

# model -> name -> the weight at the last call that remembered; a model's end takes its weights with it
_seen: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


@dataclass
class LayerReport:
    """One weight; of several matrices (a stack, slices of a kernel) the largest. NaN: not known yet.

    norm: ||W||_2, of an embedding its longest row; target: what Condition 1 asks of it, sqrt(fan_out / fan_in), of
    slices scaling.init_norm, of embeddings sqrt(width); ratio: of the two. change: the norm of W minus the W of the
    last call; change_ratio: the same over sqrt(fan_out / fan_in), of slices over that / positions.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    matrices: int
    norm: float
    target: float
    ratio: float
    stable_rank: float
    change: float
    change_ratio: float
    change_stable_rank: float
    lr: float
    weight_verdict: str
    change_verdict: str  # "" where nothing is known, or nothing to compare with

    @property
    def verdict(self) -> str:
        """ "obeys", or what does not: "W too large", "dW too small"."""
        parts = [("W", self.weight_verdict), ("dW", self.change_verdict)]
        return ", ".join(f"{what} {said}" for what, said in parts if said not in ("", OBEYS)) or OBEYS


class SpectralReport(Table[LayerReport]):
    """A row per weight; `left` names the weights that were not looked at, and why."""

    def __init__(self, rows: Iterable[LayerReport], left: Iterable[Skipped]) -> None:
        super().__init__(rows)
        self.left = list(left)

    @property
    def passed(self) -> bool:
        """Every row obeys."""
        return all(row.verdict == OBEYS for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        rows = super().to_dict()["rows"]
        for made, row in zip(rows, self.rows, strict=True):
            made |= {"shape": list(row.shape), "verdict": row.verdict}
        left = [{"name": s.name, "shape": list(s.shape), "reason": s.reason} for s in self.left]
        return {"rows": rows, "left": left, "passed": self.passed}

    def _cells(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        columns = ("layer", "shape", "kind", ">matrices", ">|W|", ">|W| ratio", ">srank W", *CHANGES, ">lr", "verdict")
        cells: list[Sequence[str]] = []
        for r in self.rows:
            numbers = (r.norm, r.ratio, r.stable_rank, r.change, r.change_ratio, r.change_stable_rank, r.lr)
            cells.append((r.name, shape_text(r.shape), r.kind, str(r.matrices), *map(shown, numbers), r.verdict))
        return columns, cells

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.left:
            left = [(row.name, shape_text(row.shape), row.reason) for row in self.left]
            parts.append(text_table(("left out", "shape", "reason"), left))
        return "\n\n".join(parts)


@torch.no_grad()
def spectral_report(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, remember: bool = True
) -> SpectralReport:
    """Norms, stable ranks and verdicts of every weight of a model, and of its change since the last call.

    Weights: matrices, every slice of a convolution, embeddings; roles come from the modules (optim.named_roles). One
    call of spectral_norm for the whole model (per dtype and device), to a relative 1e-4.
    W obeys where ||W|| / target lies in [1/4, 4] (so a zero weight is too small). dW is compared with the other layers,
    since its size depends on the rate and on the calls: it obeys where ||dW|| over Condition 1 lies within a factor 4
    of the median of the layers that moved; no verdict with fewer than two of them, or where the weight is frozen or not
    the optimizer's. With dW absent (first call, or a shape changed), those columns are empty.
    optimizer: any torch optimizer over the model's parameters; shows the lr of each weight.
    remember: keep a copy of the weights, in their dtype, for the next call (it ends with the model); False: compare
    with the kept one, and keep that. Training stays as it is, bit for bit. [paper, Condition 1; thresholds: ours]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must have param_groups, not be a {type(optimizer).__name__}")
    chosen, left = _chosen(model)
    old = _seen.get(model, {})
    changes: list[Tensor | None] = [_change(entry, old.get(entry.name)) for entry in chosen]
    known = [change for change in changes if change is not None]
    roles = [e.role for e in chosen] + [e.role for e, c in zip(chosen, changes, strict=True) if c is not None]
    found = norms([*(e.parameter for e in chosen), *known], roles)
    moved = iter(found[len(chosen) :])
    rates = {} if optimizer is None else {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
    rows = []
    for entry, norm, change in zip(chosen, found, changes, strict=False):
        rows.append(_row(entry, norm, change, None if change is None else next(moved)))
        rows[-1].lr = rates.get(id(entry.parameter), NAN)
    trained = [row for row, entry in zip(rows, chosen, strict=True) if entry.parameter.requires_grad]
    _judge_changes([row for row in trained if optimizer is None or not math.isnan(row.lr)])
    if remember:
        _seen[model] = {entry.name: entry.parameter.detach().clone() for entry in chosen}
    return SpectralReport(rows, left)


def _chosen(model: nn.Module) -> tuple[list[Named], list[Skipped]]:
    chosen, left = [], []
    for entry in named_roles(model):
        if entry.role.kind not in ("matrix", "conv", "embedding"):
            continue
        reason = entry.role.why if entry.derived else "empty" if entry.parameter.numel() == 0 else None
        if reason is None:
            chosen.append(entry)
        else:
            left.append(Skipped(entry.name, tuple(entry.parameter.shape), reason))
    return chosen, left


def _change(entry: Named, old: Tensor | None) -> Tensor | None:
    """W - W_old in accumulation precision; None where there is none to compare with."""
    W = entry.parameter.detach()
    if old is None or old.shape != W.shape:
        return None
    acc = acc_dtype(W.dtype)
    return W.to(acc) - old.to(W.device, acc)


def _row(entry: Named, norm: Tensor, change: Tensor | None, moved: Tensor | None) -> LayerReport:
    W, role = entry.parameter, entry.role
    target = target_of(role, update=False)
    size = _largest(norm)
    row = LayerReport(
        entry.name, tuple(W.shape), role.kind, matrices_held(W.shape, role) or 1, size, target, size / target,
        _stable_rank(entry, W, norm), NAN, NAN, NAN, NAN, "", "",
    )  # fmt: skip
    row.weight_verdict = _verdict(row.ratio)
    if change is not None and moved is not None:
        row.change = _largest(moved)
        row.change_ratio = row.change / target_of(role, update=True)
        row.change_stable_rank = _stable_rank(entry, change, moved)
    return row


def _judge_changes(rows: Sequence[LayerReport]) -> None:
    moved = sorted(row.change_ratio for row in rows if 0 < row.change_ratio < math.inf)
    if len(moved) < 2:
        return
    middle = math.sqrt(moved[len(moved) // 2] * moved[(len(moved) - 1) // 2])
    for row in rows:
        if not math.isnan(row.change):
            row.change_verdict = _verdict(row.change_ratio / middle)


def _verdict(ratio: float) -> str:
    if not math.isfinite(ratio):
        return BROKEN
    return SMALL if ratio < 1 / FACTOR else OBEYS if ratio <= FACTOR else LARGE


def _largest(norm: Tensor) -> float:
    return float(norm.amax())


def _stable_rank(entry: Named, A: Tensor, norm: Tensor) -> float:
    """||A||_F^2 / ||A||_2^2 of the largest matrix; NaN for embeddings, whose norm is another, and for zero."""
    if entry.role.kind == "embedding":
        return NAN
    matrices = [matrix for v in views(A, entry.role) for matrix in v.reshape(-1, *v.shape[-2:])]
    i = int(norm.argmax())
    return float(torch.linalg.matrix_norm(matrices[i] / norm[i]).square())
