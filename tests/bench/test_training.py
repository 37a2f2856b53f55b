"""The small training runs: the same numbers for the same arguments, losses that fall, spikes as described."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from spectral_kernels.bench import training_data as data
from spectral_kernels.bench.training import Spikes, Task, convnet, groups, kinds, spike_, task, train

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"transformer": 32, "mlp": 48, "convnet": 8}


def adamw(run: Task, lr: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(run.model), lr)


def test_the_text_is_a_few_hundred_kilobytes_over_a_fixed_vocabulary():
    assert set(data.VOCABULARY) == {"\n", *map(chr, range(32, 127))} and len(data.VOCABULARY) == 96
    train_part, held = (part[0] for part in data.characters())
    assert 200_000 < len(train_part) < 600_000 and len(held) == sum(len(t) // 10 for t in data.sources())
    assert len(train_part) + len(held) == sum(map(len, data.sources()))
    first = "".join(data.VOCABULARY[i] for i in train_part[:200].tolist())
    assert data.sources()[0].startswith(first) and '"Executable documentation" for the pickle module' in first
    tail = "".join(data.VOCABULARY[i] for i in held[-50:].tolist())
    assert data.sources()[-1].endswith(tail)
    assert len(data.text_crc()) == 8 and data.text_crc() == data.text_crc()


def test_the_digits_are_split_without_overlap():
    train_part, held = data.digits()
    assert train_part[0].shape == (1618, 8, 8) and held[0].shape == (179, 8, 8) and held[1].shape == (179,)
    everything = torch.cat((train_part[0], held[0]))
    assert everything.mean().abs() < 1e-5 and (everything.std() - 1).abs() < 1e-3
    assert everything.flatten(1).unique(dim=0).shape[0] == 1797  # no image twice: none is in both parts
    assert set(held[1].tolist()) == set(range(10))


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    data.digits.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"scikit-learn.*spectral-kernels\[paper\]"):
            task("mlp", width=8)
    finally:
        data.digits.cache_clear()


@pytest.mark.parametrize("name", SMALL)
def test_everything_follows_from_the_arguments(name):
    state = torch.get_rng_state()
    runs = [task(name, width=SMALL[name], seed=seed, batch=8) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    losses = [train(run, adamw(run), 3) for run in runs]
    values = [run.evaluate() for run in runs]
    assert losses[0] == losses[1] != losses[2]
    assert values[0] == values[1] == runs[0].evaluate() != values[2]
    torch.rand(5)  # the batch of a step does not depend on what was drawn before it
    x, y = runs[0].batch(7)
    again = runs[1].batch(7)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and len(x) == 8
    assert not torch.equal(x, runs[0].batch(8)[0]) and not torch.equal(x, runs[2].batch(7)[0])


@pytest.mark.parametrize("name", SMALL)
def test_losses_go_down_and_validation_follows(name):
    run = task(name, width=SMALL[name], seed=0)
    before = run.evaluate()
    seen = []
    losses = train(run, adamw(run, 1e-2), 60, on_step=seen.append)
    assert len(losses) == 60 and seen == list(range(60))
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert run.evaluate() < 0.8 * before
    assert run.model.training  # evaluate puts the mode back


def test_a_run_in_two_parts_is_the_run_in_one():
    whole, parts = task("mlp", width=16), task("mlp", width=16)
    optimizer = adamw(parts)
    expected = train(whole, adamw(whole), 6, spikes=Spikes(2, 1.0))
    got = train(parts, optimizer, 4, spikes=Spikes(2, 1.0))
    assert got + train(parts, optimizer, 2, first=4, spikes=Spikes(2, 1.0)) == expected
    assert train(parts, optimizer, 0) == []


def test_the_text_task_predicts_the_next_character():
    run = task("transformer", width=16, layers=1)
    x, y = run.batch(0)
    assert x.shape == y.shape == (16, 64) and torch.equal(x[:, 1:], y[:, :-1])
    text = "".join(data.VOCABULARY[i] for i in x[0].tolist())
    assert text in "".join(source[: len(source) - len(source) // 10] for source in data.sources())
    changed = x.clone()
    changed[:, 40:] = 0
    logits, other = run.model(x), run.model(changed)
    torch.testing.assert_close(logits[:, :40], other[:, :40])  # causal
    assert (logits[:, 40:] - other[:, 40:]).abs().max() > 1e-3
    assert logits.shape == (16, 64, 96)


def test_shapes_and_kinds():
    net = task("transformer", width=128).model
    found = kinds(net)
    assert found.keys() == dict(net.named_parameters()).keys()
    shapes = {name: tuple(p.shape) for name, p in task("transformer", width=128).matrices()}
    assert len(shapes) == 13 and shapes["blocks.2.qkv.weight"] == (384, 128)  # 12 and the readout
    assert found["characters.weight"] == found["positions.weight"] == "embedding"
    assert found["blocks.0.norm1.weight"] == "gain" and found["blocks.0.norm1.bias"] == "vector"
    for norm in ("batch", "group"):
        conv = task("convnet", width=8, norm=norm)
        assert [tuple(p.shape) for _, p in conv.matrices()] == [(8, 1, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (10, 16)]
        assert sorted(kinds(conv.model).values()) == ["conv"] * 3 + ["gain"] * 3 + ["matrix"] + ["vector"] * 4
    assert [tuple(p.shape) for _, p in task("mlp", width=7).matrices()] == [(7, 64), (7, 7), (10, 7)]
    listed = [p for group in groups(net) for p in group["params"]]
    assert len(listed) == len(set(map(id, listed))) == len(list(net.parameters()))


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="task: 'resnet'"):
        task("resnet", width=8)
    with pytest.raises(ValueError, match="width: 30 is not a multiple of 4 heads"):
        task("transformer", width=30)
    with pytest.raises(ValueError, match="norm: 'layer'"):
        convnet(8, "layer")


@pytest.mark.parametrize("size", [3.0, 40.0])
def test_a_spike_is_rank_one_of_the_size_asked_for(size):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(6, 5), nn.Linear(5, 5))
    for p in list(net.parameters())[:-2]:
        p.grad = torch.randn(p.shape)
    before = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert spike_(net, size, seed=1, step=2) is net
    assert all(p.grad is None for p in list(net.parameters())[-2:])
    for name, p in net.named_parameters():
        if p.grad is None:
            continue
        added = p.grad - before[name]
        if p.ndim < 2:
            assert not added.any()
            continue
        s = torch.linalg.svdvals(added.flatten(1))
        assert s[0] == pytest.approx(size * float(before[name].norm()), rel=1e-4) and s[1] < 1e-5 * s[0]
        if p.ndim == 4:
            slices = torch.linalg.svdvals(added.permute(2, 3, 0, 1))  # (3, 3, min(out, in)): each position rank one
            assert (slices[..., 1] < 1e-5 * s[0]).all() and (slices[..., 0] > 0).all()


def test_spikes_differ_by_parameter_step_and_seed_and_hit_every_so_often():
    def direction(seed: int, step: int) -> torch.Tensor:
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        for p in net.parameters():
            p.grad = torch.eye(4)
        spike_(net, 1.0, seed, step)
        return torch.stack([p.grad for p in net.parameters()])

    assert torch.equal(direction(0, 1), direction(0, 1))
    assert not torch.equal(direction(0, 1), direction(0, 2)) and not torch.equal(direction(0, 1), direction(1, 1))
    assert not torch.equal(*direction(0, 1))
    assert [step for step in range(45) if Spikes(15, 3.0).hits(step)] == [14, 29, 44]
    run = task("mlp", width=16)
    norms = []
    _, weight = next(run.matrices())
    train(run, adamw(run), 6, on_step=lambda step: norms.append(float(weight.grad.norm())), spikes=Spikes(3, 40.0))
    assert min(norms[2], norms[5]) > 8 * max(norms[0], norms[1], norms[3], norms[4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", SMALL)
def test_a_device_sees_the_same_weights_and_batches(name):
    here, there = (task(name, width=SMALL[name], device=device) for device in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.model.parameters(), there.model.parameters(), strict=True))
    assert torch.equal(here.batch(3)[0], there.batch(3)[0].cpu())
    assert float(there.loss(0)) == pytest.approx(float(here.loss(0)), rel=1e-3)
