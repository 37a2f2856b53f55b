"""What the functions of shapes predict, against norms measured on random matrices and on networks trained on digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from typing import NamedTuple

import pytest
import torch
from optim.textbook import batches
from torch import Tensor, nn
from widths import size, slope

import spectral_kernels as sk
from spectral_kernels import scaling
from spectral_kernels.optim.modules import named_roles
from spectral_kernels.optim.roles import matrices

SHAPES = [(m, m // r) for m, r in ((512, 1), (512, 2), (512, 4), (1024, 8), (1024, 16))]
SHAPES += [(n, m) for m, n in SHAPES[1:]]
WIDTHS, SEEDS = (64, 128, 256, 512), 5
FLAT = 0.15  # exponents come in halves


def spectral(A: Tensor) -> float:
    A = A.double()
    gram = A @ A.mT if A.shape[-2] < A.shape[-1] else A.mT @ A
    return math.sqrt(float(torch.linalg.eigvalsh(gram).max()))


def measured(A: Tensor) -> scaling.Sizes:
    norm, frobenius = spectral(A), float(A.double().norm())
    return scaling.Sizes(frobenius**2 / norm**2, norm, frobenius, float(A.double().square().mean().sqrt()))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gaussian_matrices(m, n):
    """sigma (sqrt(m) + sqrt(n)) exceeds the norm by its fluctuations, of order m^(-2/3): 2 % at these sizes."""
    A = torch.randn(m, n)
    one = math.sqrt(m / n)
    assert spectral(A) == pytest.approx(scaling.gaussian_norm(m, n), rel=0.03)
    ratio = 1 + math.sqrt(min(m, n) / max(m, n))
    assert spectral(A) * scaling.parametrization("spectral", m, n).sigma == pytest.approx(ratio * one, rel=0.03)
    assert spectral(A) * scaling.exact_init_std(m, n) == pytest.approx(one, rel=0.03)
    assert spectral(A * scaling.init_gain(spectral(A), m, n, sigma=3)) == pytest.approx(3 * one)
    assert measured(A).stable_rank == pytest.approx(scaling.gaussian_stable_rank(m, n), rel=0.06)


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_conversions_hold_for_every_matrix(rank):
    """Table 1's columns are tied by definitions: from any one of them and the stable rank, the others."""
    A = torch.randn(60, rank) @ torch.randn(rank, 90) * torch.logspace(0, 2, 90)
    found = measured(A)
    for given in scaling.SIZES:
        for wanted in scaling.SIZES:
            got = scaling.convert(getattr(found, given), given, wanted, 60, 90, found.stable_rank)
            assert got == pytest.approx(getattr(found, wanted))
    assert scaling.sizes(60, 90, found.stable_rank, found.spectral) == pytest.approx(found)


@pytest.mark.parametrize("outputs", scaling.VECTORS)
@pytest.mark.parametrize("inputs", scaling.VECTORS)
@pytest.mark.parametrize(("m", "n"), [(9, 3), (3, 9), (4, 4)])
def test_natural_norms_by_brute_force(m, n, inputs, outputs):
    """The largest output over random inputs and their best neighbours, each measured as its kind is."""

    def length(x: Tensor, kind: str) -> Tensor:  # (..., d) -> (...)
        return x.square().mean(-1).sqrt() if kind == "dense" else x.norm(dim=-1)

    A, x = torch.randn(m, n, dtype=torch.float64), torch.randn(2000, n, dtype=torch.float64)
    best = 0.0
    for spread in torch.logspace(0, -3, 12):
        ratio = length(x @ A.mT, outputs) / length(x, inputs)
        best = max(best, float(ratio.max()))
        top = x[ratio.argmax()]
        x = top / top.norm() + spread * torch.randn(2000, n, dtype=torch.float64)
        x[0] = top
    assert spectral(A) * scaling.natural_factor(m, n, inputs, outputs) == pytest.approx(best, rel=1e-3)
    assert spectral(A) * scaling.natural_factor(m, n, inputs, outputs) >= best * (1 - 1e-9)


