"""The measures against their definitions in float64, and on cases whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spectral_kernels.diagnostics import measures

TOL = 2.5e-4  # two norms of a relative 1e-4 each, and rounding


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm2(A: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(A.double(), 2))


def test_one_input_gives_rank_one_and_alignment_one():
    g, h = normal(3, 1, 50), normal(3, 1, 70, seed=1)
    dW = g.mT @ h
    assert torch.allclose(measures.stable_rank(dW), torch.ones(3), atol=1e-5)
    assert torch.allclose(measures.alignment(dW, h), torch.ones(3), atol=1e-5)
    assert torch.allclose(measures.contributions(g, h), torch.ones(3), atol=1e-5)
    assert torch.allclose(measures.alignment(1e-35 * dW, h), torch.ones(3), atol=1e-3)  # tiny updates too


def test_values_are_the_definitions():
    g, h, h0 = normal(2, 9, 20), normal(2, 9, 30, seed=1), normal(2, 9, 30, seed=2)
    A, B = normal(2, 20, 30, seed=3), normal(2, 20, 30, seed=4)
    for i in range(2):
        per_input = [float((A[i] @ x).norm()) / (norm2(A[i]) * float(x.norm())) for x in h[i]]
        assert float(measures.alignment(A, h)[i]) == pytest.approx(np.mean(per_input), rel=TOL)
        changes = [float((a - b).norm() / b.norm()) for a, b in zip(h[i], h0[i], strict=True)]
        assert float(measures.feature_change(h, h0)[i]) == pytest.approx(np.mean(changes), rel=1e-5)
        sums = [float((a + b).norm() / (a.norm() + b.norm())) for a, b in zip(h[i], h0[i], strict=True)]
        assert float(measures.feature_sum_ratio(h, h0)[i]) == pytest.approx(np.mean(sums), rel=1e-5)
        activated = [float(x.relu().norm() / x.norm()) for x in h[i]]
        assert float(measures.activation_ratio(h.relu(), h)[i]) == pytest.approx(np.mean(activated), rel=1e-5)
        ratio = norm2(A[i] - B[i]) / norm2(B[i])
        assert float(measures.relative_change(A, B)[i]) == pytest.approx(ratio, rel=TOL)
        ratio = float((A[i] - B[i]).norm() / B[i].norm())
        assert float(measures.relative_change(A, B, "frobenius")[i]) == pytest.approx(ratio, rel=1e-5)
        ratio = norm2(A[i] + B[i]) / (norm2(A[i]) + norm2(B[i]))
        assert float(measures.sum_ratio(A, B)[i]) == pytest.approx(ratio, rel=TOL)
        assert float(measures.stable_rank(A)[i]) == pytest.approx((float(A[i].norm()) / norm2(A[i])) ** 2, rel=TOL)
        single = [torch.outer(a, b) for a, b in zip(g[i], h[i], strict=True)]
        whole = sum(single)
        shares = sorted(float((w @ x).norm() / (whole @ x).norm()) for w, x in zip(single, h[i], strict=True))
        assert float(measures.contributions(g, h)[i]) == pytest.approx(shares[4], rel=1e-4)
    wide, tall = measures.contributions(normal(4, 5), normal(4, 3)), measures.contributions(normal(4, 5), normal(4, 7))
    assert wide > 0 and tall > 0  # both orders of the product


def test_opposite_and_equal_changes():
    A = normal(6, 5)
    assert float(measures.sum_ratio(A, -A)) == 0 and float(measures.sum_ratio(A, A)) == pytest.approx(1, rel=TOL)
    assert float(measures.feature_sum_ratio(A, -A)) == 0
    assert float(measures.activation_ratio(A, A)) == pytest.approx(1)


def test_zero_inputs_are_left_out_and_nothing_is_nan():
    A, h = normal(4, 6), normal(5, 6)
    zeros = torch.cat([h, torch.zeros(3, 6)])
    assert float(measures.alignment(A, zeros)) == pytest.approx(float(measures.alignment(A, h)), rel=1e-6)
    assert float(measures.feature_change(2 * zeros, zeros)) == pytest.approx(1)
    assert math.isnan(measures.alignment(A, torch.zeros(2, 6))) and math.isnan(measures.alignment(0 * A, h))
    bad = h.clone()
    bad[0, 0] = math.nan
    assert math.isnan(measures.alignment(A, bad))
    assert float(measures.stable_rank(0 * A)) == 0


@pytest.mark.parametrize(("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes_and_no_gradient(dtype, result):
    A, h = normal(4, 6).to(dtype).requires_grad_(), normal(5, 6).to(dtype)
    found = measures.alignment(A, h)
    exact = measures.alignment(A.detach().double(), h.double())
    assert found.dtype == result and not found.requires_grad
    assert float(found) == pytest.approx(float(exact), rel=TOL)


def test_slope_is_the_fit_and_its_standard_error():
    x = [16, 32, 64, 128, 256]
    assert measures.slope(x, [3 * v**-0.5 for v in x]) == pytest.approx((-0.5, 0), abs=1e-7)
    y = [1.0, 1.9, 4.4, 7.0, 17.0]
    design = np.stack([np.log(x), np.ones(5)], 1)
    fit, left, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    error = math.sqrt(left[0] / 3 * np.linalg.inv(design.T @ design)[0, 0])
    assert measures.slope(x, y) == pytest.approx((fit[0], error), rel=1e-9)
    two = measures.slope([1, 2], torch.tensor([1.0, 4.0]))
    assert two.slope == pytest.approx(2) and math.isnan(two.error)
    for bad in (0.0, -1.0, math.inf, math.nan):
        assert math.isnan(measures.slope([1, 2, 3], [1.0, bad, 1.0]).slope)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        ([1, 2], [1.0], "one length"),
        ([2, 2], [1.0, 1.0], "two of them different"),
        ([0, 2], [1.0, 1.0], "positive"),
        ([[1, 2]], [[1.0, 2.0]], "one length"),
    ],
)
def test_slope_refuses(x, y, match):
    with pytest.raises(ValueError, match=match):
        measures.slope(x, y)


def test_bad_arguments():
    with pytest.raises(TypeError, match="A must be a torch.Tensor"):
        measures.alignment([[1.0]], torch.ones(1, 1))
    with pytest.raises(ValueError, match="h must have at least 2"):
        measures.alignment(torch.ones(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="norm must be one of 'spectral', 'frobenius'"):
        measures.relative_change(torch.ones(2, 2), torch.ones(2, 2), "nuclear")
    with pytest.raises(ValueError, match="same inputs, not 2 and 3"):
        measures.contributions(torch.ones(2, 2), torch.ones(3, 2))
