"""param_groups: rates that make real steps of torch's optimizers independent of width, and what groups promise."""

from __future__ import annotations

import copy
import io
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from widths import MODELS, mlp, size, slope

import spectral_kernels as sk
from spectral_kernels.optim import ParamGroups, SpectralOptimizer, describe, param_groups

OPTIMIZERS = {  # name: (class, base rate)
    "sgd": (torch.optim.SGD, 0.1),
    "asgd": (torch.optim.ASGD, 0.1),
    "adam": (torch.optim.Adam, 0.1),
    "adamw": (torch.optim.AdamW, 0.1),
    "adamax": (torch.optim.Adamax, 0.1),
    "nadam": (torch.optim.NAdam, 0.1),
    "radam": (torch.optim.RAdam, 0.1),
    "rmsprop": (torch.optim.RMSprop, 0.1),
    "adagrad": (torch.optim.Adagrad, 0.1),
    "adafactor": (torch.optim.Adafactor, 0.01),
}
FLAT = 0.25  # exponents of Condition 1 come in halves: a wrong one is off by .5 or more
SEEDS = 3


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


@cache
def exponents(name: str, optimizer: str, plain: bool = False) -> dict[str, float]:
    """parameter -> p of (size of one step's change, dense spectra) ~ width^p; median of SEEDS runs (plain: one)."""
    build, widths, batch = MODELS[name]
    kind, lr = OPTIMIZERS[optimizer]
    sizes: dict[str, list[float]] = {}
    for width in widths:
        runs: dict[str, list[float]] = {}
        for seed in range(1 if plain else SEEDS):
            torch.manual_seed(seed)
            model = build(width)
            sk.init_model_(model, seed=seed)
            torch.manual_seed(100 + seed)
            opt = kind(model.parameters() if plain else param_groups(model, optimizer, lr), lr=lr, weight_decay=0)
            before = {key: p.detach().clone() for key, p in model.named_parameters()}
            loss(model, *batch()).backward()
            opt.step()
            for key, p in model.named_parameters():
                runs.setdefault(key, []).append(size(model, key, p.detach() - before[key]))
        for key, values in runs.items():
            sizes.setdefault(key, []).append(sorted(values)[len(values) // 2])
    return {key: slope(widths, values) for key, values in sizes.items()}


@pytest.mark.parametrize("name", [*MODELS])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_step_is_as_large_at_every_width(name, optimizer):
    assert {k: p for k, p in exponents(name, optimizer).items() if abs(p) > FLAT} == {}


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad", "adamax", "nadam"])
def test_other_entrywise_optimizers(optimizer):
    assert {k: p for k, p in exponents("mlp", optimizer).items() if abs(p) > FLAT} == {}


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_adafactor(name):
    assert {k: p for k, p in exponents(name, "adafactor").items() if abs(p) > FLAT} == {}
    assert exponents(name, "adafactor", plain=True)["2.weight" if name == "mlp" else "up.weight"] > 0.4


def test_without_the_groups_it_is_not():
    """What the factors undo, so that the tests above cannot pass by themselves."""
    adamw = exponents("transformer", "adamw", plain=True)
    hidden = ("attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight", "head.weight")
    assert {key: round(adamw[key]) for key in hidden} == dict.fromkeys(hidden, 1)
    assert round(exponents("conv", "adamw", plain=True)["body.weight"]) == 1
    sgd = exponents("conv", "sgd", plain=True) | exponents("transformer", "sgd", plain=True)
    vectors = ("stem.weight", "stem.bias", "norm.weight", "depthwise.weight", "embedding.weight", "down.bias")
    assert {key: round(sgd[key]) for key in vectors} == dict.fromkeys(vectors, -1)
    assert round(exponents("mlp", "sgd", plain=True)["4.weight"]) == 1


@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (128, 128)])
def test_muon_has_its_own_factor_taken_out(shape):
    """torch's Muon scales its rate by sqrt(max(1, m / n)); together: ||dW||_2 = lr sqrt(m / n), up to its 5 steps."""
    model = nn.Linear(*reversed(shape), bias=False)
    opt = torch.optim.Muon(param_groups(model, "muon", 0.1), momentum=0.0, weight_decay=0.0, nesterov=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(shape)
    opt.step()
    got = torch.linalg.matrix_norm(model.weight.detach() - before, 2) / (0.1 * math.sqrt(shape[0] / shape[1]))
    assert 0.8 < float(got) < 1.35  # the range of Muon's iteration: singular values .7 to 1.2


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
@pytest.mark.parametrize("named", [False, True])
def test_torchs_optimizers_accept_the_groups(optimizer, named):
    build, _, batch = MODELS["conv"]
    model, (kind, lr) = build(16), OPTIMIZERS[optimizer]
    groups = param_groups(model, optimizer, lr, weight_decay=0.01, named=named)
    opt = kind(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    start = [group["lr"] for group in opt.param_groups]
    for _ in range(2):
        opt.zero_grad()
        loss(model, *batch()).backward()
        opt.step()
        scheduler.step()
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.25 * lr for lr in start])
    assert start == pytest.approx([lr * group["factor"] for group in opt.param_groups])
    if named:
        names = [name for group in opt.param_groups for name in group["param_names"]]
        assert sorted(names) == sorted(before)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = kind(param_groups(copy.deepcopy(model), optimizer, lr, named=named))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [g["factor"] for g in other.param_groups] == [g["factor"] for g in opt.param_groups]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adafactor"])
