"""spectral_kernels.parametrizations against torch's own, exact singular values, and what users of torch's report."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torchs
from torch.nn.utils import parametrize

from spectral_kernels import AccuracyWarning, force
from spectral_kernels.kernels.contracts import INFO
from spectral_kernels.ops import track as tracker
from spectral_kernels.parametrizations import SpectralNorm, spectral_norm, spectral_norm_model

LAYERS = {
    "tall": lambda: nn.Linear(24, 40),
    "wide": lambda: nn.Linear(40, 24),
    "column": lambda: nn.Linear(1, 5),
    "row": lambda: nn.Linear(5, 1),
    "tiny": lambda: nn.Linear(2, 3),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer_of(module: nn.Module) -> SpectralNorm:
    return module.parametrizations.weight[0]


def matrix_of(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight (by default the normalized one) as torch's parametrization sees it, float64."""
    weight = (module.weight if weight is None else weight).detach().double()
    return (weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight).flatten(1)


def norm_of(module: nn.Module, weight: Tensor | None = None) -> float:
    return float(torch.linalg.matrix_norm(matrix_of(module, weight), 2))


def linear(W: Tensor, **options) -> nn.Module:
    module = nn.Linear(W.shape[1], W.shape[0], bias=False).to(W.dtype)
    module.weight.data.copy_(W)
    return spectral_norm(module, **options)


def replace_weight(module: nn.Module, W: Tensor) -> None:
    with torch.no_grad():
        module.parametrizations.weight.original.copy_(W)


