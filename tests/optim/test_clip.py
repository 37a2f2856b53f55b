"""direction="clip": every singular value of the momentum over tau and cut at 1, against exact SVD; docs/clip.md."""

from __future__ import annotations

import warnings

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.bench.training import Spikes, groups, spike_, task
from spectral_kernels.kernels.contracts import INFO
from spectral_kernels.ops.engine import CLIP_COLD_TOL
from spectral_kernels.optim import SpectralOptimizer, param_groups
from tests.optim.test_spectral import parameter, spectral
from tests.optim.test_state import saved
from tests.optim.textbook import batches, convolutional, mlp, same, snapshot, train


def matrix(m, n, spectrum, dtype=torch.float64):
    """m x n with singular values spectrum(i)."""
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(side, k, dtype=torch.float64)).Q for side in (m, n))
    s = torch.tensor([spectrum(i) for i in range(k)], dtype=torch.float64)
    return (U * s @ V.mT).to(dtype)


def clipped(M, rank=None, threshold=None):
    """D = sum of min(sigma_i / tau, 1) u_i v_i'."""
    U, s, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    tau = s[..., rank - 1 : rank] if threshold is None else s.new_full(s.shape[:-1] + (1,), threshold)
    return (U * (s / tau).clamp(max=1)[..., None, :]) @ Vh, tau


def moved(shape, G, lr=0.5, **options):
    """What one step from zero applied, over lr; its Result."""
    W = torch.zeros(shape, dtype=G.dtype)
    _, info = sk.spectral_step_(W, G, lr, direction="clip", rule="none", return_info=True, **options)
    return -W / lr, info


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (200, 48), (33, 33), (3, 50, 30)])
@pytest.mark.parametrize("rank", [1, 4, 8, 20])
def test_a_first_step_is_the_exact_one(shape, rank):
    """Up to six cold reads, until the estimated excess of ||D|| is below 2 %."""
    torch.manual_seed(rank)
    *stack, m, n = shape
    G = torch.stack([matrix(m, n, lambda i: 0.8**i) for _ in range(stack[0] if stack else 1)]).view(shape)
    D, info = moved(shape, G, rank=rank)
    exact, tau = clipped(G, rank)
    assert float(spectral_each(D - exact).max()) <= 0.03
    assert float(spectral_each(D).max()) <= 1.01
    found = info.info[:, INFO["sigma"]] if rank == 1 else info.info[:, INFO["tau"]] / info.info[:, INFO["scale"]]
    torch.testing.assert_close(found.view(tau.shape[:-1]), tau[..., 0], rtol=5e-3, atol=0)


def spectral_each(X):
    return torch.linalg.svdvals(X)[..., 0]


@pytest.mark.parametrize("shape", [(60, 40), (30, 90)])
def test_the_ends_of_the_dial(shape):
    torch.manual_seed(0)
    G = matrix(*shape, lambda i: 1 / (1 + i))
    D, _ = moved(shape, G, rank=1)
    W = torch.zeros_like(G)
    assert same(D, -sk.spectral_step_(W, G, 0.5, rule="none") / 0.5)
    torch.testing.assert_close(D, G / spectral(G), rtol=1e-2, atol=0)
    D, _ = moved(shape, G, rank=min(shape))
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(D, U @ Vh, rtol=1e-6, atol=1e-8)


def test_a_threshold_divides_and_cuts():
    torch.manual_seed(0)
    G = matrix(60, 40, lambda i: 0.7**i)
    for threshold in (0.05, 0.3, 3.0):
        D, info = moved((60, 40), G, threshold=threshold)
        exact, _ = clipped(G, threshold=threshold)
        assert float(spectral(D - exact)) <= 1e-3
        assert float(info.info[0, INFO["beyond"]]) == 0
        assert float(info.size[0]) == pytest.approx(0.5 * min(1.0, 1 / threshold), rel=1e-4)