def test_weights_decay_alike(optimizer):
    """With a zero gradient every parameter shrinks by 1 - lr wd, whatever its factor."""
    model, (kind, _) = mlp(64), OPTIMIZERS[optimizer]
    opt = kind(param_groups(model, optimizer, 0.1, weight_decay=0.2))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), (1 - 0.1 * 0.2) * old)


def test_decay_that_joins_the_gradient_compares_with_it():
    """Adam's wd W against G, as spectral norms: the same share at every width."""
    _, widths, batch = MODELS["mlp"]
    shares: dict[str, list[float]] = {}
    for width in widths:
        model = mlp(width)
        sk.init_model_(model)
        torch.manual_seed(0)
        loss(model, *batch()).backward()
        decay = {id(p): g["weight_decay"] for g in param_groups(model, "adam", weight_decay=0.1) for p in g["params"]}
        for key, p in model.named_parameters():
            if p.ndim == 2:
                share = decay[id(p)] * torch.linalg.matrix_norm(p.detach(), 2) / torch.linalg.matrix_norm(p.grad, 2)
                shares.setdefault(key, []).append(float(share))
    assert {key: p for key in shares if abs(p := slope(widths, shares[key])) > FLAT} == {}


def test_decay_choices():
    model = nn.Linear(8, 6)

    def decay(optimizer, **options):
        groups = param_groups(model, optimizer, weight_decay=0.1, **options)
        return {p.ndim: group["weight_decay"] for group in groups for p in group["params"]}

    assert decay("adamw") == pytest.approx({2: 0.8, 1: 0.1})  # 0.1 n
    assert decay("adam") == decay("adamw", decoupled=False) == pytest.approx({2: 0.1 * 8 / 6, 1: 0.1 / 6})  # 0.1 n / m
    assert decay("nadam", decoupled=True) == decay("adamw")
    assert decay("spectral") == {2: 0.1, 1: 0.1}
    groups = param_groups(model, "adamw", weight_decay={"matrix": 0.1})
    assert {p.ndim: g["weight_decay"] for g in groups for p in g["params"]} == pytest.approx({2: 0.8, 1: 0})


def test_eps_shrinks_as_gradients_do():
    build, widths, batch = MODELS["conv"]
    ratios: dict[str, list[float]] = {}
    for width in widths:
        runs: dict[str, float] = {}
        for seed in range(SEEDS):
            model = build(width)
            sk.init_model_(model, seed=seed)
            torch.manual_seed(seed)
            loss(model, *batch()).backward()
            groups = param_groups(model, "adamw", eps=1e-6)
            eps = {id(p): group["eps"] for group in groups for p in group["params"]}
            for key, p in model.named_parameters():
                runs[key] = runs.get(key, 0) + float(p.grad.square().mean()) / eps[id(p)] ** 2
        for key, value in runs.items():
            ratios.setdefault(key, []).append(math.sqrt(value))
    assert {key: p for key in ratios if abs(p := slope(widths, ratios[key])) > FLAT} == {}
    assert all("eps" not in group for group in param_groups(mlp(8), "adamw"))


