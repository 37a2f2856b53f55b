"""init_model_: exact norms, outputs that do not depend on width, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from widths import MODELS, slices, slope

import spectral_kernels as sk
from spectral_kernels import scaling
from spectral_kernels.initialization import SAMPLES, spectral_init_

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


def dense(W: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(W.detach().double(), 2)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 30), (7, 90), (3, 2, 20, 50), (1, 8), (1, 1)])
def test_spectral_init(shape, dtype, sample):
    W = nn.Parameter(torch.full(shape, math.nan, dtype=dtype))
    assert spectral_init_(W, 1.5, sample=sample) is W and W.dtype == dtype and W.grad_fn is None
    got, wanted = dense(W), 1.5 * math.sqrt(shape[-2] / shape[-1])
    tol = TOL + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, torch.full_like(got, wanted), rtol=tol, atol=0)
    stack = W.detach().reshape(-1, *shape[-2:])
    assert all(not torch.equal(stack[0], other) for other in stack[1:])


def test_samples_have_their_distributions():
    """Excess kurtosis of normal entries 0, of uniform ones -1.2; orthogonal: all singular values alike."""
    for sample, kurtosis in (("normal", 0.0), ("uniform", -1.2)):
        x = spectral_init_(torch.empty(400, 300), sample=sample).double().flatten()
        assert abs(float(x.mean() / x.std())) < 0.015  # 5 standard errors
        assert float(((x - x.mean()) / x.std()).pow(4).mean()) - 3 == pytest.approx(kurtosis, abs=0.07)
    for m, n in ((60, 40), (40, 60)):
        W = spectral_init_(torch.empty(m, n, dtype=torch.float64), sample="orthogonal")
        values = torch.linalg.svdvals(W)
        torch.testing.assert_close(values, torch.full_like(values, math.sqrt(m / n)), rtol=TOL, atol=0)


def test_orthogonal_samples_prefer_no_sign():
    """LAPACK's reflections alone would make most first entries negative; errors of the means are 0.008 at most."""
    W = spectral_init_(torch.empty(8000, 3, 2), sample="orthogonal", target=1.0)
    assert float(W.mean(0).abs().max()) < 0.04


def test_orthogonal_samples_keep_lengths_and_normal_ones_some():
    """Claim 1: ||W h|| = ||W|| ||h|| for a tall orthogonal W, sqrt(m) / (sqrt(m) + sqrt(n)) of it for a Gaussian."""
    h = torch.randn(256, 50)
    for sample, wanted in (("orthogonal", 1.0), ("normal", 1 / (1 + math.sqrt(256 / 512)))):
        W = spectral_init_(torch.empty(512, 256), sample=sample)
        ratio = (W @ h).norm(dim=0) / (math.sqrt(2) * h.norm(dim=0))
        assert float(ratio.mean()) == pytest.approx(wanted, rel=0.03)


