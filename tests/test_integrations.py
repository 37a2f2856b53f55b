"""spectral_kernels.integrations inside the optimizers of other packages, against exact singular values."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import re
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_kernels import integrations
from spectral_kernels.integrations import NewtonSchulz, use_in

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LR = 0.1
# No host's own coefficients: three classical steps, s -> 1.5 s - 0.5 s^3, of slope 3.4, whose rounding stays small
CLASSICAL = {"schedule": [(1.5, -0.5, 0.0)] * 3, "normalizer": "frobenius", "compute_dtype": torch.float32}


class Peer:
    """One host: how its optimizer is made, what it accepts, and what it multiplies the result with."""

    matrices_only = False
    dtype = torch.float32  # of what the host hands over

    def make(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> torch.optim.Optimizer:
        raise NotImplementedError

    def scale(self, rows: int, columns: int) -> float:
        return max(1.0, rows / columns) ** 0.5


class Torch(Peer):
    needs = "torch"
    matrices_only = True
    name = "torch.optim.Muon"

    def make(self, parameters, momentum=0.95):
        return torch.optim.Muon(parameters, lr=LR, momentum=momentum, weight_decay=0.0)


class PytorchOptimizer(Peer):
    needs = "pytorch_optimizer"
    name = "pytorch_optimizer.Muon"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def make(self, parameters, momentum=0.95):
        from pytorch_optimizer import Muon

        return Muon([{"params": parameters, "use_muon": True}], lr=LR, momentum=momentum, **self.options)


class Moonlight(PytorchOptimizer):
    def scale(self, rows, columns):
        return 0.2 * max(rows, columns) ** 0.5


class Heavyball(Peer):
    needs = "heavyball"
    name = "heavyball.Muon"

    def __init__(self, kind: str = "Muon", **options: Any) -> None:
        self.kind, self.options = kind, options

    def make(self, parameters, momentum=0.95):
        import heavyball

        return getattr(heavyball, self.kind)(parameters, lr=LR, betas=(momentum, 0.99), **self.options)


class GramNewtonSchulz(Peer):
    needs = "gram_newton_schulz"
    matrices_only = True
    name = "gram_newton_schulz.Muon"
    dtype = torch.bfloat16

    def make(self, parameters, momentum=0.95):
        from gram_newton_schulz import Muon

        options = {"ns_use_kernels": False, "gram_newton_schulz_restart_iterations": [2]}
        return Muon(parameters, lr=LR, momentum=momentum, weight_decay=0.0, **options)

    def scale(self, rows, columns):
        return 0.2 * max(rows, columns) ** 0.5


PEERS = {
    "torch": Torch(),
    "pytorch_optimizer": PytorchOptimizer(),
    "pytorch_optimizer, one at a time": PytorchOptimizer(foreach=False),
    "pytorch_optimizer, gram": PytorchOptimizer(ns_method="gram_newton_schulz"),
    "pytorch_optimizer, adjusted": Moonlight(use_adjusted_lr=True),
    "heavyball": Heavyball(),
    "heavyball, one at a time": Heavyball(multi_tensor=False),
    "heavyball, routed": Heavyball("MuonAdamW"),
    "gram_newton_schulz": GramNewtonSchulz(),
}


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    chosen = PEERS[request.param]
    if importlib.util.find_spec(chosen.needs) is None:
        pytest.skip(f"{chosen.needs} is not installed")
    if chosen.needs == "heavyball":
        import heavyball.utils

        monkeypatch.setattr(heavyball.utils, "compile_mode", None)  # the host's own switch: nothing is compiled
    if chosen.needs != "gram_newton_schulz":
        yield chosen
        return
    with torch.compiler.set_stance("force_eager"):
        yield chosen


class Net(nn.Module):
    """Tall, wide, twice the same shape and, where the host takes them, a convolution."""

    def __init__(self, matrices_only: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 10, bias=False)
        self.second = nn.Linear(10, 10, bias=False)
        self.third = nn.Linear(10, 10, bias=False)
        self.last = nn.Linear(10, 4, bias=False)
        self.conv = None if matrices_only else nn.Conv1d(2, 5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))
        return y.square().mean() + (0.0 if self.conv is None else self.conv(x.view(-1, 2, 3)).tanh().square().mean())


def train(model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)  # the batch, and the host's stochastic rounding
        optimizer.zero_grad()
        model(torch.randn(7, 6)).backward()
        optimizer.step()


def prepared(peer: Peer, momentum: float = 0.95) -> tuple[Net, Any]:
    model = Net(peer.matrices_only)
    return model, peer.make(list(model.parameters()), momentum)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def exact(G: Tensor) -> Tensor:
    """U f(S / |S|) V' in float64, f three times s -> 1.5 s - 0.5 s^3."""
    U, S, Vh = torch.linalg.svd(G.double().flatten(1), full_matrices=False)
    S = S / S.norm()
    for _ in range(3):
        S = 1.5 * S - 0.5 * S**3
    return U * S @ Vh


