"""Rules of shapes, against their definitions and against what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_kernels import scaling

SHAPES = [(1, 1), (30, 20), (20, 30), (4096, 1024), (1024, 4096), (1, 1000)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_definitions(m, n):
    assert scaling.rms_to_rms(m, n) == pytest.approx(math.sqrt(m / n))
    assert scaling.original(m, n) == pytest.approx(math.sqrt(max(1, m / n)))
    assert scaling.match_rms_adamw(m, n) == pytest.approx(0.2 * math.sqrt(max(m, n)))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_target_by_name_or_number(m, n):
    values = {rule: scaling.target(rule, m, n) for rule in scaling.RULES}
    assert values == {
        "rms_to_rms": scaling.rms_to_rms(m, n),
        "original": scaling.original(m, n),
        "match_rms_adamw": scaling.match_rms_adamw(m, n),
        "none": 1.0,
    }
    assert scaling.target(3, m, n) == 3.0 and isinstance(scaling.target(3, m, n), float)


@pytest.mark.parametrize("rule", ["", "rms", "Original"])
def test_unknown_rules(rule):
    with pytest.raises(ValueError, match="unknown rule .*rms_to_rms, original, match_rms_adamw, none"):
        scaling.target(rule, 3, 4)


def test_rms_to_rms_keeps_sizes():
    """Condition 1: an operator of this norm takes entries of RMS 1 to entries of RMS at most 1, and reaches it."""
    for m, n in ((64, 32), (32, 64)):
        W = torch.linalg.qr(torch.randn(max(m, n), min(m, n), dtype=torch.float64)).Q
        W = (W if m >= n else W.mT) * scaling.rms_to_rms(m, n)
        x = torch.linalg.svd(W).Vh[0] * math.sqrt(n)
        assert float((W @ x).square().mean().sqrt()) == pytest.approx(1)


def test_match_rms_adamw_is_an_rms_of_a_fifth():
    """An orthogonal matrix times this factor has entries of RMS 0.2."""
    m, n = 96, 40
    Q = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q
    assert float((Q * scaling.match_rms_adamw(m, n)).square().mean().sqrt()) == pytest.approx(0.2)


M, N, K = 96, 40, 9
TABLE = {  # rule: (matrix, conv, vector, gain, embedding of 1000, scalar), from the paper's table and its extensions
    "sgd": (M / N, M / (N * K), M, M, M, 1),
    "entrywise": (1 / N, 1 / (N * K), 1, 1, 1, 1),
    "frobenius": (math.sqrt(M / N), math.sqrt(M / N) / K, math.sqrt(M), math.sqrt(M), math.sqrt(M), 1),
    "spectral": (math.sqrt(M / N), math.sqrt(M / N) / K, math.sqrt(M), 1, math.sqrt(M), 1),
    "orthogonal": (math.sqrt(M / N), math.sqrt(M / N) / K, math.sqrt(M), 1, math.sqrt(M), 1),
    "frobenius_proportional": (1 / math.sqrt(N), 1 / math.sqrt(M), 1, 1, 1 / math.sqrt(M), 1),
}


@pytest.mark.parametrize("rule", scaling.UPDATE_RULES)
def test_rate_factors(rule):
    arguments = ((M, N), (M, N, K), (M, 1), (M, M), (M, 1000), (1, 1))
    got = [scaling.rate_factor(rule, kind, *args) for kind, args in zip(scaling.KINDS, arguments, strict=True)]
    assert got == pytest.approx(TABLE[rule])


def test_known_optimizers_have_known_rules():
    assert set(scaling.OPTIMIZER_RULES.values()) <= set(scaling.UPDATE_RULES)
    assert all(name == name.lower() for name in scaling.OPTIMIZER_RULES)


def test_unknown_update_rules_and_kinds():
    with pytest.raises(ValueError, match="unknown update rule 'adam': expected one of sgd, entrywise"):
        scaling.rate_factor("adam", "matrix", 3, 4)
    with pytest.raises(ValueError, match="unknown kind 'bias': expected one of matrix, conv"):
        scaling.rate_factor("sgd", "bias", 3, 4)


@pytest.mark.parametrize(
    ("rule", "update"),
    [
        ("entrywise", torch.sign),
        ("frobenius", lambda G: G / torch.linalg.matrix_norm(G)),
        ("spectral", lambda G: G / torch.linalg.matrix_norm(G, 2)),
        ("sgd", lambda G: G),
    ],
)
@pytest.mark.parametrize(("m", "n"), [(64, 256), (256, 64), (512, 512), (10, 400)])
def test_an_update_of_a_low_rank_gradient_meets_condition_1(rule, update, m, n):
    """A rank-one gradient of the size that Eq. 20 gives it: factor x update has spectral norm sqrt(m / n), up to 1."""
    G = torch.outer(torch.randn(m, dtype=torch.float64), torch.randn(n, dtype=torch.float64))
    G *= math.sqrt(n / m) / torch.linalg.matrix_norm(G, 2)
    norm = float(torch.linalg.matrix_norm(scaling.rate_factor(rule, "matrix", m, n) * update(G), 2))
    assert norm == pytest.approx(math.sqrt(m / n))


@pytest.mark.parametrize(("m", "n"), [(512, 512), (512, 32), (32, 512), (2048, 128)])
def test_init_std_meets_condition_1_within_two(m, n):
    """||W||_2 = (1 + sqrt(min / max)) sqrt(m / n) under the simplified Parametrization 1, up to a few %."""
    W = scaling.init_std(m, n) * torch.randn(m, n, dtype=torch.float64)
    ratio = float(torch.linalg.matrix_norm(W, 2)) / math.sqrt(m / n)
    assert ratio == pytest.approx(1 + math.sqrt(min(m, n) / max(m, n)), rel=0.05)


@pytest.mark.parametrize(
    ("channels", "kernel", "wanted"), [((64, 4), 3, 1.0), ((64, 64), 3, 1 / 3), ((64, 64), 1, 1.0)]
)
def test_init_std_of_a_convolution(channels, kernel, wanted):
    """Its output has RMS min(1, sqrt(m / (n K))): fan_in is what one output entry sums over."""
    m, n = channels
    W = scaling.init_std(m, n, kernel**2) * torch.randn(m, n, kernel, kernel)
    out = torch.nn.functional.conv2d(torch.randn(16, n, 12, 12), W)
    assert float(out.square().mean().sqrt()) == pytest.approx(wanted, rel=0.1)
    assert scaling.init_norm(m, n, kernel**2) == pytest.approx(math.sqrt(m / n) / kernel)


def test_parametrizations_of_the_papers_network():
    """Figure 2, 3072-n-n-1, without its sqrt(2); and, beside it, what a layer of other sides has."""
    n0, n = 3072, 256
    layers = dict(zip(scaling.LAYERS, ((n, n0), (n, n), (1, n)), strict=True))

    def table(name: str) -> list[tuple[float, float]]:
        return [scaling.parametrization(name, *sides, layer=layer) for layer, sides in layers.items()]

    fan_in = (n0, n, n)
    for name, wanted in {
        "mup": [(1 / math.sqrt(n0), n / n0), (1 / math.sqrt(n), 1), (1 / n, 1 / n)],
        "ntp": [(1 / math.sqrt(k), 1 / k) for k in fan_in],
        "sp": [(1 / math.sqrt(k), 1) for k in fan_in],
        "spectral": [(math.sqrt(n) / n0, n / n0), (1 / math.sqrt(n), 1), (1 / n, 1 / n)],
    }.items():
        assert [*map(pytest.approx, table(name))] == wanted, name
    assert scaling.parametrization("mup", 1, 1, layer="input") == scaling.parametrization("ntp", 1, 1)  # n = 1
    assert scaling.parametrization("spectral", 64, 16, 9, 2) == pytest.approx((math.sqrt(64 / 144) / 12, 128 / 144))
    # ten outputs: their number is constant, so it counts as 1 inside the min
    assert scaling.parametrization("mup", 10, n, layer="output") == pytest.approx((1 / n, 10 / n))


def test_natural_factors_are_not_those_that_eq_30_prints():
    m, n = 12, 75
    found = [scaling.natural_factor(m, n, *sides) for sides in (("dense", "dense"), ("sparse", "dense"))]
    assert found == pytest.approx([math.sqrt(n / m), 1 / math.sqrt(m)])
    assert scaling.natural_factor(m, n, "dense", "sparse") == pytest.approx(math.sqrt(n))
    assert scaling.natural_factor(m, n, "sparse", "sparse") == 1
    assert scaling.natural_target(m, n) == pytest.approx(scaling.rms_to_rms(m, n))


def test_table_1():
    m, n = 20, 80
    one = math.sqrt(m / n)
    weight = (m, one, math.sqrt(m * m / n), math.sqrt(m) / n)
    assert scaling.weight_sizes(m, n) == pytest.approx(weight)
    assert scaling.update_sizes(m, n) == pytest.approx((1, one, one, 1 / n))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaling.parametrization("muP", 3, 4), "parametrization 'muP': expected one of spectral, sp, ntp, mup"),
        (lambda: scaling.parametrization("mup", 3, 4, layer="first"), "layer 'first': .* input, hidden, output"),
        (lambda: scaling.natural_factor(3, 4, "one-hot"), "vector 'one-hot': expected one of dense, sparse"),
        (lambda: scaling.convert(1.0, "rms", "spectral", 3, 4, 1), "size 'rms': .* spectral, frobenius, rms_entry"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=f"unknown {message}"):
        call()
