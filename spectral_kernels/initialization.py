"""`spectral_init_` and `init_model_`: Condition 1 at initialization, for a matrix and for a whole model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from . import scaling
from .kernels.contracts import acc_dtype
from .ops import arguments
from .ops.norm import spectral_norm
from .ops.rescale import spectral_norm_
from .optim.description import Rows, Skipped, shape_text, text_table
from .optim.modules import Named, named_roles
from .optim.roles import matrices

LAUNCH_ENTRIES = 1 << 28  # entries drawn and measured together: 1 GiB of float32 beside the model
SAMPLES = ("normal", "orthogonal", "uniform")


def spectral_init_(
    W: Any,
    gain: float = 1.0,
    *,
    sample: str = "normal",
    target: float | str = "rms_to_rms",
    tol: float = 1e-3,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Fill W in place with a fresh sample of spectral norm gain sqrt(fan_out / fan_in): Eq. 16.

    W: (..., m, n), any float dtype, each matrix of a stack with its own norm, or a list of such; returned. Drawn,
    measured and scaled in float32 (float64 for such W); ||W||_2 within tol. gain: sigma of Eq. 16; sqrt(2) suits ReLU.
    sample: "normal" and "uniform" entries, or "orthogonal" columns (rows where m < n), all singular values then equal.
    target: a number or another rule of scaling.RULES in the place of sqrt(m / n).
    seed: fixes the sample, so two matrices of one shape get the same one. Without a seed the numbers come from
    generator, and without either from torch's own, as in torch.nn.init. For kernels of convolutions: init_model_.
    Source: arXiv 2310.17813, Eq. 16.
    """
    batch = arguments.ragged(W)
    arguments.check_number("gain", gain, 0.0, above=True)
    arguments.check_choice("sample", sample, SAMPLES)
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    key = 0 if seed is None else arguments.check_seed(seed)  # of the estimator's start vectors
    if any(stack.is_meta for stack in batch.stacks):
        raise TypeError("W is on the meta device: initialize plain tensors")
    if seed is not None and batch.stacks:
        generator = _generator(str(key), batch.stacks[0].device)
    with torch.no_grad():
        tensors = [w.detach() for w in (W if batch.is_list else [W])]
        samples = [_drawn(w, sample, generator) for w in tensors]
        spectral_norm_(samples, target, tol=tol, seed=key)
        for w, x in zip(tensors, samples, strict=True):
            w.copy_(gain * x)
    return W


