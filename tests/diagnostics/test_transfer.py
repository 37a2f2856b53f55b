"""lr_transfer: the optimum stays with Condition 1's rates and moves by the predicted factor without."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import spectral_kernels as sk
from spectral_kernels.diagnostics import lr_transfer, transfer

GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.randn(32, 16, generator=GENERATOR), torch.randint(4, (32,), generator=GENERATOR)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU(),
        nn.Linear(width, 4, bias=False),
    )  # fmt: skip


def by_condition(width: int) -> nn.Sequential:
    model = mlp(width)
    sk.init_model_(model, gain=math.sqrt(2))
    return model


def test_adam_transfers_with_the_rates_of_the_condition():
    found = lr_transfer(
        by_condition, (32, 256), [2.0**k for k in range(-4, 5)], 10, batches=[BATCH],
        optimizer=lambda m, lr: torch.optim.Adam(sk.optim.param_groups(m, "adam", lr=lr, eps=1e-8)),
    )  # fmt: skip
    assert found.transfers() and abs(found.shift) < 1 and found.spread < 1, found


def test_adam_without_them_shifts_by_the_width():
    found = lr_transfer(
        mlp, (32, 256), [2.0**k for k in range(-12, -2)], 10, batches=[BATCH],
        optimizer=lambda m, lr: torch.optim.Adam(m.parameters(), lr),
    )  # fmt: skip
    assert found.shift == pytest.approx(-3, abs=1) and not found.transfers(), found  # lr ~ 1 / n: 8 = 2 ** 3
    assert found.spread == pytest.approx(-found.shift)


class Parabola(nn.Module):
    """loss = (log2(w) - log2(lr of the best))^2 after one step that sets w to the rate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.w = width, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w


class SetTo:
    def __init__(self, model: Parabola, lr: float) -> None:
        self.model, self.lr = model, lr

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        with torch.no_grad():
            self.model.w.fill_(self.lr)


def value(model: Parabola) -> float:
    x = math.log2(float(model.w))
    return math.nan if x > 3 else (x - math.log2(model.width) + 4.25) ** 2


def test_the_parabola_is_exact_and_divergence_is_inf():
    lrs = [2.0**k for k in range(-3, 5)]
    found = lr_transfer(
        Parabola, (16, 8, 64), lrs, 1, batches=[(torch.ones(1), torch.ones(1))], optimizer=SetTo,
        loss=lambda w, y: w, evaluate=value,
    )  # fmt: skip
    assert [row.width for row in found] == [8, 16, 64]
    assert [row.optimum for row in found] == pytest.approx([2**-1.25, 2**-0.25, 2**1.75])
    assert [row.shift for row in found] == pytest.approx([0, 1, 3]) and found.spread == pytest.approx(3)
    assert [row.best for row in found] == [2, 3, 5] and found.shift == found["64"].shift
    assert found.transfers(3) and not found.transfers(2)
    assert all(row.losses[-1] == math.inf and math.isfinite(row.losses[-2]) for row in found)


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([4.0, 3.0, 2.0, 1.0], 8.0),
        ([4.0, 1.0, math.inf, math.inf], 2.0),
        ([1.0, 1.0, 1.0, 1.0], 1.0),
        ([3.0, 1.0, 3.0, 9.0], 2.0),
        ([math.inf] * 4, math.nan),
    ],
)
def test_optimum(losses, best):
    assert transfer.optimum([1.0, 2.0, 4.0, 8.0], losses) == pytest.approx(best, nan_ok=True)


def test_an_optimum_at_the_edge_proves_nothing():
    records = [{"width": w, "lr": lr, "seed": 0, "loss": lr} for w in (8, 16) for lr in (1.0, 2.0, 4.0)]
    found = transfer.LrTransfer(transfer.curves(records), records)
    assert found.shift == 0 and not found.transfers(5) and all(row.edge for row in found) and "edge" in str(found)
    broken = [{**r, "loss": math.inf} for r in records]
    found = transfer.LrTransfer(transfer.curves(broken), broken)
    assert math.isnan(found.shift) and math.isnan(found.spread) and not found.transfers()


def test_seeds_are_averaged_and_runs_start_alike():
    started = []

    def make(width: int) -> nn.Module:
        started.append(mlp(width))
        return started[-1]

    before = torch.get_rng_state()
    first: list[torch.Tensor] = []

    def optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        first.append(model[0].weight.detach().clone())
        return torch.optim.SGD(model.parameters(), lr)

    found = lr_transfer(make, (8, 16), [0.1, 0.2, 0.4], 5, batches=[BATCH], optimizer=optimizer, seeds=[3, 4])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    at = [r["loss"] for r in found.records if r["width"] == 8 and r["lr"] == 0.1]
    assert len(at) == 2 and found["8"].losses[0] == pytest.approx(sum(at) / 2)


def test_shown_plotted_and_as_a_dict(tmp_path):
    found = lr_transfer(
        mlp, (8, 16), [0.1, 1.0, 1e30], 3, batches=[BATCH], optimizer=lambda m, lr: torch.optim.SGD(m.parameters(), lr)
    )
    assert found["8"].losses[2] == math.inf and "inf" in str(found)
    assert found.to_dict()["rows"][0]["width"] == 8 and json.dumps(found.to_dict())
    assert found.plot(tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"lrs": [0.1, 0.2]}, ValueError, "lrs must be at least 3 different numbers"),
        ({"lrs": [0.1, 0.1, 0.2]}, ValueError, "lrs must be at least 3 different numbers"),
        ({"lrs": [0.0, 0.1, 0.2]}, ValueError, "lrs must be a finite number above 0"),
        ({"lrs": [0.1, 0.2, math.inf]}, ValueError, "lrs must be a finite number"),
        ({"lrs": ["a", 0.1, 0.2]}, TypeError, "lrs must be a number"),
        ({"lrs": 0.1}, TypeError, "lrs must be a sequence"),
        ({"widths": [8]}, ValueError, "widths must be at least 2"),
        ({"widths": [-8, 8]}, ValueError, "widths must be at least 1"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"evaluate": 3}, TypeError, "evaluate must be callable"),
        ({"loss": 3}, TypeError, "loss must be callable"),
    ],
)
def test_bad_arguments(changes, error, match):
    given = {"widths": [8, 16], "lrs": [0.1, 0.2, 0.4], "steps": 2, "batches": [BATCH], "optimizer": SetTo} | changes
    with pytest.raises(error, match=match):
        lr_transfer(mlp, given.pop("widths"), given.pop("lrs"), given.pop("steps"), **given)