def test_more_values_above_the_threshold_than_columns_are_reported_and_the_step_stays_bounded():
    torch.manual_seed(0)
    G = matrix(60, 50, lambda i: 1 - 0.01 * i)
    p = torch.nn.Parameter(torch.zeros(60, 50, dtype=torch.float64))
    p.grad = G
    opt = SpectralOptimizer([p], lr=1.0, momentum=0.0, direction="clip", threshold=0.1, block=16, rule="none")
    opt.step()
    ((_, info),) = opt.last_step()
    assert float(info.beyond) == 1 and int(opt.beyond) == 1
    assert 0.6 < float(info.tau) < 0.86  # the sixteenth value, from below
    assert spectral(p.detach()) <= 1.4  # the values that the block misses are as large
    p.grad = 0.01 * G
    opt.step()
    assert int(opt.beyond) == 1


def test_momentum_of_a_rank_below_s():
    """tau cannot fall below what float32 knows of the values: sqrt(8 eps) of the largest."""
    torch.manual_seed(0)
    G = matrix(50, 40, lambda i: 0.5**i if i < 3 else 0.0, torch.float32)
    D, info = moved((50, 40), G, rank=8)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    assert spectral(D.double() - U[:, :3] @ Vh[:3]) <= 1e-2
    assert float(info.info[0, INFO["tau"]] / info.info[0, INFO["theta"]] ** 0.5) == pytest.approx((8 * 2.0**-23) ** 0.5)


@pytest.mark.parametrize("options", [{"num_heads": 4}, {"split_sizes": [40, 16, 8]}], ids=str)
def test_blocks_of_rows_are_clipped_by_themselves(options):
    torch.manual_seed(0)
    G = matrix(64, 24, lambda i: 0.7**i)
    D, _ = moved((64, 24), G, rank=4, **options)
    sizes = options.get("split_sizes", [16] * 4)
    for d, g in zip(D.split(sizes), G.split(sizes), strict=True):
        assert spectral(d - clipped(g, 4)[0]) <= 1e-2