def test_groups_for_the_spectral_optimizer():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(9, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "conv": nn.Conv2d(8, 8, 3, groups=2),
            "up": nn.ConvTranspose1d(8, 4, 2),
            "norm": nn.LayerNorm(8),
        }
    )
    groups = param_groups(model, "spectral", 0.3, weight_decay=0.1, named=True)
    options = {
        name: {k: v for k, v in group.items() if k != "params"} for group in groups for name, _ in group["params"]
    }
    assert all((o.pop("lr"), o.pop("weight_decay")) == (0.3, 0.1) for o in options.values())
    vector, matrix = {"kind": "vector"}, {"kind": "matrix"}
    assert options == {
        "table.weight": {"kind": "embedding"},
        "attention.in_proj_weight": {"kind": "matrix", "split_sizes": [8, 8, 8]},
        "attention.in_proj_bias": vector,
        "attention.out_proj.weight": matrix,
        "attention.out_proj.bias": vector,
        "conv.weight": {"kind": "conv", "groups": 2},
        "conv.bias": vector,
        "up.weight": {"kind": "conv", "transposed": True},
        "up.bias": vector,
        "norm.weight": {"kind": "gain"},
        "norm.bias": vector,
    }


def test_groups_are_merged_in_the_models_order():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 8))
    model[1].bias.requires_grad_(False)
    groups = param_groups(model, "adamw", named=True)
    assert [(group["kind"], [name for name, _ in group["params"]]) for group in groups] == [
        ("matrix", ["0.weight", "1.weight"]),
        ("vector", ["0.bias", "2.bias", "3.bias"]),
        ("gain", ["2.weight"]),
        ("matrix", ["3.weight"]),
    ]
    assert [group["factor"] for group in groups] == [1 / 8, 1, 1, 1 / 4]
    plain = param_groups(model, "adamw")
    named = [pair for group in groups for pair in group["params"]]
    assert all(p is q for p, (_, q) in zip((p for g in plain for p in g["params"]), named, strict=True))
    assert plain.names == groups.names == [name for name, _ in named]


def test_the_partition_does_not_depend_on_the_values():
    """So that a checkpoint loads after a change of the rate or the decay."""
    model = MODELS["transformer"][0](16)

    def partition(**options):
        return [[name for name, _ in group["params"]] for group in param_groups(model, named=True, **options)]

    for optimizer in ("adam", "adamw", "sgd", "spectral"):
        some = [{}, {"lr": 0.0}, {"weight_decay": 0.1}, {"weight_decay": {"matrix": 0.1}}]
        one, *others = (partition(optimizer=optimizer, **options) for options in some)
        assert all(other == one for other in others)


def test_fused_and_separate_projections_have_one_rate():
    fused, separate = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2, kdim=8)
    for optimizer in ("sgd", "adamw", "adafactor"):
        one = describe(param_groups(fused, optimizer, 1.0))["in_proj_weight"].lr
        assert one == describe(param_groups(separate, optimizer, 1.0))["q_proj_weight"].lr


def test_heads_do_not_slow_sgd():
    """Blocks of rows share a gradient whose entries are 1 / (all rows)."""
    model = nn.Linear(8, 24)
    heads = param_groups(model, "sgd", 1.0, overrides={"weight": {"num_heads": 6}})
    assert describe(heads)["weight"].lr == describe(param_groups(model, "sgd", 1.0))["weight"].lr == 24 / 8


def test_kinds_share_a_model_between_optimizers():
    model = MODELS["transformer"][0](16)
    muon = param_groups(model, "muon", 0.1, kinds=["matrix"])
    rest = param_groups(model, "adamw", 0.1, kinds=["vector", "gain", "embedding"])
    torch.optim.Muon(muon), torch.optim.AdamW(rest)
    names = [row.name for groups in (muon, rest) for row in describe(groups)]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {row.reason for row in describe(muon).skipped} == {"kind 'vector'", "kind 'gain'", "kind 'embedding'"}


