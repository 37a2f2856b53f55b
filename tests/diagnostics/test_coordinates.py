"""coordinate_check: Condition 1 passes, standard and NTK parametrization fail, by the slopes the paper predicts."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

import spectral_kernels as sk
from spectral_kernels.diagnostics import coordinate_check, coordinates

WIDTHS = (64, 128, 256, 512)
GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.randn(32, 16, generator=GENERATOR), torch.randint(4, (32,), generator=GENERATOR)


def mlp(width: int) -> nn.Sequential:
    sides = [(16, width), (width, width), (width, 4)]
    parts = [part for n, m in sides for part in (nn.Linear(n, m, bias=False), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def by_condition(width: int) -> nn.Sequential:
    model = mlp(width)
    sk.init_model_(model, gain=math.sqrt(2), seed=int(torch.randint(1 << 30, ())))
    return model


def ntk(width: int) -> nn.Sequential:
    model = mlp(width)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
    return model


def by_growth(width: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, width, bias=False))
    nn.init.normal_(model[0].weight, std=width)
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(sk.optim.param_groups(model, "sgd", lr=0.3))


OBEYING = {
    "sgd": sgd,
    "adam": lambda model: torch.optim.Adam(sk.optim.param_groups(model, "adam", lr=0.1, eps=1e-8)),
    "spectral": lambda model: sk.optim.SpectralOptimizer(sk.optim.param_groups(model), lr=0.1),
}


@pytest.mark.parametrize("name", OBEYING)
def test_rates_of_the_condition_pass(name):
    check = coordinate_check(by_condition, WIDTHS, 3, batches=[BATCH], optimizer=OBEYING[name])
    assert check.passed and set(check.verdicts.values()) == {"passes"}, check
    assert list(check.verdicts) == ["0", "1", "2", "3", "4"]
    assert len(check.slopes["2"]["size"]) == 4 and len(check.slopes["2"]["change"]) == 3
    assert len(check.records) == 4 * 5 * 4 * 5


def test_standard_parametrization_fails_as_predicted():
    check = coordinate_check(mlp, WIDTHS, 2, batches=[BATCH], optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
    assert not check.passed
    change = {name: slopes["change"][0] for name, slopes in check.slopes.items()}
    assert change["0"] == pytest.approx(-0.5, abs=0.1)
    assert change["2"] == pytest.approx(0.5, abs=0.1)
    assert change["4"] == pytest.approx(1, abs=0.2)
    assert check.verdicts["0"] == "change vanishes" and "grows" in check.verdicts["4"]


def test_ntk_parametrization_fails_as_predicted():
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [m.weight], "lr": 0.3 / m.in_features} for m in model[::2]])

    check = coordinate_check(ntk, WIDTHS, 2, batches=lambda step: BATCH, optimizer=optimizer, names=["0", "2"])
    assert check.verdicts["0"] == "change vanishes" and not check.passed
    for slopes in check.slopes.values():
        assert slopes["change"][-1] < -0.3 and abs(slopes["size"][-1]) < 0.1


def test_rows_carry_their_bounds_and_errors():
    check = coordinate_check(by_condition, (32, 64, 128), 1, batches=[BATCH], optimizer=sgd, tolerance=0.3)
    for row in check:
        assert row.high == 0.3 and row.low == (-0.8 if (row.name, row.quantity) == ("4", "size") else -0.3)
        assert row.error > 0
        assert (row.verdict == "passes") is (row.low - 2 * row.error <= row.slope <= row.high + 2 * row.error)
    assert {(row.step, row.quantity) for row in check} == {(0, "size"), (1, "size"), (1, "change")}


def test_a_row_fails_beyond_its_tolerance_and_two_standard_errors():
    verdict = coordinates._verdict
    assert [verdict(p, 0.05, -0.25, 0.25) for p in (-0.36, -0.34, 0.34, 0.36)] == [
        "vanishes", "passes", "passes", "grows"
    ]  # fmt: skip
    assert verdict(0.26, math.nan, -0.25, 0.25) == "grows" and verdict(math.nan, 0.0, -1, 1) == "not finite"


def test_sizes_at_initialization_alone():
    check = coordinate_check(by_condition, WIDTHS, 0, batches=[BATCH], optimizer=sgd, seeds=[5, 6])
    assert check.passed and {row.quantity for row in check} == {"size"}
    assert {record["seed"] for record in check.records} == {5, 6}
    check = coordinate_check(by_growth, WIDTHS, 0, batches=[BATCH], optimizer=sgd)
    assert check.verdicts == {"0": "size grows"}
    assert check.slopes["0"]["size"][0] == pytest.approx(1, abs=0.1)


def test_a_run_that_diverges_fails():
    check = coordinate_check(
        mlp, (32, 64), 4, batches=[BATCH], optimizer=lambda m: torch.optim.SGD(m.parameters(), 1e30), seeds=1
    )
    assert not check.passed and check.verdicts["0"].endswith("not finite")


def test_inputs_that_never_move_and_containers():
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.flat, self.body, self.drop = nn.Flatten(), by_condition(width), nn.Dropout(0.5)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.norm(self.drop(self.body(self.flat(x))))

    made = []

    def make(width: int) -> nn.Module:
        made.append(Net(width))
        return made[-1]

    check = coordinate_check(make, (32, 64), 0, batches=[BATCH], optimizer=sgd, seeds=1)
    names = ["flat", *(f"body.{i}" for i in range(5)), "drop", "norm", "(model)"]  # `body` hands on what body.4 made
    assert list(check.verdicts) == names
    assert int(made[0].norm.num_batches_tracked) == 0  # a probe leaves the buffers
    check = coordinate_check(make, (32, 64), 1, batches=[BATCH], optimizer=sgd, seeds=1)
    assert check.slopes["flat"] == {"size": [0, 0], "change": []} and int(made[-1].norm.num_batches_tracked) == 1


def test_the_caller_keeps_random_state_and_models_have_no_hooks():
    made = []

    def make(width: int) -> nn.Module:
        made.append(by_condition(width))
        return made[-1]

    before = torch.get_rng_state()
    checks = [coordinate_check(make, (32, 64), 1, batches=[BATCH], optimizer=sgd, seeds=2) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert checks[0].records == checks[1].records
    assert not any(m._forward_hooks for model in made for m in model.modules())


def test_shown_plotted_and_as_a_dict(tmp_path, monkeypatch):
    check = coordinate_check(mlp, (32, 64), 1, batches=[BATCH], optimizer=sgd, seeds=1, names=["0", "4"])
    assert "tolerance 0.25" in str(check) and "verdict" in str(check)
    assert json.loads(json.dumps(check.to_dict()))["passed"] is check.passed
    path = check.plot(tmp_path / "check.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="a picture's name ends in one of"):
        check.plot(tmp_path / "check.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install 'spectral-kernels"):
        check.plot(tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"widths": (64,)}, ValueError, "widths must be at least 2 different numbers"),
        ({"widths": (64, 64)}, ValueError, "widths must be at least 2 different numbers"),
        ({"widths": (0, 64)}, ValueError, "widths must be at least 1"),
        ({"widths": (1.5, 64)}, TypeError, "widths must be an integer"),
        ({"widths": 64}, TypeError, "widths must be a sequence"),
        ({"steps": -1}, ValueError, "steps must be at least 0"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1"),
        ({"seeds": []}, ValueError, "at least one seed"),
        ({"tolerance": 0}, ValueError, "tolerance"),
        ({"batches": []}, TypeError, "batches must be"),
        ({"batches": [BATCH[0]]}, ValueError, "pairs"),
        ({"optimizer": None}, TypeError, "optimizer must be callable"),
        ({"make_model": mlp(4)[0].weight}, TypeError, "make_model must be callable"),
        ({"make_model": lambda n: None}, TypeError, "make_model must return"),
        ({"names": ["5"]}, ValueError, "module '5' is not in the model; near names: '0'"),
    ],
)
def test_bad_arguments(changes, error, match):
    given = {"make_model": mlp, "widths": (32, 64), "steps": 1, "batches": [BATCH], "optimizer": sgd} | changes
    with pytest.raises(error, match=match):
        coordinate_check(given.pop("make_model"), given.pop("widths"), given.pop("steps"), **given)