def spectrum(s: list[float], m: int = 48, n: int = 32, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random singular vectors U (m, r), V (n, r) for `U diag(s) V'`."""
    U = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return U[:, : len(s)].to(dtype), V[:, : len(s)].to(dtype)


class Spy:
    """The words of a call, with what they were called with noted."""

    def __init__(self, words, launches: list[int], reads: list[float]) -> None:
        self.words, self.launches, self.reads = words, launches, reads

    def gram_matvec(self, A, *args):
        self.launches.append(len(A))
        return self.words.gram_matvec(A, *args)

    def block_krylov(self, *args):
        result = self.words.block_krylov(*args)
        self.reads += result[0][:, INFO["reads"]].tolist()
        return result


def spy(monkeypatch, launches: list[int], reads: list[float]) -> None:
    original = tracker.registry.words
    monkeypatch.setattr(tracker.registry, "words", lambda *key: Spy(original(*key), launches, reads))


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """Matrices per launch of the one-read kernel, in order."""
    seen: list[int] = []
    spy(monkeypatch, seen, [])
    return seen


@pytest.fixture
def krylov_reads(monkeypatch) -> list[float]:
    """Reads of every matrix in every run that has a stop rule."""
    seen: list[float] = []
    spy(monkeypatch, [], seen)
    return seen


# -- a drop-in for torch's


def test_signature_starts_with_torchs():
    theirs = list(inspect.signature(torchs.spectral_norm).parameters.values())
    mine = list(inspect.signature(spectral_norm).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(theirs) :])


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_is_torchs_both_ways_and_eval_agrees(kind):
    module, theirs = LAYERS[kind](), LAYERS[kind]()
    spectral_norm(module)
    torchs.spectral_norm(theirs)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for source, sink in ((theirs, module), (module, theirs)):
        with torch.no_grad():
            source.parametrizations.weight.original.normal_()
        source.train()
        source.weight  # noqa: B018  one update
        sink.load_state_dict(source.state_dict(), strict=True)
        source.eval(), sink.eval()
        torch.testing.assert_close(sink.weight, source.weight)
        G = torch.randn_like(source.weight)
        mine, theirs_ = [
            torch.autograd.grad((m.weight * G).sum(), m.parametrizations.weight.original)[0] for m in (module, theirs)
        ]
        torch.testing.assert_close(mine, theirs_)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_norm_is_one_from_the_start(kind, training):
    module = spectral_norm(LAYERS[kind]()).train(training)
    raw = norm_of(module, module.parametrizations.weight.original)
    assert abs(raw - 1) > 0.01
    assert abs(norm_of(module) - 1) <= 1e-3


def test_registration_removal_and_cache(launches):
    module = spectral_norm(nn.Linear(12, 8))
    before = module.parametrizations.weight.original.detach().clone()
    assert parametrize.is_parametrized(module, "weight")
    launches.clear()
    with parametrize.cached():
        assert module.weight is module.weight
    assert len(launches) == 1
    normalized = module.eval().weight.detach().clone()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert torch.equal(module.weight, normalized) and isinstance(module.weight, nn.Parameter)
    assert not torch.allclose(before, normalized)
    other = spectral_norm(nn.Linear(12, 8))
    raw = other.parametrizations.weight.original.detach().clone()
    parametrize.remove_parametrizations(other, "weight", leave_parametrized=False)
    assert torch.equal(other.weight, raw)


def test_assignment_sets_the_original():
    module = spectral_norm(nn.Linear(6, 4))
    W = torch.randn(4, 6)
    module.weight = W
    assert torch.equal(module.parametrizations.weight.original, W)


def test_vectors_are_divided_by_their_length():
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    spectral_norm(module, target=2.0)
    torch.testing.assert_close(module.weight, torch.tensor([1.2, 1.6]))
    assert list(module.state_dict()) == ["parametrizations.weight.original"]
    with torch.no_grad():
        module.parametrizations.weight.original.zero_()
    assert torch.equal(module.weight, torch.zeros(2))


def test_eps_has_no_effect():
    W = torch.randn(9, 7) * 1e-6
    weights = [linear(W, eps=eps).eval().weight for eps in (1e-12, 10.0)]
    assert torch.equal(*weights)


@pytest.mark.parametrize("reads", [1, 2, 3, 8])
def test_n_power_iterations_is_the_number_of_reads(reads, launches):
    module = linear(torch.randn(30, 20), n_power_iterations=reads)
    launches.clear()
    module.weight  # noqa: B018
    assert launches == [1] * reads


def test_many_reads_converge_a_replaced_weight():
    module = linear(torch.randn(60, 50, dtype=torch.float64), n_power_iterations=20)
    replace_weight(module, torch.randn(60, 50))
    assert abs(norm_of(module) - 1) <= 1e-3


# -- gradients


def test_training_gradient_is_exact_where_the_vectors_are():
    s = [3.0, 1.0, 0.5]
    U, V = spectrum(s)
    module = linear(U @ torch.diag(torch.tensor(s, dtype=U.dtype)) @ V.mT, tol=1e-8)
    G = torch.randn(48, 32, dtype=torch.float64)
    W = module.parametrizations.weight.original
    (grad,) = torch.autograd.grad((module.weight * G).sum(), W)
    exact = W.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad((exact / torch.linalg.matrix_norm(exact, 2) * G).sum(), exact)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_double_backward_is_that_of_fixed_vectors(training):
    module = linear(torch.randn(9, 7, dtype=torch.float64)).train(training)
    W, weight = module.parametrizations.weight.original, module.weight
    u, v = layer_of(module)._u.clone(), layer_of(module)._v.clone()
    x = torch.randn(7, dtype=torch.float64)

    def penalty(normalized: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((normalized @ x).tanh().sum(), W, create_graph=True)
        return torch.autograd.grad(g.square().sum(), W)[0]

    torch.testing.assert_close(penalty(weight), penalty(W / (u @ (W @ v))))


@pytest.mark.parametrize("make", [lambda net: [spectral_norm(m) for m in net[::2]], spectral_norm_model])
def test_two_forwards_then_backward(make):
    """pytorch#66363 and #68327: loss = D(real) - D(fake) raised: the second forward overwrote saved vectors."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    make(net)
    twin = copy.deepcopy(net)
    real, fake = torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():  # stale vectors, so that the two forwards differ
        for m in (*net[::2], *twin[::2]):
            m.parametrizations.weight.original[0] += 1
    (net(real).mean() - net(fake).mean()).backward()
    twin(real).mean().backward()
    twin(fake).mean().neg().backward()
    assert all(m.parametrizations.weight.original.grad.abs().max() > 1e-3 for m in net[::2])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_torch_func_sees_a_function_of_the_weight():
    module = linear(torch.randn(6, 5, dtype=torch.float64))
    state = copy.deepcopy(module.state_dict())
    name = "parametrizations.weight.original"
    x = torch.randn(5, dtype=torch.float64)

    def loss(W: Tensor) -> Tensor:
        return torch.func.functional_call(module, {name: W}, (x,)).square().sum()

    W = module.get_parameter(name).detach()
    grad = torch.func.grad(loss)(W)
    assert torch.equal(layer_of(module)._u, state["parametrizations.weight.0._u"])
    module.eval()
    (wanted,) = torch.autograd.grad(module(x).square().sum(), module.get_parameter(name))
    torch.testing.assert_close(grad, wanted)


# -- what users of torch's have reported


def test_eval_never_updates():
    """pytorch#8208: eval mode went on updating u."""
    for module in (linear(torch.randn(8, 6)), spectral_norm_model(nn.Sequential(nn.Linear(6, 8)))):
        module.eval()
        with torch.no_grad():
            next(module.parameters()).add_(1)
        before = {k: v.clone() for k, v in module.named_buffers()}
        x = torch.randn(3, 6)
        first = module(x)
        assert torch.equal(first, module(x))
        assert before and all(torch.equal(v, before[k]) for k, v in module.named_buffers())
        module.train()
        module(x)
        assert not all(torch.equal(v, before[k]) for k, v in module.named_buffers())


def test_fresh_module_in_eval_mode_is_right():
    """pytorch#51800: a fresh module in eval divided by a norm of random vectors (now: of 15 blind steps)."""
    errors, theirs = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        W = torch.randn(96, 96)
        errors.append(abs(norm_of(linear(W, seed=seed).eval()) - 1))
        other = nn.Linear(96, 96)
        other.weight.data.copy_(W)
        theirs.append(abs(norm_of(torchs.spectral_norm(other).eval()) - 1))
    assert max(errors) <= 1e-3 < max(theirs)


def test_nilpotent_matrix_has_norm_one():
    """pytorch#142840: the spectral radius (0 here) taken for the spectral norm (1)."""
    W = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    for training in (False, True):
        assert torch.equal(linear(2 * W).train(training).weight, W)


def replicate(module: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate does for the first device: new module objects around the same buffers."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicate(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter)
    return replica


@pytest.mark.parametrize("group", [False, True])
def test_replicas_keep_the_vectors(group):
    """pytorch#11476: under DataParallel the updates of u were lost with the replicas."""
    root = nn.Sequential(nn.Linear(30, 20))
    if group:
        spectral_norm_model(root)
    else:
        spectral_norm(root[0])
    replace_weight(root[0], torch.randn(20, 30))
    start = abs(norm_of(root.eval()[0]) - 1)
    root.train()
    for _ in range(30):
        replicate(root)(torch.randn(2, 30))
    assert start > 0.1 and abs(norm_of(root.eval()[0]) - 1) <= 1e-3
    assert layer_of(root[0]).given is None


DDP = """
    import os, sys, torch, torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from spectral_kernels.parametrizations import spectral_norm, spectral_norm_model
    torch.set_num_threads(1)
    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for group in (False, True):
        torch.manual_seed(rank)  # DDP broadcasts the parameters and buffers of rank 0
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 1))
        spectral_norm_model(net) if group else [spectral_norm(net[i]) for i in (0, 3)]
        ddp = DistributedDataParallel(net)
        opt = torch.optim.SGD(net.parameters(), lr=0.02)
        torch.manual_seed(10 + rank)
        start = net[0].parametrizations.weight[0]._u.clone()
        for _ in range(4):
            real, fake = torch.randn(2, 3, 1, 6, 6)
            opt.zero_grad()
            (ddp(real).mean() - ddp(fake).square().mean()).backward()
            opt.step()
        assert not torch.equal(start, net[0].parametrizations.weight[0]._u)
        for name, x in [*net.named_parameters(), *net.named_buffers()]:
            both = [torch.empty_like(x) for _ in range(2)]
            dist.all_gather(both, x.detach().contiguous())
            assert torch.equal(*both), (group, name)
        for layer in (net.eval()[0], net[3]):
            sigma = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
            assert abs(sigma - 1) < 2e-2, (group, sigma)
    dist.barrier()
    print("fine", flush=True)
    os._exit(0)  # gloo's threads may still run: one that meets the interpreter's end now and then aborts the process
"""


def test_distributed_data_parallel(tmp_path):
    """pytorch#8160: in-place updates between two forwards broke the backward; here two real processes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(DDP)]
    runs = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store")], stdout=-1, stderr=-2, text=True, env=env)
        for r in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=90)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 and "fine" in out for run, out in zip(runs, outputs, strict=True)), outputs


# -- the tracker


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reads", [1, 2])
def test_stale_vectors_are_left_behind(dtype, reads):
    """The new leading vectors are orthogonal to all that is tracked: without rounding, torch's never leaves the old."""
    s = torch.linspace(1, 0.2, 32, dtype=torch.float64)
    U, V = spectrum(s.tolist())
    hidden = s.clone()
    hidden[-1] = 0
    module = linear((U @ torch.diag(hidden) @ V.mT).to(dtype), n_power_iterations=reads)
    for _ in range(60):
        module.weight  # noqa: B018  vector and companions settle on singular vectors
    revealed = s.clone()
    revealed[-1] = 1.5
    W = (U @ torch.diag(revealed) @ V.mT).to(dtype)
    theirs = nn.Linear(32, 48, bias=False).to(dtype)
    torchs.spectral_norm(theirs)
    theirs.load_state_dict(module.state_dict())
    replace_weight(module, W), replace_weight(theirs, W)
    errors = [norm_of(module) - 1 for _ in range(10)]
    assert reads == 2 or errors[0] > 0.2  # it was hidden indeed
    assert abs(errors[-1]) <= 1e-3
    assert dtype == torch.float32 or [norm_of(theirs) - 1 for _ in range(10)][-1] > 0.2


def test_one_read_follows_training_better_than_two_of_torchs():
    """Mean and worst error of ||weight|| over a training run; torch's power step is two reads."""

    def errors(register) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        for m in net[::2]:
            register(m)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        teacher, out = torch.randn(48, 10), []
        for _ in range(60):
            x = torch.randn(64, 48)
            with parametrize.cached():
                loss = nn.functional.cross_entropy(10 * net(x), (x @ teacher).argmax(1))
                out += [abs(norm_of(m) - 1) for m in net[::2]]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.tensor(out[30:])

    mine, theirs = errors(spectral_norm), errors(torchs.spectral_norm)
    assert mine.mean() * 3 <= theirs.mean() and mine.max() * 2 <= theirs.max()


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-6])
def test_tol_is_kept_along_a_drift(tol):
    W = torch.randn(80, 64, dtype=torch.float64)
    module = linear(W, tol=tol)
    errors = []
    for _ in range(20):
        replace_weight(module, module.parametrizations.weight.original + 0.05 * torch.randn_like(W))
        errors.append(abs(norm_of(module) - 1))
    assert max(errors) <= tol


