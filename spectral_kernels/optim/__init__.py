"""Optimizers that obey Condition 1, and parameter groups that make any optimizer obey it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .description import Description as Description
    from .groups import ParamGroups as ParamGroups
    from .groups import describe as describe
    from .groups import muon_groups as muon_groups
    from .groups import param_groups as param_groups
    from .muon import Muon as Muon
    from .spectral import SpectralOptimizer as SpectralOptimizer

_PUBLIC = {
    "SpectralOptimizer": ".spectral",
    "Muon": ".muon",
    "muon_groups": ".groups",
    "param_groups": ".groups",
    "ParamGroups": ".groups",
    "describe": ".groups",
    "Description": ".description",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
