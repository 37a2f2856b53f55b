"""SpectralOptimizer inside what training is made of: compile, scalers, clipping, averages, checkpoints, graphs."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

import spectral_kernels as sk
from spectral_kernels.ops import passes
from spectral_kernels.ops.state import COLD_STEPS
from spectral_kernels.optim import Muon, SpectralOptimizer, param_groups
from tests.optim.test_spectral import parameter, spectral
from tests.optim.textbook import batches, convolutional, loss_of, mlp, same, snapshot, train

CUDA = torch.cuda.is_available()


def start(build=mlp, **options):
    torch.manual_seed(0)
    model = build()
    return model, SpectralOptimizer(param_groups(model, lr=options.pop("lr", 0.1)), **options)


def given(count, seed=0):
    return [batch for _, batch in zip(range(count), batches(seed=seed), strict=False)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_training_step(backend):
    build = lambda: mlp(8, bias=False)  # noqa: E731
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    (model, opt), (twin, other) = start(build), start(build)

    def step(images, labels):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        opt.step()
        return loss.detach()

    compiled, data = torch.compile(step, backend=backend), given(3)
    losses = [float(compiled(*batch)) for batch in data]
    assert losses == pytest.approx(train(twin, other, 3, iter(data)), rel=1e-3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-4)
        assert float(opt.state[p]["step"]) == 3
    torch._dynamo.reset()


def test_a_scaler_that_found_inf_leaves_everything_untouched():
    model, opt = start()
    train(model, opt, 2, batches())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(opt)
    (batch,) = given(1)
    opt.zero_grad()
    scaler.scale(loss_of(model, batch)).backward()
    model[1].weight.grad[0, 0] = math.inf
    scaler.step(opt)
    scaler.update()
    assert same(snapshot(opt), before) and scaler.get_scale() == 2.0 and int(opt.skipped) == 0

    twin, other = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (twin, other)):
        o.zero_grad()
        loss = loss_of(m, batch)
        (scaler.scale(loss) if o is opt else loss).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    other.step()
    assert not same(snapshot(opt), before)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


def test_bfloat16_autocast():
    """The step under autocast is the step without it."""
    (model, opt), (twin, other) = start(), start()
    losses = []
    for batch in given(10):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
            loss.backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone()
            opt.step()
        other.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert same(snapshot(opt), snapshot(other))
    assert sum(losses[-2:]) < sum(losses[:2])


def test_gradients_clipped_before_the_step():
    """Scaled gradients of one step scale its momentum, and nothing else of a first step."""
    (model, opt), (twin, other) = start(), start()
    (batch,) = given(1)
    for m in (model, twin):
        loss_of(m, batch).backward()
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    other.step()
    assert float(total) > 0.1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-6)
        ratio = opt.state[p]["momentum_buffer"].norm() / other.state[q]["momentum_buffer"].norm()
        assert float(ratio) == pytest.approx(1e-3 / float(total), rel=1e-3)


def test_gradients_accumulate():
    (model, opt), (twin, other) = start(), start()
    for a, b in zip(given(3, seed=1), given(3, seed=2), strict=True):
        opt.zero_grad()
        other.zero_grad()
        for batch in (a, b):
            (loss_of(model, batch) / 2).backward()
        loss_of(twin, tuple(torch.cat(pair) for pair in zip(a, b, strict=True))).backward()
        opt.step()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-5)


def test_averaged_models():
    model, opt = start()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    swa = AveragedModel(model)
    weights, mean = [], None

    def after():
        nonlocal mean
        ema.update_parameters(model)
        swa.update_parameters(model)
        now = model[1].weight.detach().clone()
        weights.append(now)
        mean = now if mean is None else 0.5 * mean + 0.5 * now

    train(model, opt, 4, batches(), after)
    torch.testing.assert_close(ema.module[1].weight.detach(), mean)
    torch.testing.assert_close(swa.module[1].weight.detach(), torch.stack(weights).mean(0))
    assert float((weights[-1] - weights[0]).norm()) > 0.1


def test_a_closure_as_lbfgs_and_lightning_call_it():
    (model, opt), (twin, other) = start(), start()
    (batch,) = given(1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert calls == [True] and loss.requires_grad
    assert [float(loss.detach())] == train(twin, other, 1, iter([batch]))
    assert same(snapshot(opt), snapshot(other))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(way):
    model, opt = start(convolutional, momentum_dtype=torch.float64)
    train(model, opt, 2, batches())
    pair = (model, opt)
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert same(snapshot(opt), snapshot(other)) and type(other) is SpectralOptimizer
    assert str(other.describe()) == str(opt.describe())
    data = given(2)
    train(model, opt, 2, iter(data))
    assert not same(snapshot(opt), snapshot(other)), "the copy shares tensors"
    train(twin, other, 2, iter(data))
    assert same(snapshot(opt), snapshot(other))
    assert all(state["momentum_buffer"].dtype == torch.float64 for state in other.state.values())


def test_distributed_checkpoint_round_trip(tmp_path):
    """One process; torch initializes the state of a fresh optimizer with a step of zero gradients and rate 0."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, opt = start(lr=torch.tensor(0.1), retract="rms_to_rms")
    train(model, opt, 4, batches())
    path = tmp_path / "checkpoint"
    weights, state = get_state_dict(model, opt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a single process
        dcp.save({"model": weights, "opt": state}, checkpoint_id=path)
    data = given(3, seed=3)
    train(model, opt, 3, iter(data))

    twin, other = start(lr=torch.tensor(0.1), retract="rms_to_rms")
    loaded = dict(zip(("model", "opt"), get_state_dict(twin, other), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, checkpoint_id=path)
    set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.1)
    train(twin, other, 3, iter(data))
    assert same(snapshot(opt), snapshot(other))


def test_get_optimizer_state_dict_on_a_fresh_optimizer_does_not_freeze_it():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    model = nn.Linear(30, 40, bias=False, dtype=torch.float64)
    opt = SpectralOptimizer(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    state = get_optimizer_state_dict(model, opt)
    assert same(model.weight.detach(), before) and opt.param_groups[0]["lr"] == 0.1
    set_optimizer_state_dict(model, opt, state)
    block = opt.state[model.weight]["block"].clone()
    for _ in range(3):
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn_like(model.weight)
        opt.step()
        moved = spectral(model.weight.detach() - before)
        assert moved == pytest.approx(0.1 * math.sqrt(40 / 30), rel=0.01)
    assert not torch.equal(opt.state[model.weight]["block"], block)


class FromHost(TorchFunctionMode):
    """Collects the shapes of tensors that a step sends from the host to the device."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sources = {torch.Tensor.to: args[:1], torch.Tensor.copy_: args[1:2], torch._foreach_copy_: args[1:2]}
        given = sources.get(func, ())
        for source in given[0] if given and isinstance(given[0], list | tuple) else given:
            first = out[0] if isinstance(out, list | tuple) else args[0] if out is None else out
            first = first[0] if isinstance(first, list | tuple) else first
            if source.device.type == "cpu" and first.device.type != "cpu":
                self.sent.append(tuple(source.shape))
        if func in (torch.tensor, torch.as_tensor) and out.device.type != "cpu":
            self.sent.append(tuple(out.shape))
        return out


OPTIONS = [
    {},
    {"nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"direction": "frobenius"},
    {"direction": "orthogonalize", "schedule": "keller_quintic"},
    {"safety": "upper", "block": 8},
    {"nonfinite": "strict"},
    {"nonfinite": "propagate"},
    {"retract": "rms_to_rms"},
    {"direction": "clip", "rank": 4},
    {"direction": "clip", "threshold": 0.5, "nesterov": True},
]


@pytest.fixture
def on_meta(monkeypatch):
    """Parameters on the meta device go the way of a GPU's, and hold no numbers that the host could ask for."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *args: self)
    passes.constant.cache_clear()
    yield
    passes.constant.cache_clear()


def steps_on_meta(options):
    """A cold and a warm step, then what a further warm one sends to the device."""
    shapes = {(12, 9): {}, (6, 4, 2, 2): {"kind": "conv", "groups": 2}, (9,): {}, (9, 4): {"kind": "embedding"}}
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    groups = [{"params": [p], **group} for p, group in zip(params, shapes.values(), strict=True)]
    opt = SpectralOptimizer(groups, lr=torch.tensor(0.1, device="meta"), **options)
    for warm in (False, True):
        for p in params:
            p.grad = torch.empty_like(p)
            if warm:  # `step` lies on the host; cold steps read more often
                opt.state[p]["step"].fill_(COLD_STEPS)
        opt.step()
    with FromHost() as seen:
        opt.step()
    return opt, params, seen.sent


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_asks_the_device_for_nothing(options, on_meta):
    """Every `device.type` decision of the engine as on a GPU, on the reference words: `bool`, `item` or a shape that
    depends on data raises for meta tensors. Not covered: other backends' kernels, and the hardware (tests below)."""
    opt, params, _ = steps_on_meta(options)
    assert all(float(opt.state[p]["step"]) == COLD_STEPS + 2 for p in params)
    assert all(x.device.type == "meta" for p in params for k, x in opt.state[p].items() if k != "step")
    assert opt.skipped.device.type == "meta" and len(list(opt.last_step())) == len(params)


MUON_OPTIONS = [
    {},
    {"nesterov": False, "schedule": "polar_express", "maximize": True},
    {"method": "gram", "flatten": False},
    {"normalizer": "schatten4", "compute_dtype": torch.float32},
    {"nonfinite": "strict"},
    {"nonfinite": "propagate"},
]


@pytest.mark.parametrize("options", MUON_OPTIONS, ids=str)
def test_a_step_of_muon_asks_the_device_for_nothing_and_sends_nothing(options, on_meta, monkeypatch):
    calls = []  # torch's kernel does not know the meta device
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: calls.append(kwargs["found_inf"]))
    shapes = {(12, 9): {}, (9, 30): {"num_heads": 3}, (2, 9, 4): {}, (6, 4, 2, 2): {}, (9,): {"algorithm": "adamw"}}
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    groups = [{"params": [p], **group} for p, group in zip(params, shapes.values(), strict=True)]
    opt = Muon(groups, lr=torch.tensor(0.1, device="meta"), **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        opt.step()
    with FromHost() as seen:
        opt.step()
    assert seen.sent == [] and len(calls) == 3
    assert all(x is None or x.device.type == "meta" for x in calls)
    assert all(x.device.type == "meta" for p in params for x in opt.state[p].values())
    assert opt.orthogonalized.device.type == opt.skipped.device.type == "meta"
    assert len(list(opt.last_step())) == len(params) - 1


def test_a_schedule_that_is_unsafe_in_a_device_s_dtype_is_refused_before_anything_moves(on_meta):
    """Products of bfloat16 parameters are float32 on CPUs, bfloat16 on what is treated as a GPU."""
    p = nn.Parameter(torch.empty((12, 9), dtype=torch.bfloat16, device="meta"))
    q = nn.Parameter(torch.empty(12, 9, device="meta"))
    p.grad, q.grad = torch.empty_like(p), torch.empty_like(q)
    before = p._version, q._version
    opt = Muon([{"params": [q]}, {"params": [p], "schedule": "cubic5"}])
    with pytest.raises(ValueError, match="'cubic5' is not safe.*bfloat16"):
        opt.step()
    assert (p._version, q._version) == before and len(opt.state) == 0


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "retract": "rms_to_rms"}, *OPTIONS[-2:]], ids=str)
def test_a_later_step_sends_nothing_to_the_device(options, on_meta):
    """Copies from memory that is not pinned wait for the device, and cannot be captured."""
    assert steps_on_meta(options)[2] == []


