"""SpectralMonitor: its numbers are those of the matrices, and nobody notices that it looks."""

from __future__ import annotations

import copy
import csv
import gc
import io
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_kernels as sk
from spectral_kernels.diagnostics import SpectralMonitor
from spectral_kernels.diagnostics import monitor as monitor_module

TRACKING = 1e-2  # the worst error that docs/tracking.md allows a tracked norm
ROUNDING = 1e-5


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(12, 16), nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 24),
        nn.Tanh(), nn.Linear(24, 5, bias=False),
    )  # fmt: skip


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 8, 3, groups=2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def batch(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    if isinstance(model[0], nn.Embedding):
        x = torch.randint(12, (8, 4), generator=generator)
    else:
        x = torch.randn(8, 8, generator=generator)
    return nn.functional.cross_entropy(model(x), torch.randint(5, (8,), generator=generator))


def train(model, optimizer, steps, monitor=None, after=None):
    """Rows of a short training; after(step): called between the optimizer's step and the monitor's."""
    generator, rows = torch.Generator().manual_seed(1), []
    for step in range(steps):
        optimizer.zero_grad()
        batch(model, generator).backward()
        optimizer.step()
        if after is not None:
            after(step)
        if monitor is not None and (row := monitor.step()):
            rows.append(row)
    return rows


def slices(layer: nn.Module, W: torch.Tensor) -> torch.Tensor:
    """The matrices of a weight, (k, m, n), written out once more."""
    if isinstance(layer, nn.Conv1d):
        g = layer.groups
        return torch.stack([part[..., i] for part in W.chunk(g) for i in range(W.shape[2])])
    return W[None]


def exact(layer: nn.Module, name: str, W: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Norms in float64 of every matrix of a parameter in the norm of its kind, and Condition 1 for its weight."""
    W = W.double()
    if isinstance(layer, nn.Embedding):
        return W.norm(dim=1).max()[None], math.sqrt(W.shape[1])
    if W.ndim == 1:
        gain = isinstance(layer, nn.LayerNorm) and name == "weight"
        return (W.abs().max() if gain else W.norm())[None], 1.0 if gain else math.sqrt(W.numel())
    stack = slices(layer, W)
    _, m, n = stack.shape
    positions = W.shape[2] if W.ndim == 3 else 1
    return torch.linalg.matrix_norm(stack, 2), math.sqrt(m / (n * positions))


def assert_below(value: float, truth: float, error: float) -> None:
    assert (1 - error) * truth <= value <= (1 + ROUNDING) * truth


def rank_of(stack: torch.Tensor) -> float:
    stack = stack.double()
    return float((torch.linalg.matrix_norm(stack) / torch.linalg.matrix_norm(stack, 2)).square().max())


@pytest.mark.parametrize("build", [mlp, convnet])
def test_numbers_are_those_of_the_matrices(build):
    model = build()
    optimizer = sk.optim.SpectralOptimizer(sk.optim.param_groups(model), lr=0.02)
    monitor = SpectralMonitor(optimizer, model, every=4)
    before: dict[str, torch.Tensor] = {}
    generator, seen = torch.Generator().manual_seed(1), 0
    for _ in range(12):
        optimizer.zero_grad()
        batch(model, generator).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        row = monitor.step()
        if row is None:
            continue
        seen += 1
        for path, layer in model.named_modules():
            for short, p in layer.named_parameters(recurse=False):
                name = f"{path}.{short}"
                M = optimizer.state[p]["momentum_buffer"]
                W, change = p.detach(), before[name] - p.detach()
                norms, target = exact(layer, short, W)
                weight = float(norms.max())
                tracked = p.ndim > 1 and not isinstance(layer, nn.Embedding)
                loose = TRACKING if tracked else ROUNDING
                assert_below(row[f"spectral/weight_norm/{name}"], weight, loose)
                assert row[f"spectral/weight_ratio/{name}"] == pytest.approx(
                    row[f"spectral/weight_norm/{name}"] / target, rel=1e-9
                )
                moved = float(exact(layer, short, change)[0].max())
                assert row[f"spectral/update_norm/{name}"] == pytest.approx(moved, rel=loose + 1e-4)
                if not tracked:
                    truth = float(exact(layer, short, M)[0].max())
                    assert row[f"spectral/momentum_norm/{name}"] == pytest.approx(truth, rel=ROUNDING)
                    assert f"spectral/weight_stable_rank/{name}" not in row
                    continue
                stack = M if M.ndim == 3 else M[None]
                truth = float(torch.linalg.matrix_norm(stack.double(), 2).max())
                assert_below(row[f"spectral/momentum_norm/{name}"], truth, TRACKING)
                assert row[f"spectral/weight_stable_rank/{name}"] == pytest.approx(
                    rank_of(slices(layer, W)), rel=2.5 * TRACKING
                )
                if f"spectral/error/{name}" in row:
                    assert row[f"spectral/momentum_stable_rank/{name}"] == pytest.approx(
                        rank_of(stack), rel=2.5 * TRACKING
                    )
        mine = [v for k, v in row.items() if k.startswith("spectral/weight_norm/")]
        assert row["spectral/weight_norm.max"] == max(mine) and row["spectral/weight_norm.min"] == min(mine)
        assert row["spectral/weight_norm.mean"] == pytest.approx(sum(mine) / len(mine), rel=1e-12)
    assert seen == 3


def test_reads_and_errors_are_of_the_whole_interval():
    model = mlp()
    optimizer = sk.optim.SpectralOptimizer(model.named_parameters(), lr=0.1, momentum=0.0)
    monitor = SpectralMonitor(optimizer, every=5, weights=False)
    reads, errors = [], []

    def note(_):
        infos = {id(p): info for p, info in optimizer.last_step()}
        reads.append(float(infos[id(model[2].weight)].reads.mean()))
        errors.append(float(infos[id(model[2].weight)].error.max()))

    rows = train(model, optimizer, 15, monitor, note)
    assert len(set(reads)) > 1
    for i, row in enumerate(rows):
        mine = slice(5 * i, 5 * i + 5)
        assert row["spectral/reads/2.weight"] == pytest.approx(sum(reads[mine]) / 5, rel=1e-12)
        assert row["spectral/error/2.weight"] == max(errors[mine])


def test_a_stack_shows_its_largest_matrix():
    W = nn.Parameter(torch.stack([torch.diag(torch.tensor([s, s / 2])) for s in (1.0, 4.0, 2.0)]))
    zero = nn.Parameter(torch.zeros(3, 2))
    optimizer = sk.optim.SpectralOptimizer([W, zero], lr=0.5)
    monitor = SpectralMonitor(optimizer, every=1)
    W.grad, zero.grad = torch.stack([10 * torch.eye(2), torch.eye(2), 5 * torch.eye(2)]), torch.zeros(3, 2)
    optimizer.step()
    row = monitor.step()
    expected = {"momentum_norm": 10.0, "momentum_stable_rank": 2.0, "update_norm": 0.5, "weight_norm": 3.5}
    for quantity, value in expected.items():
        assert row[f"spectral/{quantity}/group0.param0"] == pytest.approx(value, rel=1e-5)
    assert row["spectral/weight_ratio/group0.param0"] == pytest.approx(3.5, rel=1e-5)
    for quantity in ("momentum_norm", "update_norm", "weight_norm", "weight_ratio"):
        assert row[f"spectral/{quantity}/group0.param1"] == 0
    assert math.isnan(row["spectral/weight_stable_rank/group0.param1"])
    assert row["spectral/weight_stable_rank.min"] == row["spectral/weight_stable_rank.max"]  # NaN is left out


def test_updates_under_other_norms_and_scalars():
    W, s = nn.Parameter(torch.eye(3)), nn.Parameter(torch.tensor(2.0))
    optimizer = sk.optim.SpectralOptimizer([W, s], lr=0.1, direction="frobenius")
    monitor = SpectralMonitor(optimizer, every=1, prefix="")
    W.grad, s.grad = 2 * torch.eye(3), torch.tensor(-3.0)
    optimizer.step()
    row = monitor.step()
    assert row["momentum_norm/group0.param0"] == pytest.approx(2 * math.sqrt(3), rel=1e-6)
    assert row["update_norm/group0.param0"] == pytest.approx(0.1)
    assert row["momentum_norm/group0.param1"] == 3 and row["weight_norm/group0.param1"] == pytest.approx(2.1)
    assert "error/group0.param0" not in row and math.isnan(row["error.max"])


class _HostReads(TorchDispatchMode):
    """Counts what makes the host wait: .item(), bool(), float() of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_transfer_per_row_and_none_between(monkeypatch):
    sent = []
    real = monitor_module.to_host
    monkeypatch.setattr(monitor_module, "to_host", lambda x: sent.append(x.numel()) or real(x))
    counts = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = mlp()
        optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.02)
        monitor = SpectralMonitor(optimizer, every=3) if watch else None
        per_step = []
        with _HostReads() as reads:

            def note(step, reads=reads, per_step=per_step, watch=watch):
                per_step.append(reads.count)
                if watch:
                    assert len(sent) == step // 3

            train(model, optimizer, 7, monitor, note)
            per_step.append(reads.count)
        counts.append(per_step)
    assert len(sent) == 2
    assert counts[0] == counts[1]  # what the optimizer asks for on a CPU, and not one more


def test_training_stays_as_it_is_bit_for_bit():
    ends = []
    for every in (None, 1, 4):
        torch.manual_seed(0)
        model = mlp()
        optimizer = sk.optim.SpectralOptimizer(sk.optim.param_groups(model), lr=0.05)
        monitor = None if every is None else SpectralMonitor(optimizer, model, every=every)
        rows = train(model, optimizer, 8, monitor)
        assert len(rows) == (0 if every is None else 8 // every)
        held = [p.detach() for p in model.parameters()]
        held += [x for p in model.parameters() for x in optimizer.state[p].values()]
        ends.append([*held, torch.get_rng_state()])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_csv_round_trip():
    model = mlp()
    optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.05)
    rows = train(model, optimizer, 9, SpectralMonitor(optimizer, model, every=3))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)  # raises for a key that the first row did not have
    text.seek(0)
    back = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(text)]
    assert back == rows and all(type(v) is float for row in rows for v in row.values())


