"""The state of sk.optim.Muon: checkpoints to and from torch.optim.Muon and AdamW, copies, and AdamW groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from spectral_kernels.optim import Muon
from tests.optim.polar import distance
from tests.optim.test_spectral import parameter
from tests.optim.test_state import saved
from tests.optim.textbook import same, snapshot

TORCH = torch.optim.Muon
OPTIONS = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.9, "ns_steps": 6, "adjust_lr_fn": "match_rms_adamw"}


def matrices(dtype=torch.float32):
    return [nn.Parameter(torch.randn(s).to(dtype)) for s in ((48, 96), (96, 48), (64, 64))]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def step(opts, lists, count=1):
    """The same gradients for all lists of parameters."""
    for _ in range(count):
        for same_ones in zip(*lists, strict=True):
            grad = torch.randn_like(same_ones[0])
            for p in same_ones:
                p.grad = grad.clone()
        for opt in opts:
            opt.step()


@pytest.mark.parametrize("first", [TORCH, Muon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_moves_both_ways(first, dtype):
    """Three steps of one, three of the other from its checkpoint, against the first going on by itself."""
    second = Muon if first is TORCH else TORCH
    params = [nn.Parameter(p.detach() * 0) for p in matrices(dtype)]
    opt = first(params, **OPTIONS)
    step([opt], [params], 3)
    state = saved(opt.state_dict())
    copies = twins(params)
    other = second(copies, lr=1.0)
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert {key: group[key] for key in OPTIONS} == OPTIONS
    for p, q in zip(params, copies, strict=True):
        assert same(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
        assert opt.state[p]["momentum_buffer"].data_ptr() != other.state[q]["momentum_buffer"].data_ptr()
    start = twins(params)
    step([opt, other], [params, copies], 3)
    for p, q, s in zip(params, copies, start, strict=True):
        assert distance((q - s).detach(), (p - s).detach()) <= 2.5e-2  # torch's bfloat16: three steps of 1.5 to 2e-2
        M, N = opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        assert M.dtype == N.dtype == dtype and distance(M, N) <= (1e-6 if dtype == torch.float32 else 1e-2)
    back = first(twins(params), lr=1.0)
    back.load_state_dict(saved(other.state_dict()))
    assert back.param_groups[0]["ns_steps"] == 6


def test_a_checkpoint_of_torch_s_leaves_the_options_it_does_not_know():
    params = matrices()
    theirs = TORCH([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    step([theirs], [params])
    groups = [
        {"params": params[:1], "num_heads": 4, "momentum_kind": "ema"},
        {"params": params[1:], "schedule": "cubic"},
    ]
    mine = Muon(groups, maximize=True, nonfinite="strict")
    mine.load_state_dict(saved(theirs.state_dict()))
    found = [
        {key: g[key] for key in ("num_heads", "schedule", "maximize", "nonfinite", "lr")} for g in mine.param_groups
    ]
    shared = {"maximize": True, "nonfinite": "strict"}
    assert found == [
        {"num_heads": 4, "schedule": None, "lr": 1e-3, **shared},
        {"num_heads": None, "schedule": "cubic", "lr": 0.5, **shared},
    ]


def test_older_checkpoints_of_ours_load():
    params = matrices()
    opt = Muon(params, nesterov=False, lr=0.3)
    step([opt], [params])
    old = saved(opt.state_dict())
    for key in ("momentum_kind", "flatten", "num_heads", "split_sizes", "retract", "algorithm", "seed"):
        del old["param_groups"][0][key]
    copies = twins(params)
    new = Muon(copies, momentum_kind="ema")
    new.load_state_dict(old)
    assert new.param_groups[0]["lr"] == 0.3 and new.param_groups[0]["algorithm"] == "muon"
    step([opt, new], [params, copies])
    assert same([p.detach() for p in params], [q.detach() for q in copies])


def test_schedulers_that_cycle_the_momentum_take_momentum_and_not_the_betas_of_adamw():
    opt = Muon([{"params": matrices()}, {"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw"}], lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.9)
    assert [round(group["momentum"], 6) for group in opt.param_groups] == [0.9, 0.9]
    assert opt.param_groups[1]["betas"] == (0.9, 0.95) and "betas" not in opt.param_groups[0]


def mixed(**options):
    """Matrices of every kind, and a group for AdamW."""
    torch.manual_seed(0)
    shapes = ((12, 9), (9, 12), (3, 6, 4), (6, 4, 3, 3))
    params = [parameter(*s, dtype=torch.float32) for s in (*shapes, (9,), (20, 6))]
    return params, Muon([{"params": params[:4]}, {"params": params[4:], "algorithm": "adamw", "lr": 0.01}], **options)


@pytest.mark.parametrize("options", [{}, {"retract": 1.0, "schedule": "polar_express"}, {"flatten": False}], ids=str)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load"])
def test_copies_go_on_bit_for_bit(way, options):
    params, opt = mixed(**options)
    opt.step()
    params[0].grad[0, 0] = torch.nan
    step([opt], [params])
    if way == "load":
        copies, other = mixed(**options)
        with torch.no_grad():
            for p, q in zip(params, copies, strict=True):
                q.copy_(p)
        other.load_state_dict(saved(opt.state_dict()))
    else:
        pair = (params, opt)
        copies, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert int(other.orthogonalized) == int(opt.orthogonalized) > 0
    assert type(other) is Muon and same(snapshot(opt), snapshot(other))
    before = snapshot(other)
    state = torch.get_rng_state()
    step([opt], [params], 2)
    assert same(before, snapshot(other)), "the copy shares tensors"
    torch.set_rng_state(state)
    step([other], [copies], 2)
    assert same(snapshot(opt), snapshot(other))


def test_a_state_that_does_not_fit_loads_nothing():
    p, q = parameter(12, 9), parameter(9, 12)
    opt = Muon([p])
    opt.step()
    other = Muon([("weight", q)], lr=0.5)
    with pytest.raises(
        ValueError, match=r"momentum_buffer of weight has shape \(12, 9\), this parameter needs \(9, 12\)"
    ):
        other.load_state_dict(opt.state_dict())
    assert len(other.state) == 0 and other.param_groups[0]["lr"] == 0.5
    adamw = torch.optim.AdamW([p])
    adamw.step()
    other = Muon([{"params": [q], "algorithm": "adamw"}])
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(12, 9\)"):
        other.load_state_dict(adamw.state_dict())
    adamw = torch.optim.AdamW([q], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad"):
        other.load_state_dict(adamw.state_dict())
    assert len(other.state) == 0


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("kind", ["ema", "heavy_ball"])
def test_a_bfloat16_buffer_is_the_momentum_and_no_alias(kind, nesterov):
    """With bfloat16 and nesterov=False torch divides its buffer by its norm in place (pytorch PR 190597)."""
    p = nn.Parameter(torch.randn(20, 12).bfloat16())
    q = nn.Parameter(p.detach().clone())
    opt, theirs = (
        Muon([p], momentum=0.5, nesterov=nesterov, momentum_kind=kind),
        TORCH([q], momentum=0.5, nesterov=False),
    )
    wanted, gain = torch.zeros(20, 12), 0.5 if kind == "ema" else 1.0
    for _ in range(3):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
        wanted = (0.5 * wanted + gain * p.grad.float()).bfloat16().float()
        opt.step()
        theirs.step()
        buffer = opt.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer.float(), wanted, rtol=2**-7, atol=2**-12)
        wanted = buffer.float()
    places = {x.untyped_storage().data_ptr() for x in (p, p.grad, buffer)}
    assert len(places) == 3 and buffer.dtype == torch.bfloat16
    assert abs(float(theirs.state[q]["momentum_buffer"].float().norm()) - 1) < 0.01 < abs(float(wanted.norm()) - 1)


def test_the_state_is_torch_s():
    params, opt = mixed()
    opt.step()
    assert {key for p in params[:4] for key in opt.state[p]} == {"momentum_buffer"}
    assert {key for p in params[4:] for key in opt.state[p]} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(opt.state[p]["momentum_buffer"].shape == p.shape for p in params[:4])


SHAPES = [(), (7,), (3, 4), (2, 3, 4, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_group_for_adamw_is_torch_s_adamw(maximize, dtype):
    """Bit for bit torch's fused one; its default one to rounding."""
    start = [nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    lists = [twins(start) for _ in range(3)]
    mine = Muon(
        [{"params": lists[0], "algorithm": "adamw", "lr": 0.02}],
        betas=(0.8, 0.97), adamw_eps=1e-6, weight_decay=0.3, maximize=maximize,
    )  # fmt: skip
    options = {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3, "maximize": maximize}
    fused = torch.optim.AdamW(lists[1], fused=True, **options)
    plain = torch.optim.AdamW(lists[2], **options)
    step([mine, fused, plain], lists, 4)
    assert same([p.detach() for p in lists[0]], [p.detach() for p in lists[1]])
    for p, q, r in zip(*lists, strict=True):
        assert same(dict(mine.state[p]), dict(fused.state[q])) and float(mine.state[p]["step"]) == 4
        if dtype == torch.float32:
            torch.testing.assert_close(p.detach(), r.detach(), rtol=1e-5, atol=1e-6)


def test_the_state_of_adamw_moves_both_ways():
    params = [nn.Parameter(torch.randn(s)) for s in SHAPES]
    theirs = torch.optim.AdamW(params, lr=0.02, betas=(0.8, 0.97), eps=1e-3, weight_decay=0.3)
    step([theirs], [params], 3)
    copies = twins(params)
    mine = Muon([{"params": copies, "algorithm": "adamw"}], lr=1.0)
    mine.load_state_dict(saved(theirs.state_dict()))
    group = mine.param_groups[0]
    assert [group[k] for k in ("algorithm", "lr", "betas", "adamw_eps")] == ["adamw", 0.02, (0.8, 0.97), 1e-3]
    step([theirs, mine], [params, copies], 3)
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    again = twins(copies)
    back = torch.optim.AdamW(again, lr=1.0)
    back.load_state_dict(saved(mine.state_dict()))
    back.param_groups[0]["eps"] = 1e-3  # `eps` of ours is torch.optim.Muon's
    step([mine, back], [copies, again], 2)
    for p, q in zip(copies, again, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def test_an_embedding_in_a_group_for_adamw():
    """Rows that were never looked up have a zero gradient, not none: they decay, as with torch's AdamW."""
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 6), nn.Linear(6, 4, bias=False)
    opt = Muon([{"params": [head.weight]}, {"params": [table.weight], "algorithm": "adamw"}], lr=0.1, weight_decay=0.5)
    rows, matrix = table.weight.detach().clone(), head.weight.detach().clone()
    nn.functional.cross_entropy(head(table(torch.tensor([1, 4]))), torch.tensor([0, 3])).backward()
    opt.step()
    moved = (table.weight.detach() - rows * 0.95).abs().amax(1)
    assert [i for i in range(10) if moved[i] > 1e-6] == [1, 4] and not torch.equal(head.weight, matrix)
    assert float(moved[[1, 4]].min()) > 0.05
    assert int(opt.orthogonalized) == 1


def dense(x):
    """In memory of its own, without gaps, by rows."""
    return x.detach().clone(memory_format=torch.contiguous_format)


LAYOUTS = {
    "gradient by columns": (lambda w: w, lambda g: dense(g.mT).mT),
    "parameter by columns": (lambda w: dense(w.mT).mT, lambda g: g),
    "both by columns": (lambda w: dense(w.mT).mT, lambda g: dense(g.mT).mT),
    "part of a buffer": (lambda w: torch.cat([w, w], -1)[..., : w.shape[-1]], lambda g: g),
    "expanded gradient": (lambda w: w, lambda g: g[..., :1].expand(g.shape)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_adamw_whatever_the_strides_are(name):
    """torch's fused kernels walk memory: they pair other entries where strides differ, and write into gaps."""
    place, lay = LAYOUTS[name]
    start = torch.randn(3, 5, 7)
    p, q = nn.Parameter(place(start)), nn.Parameter(dense(start))
    whole = torch.as_strided(p.detach(), (p.untyped_storage().size() // 4,), (1,), 0)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    torch.as_strided(inside, p.shape, p.stride(), 0).fill_(True)
    rest = whole[~inside].clone()
    mine, theirs = Muon([p], algorithm="adamw"), torch.optim.AdamW([q], betas=(0.9, 0.95), weight_decay=0.1)
    for i in range(3):
        g = torch.randn(3, 5, 7)
        p.grad, q.grad = lay(g), dense(lay(g))
        mine.step(), theirs.step()
        if i == 1:  # a checkpoint keeps strides
            mine.state[p]["exp_avg"] = dense(mine.state[p]["exp_avg"].mT).mT
    torch.testing.assert_close(p.detach(), q.detach())
    torch.testing.assert_close(mine.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
    assert torch.equal(whole[~inside], rest)


def test_adamw_with_gradients_of_another_dtype():
    p = nn.Parameter(torch.randn(5, 7).bfloat16())
    q = nn.Parameter(p.detach().clone())
    p.grad_dtype = torch.float32
    q.grad = torch.randn(5, 7).bfloat16()
    p.grad = q.grad.float()
    step = [Muon([x], algorithm="adamw") for x in (p, q)]
    for opt in step:
        opt.step()
    assert torch.equal(p, q)