def test_description():
    model = nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Conv2d(4, 6, 3), "frozen": nn.Linear(2, 2, bias=False)})
    model.register_parameter("loose", nn.Parameter(torch.ones(3, 5)))
    model.register_parameter("none", nn.Parameter(torch.ones(0, 5)))
    model["frozen"].requires_grad_(False)
    groups = param_groups(model, "adamw", 0.5, overrides={"a.bias": {"kind": "skip"}})
    got = describe(groups)
    assert isinstance(groups, ParamGroups) and got is groups.describe() and len(got) == 4
    assert [row.name for row in got] == ["loose", "a.weight", "b.weight", "b.bias"]
    row = got["b.weight"]
    assert (row.shape, row.role.kind, row.role.why, row.role.positions) == ((6, 4, 3, 3), "conv", "Conv2d", 9)
    assert row.factor == pytest.approx(1 / 36) and row.lr == pytest.approx(0.5 / 36)
    assert got.by_shape == ["loose"]
    assert {row.name: row.reason for row in got.skipped} == {
        "a.bias": "kind 'skip'",
        "frozen.weight": "requires_grad=False",
        "none": "empty",
    }
    lines = str(got).splitlines()
    assert lines[0].split() == "parameter shape kind why fan_out fan_in matrices factor lr".split()
    assert next(line for line in lines if "b.weight" in line).split() == [
        *("b.weight", "6x4x3x3", "conv", "Conv2d", "6", "4", "9", "0.02778", "0.01389")
    ]
    assert "By shape alone: loose." in lines[-1]
    with pytest.raises(KeyError):
        got["a.bias"]
    with pytest.raises(TypeError, match="what param_groups returns, not list"):
        describe(list(groups))


def test_a_tensor_lr():
    model, lr = mlp(8), torch.tensor(0.5)
    groups = param_groups(model, torch.optim.AdamW, lr)
    opt = torch.optim.AdamW(groups)
    assert all(isinstance(g["lr"], Tensor) and float(g["lr"]) == 0.5 * g["factor"] for g in opt.param_groups)
    assert float(lr) == 0.5


def test_the_rate_and_the_decay_of_the_spectral_optimizer_may_be_given_to_either():
    """A group's option goes before the optimizer's: one that nobody gave must not be in the group."""
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32))
    given = {"lr": 0.02, "weight_decay": 0.1}
    for opt in (
        SpectralOptimizer(param_groups(model), **given),
        SpectralOptimizer(param_groups(model, **given), lr=0.5, weight_decay=0.3),
    ):
        assert all(group[key] == value for group in opt.param_groups for key, value in given.items())
        assert opt.describe()["0.weight"].lr == pytest.approx(0.02 * 2)
    opt = SpectralOptimizer(param_groups(model, weight_decay={"matrix": 0.1}), weight_decay=0.3)
    decays = {group["kind"]: group["weight_decay"] for group in opt.param_groups}
    assert decays == {"matrix": 0.1, "vector": 0, "gain": 0}
    assert str(param_groups(model).describe()).splitlines()[2].split()[-1] == "2"  # the factor; no rate is known yet
    assert {group["lr"] / group["factor"] for group in param_groups(model, "adamw")} == {1e-3}


def test_optimizers_by_class():
    class Custom(torch.optim.RMSprop):
        pass

    for kind, factor in ((Custom, 1 / 8), (torch.optim.SGD, 6 / 8), (torch.optim.AdamW, 1 / 8)):
        assert describe(param_groups(nn.Linear(8, 6), kind))["weight"].factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "lbfgs"}, ValueError, "no update rule is known for optimizer 'lbfgs'.*adamw"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "no update rule"),
        ({"optimizer": 3}, TypeError, "a name or a class, not int"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one element"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
        ({"weight_decay": {"bias": 0.1}}, ValueError, "weight_decay's kind must be one of"),
        ({"optimizer": "sgd", "eps": 1e-8}, ValueError, "eps goes with entrywise optimizers, not 'sgd'"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"kinds": ["matrices"]}, ValueError, "kinds must be one of 'matrix'"),
        ({"kinds": "matrix"}, TypeError, "kinds must be a collection of kinds, not str"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        param_groups(nn.Linear(3, 4), **{"optimizer": "adamw", **options})


def test_bad_models():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not generator"):
        param_groups(nn.Linear(3, 4).parameters(), "adamw")
    model = nn.Module()
    model.register_parameter("deep", nn.Parameter(torch.ones(1, 1, 1, 1, 1, 2)))
    with pytest.raises(ValueError, match="deep: no kind is known for shape .* name one in overrides"):
        param_groups(model, "adamw")
    assert len(param_groups(model, "adamw", overrides={"deep": {"kind": "vector"}})) == 1
