"""The paper's experiments: stacked networks, their trainings and what is measured, at sizes of a second."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_kernels import scaling
from spectral_kernels.experiments import (
    appb,
    descent,
    fig2,
    fits,
    gradients,
    network,
    ntp_mup,
    table1,
    trainings,
    transfer,
    uniqueness,
)  # fmt: skip
from spectral_kernels.experiments.data import Images

DOUBLE = torch.float64


pytestmark = pytest.mark.usefixtures("one_thread")


def images(count=24, entries=48, classes=2, seed=3):
    """Random inputs whose classes differ in their means."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    means = torch.randn(classes, entries, generator=random)
    x = means[labels] + torch.randn(count, entries, generator=random)
    return Images("made up, two", (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), labels, "0" * 8)


# -- the network


def test_sizes_of_a_scheme():
    sizes = (3072, 256, 256, 1)
    root = math.sqrt(2)
    assert network.init_stds("mup", sizes) == pytest.approx([root / math.sqrt(3072), root / 16, root / 256])
    assert network.init_stds("ntp", sizes) == pytest.approx([root / math.sqrt(3072), root / 16, root / 16])
    assert network.init_stds("sp", sizes) == network.init_stds("ntp", sizes)
    letter = root * math.sqrt(256 / 3072) / math.sqrt(3072)
    assert network.init_stds("spectral", sizes) == pytest.approx([letter, root / 16, root / 256])
    assert network.sgd_factors("mup", sizes) == [256 / 3072, 1, 1 / 256]
    assert network.sgd_factors("ntp", sizes) == [1 / 3072, 1 / 256, 1 / 256]
    assert network.sgd_factors("sp", sizes) == network.sgd_factors("ntp", (3072, 64, 64, 1))
    assert network.sgd_factors("sp", sizes) == network.sgd_factors("sp", (3072, 64, 64, 1))
    for function in (network.init_stds, network.sgd_factors):
        assert function("mup", (3072, 1, 1, 1)) == function("ntp", (3072, 1, 1, 1))
        with pytest.raises(ValueError, match="unknown parametrization 'mu': expected one of spectral"):
            function("mu", sizes)
    assert descent.factors("adam", "mup", sizes) == [1 / 3072, 1 / 256, 1 / 256]
    assert descent.factors("muon", "mup", sizes) == pytest.approx([math.sqrt(1 / 12), 1, 1 / 16])
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        descent.factors("lion", "mup", sizes)


@pytest.mark.parametrize("scheme", ["mup", "ntp", "sp", "spectral"])
def test_schemes_are_those_of_scaling(scheme):
    for width in (1, 10, 64, 300):
        sizes = (3072, width, width, 10)
        shapes = list(zip(network.layers_of(sizes), scaling.LAYERS, strict=True))
        wanted = [scaling.parametrization(scheme, m, n, layer=layer) for (m, n), layer in shapes]
        assert network.init_stds(scheme, sizes) == [math.sqrt(2) * one.sigma for one in wanted]
        if scheme != "sp":  # its rate here is ntp's at one width, not 1
            assert network.sgd_factors(scheme, sizes) == [one.eta for one in wanted]


def test_a_trial_is_the_same_alone_and_stacked():
    sizes = (48, 8, 8, 1)
    stacked = network.initial("mup", sizes, 5, 8, [0, 1, 2])
    (alone,) = network.initial("mup", sizes, 5, 8, [2])[1]
    assert torch.equal(stacked[1][2], alone) and not torch.equal(stacked[1][1], alone)
    assert not torch.equal(network.initial("mup", sizes, 6, 8, [2])[1][0], alone)
    ratio = network.initial("ntp", sizes, 5, 8, [2])[2] / network.initial("mup", sizes, 5, 8, [2])[2]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(8)))  # schemes share their samples