def test_natural_norm_of_a_table_for_one_hot_inputs():
    """Orthogonal columns: the largest output over one-hot inputs is exactly the natural norm."""
    A = torch.linalg.qr(torch.randn(32, 20, dtype=torch.float64)).Q * torch.linspace(1, 5, 20)
    dense = max(float((A @ e).square().mean().sqrt()) for e in torch.eye(20, dtype=torch.float64))
    assert spectral(A) * scaling.natural_factor(32, 20, "sparse", "dense") == pytest.approx(dense)
    goal = scaling.natural_target(32, 20, "sparse")
    assert max(float((A * goal / 5 @ e).square().mean().sqrt()) for e in torch.eye(20).double()) == pytest.approx(1)


# Networks on digits, 64-n-n-10.


def shapes(width: int) -> list[tuple[int, int]]:
    return [(width, 64), (width, width), (10, width)]


def network(width: int, seed: int, name: str = "spectral") -> nn.Sequential:
    """Gaussian weights of sqrt(2) sigma, biases of one half."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for (m, n), place in zip(shapes(width), scaling.LAYERS, strict=True):
        layer = nn.Linear(n, m)
        sigma = math.sqrt(2) * scaling.parametrization(name, m, n, layer=place).sigma
        with torch.no_grad():
            layer.weight.copy_(sigma * torch.randn(m, n, generator=draw))
            layer.bias.fill_(0.5)
        model.extend([layer, nn.ReLU()] if place != "output" else [layer])
    return model


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0].flatten(1)), batch[1])


UPDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sgd": lambda W, G: G,
    "entrywise": lambda W, G: G.sign(),
    "frobenius": lambda W, G: G / G.norm(dim=(-2, -1), keepdim=True),
    "spectral": lambda W, G: G / spectral(G),
    "orthogonal": lambda W, G: sk.orthogonalize(G),
    "frobenius_proportional": lambda W, G: W.norm() * G / G.norm(),
}


class Step(NamedTuple):
    """The last of some steps, of one parameter as a matrix; inputs: of its layer."""

    start: Tensor
    W: Tensor
    G: Tensor
    dW: Tensor
    inputs: Tensor


@cache
def steps_of(rule: str, width: int, seed: int, steps: int) -> list[Step]:
    """Weights and biases in turn, moved by 0.1 rate_factor times the rule's update."""
    model, data = network(width, seed), batches(64, seed)
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda layer, args, out, name=name: seen.update({name: args[0].detach()}))
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        model.zero_grad()
        loss_of(model, next(data)).backward()
        last = []
        for (name, p), p0 in zip(model.named_parameters(), start, strict=True):
            kind = "matrix" if p.ndim == 2 else "vector"
            W0, W, G = (x.reshape(len(p), -1) for x in (p0, p.detach(), p.grad))
            dW = -0.1 * scaling.rate_factor(rule, kind, *W.shape) * UPDATES[rule](W, G)
            inputs = seen[name.partition(".")[0]] if kind == "matrix" else torch.ones(1, 1)
            last.append(Step(W0, W + dW, G.clone(), dW, inputs))
        for p, step in zip(model.parameters(), last, strict=True):
            p.data += step.dW.reshape(p.shape)
    return last


def exponents(value: Callable[[Step], float | Sequence[float]], rule: str, steps: int) -> Tensor:
    """(parameters[, values]) in the width, of the median over SEEDS networks."""
    values = [[[value(s) for s in steps_of(rule, n, seed, steps)] for seed in range(SEEDS)] for n in WIDTHS]
    y, x = torch.tensor(values, dtype=torch.float64).median(1).values.log(), torch.tensor(WIDTHS).double().log()
    return torch.tensordot(x - x.mean(), y, 1) / (x - x.mean()).square().sum()


def over_target(A: Tensor) -> float:
    return spectral(A) / scaling.rms_to_rms(*A.shape)


