"""watch: the terms add up, the numbers are the definitions, and training does not notice."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectral_kernels import diagnostics
from spectral_kernels.bench.training import Transformer
from spectral_kernels.diagnostics import final_layer_alignment, watch

REL = 5e-4


def mlp(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(inplace=True), nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, 5)
    )


def data(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 12, generator=generator), torch.randint(5, (count,), generator=generator)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def norm2(A: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(A.detach().double(), 2))


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def test_terms_of_a_hidden_layer_are_the_definitions():
    model, (x, y) = mlp(), data()
    optimizer = sgd(model)
    before = copy.deepcopy(model)
    with watch(model) as w:
        step(model, optimizer, x, y)
        G = model[2].weight.grad.clone()
        model(x)
    row = w.rows()["2"]
    with torch.no_grad():
        h_in, h_new = before[:2](x), model[:2](x)
        W, dW, dh = before[2].weight.detach(), model[2].weight - before[2].weight, h_new - h_in
        terms = h_in @ dW.T, dh @ W.T, dh @ dW.T
        change, h = model[:3](x) - before[:3](x), before[:3](x)
    assert torch.allclose(sum(terms), change, atol=1e-5)
    expected = {
        "size": rms(h),
        "change": float((change.norm(dim=1) / h.norm(dim=1)).mean()),
        "weight_norm": norm2(W),
        "weight_ratio": norm2(W),  # square
        "update_norm": norm2(dW),
        "update_stable_rank": (float(dW.norm()) / norm2(dW)) ** 2,
        "weight_alignment": float(((h_in @ W.T).norm(dim=1) / h_in.norm(dim=1)).mean()) / norm2(W),
        "alignment": float((terms[0].norm(dim=1) / h_in.norm(dim=1)).mean()) / norm2(dW),
        "update_term": rms(terms[0]),
        "input_term": rms(terms[1]),
        "both_term": rms(terms[2]),
        "input_bound": float((terms[1].norm(dim=1) / dh.norm(dim=1)).mean()) / norm2(W),
        "both_bound": float((terms[2].norm(dim=1) / dh.norm(dim=1)).mean()) / norm2(dW),
        "sum_ratio": float((change.norm(dim=1) / sum(t.norm(dim=1) for t in terms)).mean()),
        "inner": float((dW * G).sum()),
        "gradient_norm": norm2(G),
        "gradient_ratio": norm2(G),
    }
    for key, value in expected.items():
        assert getattr(row, key) == pytest.approx(value, rel=REL), key
    assert row.inner == pytest.approx(-0.1 * float(G.square().sum()), rel=1e-4)
    head = w.rows()["4"]
    assert head.weight_ratio == pytest.approx(norm2(before[4].weight) / math.sqrt(5 / 24), rel=REL)
    assert head.gradient_ratio == pytest.approx(head.gradient_norm / math.sqrt(24 / 5), rel=1e-6)
    first = w.rows()["0"]
    assert first.input_term == 0 and math.isnan(first.input_bound)  # the inputs did not change


def test_one_input_of_plain_sgd():
    model, (x, y) = mlp(), data(1)
    with watch(model, ["2"]) as w:
        step(model, torch.optim.SGD(model.parameters(), 0.1), x, y)
        model(x)
    (row,) = w.rows()
    for value in (row.alignment, row.update_stable_rank, row.contributions):
        assert value == pytest.approx(1, abs=1e-4)


def test_training_stays_as_it_is_bit_for_bit_and_hooks_go():
    ends = []
    for watched in (False, True):
        model, (x, y) = mlp(), data()
        optimizer = sgd(model)
        w = watch(model) if watched else None
        losses = []
        for _ in range(4):
            losses.append(step(model, optimizer, x, y))
            if w is not None:
                w.rows()
                final_layer_alignment(model, x)
        ends.append([torch.tensor(losses), *(p.detach() for p in model.parameters()), torch.get_rng_state()])
        if w is not None:
            w.close()
            w.close()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_hooks_go_with_an_error_and_with_the_watch():
    model, (x, _) = mlp(), data()
    with pytest.raises(ZeroDivisionError), watch(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())
    gc.disable()
    try:
        seen = watch(model)
        model(x)
        end = weakref.ref(seen)
        del seen
        assert end() is None and not any(m._forward_hooks for m in model.modules())
    finally:
        gc.enable()


def test_convolutions_of_every_sort_fill_their_bounds():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    x, y = torch.randn(6, 3, 9, 9), torch.randint(5, (6,))
    model(x)
    before = copy.deepcopy(model)
    with watch(model) as w:
        step(model, sgd(model, 0.01), x, y)
        model(x)
    rows = w.rows()
    assert [row.name for row in rows] == ["0", "1", "2", "4"]
    for row in rows:
        assert 0 < row.alignment <= 1 and 0 < row.weight_alignment <= 1
    for i in (1, 2):
        m = model[i]
        with torch.no_grad():
            h, change = before[: i + 1](x), model[: i + 1](x) - before[: i + 1](x)
        row = rows[str(i)]
        # of the last slices by hand: (kernel positions, groups, m, n)
        dW = (m.weight - before[i].weight).detach().unflatten(0, (m.groups, -1)).permute(3, 4, 0, 1, 2)
        sizes = torch.linalg.matrix_norm(dW.double(), 2).flatten(0, 1)
        assert row.update_norm == pytest.approx(float(sizes.sum(0).max()), rel=REL)
        fan = m.out_channels / m.in_channels
        assert row.update_ratio == pytest.approx(float(sizes.max()) * len(sizes) / math.sqrt(fan), rel=REL)
        G = m.weight.grad.unflatten(0, (m.groups, -1)).permute(3, 4, 0, 1, 2)
        largest = float(torch.linalg.matrix_norm(G.double(), 2).max())
        assert row.gradient_ratio == pytest.approx(largest * m.groups * math.sqrt(fan), rel=REL)
        assert row.change == pytest.approx(
            float((change.flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)).mean()), rel=1e-3
        )
        db = (m.bias - before[i].bias).detach().norm() * math.sqrt(change[0, 0].numel())
        with torch.no_grad():
            h_in, h_new = before[:i](x), model[:i](x)
            new, old = copy.deepcopy(m), copy.deepcopy(before[i])
            new.bias.zero_(), old.bias.zero_()
            terms = new(h_in) - old(h_in), old(h_new - h_in), new(h_new - h_in) - old(h_new - h_in)
            total = sum(t.flatten(1).norm(dim=1) for t in terms) + db
        exact = float((change.flatten(1).norm(dim=1) / total).mean())
        assert row.sum_ratio == pytest.approx(exact, rel=1e-3) and 0 < exact <= 1


def test_a_transformer_by_name():
    torch.manual_seed(0)
    model = Transformer(32, layers=1)
    x, y = torch.randint(96, (4, 10)), torch.randint(96, (4, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    longest = float(model.characters.weight.detach().norm(dim=1).max())
    with watch(model, ["characters", "blocks.0.qkv", "blocks.0.norm1", "readout"]) as w:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        model(x)
    rows = w.rows()
    qkv, norm, embedding = rows["blocks.0.qkv"], rows["blocks.0.norm1"], rows["characters"]
    assert qkv.gradient_norm == pytest.approx(norm2(gradients["blocks.0.qkv.weight"]), rel=REL)
    assert qkv.inner == pytest.approx(-0.1 * float(gradients["blocks.0.qkv.weight"].square().sum()), rel=1e-4)
    assert norm.change > 0 and math.isnan(norm.weight_norm) and math.isnan(norm.alignment)
    assert embedding.weight_norm == pytest.approx(longest, rel=1e-6)
    assert embedding.inner == pytest.approx(-0.1 * float(gradients["characters.weight"].square().sum()), rel=1e-4)
    assert math.isnan(embedding.input_term) and embedding.sum_ratio == pytest.approx(1, rel=1e-4)


def test_a_module_called_twice_counts_all_its_rows():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 6)
    with watch(model) as w:
        model(x).square().sum().backward()
    assert w.rows()["layer"].gradient_norm == pytest.approx(norm2(model.layer.weight.grad), rel=REL)


def test_before_the_last_pass_and_after_a_reset():
    model, (x, _) = mlp(), data()
    w = watch(model, ["4"])
    with pytest.raises(RuntimeError, match="no watched module was called"):
        w.rows()
    model(x)
    (row,) = w.rows()
    assert row.weight_norm > 0 and math.isnan(row.update_norm) and math.isnan(row.gradient_norm)
    copy.deepcopy(model)(x[:2])  # a copy's passes are not the model's
    model[4](torch.randn(2, 24))  # nor are calls of a part alone
    assert len(w.rows()) == 1
    model(x[:2])
    with pytest.raises(ValueError, match="'4': the last pass must be of the same batch"):
        w.rows()
    w.reset()
    model(x[:2])
    assert len(w.rows()) == 1
    text = str(w.rows())
    assert text.splitlines()[0].split()[0] == "layer" and w.rows().to_dict()["rows"][0]["name"] == "4"


def test_final_layer_alignment():
    model, (x, _) = mlp(), data()
    model.train()
    model[3].eval()
    with torch.no_grad():
        h = model[:4](x)
        W = model[4].weight
        exact = float(((h @ W.T).norm(dim=1) / h.norm(dim=1)).mean()) / norm2(W)
    assert final_layer_alignment(model, x) == pytest.approx(exact, rel=REL)
    assert final_layer_alignment(model, x, name="2") != pytest.approx(exact, rel=0.1)
    assert [m.training for m in model] == [True, True, True, False, True]
    with pytest.raises(ValueError, match="'1' has no linear"):
        final_layer_alignment(model, x, name="1")


@pytest.mark.parametrize(
    ("names", "near"),
    [
        (["blocks.0.qvk"], "'blocks.0.qkv'"),
        (["norm1"], "'blocks.0.norm1'"),
        (["head", "readout"], "near names: 'characters'"),
    ],
)
def test_a_missing_module_lists_near_names(names, near):
    model = Transformer(16, layers=1)
    with pytest.raises(ValueError, match="is not in the model; near names: ") as error:
        watch(model, names)
    assert near in str(error.value) and repr(names[0]) in str(error.value)
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not int"):
        watch(3)
    with pytest.raises(TypeError, match="names must be strings, not int"):
        watch(mlp(), [3])
    with pytest.raises(ValueError, match="nothing to watch"):
        watch(nn.ReLU())
    assert diagnostics.watch is watch