@pytest.mark.parametrize("line", ["mup", "adam", "spectral"])
def test_records_do_not_depend_on_stacking(line):
    kind, data = trainings.LINES[line], images()
    stacked = list(trainings.trained(kind, data, 16, 20, [0, 1]))
    alone = [record for trial in (0, 1) for record in trainings.trained(kind, data, 16, 20, [trial])]
    assert stacked[0] != stacked[1]
    for a, b in zip(stacked, alone, strict=True):
        assert {k: v for k, v in a.items() if v} == pytest.approx({k: v for k, v in b.items() if v}, rel=5e-3)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("own_batches", [False, True])
def test_gradients_are_those_of_autograd_of_a_single_network(activation, classes, own_batches):
    data = images(30, classes=classes)
    x, y = data.inputs.double(), data.targets
    y = y.double() if classes == 2 else y
    weights = [W.double() for W in network.initial("mup", (48, 12, 9, data.outputs), 0, 12, [0, 1])]
    order = torch.stack([torch.randperm(30)[:17] for _ in range(2)]) if own_batches else None
    shown, wanted = (x, y) if order is None else (x[order], y[order])
    passed = network.forward(weights, shown, activation)
    back = network.backward(weights, passed, wanted, activation)
    for trial in range(2):
        own_x, own_y = (x, y) if order is None else (x[order[trial]], y[order[trial]])
        single = torch.nn.Sequential(
            *(torch.nn.Linear(W.shape[2], W.shape[1], bias=False, dtype=DOUBLE) for W in weights)
        )
        with torch.no_grad():
            for layer, W in zip(single, weights, strict=True):
                layer.weight.copy_(W[trial])
        h = own_x
        for i, layer in enumerate(single):
            h = layer(getattr(torch, activation)(h) if i else h)
        loss = (
            torch.nn.functional.mse_loss(h, own_y) / 2 if classes == 2 else torch.nn.functional.cross_entropy(h, own_y)
        )
        loss.backward()
        torch.testing.assert_close(network.losses(passed.outputs, wanted)[trial], loss)
        for layer, G, g, inputs in zip(single, back.grads, back.g, passed.inputs, strict=True):
            torch.testing.assert_close(G[trial], layer.weight.grad)
            own = inputs if inputs.ndim == 2 else inputs[trial]
            torch.testing.assert_close(g[trial].mT @ own / len(own), layer.weight.grad)


def test_the_span_of_the_inputs_changes_nothing():
    data = images()
    x, basis = network.span(data.inputs.double())
    assert x.shape == (24, 24)
    torch.testing.assert_close(x @ basis, data.inputs.double())
    torch.testing.assert_close(basis @ basis.mT, torch.eye(24, dtype=DOUBLE))
    whole = [W.double() for W in network.initial("mup", (48, 16, 16, 1), 0, 16, [0, 1])]
    part = [whole[0] @ basis.mT, *(W.clone() for W in whole[1:])]
    before = whole[0].clone()
    for weights, inputs in ((whole, data.inputs.double()), (part, x)):
        step = descent.update("sgd", weights, [0.3, 0.1, 0.1])
        descent.descend(weights, inputs, data.targets.double(), step, 30)
    torch.testing.assert_close(part[0], whole[0] @ basis.mT)
    torch.testing.assert_close(part[2], whole[2])
    torch.testing.assert_close((whole[0] - before) @ basis.mT @ basis, whole[0] - before)


