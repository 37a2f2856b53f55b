"""Rules of shapes, against their definitions and against what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_kernels import scaling

SHAPES = [(1, 1), (30, 20), (20, 30), (4096, 1024), (1024, 4096), (1, 1000)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_definitions(m, n):
    assert scaling.rms_to_rms(m, n) == pytest.approx(math.sqrt(m / n))
    assert scaling.original(m, n) == pytest.approx(math.sqrt(max(1, m / n)))
    assert scaling.match_rms_adamw(m, n) == pytest.approx(0.2 * math.sqrt(max(m, n)))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_target_by_name_or_number(m, n):
    values = {rule: scaling.target(rule, m, n) for rule in scaling.RULES}
    assert values == {
        "rms_to_rms": scaling.rms_to_rms(m, n),
        "original": scaling.original(m, n),
        "match_rms_adamw": scaling.match_rms_adamw(m, n),
        "none": 1.0,
    }
    assert scaling.target(3, m, n) == 3.0 and isinstance(scaling.target(3, m, n), float)


@pytest.mark.parametrize("rule", ["", "rms", "Original"])
def test_unknown_rules(rule):
    with pytest.raises(ValueError, match="unknown rule .*rms_to_rms, original, match_rms_adamw, none"):
        scaling.target(rule, 3, 4)


def test_rms_to_rms_keeps_sizes():
    """Condition 1: an operator of this norm takes entries of RMS 1 to entries of RMS at most 1, and reaches it."""
    for m, n in ((64, 32), (32, 64)):
        W = torch.linalg.qr(torch.randn(max(m, n), min(m, n), dtype=torch.float64)).Q
        W = (W if m >= n else W.mT) * scaling.rms_to_rms(m, n)
        x = torch.linalg.svd(W).Vh[0] * math.sqrt(n)
        assert float((W @ x).square().mean().sqrt()) == pytest.approx(1)


def test_match_rms_adamw_is_an_rms_of_a_fifth():
    """An orthogonal matrix times this factor has entries of RMS 0.2."""
    m, n = 96, 40
    Q = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q
    assert float((Q * scaling.match_rms_adamw(m, n)).square().mean().sqrt()) == pytest.approx(0.2)
