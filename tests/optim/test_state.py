"""The state of SpectralOptimizer: checkpoints in the middle of a run, dtypes, blocks of another width."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from spectral_kernels.optim import SpectralOptimizer, param_groups
from tests.optim.test_spectral import matrices_of, parameter, spectral
from tests.optim.textbook import batches, convolutional, mlp, same, snapshot, train


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("build", [mlp, convolutional])
@pytest.mark.parametrize(
    "options", [{}, {"retract": "rms_to_rms", "lr": 0.05}, {"momentum_dtype": torch.bfloat16, "block": 8}], ids=str
)
def test_a_resumed_run_is_the_same_run(build, options):
    def start():
        torch.manual_seed(0)
        model = build()
        return model, SpectralOptimizer(param_groups(model, lr=options.get("lr", 0.1)), **options)

    model, opt = start()
    data = list(zip(range(12), batches(), strict=False))
    data = [batch for _, batch in data]
    train(model, opt, 5, iter(data))
    checkpoint = saved({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, 5, iter(data[5:]))
    other, again = start()
    other.load_state_dict(checkpoint["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(checkpoint["opt"])
        assert same(snapshot(again)[0], checkpoint["opt"]["state"])
        train(other, again, 5, iter(data[5:]))
    assert same(snapshot(model, opt), snapshot(other, again))


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, torch.float32])
def test_half_precision_parameters(momentum_dtype):
    p = parameter(40, 30, dtype=torch.bfloat16)
    opt = SpectralOptimizer([p], lr=0.1, momentum_dtype=momentum_dtype)
    M = torch.zeros(40, 30)
    dtype = momentum_dtype or torch.bfloat16
    for _ in range(4):
        before, p.grad = p.detach().float(), torch.randn_like(p)
        M = (0.95 * M + p.grad.float()).to(dtype).float()
        opt.step()
        state = opt.state[p]
        assert (state["momentum_buffer"].dtype, state["block"].dtype, p.dtype) == (dtype, torch.float32, torch.bfloat16)
        torch.testing.assert_close(state["momentum_buffer"].float(), M, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        M = state["momentum_buffer"].float()
        wanted = before - 0.1 * (40 / 30) ** 0.5 * M / spectral(M.double())
        # 1 % of an update, and half a unit of the parameter's last place
        assert float(((p.detach().float() - wanted).abs() - 2**-8 * wanted.abs()).max()) <= 0.01 * 0.1 * 1.2
    twin = nn.Parameter(p.detach().clone())
    other = SpectralOptimizer([twin], lr=0.1, momentum_dtype=momentum_dtype)
    other.load_state_dict(saved(opt.state_dict()))
    assert other.state[twin]["block"].dtype == torch.float32 and other.state[twin]["momentum_buffer"].dtype == dtype
    assert same(dict(other.state[twin]), dict(opt.state[p]))
    twin.grad = p.grad.clone()
    opt.step()
    other.step()
    assert same(twin.detach(), p.detach())


@pytest.mark.parametrize("change", ["constructor", "group", "checkpoint"])
def test_another_block_width_starts_the_block_anew_with_a_warning(change):
    p = parameter(40, 30)
    opt = SpectralOptimizer([p], lr=0.1, block=4)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        opt.step()
    M = opt.state[p]["momentum_buffer"].clone()
    if change == "group":
        opt.param_groups[0]["block"] = 8
    else:
        state = saved(opt.state_dict())
        if change == "checkpoint":
            state["param_groups"][0]["block"] = 4
        opt = SpectralOptimizer([p], lr=0.1, block=8)
        opt.load_state_dict(state)
    assert opt.param_groups[0]["block"] == 8
    before, p.grad = p.detach().clone(), torch.randn_like(p)
    with pytest.warns(UserWarning, match=r"block of a parameter of shape \(40, 30\) is \(1, 4, 30\).*\(1, 8, 30\)"):
        opt.step()
    assert opt.state[p]["block"].shape == (1, 8, 30)
    torch.testing.assert_close(opt.state[p]["momentum_buffer"], 0.95 * M + p.grad)
    assert spectral(p.detach() - before) == pytest.approx(0.1 * (40 / 30) ** 0.5, rel=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


@pytest.mark.parametrize("wrong", ["matrix", "vector", "conv"])
def test_a_checkpoint_of_other_shapes_is_refused_and_nothing_is_loaded(wrong):
    shapes = {"matrix": (8, 5), "vector": (6,), "conv": (4, 3, 2, 2)}
    others = {"matrix": (5, 8), "vector": (7,), "conv": (3, 4, 2, 2)}
    source = [parameter(*(others if kind == wrong else shapes)[kind]) for kind in shapes]
    params = [parameter(*shape) for shape in shapes.values()]
    giver, opt = SpectralOptimizer(source, lr=0.7), SpectralOptimizer(params, lr=0.1)
    for x in (giver, giver, opt):
        x.step()
    before, groups = snapshot(opt), [dict(g) for g in opt.param_groups]
    number = list(shapes).index(wrong)
    with pytest.raises(ValueError, match=f"momentum_buffer of parameter {number} has shape .*nothing was loaded"):
        opt.load_state_dict(giver.state_dict())
    assert same(snapshot(opt), before)
    assert [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    opt.step()


def test_a_checkpoint_with_another_number_of_groups_is_refused_as_torch_does():
    p, q = parameter(8, 5), parameter(8, 5)
    opt = SpectralOptimizer([p], lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(SpectralOptimizer([{"params": [p]}, {"params": [q]}]).state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        opt.load_state_dict(SpectralOptimizer([p, q]).state_dict())


def test_a_block_of_another_shape_in_a_checkpoint_is_started_anew():
    """A checkpoint of a machine that follows the other side of a matrix, for one."""
    p = parameter(40, 30)
    opt = SpectralOptimizer([p], lr=0.1)
    opt.step()
    state = saved(opt.state_dict())
    state["state"][0]["block"] = torch.randn(1, 4, 40)
    opt.load_state_dict(state)
    before = p.detach().clone()
    with pytest.warns(UserWarning, match="started anew"):
        opt.step()
    assert spectral(p.detach() - before) == pytest.approx(0.1 * (40 / 30) ** 0.5, rel=0.01)


def test_the_state_is_small_and_made_of_tensors():
    model = convolutional()
    opt = SpectralOptimizer(param_groups(model, lr=0.1))
    train(model, opt, 1, batches())
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state[p]
            assert set(state) - {"block"} == {"step", "momentum_buffer", "tracker"}
            assert all(isinstance(x, torch.Tensor) for x in state.values())
            count, *sides = matrices_of(p, group["kind"], group.get("groups", 1)).shape
            assert ("block" in state) == (min(sides) > 1)  # the norm of a column is known without one
            assert state["tracker"].shape == (count, 2) and state["momentum_buffer"].numel() == p.numel()


def test_seeds_change_blocks_and_nothing_else():
    results = []
    for seed in (0, 1):
        torch.manual_seed(0)
        p = parameter(40, 30)
        opt = SpectralOptimizer([p], lr=0.1, seed=seed)
        opt.step()
        results.append((p.detach(), opt.state[p]["block"]))
    assert not torch.allclose(results[0][1], results[1][1])
    assert float((results[0][0] - results[1][0]).norm()) < 0.01 * 0.1 * 30**0.5


@pytest.mark.parametrize(
    "options", [{}, {"retract": "rms_to_rms"}, {"direction": "frobenius", "nonfinite": "strict"}], ids=str
)
def test_steps_write_into_the_tensors_that_the_state_has(options):
    """A captured step is replayed on the tensors that it was captured with, the counter of skipped steps included."""
    params = [parameter(12, 9), parameter(6, 4, 2, 2), parameter(9), nn.Parameter(torch.randn(6, 4, 3, 2).mT)]
    opt = SpectralOptimizer(params, lr=0.1, **options)

    def tensors():
        kept = [(i, key, x) for i, p in enumerate(params) for key, x in opt.state[p].items()]
        return [*kept, *(("skipped", device, x) for device, x in opt._skipped.items())]

    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    before = tensors()
    copies, moved, count = [x.clone() for *_, x in before], snapshot(opt)[1:], opt.skipped
    params[0].grad[2, 3] = torch.inf
    opt.step()
    assert [(i, key, x.data_ptr()) for i, key, x in tensors()] == [(i, key, x.data_ptr()) for i, key, x in before]
    assert (int(count), int(opt.skipped)) == (0, 1)
    changed = {key for (_, key, x), old in zip(before, copies, strict=True) if not torch.equal(x, old)}
    assert {"step", "momentum_buffer"} <= changed and ("weight_block" in changed) == ("retract" in options)
    assert [same(p.detach(), old) for p, old in zip(params, moved, strict=True)][1:] == [False] * 3