def test_ranks_above_a_matrix_s_own_are_clamped_and_shown():
    torch.manual_seed(0)
    params = [parameter(40, 30), parameter(6, 20), parameter(5, 4, 3, 3), parameter(1, 9), parameter(7)]
    opt = SpectralOptimizer(params, lr=1.0, momentum=0.0, direction="clip", rank=8, rule="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = list(opt.describe())
    assert [row.rank for row in rows] == ["8", "6 = min(m, n)", "4 = min(m, n)", "1 = min(m, n)", ""]
    assert "rank" in str(opt.describe()).splitlines()[0]
    before = [p.detach().clone() for p in params]
    opt.step()
    steps = [old - p.detach() for p, old in zip(params, before, strict=True)]
    assert spectral(steps[0] - clipped(params[0].grad, 8)[0]) <= 0.2  # a flat spectrum in six reads
    for p, step in ((params[1], steps[1]), (params[3], steps[3])):
        U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
        torch.testing.assert_close(step, U @ Vh, rtol=1e-5, atol=1e-7)
    slices = steps[2].permute(2, 3, 0, 1).reshape(9, 5, 4) * 9
    torch.testing.assert_close(torch.linalg.svdvals(slices), torch.ones(9, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"rank must be 1 to min\(m, n\) = 6 for W\[1\] of shape \(6, 20\), not 8"):
        sk.spectral_step_([p.detach() for p in params[:2]], [p.grad for p in params[:2]], 0.1, direction="clip", rank=8)


@pytest.mark.parametrize("build", [mlp, convolutional])
@pytest.mark.parametrize("options", [{"rank": 4}, {"threshold": 0.05, "momentum_dtype": torch.bfloat16}], ids=str)
def test_a_resumed_run_is_the_same_run(build, options):
    def start():
        torch.manual_seed(0)
        model = build()
        return model, SpectralOptimizer(param_groups(model, lr=0.02), direction="clip", **options)

    model, opt = start()
    data = [batch for _, batch in zip(range(10), batches(), strict=False)]
    train(model, opt, 5, iter(data))
    checkpoint = saved({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, 5, iter(data[5:]))
    other, again = start()
    other.load_state_dict(checkpoint["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(checkpoint["opt"])
        train(other, again, 5, iter(data[5:]))
    assert same(snapshot(model, opt), snapshot(other, again))


@pytest.mark.parametrize("before", [{"direction": "clip", "rank": 4}, {"direction": "normalize"}], ids=str)
def test_another_rank_on_resume_starts_the_block_anew_with_a_warning(before):
    torch.manual_seed(0)
    p = parameter(60, 40)
    opt = SpectralOptimizer([p], lr=0.1, **before)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        opt.step()
    state = saved(opt.state_dict())
    opt = SpectralOptimizer([p], lr=0.1, direction="clip", rank=8)
    opt.load_state_dict(state)
    M, start = opt.state[p]["momentum_buffer"].clone(), p.detach().clone()
    p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"of shape \(60, 40\).*now it must be \(1, 16, 40\): it is started anew"):
        opt.step()
    assert opt.state[p]["block"].shape == (1, 16, 40) and opt.state[p]["tracker"].shape == (1, 4)
    D = (start - p.detach()) / (0.1 * 1.5**0.5)
    assert spectral(D - clipped(0.95 * M, 8)[0]) <= 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


def steps(opt, p, count):
    for _ in range(count):
        p.grad = torch.randn_like(p)
        opt.step()


def test_another_rank_in_a_group_or_a_state_starts_the_block_anew():
    """The words take the width of a block from the options: one of another width would be read beyond its end."""
    torch.manual_seed(0)
    p = parameter(60, 40)
    opt = SpectralOptimizer([p], lr=0.1, direction="clip", rank=8, rule="none")
    W, state = torch.zeros(60, 40), {}
    for rank in (8, 4, 40, 1, 16):
        opt.param_groups[0]["rank"] = rank
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(opt, p, 1)
            before, G = W.clone(), torch.randn(60, 40)
            sk.spectral_step_(W, G, 0.1, direction="clip", rank=rank, rule="none", state=state)
        assert len(caught) == (0 if rank == 8 else 2)
        width = {8: 16, 4: 8, 40: 40, 1: 4, 16: 32}[rank]
        assert state["block"].shape == opt.state[p]["block"].shape == (1, width, 40)
        assert spectral((before - W).double() / 0.1 - clipped(state["momentum_buffer"], rank)[0]) <= 0.2


@pytest.mark.parametrize("direction", [{"direction": "clip", "rank": 4}, {"direction": "normalize"}], ids=str)
def test_other_blocks_of_rows_during_a_run_start_the_state_anew(direction):
    torch.manual_seed(0)
    p = parameter(64, 24)
    opt = SpectralOptimizer([p], lr=0.1, rule="none", **direction)
    steps(opt, p, 4)
    opt.param_groups[0]["num_heads"] = 4
    with pytest.warns(UserWarning, match=r"\(64, 24\).*now it must be \(4, .*, 16\)"):
        steps(opt, p, 1)
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    opt.step()
    D, M = (before - p.detach()) / 0.1, opt.state[p]["momentum_buffer"]
    D, M = D.view(4, 16, 24), M.view(4, 16, 24)
    assert float(spectral_each(D - clipped(M, direction.get("rank", 1))[0]).max()) <= 0.2


def test_a_block_that_comes_late_begins_with_the_reads_of_a_first_step():
    torch.manual_seed(0)
    p = parameter(60, 40)
    opt = SpectralOptimizer([p], lr=0.1, direction="frobenius", momentum=0.0, rule="none")
    steps(opt, p, 4)
    opt.param_groups[0].update(direction="clip", rank=8)
    steps(opt, p, 1)
    ((_, info),) = opt.last_step()
    first = torch.zeros(60, 40, dtype=torch.float64)
    _, result = sk.spectral_step_(first, p.grad, 0.1, direction="clip", rank=8, momentum=0.0, return_info=True)
    assert float(info.reads) == float(result.info[0, INFO["reads"]])
    assert float(info.error) == float(result.info[0, INFO["error"]]) <= CLIP_COLD_TOL


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"threshold": 1.0}, ValueError, "rank=4 and threshold=1.0 given"),
        ({"rank": None}, ValueError, "neither given"),
        ({"rank": 0}, ValueError, "rank must be at least 1, not 0"),
        ({"rank": 8.0}, TypeError, "rank must be an integer, not float"),
        ({"direction": "normalize"}, ValueError, "rank=4 goes with direction='clip'"),
    ],
    ids=str,
)
def test_options_changed_during_a_run_are_checked_before_anything_moves(changed, error, message):
    torch.manual_seed(0)
    p, q = parameter(60, 40), parameter(30, 20)
    opt = SpectralOptimizer([{"params": [q]}, {"params": [p]}], lr=0.1, direction="clip", rank=4)
    opt.step()
    before = [x.detach().clone() for x in (p, q)]
    opt.param_groups[1].update(changed)
    with pytest.raises(error, match=message):
        opt.step()
    assert same(before, [p.detach(), q.detach()])


