"""Does a network obey the spectral condition? Monitors and reports of one run, checks across widths."""

from __future__ import annotations

from .coordinates import CoordinateCheck, coordinate_check
from .hooks import LayerTerms, Watch, final_layer_alignment, watch
from .measures import (
    activation_ratio,
    alignment,
    contributions,
    feature_change,
    feature_sum_ratio,
    relative_change,
    slope,
    stable_rank,
    sum_ratio,
)
from .monitor import STEP, WEIGHT, SpectralMonitor
from .report import SpectralReport, spectral_report
from .transfer import LrTransfer, lr_transfer

__all__ = [
    "STEP",
    "WEIGHT",
    "CoordinateCheck",
    "LayerTerms",
    "LrTransfer",
    "SpectralMonitor",
    "SpectralReport",
    "Watch",
    "activation_ratio",
    "alignment",
    "contributions",
    "coordinate_check",
    "feature_change",
    "feature_sum_ratio",
    "final_layer_alignment",
    "lr_transfer",
    "relative_change",
    "slope",
    "spectral_report",
    "stable_rank",
    "sum_ratio",
    "watch",
]
