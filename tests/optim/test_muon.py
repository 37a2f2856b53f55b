"""sk.optim.Muon against torch.optim.Muon, and against the polynomial of exact singular values, which it must be."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import spectral_kernels as sk
from spectral_kernels.optim import Muon
from tests.optim.polar import KELLER, distance, polar, spectrum, triples
from tests.optim.test_spectral import parameter
from tests.optim.textbook import same

TORCH = torch.optim.Muon
RULES = {"original": lambda m, n: max(1, m / n) ** 0.5, "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5}
RULES |= {"rms_to_rms": lambda m, n: (m / n) ** 0.5, "none": lambda m, n: 1.0}


def test_the_constructor_is_torch_s():
    theirs = list(inspect.signature(TORCH).parameters.values())
    mine = list(inspect.signature(Muon).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in mine[len(theirs) :])
    p = parameter(3, 2)
    other = TORCH([p]).param_groups[0]
    assert {key: Muon([p]).param_groups[0][key] for key in other} == other


REFUSED_ALIKE = [
    {"lr": -0.5}, {"lr": float("nan")}, {"lr": torch.ones(2)}, {"momentum": -0.1}, {"weight_decay": -1},
    {"adjust_lr_fn": "mup"},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED_ALIKE, ids=str)
def test_refusals_in_torch_s_words(options):
    p = parameter(3, 2)
    with pytest.raises(ValueError) as theirs:
        TORCH([p], **options)
    with pytest.raises(ValueError) as mine:
        Muon([p], **options)
    assert str(mine.value).startswith(str(theirs.value))


REFUSED = [
    ({"adjust_lr_fn": "mup"}, "None or one of rms_to_rms, original, match_rms_adamw, none"),
    ({"schedule": "newton"}, "polar_express.*not 'newton'"),
    ({"method": "qr"}, "method must be one of 'auto', 'standard', 'gram'"),
    ({"method": "svd"}, "not 'svd'"),
    ({"normalizer": "max"}, "normalizer must be one of 'auto', 'frobenius'"),
    ({"momentum_kind": "sum"}, "momentum_kind must be one of 'ema', 'heavy_ball'"),
    ({"algorithm": "sgd"}, "algorithm must be one of 'muon', 'adamw'"),
    ({"nonfinite": "ignore"}, "nonfinite must be one of 'skip', 'strict', 'propagate'"),
    ({"retract": "mup"}, "retract must be one of 'rms_to_rms'"),
    ({"retract": -1.0}, "retract must be"),
    ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), two of them, not \(0.9, 1.0\)"),
    ({"betas": (0.9,)}, r"betas must lie in \[0, 1\), two of them, not \(0.9,\)"),
    ({"adamw_eps": -1e-8}, "adamw_eps must be"),
    ({"compute_dtype": torch.int32}, "compute_dtype must be a float dtype, not torch.int32"),
    ({"schedule": "aol_4_old"}, "not safe"),
    ({"schedule": "polar_express_5_unscaled"}, "not safe"),
    ({"ns_coefficients": (4.0, -4.0, 3.0)}, "not safe"),
    ({"ns_coefficients": (3.0, -4.0)}, "triple|three|numbers"),
    ({"ns_steps": 0}, "steps"),
    ({"schedule": "cubic5", "compute_dtype": torch.bfloat16}, "not safe.*bfloat16"),
    ({"num_heads": 4}, "3 rows do not divide into num_heads=4 blocks"),
    ({"split_sizes": [1, 1]}, "sum to 3 rows"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_refusals_say_what_is_known(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([parameter(3, 2)], **options)


def test_vectors_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"2 dimensions.*torch.Size\(\[7\]\); give it a group with algorithm='adamw'"):
        Muon([parameter(3, 2), parameter(7)])
    opt = Muon([parameter(3, 2)])
    with pytest.raises(ValueError, match="adamw"):
        opt.add_param_group({"params": [parameter(7)]})
    assert len(opt.param_groups) == 1


def pair(shape, dtype=torch.float32, start=1.0, **options):
    """The same parameter in ours and in torch's."""
    p = nn.Parameter((torch.randn(shape) * start).to(dtype))
    q = nn.Parameter(p.detach().clone())
    return (p, Muon([p], **options)), (q, TORCH([q], **options))


