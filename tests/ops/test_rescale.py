"""spectral_norm_: weights set to a norm in place."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels import scaling
from tests.kernels.lists import DTYPES, LAYOUTS, kernel
from tests.matrices import EDGE_SHAPES, exact

MODES = ["normalize", "cap"]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


def tolerance(dtype: torch.dtype) -> float:
    """tol, and the rounding of every entry to the dtype: at most half an eps of each, all of one sign at worst."""
    return 1e-3 + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(30, 20), (3, 20, 30), (2, 2, 9, 4), (150, 200), (200, 150), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("target", [1.0, 0.3, 7])
def test_normalize(dtype, shape, target, backend):
    W = torch.randn(shape).to(dtype)
    before = W.clone()
    assert sk.spectral_norm_(W, target) is W
    assert W.shape == shape and W.dtype == dtype
    for w, b in zip(W.reshape(-1, *shape[-2:]), before.reshape(-1, *shape[-2:]), strict=True):
        assert exact(w) == pytest.approx(target, rel=tolerance(dtype))
        # the same direction: every entry scaled by one number, and rounded
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(w.double() / exact(w), b.double() / exact(b), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cap_touches_only_what_is_above(dtype, backend):
    W = torch.randn(4, 30, 20).to(dtype)
    W[0] *= 0.01
    W[2] *= 0.02
    before = W.clone()
    sk.spectral_norm_(W, 2.0, mode="cap")
    assert torch.equal(W[[0, 2]], before[[0, 2]])
    for w in W[[1, 3]]:
        assert exact(w) == pytest.approx(2.0, rel=tolerance(dtype))


def test_cap_keeps_what_lies_on_the_target(backend):
    W = torch.eye(6, 9) * 2
    sk.spectral_norm_(W, 2.0, mode="cap")
    assert torch.equal(W, torch.eye(6, 9) * 2)


@pytest.mark.parametrize("rule", scaling.RULES)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (2, 64, 16)])
def test_rules_of_shapes(rule, shape, backend):
    W = torch.randn(shape)
    sk.spectral_norm_(W, rule)
    m, n = shape[-2:]
    wanted = {
        "rms_to_rms": math.sqrt(m / n),
        "original": math.sqrt(max(1, m / n)),
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "none": 1.0,
    }[rule]
    for w in W.reshape(-1, m, n):
        assert exact(w) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, backend):
    W = LAYOUTS[layout](torch.randn(2, 40, 30))
    pointer, strides = W.data_ptr(), W.stride()
    assert sk.spectral_norm_(W) is W
    assert (W.data_ptr(), W.stride()) == (pointer, strides)
    assert [exact(w) for w in W] == pytest.approx([1, 1], rel=1e-3)


def test_a_view_changes_its_base_and_nothing_beside_it(backend):
    base = torch.randn(50, 60)
    before = base.clone()
    sk.spectral_norm_(base[10:40, 5:35])
    assert exact(base[10:40, 5:35]) == pytest.approx(1, rel=1e-3)
    base[10:40, 5:35] = before[10:40, 5:35]
    assert torch.equal(base, before)


def test_lists_and_stacks(backend):
    for kind in (list, tuple):
        W = kind(torch.randn(s) for s in [(30, 20), (3, 9, 7), (150, 170), (0, 5), (0, 3, 2)])
        assert sk.spectral_norm_(W, 0.5) is W
        for w in W[:3]:
            for x in w.reshape(-1, *w.shape[-2:]):
                assert exact(x) == pytest.approx(0.5, rel=1e-3)
    W = [torch.randn(30, 20), torch.randn(5, 40)]  # plain matrices only
    sk.spectral_norm_(W, "rms_to_rms")
    assert [exact(w) for w in W] == pytest.approx([math.sqrt(30 / 20), math.sqrt(5 / 40)], rel=1e-3)
    sk.spectral_norm_([W[0], W[0]])  # the same tensor twice
    assert exact(W[0]) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("shape", [s for s in EDGE_SHAPES if 0 not in s])
def test_edge_shapes(shape, backend):
    W = torch.randn(shape)
    sk.spectral_norm_(W)
    assert exact(W) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4), (2, 0, 4)])
def test_empty(shape, backend):
    W = torch.ones(shape)
    assert sk.spectral_norm_(W) is W and W.shape == shape


def test_leaves_and_parameters_track_nothing(backend):
    W = torch.nn.Parameter(torch.randn(30, 20))
    pointer = W.data_ptr()
    assert sk.spectral_norm_(W) is W
    assert W.is_leaf and W.requires_grad and W.grad is None and W.grad_fn is None and W.data_ptr() == pointer
    assert exact(W.detach()) == pytest.approx(1, rel=1e-3)
    leaf = torch.randn(2, 8, 9, requires_grad=True)
    sk.spectral_norm_([leaf, W], 2.0)
    assert leaf.is_leaf and leaf.requires_grad and exact(leaf[1].detach()) == pytest.approx(2, rel=1e-3)
    leaf.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    layer = torch.nn.Linear(20, 30)
    sk.spectral_norm_(layer.weight, "rms_to_rms")
    layer(torch.randn(3, 20)).sum().backward()
    assert layer.weight.grad is not None


def test_a_saved_tensor_notices_the_change():
    """In place as torch knows it: the version counter moves, so a stale backward raises instead of lying."""
    W = torch.nn.Parameter(torch.randn(5, 4))
    loss = (W * W).sum()
    sk.spectral_norm_(W)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_stays_zero(mode, dtype, backend):
    W = torch.randn(3, 20, 30).mul(100).to(dtype)
    W[1] = 0
    sk.spectral_norm_(W, mode=mode)
    assert not W[1].any()
    for w in W[[0, 2]]:
        assert exact(w) == pytest.approx(1, rel=tolerance(dtype))
    zero = torch.zeros(4, 5, dtype=dtype)
    assert not sk.spectral_norm_(zero, mode=mode).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_matrices_are_left_alone_and_reported(mode, dtype, backend):
    W = torch.randn(4, 30, 20).mul(50).to(dtype)
    W[1, 2, 3], W[3, 0, 0] = torch.nan, -torch.inf
    before = W.clone()
    with pytest.warns(UserWarning, match=r"_: 2 of 4 matrices of shape \(30, 20\) hold NaN or infinite") as caught:
        sk.spectral_norm_(W, mode=mode)
    assert len(caught) == 1 and caught[0].filename == __file__
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(W[[1, 3]].view(as_bits), before[[1, 3]].view(as_bits))
    for w in W[[0, 2]]:
        assert exact(w) == pytest.approx(1, rel=tolerance(dtype))


def test_one_bad_matrix_of_a_list_is_reported_alone(backend):
    W = [torch.randn(9, 5), torch.full((3, 4), torch.nan), torch.randn(2, 6, 7)]
    with pytest.warns(UserWarning, match=r"1 of 1 matrices of shape \(3, 4\)") as caught:
        sk.spectral_norm_(W)
    assert len(caught) == 1
    assert W[1].isnan().all() and exact(W[0]) == pytest.approx(1, rel=1e-3)


def test_finite_matrices_do_not_warn(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.spectral_norm_([torch.randn(9, 5), torch.zeros(3, 3), torch.randn(2, 4, 6)])


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float32, 1e-38),
        (torch.float32, 1e36),
        (torch.float64, 1e300),
        (torch.float64, 1e-300),
        (torch.bfloat16, 1e35),
        (torch.bfloat16, 1e-35),
        (torch.float16, 1e3),
    ],
)
def test_extreme_scales(dtype, size, backend):
    W = torch.rand(40, 30, dtype=torch.float64).add(0.5).mul(size).to(dtype)
    assert torch.isfinite(W).all()
    sk.spectral_norm_(W)
    assert exact(W) == pytest.approx(1, rel=tolerance(dtype))


def test_a_norm_above_the_range(backend):
    """Finite entries whose norm float32 cannot hold: they are rescaled all the same."""
    W = torch.rand(40, 30).add(0.5).mul(1e38)
    sk.spectral_norm_(W)
    assert exact(W) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("start", "target"), [(1e-30, 1e30), (1e30, 1e-30), (1e35, 1e37), (1e-36, 1e36)])
def test_extreme_ratios(start, target, backend):
    """The factor may leave the range though the result does not."""
    W = torch.rand(40, 30).add(0.5) * start
    sk.spectral_norm_(W, target)
    assert exact(W) == pytest.approx(target, rel=1e-3)


def test_subnormal_weights(backend):
    """Entries of 1e-41 keep three digits; the norm is still the target."""
    W = torch.rand(40, 30).add(0.5) * 1e-41
    sk.spectral_norm_(W)
    assert exact(W) == pytest.approx(1, rel=1e-3)


def test_a_tighter_tolerance(backend):
    W = torch.randn(100, 80, dtype=torch.float64)
    sk.spectral_norm_(W, 3.0, tol=1e-12)
    assert exact(W) == pytest.approx(3.0, rel=2e-12)


def test_autocast_and_inference_mode(backend):
    W = torch.randn(150, 140)
    plain = sk.spectral_norm_(W.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sk.spectral_norm_(W.clone()), plain)
    with torch.inference_mode():
        assert torch.equal(sk.spectral_norm_(W.clone()), plain)


def test_the_same_bits_alone_and_in_a_list():
    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    W = [torch.randn(60, 50), torch.randn(150, 170), torch.randn(60, 50)]
    alone = [sk.spectral_norm_(w.clone()) for w in W]
    torch.set_num_threads(2)
    for a, b in zip(alone, sk.spectral_norm_([w.clone() for w in W]), strict=True):
        assert torch.equal(a, b)