def test_the_detectors_detect(on_meta):
    with FromHost() as seen:
        torch.ones(3).to("meta")
        torch.tensor([1, 2], device="meta")
        torch.empty(4, device="meta").copy_(torch.ones(4))
        torch._foreach_copy_([torch.empty(5, device="meta")], [torch.ones(5)])
        torch.ones(6, device="meta").to("meta", torch.float64)
        torch.tensor([1, 2])
    assert seen.sent == [(3,), (2,), (4,), (5,)]
    p = nn.Parameter(torch.empty(12, 9, device="meta"))
    p.grad = torch.empty_like(p)
    opt = SpectralOptimizer([p], lr=0.1, error_if_nonfinite=True)  # it has to know before anything moves
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        opt.step()
    assert len(opt.state) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_on_a_gpu_never_wait(options):
    opt, params = on_a_gpu(**options)
    for _ in range(COLD_STEPS + 1):  # constants are sent once, kernels compiled
        new_gradients(params)
        opt.step()
    new_gradients(params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("options", MUON_OPTIONS, ids=str)
def test_steps_of_muon_on_a_gpu_never_wait(options):
    shapes = {(130, 90): {}, (240, 90): {"num_heads": 2}, (6, 4, 3, 3): {}, (90,): {"algorithm": "adamw"}}
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt = Muon([{"params": [p], **group} for p, group in zip(params, shapes.values(), strict=True)], **options)
    for _ in range(3):
        new_gradients(params)
        opt.step()
    before = [p.detach().clone() for p in params]
    new_gradients(params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_replays_as_eager_steps(options):
    opt, params = on_a_gpu(**options)
    for _ in range(COLD_STEPS + 1):
        new_gradients(params)
        opt.step()
    other, twins = on_a_gpu(**options)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p.data)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    before = snapshot(opt)
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        opt.step()
    torch.cuda.synchronize()
    after = snapshot(opt)
    assert same(before[1:], after[1:]), "a capture does not run"
    for bad in (0, 1, 2, 0):
        new_gradients(params)
        if bad:
            params[bad].grad.view(-1)[bad] = torch.nan
        for p, q in zip(params, twins, strict=True):
            q.grad.copy_(p.grad)
        graph.replay()
        other.step()
    if options.get("nonfinite") == "propagate":
        return
    assert int(opt.skipped) == int(other.skipped) == 2
    for p, q, old in zip(params, twins, before[1:], strict=True):
        assert not same(p.detach(), old)
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(opt.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def on_a_gpu(**options):
    torch.manual_seed(0)
    shapes = {(130, 90): {}, (240, 90): {"num_heads": 2}, (6, 4, 3, 3): {}, (90,): {}, (50, 40): {"kind": "embedding"}}
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in shapes]
    groups = [{"params": [p], **group} for p, group in zip(params, shapes.values(), strict=True)]
    for p in params:
        p.grad = torch.zeros_like(p)
    return SpectralOptimizer(groups, lr=0.1, **options), params


def new_gradients(params):
    for p in params:
        p.grad.copy_(torch.randn_like(p))


WIDTHS = (32, 64, 128, 256)
SPECTRAL_RATES = [2.0**-i for i in range(7, -1, -1)]
SGD_RATES = [2.0**-i for i in range(10, 0, -1)]


def final_loss(width, optimizer, steps, init):
    """Mean squared error of the last ten steps of a run, inf where it diverged."""
    torch.manual_seed(1)
    model = mlp(width)
    init(model)
    opt, losses = optimizer(model), []
    for _, (images, labels) in zip(range(steps), batches(128, seed=4), strict=False):
        opt.zero_grad()
        loss = (model(images) - nn.functional.one_hot(labels, 10)).square().sum(1).mean() / 2
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    final = sum(losses[-10:]) / 10
    return final if math.isfinite(final) else math.inf


def best(losses):
    return losses.index(min(losses))


@pytest.mark.full
def test_the_best_rate_of_a_width_is_that_of_every_width():
    def run(width, lr):
        def optimizer(model):
            return SpectralOptimizer(param_groups(model, lr=lr), momentum=0.9)

        return final_loss(width, optimizer, 60, sk.init_model_)

    found = {width: [run(width, lr) for lr in SPECTRAL_RATES] for width in WIDTHS}
    base = best(found[WIDTHS[0]])
    assert 0 < base < len(SPECTRAL_RATES) - 1, "the grid does not hold the best rate"
    assert all(abs(best(losses) - base) <= 1 for losses in found.values()), found
    assert all(losses[base] < 1.3 * min(losses) < 0.2 for losses in found.values()), found


@pytest.mark.full
def test_the_best_rate_of_plain_sgd_moves_with_the_width():
    """At eight times the width the best rate of the base width diverges."""

    def he(model):
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def run(width, lr):
        return final_loss(width, lambda model: torch.optim.SGD(model.parameters(), lr), 100, he)

    narrow, wide = ([run(width, lr) for lr in SGD_RATES] for width in (WIDTHS[0], WIDTHS[-1]))
    assert 0 < best(narrow) < len(SGD_RATES) - 1, "the grid does not hold the best rate"
    assert best(wide) < best(narrow) and wide[best(narrow)] == math.inf, (narrow, wide)


def test_steps_of_a_forced_reference_agree_with_the_chosen_backend():
    results = []
    for insist in (True, False):
        torch.manual_seed(0)
        p, b = parameter(40, 30, dtype=torch.float32), parameter(9, dtype=torch.float32)
        opt = SpectralOptimizer([p, b], lr=0.1)
        for _ in range(4):
            p.grad, b.grad = torch.randn_like(p), torch.randn_like(b)
            if insist:
                with sk.force("reference"):
                    opt.step()
            else:
                opt.step()
        results.append((p.detach(), b.detach()))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