def test_every_update_is_our_polynomial(peer):
    model, optimizer = prepared(peer, momentum=0.0)  # the update is that of the gradient alone
    handle = use_in(optimizer, **CLASSICAL)
    assert handle.host == peer.name
    count = len(list(model.parameters()))
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(7, 6)).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        before = weights(model)
        optimizer.step()
        assert handle.matrices == count * (step + 1)
        for p, old, grad in zip(model.parameters(), before, grads, strict=True):
            expected = exact(grad.to(peer.dtype))
            measured = (old - p.detach()).double().flatten(1) / (LR * peer.scale(*expected.shape))
            # The weights, of size about 1, round to 2^-25; those of a bfloat16 host are near 2^-9 of the update
            error = 1e-5 if peer.dtype == torch.float32 else 2**-8
            assert (measured - expected).abs().max() < error * expected.norm()
            values, wanted = torch.linalg.svdvals(measured), torch.linalg.svdvals(expected)
            assert (values - wanted).abs().max() < error * wanted[0] * len(wanted)
    assert 0 < handle.calls <= handle.matrices


def test_removed_it_is_the_host_again(peer):
    model, optimizer = prepared(peer)
    plain_model, plain = prepared(peer)
    handle = use_in(optimizer)
    handle.remove()
    train(model, optimizer, 2)
    train(plain_model, plain, 2)
    assert same(weights(model), weights(plain_model)) and handle.matrices == 0

    with use_in(optimizer) as handle:
        train(model, optimizer, 1, start=2)
    counted = handle.matrices
    plain_model.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, start=3)
    train(plain_model, plain, 2, start=3)
    assert same(weights(model), weights(plain_model))
    assert handle.matrices == counted == len(weights(model))
    handle.remove()  # again: nothing happens
    assert use_in(optimizer).host == peer.name


def test_other_optimizers_stay_as_they_are(peer):
    alone_model, alone = prepared(peer)
    train(alone_model, alone, 3)
    ours_model, ours = prepared(peer)
    other_model, other = prepared(peer)
    handle = use_in(ours, **CLASSICAL)
    for step in range(3):
        train(ours_model, ours, 1, start=step)
        train(other_model, other, 1, start=step)
    assert same(weights(other_model), weights(alone_model)) and not same(weights(ours_model), weights(alone_model))
    assert handle.matrices == 3 * len(weights(ours_model))
    later_model, later = prepared(peer)  # made while another one has a handle
    train(later_model, later, 3)
    assert same(weights(later_model), weights(alone_model))


def test_the_state_dict_is_the_hosts(peer):
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shape(inner) for inner in value]
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

    plain_model, plain = prepared(peer)
    model, optimizer = prepared(peer)
    use_in(optimizer)
    train(plain_model, plain, 2)
    train(model, optimizer, 2)
    assert shape(optimizer.state_dict()) == shape(plain.state_dict())
    torch.save(optimizer.state_dict(), io.BytesIO())


class Failing(NewtonSchulz):
    """Raises in its n-th call."""

    fails_in = 2

    def __call__(self, X: Any, epsilon: Any = None, **_: Any) -> Any:
        if self.calls + 1 == self.fails_in:
            raise FloatingPointError("the second call")
        return super().__call__(X, epsilon)


def test_an_exception_inside_a_step_leaves_nothing_behind(peer):
    alone_model, alone = prepared(peer)
    train(alone_model, alone, 2)
    model, optimizer = prepared(peer)
    failing = Failing()
    handle = use_in(optimizer, failing)
    with pytest.raises(FloatingPointError, match="the second call"):
        train(model, optimizer, 3)
    other_model, other = prepared(peer)
    train(other_model, other, 2)
    assert same(weights(other_model), weights(alone_model))
    failing.fails_in = 0
    calls = handle.calls
    train(model, optimizer, 1)
    assert handle.calls > calls
    handle.remove()


def restored() -> bool:
    import torch.optim._muon as module

    return module._zeropower_via_newtonschulz.__module__ == module.__name__