def _generator(key: str, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _drawn(like: Tensor, sample: str, generator: torch.Generator | None) -> Tensor:
    options: dict[str, Any] = {"generator": generator, "device": like.device, "dtype": acc_dtype(like.dtype)}
    if sample == "uniform":
        return torch.rand(like.shape, **options).mul_(2).sub_(1)
    x = torch.randn(like.shape, **options)
    if sample == "normal" or x.numel() == 0:
        return x
    Q, R = torch.linalg.qr(x if x.shape[-2] >= x.shape[-1] else x.mT)
    Q = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[..., None, :]  # uniform over all such matrices
    return Q if x.shape[-2] >= x.shape[-1] else Q.mT


@dataclass(frozen=True)
class Initialized:
    """norm: matrix, conv: the largest spectral norm of its matrices or slices; embedding: the largest row RMS;
    gain: the largest entry; vector: the RMS. target: Condition 1's, times the gain.

    std: of Gaussian entries, the largest of its blocks; None where norms are set. layer: for "mup", else "".
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    target: float
    before: float
    after: float
    std: float | None = None
    layer: str = ""


class InitReport(Rows[Initialized]):
    """What init_model_ did: rows of what was set, and what was left as it was; prints as a table."""

    def __init__(self, rows: Iterable[Initialized], left: Iterable[Skipped]) -> None:
        super().__init__(rows)
        self.left = list(left)

    def __str__(self) -> str:
        columns: tuple[str, ...] = ("parameter", "shape", "kind", ">target", ">norm before", ">norm after")
        cells: list[tuple[str, ...]] = [
            (r.name, shape_text(r.shape), r.kind, f"{r.target:.4g}", f"{r.before:.4g}", f"{r.after:.4g}")
            for r in self.rows
        ]
        if any(r.std is not None for r in self.rows):
            columns = (*columns, ">std")
            cells = [(*c, "" if r.std is None else f"{r.std:.4g}") for c, r in zip(cells, self.rows, strict=True)]
        if any(r.layer for r in self.rows):
            columns = (*columns, "layer")
            cells = [(*c, r.layer) for c, r in zip(cells, self.rows, strict=True)]
        parts = [text_table(columns, cells)] if cells else []
        if self.left:
            left = [(row.name, shape_text(row.shape), row.reason) for row in self.left]
            parts.append(text_table(("left as it was", "shape", "reason"), left))
        return "\n\n".join(parts)

    __repr__ = __str__


def init_model_(
    model: nn.Module,
    *,
    parametrization: str = "spectral",
    gain: float = 1.0,
    seed: int = 0,
    tol: float = 1e-3,
    where: Callable[[str, nn.Parameter], bool] | None = None,
    layers: Mapping[str, str] | None = None,
) -> InitReport:
    """Initialize a model in place by Eq. 16: every matrix a normal sample, rescaled to spectral norm gain sqrt(m / n).

    Matrices, stacks and blocks of fused matrices: ||W||_2 = gain sqrt(fan_out / fan_in) each, within tol. Convolutions:
    every slice gain sqrt(fan_out / (fan_in positions)), see scaling.init_norm. Embeddings: rows of RMS gain, the
    padding row 0. Biases 0, norm gains 1. gain: sigma of Eq. 16; sqrt(2) suits ReLU [paper].
    parametrization: "spectral" is the above; "sp", "ntp", "mup": Gaussian entries of standard deviation gain x sigma,
    see scaling.parametrization, an embedding's fan_in counting as 1; norms are measured, not set.
    layers: for "mup", {name pattern: "input" | "hidden" | "output"}, where it is not so that the model's first matrix
    is its input (unless an embedding is) and its last one its output (unless one is tied to an embedding).
    seed: with a parameter's name it fixes its sample, whatever else the model holds (per kind of device).
    where(name, parameter): which of them (default: all). Left as they are and listed: frozen and parametrized weights,
    slopes of PReLU, and parameters of modules that torch does not know. Shared parameters are set once.
    Source: arXiv 2310.17813, Eq. 16 and section 5; embeddings derived from Condition 2; convolutions ours.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    arguments.check_choice("parametrization", parametrization, scaling.PARAMETRIZATIONS)
    arguments.check_number("gain", gain, 0.0, above=True)
    arguments.check_seed(seed)
    if layers and parametrization != "mup":
        raise ValueError(f"layers goes with parametrization='mup', not {parametrization!r}")
    chosen, left = [], []
    entries = named_roles(model)
    layer_of = _layers(entries, layers or {}) if parametrization == "mup" else {}
    for entry in entries:
        reason = _left(entry)
        if reason is None and where is not None and not where(entry.name, entry.parameter):
            reason = "where"
        if reason is not None:
            left.append(Skipped(entry.name, tuple(entry.parameter.shape), reason))
            continue
        if entry.parameter.is_meta or type(entry.parameter.data).__name__ == "DTensor":
            raise TypeError(f"{entry.name} is a DTensor or on the meta device: initialize plain tensors")
        chosen.append(entry)
    stds: dict[str, list[float]] = {}  # name -> of its blocks
    if parametrization != "spectral":
        stds = {e.name: _stds(e, parametrization, gain, layer_of.get(e.name, "hidden")) for e in chosen if _drawable(e)}
    with torch.no_grad():
        before = _norms(chosen, tol, seed)
        for launch in _launches(chosen):
            _draw(launch, gain, tol, seed, stds)
        after = _norms(chosen, tol, seed + 1 if seed < 0 else seed - 1)  # other start vectors than the rescaling had
    rows = [
        Initialized(
            *(e.name, tuple(e.parameter.shape), e.role.kind, _target(e, gain), before[e.name], after[e.name]),
            std=max(stds.get(e.name, []), default=None),
            layer=layer_of.get(e.name, ""),
        )
        for e in chosen
    ]
    return InitReport(rows, left)


def _layers(entries: list[Named], given: Mapping[str, str]) -> dict[str, str]:
    """name -> layer of every matrix and convolution that a module of torch holds."""
    held = [e for e in entries if e.known and _drawable(e)]
    out = {e.name: "hidden" for e in held if _is_matrix(e)}
    tied = [e.name for e in held if _is_matrix(e) and "Embedding" in e.role.why.partition("tied with")[2]]
    if out:
        if not tied and _is_matrix(held[0]):
            out[held[0].name] = "input"
        for name in tied or [[*out][-1]]:
            out[name] = "output"
    for pattern, layer in given.items():
        arguments.check_choice("layers", layer, scaling.LAYERS)
        matched = [name for name in out if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"layers: {pattern!r} matches no matrix or convolution")
        out |= dict.fromkeys(matched, layer)
    return out


def _stds(entry: Named, parametrization: str, gain: float, layer: str) -> list[float]:
    role = entry.role
    fan_in = 1 if role.kind == "embedding" else role.fan_in
    rows = role.blocks or (role.fan_out,)
    return [gain * scaling.parametrization(parametrization, m, fan_in, role.positions, layer=layer).sigma for m in rows]


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


def _drawable(entry: Named) -> bool:
    return _is_matrix(entry) or entry.role.kind == "embedding"


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
    generator = _generator(f"{seed}:{entry.name}", like.device)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=acc_dtype(like.dtype))


def _draw(entries: list[Named], gain: float, tol: float, seed: int, stds: Mapping[str, list[float]]) -> None:
    """stds: of the blocks of parameters that are drawn with them; others are rescaled to their norms."""
    views: list[tuple[Tensor, Tensor, float]] = []  # (..., m, n) of the weight, its sample, what follows sqrt(m / n)
    for entry in entries:
        weight, role = entry.parameter.detach(), entry.role
        if not _drawable(entry):
            weight.fill_(1.0 if role.kind == "gain" else 0.0)
            continue
        sample = _sample(weight, entry, seed)
        if _is_matrix(entry):
            pairs = zip(matrices(weight, role), matrices(sample, role), strict=True)
            if entry.name in stds:
                for (w, s), std in zip(pairs, stds[entry.name], strict=True):
                    w.copy_(std * s)
            else:
                views += [(w, s, gain / math.sqrt(role.positions)) for w, s in pairs]
            continue
        size = stds[entry.name][0] if entry.name in stds else gain / sample.square().mean(-1, keepdim=True).sqrt()
        weight.copy_(size * sample)
        padding = getattr(entry.module, "padding_idx", None)
        if padding is not None:
            weight[padding] = 0
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