@pytest.mark.parametrize(("rule", "total"), [("sgd", 10), ("entrywise", 3)])
def test_table_1_of_updates(rule, total):
    """One step's dW, and W - W_0, for SGD once its first steps count for little: stable rank one, entries of 1 / n."""
    rows = [[scaling.update_sizes(*shape) for shape in shapes(width)] for width in WIDTHS]
    wanted = torch.tensor([[slope(WIDTHS, [row[i][k] for row in rows]) for k in (1, 2, 3)] for i in range(3)])
    for steps, change in ((3, lambda s: measured(s.dW)[1:]), (total, lambda s: measured(s.W - s.start)[1:])):
        got = exponents(change, rule, steps)[::2].float()
        torch.testing.assert_close(got, wanted, rtol=0, atol=FLAT)


def test_table_1_of_weights():
    """Random ones, the thin ones wide enough that 1 + sqrt(min / max) has settled; training keeps their exponents."""
    for shape, widths in (
        (lambda n: (n, 64), (512, 1024, 4096)),
        (lambda n: (n, n), (64, 128, 512)),
        (lambda n: (10, n), (512, 1024, 4096)),
    ):
        table = [scaling.weight_sizes(*shape(n)) for n in widths]
        found = [measured(scaling.init_std(*shape(n)) * torch.randn(shape(n))) for n in widths]
        for k in (1, 2, 3):
            slopes = [slope(widths, [row[k] for row in rows]) for rows in (found, table)]
            assert slopes[0] == pytest.approx(slopes[1], abs=FLAT)
    before, after = (exponents(lambda s, i=i: measured(s[i])[1:], "sgd", 10)[::2] for i in (0, 1))
    torch.testing.assert_close(after, before, rtol=0, atol=0.1)


def test_gradients_have_the_size_of_eq_20():
    assert exponents(lambda s: spectral(s.G) / scaling.gradient_norm(*s.G.shape), "sgd", 3).abs().max() < FLAT


@pytest.mark.parametrize("rule", scaling.UPDATE_RULES)
def test_rates_bring_updates_to_condition_1(rule):
    """||dW||_2 / sqrt(m / n) and the change of what a layer puts out, for matrices and vectors."""
    assert exponents(lambda s: over_target(s.dW), rule, 3).abs().max() < FLAT
    assert exponents(lambda s: float((s.inputs @ s.dW.mT).square().mean().sqrt()), rule, 3).abs().max() < FLAT


def test_proportional_updates_need_the_rank():
    """Without 1 / sqrt(min(m, n)) the square matrix moves by sqrt(n) too much; the factor is ||dW||_F / ||W||_F."""
    factor = scaling.proportional_factor
    plain = exponents(lambda s: over_target(s.dW) / factor(*s.dW.shape), "frobenius_proportional", 3)
    assert float(plain[2]) == pytest.approx(0.5, abs=FLAT)
    for step in steps_of("frobenius_proportional", 128, 0, 1)[::2]:
        m, n = step.dW.shape
        assert float(step.dW.norm() / step.start.norm()) == pytest.approx(0.1 * factor(m, n), rel=1e-5)
        table = scaling.update_sizes(m, n).frobenius / scaling.weight_sizes(m, n).frobenius
        assert table == pytest.approx(factor(m, n))