def test_where_the_numbers_come_from():
    def new(**options) -> Tensor:
        return spectral_init_(torch.empty(12, 9), **options)

    torch.manual_seed(4)
    first, second = new(), new()
    torch.manual_seed(4)
    assert torch.equal(new(), first) and not torch.equal(first, second)  # as torch.nn.init
    state = torch.get_rng_state()
    assert torch.equal(new(seed=7), new(seed=7)) and not torch.equal(new(seed=7), new(seed=8))
    draw = torch.Generator().manual_seed(1)
    a, b = new(generator=draw), new(generator=draw)
    assert not torch.equal(a, b) and torch.equal(a, new(generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    pair = [torch.empty(12, 9), torch.empty(12, 9)]
    assert spectral_init_(pair, seed=7) is pair and not torch.equal(*pair)
    half = spectral_init_(torch.empty(12, 9, dtype=torch.bfloat16), seed=7)
    assert torch.equal(half, new(seed=7).bfloat16())  # the same numbers, rounded


def test_targets_strides_and_empty_matrices():
    for target, wanted in ((3.0, 3.0), ("original", 1.0), ("none", 1.0)):
        assert float(dense(spectral_init_(torch.empty(10, 40), 2.0, target=target))) == pytest.approx(
            2 * wanted, rel=TOL
        )
    W = torch.zeros(30, 40)
    spectral_init_(W.mT[::2, ::3])
    assert float(dense(W.mT[::2, ::3])) == pytest.approx(math.sqrt(20 / 10), rel=TOL)
    assert int((W != 0).sum()) == 200
    assert spectral_init_(torch.empty(0, 3)).shape == (0, 3) and spectral_init_([]) == []
    torch.testing.assert_close(dense(spectral_init_(torch.empty(9, 9), tol=1e-5)).item(), 1.0, rtol=1e-5, atol=0)


def test_spectral_init_refuses():
    W = torch.full((3, 4), 2.0)
    for options, message in (
        ({"sample": "cauchy"}, "sample must be one of 'normal', 'orthogonal', 'uniform', not 'cauchy'"),
        ({"gain": 0.0}, "gain must be a finite number above 0"),
        ({"target": "rms"}, "target must be a number or one of"),
        ({"tol": 0.0}, "tol must lie in"),
        ({"seed": 1, "generator": torch.Generator()}, "give seed or generator, not both"),
    ):
        with pytest.raises(ValueError, match=message):
            spectral_init_(W, **options)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        spectral_init_(torch.empty(3))
    with pytest.raises(TypeError, match="complex"):
        spectral_init_(torch.empty(3, 4, dtype=torch.complex64))
    with pytest.raises(TypeError, match="meta device"):
        spectral_init_(torch.empty(3, 4, device="meta"))
    assert (W == 2).all()


# What other parametrizations than Eq. 16 draw.


@pytest.mark.parametrize("name", ["sp", "ntp", "mup"])
def test_gaussian_parametrizations(name):
    """Entries of gain x sigma: of every block, of every slice with fan_in x positions, of embeddings 1."""
    model = nn.ModuleDict(
        {
            "first": nn.Linear(300, 40),
            "attention": nn.MultiheadAttention(64, 2),
            "conv": nn.Conv2d(64, 32, 3, groups=2),
            "table": nn.Embedding(90, 64, padding_idx=3),
            "last": nn.Linear(400, 10),
        }
    )
    gain = math.sqrt(2)
    report = {row.name: row for row in sk.init_model_(model, parametrization=name, gain=gain)}
    for path, args, layer in (
        ("first", (40, 300), "input"),
        ("attention.in_proj", (64, 64), "hidden"),
        ("attention.out_proj", (64, 64), "hidden"),
        ("conv", (16, 32, 9), "hidden"),
        ("table", (64, 1), "hidden"),
        ("last", (10, 400), "output"),
    ):
        key = f"{path}_weight" if path.endswith("in_proj") else f"{path}.weight"
        W, sigma = model.get_parameter(key).detach(), scaling.parametrization(name, *args, layer=layer).sigma
        drawn = W[torch.arange(90) != 3] if path == "table" else W
        errors = math.sqrt(1 / (2 * drawn.numel()))
        assert float(drawn.square().mean().sqrt()) == pytest.approx(gain * sigma, rel=4 * errors)
        assert report[key].std == pytest.approx(gain * sigma)
        assert report[key].layer == (layer if name == "mup" and path != "table" else "")
        if path == "table":
            assert not W[3].any()
        elif path != "conv":
            assert report[key].after == pytest.approx(float(dense(W.reshape(-1, args[0], args[1])).max()), rel=TOL)
            assert report[key].target == pytest.approx(gain * math.sqrt(args[0] / args[1]))
    assert not model["first"].bias.any() and report["first.bias"].std is None


def test_the_report_shows_what_sp_does_to_a_readout():
    """Condition 1 asks for sqrt(10 / 1000) and SP has 1 + sqrt(10 / 1000)."""
    report = sk.init_model_(nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10)), parametrization="sp")
    row = {row.name: row for row in report}["1.weight"]
    assert row.target == pytest.approx(0.1) and row.after == pytest.approx(1.1, rel=0.05)
    head, _, first = str(report).splitlines()[:3]
    assert head.split()[-1] == "std" and first.split()[-1] == f"{1 / math.sqrt(1000):.4g}"


def test_the_layers_of_mup():
    def of(model: nn.Module, **options) -> dict[str, str]:
        return {row.name: row.layer for row in sk.init_model_(model, parametrization="mup", **options) if row.layer}

    plain = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 2), "d": nn.Linear(6, 3)})
    assert of(plain) == {"a.weight": "input", "b.weight": "hidden", "c.weight": "hidden", "d.weight": "output"}
    assert of(plain, layers={"c.*": "output"})["c.weight"] == "output"
    some = of(plain, where=lambda name, p: name[0] in "bc")  # what is not chosen keeps its place
    assert some == {"b.weight": "hidden", "c.weight": "hidden"}
    table = nn.ModuleDict({"e": nn.Embedding(9, 6), "b": nn.Linear(6, 6), "head": nn.Linear(6, 9, bias=False)})
    assert of(table) == {"b.weight": "hidden", "head.weight": "output"}
    table["head"].weight = table["e"].weight
    assert of(table) == {"e.weight": "output", "b.weight": "hidden"}
    later = nn.ModuleDict({"b": table["b"], "e": table["e"], "head": table["head"]})
    assert of(later) == {"b.weight": "hidden", "e.weight": "output"}  # the embedding is the input
    assert of(nn.LayerNorm(3)) == {}


def test_parametrizations_refuse():
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="parametrization must be one of 'spectral', 'sp', 'ntp', 'mup', not 'muP'"):
        sk.init_model_(model, parametrization="muP")
    with pytest.raises(ValueError, match="layers goes with parametrization='mup', not 'sp'"):
        sk.init_model_(model, parametrization="sp", layers={"weight": "input"})
    with pytest.raises(ValueError, match="layers must be one of 'input', 'hidden', 'output', not 'last'"):
        sk.init_model_(model, parametrization="mup", layers={"weight": "last"})
    with pytest.raises(ValueError, match="layers: 'head' matches no matrix or convolution"):
        sk.init_model_(model, parametrization="mup", layers={"head": "output"})