def test_tol_needs_fewer_reads_when_little_has_changed(krylov_reads):
    module = linear(torch.randn(200, 150), tol=1e-3)
    for _ in range(3):
        replace_weight(module, module.parametrizations.weight.original + 1e-3 * torch.randn(200, 150))
        module.weight  # noqa: B018
    assert krylov_reads[0] > 6 and len(krylov_reads) >= 4 and max(krylov_reads[1:]) <= 6


def test_unproved_tol_is_said(monkeypatch):
    module = linear(torch.randn(90, 80, dtype=torch.float64), tol=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "MOST_READS", 2)
        replace_weight(module, torch.randn(90, 80))
        with pytest.warns(AccuracyWarning, match="1 of 1 weights"):
            module.weight  # noqa: B018
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            linear(torch.randn(90, 80)).weight  # noqa: B018  no accuracy was asked for


def test_zero_weight_stays_zero_and_recovers():
    module = linear(torch.zeros(8, 6))
    state = {k: v.clone() for k, v in module.named_buffers()}
    for training in (True, False):
        module.train(training)
        weight = module.weight
        assert torch.equal(weight, torch.zeros(8, 6))
        (grad,) = torch.autograd.grad(weight.sum(), module.parametrizations.weight.original)
        assert torch.equal(grad, torch.ones(8, 6))
    assert torch.equal(layer_of(module)._u, state["parametrizations.weight.0._u"])
    module.train()
    replace_weight(module, torch.randn(8, 6))
    for _ in range(20):
        module.weight  # noqa: B018
    assert abs(norm_of(module) - 1) <= 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weight_leaves_the_vectors_alone(value):
    net = spectral_norm_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
    buffers = {k: v.clone() for k, v in net.named_buffers() if not k.endswith("_block")}
    good = net[0].parametrizations.weight.original.detach().clone()
    with torch.no_grad():
        net[0].parametrizations.weight.original[1, 2] = value
    weights = []
    net[0].register_forward_hook(lambda m, a, o: weights.append(m.weight))
    net[1].register_forward_hook(lambda m, a, o: weights.append(m.weight))
    net(torch.randn(2, 6))
    expected = torch.full((8, 6), torch.nan) if value != value else torch.zeros(8, 6)
    expected[1, 2] = torch.nan
    torch.testing.assert_close(weights[0].detach(), expected, equal_nan=True, rtol=0, atol=0)
    assert abs(float(torch.linalg.matrix_norm(weights[1].detach(), 2)) - 1) <= 1e-3
    for name, buffer in net[0].named_buffers():
        if not name.endswith("_block"):
            assert torch.equal(buffer, buffers[f"0.{name}"])
        assert torch.isfinite(buffer).all()
    replace_weight(net[0], good)
    net(torch.randn(2, 6))
    assert abs(norm_of(net.eval()[0]) - 1) <= 1e-3


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
def test_scale_does_not_matter(scale):
    W = torch.randn(20, 30) * scale
    module = linear(W)
    for _ in range(2):
        assert abs(norm_of(module) - 1) <= 1e-3
    replace_weight(module, torch.randn(20, 30))
    for _ in range(20):
        module.weight  # noqa: B018
    assert abs(norm_of(module) - 1) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_half_weights_are_estimated_in_float32(dtype, training):
    def divisor(W: Tensor, weight: Tensor) -> float:
        """Least squares over all entries: their roundings average out, an error of the norm does not."""
        weight = weight.detach().double()
        return float((W.double() * weight).sum() / weight.square().sum())

    for _ in range(6):
        W = torch.randn(80, 60).to(dtype)
        best = divisor(W, (W.double() / torch.linalg.matrix_norm(W.double(), 2)).to(dtype))
        module = linear(W, tol=1e-4).train(training)
        assert module.weight.dtype == dtype and layer_of(module)._u.dtype == torch.float32
        assert abs(divisor(W, module.weight) / best - 1) <= 1e-4  # a norm in half precision: up to 4e-3, 5e-4
        cast = linear(W.float(), tol=1e-4).to(dtype).train(training)  # the buffers with it
        assert layer_of(cast)._u.dtype == dtype
        assert abs(divisor(W, cast.weight) / best - 1) <= 1e-4