class Pixels(nn.Module):
    """Ink or no ink at each of 64 places: 128 tokens."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(128, n), nn.Linear(n, n), nn.Linear(n, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.arange(0, 128, 2) + (x > 0).long()
        return self.head(self.hidden(8 * self.embedding(tokens).mean(1)).relu())


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


def convolutional(n: int) -> nn.Module:
    first = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, n, 3), nn.ReLU())
    return nn.Sequential(first, nn.Conv2d(n, n, 3, groups=4), nn.ReLU(), nn.Flatten(2), Mean(), nn.Linear(n, 10))


@pytest.mark.parametrize("rule", ["sgd", "entrywise", "frobenius"])
@pytest.mark.parametrize(("build", "widths"), [(Pixels, WIDTHS), (convolutional, (32, 64, 128, 256))])
def test_rates_of_embeddings_and_convolutions(build, widths, rule):
    """Sizes as widths.size has them: slices by their positions, tables by their longest row."""
    runs: dict[str, dict[int, list[float]]] = {}
    for width in widths:
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            model, data = build(width), batches(64, seed)
            sk.init_model_(model, gain=math.sqrt(2), seed=seed)
            for _ in range(3):
                model.zero_grad()
                loss_of(model, next(data)).backward()
                before = {name: p.detach().clone() for name, p in model.named_parameters()}
                for entry in named_roles(model):
                    p, role = entry.parameter, entry.role
                    held = matrices(p.grad, role) if role.kind in ("matrix", "conv") else [p.grad.reshape(-1, 1)]
                    for G in held:
                        G.copy_(UPDATES[rule](G, G))
                    p.data -= 0.1 * role.rate_factor(rule) * p.grad
            for name, p in model.named_parameters():
                value = size(model, name, p.detach() - before[name])
                runs.setdefault(name, {}).setdefault(width, []).append(value)
    found = {name: slope(widths, [median(by[width]) for width in widths]) for name, by in runs.items()}
    assert {name: p for name, p in found.items() if abs(p) > FLAT} == {}


HIDDEN = {"spectral": 0.0, "mup": 0.0, "ntp": -0.5, "sp": 0.5}  # exponent of ||dW||_2 over Condition 1


@pytest.mark.parametrize("name", scaling.PARAMETRIZATIONS)
def test_parametrizations_in_one_step_of_sgd(name):
    """The readout's norm is 1 instead of 1 / sqrt(n) under SP and NTP; hidden steps blow up or vanish accordingly.

    At these widths 1 + sqrt(10 / n), a factor of the readout and of all that comes back through it, costs 0.1.
    """
    hidden, readout = [], []
    for width in WIDTHS:
        model = network(width, 0, name)
        loss_of(model, next(batches(64))).backward()
        eta = scaling.parametrization(name, width, width).eta
        hidden.append(over_target(eta * model[2].weight.grad))
        readout.append(over_target(model[4].weight.detach()))
    assert slope(WIDTHS, hidden) == pytest.approx(HIDDEN[name], abs=0.2)
    assert slope(WIDTHS, readout) == pytest.approx(0.5 if name in ("sp", "ntp") else 0.0, abs=0.2)


def test_the_readout_of_sp_does_not_shrink():
    widths = (256, 1024, 4096)
    for name, wanted in (("sp", 0.0), ("ntp", 0.0), ("spectral", -0.5), ("mup", -0.5)):
        sigma = [scaling.parametrization(name, 10, n, layer="output").sigma for n in widths]
        norms = [spectral(s * torch.randn(10, n)) for s, n in zip(sigma, widths, strict=True)]
        assert slope(widths, norms) == pytest.approx(wanted, abs=FLAT)
    assert slope(widths, [scaling.rms_to_rms(10, n) for n in widths]) == pytest.approx(-0.5)


def test_ntp_becomes_mup_by_its_output_and_rate():
    """Output / sqrt(n) and rate x n: the same network, step by step, in float64 (paper, section 5.3)."""
    n, outputs = 48, {}
    x, y = (t.double() for t in next(batches(32)))
    x, y = x.flatten(1), y.sub(4.5).sign()[:, None]
    for name, share in (("mup", 1.0), ("ntp", 1 / math.sqrt(n))):
        draw, rates = torch.Generator().manual_seed(3), []
        weights = []
        for (rows, cols), place in zip([(n, 64), (n, n), (1, n)], scaling.LAYERS, strict=True):
            sigma, eta = scaling.parametrization(name, rows, cols, layer=place)
            weights.append(sigma * torch.randn(rows, cols, generator=draw, dtype=torch.float64))
            rates.append(0.1 * eta * (n if name == "ntp" else 1))
        for _ in range(10):
            weights = [W.requires_grad_() for W in weights]
            out = share * (((x @ weights[0].mT).relu() @ weights[1].mT).relu() @ weights[2].mT)
            grads = torch.autograd.grad((out - y).square().mean() / 2, weights)
            weights = [W.detach() - rate * G for W, rate, G in zip(weights, rates, grads, strict=True)]
            outputs.setdefault(name, []).append(out.detach())
    torch.testing.assert_close(torch.stack(outputs["mup"]), torch.stack(outputs["ntp"]), rtol=0, atol=1e-12)
    assert float((outputs["mup"][-1] - outputs["mup"][0]).abs().max()) > 0.1
