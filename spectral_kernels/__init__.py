"""Spectral norms cheap enough to use at every training step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from . import optim as optim
    from . import parametrizations as parametrizations
    from . import scaling as scaling
    from .explanation import explain as explain
    from .initialization import init_model_ as init_model_
    from .initialization import spectral_init_ as spectral_init_
    from .kernels.registry import BackendUnavailable as BackendUnavailable
    from .kernels.registry import force as force
    from .ops import schedules as schedules
    from .ops.bounds import SpectralBounds as SpectralBounds
    from .ops.bounds import spectral_bounds as spectral_bounds
    from .ops.clip import spectral_clip as spectral_clip
    from .ops.norm import AccuracyWarning as AccuracyWarning
    from .ops.norm import spectral_norm as spectral_norm
    from .ops.orthogonalize import OrthogonalizeInfo as OrthogonalizeInfo
    from .ops.orthogonalize import orthogonalize as orthogonalize
    from .ops.rescale import spectral_norm_ as spectral_norm_
    from .ops.step import spectral_step_ as spectral_step_
    from .ops.subspace import LeadingSubspace as LeadingSubspace
    from .ops.subspace import SingularTriplet as SingularTriplet
    from .ops.subspace import leading_subspace as leading_subspace
    from .ops.subspace import singular_triplet as singular_triplet
    from .ops.subspace import stable_rank as stable_rank

_PUBLIC = {
    "spectral_norm": ".ops.norm",
    "AccuracyWarning": ".ops.norm",
    "singular_triplet": ".ops.subspace",
    "SingularTriplet": ".ops.subspace",
    "leading_subspace": ".ops.subspace",
    "LeadingSubspace": ".ops.subspace",
    "stable_rank": ".ops.subspace",
    "spectral_bounds": ".ops.bounds",
    "SpectralBounds": ".ops.bounds",
    "spectral_clip": ".ops.clip",
    "orthogonalize": ".ops.orthogonalize",
    "OrthogonalizeInfo": ".ops.orthogonalize",
    "spectral_norm_": ".ops.rescale",
    "spectral_step_": ".ops.step",
    "init_model_": ".initialization",
    "spectral_init_": ".initialization",
    "explain": ".explanation",
    "force": ".kernels.registry",
    "BackendUnavailable": ".kernels.registry",
}
_SUBMODULES = {
    "diagnostics": ".diagnostics",
    "integrations": ".integrations",
    "optim": ".optim",
    "parametrizations": ".parametrizations",
    "scaling": ".scaling",
    "schedules": ".ops.schedules",
}
__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: `import spectral_kernels` does no work."""
    if name in _PUBLIC:
        value = getattr(import_module(_PUBLIC[name], __name__), name)
    elif name in _SUBMODULES:
        value = import_module(_SUBMODULES[name], __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
