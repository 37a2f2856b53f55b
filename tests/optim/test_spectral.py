"""What SpectralOptimizer does to every kind of parameter, against formulas; every step of training against Eq. 17."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import spectral_kernels as sk
from spectral_kernels import scaling
from spectral_kernels.kernels import registry
from spectral_kernels.optim import SpectralOptimizer, param_groups
from tests.optim.textbook import batches, convolutional, loss_of, mlp, same, textbook_step_, train

EXACT = dict(rtol=1e-6, atol=1e-9)  # matrices whose shorter side fits into three blocks of 4: the basis is complete


def native(dtype=torch.float32):
    return registry.choose("tracked_step_", "cpu", dtype, 4).backend != "reference"


def close(a, b, dtype):
    """Bit for bit where native kernels serve; the reference multiplies matrices in batches, whose rounding differs."""
    if native(dtype):
        return same(a, b)
    return torch.allclose(a.double(), b.double(), **EXACT)


def parameter(*shape, dtype=torch.float64, scale=1.0):
    p = nn.Parameter(torch.randn(shape, dtype=dtype) * scale)
    p.grad = torch.randn(shape, dtype=dtype)
    return p


def matrices_of(X, kind, groups):
    """(k, m, n), as copies."""
    if kind == "conv":
        return X.reshape(groups, -1, *X.shape[1:]).movedim((3, 4), (0, 1)).flatten(0, 2)
    return X.reshape(1, X.shape[0], -1) if kind == "matrix" else X.reshape(1, 1, -1)


@pytest.mark.parametrize(("build", "momentum"), [(mlp, 0.95), (mlp, 0.0), (convolutional, 0.9)])
def test_a_hundred_training_steps_are_the_textbook_s(build, momentum):
    """Each step from the state that training has reached, every matrix by itself."""
    model = build().double()
    groups = param_groups(model, lr=0.1)
    known = {id(p): (g["kind"], g.get("groups", 1)) for g in groups for p in g["params"]}
    opt = SpectralOptimizer(groups, momentum=momentum)
    params = list(model.parameters())
    M = [torch.zeros_like(p) for p in params]
    data, errors, losses, reads = batches(), [], [], []
    for _ in range(100):
        opt.zero_grad()
        loss = loss_of(model, next(data))
        loss.backward()
        losses.append(float(loss.detach()))
        before = [p.detach().clone() for p in params]
        opt.step()
        for p, m, old in zip(params, M, before, strict=True):
            wanted = old.clone()
            textbook_step_(wanted, p.grad, m, 0.1, momentum, *known[id(p)])
            moved, right = (matrices_of(x - old, *known[id(p)]) for x in (p.detach(), wanted))
            errors.append((moved - right).norm(dim=(1, 2)) / right.norm(dim=(1, 2)))
        reads += [info.reads for _, info in opt.last_step() if info.tracked]
    errors = torch.cat(errors)
    assert float(errors.max()) <= 0.01
    assert float(errors.quantile(0.99)) <= 0.002
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), "this was no training run"
    assert float(torch.cat(reads).mean()) <= 2.05


def spectral(X):
    return float(torch.linalg.svdvals(X)[0])


def by_hand(G, *, kind, transposed=False, groups=1, num_heads=None, split_sizes=None):
    """The first update of size 1, written out slice by slice."""
    out = torch.zeros_like(G)
    if kind == "vector":
        for part, into in zip(*(x.flatten().split(split_sizes or G.numel()) for x in (G, out)), strict=True):
            into.copy_(math.sqrt(part.numel()) * part / part.norm())
        return out
    if kind == "gain":
        return G / G.abs().max()
    if kind == "embedding":
        return G / (G.norm(dim=-1).max() / math.sqrt(G.shape[-1]))
    if kind == "conv":
        share = G.shape[0] // groups
        for position in itertools.product(*map(range, G.shape[2:])):
            for g in range(groups):
                where = (slice(g * share, (g + 1) * share), slice(None), *position)
                X = G[where].T if transposed else G[where]  # (out / g, in / g)
                unit = math.sqrt(X.shape[0] / X.shape[1]) * X / spectral(X) / math.prod(G.shape[2:])
                out[where] = unit.T if transposed else unit
        return out
    for index in itertools.product(*map(range, G.shape[:-2])):
        X = G[index].T if transposed else G[index]
        rows = split_sizes or [X.shape[0] // (num_heads or 1)] * (num_heads or 1)
        unit = torch.cat([math.sqrt(len(x) / x.shape[1]) * x / spectral(x) for x in X.split(rows)])
        out[index] = unit.T if transposed else unit
    return out


KINDS = [
    ((), "vector", {}),
    ((7,), "vector", {}),
    ((2, 5), "vector", {}),
    ((9,), "vector", {"split_sizes": [4, 5]}),
    ((6,), "gain", {}),
    ((2, 3), "gain", {}),
    ((9, 4), "embedding", {}),
    ((2, 5, 4), "embedding", {}),
    ((6, 4), "matrix", {}),
    ((4, 9), "matrix", {}),
    ((1, 5), "matrix", {}),
    ((5, 1), "matrix", {}),
    ((4, 9), "matrix", {"transposed": True}),
    ((3, 6, 4), "matrix", {}),
    ((2, 3, 4, 5), "matrix", {}),
    ((12, 5), "matrix", {"num_heads": 3}),
    ((5, 12), "matrix", {"num_heads": 3, "transposed": True}),
    ((9, 6), "matrix", {"split_sizes": [2, 3, 4]}),
    ((2, 9, 6), "matrix", {"split_sizes": [2, 7]}),
    ((6, 4, 2, 3), "conv", {}),
    ((6, 4, 5), "conv", {}),
    ((4, 3, 2, 2, 2), "conv", {}),
    ((6, 4, 3, 3), "conv", {"groups": 2}),
    ((8, 1, 3, 3), "conv", {"groups": 8}),
    ((6, 4, 2, 2), "conv", {"transposed": True}),
    ((6, 4, 2, 2), "conv", {"transposed": True, "groups": 3}),
]


@pytest.mark.parametrize(("shape", "kind", "options"), KINDS, ids=str)
def test_every_kind(shape, kind, options):
    p = parameter(*shape)
    before, G = p.detach().clone(), p.grad.clone()
    opt = SpectralOptimizer([{"params": [p], "kind": kind, **options}], lr=0.3)
    opt.step()
    torch.testing.assert_close(p.detach() - before, -0.3 * by_hand(G, kind=kind, **options), **EXACT)
    assert same(p.grad, G), "the gradient was written to"
    for _ in range(3):  # as the momentum grows, so does what is divided by
        before, M = p.detach().clone(), opt.state[p]["momentum_buffer"]
        assert M.shape[0] == math.prod(shape[2:]) * options.get("groups", 1) if kind == "conv" else M.shape == p.shape
        G = 0.95 * G + p.grad
        opt.step()
        torch.testing.assert_close(p.detach() - before, -0.3 * by_hand(G, kind=kind, **options), **EXACT)


BARE = {(): "vector", (5,): "vector", (6, 4): "matrix", (3, 6, 4): "matrix", (6, 4, 2, 2): "conv"}
BARE[4, 3, 2, 2, 2] = "conv"


@pytest.mark.parametrize(("shape", "kind"), BARE.items())
def test_bare_parameters_are_taken_by_their_shape(shape, kind):
    p = parameter(*shape)
    before = p.detach().clone()
    SpectralOptimizer([p], lr=1.0).step()
    torch.testing.assert_close(p.detach() - before, -by_hand(p.grad, kind=kind), **EXACT)


@pytest.mark.parametrize("rule", [*scaling.RULES, 0.7])
@pytest.mark.parametrize("direction", ["normalize", "frobenius"])
def test_rules_and_directions(rule, direction):
    for shape in ((10, 3), (3, 10)):
        p = parameter(*shape)
        before = p.detach().clone()
        SpectralOptimizer([p], lr=0.5, rule=rule, direction=direction).step()
        moved = p.detach() - before
        size = spectral(moved) if direction == "normalize" else float(moved.norm())
        m, n = shape
        wanted = {"rms_to_rms": math.sqrt(m / n), "original": math.sqrt(max(1, m / n)), "none": 1.0}
        wanted["match_rms_adamw"] = 0.2 * math.sqrt(max(m, n))
        assert size == pytest.approx(0.5 * wanted.get(rule, rule), rel=1e-6)
        assert float((moved * p.grad).sum()) == pytest.approx(-float(moved.norm() * p.grad.norm())), "not along -G"


def test_nesterov_maximize_and_decay():
    p = parameter(8, 5)
    opt = SpectralOptimizer([p], lr=0.2, momentum=0.8, nesterov=True, maximize=True, weight_decay=0.5)
    M = torch.zeros_like(p)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        M = 0.8 * M - p.grad
        opt.step()
        wanted = (1 - 0.2 * 0.5) * before - 0.2 * by_hand(0.8 * M - p.grad, kind="matrix")
        torch.testing.assert_close(p.detach(), wanted, **EXACT)
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], M)


def test_the_decay_of_a_convolution_and_a_vector_is_unscaled():
    params = [parameter(6, 4, 3, 3), parameter(7), parameter(9, 3)]
    opt = SpectralOptimizer(params, lr=0.2, weight_decay=0.25)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad.zero_()
    opt.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * old)


def test_updates_are_never_longer_than_asked_with_the_upper_bound():
    p, q = parameter(40, 30), parameter(6, 5, 2, 2)
    opt = SpectralOptimizer([p, q], lr=0.1, momentum=0.5, safety="upper")
    sizes = []
    for step in range(12):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        if step == 7:  # a new direction, large
            p.grad += 30 * torch.randn(40, 1, dtype=p.dtype) * torch.randn(30, dtype=p.dtype)
        opt.step()
        sizes.append(spectral(p.detach() - before[0]) / (0.1 * math.sqrt(40 / 30)))
        slices = (q.detach() - before[1]).permute(2, 3, 0, 1)
        sizes += (torch.linalg.svdvals(slices)[..., 0] / (0.1 * math.sqrt(6 / 5) / 4)).flatten().tolist()
    assert max(sizes) <= 1 + 1e-12
    assert min(sizes) > 0.35, "the bound is useless"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"num_heads": 3}, {"split_sizes": [16, 24, 20]}])
def test_blocks_of_rows_are_matrices_of_their_own(options, dtype):
    whole = parameter(60, 30, dtype=dtype)
    rows = options.get("split_sizes", [20] * 3)
    parts = [nn.Parameter(x.detach().clone()) for x in whole.split(rows)]
    together = SpectralOptimizer([{"params": [whole], **options}], lr=0.1)
    apart = SpectralOptimizer(parts, lr=0.1)
    for _ in range(6):
        whole.grad = torch.randn_like(whole)
        for part, g in zip(parts, whole.grad.split(rows), strict=True):
            part.grad = g.clone()
        together.step()
        apart.step()
    if native(dtype) or dtype == torch.float64:
        assert close(whole.detach(), torch.cat([p.detach() for p in parts]), dtype)
    else:
        torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["rms_to_rms", 0.8])
def test_retract_keeps_the_norms_of_weights(target):
    params = [parameter(40, 30), parameter(30, 40), parameter(12, 6, 2, 2), parameter(9)]
    opt = SpectralOptimizer(params, lr=0.1, retract=target)
    before = params[3].detach().clone()
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        for p in params[:2]:
            assert spectral(p.detach()) == pytest.approx(scaling.target(target, *p.shape), rel=0.01)
        slices = torch.linalg.svdvals(params[2].detach().permute(2, 3, 0, 1))[..., 0]
        wanted = math.sqrt(2) / 4 if target == "rms_to_rms" else target
        torch.testing.assert_close(slices, torch.full_like(slices, wanted), rtol=0.01, atol=0)
    assert float((params[3].detach() - before).norm()) > 0.1  # a vector takes its steps


@pytest.mark.parametrize("build", [mlp, convolutional])
def test_models_in_one_optimizer_train_as_if_apart(build):
    dtype = torch.float32 if native() else torch.float64
    torch.manual_seed(3)
    models = [build().to(dtype) for _ in range(4)]
    models[2].load_state_dict(models[0].state_dict())
    models[3].load_state_dict(models[1].state_dict())
    together = SpectralOptimizer([p for model in models[:2] for p in model.parameters()], lr=0.05)
    apart = [SpectralOptimizer(model.parameters(), lr=0.05) for model in models[2:]]
    streams = [batches(seed=1), batches(seed=2)]
    for _ in range(6):
        given = [next(stream) for stream in streams]
        for model, batch in zip(models, [*given, *given], strict=True):
            model.zero_grad()
            loss_of(model, batch).backward()
        for opt in (together, *apart):
            opt.step()
    for one, other in ((models[0], models[2]), (models[1], models[3])):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert close(p.detach(), q.detach(), dtype)


@pytest.mark.parametrize("memory", ["channels_last", "kernel transposed", "sliced", "transposed"])
def test_parameters_of_any_strides(memory):
    shape = (9, 6) if memory == "transposed" else (6, 4, 3, 2)
    base = torch.randn(shape, dtype=torch.float64)
    laid = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "kernel transposed": lambda x: x.mT.contiguous().mT,
        "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "transposed": lambda x: x.mT.contiguous().mT,
    }[memory](base)
    p, q = nn.Parameter(laid), nn.Parameter(base.clone())
    one, other = SpectralOptimizer([p], lr=0.1), SpectralOptimizer([q], lr=0.1)
    for _ in range(3):
        q.grad = torch.randn_like(q)
        p.grad = q.grad.clone() if memory == "kernel transposed" else torch.empty_like(p).copy_(q.grad)
        one.step()
        other.step()
    assert not torch.equal(q.detach(), base)
    torch.testing.assert_close(p.detach(), q.detach(), **EXACT)


def test_gradients_of_any_strides():
    shapes = {(6, 4, 3, 2): "conv", (2, 5, 4): "embedding", (2, 3): "gain", (3, 6, 4): "matrix"}
    for shape, kind in shapes.items():
        p = parameter(*shape)
        q = nn.Parameter(p.detach().clone())
        p.grad = p.grad.permute(*reversed(range(p.ndim))).contiguous().permute(*reversed(range(p.ndim)))
        q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        for x in (p, q):
            SpectralOptimizer([{"params": [x], "kind": kind}], lr=0.1).step()
        torch.testing.assert_close(p.detach(), q.detach(), **EXACT)


def test_missing_gradients_frozen_and_skipped_parameters():
    params = [parameter(6, 4) for _ in range(4)]
    params[0].grad = None
    params[1].requires_grad_(False).grad = None
    before = [p.detach().clone() for p in params]
    opt = SpectralOptimizer([{"params": params[:2]}, {"params": [params[2]], "kind": "skip"}, {"params": [params[3]]}])
    opt.step()
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [True, True, True, False]
    assert list(opt.state) == [params[3]]
    params[0].grad = torch.randn_like(params[0])
    opt.step()  # a late first gradient, a second one beside it
    torch.testing.assert_close(params[0].detach() - before[0], -0.1 * by_hand(params[0].grad, kind="matrix"), **EXACT)
    assert [float(opt.state[params[i]]["step"]) for i in (0, 3)] == [1, 2]


def test_a_rate_that_is_a_tensor_is_read_at_every_step():
    lr = torch.tensor(0.1, dtype=torch.float64)
    p = parameter(8, 5)
    opt = SpectralOptimizer([p], lr=lr, weight_decay=0.1)
    for value in (0.1, 0.3, 0.0):
        lr.fill_(value)
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        M = 0.95 * opt.state[p]["momentum_buffer"] + p.grad if opt.state else p.grad
        opt.step()
        wanted = (1 - 0.1 * value) * before - value * by_hand(M, kind="matrix")
        torch.testing.assert_close(p.detach(), wanted, **EXACT)
    assert opt.param_groups[0]["lr"] is lr


@pytest.mark.parametrize(
    "build",
    [
        lambda opt: StepLR(opt, step_size=2, gamma=0.5),
        lambda opt: OneCycleLR(opt, max_lr=0.5, total_steps=8),
        lambda opt: ReduceLROnPlateau(opt, patience=0, factor=0.1),
    ],
    ids=["StepLR", "OneCycleLR", "ReduceLROnPlateau"],
)
def test_schedulers(build):
    p = parameter(9, 4)
    opt = SpectralOptimizer([p], lr=0.2, momentum=0.9)
    scheduler, rates, momenta, M = build(opt), [], [], torch.zeros_like(p)
    for _ in range(6):
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        opt.step()
        group = opt.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["momentum"])
        M = group["momentum"] * M + p.grad
        torch.testing.assert_close(p.detach() - before, -group["lr"] * by_hand(M, kind="matrix"), **EXACT)
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert len(set(rates)) >= 3
    assert (len(set(momenta)) > 1) == isinstance(scheduler, OneCycleLR)


def test_what_a_step_knew():
    p, b = parameter(40, 30), parameter(11)
    opt = SpectralOptimizer([p, b], lr=0.1)
    assert list(opt.last_step()) == []
    opt.step()
    found = dict(opt.last_step())
    assert list(map(len, (found, *(found[x].sigma for x in (p, b))))) == [2, 1, 1]
    for x, exact in ((p, spectral(p.grad)), (b, float(b.grad.norm()))):
        info = found[x]
        assert float(info.sigma) == pytest.approx(exact, rel=0.01) and float(info.sigma) <= exact * (1 + 1e-12)
        assert float(info.upper) >= exact * (1 - 1e-12)
        assert float(info.frob) == pytest.approx(float(x.grad.norm()))
        assert float(info.size) == pytest.approx(0.1 * scaling.rms_to_rms(x.shape[0], 30 if x is p else 1))
        assert 1 <= float(info.reads) <= 12 and info.tracked == (x is p)
    assert float(found[p].error) < 0.1
    p.grad, b.grad = torch.zeros_like(p), None
    opt.state[p]["momentum_buffer"].zero_()
    opt.step()
    ((only, info),) = opt.last_step()
    assert only is p and float(info.size) == 0


def test_describe_says_who_is_treated_how_and_why():
    model = nn.ModuleDict({"table": nn.Embedding(20, 8), "norm": nn.LayerNorm(8), "out": nn.Linear(8, 4)})
    model["out"].bias.requires_grad_(False)
    opt = SpectralOptimizer(param_groups(model, lr=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = opt.describe()
    assert {row.name: row.role.kind for row in table} == {
        "table.weight": "embedding", "norm.weight": "gain", "norm.bias": "vector", "out.weight": "matrix",
    }  # fmt: skip
    assert table["out.weight"].factor == pytest.approx(math.sqrt(0.5)) and table["out.weight"].role.why == "Linear"
    assert table["table.weight"].lr == pytest.approx(0.5 * math.sqrt(8)) or table["table.weight"].lr == 0.5
    assert [(row.name, row.reason) for row in table.skipped] == [("out.bias", "requires_grad=False")]
    bare = SpectralOptimizer([{"params": [parameter(6, 4)]}, {"params": [parameter(3)], "kind": "skip"}])
    with pytest.warns(UserWarning, match="1 parameters are taken by their shape alone"):
        table = bare.describe()
    assert (table[0] if isinstance(table, list) else next(iter(table))).role.why == "shape alone"
    assert [row.reason for row in table.skipped] == ["kind 'skip'"]
    assert "shape alone" in str(table)


def test_named_groups_give_their_names_to_descriptions_and_errors():
    model = mlp()
    opt = SpectralOptimizer(model.named_parameters())
    with pytest.warns(UserWarning, match="shape alone"):
        assert [row.name for row in opt.describe()] == [name for name, _ in model.named_parameters()]
    opt = SpectralOptimizer(param_groups(model, named=True), error_if_nonfinite=True)
    assert {row.name for row in opt.describe()} == {name for name, _ in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[3].weight.grad[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"non-finite gradients of 3\.weight; nothing was changed"):
        opt.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_does_what_the_optimizer_does(dtype):
    params = [parameter(12, 8, dtype=dtype), parameter(3, 6, 9, dtype=dtype)]
    weights = [p.detach().clone() for p in params]
    opt = SpectralOptimizer(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    states = [{}, {}]
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        back, results = sk.spectral_step_(
            weights, [p.grad for p in params], 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, state=states,
            return_info=True,
        )  # fmt: skip
        assert back is weights
    for p, w, state, result in zip(params, weights, states, results, strict=True):
        assert same(p.detach(), w)
        assert same(dict(opt.state[p]), state)
        assert result.info.shape[0] == (1 if p.ndim == 2 else 3)


def test_the_function_without_a_state_takes_first_steps():
    W, G = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    old = W.clone()
    assert sk.spectral_step_(W, G, torch.tensor(0.1)) is W
    sk.spectral_step_(W, -G, 0.1)
    torch.testing.assert_close(W, old, **EXACT)
    sk.spectral_step_(W, G, 0.1, split_sizes=[3, 5], retract=2.0)
    assert [spectral(x) for x in W.split([3, 5])] == pytest.approx([2.0, 2.0], rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"direction": "frobenius"}, {"nesterov": True, "block": 8}, {"rule": "original"}, {"safety": "upper"},
     {"momentum_dtype": torch.bfloat16}],
    ids=str,
)  # fmt: skip
def test_training_goes_on_under_every_option(options):
    model = mlp()
    sk.init_model_(model)
    losses = train(model, SpectralOptimizer(param_groups(model, lr=0.1), **options), 25, batches())
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