def test_keys_come_with_the_first_row_and_nan_is_what_is_missing():
    model = mlp()
    for p in model[5].parameters():
        p.requires_grad_(False)  # no gradient before step 6
    optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.05)
    monitor = SpectralMonitor(optimizer, model, every=3)

    def thaw(step):
        for p in model[5].parameters():
            p.requires_grad_(step >= 5)

    first, second, third = train(model, optimizer, 9, monitor, thaw)
    assert list(first) == list(second) == list(third)
    late = [f"spectral/{q}/5.weight" for q in ("momentum_norm", "update_norm", "reads", "error")]
    assert all(math.isnan(row[key]) for row in (first, second) for key in late)
    assert all(math.isfinite(third[key]) for key in late) and first["spectral/weight_norm/5.weight"] > 0
    assert math.isfinite(first["spectral/momentum_norm.mean"])

    added = nn.Parameter(torch.eye(4))
    optimizer.add_param_group({"params": [added], "lr": 0.1})
    fourth = monitor.row()
    assert [k for k in fourth if k in third] == list(third)
    assert fourth["spectral/weight_norm/group1.param0"] == pytest.approx(1)
    assert math.isnan(fourth["spectral/momentum_norm/group1.param0"])


def test_a_row_before_any_step():
    model = mlp()
    optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.1)
    row = SpectralMonitor(optimizer, model).row()
    assert math.isnan(row["spectral/momentum_norm/2.weight"]) and row["spectral/weight_norm/2.weight"] > 0
    assert row["spectral/skipped"] == 0