def test_torchs_function_is_exchanged_only_during_a_step():
    model, optimizer = prepared(PEERS["torch"])
    seen = []

    class Looking(NewtonSchulz):
        def __call__(self, X, epsilon=None, **_):
            seen.append(restored())
            return super().__call__(X)

    use_in(optimizer, Looking())
    assert restored()
    train(model, optimizer, 1)
    assert seen == [False] * 4 and restored()
    with pytest.raises(FloatingPointError):
        train(model, prepared_failing(model), 1)
    assert restored()


def prepared_failing(model: Net) -> torch.optim.Optimizer:
    optimizer = PEERS["torch"].make(list(model.parameters()))
    use_in(optimizer, Failing())
    return optimizer


def test_a_closure_that_steps_another_muon_of_torch():
    alone_model, alone = prepared(PEERS["torch"])
    train(alone_model, alone, 2)
    model, optimizer = prepared(PEERS["torch"])
    other_model, other = prepared(PEERS["torch"])
    handle = use_in(optimizer, **CLASSICAL)
    batch = torch.randn(7, 6)
    for step in range(2):

        def closure(step: int = step) -> Tensor:
            train(other_model, other, 1, start=step)
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    assert same(weights(other_model), weights(alone_model))
    assert handle.matrices == 2 * 4


def test_threads_do_not_see_each_others_hooks():
    alone_model, alone = prepared(PEERS["torch"])
    train(alone_model, alone, 1)
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(NewtonSchulz):
        def __call__(self, X, epsilon=None, **_):
            inside.set()
            assert go_on.wait(60)
            return super().__call__(X)

    model, optimizer = prepared(PEERS["torch"])
    other_model, other = prepared(PEERS["torch"])
    handle = use_in(optimizer, Waiting())
    for m in (model, other_model):
        torch.manual_seed(100)
        m(torch.randn(7, 6)).backward()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    try:
        assert inside.wait(60) and not restored()
        other.step()
    finally:
        go_on.set()
        thread.join(60)
    assert same(weights(other_model), weights(alone_model))
    assert handle.matrices == 4 and restored()


@pytest.mark.parametrize("first", ["scheduler", "handle"])
def test_learning_rate_schedulers_before_and_after(first):
    model, optimizer = prepared(PEERS["torch"])
    if first == "handle":
        handle = use_in(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if first == "scheduler":
        handle = use_in(optimizer)
    train(model, optimizer, 2)
    with warnings.catch_warnings(action="error"):  # it warns where it does not find itself around `step`
        scheduler.step()
    assert handle.matrices == 8
    reference = Net(True)
    reference.load_state_dict(model.state_dict())
    plain = PEERS["torch"].make(list(reference.parameters()))
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    handle.remove()
    train(model, optimizer, 1)
    train(reference, plain, 1)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")  # the scheduler's own mark stays
    assert handle.matrices == 8 and same(weights(model), weights(reference))


def test_bfloat16_without_nesterov_keeps_the_momentum_buffer():
    """torch normalizes the buffer itself there, in place (2.13)."""
    parameter = nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
    gradient = torch.randn(6, 4, dtype=torch.bfloat16)
    optimizer = torch.optim.Muon([parameter], nesterov=False, momentum=0.5)
    use_in(optimizer)
    parameter.grad = gradient.clone()
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.zeros_like(gradient).lerp_(gradient, 0.5))
    assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["torch", "pytorch_optimizer", "heavyball"])
def test_tiny_and_huge_gradients_are_orthogonalized_too(name, monkeypatch):
    """The hosts clamp at 1e-7: below it their update shrinks. torch's norm of 2^100 is infinite in float32."""
    pytest.importorskip(PEERS[name].needs)
    if name == "heavyball":
        monkeypatch.setattr("heavyball.utils.compile_mode", None)
    gradient = torch.randn(5, 8)
    results = []
    for scale in (1.0, 2.0**-60, 2.0**100):
        parameter = nn.Parameter(torch.zeros(5, 8))
        optimizer = PEERS[name].make([parameter])
        use_in(optimizer, **CLASSICAL)
        parameter.grad = gradient * scale
        optimizer.step()
        results.append(parameter.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)
    assert results[0].norm() > 0.1 * LR


@pytest.mark.parametrize(
    ("package", "kind", "groups"),
    [("pytorch_optimizer", "MuonClip", True), ("heavyball", "MuonLaProp", False)],
)
def test_relatives_of_the_known_optimizers(package, kind, groups, monkeypatch):
    made = getattr(pytest.importorskip(package), kind)
    if package == "heavyball":
        monkeypatch.setattr("heavyball.utils.compile_mode", None)
    model = Net(False)
    parameters = list(model.parameters())
    handle = use_in(made([{"params": parameters, "use_muon": True}] if groups else parameters))
    train(model, handle._optimizer, 2)
    assert handle.matrices == 2 * len(parameters)