def look_ahead(opt, p, momentum=0.95, nesterov=True):
    M, G = opt.state[p]["momentum_buffer"].double(), p.grad.double()
    return momentum * M + (1 - momentum) * G if nesterov else M


FIVE = [(48, 96), (96, 48), (64, 64)]


@pytest.mark.parametrize("rule", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", FIVE)
def test_five_steps_are_torch_s(shape, nesterov, rule):
    """torch computes in bfloat16, 0.015 to 0.02 of the update's RMS away from its own polynomial; this one 2e-5."""
    options = {"lr": 0.02, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": rule}
    (p, mine), (q, theirs) = pair(shape, **options)
    for _ in range(5):
        before = p.detach().double(), q.detach().double()
        p.grad = torch.randn(shape)
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
        step, other = (x.detach().double() - old * (1 - 0.006) for x, old in zip((p, q), before, strict=True))
        assert distance(step, other) <= 2e-2
        exact = -0.02 * RULES[rule or "original"](*shape) * polar(look_ahead(mine, p, nesterov=nesterov))
        assert distance(step, exact) <= 1e-4
        torch.testing.assert_close(mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.parametrize("shape", FIVE)
def test_five_steps_of_bfloat16_parameters_are_torch_s(shape):
    """From zero: of larger weights half a unit of the last place is more than 2e-2 of an update. torch's buffer is only
    right with nesterov=True (test_muon_state.py)."""
    (p, mine), (q, theirs) = pair(shape, torch.bfloat16, 0.0, lr=0.02)
    total = torch.zeros(shape, dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn(shape).bfloat16()
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
        exact = 0.02 * RULES["original"](*shape) * polar(look_ahead(mine, p))
        total = total * (1 - 0.002) - exact
        torch.testing.assert_close(
            mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"], rtol=2**-7, atol=2**-9
        )
    assert distance(p.detach(), q.detach()) <= 2e-2
    assert distance(p.detach(), total) <= 5e-3 < distance(q.detach(), total)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (5, 3)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_tiny_matrices(shape, nesterov):
    """torch's bfloat16 is up to 0.05 off here, so the polynomial is the judge."""
    (p, mine), (q, theirs) = pair(shape, lr=0.5, weight_decay=0.0, nesterov=nesterov)
    for _ in range(3):
        before, old = p.detach().double(), q.detach().double()
        p.grad = torch.randn(shape)
        q.grad = p.grad.clone()
        mine.step()
        theirs.step()
        exact = -0.5 * RULES["original"](*shape) * polar(look_ahead(mine, p, nesterov=nesterov))
        assert distance(p.detach() - before, exact) <= 1e-4
        assert distance(q.detach() - old, exact) <= 0.06


def families():
    torch.manual_seed(1)
    yield "gaussian", torch.randn(40, 60)
    yield "ill-conditioned", spectrum(40, 60, [10.0 ** -(i / 5) for i in range(40)])
    yield "flat", spectrum(60, 40, [1.0] * 40)
    yield "rank 1", torch.outer(torch.randn(64), torch.randn(128))
    yield "rank 7", spectrum(64, 48, [1.0] * 7)
    yield "one entry", torch.zeros(30, 20).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(2.0))
    yield "constant", torch.full((33, 20), -3.0)
    yield "wide", torch.randn(8, 500)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(("name", "G"), list(families()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_input_at_every_scale(name, G, scale):
    """torch's update of 1e-30 is 1e-20 in size, of 1e30 zero: it divides by the norm in bfloat16, at least 1e-7.

    The polynomial's slope at 0 is 485: beside one singular value, rounding to float32 counts 485 times.
    """
    tolerance = 1e-3 if name in ("rank 1", "constant") else 1e-4
    p = nn.Parameter(torch.zeros_like(G))
    opt = Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="none")
    for _ in range(2):
        p.grad = G * scale
        before = p.detach().double()
        opt.step()
        assert distance(before - p.detach(), polar(look_ahead(opt, p))) <= tolerance
    twin = nn.Parameter(torch.zeros_like(G))
    other = Muon([twin], lr=1.0, weight_decay=0.0, adjust_lr_fn="none")
    for _ in range(2):
        twin.grad = G.clone()
        other.step()
    assert distance(p.detach(), twin.detach()) <= tolerance


def test_rank_1_in_bfloat16_has_no_second_value():
    """torch's update of such a gradient has singular values of 0.69, 0.5, 0.39 beside the one."""
    p = nn.Parameter(torch.zeros(64, 128).bfloat16())
    p.grad = torch.outer(2.0 ** torch.randint(-6, 1, (64,)), torch.randn(128).bfloat16().float()).bfloat16()  # exact
    opt = Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="none", nesterov=False, momentum=0.0)
    opt.step()
    values = torch.linalg.svdvals(p.detach().double())
    assert 0.6 < float(values[0]) < 1.3 and float(values[1]) < 0.02


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("maximize", [False, True])
def test_rules_and_direction(rule, maximize):
    p = parameter(30, 20)
    before, G = p.detach().clone(), p.grad.clone()
    opt = Muon([p], lr=0.1, weight_decay=0.5, adjust_lr_fn=rule, maximize=maximize)
    opt.step()
    sign = 1 if maximize else -1
    torch.testing.assert_close(p.detach(), before * 0.95 + sign * 0.1 * RULES[rule](30, 20) * polar(G))
    torch.testing.assert_close(opt.state[p]["momentum_buffer"], -sign * 0.05 * G)


@pytest.mark.parametrize(
    ("options", "steps", "power"),
    [
        ({"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 9}, ((2.0, -1.5, 0.5),) * 9, 2),
        ({"schedule": "polar_express"}, triples("polar_express"), 2),
        ({"schedule": sk.schedules.schedule("polar_express")}, triples("polar_express"), 2),
        ({"schedule": [list(KELLER[0]), (2.0, -1.5, 0.5)]}, (KELLER[0], (2.0, -1.5, 0.5)), 2),
        ({"schedule": "polar_express", "normalizer": "schatten4"}, triples("polar_express"), 4),
        ({"method": "gram"}, KELLER, 2),
        ({"method": "standard", "compute_dtype": torch.float64}, KELLER, 2),
    ],
    ids=str,
)
def test_schedules_methods_and_normalizers(options, steps, power):
    p = parameter(24, 50)
    start, G = p.detach().clone(), p.grad.clone()
    Muon([p], lr=0.1, weight_decay=0.0, adjust_lr_fn="none", **options).step()
    assert distance((start - p.detach()) / 0.1, polar(G, steps, power)) <= 1e-10


def test_products_in_bfloat16_when_asked():
    p = parameter(48, 64, dtype=torch.float32)
    start = p.detach().clone()
    Muon([p], lr=0.1, weight_decay=0.0, compute_dtype=torch.bfloat16).step()
    assert 1e-3 < distance((start - p.detach()) / 0.1, polar(p.grad)) < 3e-2


def test_heavy_ball_has_the_direction_of_the_average():
    p = parameter(20, 30)
    q = nn.Parameter(p.detach().clone())
    one, other = Muon([p], momentum_kind="heavy_ball", lr=0.1), Muon([q], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(p.detach(), q.detach())
    torch.testing.assert_close(one.state[p]["momentum_buffer"], 20 * other.state[q]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"maximize": True, "retract": 1.0}], ids=str)
def test_gradients_are_never_written_to(options, dtype):
    shapes = ((12, 9), (9, 12), (3, 6, 4), (6, 4, 3, 3))
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in (*shapes, (5,))]
    grads = [torch.randn_like(p) for p in params]
    opt = Muon([{"params": params[:4]}, {"params": params[4:], "algorithm": "adamw"}], **options)
    for _ in range(2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.step()
        assert same([p.grad for p in params], grads)
    assert all(bool(torch.isfinite(p).all()) for p in params)


@pytest.mark.parametrize("lr", [torch.tensor(0.05), torch.tensor([0.05]), torch.tensor([[0.05]], dtype=torch.float64)])
def test_tensor_rates(lr):
    found = []
    for rate in (float(lr), lr):
        torch.manual_seed(0)
        p, b = parameter(9, 6), parameter(9)
        opt = Muon([{"params": [p]}, {"params": [b], "algorithm": "adamw"}], lr=rate)
        for _ in range(3):
            opt.step()
        found.append((p.detach(), b.detach()))
    torch.testing.assert_close(*found)
    rate = float(lr)
    lr.mul_(0)
    before = p.detach().clone()
    opt.step()
    assert rate > 0 and same(before, p.detach()), "a rate changed in place counts"


def test_schedulers():
    p = parameter(9, 6)
    opt = Muon([p], lr=0.4, weight_decay=0.0, adjust_lr_fn="none")
    scheduler = StepLR(opt, step_size=1, gamma=0.5)
    for rate in (0.4, 0.2, 0.1):
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        opt.step()
        scheduler.step()
        torch.testing.assert_close(before - p.detach(), rate * polar(look_ahead(opt, p)))


def test_groups_with_their_own_options_in_one_step():
    params = [parameter(12, 20) for _ in range(4)]
    options = [{}, {"schedule": "polar_express"}, {"momentum": 0.5, "nesterov": False}, {"ns_steps": 3, "lr": 0.3}]
    before = [p.detach().clone() for p in params]
    opt = Muon([{"params": [p], **o} for p, o in zip(params, options, strict=True)], lr=0.1, weight_decay=0.0)
    opt.step()
    schedules = (KELLER, triples("polar_express"), KELLER, KELLER[:3])
    wanted = [polar(p.grad, steps) for p, steps in zip(params, schedules, strict=True)]
    for p, old, U, lr in zip(params, before, wanted, (0.1, 0.1, 0.1, 0.3), strict=True):
        torch.testing.assert_close(old - p.detach(), lr * U)
    opt.param_groups[0]["schedule"] = "keller_quintic"
    opt.param_groups[1].update(schedule="newton")
    now = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="newton"):
        opt.step()
    assert same(now, [p.detach() for p in params])


def test_a_schedule_that_is_unsafe_in_a_dtype_chosen_later_is_refused_before_anything_moves():
    p = parameter(12, 20, dtype=torch.float32)
    opt = Muon([p], schedule="cubic5")
    opt.step()
    opt.param_groups[0]["compute_dtype"] = torch.bfloat16
    before, state = p.detach().clone(), opt.state[p]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match="not safe"):
        opt.step()
    assert same(before, p.detach()) and same(state, opt.state[p]["momentum_buffer"])


def test_one_step_for_the_model_is_a_step_for_each_parameter():
    shapes = ((20, 30), (30, 20), (20, 30), (3, 20, 30), (6, 4, 3, 3), (1, 9), (64, 8))
    params = [parameter(*s, dtype=torch.float32) for s in shapes]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    together, apart = Muon(params, lr=0.1), [Muon([q], lr=0.1) for q in copies]
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, copies, strict=True)):
            p.grad = None if (step, i) == (1, 2) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        together.step()
        for opt in apart:
            opt.step()
    for p, q, opt in zip(params, copies, apart, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.state[p]["momentum_buffer"], opt.state[q]["momentum_buffer"])
    assert int(together.orthogonalized) == sum(int(opt.orthogonalized) for opt in apart) == 3 * 9 - 1