def test_autocast_does_not_touch_the_estimate():
    module = linear(torch.randn(30, 20)).eval()
    plain = module.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 20)).dtype == torch.bfloat16
        assert torch.equal(module.weight, plain)


# -- targets


def test_targets():
    W = torch.randn(12, 48)
    for target, wanted in ((2.5, 2.5), ("rms_to_rms", 0.5), ("original", 1.0), ("match_rms_adamw", 0.2 * 48**0.5)):
        module = linear(W, target=target, tol=1e-4)
        for training in (True, False):
            assert abs(norm_of(module.train(training)) / wanted - 1) <= 1e-4
    conv = spectral_norm(nn.ConvTranspose2d(4, 9, 2), target="rms_to_rms")  # (9, 4 * 2 * 2)
    assert abs(norm_of(conv) / 0.75 - 1) <= 1e-3


# -- whole models


class Twice(nn.Module):
    """A layer used twice, one that a condition skips, a convolution, a layer norm that nobody touches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.block = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)
        self.unused = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(16)
        self.weights: list[Tensor] = []

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = self.norm(self.conv(x).flatten(1))
        if fail:
            raise RuntimeError("on the way")
        self.weights = [self.block.weight, self.block.weight]
        return self.head(self.block(self.block(x)))


def test_model_updates_every_layer_in_one_launch(launches):
    model = spectral_norm_model(Twice())
    assert not parametrize.is_parametrized(model.norm)
    launches.clear()
    model(torch.randn(3, 2, 6))
    assert launches == [4]
    assert torch.equal(*model.weights)
    model.eval()(torch.randn(3, 2, 6))
    assert launches == [4]


@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3}, {"tol": 1e-3}])
def test_model_equals_layers_one_by_one(options):
    together, alone = Twice(), Twice()
    alone.load_state_dict(together.state_dict())
    spectral_norm_model(together, **options)
    for m in (alone.conv, alone.block, alone.head, alone.unused):
        spectral_norm(m, **options)
    x = torch.randn(3, 2, 6)
    for _ in range(3):
        for model in (together, alone):
            with torch.no_grad():
                for p in model.parameters():
                    p *= 1 + 0.1 * torch.arange(p.numel()).view(p.shape).cos()
        outputs = []
        for model in (together, alone):
            with parametrize.cached():
                outputs.append(model(x))
        alone.unused.weight  # noqa: B018  not part of the forward
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    mine, theirs = dict(together.named_buffers()), dict(alone.named_buffers())
    assert mine.keys() == theirs.keys() and len(mine) == 12
    for name in mine:
        if name.endswith("._u"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.eval()(x), alone.eval()(x), rtol=1e-4, atol=1e-5)


def test_layer_called_alone_updates_itself(launches):
    model = spectral_norm_model(Twice())
    launches.clear()
    model.block(torch.randn(2, 16))
    assert launches == [1]
    with pytest.raises(RuntimeError, match="on the way"):
        model(torch.randn(3, 2, 6), fail=True)
    assert all(layer_of(m).given is None for m in (model.conv, model.block, model.head))
    replace_weight(model.block, 3 * torch.eye(16))  # a stale sigma from the failed forward would show
    assert abs(norm_of(model.block) - 1) <= 1e-3


def test_frozen_part_of_a_model_is_not_updated():
    model = spectral_norm_model(Twice())
    model.block.eval()
    with torch.no_grad():
        model.block.parametrizations.weight.original.add_(0.5)
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(3, 2, 6))
    same = {k: torch.equal(v, before[k]) for k, v in model.named_buffers()}
    assert all(v for k, v in same.items() if k.startswith("block"))
    assert not any(v for k, v in same.items() if k.startswith("conv") and k.endswith("_block"))


def test_where_chooses_layers():
    model = spectral_norm_model(Twice(), where=lambda name, module: name != "head" and isinstance(module, nn.Linear))
    assert [parametrize.is_parametrized(m) for m in (model.conv, model.block, model.head, model.unused)] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="'block' is parametrized already"):
        spectral_norm_model(model)
    assert not parametrize.is_parametrized(model.conv)
    spectral_norm_model(model.conv)  # a root that is itself the layer
    assert abs(norm_of(model.conv) - 1) <= 1e-3
    with pytest.raises(ValueError, match="no Linear or convolution"):
        spectral_norm_model(nn.ReLU())


@pytest.mark.parametrize("make", [lambda: spectral_norm_model(Twice()), lambda: spectral_norm(nn.Linear(6, 6))])
def test_deepcopy_and_state_dict(make, launches):
    model = make()
    x = torch.randn(3, 6) if isinstance(model, nn.Linear) else torch.randn(3, 2, 6)
    twin = copy.deepcopy(model)
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    launches.clear()
    twin(x)
    assert len(launches) == 1  # the copy's own update, and of its own layers
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert not [k for k in state if k.endswith("_block")]
    fresh = make()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(x), twin.eval()(x))


def test_parametrization_pickles():
    """The module itself cannot: torch refuses to pickle parametrized modules. What it holds can."""
    layer = layer_of(linear(torch.randn(8, 6), target="rms_to_rms"))
    back = pickle.loads(pickle.dumps(layer))
    W = torch.randn(8, 6)
    assert torch.equal(back(W), layer(W)) and torch.equal(back._block, layer._block)


def test_fresh_direction_moves_with_every_update():
    layer = layer_of(linear(torch.randn(10, 7)))
    before = layer._block[0].clone()
    layer(torch.randn(10, 7))
    assert torch.equal(layer._block[0], before.roll(1)) and not torch.equal(layer._block[0], before)


def test_layers_parametrized_one_by_one_stay_out_of_the_group(launches):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    spectral_norm(net[0], n_power_iterations=2)
    spectral_norm_model(net, where=lambda name, module: name != "0")
    launches.clear()
    net(torch.randn(2, 6))
    assert launches == [2, 1, 1]


def test_same_start_on_every_rank_whatever_the_global_generator():
    W = torch.randn(10, 7)
    first = layer_of(linear(W))
    torch.manual_seed(99)
    second = layer_of(linear(W))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    other = layer_of(linear(W, seed=1))
    assert not torch.equal(first._block, other._block)


@pytest.mark.parametrize("make", [lambda m: [spectral_norm(x) for x in m.children() if hasattr(x, "weight")][0], None])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_graph_break(make, training):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    make(model) if make else spectral_norm_model(model)
    model.train(training)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 2, 4, 4)
        compiled(x).square().sum().backward()
        twin(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_op_keeps_its_promises():
    A = [torch.randn(8, 5), torch.randn(8, 5), torch.randn(9, 3)]
    right, left = ([torch.randn(a.shape[side]) for a in A] for side in (1, 0))
    blocks = [torch.randn(4, a.shape[1]) for a in A]
    torch.library.opcheck(tracker.track_, (A, right, left, blocks, 1, 0.0, 0))


@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 2}, {"tol": 1e-4}])
def test_every_backend_gives_the_same(options):
    W = torch.randn(40, 30)
    with force("reference"):
        wanted = linear(W, **options).weight
    torch.testing.assert_close(linear(W, **options).weight, wanted, rtol=1e-4, atol=1e-6)


def test_meta_device_and_empty_weights():
    module = spectral_norm(nn.Linear(6, 4, device="meta"))
    assert module.weight.shape == (4, 6) and layer_of(module)._u.is_meta
    module.load_state_dict(linear(torch.randn(4, 6)).state_dict() | {"bias": torch.zeros(4)}, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = spectral_norm(nn.Linear(0, 4))
    assert empty.weight.shape == (4, 0) and empty.eval().weight.shape == (4, 0)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"n_power_iterations": 0}, ValueError, "n_power_iterations"),
        ({"n_power_iterations": 1.5}, TypeError, "n_power_iterations"),
        ({"dim": "0"}, TypeError, "dim"),
        ({"dim": 2}, IndexError, r"\[-2, 1\], not 2"),
        ({"eps": "small"}, TypeError, "eps"),
        ({"tol": 0.0}, ValueError, "tol"),
        ({"tol": 1e-9}, ValueError, "tol"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"target": 0.0}, ValueError, "target"),
        ({"target": -1.0}, ValueError, "target"),
        ({"target": float("inf")}, ValueError, "target"),
        ({"target": "largest"}, ValueError, "rms_to_rms"),
        ({"name": "kernel"}, ValueError, "kernel"),
        ({"name": "bias", "target": "original"}, ValueError, "dimensions"),
        ({"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_bad_arguments_raise_and_leave_the_module_alone(options, error, message):
    module = nn.Linear(6, 4)
    with pytest.raises(error, match=message):
        spectral_norm(module, **options)
    assert not parametrize.is_parametrized(module)


def test_refused_weights():
    for weight in (torch.ones(3, 3, dtype=torch.int64), torch.ones(3, 3, dtype=torch.complex64)):
        module = nn.Module()
        module.register_buffer("weight", weight)
        with pytest.raises(TypeError, match="weight must be float32"):
            spectral_norm(module)
