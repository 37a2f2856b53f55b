"""spectral_report: numbers of the matrices, verdicts in every direction, one call of spectral_norm."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from torch import nn

import spectral_kernels as sk
from spectral_kernels.diagnostics import linear, report, spectral_report

REL = 3e-4


def model_of_all_kinds() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({
        "embedding": nn.Embedding(20, 16), "conv": nn.Conv2d(4, 6, 3, groups=2), "norm": nn.LayerNorm(16),
        "hidden": nn.Linear(64, 32), "head": nn.Linear(32, 10, bias=False),
    })  # fmt: skip


def norm2(A: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(A.detach().double(), 2)


def test_numbers_are_those_of_the_matrices():
    model = model_of_all_kinds()
    old = copy.deepcopy(model)
    first = spectral_report(model)
    assert [r.name for r in first] == ["embedding.weight", "conv.weight", "hidden.weight", "head.weight"]
    assert all(math.isnan(r.change) and r.change_verdict == "" for r in first)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    rows = spectral_report(model)
    for name, m, n in (("hidden", 32, 64), ("head", 10, 32)):
        row, W = rows[f"{name}.weight"], model[name].weight
        change = W - old[name].weight
        assert row.norm == pytest.approx(float(norm2(W)), rel=REL)
        assert row.ratio == pytest.approx(float(norm2(W)) / math.sqrt(m / n), rel=REL)
        assert row.change == pytest.approx(float(norm2(change)), rel=REL)
        assert row.change_ratio == pytest.approx(float(norm2(change)) / math.sqrt(m / n), rel=REL)
        assert row.stable_rank == pytest.approx(float(W.detach().norm() / norm2(W)) ** 2, rel=REL)
        assert row.change_stable_rank == pytest.approx(float(change.detach().norm() / norm2(change)) ** 2, rel=REL)
    slices = model["conv"].weight.unflatten(0, (2, 3)).permute(3, 4, 0, 1, 2)  # (3, 3, groups, 3, 2)
    row = rows["conv.weight"]
    assert row.matrices == 18 and row.norm == pytest.approx(float(norm2(slices).max()), rel=REL)
    assert row.target == pytest.approx(math.sqrt(3 / 2) / 3)
    row = rows["embedding.weight"]
    assert row.norm == pytest.approx(float(model["embedding"].weight.detach().norm(dim=1).max()), rel=1e-6)
    assert row.target == 4 and math.isnan(row.stable_rank)


def test_verdicts_in_every_direction():
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    for layer, gain in zip(model, (1.0, 0.1, 10.0, 0.0), strict=True):
        layer.weight.data = gain * torch.eye(16)
    assert [r.weight_verdict for r in spectral_report(model)] == ["obeys", "too small", "too large", "too small"]
    for layer, size in zip(model, (0.1, 0.1, 0.001, 1.0), strict=True):
        layer.weight.data += size * torch.eye(16)
    rows = spectral_report(model)
    assert [r.change_verdict for r in rows] == ["obeys", "obeys", "too small", "too large"]
    assert rows.rows[2].verdict == "W too large, dW too small" and not rows.passed
    for layer in model:
        layer.weight.data += 0.1 * torch.eye(16)
    model[0].weight.data[0, 0] = math.inf
    model[1].weight.data[0, 0] = math.nan
    rows = spectral_report(model)
    assert [r.verdict for r in rows.rows[:2]] == ["W not finite, dW not finite", "W not finite"]
    assert [r.change_verdict for r in rows.rows[2:]] == ["obeys", "obeys"]


def test_an_initialized_model_obeys_and_one_rate_for_all_does_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    sk.init_model_(model)
    assert spectral_report(model).passed
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    start = copy.deepcopy(model.state_dict())
    for by_condition, passes in ((True, True), (False, False)):
        model.load_state_dict(start)
        spectral_report(model)
        groups = sk.optim.param_groups(model, "adam", lr=0.1) if by_condition else model.parameters()
        optimizer = torch.optim.Adam(groups, 1e-3)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        rows = spectral_report(model, optimizer)
        assert rows.passed is passes, rows
        assert rows["0.weight"].lr == pytest.approx(0.1 / 8 if by_condition else 1e-3)


def test_frozen_and_foreign_weights_have_no_verdict_of_their_change():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[1:3].parameters(), 0.1)
    spectral_report(model)
    for layer in model[1:]:
        layer.weight.data += 0.1
    rows = spectral_report(model, optimizer)
    assert [r.change_verdict for r in rows] == ["", "obeys", "obeys", ""]
    assert [r.change for r in rows] == pytest.approx([0, 0.8, 0.8, 0.8], rel=1e-3)
    assert math.isnan(rows.rows[3].lr) and rows.rows[1].lr == 0.1


def test_one_call_for_the_whole_model(monkeypatch):
    calls = []
    real = linear.spectral_norm
    monkeypatch.setattr(linear, "spectral_norm", lambda A, *a, **k: calls.append(len(A)) or real(A, *a, **k))
    model = model_of_all_kinds()
    spectral_report(model)
    spectral_report(model)
    assert calls == [3, 6]


def test_what_is_remembered_and_for_how_long():
    model = nn.Linear(6, 6)
    spectral_report(model)
    model.weight.data += 1
    assert spectral_report(model, remember=False)["weight"].change == pytest.approx(6, rel=1e-3)
    assert spectral_report(model)["weight"].change == pytest.approx(6, rel=1e-3)
    assert spectral_report(model)["weight"].change == 0
    assert math.isnan(spectral_report(copy.deepcopy(model))["weight"].change)
    model.weight = nn.Parameter(torch.randn(6, 5))
    assert math.isnan(spectral_report(model)["weight"].change)
    held = weakref.ref(report._seen[model]["weight"])
    del model
    gc.collect()
    assert held() is None


def test_training_stays_as_it_is_bit_for_bit():
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 8)).square().sum().backward()
            optimizer.step()
            if watched:
                spectral_report(model, optimizer)
        ends.append([*(p.detach() for p in model.parameters()), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_shown_and_as_a_dict():
    model = nn.Sequential(nn.Linear(6, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    rows = spectral_report(model)
    text = str(rows)
    assert "left out" in text and "parametrized weight" in text and "obeys" in text
    made = json.loads(json.dumps(rows.to_dict()))
    assert made["rows"][0]["shape"] == [4, 6] and made["rows"][0]["verdict"] == "obeys" and made["passed"] is True
    assert made["left"][0]["name"].startswith("1.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = nn.Linear(12, 9).to(dtype)
    spectral_report(model)
    old = model.weight.detach().clone()
    model.weight.data += 0.25
    row = spectral_report(model)["weight"]
    assert row.change == pytest.approx(float(norm2(model.weight.double() - old.double())), rel=REL)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not list"):
        spectral_report([])
    with pytest.raises(TypeError, match="optimizer must have param_groups, not be a str"):
        spectral_report(nn.Linear(2, 2), "sgd")