@pytest.mark.parametrize("nonfinite", ["skip", "strict", "propagate"])
def test_skipped_updates_are_counted_per_interval(nonfinite):
    W, b = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))
    optimizer = sk.optim.SpectralOptimizer([W, b], lr=0.1, nonfinite=nonfinite)
    skipped, moved = [], []
    for step in range(6):
        W.grad, b.grad = torch.eye(4) + step, torch.ones(4)
        if step == 0:
            b.grad[0] = math.inf if nonfinite != "propagate" else 1
        if step == 1:
            monitor = SpectralMonitor(optimizer, every=1)  # what came before it does not count
        if step in (2, 3):
            W.grad[1, 2] = math.nan
        optimizer.step()
        if step > 0:
            row = monitor.step()
            skipped.append(row["spectral/skipped"])
            moved.append(row["spectral/update_norm/group0.param0"])
    if nonfinite == "propagate":
        assert skipped == [0.0] * 5
        assert moved[0] == pytest.approx(0.1) and all(math.isnan(x) for x in moved[1:])
    else:
        assert skipped == [0.0, 1.0, 1.0, 0.0, 0.0]
        assert moved == pytest.approx([0.1, 0.0, 0.0, 0.1, 0.1])


def test_steps_that_the_optimizer_did_not_take_do_not_count():
    W = nn.Parameter(torch.randn(6, 5))
    optimizer = sk.optim.SpectralOptimizer([W], lr=0.1)
    monitor = SpectralMonitor(optimizer, every=4)
    W.grad = torch.randn(6, 5)
    optimizer.step()
    reads = float(next(iter(optimizer.last_step()))[1].reads)
    assert reads > 1  # a cold start; were it counted with the calls, the mean would be lower
    rows = [monitor.step() for _ in range(4)]
    assert rows[:3] == [None] * 3 and rows[3]["spectral/reads/group0.param0"] == reads
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["params"][0].grad = torch.randn(6, 5)
    twin.step()
    assert monitor._tallies == {}  # the steps of a copy are not its own


