"""init_model_: exact norms, outputs that do not depend on width, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from widths import MODELS, slices, slope

import spectral_kernels as sk

TOL = 1e-3
SEEDS = 4
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16, padding_idx=3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.wide = nn.Linear(40, 12)
        self.conv = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 12, 2, groups=4)
        self.norm = nn.BatchNorm2d(12)
        self.slope = nn.PReLU()
        self.loose = nn.Parameter(torch.ones(3, 4))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))


def norms(module: nn.Module, leaf: str = "weight") -> Tensor:
    return torch.linalg.matrix_norm(slices(module, leaf, getattr(module, leaf).detach().double()), 2)


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_matrix_has_its_norm(gain, dtype):
    model = Mixed().to(dtype)
    sk.init_model_(model, gain=gain)
    tol = (
        TOL + 2 * torch.finfo(dtype).eps
    )  # rounding of the entries moves a norm by eps / 2 at most, and by chance less
    for got, wanted in (
        (norms(model.wide), math.sqrt(12 / 40)),
        (norms(model.attention, "in_proj_weight"), 1.0),  # query, key and value each, not the fused matrix
        (norms(model.attention.out_proj), 1.0),
        (norms(model.conv), math.sqrt(6 / (4 * 9))),
        (norms(model.up), math.sqrt(3 / (2 * 4))),
    ):
        torch.testing.assert_close(got, torch.full_like(got, gain * wanted), rtol=tol, atol=0)
    rows = model.embedding.weight.detach().double().square().mean(1).sqrt()
    assert float(rows[3]) == 0
    rest = torch.cat([rows[:3], rows[4:]])
    torch.testing.assert_close(rest, torch.full_like(rest, gain), rtol=tol, atol=0)
    assert not model.wide.bias.any() and not model.attention.in_proj_bias.any() and (model.norm.weight == 1).all()


def test_what_is_left_alone_and_reported():
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = sk.init_model_(model, where=lambda name, p: not name.startswith("up"))
    left = {row.name: row.reason for row in report.left}
    assert left == {
        "loose": "unknown module (Mixed)",
        "up.weight": "where",
        "up.bias": "where",
        "slope.weight": "slope of PReLU",
        "frozen.weight": "requires_grad=False",
        "frozen.bias": "requires_grad=False",
        "normed.parametrizations.weight.original0": "Linear, parametrized weight",
        "normed.parametrizations.weight.original1": "Linear, parametrized weight",
    }
    as_torch_has_it = {"norm.weight", "norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in left or name in as_torch_has_it), name
    assert {row.name for row in report} | set(left) == set(before)


def test_the_report_is_measured():
    model = Mixed()
    with torch.no_grad():
        model.wide.weight.copy_(3 * torch.eye(12, 40))
    report = sk.init_model_(model)
    row = {row.name: row for row in report}["wide.weight"]
    assert row.before == pytest.approx(3) and row.target == pytest.approx(math.sqrt(12 / 40))
    assert row.after == pytest.approx(float(norms(model.wide)), rel=TOL) and row.kind == "matrix"
    text = str(report)
    assert len(text.splitlines()) == len(report) + len(report.left) + 5  # two heads of two lines, one line between
    assert "wide.weight" in text and "left as it was" in text and "slope of PReLU" in text


def test_a_sample_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    small = nn.ModuleDict({"a": nn.Linear(20, 30)})
    large = nn.ModuleDict({"b": nn.Linear(20, 30), "a": nn.Linear(20, 30)})
    sk.init_model_(small, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    sk.init_model_(large, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(small["a"].weight, large["a"].weight) and not torch.equal(large["a"].weight, large["b"].weight)
    sk.init_model_(large, seed=6)
    assert not torch.equal(small["a"].weight, large["a"].weight)


def test_entries_are_normal():
    layer = nn.Linear(400, 300, bias=False)
    sk.init_model_(layer)
    x = layer.weight.detach().double().flatten()
    x = (x - x.mean()) / x.std()
    # standard errors of skewness and excess kurtosis of 120,000 normal numbers: sqrt(6 / N) = .007, sqrt(24 / N) = .014
    assert abs(float(x.pow(3).mean())) < 0.035 and abs(float(x.pow(4).mean()) - 3) < 0.07


def test_memory_order_is_kept():
    model = nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)
    sk.init_model_(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    got = norms(model)
    torch.testing.assert_close(got, torch.full_like(got, math.sqrt(12 / 72)), rtol=TOL, atol=0)


def test_launches_bounded_in_size_change_nothing(monkeypatch):
    one, many = Mixed(), Mixed()
    sk.init_model_(one)
    monkeypatch.setattr("spectral_kernels.initialization.LAUNCH_ENTRIES", 500)
    sk.init_model_(many)
    for name in ("wide.weight", "conv.weight", "up.weight", "embedding.weight"):
        torch.testing.assert_close(one.get_parameter(name), many.get_parameter(name), rtol=TOL, atol=0)


def test_a_tied_weight_is_a_matrix_and_set_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 16), "head": nn.Linear(16, 50, bias=False)})
    model["head"].weight = model["embedding"].weight
    (row,) = sk.init_model_(model)
    assert (row.name, row.kind) == ("embedding.weight", "matrix")
    assert float(norms(model["head"])) == pytest.approx(math.sqrt(50 / 16), rel=TOL)


@pytest.mark.parametrize("name", [*MODELS])
def test_output_sizes_do_not_depend_on_width(name):
    """Every hidden layer's mean square output over a factor of 4 in width; the readout's shrinks by design."""
    build, widths, batch = MODELS[name]
    x, _ = batch()
    squares: dict[str, list[float]] = {}

    def note(layer: str, output: Tensor) -> None:
        squares[layer][-1] += float(output.square().mean()) / SEEDS

    for width in widths:
        for seed in range(SEEDS):
            model = build(width)
            sk.init_model_(model, seed=seed)
            for layer, module in model.named_modules():
                if isinstance(module, LAYERS) and layer != "attention.out_proj":  # its forward is never called
                    if seed == 0:
                        squares.setdefault(layer, []).append(0.0)
                    module.register_forward_hook(lambda m, i, out, layer=layer: note(layer, out))
            with torch.no_grad():
                model(x)
    *hidden, (_, last) = squares.items()
    for layer, values in hidden:
        # exponents of sizes come in halves, so those of squares are whole numbers
        assert abs(slope(widths, values)) < 0.4 and min(values) > 1e-3, (layer, values)
    assert last[-1] < last[0]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_slices_add_in_quadrature(kernel):
    """A convolution's output is as large as that of a Linear of its channels, whatever its kernel."""
    conv, linear = nn.Conv2d(128, 128, kernel, bias=False), nn.Linear(128, 128, bias=False)
    sk.init_model_(conv), sk.init_model_(linear)
    with torch.no_grad():
        got, wanted = conv(torch.randn(4, 128, 8, 8)).std(), linear(torch.randn(400, 128)).std()
    assert float(got / wanted) == pytest.approx(1, abs=0.05)


def test_bad_arguments():
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="gain"):
        sk.init_model_(model, gain=0.0)
    with pytest.raises(TypeError, match="seed"):
        sk.init_model_(model, seed=1.5)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        sk.init_model_([model])
    with pytest.raises(ValueError, match="weight is not initialized yet"):
        sk.init_model_(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="weight is a DTensor or on the meta device"):
        sk.init_model_(nn.Linear(3, 4, device="meta"))
