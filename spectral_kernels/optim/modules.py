"""Roles of a model's parameters, read from the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .roles import BY_SHAPE, OPTIONS, Role, role_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)

Overrides = Mapping[str, Mapping[str, Any]]
Options = dict[str, Any]


@dataclass(frozen=True)
class Named:
    """A parameter under its first name, with the module that decided its role.

    known: a module of torch (or transformers.Conv1D) that says what it is, not a name or a shape.
    derived: the weight that is used is computed from it (torch.nn.utils.parametrize, weight_norm, pruning).
    """

    name: str
    parameter: nn.Parameter
    role: Role
    module: nn.Module
    known: bool
    derived: bool


def named_roles(model: nn.Module, overrides: Overrides | None = None) -> list[Named]:
    """Every parameter once, in the order and under the names of model.named_parameters().

    A parameter of several modules takes the first role that a known module other than an embedding gives it, else that
    of an embedding, else its shape: a readout tied to an embedding is a matrix, whose rate is the smaller one.
    overrides: name pattern (fnmatch) -> options of role_of, later patterns over earlier ones.
    """
    found: dict[int, list[Named]] = {}
    for entry in _uses(model):
        found.setdefault(id(entry.parameter), []).append(entry)
    out = [_override(_decide(uses), overrides or {}) for uses in found.values()]
    for pattern in overrides or {}:
        if not any(fnmatchcase(entry.name, pattern) for entry in out):
            raise ValueError(f"overrides: {pattern!r} matches no parameter")
    return out


def _uses(model: nn.Module) -> Iterator[Named]:
    owners: dict[int, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for tensor, inner in module.parametrizations.items():  # type: ignore[union-attr,operator]
                owners[id(inner)] = module, tensor
        owner, tensor = owners.get(id(module), (module, None))
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if is_lazy(parameter):
                raise ValueError(f"{full} is not initialized yet: run one forward pass of the model before this call")
            known, derived = True, tensor is not None
            if tensor is not None:
                options = _parametrized(module, owner, tensor, name)
            else:
                options = _known(module, name, parameter)
                base, _, suffix = name.rpartition("_")
                if options is None and suffix in ("orig", "v", "g") and _known(module, base, parameter) is not None:
                    derived = True  # torch.nn.utils.spectral_norm, prune and weight_norm
                    options = {"kind": "gain"} if suffix == "g" else _known(module, base, parameter)
            why = parametrize.type_before_parametrizations(owner).__name__
            if derived:
                why += f", parametrized {tensor or name.rpartition('_')[0]}"
            if options is None:
                known = False
                options = _by_name(module, name, parameter)
                why = BY_SHAPE if options is None else f"{why}, by name"
            try:
                role = role_of(parameter, **(options or {}), why=why)
            except ValueError as error:
                if known:
                    raise ValueError(f"{full}: {error}") from None
                role = Role("skip", 0, 0, why="no kind by shape")
            yield Named(full, parameter, role, owner, known, derived)


def _decide(uses: list[Named]) -> Named:
    def rank(use: Named) -> int:
        return 2 if not use.known else 1 if use.role.kind == "embedding" else 0

    chosen = min(uses, key=rank)  # the first of its rank
    others = list(dict.fromkeys(use.role.why for use in uses if use.role.why != chosen.role.why))
    why = f"{chosen.role.why}, tied with {', '.join(others)}" if others else chosen.role.why
    return replace(chosen, name=uses[0].name, role=replace(chosen.role, why=why))


def _override(entry: Named, overrides: Overrides) -> Named:
    given: Options = {}
    for pattern, options in overrides.items():
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise ValueError(f"overrides: unknown option {min(unknown)!r}: expected some of {', '.join(OPTIONS)}")
        if fnmatchcase(entry.name, pattern):
            given |= options
    role = entry.role
    if not given:
        return entry
    inferred: Options = {}
    if given.get("kind", role.kind) == role.kind:
        inferred = {"kind": role.kind, "transposed": role.transposed, "groups": role.groups}
        if not {"num_heads", "split_sizes"} & set(given) and role.blocks:
            inferred["split_sizes"] = role.blocks
    try:
        why = f"{role.why}, override" if inferred and entry.known else "override"
        changed = role_of(entry.parameter, **inferred | given, why=why)
    except ValueError as error:
        raise ValueError(f"overrides: {entry.name}: {error}") from None
    return replace(entry, role=changed, known=True)


def _known(module: nn.Module, name: str, p: nn.Parameter) -> Options | None:
    """role_of's options for a parameter of a module of torch, None where it is not one of its own."""
    if isinstance(module, _EMBEDDINGS):
        return {"kind": "embedding"} if name == "weight" else None
    if isinstance(module, _NORMS):
        return {"weight": {"kind": "gain"}, "bias": {"kind": "vector"}}.get(name)
    if isinstance(module, nn.PReLU):
        return {"kind": "gain"} if name == "weight" else None
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, name)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _recurrent(module, name, p)
    if name == "bias" and isinstance(module, (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *_TRANSPOSED)):
        return {"kind": "vector"}
    if name == "weight":
        if isinstance(module, nn.Linear):
            return {"kind": "matrix"}
        if isinstance(module, nn.Bilinear):
            # (out, in1, in2): matrices (out, in1) weighed by the entries of x2, as kernel positions are by pixels
            return {"kind": "conv"}
        if isinstance(module, _CONVOLUTIONS):
            return {"kind": "conv", "groups": module.groups}
        if isinstance(module, _TRANSPOSED):
            return {"kind": "conv", "groups": module.groups, "transposed": True}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers: x W + b, W (in, out)
        options: dict[str, Options] = {"weight": {"kind": "matrix", "transposed": True}, "bias": {"kind": "vector"}}
        return options.get(name)
    return None


def _attention(module: nn.MultiheadAttention, name: str) -> Options | None:
    if name in ("in_proj_weight", "in_proj_bias"):
        kind = "matrix" if name == "in_proj_weight" else "vector"
        return {"kind": kind, "split_sizes": (module.embed_dim,) * 3}
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return {"kind": "matrix"}
    return {"kind": "vector"} if name in ("bias_k", "bias_v") else None


def _recurrent(module: nn.RNNBase | nn.RNNCellBase, name: str, p: nn.Parameter) -> Options | None:
    """Gates are stacked along the rows of weight_ih*, weight_hh*, bias_*; weight_hr* projects."""
    if name.startswith("weight_hr"):
        return {"kind": "matrix"}
    if not name.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        return None
    gates = p.shape[0] // module.hidden_size
    options: Options = {"kind": "matrix" if name.startswith("weight") else "vector"}
    return options | {"split_sizes": (module.hidden_size,) * gates} if gates > 1 else options


def _parametrized(inner: nn.Module, owner: nn.Module, tensor: str, name: str) -> Options | None:
    """`original` stands for the tensor; of weight_norm's pair, original0 is the length of rows, original1 the rest."""
    weight_norm = isinstance(inner, parametrize.ParametrizationList) and type(inner[0]).__name__ == "_WeightNorm"
    if weight_norm and name == "original0":
        return {"kind": "gain"}
    if name == "original" or (weight_norm and name == "original1"):
        return _known(owner, tensor, getattr(inner, name))
    return None


def _by_name(module: nn.Module, name: str, p: nn.Parameter) -> Options | None:
    """Norms outside torch (LlamaRMSNorm and the like)."""
    if "norm" in type(module).__name__.lower() and p.ndim == 1 and name in ("weight", "scale", "gamma"):
        return {"kind": "gain"}
    return None