@pytest.mark.parametrize("optimizer", ["sgd", "sign", "adam", "spectral", "muon"])
def test_every_update_is_that_of_its_optimizer(optimizer):
    data = images()
    weights = network.initial("mup", (48, 8, 8, 1), 0, 8, [0, 1])
    single = torch.nn.Parameter(weights[1][1].clone())
    rates = [0.1, 0.02, 0.1]
    step = descent.update(optimizer, weights, rates)
    theirs = {
        "sgd": lambda: torch.optim.SGD([single], 0.02),
        "adam": lambda: torch.optim.Adam([single], 0.02, betas=descent.BETAS, eps=descent.EPS),
    }.get(optimizer, lambda: None)()
    for _ in range(3):
        G = network.backward(weights, network.forward(weights, data.inputs), data.targets).grads
        before, own = weights[1][1].clone(), G[1][1].clone()
        step(G, 1.0)
        if theirs is not None:
            single.grad = own
            theirs.step()
            torch.testing.assert_close(weights[1][1], single.detach(), rtol=1e-4, atol=1e-7)
        S = torch.linalg.svdvals(own)
        moved = (before - weights[1][1]) / 0.02
        if optimizer == "sign":
            torch.testing.assert_close(moved, own.sign(), rtol=1e-3, atol=1e-3)
        if optimizer == "spectral":
            torch.testing.assert_close(moved, own / S[0], rtol=2e-2, atol=2e-3)
        if optimizer == "muon":
            assert (torch.linalg.svdvals(moved)[:3] - 1).abs().max() < 0.25  # polar_express ends near 1.12
    assert all(W.grad is None for W in weights)


def test_every_model_of_a_stack_has_its_own_rate():
    data = images()
    weights = [W.repeat_interleave(2, 0) for W in network.initial("mup", (48, 8, 8, 1), 0, 8, [0])]
    start = weights[1].clone()
    step = descent.update("sgd", weights, [torch.tensor([0.0, 0.1]), torch.tensor([0.0, 0.2]), 0.0])
    losses = descent.descend(weights, data.inputs, data.targets, step, 2)
    assert losses.shape == (3, 2) and losses[2, 0] == losses[0, 0] and losses[2, 1] < losses[0, 1]
    assert torch.equal(weights[1][0], start[0]) and not torch.equal(weights[1][1], start[1])


# -- what the paper says, at tiny sizes


def fitted(records, name):
    return fits.line(name, records, lambda r: r[name]).exponent[0]


@pytest.fixture(scope="module")
def trained():
    """line -> records at three widths."""
    data = images(40, 64)
    return {
        line: [
            {"line": line, "width": n, "trial": t, **r}
            for n in (32, 128, 512)
            for t, r in enumerate(trainings.trained(trainings.LINES[line], data, n, 60, [0, 1]))
        ]
        for line in ("mup", "ntp", "adam-plain")
    }


def test_slopes_of_fig_2(trained):
    for axis, wanted in {"A": 0, "B": 0, "C": 0, "D": -0.5}.items():
        assert fitted(trained["mup"], axis) == pytest.approx(wanted, abs=0.2), axis
        assert fitted(trained["ntp"], axis) < wanted - 0.3, axis
    assert fitted(trained["mup"], "C at init") == pytest.approx(-0.5, abs=0.3)
    assert fig2.obeys(trained["mup"]) and not fig2.obeys(trained["ntp"]) and not fig2.obeys(trained["adam-plain"])


def test_assumptions_of_figs_4_to_6(trained):
    for record in trained["mup"]:
        assert all(0.3 < record[f"sum {kind}{layer}"] <= 1.0001 for kind in "Wh" for layer in (1, 2, 3))
        assert all(0.5 < record[f"phi{layer} {when}"] < 0.9 for layer in (1, 2) for when in ("before", "after"))
    assert abs(fitted(trained["mup"], "own before")) < 0.3


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("classes", [2, 10])
def test_a_batch_of_one_is_exact(activation, classes):
    data = images(64, classes=classes)
    (record,) = gradients.measured(data, activation, 32, 5, [0])
    for when in ("random", "trained"):
        for quantity, values in record[when].items():
            assert values[0] == [1, pytest.approx(1, abs=1e-3)], quantity
            assert [B for B, _ in values] == [1, 2, 4, 8, 16, 32, 64] and values[-1][1] != 1
        assert all(value < 10 for _, value in record[when]["stable rank"])