def test_rank_one_gradients_stay_of_rank_one():
    """torch's bfloat16 iteration makes several large singular values of the rounding."""
    seconds = []
    for hooked in (True, False):
        torch.manual_seed(3)
        parameter = nn.Parameter(torch.zeros(64, 128))
        optimizer = PEERS["torch"].make([parameter])
        if hooked:
            use_in(optimizer)
        parameter.grad = torch.outer(torch.randn(64), torch.randn(128))
        optimizer.step()
        values = torch.linalg.svdvals(parameter.detach().double() / LR)
        assert values[0] > 0.6
        seconds.append(float(values[1]))
    assert seconds[0] < 1e-3 and seconds[1] > 0.1


def test_copies_and_pickles_of_an_optimizer_are_the_hosts():
    model, optimizer = prepared(PEERS["torch"])
    handle = use_in(optimizer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for parameter in copied.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        copied.step()
    assert handle.matrices == 0
    train(model, optimizer, 1)
    assert handle.matrices == 4


def test_heavyballs_stages_assigned_anew(monkeypatch):
    """The host copies them then."""
    pytest.importorskip("heavyball")
    monkeypatch.setattr("heavyball.utils.compile_mode", None)
    model, optimizer = prepared(PEERS["heavyball"])
    plain_model, plain = prepared(PEERS["heavyball"])
    handle = use_in(optimizer)
    optimizer.fns = optimizer.fns
    train(model, optimizer, 1)
    assert handle.matrices == 5
    handle.remove()
    plain_model.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    train(plain_model, plain, 1)
    assert handle.matrices == 5 and same(weights(model), weights(plain_model))


# What is refused


def test_unknown_optimizers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"torch\.optim\.Muon, pytorch_optimizer\.Muon, heavyball.*not torch\S*AdamW"):
        use_in(torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))]))


def test_a_second_handle_and_wrong_arguments_are_refused():
    _, optimizer = prepared(PEERS["torch"])
    with pytest.raises(ValueError, match="options .steps."):
        use_in(optimizer, NewtonSchulz(), steps=3)
    with pytest.raises(TypeError, match="must be a NewtonSchulz, not function"):
        use_in(optimizer, lambda X: X)
    with pytest.raises(ValueError, match="schedule"):
        use_in(optimizer, schedule="nowhere")
    handle = use_in(optimizer)
    with pytest.raises(ValueError, match="handle already"):
        use_in(optimizer)
    handle.remove()
    use_in(optimizer)


def test_compiled_hosts_are_refused():
    heavyball, peers = pytest.importorskip("heavyball"), pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ValueError, match="compile_step=True"):
        use_in(heavyball.Muon([nn.Parameter(torch.ones(2, 2))], compile_step=True))
    with pytest.raises(ValueError, match="no stage orthogonalize_update"):
        use_in(heavyball.AdamW([nn.Parameter(torch.ones(2, 2))]))
    _, optimizer = prepared(PEERS["pytorch_optimizer"])
    optimizer._compile_foreach()
    with pytest.raises(ValueError, match="compiled"):
        use_in(optimizer)
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True}]
    with pytest.raises(ValueError, match="optimizer must be one of"):  # calls the hooked method on one path only
        use_in(peers.AdaMuon(groups))


def test_a_step_compiled_as_one_graph_is_refused():
    _, optimizer = prepared(PEERS["torch"])
    handle = use_in(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(10, 6)
    with pytest.raises(Exception, match="fullgraph=True|Observed exception"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert handle.calls == 0 and restored()
    torch.compiler.reset()


# dion's contract: newton_schulz_func(X, epsilon=e), X of 2 or 3 dimensions in bfloat16, e a 0-D tensor; reshaped to
# X's shape and sent to other ranks in X's dtype. The package is not on PyPI.


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 6, 4), (1, 4, 4), (0, 4, 6)])
def test_what_dion_calls(shape):
    function = NewtonSchulz(**CLASSICAL)
    X = torch.randn(shape, dtype=torch.bfloat16)
    kept = X.clone()
    result = function(X, epsilon=torch.tensor(1e-8))
    assert result.dtype == X.dtype and result.shape == X.shape and torch.equal(X, kept)
    assert torch.equal(result, function(X)) and torch.equal(result, function(X, epsilon=torch.tensor(1e3)))
    matrices = X.reshape(-1, *shape[-2:])
    for got, matrix in zip(result.reshape(matrices.shape), matrices, strict=True):
        expected = exact(matrix)
        assert (got.double() - expected).abs().max() <= 2**-8 * expected.abs().max()  # rounded to bfloat16 once
    assert function.calls == 3 and function.matrices == 3 * len(matrices)


