"""`init_model_`: Condition 1 at initialization, for every parameter of a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import scaling
from .kernels.contracts import acc_dtype
from .ops import arguments
from .ops.norm import spectral_norm
from .ops.rescale import spectral_norm_
from .optim.description import Skipped, shape_text, text_table
from .optim.modules import Named, named_roles
from .optim.roles import matrices

LAUNCH_ENTRIES = 1 << 28  # entries drawn and measured together: 1 GiB of float32 beside the model


@dataclass(frozen=True)
class Initialized:
    """norm: matrix, conv: the largest spectral norm of its matrices or slices; embedding: the largest row RMS;
    gain: the largest entry; vector: the RMS."""

    name: str
    shape: tuple[int, ...]
    kind: str
    target: float
    before: float
    after: float


class InitReport:
    """What init_model_ did: rows of what was set, and what was left as it was; prints as a table."""

    def __init__(self, rows: Iterable[Initialized], left: Iterable[Skipped]) -> None:
        self.rows = list(rows)
        self.left = list(left)

    def __iter__(self) -> Iterator[Initialized]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        columns = ("parameter", "shape", "kind", ">target", ">norm before", ">norm after")
        cells = [
            (r.name, shape_text(r.shape), r.kind, f"{r.target:.4g}", f"{r.before:.4g}", f"{r.after:.4g}")
            for r in self.rows
        ]
        parts = [text_table(columns, cells)] if cells else []
        if self.left:
            left = [(row.name, shape_text(row.shape), row.reason) for row in self.left]
            parts.append(text_table(("left as it was", "shape", "reason"), left))
        return "\n\n".join(parts)

    __repr__ = __str__


def init_model_(
    model: nn.Module,
    *,
    gain: float = 1.0,
    seed: int = 0,
    tol: float = 1e-3,
    where: Callable[[str, nn.Parameter], bool] | None = None,
) -> InitReport:
    """Initialize a model in place by Eq. 16: every matrix a normal sample, rescaled to spectral norm gain sqrt(m / n).

    Matrices, stacks and blocks of fused matrices: ||W||_2 = gain sqrt(fan_out / fan_in) each, within tol. Convolutions:
    every slice gain sqrt(fan_out / (fan_in positions)), see scaling.init_norm. Embeddings: rows of RMS gain, the
    padding row 0. Biases 0, norm gains 1. gain: sigma of Eq. 16; sqrt(2) suits ReLU [paper].
    seed: with a parameter's name it fixes its sample, whatever else the model holds (per kind of device).
    where(name, parameter): which of them (default: all). Left as they are and listed: frozen and parametrized weights,
    slopes of PReLU, and parameters of modules that torch does not know. Shared parameters are set once.
    Source: arXiv 2310.17813, Eq. 16; embeddings derived from Condition 2; convolutions ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    arguments.check_number("gain", gain, 0.0, above=True)
    arguments.check_seed(seed)
    chosen, left = [], []
    for entry in named_roles(model):
        reason = _left(entry)
        if reason is None and where is not None and not where(entry.name, entry.parameter):
            reason = "where"
        if reason is not None:
            left.append(Skipped(entry.name, tuple(entry.parameter.shape), reason))
            continue
        if entry.parameter.is_meta or type(entry.parameter.data).__name__ == "DTensor":
            raise TypeError(f"{entry.name} is a DTensor or on the meta device: initialize plain tensors")
        chosen.append(entry)
    with torch.no_grad():
        before = _norms(chosen, tol, seed)
        for launch in _launches(chosen):
            _draw(launch, gain, tol, seed)
        after = _norms(chosen, tol, seed + 1 if seed < 0 else seed - 1)  # other start vectors than the rescaling had
    rows = [
        Initialized(e.name, tuple(e.parameter.shape), e.role.kind, _target(e, gain), before[e.name], after[e.name])
        for e in chosen
    ]
    return InitReport(rows, left)


def _left(entry: Named) -> str | None:
    if not entry.parameter.requires_grad:
        return "requires_grad=False"
    if entry.parameter.numel() == 0:
        return "empty"
    if entry.derived:
        return entry.role.why
    if not entry.known:
        return f"unknown module ({type(entry.module).__name__})"
    if isinstance(entry.module, nn.PReLU):
        return "slope of PReLU"
    return None


def _target(entry: Named, gain: float) -> float:
    role = entry.role
    if role.kind in ("matrix", "conv"):
        fan_out = max(role.blocks, default=role.fan_out)
        return gain * scaling.init_norm(fan_out, role.fan_in, role.positions)
    return {"embedding": gain, "gain": 1.0, "vector": 0.0}[role.kind]


def _is_matrix(entry: Named) -> bool:
    return entry.role.kind in ("matrix", "conv")


def _launches(entries: list[Named]) -> Iterator[list[Named]]:
    """Entries of one device and dtype, bounded in size."""
    held: dict[tuple[torch.device, torch.dtype], list[Named]] = {}
    for entry in entries:
        key = entry.parameter.device, entry.parameter.dtype
        together = held.setdefault(key, [])
        if together and sum(e.parameter.numel() for e in (*together, entry)) > LAUNCH_ENTRIES:
            yield held.pop(key)
            together = held.setdefault(key, [])
        together.append(entry)
    yield from held.values()


def _sample(like: Tensor, entry: Named, seed: int) -> Tensor:
    """Standard normal entries, keyed by seed and name."""
    key = hashlib.blake2b(f"{seed}:{entry.name}".encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=acc_dtype(like.dtype))


def _draw(entries: list[Named], gain: float, tol: float, seed: int) -> None:
    views: list[tuple[Tensor, Tensor, float]] = []  # (..., m, n) of the weight, its sample, what follows sqrt(m / n)
    for entry in entries:
        weight, role = entry.parameter.detach(), entry.role
        if _is_matrix(entry):
            share = gain / math.sqrt(role.positions)
            samples = matrices(_sample(weight, entry, seed), role)
            views += [(w, s, share) for w, s in zip(matrices(weight, role), samples, strict=True)]
        elif role.kind == "embedding":
            rows = _sample(weight, entry, seed)
            weight.copy_(gain * rows / rows.square().mean(-1, keepdim=True).sqrt())
            padding = getattr(entry.module, "padding_idx", None)
            if padding is not None:
                weight[padding] = 0
        else:
            weight.fill_(1.0 if role.kind == "gain" else 0.0)
    spectral_norm_([sample for _, sample, _ in views], "rms_to_rms", tol=tol, seed=seed)
    for view, sample, share in views:
        view.copy_(share * sample)


def _norms(entries: list[Named], tol: float, seed: int) -> dict[str, float]:
    """name -> the norm of its kind, see Initialized."""
    out: dict[str, float] = {}
    for launch in _launches(entries):
        held = [(e.name, view) for e in launch if _is_matrix(e) for view in matrices(e.parameter, e.role)]
        wide = [view.to(acc_dtype(view.dtype)) for _, view in held]
        norms = spectral_norm(wide, tol=tol, seed=seed)
        for (name, _), norm in zip(held, norms, strict=True):
            out[name] = max(out.get(name, 0.0), float(norm.max()))
        for entry in launch:
            x = entry.parameter.to(acc_dtype(entry.parameter.dtype))
            if entry.role.kind == "embedding":
                out[entry.name] = float(x.square().mean(-1).sqrt().max())
            elif not _is_matrix(entry):
                out[entry.name] = float(x.abs().max() if entry.role.kind == "gain" else x.square().mean().sqrt())
    return out