def test_names():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = sk.optim.SpectralOptimizer(one.named_parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(two.named_parameters())})
    assert {"spectral/weight_norm/weight", "spectral/weight_norm/group1.param0"} <= set(
        SpectralMonitor(optimizer).row()
    )
    both = nn.ModuleDict({"a": one, "b": two})
    named = set(SpectralMonitor(optimizer, both).row())
    assert {"spectral/weight_norm/a.weight", "spectral/weight_norm/b.bias"} <= named
    assert not any("group" in key for key in named)

    model = mlp()
    optimizer = sk.optim.SpectralOptimizer(sk.optim.param_groups(model), lr=0.1)
    assert set(SpectralMonitor(optimizer).row()) == set(SpectralMonitor(optimizer, model).row())


def test_parameters_that_never_move_have_no_keys():
    model, empty = nn.Sequential(nn.Linear(4, 4)), nn.Parameter(torch.empty(0, 4))
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "kind": "skip"}, {"params": [empty]}]
    optimizer = sk.optim.SpectralOptimizer(groups, lr=0.1)
    row = SpectralMonitor(optimizer, model).row()
    assert {key.rpartition("/")[2] for key in row if key.count("/") == 2} == {"0.weight"}


def test_less_can_be_asked_for():
    model = mlp()
    optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.1)
    whole = SpectralMonitor(optimizer, model, per_parameter=False).row()
    assert len(whole) == 1 + 3 * 8 and not any("weight_norm/" in key for key in whole)
    light = SpectralMonitor(optimizer, model, weights=False, prefix="n/").row()
    assert all(key.startswith("n/") for key in light) and not any("weight_" in key for key in light)
    assert "n/update_norm/2.weight" in light


def test_nobody_is_kept_alive():
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.1)
        first, second = SpectralMonitor(optimizer, model, every=1), SpectralMonitor(optimizer, model, every=1)
        train(model, optimizer, 2, first)
        assert len(optimizer._optimizer_step_post_hooks) == 2
        watcher = weakref.ref(second)
        del second
        assert watcher() is None and len(optimizer._optimizer_step_post_hooks) == 1
        ends = weakref.ref(model), weakref.ref(optimizer)
        del model, optimizer
        assert [end() for end in ends] == [None, None]
        with pytest.raises(RuntimeError, match="does not exist"):
            first.row()
    finally:
        gc.enable()


def test_close_takes_the_hook_off():
    W = nn.Parameter(torch.eye(3))
    optimizer = sk.optim.SpectralOptimizer([W], lr=0.1)
    monitor = SpectralMonitor(optimizer)
    monitor.close()
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((torch.optim.SGD([torch.ones(1)], 0.1),), {}, TypeError, "optimizer must be a SpectralOptimizer, not SGD"),
        ((None,), {}, TypeError, "optimizer"),
        (("good", "model"), {}, TypeError, "model must be a torch.nn.Module or None, not str"),
        (("good",), {"every": 0}, ValueError, "every must be at least 1"),
        (("good",), {"every": 2.5}, TypeError, "every must be an integer"),
        (("good",), {"prefix": None}, TypeError, "prefix must be a string"),
        (("good",), {"seed": "a"}, TypeError, "seed"),
    ],
)
def test_bad_arguments_raise_at_once(arguments, options, error, match):
    good = sk.optim.SpectralOptimizer([nn.Parameter(torch.eye(2))], lr=0.1)
    with pytest.raises(error, match=match):
        SpectralMonitor(*(good if a == "good" else a for a in arguments), **options)
    assert not good._optimizer_step_post_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = convnet().to(dtype)
    optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.05)
    monitor = SpectralMonitor(optimizer, model, every=1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for _ in range(3):
        row = monitor.row()
    exact_norm = float(torch.linalg.matrix_norm(model[5].weight.detach().double(), 2))
    assert row["spectral/weight_norm/5.weight"] == pytest.approx(exact_norm, rel=1e-4)
    model.float()  # kept blocks of another dtype are started anew
    assert monitor.row()["spectral/weight_norm/5.weight"] == pytest.approx(exact_norm, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_waited_for_once_per_row(monkeypatch):
    model = mlp().cuda()
    optimizer = sk.optim.SpectralOptimizer(model.parameters(), lr=0.05)
    monitor = SpectralMonitor(optimizer, model, every=2)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    sent = []

    def to_host(x):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return sent.append(x.numel()) or x.cpu().numpy()
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(monitor_module, "to_host", to_host)
    for _ in range(8):  # two rows to compile kernels and to keep a block, two to look at
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            monitor._collect(optimizer)  # the hook once more, where it is watched
            monitor.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(sent) == 4
