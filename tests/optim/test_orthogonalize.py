"""direction="orthogonalize" of SpectralOptimizer and spectral_step_, against exact SVD; docs/optimizer.md."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import spectral_kernels as sk
from spectral_kernels import scaling
from spectral_kernels.kernels.contracts import INFO
from spectral_kernels.optim import Muon, SpectralOptimizer, param_groups
from tests.optim.polar import KELLER, distance, polar, triples
from tests.optim.test_spectral import parameter, spectral
from tests.optim.test_state import saved
from tests.optim.textbook import batches, convolutional, mlp, same, snapshot, train

EXPRESS = triples("polar_express")


def express(X, steps=EXPRESS):
    """What sk.orthogonalize does by default: normalized by the Schatten-4 norm."""
    return polar(X, steps, 4)


@pytest.mark.parametrize("rule", ["rms_to_rms", "original", "match_rms_adamw", "none", 0.3])
@pytest.mark.parametrize("nesterov", [False, True])
def test_matrices(rule, nesterov):
    for shape in ((30, 20), (20, 30), (24, 24), (3, 12, 20), (1, 9), (9, 1)):
        p = parameter(*shape)
        opt = SpectralOptimizer([p], lr=0.1, weight_decay=0.5, rule=rule, direction="orthogonalize", nesterov=nesterov)
        M = torch.zeros_like(p)
        for _ in range(3):
            before, p.grad = p.detach().clone(), torch.randn_like(p)
            M = 0.95 * M + p.grad
            opt.step()
            X = 0.95 * M + p.grad if nesterov else M
            wanted = before * 0.95 - 0.1 * scaling.target(rule, *shape[-2:]) * express(X)
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_position_by_position(groups):
    p = parameter(12, 6, 3, 2)
    before = p.detach().clone()
    SpectralOptimizer([{"params": [p], "groups": groups}], lr=0.1, direction="orthogonalize").step()
    slices = p.grad.unflatten(0, (groups, -1)).movedim((3, 4), (0, 1))
    step = (12 / groups / 6) ** 0.5 / 6 * express(slices)
    torch.testing.assert_close(before - p.detach(), 0.1 * step.movedim((0, 1), (3, 4)).reshape(p.shape))


@pytest.mark.parametrize("options", [{"num_heads": 4}, {"split_sizes": [12, 8, 4]}], ids=str)
def test_heads(options):
    G = torch.randn(24, 10, dtype=torch.float64)
    W, _ = sk.spectral_step_(torch.zeros_like(G), G, 0.1, direction="orthogonalize", return_info=True, **options)
    rows = options.get("split_sizes", [6] * 4)
    for part, g in zip(W.split(rows), G.split(rows), strict=True):
        torch.testing.assert_close(part, -0.1 * (g.shape[0] / 10) ** 0.5 * express(g))


def test_transposed_weights():
    p = parameter(10, 24)
    before = p.detach().clone()
    SpectralOptimizer([{"params": [p], "transposed": True}], lr=0.1, direction="orthogonalize").step()
    torch.testing.assert_close(before - p.detach(), 0.1 * (24 / 10) ** 0.5 * express(p.grad))


SCHEDULES = [
    (None, EXPRESS),
    ("keller_quintic", KELLER),
    (KELLER[:3], KELLER[:3]),
    ([[2.0, -1.5, 0.5]] * 8, ((2.0, -1.5, 0.5),) * 8),
    (sk.schedules.schedule("cubic5"), triples("cubic5")),
    (one := sk.schedules.polar_express(lower=0.02, steps=4, safety=1.02), tuple(one.steps)),
]


@pytest.mark.parametrize(("schedule", "steps"), SCHEDULES, ids=lambda x: x if isinstance(x, str) else "")
def test_schedules(schedule, steps):
    p, W, state = parameter(20, 30), torch.zeros(20, 30, dtype=torch.float64), {}
    start = p.detach().clone()
    opt = SpectralOptimizer([p], lr=0.1, direction="orthogonalize", schedule=schedule, rule="none")
    opt.step()
    sk.spectral_step_(W, p.grad, 0.1, direction="orthogonalize", schedule=schedule, rule="none", state=state)
    torch.testing.assert_close((start - p.detach()) / 0.1, express(p.grad, steps))
    torch.testing.assert_close(-W / 0.1, express(p.grad, steps))
    assert {"step", "momentum_buffer", "tracker"} == set(state)
    loaded = SpectralOptimizer([q := nn.Parameter(p.detach().clone())], lr=0.1, direction="orthogonalize",
                               schedule=schedule, rule="none")  # fmt: skip
    loaded.load_state_dict(saved(opt.state_dict()))
    q.grad = p.grad = torch.randn_like(p)
    opt.step()
    loaded.step()
    assert same(p.detach(), q.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"direction": "normalize", "schedule": "cubic"},
            "schedule goes with direction='orthogonalize', not with 'norm",
        ),
        ({"direction": "clip", "rank": 2, "schedule": "cubic"}, "not with 'clip'"),
        ({"direction": "frobenius", "schedule": KELLER}, "not with 'frobenius'"),
        ({"direction": "orthogonalize", "schedule": "newton"}, "polar_express.*not 'newton'"),
        ({"direction": "orthogonalize", "schedule": "aol_4_old"}, "not safe"),
        ({"direction": "orthogonalize", "schedule": ((4.0, -4.0, 3.0),)}, "not safe"),
        ({"direction": "orthogonalize", "rank": 2}, "rank=2 goes with direction='clip'"),
        ({"direction": "orthogonalize", "threshold": 2.0}, "threshold=2.0 goes with direction='clip'"),
        ({"direction": "orthogonalize", "safety": "upper"}, "safety='upper' goes with direction='normalize'"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options, message):
    p = parameter(6, 5)
    with pytest.raises(ValueError, match=message):
        SpectralOptimizer([p], **options)
    W = torch.zeros(6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        sk.spectral_step_(W, p.grad, 0.1, **options)
    assert not W.any()


def test_a_list_in_one_call_and_scales():
    """Entries of 1e-30 and 1e30 give the step of entries of 1: the scale of a matrix is found and kept."""
    shapes = ((20, 30), (30, 20), (2, 8, 8))
    G = [torch.randn(s) for s in shapes]
    steps = []
    for scale in (1.0, 1e-30, 1e30):
        W, states = [torch.zeros(s) for s in shapes], [{} for _ in shapes]
        for _ in range(3):
            sk.spectral_step_(W, [g * scale for g in G], 0.1, direction="orthogonalize", rule="none", state=states)
        steps.append(W)
        for w, g in zip(W, G, strict=True):
            assert distance(-w / 0.3, express(g)) <= 1e-4
    for other in steps[1:]:
        torch.testing.assert_close(steps[0], other, rtol=1e-3, atol=1e-5)


def test_vectors_gains_and_embeddings_are_as_ever():
    shapes = {(9,): {}, (): {}, (6,): {"kind": "gain"}, (9, 4): {"kind": "embedding"}, (7, 3): {"kind": "skip"}}
    found = []
    for direction in ("normalize", "orthogonalize"):
        torch.manual_seed(0)
        params = [parameter(*s) for s in shapes]
        groups = [{"params": [p], **g} for p, g in zip(params, shapes.values(), strict=True)]
        opt = SpectralOptimizer(groups, lr=0.1, weight_decay=0.1, direction=direction)
        for _ in range(3):
            opt.step()
        found.append(snapshot(opt))
    assert same(*found)


def test_what_the_last_step_knows():
    p, q, b = parameter(12, 9), parameter(2, 6, 8), parameter(5)
    opt = SpectralOptimizer([p, q, b], lr=0.1, rule="match_rms_adamw", direction="orthogonalize")
    opt.step()
    found = dict(opt.last_step())
    for x, (m, n) in ((p, (12, 9)), (q, (6, 8))):
        values = torch.linalg.svdvals(x.grad).reshape(-1, min(m, n))
        info = found[x]
        torch.testing.assert_close(info.sigma, torch.linalg.vector_norm(values, 4, dim=1))
        torch.testing.assert_close(info.frob, torch.linalg.vector_norm(values, dim=1))
        torch.testing.assert_close(info.size, torch.full((len(values),), 0.02 * max(m, n) ** 0.5).double())
        assert not info.tracked and "block" not in opt.state[x]
    torch.testing.assert_close(found[b].sigma, b.grad.norm()[None])
    q.grad[1, 2, 3] = torch.nan
    opt.step()
    assert float(dict(opt.last_step())[q].size.sum()) == 0 and int(opt.skipped) == 1


def test_describe():
    params = [parameter(12, 9), parameter(6, 4, 3, 3), parameter(5)]
    found = []
    for direction in ("normalize", "orthogonalize"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(str(SpectralOptimizer(params, direction=direction).describe()))
    assert found[0] == found[1] and "conv" in found[0]


@pytest.mark.parametrize("build", [mlp, convolutional])
@pytest.mark.parametrize("options", [{}, {"schedule": "keller_quintic", "retract": "rms_to_rms", "lr": 0.05}], ids=str)
def test_a_resumed_run_is_the_same_run(build, options):
    def start():
        torch.manual_seed(0)
        model = build()
        rest = {key: value for key, value in options.items() if key != "lr"}
        groups = param_groups(model, lr=options.get("lr", 0.02))
        return model, SpectralOptimizer(groups, direction="orthogonalize", **rest)

    model, opt = start()
    data = [batch for _, batch in zip(range(8), batches(), strict=False)]
    losses = train(model, opt, 4, iter(data))
    checkpoint = saved({"model": model.state_dict(), "opt": opt.state_dict()})
    twin = copy.deepcopy((model, opt))
    losses += train(model, opt, 4, iter(data[4:]))
    assert min(losses[-2:]) < losses[0]
    other, again = start()
    other.load_state_dict(checkpoint["model"])
    again.load_state_dict(checkpoint["opt"])
    train(other, again, 4, iter(data[4:]))
    train(*twin, 4, iter(data[4:]))
    assert same(snapshot(model, opt), snapshot(other, again)) and same(snapshot(model, opt), snapshot(*twin))


def test_a_checkpoint_keeps_the_schedule_that_the_optimizer_was_built_with():
    p = parameter(12, 9)
    other = SpectralOptimizer([p], direction="orthogonalize", schedule="cubic5")
    other.step()
    for options in ({"direction": "orthogonalize", "schedule": "keller_quintic"}, {}):
        opt = SpectralOptimizer([p], **options)
        opt.load_state_dict(saved(other.state_dict()))
        opt.step()
        assert opt.param_groups[0]["schedule"] == options.get("schedule")


def test_the_direction_of_a_group_may_change_between_steps():
    p = parameter(40, 30)
    opt = SpectralOptimizer([p], lr=0.1, rule="none", momentum=0.5)
    M = torch.zeros_like(p)
    for direction in ("normalize", "orthogonalize", "frobenius", "orthogonalize", "normalize", "orthogonalize"):
        opt.param_groups[0]["direction"] = direction
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        M = 0.5 * M + p.grad
        opt.step()
        wanted = {"normalize": M / spectral(M), "frobenius": M / M.norm(), "orthogonalize": express(M)}[direction]
        tolerance = 5e-2 if direction == "normalize" else 1e-9
        assert distance((before - p.detach()) / 0.1, wanted) <= tolerance
    opt.param_groups[0]["schedule"] = "keller_quintic"
    before = p.detach().clone()
    opt.step()
    M = 0.5 * M + p.grad
    assert distance((before - p.detach()) / 0.1, express(M, KELLER)) <= 1e-9


@pytest.mark.parametrize("nonfinite", ["skip", "strict", "propagate"])
def test_gradients_that_are_not_finite(nonfinite):
    p, q = parameter(3, 8, 6), parameter(8, 6)
    opt = SpectralOptimizer([p, q], direction="orthogonalize", nonfinite=nonfinite)
    opt.step()
    before, other = p.detach().clone(), q.detach().clone()
    p.grad[1, 2, 2] = torch.inf
    opt.step()
    assert not torch.equal(q.detach(), other) and bool(torch.isfinite(q).all())
    if nonfinite == "propagate":
        assert bool(p[1].isnan().all()) and bool(torch.isfinite(p[::2]).all())
    else:
        assert same(before, p.detach()) and int(opt.skipped) == 1
        assert bool(torch.isfinite(opt.state[p]["momentum_buffer"]).all())


def test_retraction_of_weights():
    params = [parameter(12, 9), parameter(3, 6, 8)]
    opt = SpectralOptimizer(params, direction="orthogonalize", retract="original")
    for _ in range(3):
        opt.step()
    for p in params:
        norms = torch.linalg.matrix_norm(p.detach(), 2)
        torch.testing.assert_close(norms, torch.full_like(norms, scaling.original(*p.shape[-2:])), rtol=5e-3, atol=0)


def test_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        G = torch.randn(24, 40).to(dtype)
        W = torch.zeros(24, 40, dtype=dtype)
        _, info = sk.spectral_step_(W, G, 1.0, direction="orthogonalize", rule="none", return_info=True)
        assert distance(-W, express(G)) <= 2 * torch.finfo(dtype).eps and float(info.info[0, INFO["done"]]) == 1


def test_it_is_muon_with_a_heavy_ball():
    p = parameter(20, 30)
    q = nn.Parameter(p.detach().clone())
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "schedule": "polar_express"}
    one = SpectralOptimizer([p], direction="orthogonalize", rule="original", **options)
    other = Muon([q], momentum_kind="heavy_ball", normalizer="auto", **options)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(p.detach(), q.detach())