def test_padding_matrices_of_zeros_stay_zero():
    """dion pads a batch to the number of ranks with them."""
    X = torch.randn(3, 6, 4, dtype=torch.bfloat16)
    X[2] = 0
    result = NewtonSchulz()(X, epsilon=torch.tensor(1e-8))
    assert not result[2].any() and result[:2].isfinite().all() and result[:2].any()


def test_lists_are_counted_by_matrix():
    function = NewtonSchulz()
    results = function([torch.randn(2, 3), torch.randn(4, 5, 6)])
    assert [r.shape for r in results] == [(2, 3), (4, 5, 6)]
    assert (function.calls, function.matrices) == (1, 5)


def test_newton_schulz_can_be_pickled_and_copied():
    function = NewtonSchulz("polar_express", steps=5, method="standard")
    X = torch.randn(4, 6)
    result = function(X)
    for again in (pickle.loads(pickle.dumps(function)), copy.deepcopy(function)):
        assert (again.calls, again.matrices, again.options) == (1, 1, function.options)
        assert torch.equal(again(X), result)
    assert "steps=5" in repr(function) and "1 matrices in 1 calls" in repr(function)


@pytest.mark.parametrize("options", [{"schedule": "nowhere"}, {"method": "nowhere"}, {"normalizer": "nowhere"}])
def test_wrong_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match="nowhere"):
        NewtonSchulz(**options)


@pytest.fixture
def dion(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands for microsoft/dion: an optimizer of its class that calls as its own do."""

    class Muon(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.01, newton_schulz_func: Callable[..., Tensor] | None = None):
            super().__init__(params, {"lr": lr})
            self._newton_schulz_func = newton_schulz_func or self.own

        @staticmethod
        def own(X: Tensor, epsilon: Tensor) -> Tensor:
            return X / (X.norm() + epsilon)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                X = torch.stack([p.grad.bfloat16() for p in params])
                U = self._newton_schulz_func(X, epsilon=torch.tensor(1e-8)).reshape(X.shape)
                torch._foreach_sub_(params, torch._foreach_mul(list(U), torch.tensor(group["lr"])))

    package, module = types.ModuleType("dion"), types.ModuleType("dion.muon")
    package.Muon = module.Muon = Muon  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dion", package)
    monkeypatch.setitem(sys.modules, "dion.muon", module)
    return package


def test_an_optimizer_of_dion(dion):
    parameters = [nn.Parameter(torch.zeros(4, 6)) for _ in range(3)]
    optimizer = dion.Muon(parameters, lr=1.0)
    for parameter in parameters:
        parameter.grad = torch.randn(4, 6)
    with use_in(optimizer, **CLASSICAL) as handle:
        optimizer.step()
    assert (handle.host, handle.calls, handle.matrices) == ("dion.Muon", 1, 3)
    for parameter in parameters:
        error = (-parameter.detach().double() - exact(parameter.grad.bfloat16())).abs().max()
        assert error < 2**-8
    assert optimizer._newton_schulz_func is dion.Muon.own


# The page and the package


def test_the_examples_run(dion, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 3
    if importlib.util.find_spec("heavyball") is not None:
        monkeypatch.setattr("heavyball.utils.compile_mode", None)
    names: dict[str, Any] = {}
    ran = 0
    with torch.compiler.set_stance("force_eager"):
        for block in blocks:
            host = re.search(r"^from (\w+) import Muon", block[1], re.MULTILINE)
            if host and host[1] != "dion" and importlib.util.find_spec(host[1]) is None:
                continue
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], PAGE.name, "exec"), names)  # errors name the line of the page
            ran += 1
    assert ran >= 3  # what needs no other package than torch


def test_every_known_host_has_its_place_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert [host.name for host in integrations.HOSTS if host.name.split(".")[0] not in text] == []


def test_hosts_are_not_imported():
    hosts = "{'pytorch_optimizer', 'heavyball', 'gram_newton_schulz', 'dion', 'torch._dynamo'}"
    code = f"import sys, spectral_kernels.integrations as i; i.NewtonSchulz(); print({hosts} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()"]
