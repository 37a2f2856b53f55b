"""sk.optim.Muon on what is more or less than a matrix: stacks, convolutions, heads, fused projections, odd strides."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spectral_kernels as sk
from spectral_kernels.ops import passes
from spectral_kernels.optim import Muon, SpectralOptimizer
from tests.optim.polar import distance, polar
from tests.optim.test_spectral import parameter
from tests.optim.textbook import same

PLAIN = {"lr": 0.1, "weight_decay": 0.0}


def apart(G, *matrices, **options):
    """The steps that separate matrices take, from zero, under two gradients: G and its square."""
    params = [nn.Parameter(torch.zeros_like(m)) for m in matrices]
    opt = Muon(params, **PLAIN, **options)
    for power in (1, 2):
        for p, m in zip(params, matrices, strict=True):
            p.grad = m.clone() ** power
        opt.step()
    return [p.detach() for p in params], opt


def together(G, **options):
    p = nn.Parameter(torch.zeros_like(G, memory_format=torch.preserve_format))
    opt = Muon([p], **PLAIN, **options)
    for power in (1, 2):
        p.grad = G.clone() ** power
        opt.step()
    return p.detach(), opt


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw", "rms_to_rms", "none"])
def test_a_stack_is_its_matrices(rule):
    G = torch.randn(5, 12, 7, dtype=torch.float64)
    step, opt = together(G, adjust_lr_fn=rule)
    parts, other = apart(G, *G, adjust_lr_fn=rule)
    torch.testing.assert_close(step, torch.stack(parts))
    assert int(opt.orthogonalized) == int(other.orthogonalized) == 10


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 2, 3, 2), (6, 4, 2, 1, 3, 2), (6, 4, 1, 1)], ids=str)
def test_a_convolution_is_one_matrix(shape):
    G = torch.randn(shape, dtype=torch.float64)
    step, opt = together(G)
    (matrix,), _ = apart(G, G.reshape(6, -1))
    torch.testing.assert_close(step, matrix.view(shape))
    assert opt.state[next(iter(opt.state))]["momentum_buffer"].shape == G.shape
    assert int(opt.orthogonalized) == 2


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (8, 6, 2, 2, 2), (6, 4, 2, 1, 1, 2)], ids=str)
def test_a_convolution_position_by_position(shape):
    G = torch.randn(shape, dtype=torch.float64)
    step, opt = together(G, flatten=False)
    slices = G.flatten(2).movedim(-1, 0)
    parts, _ = apart(G, *slices)
    torch.testing.assert_close(step.flatten(2).movedim(-1, 0), torch.stack(parts) / len(slices))
    assert int(opt.orthogonalized) == 2 * len(slices)


def test_a_stack_as_one_matrix():
    G = torch.randn(5, 4, 3, dtype=torch.float64)
    (matrix,), _ = apart(G, G.reshape(5, 12))
    torch.testing.assert_close(together(G, flatten=True)[0].reshape(5, 12), matrix)
    torch.testing.assert_close(together(G[0], flatten=True)[0], together(G[0])[0])


@pytest.mark.parametrize("flatten", [None, False])
@pytest.mark.parametrize("where", ["weight", "gradient", "both"])
def test_channels_last(where, flatten):
    G = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    wanted, _ = together(G, flatten=flatten)
    odd = torch.channels_last
    p = nn.Parameter(torch.zeros_like(G).to(memory_format=odd if where != "gradient" else torch.contiguous_format))
    opt = Muon([p], flatten=flatten, **PLAIN)
    place = p.data_ptr()
    for power in (1, 2):
        p.grad = (G**power).to(memory_format=odd if where != "weight" else torch.contiguous_format)
        opt.step()
    torch.testing.assert_close(p.detach(), wanted)
    assert p.data_ptr() == place and p.is_contiguous(memory_format=odd) is (where != "gradient")


def test_strided_and_transposed_parameters():
    G = torch.randn(8, 5, dtype=torch.float64)
    wanted, _ = together(G)
    for p in (torch.zeros(5, 8, dtype=torch.float64).mT, torch.zeros(8, 10, dtype=torch.float64)[:, ::2]):
        opt = Muon([p.requires_grad_()], **PLAIN)
        for power in (1, 2):
            p.grad = G**power
            opt.step()
        torch.testing.assert_close(p.detach(), wanted)


ROWS = [
    ((24, 10), {"num_heads": 4}, (6,) * 4),
    ((24, 10), {"split_sizes": [12, 8, 4]}, (12, 8, 4)),
    ((24, 10), {"split_sizes": (3, 21)}, (3, 21)),
    ((3, 24, 10), {"num_heads": 2}, (12, 12)),
    ((24, 2, 5), {"num_heads": 4, "flatten": True}, (6,) * 4),
    ((24, 2, 3, 3), {"split_sizes": [16, 8]}, (16, 8)),
]


@pytest.mark.parametrize(("shape", "options", "rows"), ROWS, ids=str)
@pytest.mark.parametrize("rule", ["original", "rms_to_rms"])
def test_blocks_of_rows_are_matrices_of_their_own(shape, options, rows, rule):
    """The rule is that of a block; the parameter is one tensor in place."""
    G = torch.randn(shape, dtype=torch.float64)
    step, opt = together(G, adjust_lr_fn=rule, **options)
    stacked = G.ndim == 3 and "flatten" not in options
    whole = list(G) if stacked else [G.reshape(shape[0], -1)]
    parts, _ = apart(G, *[part for W in whole for part in W.split(list(rows))], adjust_lr_fn=rule)
    mine = list(step) if stacked else [step.reshape(shape[0], -1)]
    for found, wanted in zip([part for W in mine for part in W.split(list(rows))], parts, strict=True):
        torch.testing.assert_close(found, wanted)
    assert int(opt.orthogonalized) == 2 * len(parts)


@pytest.mark.parametrize(("shape", "options", "rows"), ROWS, ids=str)
def test_blocks_of_rows_are_views(shape, options, rows):
    p = nn.Parameter(torch.randn(shape))
    opt = Muon([p], **options)
    place = p.data_ptr()
    for _ in range(2):
        p.grad = torch.randn(shape)
        opt.step()
    seat = opt._seats[p]
    for views, whole in ((seat.P, p), (seat.M, opt.state[p]["momentum_buffer"])):
        assert {v.untyped_storage().data_ptr() for v in views} == {whole.untyped_storage().data_ptr()}
        assert sum(v.numel() for v in views) == whole.numel()
    assert seat.copies == [] and p.data_ptr() == place


def test_transposed_storage():
    G = torch.randn(10, 24, dtype=torch.float64)
    for options in ({}, {"num_heads": 4}, {"split_sizes": [16, 8]}):
        wanted, _ = together(G.mT.contiguous(), adjust_lr_fn="rms_to_rms", **options)
        torch.testing.assert_close(together(G, transposed=True, adjust_lr_fn="rms_to_rms", **options)[0].mT, wanted)


def test_options_of_rows_that_do_not_fit_are_refused():
    for options in ({"num_heads": 5}, {"split_sizes": [12, 8]}, {"num_heads": 2, "split_sizes": [12, 12]}):
        with pytest.raises(ValueError, match="num_heads|split_sizes"):
            Muon([{"params": [("qkv", parameter(24, 10))], **options}])
    with pytest.raises(ValueError, match="conv"):
        Muon([parameter(24, 2, 3, 3)], num_heads=4, flatten=False)


def test_parameters_without_entries_and_without_gradients():
    params = [nn.Parameter(torch.zeros(s)) for s in ((0, 5), (5, 0), (0, 4, 3))] + [parameter(4, 3), parameter(3, 4)]
    for p in params[:4]:
        p.grad = torch.ones_like(p)
    params[4].grad = None
    before = params[4].detach().clone()
    opt = Muon(params)
    opt.step()
    assert int(opt.orthogonalized) == 1 and same(before, params[4].detach()) and len(opt.state) == 1


@pytest.mark.parametrize("target", [1.5, "rms_to_rms", "none"])
def test_weights_set_back_to_a_norm(target):
    params = [parameter(*s) for s in ((12, 9), (3, 6, 8), (24, 10))]
    groups = [{"params": params[:2]}, {"params": params[2:], "num_heads": 4}]
    opt = Muon([*groups, {"params": [b := parameter(5)], "algorithm": "adamw"}], lr=0.1, retract=target)
    free = Muon([nn.Parameter(p.detach().clone()) for p in params[:2]], lr=0.1)
    for p, q in zip(params, free.param_groups[0]["params"], strict=False):
        q.grad = p.grad.clone()
    opt.step()
    free.step()
    for p, q in zip(params[:2], free.param_groups[0]["params"], strict=True):  # the step, then a number for each matrix
        norm = torch.linalg.matrix_norm(q.detach(), 2)[..., None, None]
        goal = target if isinstance(target, float) else sk.scaling.target(target, *p.shape[-2:])
        torch.testing.assert_close(p.detach(), q.detach() * goal / norm, rtol=1e-3, atol=1e-6)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    for p, (m, n) in zip((*params[:2], params[2].view(4, 6, 10)), ((12, 9), (6, 8), (6, 10)), strict=True):
        goal = target if isinstance(target, float) else sk.scaling.target(target, m, n)
        norms = torch.linalg.matrix_norm(p.detach(), 2)
        torch.testing.assert_close(norms, torch.full_like(norms, goal), rtol=5e-3, atol=0)
    assert "weight_block" in opt.state[params[0]] and "weight_block" not in opt.state[b]


def test_what_a_step_divided_by():
    """sigma: the Frobenius norm of the look-ahead; with schatten4 that of Schatten; size: lr times the rule."""
    for normalizer, power in (("frobenius", 2), ("schatten4", 4)):
        p, q = parameter(12, 9), parameter(2, 6, 8)
        opt = Muon([p, q], lr=0.1, normalizer=normalizer, schedule="polar_express", adjust_lr_fn="match_rms_adamw")
        opt.step()
        found = dict(opt.last_step())
        for x, (m, n) in ((p, (12, 9)), (q, (6, 8))):
            values = torch.linalg.svdvals((0.95 * 0.05 + 0.05) * x.grad).reshape(-1, min(m, n))
            torch.testing.assert_close(found[x].sigma, torch.linalg.vector_norm(values, power, dim=1))
            torch.testing.assert_close(found[x].size, torch.full((len(values),), 0.1 * 0.2 * max(m, n) ** 0.5).double())
            torch.testing.assert_close(found[x].frob, torch.linalg.vector_norm(values, dim=1))
            assert not found[x].tracked


def test_a_transformer_s_worth_of_shapes_in_one_step():
    shapes = [(48, 16), (16, 16), (64, 16), (16, 64)] * 3 + [(4, 16, 32), (8, 3, 3, 3)]
    params = [parameter(*s, dtype=torch.float32, scale=0.0) for s in shapes]
    Muon(params, lr=1.0, weight_decay=0.0, adjust_lr_fn="none").step()
    for p in params:
        G, step = (x.flatten(1) if x.ndim == 4 else x for x in (p.grad, -p.detach()))
        assert distance(step, polar(G)) <= 1e-4


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 4, 2, 2)])
def test_what_a_parameter_is_cannot_change_once_it_has_a_state(shape):
    for first, second in ((None, False), (False, None)):
        p = parameter(*shape)
        opt = Muon([p], flatten=first)
        opt.step()
        before = p.detach().clone()
        opt.param_groups[0]["flatten"] = second
        with pytest.raises(ValueError, match="momentum_buffer .* its layout needs"):
            opt.step()
        assert same(before, p.detach())


def test_cpu_parameters_under_another_default_device():
    """Tables of numbers lie where they are used, whatever the default device is."""
    passes.constant.cache_clear()
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        params = [parameter(*s) for s in ((11, 5), (3, 5, 11), (6, 2, 3, 3), (300, 20))]
        readout = parameter(7, 5, dtype=torch.float32)
        steps = Muon([{"params": params}, {"params": [readout], "algorithm": "adamw"}], num_heads=1, lr=0.1)
        tracked = SpectralOptimizer([twin := nn.Parameter(params[0].detach().clone())], lr=0.1)
        twin.grad = params[0].grad.clone()
        with torch.device(device):
            steps.step(), tracked.step()
            results.append([*params, readout, twin, sk.orthogonalize(params[1].detach())])
            sk.integrations.NewtonSchulz()
        passes.constant.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
