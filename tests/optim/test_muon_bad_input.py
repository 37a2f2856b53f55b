"""Gradients that sk.optim.Muon must refuse or survive; a step that raises leaves everything as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spectral_kernels.optim import Muon, SpectralOptimizer
from tests.optim.polar import distance, polar
from tests.optim.test_bad_input import fresh_gradients, spoil
from tests.optim.test_spectral import parameter
from tests.optim.textbook import same, snapshot

PLACES = [  # shape, group options, one bad entry, matrices
    ((9, 6), {}, (2, 3), 1),
    ((6, 9), {"nesterov": False}, (5, 8), 1),
    ((3, 6, 4), {}, (1, 2, 2), 3),
    ((6, 4, 3, 3), {}, (5, 3, 1, 2), 1),
    ((6, 4, 3, 3), {"flatten": False}, (0, 0, 0, 0), 9),
    ((12, 5), {"num_heads": 3}, (4, 4), 3),
    ((12, 5), {"split_sizes": [3, 9], "momentum_kind": "heavy_ball"}, (11, 0), 2),
]
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize(("shape", "group", "place", "matrices"), PLACES, ids=str)
def test_a_gradient_that_is_not_finite_is_skipped(shape, group, place, matrices, first):
    """The whole parameter stays bit for bit, its neighbour moves, finite entries enter the buffer."""
    for value in BAD[: 1 if first else 3]:
        p, other = parameter(*shape), parameter(*shape)
        opt = Muon([{"params": [p, other], **group}], lr=0.1)
        for _ in range(0 if first else 2):
            fresh_gradients(p, other)
            opt.step()
        done = int(opt.orthogonalized)
        assert done == (0 if first else 4 * matrices)
        fresh_gradients(p, other)
        spoil(p, place, value)
        before, neighbour = p.detach().clone(), other.detach().clone()
        M = 0 if first else opt.state[p]["momentum_buffer"].clone()
        opt.step()
        assert same(p.detach(), before) and not torch.equal(other.detach(), neighbour)
        assert int(opt.skipped) == 1 and int(opt.orthogonalized) == done + matrices
        G = torch.where(torch.isfinite(p.grad), p.grad, 0)
        buffer = opt.state[p]["momentum_buffer"]
        if buffer.shape == G.shape:
            gain = 1.0 if group.get("momentum_kind") == "heavy_ball" else 0.05
            torch.testing.assert_close(buffer, 0.95 * M + gain * G)
        assert bool(torch.isfinite(buffer).all())
        fresh_gradients(p)
        other.grad = None
        opt.step()
        assert not torch.equal(p.detach(), before) and int(opt.skipped) == 1
        assert bool(torch.isfinite(p).all())


@pytest.mark.parametrize(("shape", "group", "place", "matrices"), PLACES, ids=str)
def test_strict_keeps_the_buffer_too(shape, group, place, matrices):
    p, other = parameter(*shape), parameter(*shape)
    opt = Muon([{"params": [p, other], **group}], nonfinite="strict")
    opt.step()
    fresh_gradients(p, other)
    spoil(p, place, math.inf)
    before, M, neighbour = p.detach().clone(), opt.state[p]["momentum_buffer"].clone(), other.detach().clone()
    opt.step()
    assert same(p.detach(), before) and same(M, opt.state[p]["momentum_buffer"])
    assert not torch.equal(other.detach(), neighbour) and int(opt.skipped) == 1
    assert int(opt.orthogonalized) == 3 * matrices


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("nesterov", [True, False])
def test_propagate_does_what_torch_does(value, nesterov):
    p, other = parameter(9, 6), parameter(9, 6)
    q = nn.Parameter(p.detach().clone())
    opt = Muon([p, other], nonfinite="propagate", nesterov=nesterov)
    theirs = torch.optim.Muon([q], nesterov=nesterov)
    spoil(p, (3, 2), value)
    q.grad = p.grad.clone()
    opt.step()
    theirs.step()
    assert bool(p.isnan().all()) and bool(q.isnan().all()) and bool(torch.isfinite(other).all())
    M, N = opt.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
    torch.testing.assert_close(M, N, equal_nan=True)
    assert int(opt.orthogonalized) == 1 and int(opt.skipped) == 0


@pytest.mark.parametrize("bad", ["matrix", "vector", "both"])
def test_error_if_nonfinite_names_parameters_before_anything_changes(bad):
    w, v, b = parameter(9, 6), parameter(6, 9), parameter(9)
    groups = [{"params": [("w", w), ("v", v)]}, {"params": [("b", b)], "algorithm": "adamw"}]
    opt = Muon(groups, error_if_nonfinite=True)
    opt.step()
    fresh_gradients(w, v, b)
    if bad != "vector":
        spoil(v, (0, 0), math.inf)
    if bad != "matrix":
        spoil(b, (4,), math.nan)
    before = snapshot(opt)
    named = "v" if bad == "matrix" else "b"
    with pytest.raises(RuntimeError, match=f"non-finite gradients of {named}; nothing was changed"):
        opt.step()
    assert same(before, snapshot(opt))


def test_a_group_for_adamw_stays_as_a_whole():
    """One of its gradients is not finite: none of the group moves, state and step count included."""
    w, a, b, c = parameter(9, 6), parameter(9), parameter(3, 2), parameter(4)
    adamw = {"algorithm": "adamw", "lr": 0.1}
    opt = Muon([{"params": [w]}, {"params": [a, b], **adamw}, {"params": [c], **adamw}])
    opt.step()
    fresh_gradients(w, a, b, c)
    spoil(a, (2,), math.nan)
    before = [x.detach().clone() for x in (a, b, w, c)]
    states = [{key: x.clone() for key, x in opt.state[p].items()} for p in (a, b)]
    opt.step()
    assert same(before[:2], [a.detach(), b.detach()])
    assert same(states, [dict(opt.state[p]) for p in (a, b)]) and float(opt.state[a]["step"]) == 1
    assert int(opt.skipped) == 2 and float(opt.state[c]["step"]) == 2
    assert not torch.equal(w.detach(), before[2]) and not torch.equal(c.detach(), before[3])
    opt.param_groups[1]["nonfinite"] = "propagate"
    opt.step()
    assert int(a.isnan().sum()) == 1 and bool(torch.isfinite(b).all()) and int(opt.skipped) == 2


def test_a_momentum_that_overflows_is_skipped():
    p = parameter(6, 5, dtype=torch.float32)
    opt = Muon([p], momentum_kind="heavy_ball", momentum=0.99, nesterov=False)
    p.grad.fill_(3e38)
    opt.step()
    before = p.detach().clone()
    opt.step()
    assert same(p.detach(), before) and int(opt.skipped) == 1
    assert bool(torch.isfinite(opt.state[p]["momentum_buffer"]).all())


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"method": "gram"}, {"normalizer": "schatten4"}], ids=str)
def test_zero_gradients_move_nothing_but_the_decay(options):
    params = [parameter(9, 6), parameter(3, 6, 4), parameter(5)]
    opt = Muon([{"params": params[:2], **options}, {"params": params[2:], "algorithm": "adamw"}], lr=0.1)
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        opt.step()
    for p, old in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach(), old * 0.99**2)
    assert int(opt.orthogonalized) == int(opt.skipped) == 0
    params[1].grad[1, 0, 0] = 1.0  # one matrix of three
    opt.step()
    assert int(opt.orthogonalized) == 1
    torch.testing.assert_close(params[1].detach()[::2], start[1][::2] * 0.99**3)


def test_a_first_nonfinite_gradient_leaves_an_optimizer_that_goes_on():
    p = parameter(9, 6)
    opt = Muon([p], lr=0.1, weight_decay=0.0, adjust_lr_fn="none")
    before, p.grad = p.detach().clone(), torch.full((9, 6), math.nan, dtype=torch.float64)
    opt.step()
    assert same(before, p.detach()) and float(opt.state[p]["momentum_buffer"].abs().max()) == 0
    p.grad = torch.randn(9, 6, dtype=torch.float64)
    opt.step()
    assert distance((before - p.detach()) / 0.1, polar(p.grad)) <= 1e-10


def refused_gradients():
    p = nn.Parameter(torch.rand(4, 3, dtype=torch.complex64))
    p.grad = torch.rand_like(p)
    yield "complex", p
    p = nn.Parameter(torch.rand(4, 3))
    p.grad = torch.rand(4, 3).to_sparse()
    yield "sparse", p
    p = torch.ones(4, 3, dtype=torch.int32)
    p.grad = torch.ones(4, 3, dtype=torch.int32)
    yield "int32", p


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize(("name", "bad"), list(refused_gradients()), ids=lambda x: x if isinstance(x, str) else "")
def test_complex_sparse_and_integer_are_refused_by_name_and_change_nothing(name, bad, algorithm):
    good = parameter(4, 3)
    before = good.detach().clone()
    opt = Muon([{"params": [good]}, {"params": [bad], "algorithm": algorithm}])
    with pytest.raises(RuntimeError, match=rf"Muon .*{name}"):
        opt.step()
    assert same(before, good.detach()) and len(opt.state) == 0


@pytest.mark.parametrize("cls", [Muon, SpectralOptimizer])
def test_a_changed_option_is_checked_before_anything_moves(cls):
    p, q = parameter(8, 6), parameter(6, 8)
    options = {} if cls is Muon else {"direction": "orthogonalize"}
    opt = cls([{"params": [q]}, {"params": [p]}], **options)
    opt.step()
    for changed in ({"schedule": "cans_5"}, {"num_heads": 3}, {"nonfinite": "never", "num_heads": 2}):
        before = snapshot(opt)
        kept = dict(opt.param_groups[1])
        opt.param_groups[1].update(changed)
        with pytest.raises(ValueError, match="not safe|num_heads=3|nonfinite"):
            opt.step()
        assert same(before, snapshot(opt))
        opt.param_groups[1].update(kept)