def test_a_checkpoint_of_another_direction_leaves_no_option_that_does_not_fit():
    torch.manual_seed(0)
    p = parameter(60, 40)
    other = SpectralOptimizer([p], lr=0.1, safety="upper")
    other.step()
    opt = SpectralOptimizer([p], lr=0.2, direction="clip", rank=2)
    opt.load_state_dict(saved(other.state_dict()))
    opt.step()
    assert [opt.param_groups[0][key] for key in ("lr", "direction", "rank", "safety")] == [0.1, "clip", 2, None]


@pytest.mark.parametrize("block", [8, 9])
def test_a_block_as_narrow_as_the_rank_keeps_what_is_clipped(block):
    """No column that is to be clipped is drawn anew: the same momentum again and again is clipped exactly."""
    torch.manual_seed(0)
    G = matrix(60, 40, lambda i: 0.9**i)
    W, state = torch.zeros_like(G), {}
    for _ in range(30):
        before = W.clone()
        sk.spectral_step_(W, G, 0.5, direction="clip", rank=8, block=block, rule="none", momentum=0.0, state=state)
    assert spectral((before - W) / 0.5 - clipped(G, 8)[0]) <= 0.1


@pytest.mark.parametrize("options", [{"rank": 2}, {"threshold": 1.0}], ids=str)
@pytest.mark.parametrize("shape", [(0, 8, 6), (0, 6), (8, 0), (2, 0, 6)])
def test_matrices_without_entries(shape, options):
    W, full = torch.zeros(shape), torch.zeros(9, 7)
    for weights in (W, [W, full]):
        grads = torch.ones_like(W) if weights is W else [torch.ones_like(x) for x in weights]
        assert sk.spectral_step_(weights, grads, 0.1, direction="clip", **options) is weights
    assert full.any()


@pytest.mark.parametrize("spikes", [None, Spikes(10, 3.0), Spikes(10, 40.0)], ids=str)
@pytest.mark.parametrize("rank", [4, 8])
def test_the_norm_stays_near_one_in_training(rank, spikes):
    """Exact SVD of every update of a small transformer; docs/clip.md has the large measurement."""
    run = task("transformer", width=32, seed=0, layers=2, batch=4)
    opt = SpectralOptimizer(groups(run.model), lr=2**-7, direction="clip", rank=rank)
    norms, reads, matrices = [], [], dict(run.matrices())
    for step in range(40):
        opt.zero_grad()
        run.loss(step).backward()
        if spikes is not None and spikes.hits(step):
            spike_(run.model, spikes.size, 0, step)
        before = {name: W.detach().double() for name, W in matrices.items()}
        opt.step()
        for name, W in matrices.items():
            factor = (W.shape[0] / W.shape[1]) ** 0.5
            norms.append(spectral((before[name] - W.detach().double()) / (2**-7 * factor)))
        reads += [info.reads for _, info in opt.last_step() if info.tracked] if step >= 3 else []
    norms = torch.tensor(norms)
    assert 0.99 <= float(norms.min()) and float(norms.max()) <= 1.1
    assert float(norms.quantile(0.99)) <= 1.05
    assert float(torch.cat(reads).mean()) <= 1.8