def test_a_gradient_is_the_product_that_fig_3_splits():
    data = images(16)
    weights = network.initial("spectral", (48, 12, 12, 1), 0, 12, [0, 1])
    found = gradients.quantities(data.inputs, data.targets, weights, "relu")
    passed = network.forward(weights, data.inputs)
    back = network.backward(weights, passed, data.targets)
    dW = back.g[1][0].mT @ passed.inputs[1][0]
    S = torch.linalg.svdvals(dW)
    assert float(found["stable rank"][0]) == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-3)


def test_ntp_becomes_mup():
    for width, same in ((1, True), (30, False)):
        (record,) = ntp_mup.compared(images(), width, 30, [0])
        assert record["difference"] <= 1e-10 and record["same start"] is same and len(record["curve"]) == 31
    assert record["moved up"] > 1e-3
    assert record["moved down"] < record["moved up"] / 20  # the paper's direction
    broken = [W.double() for W in network.initial("ntp", (48, 30, 30, 1), 0, 30, [0])]
    assert (
        float(
            ntp_mup._difference(
                ntp_mup._start("mup", (48, 30, 30, 1), 0, 30, [1]), broken, images().inputs.double(), 30
            )
        )
        > 0.1
    )


def with_width(width, records):
    return [{"width": width, "trial": i, **r} for i, r in enumerate(records)]


def test_table_1_and_the_gradient_identities():
    data = images(40, 64)
    records = [r for n in (32, 128, 512) for r in with_width(n, table1.measured(data, n, [0, 1, 2]))]
    found = {one.name: one for one in table1.lines(records)}
    assert len(found) == 22
    for one in found.values():
        assert one.exponent[0] == pytest.approx(one.bounds.predicted, abs=0.25), one.name


@pytest.mark.parametrize("optimizer", list(appb.OPTIMIZERS))
def test_lemma_1_and_proposition_4(optimizer):
    data = images(40, 64)
    records = [
        {"optimizer": optimizer, **r}
        for n in (32, 128, 512)
        for r in with_width(n, appb.measured(data, optimizer, n, 20, [0, 1]))
    ]
    for quantity in appb.CLAIMS:
        for one in appb.lines(records, quantity):
            assert abs(one.exponent[0]) < 0.15, (quantity, one)
    assert all(r["trained"]["leading"][0] == pytest.approx(1 / r["trained"]["F/2"][0], rel=1e-3) for r in records)


@pytest.mark.parametrize(("what", "layer"), uniqueness.CHANGED)
def test_only_the_condition_neither_blows_up_nor_freezes(what, layer):
    data, words = images(40, 64), {}
    for delta in (-1.0, 0.0, 1.0):
        records = [
            r for n in (32, 128, 512) for r in with_width(n, uniqueness.measured(data, what, layer, delta, n, [0, 1]))
        ]
        words[delta] = uniqueness.verdict(*uniqueness.extremes(records))
    assert words == {-1.0: "freezes", 0.0: "neither", 1.0: "blows up"}


def test_the_best_rate_transfers_under_condition_1():
    data = images(40, 64)
    best = {}
    for name in ("sgd-sp", "adam", "adam-sp"):
        method = transfer.METHODS[name]
        for n in (32, 256):
            made = [{"grid": list(method.grid), **r} for r in transfer.trained(data, method, n, 15, [0, 1, 2])]
            best[name, n] = transfer.best(made)
    shifts = {name: best[name, 256] - best[name, 32] for name in ("sgd-sp", "adam", "adam-sp")}
    assert abs(shifts["adam"]) <= 2 and shifts["sgd-sp"] <= -3 and shifts["adam-sp"] <= -3, shifts


def test_a_rate_that_diverges_is_none_and_never_the_best():
    found = [{"grid": [0, 1, 2], "losses": [0.5, 0.1, 0.2]}, {"grid": [0, 1, 2], "losses": [0.5, None, 0.2]}]
    assert transfer.best(found) == 2 and transfer.means(found) == pytest.approx([0.5, math.inf, 0.2])
    method = transfer.METHODS["sgd"]._replace(grid=range(18, 20))
    (record,) = transfer.trained(images(), method, 8, 12, [0])
    assert record["losses"] == [None, None]
