"""What a parameter is: by shape, by module, by override, and the matrices that it holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_kernels.ops.layout import kind_of
from spectral_kernels.optim.modules import named_roles
from spectral_kernels.optim.roles import matrices, role_of


class Conv1D(nn.Module):
    """As transformers.Conv1D: x W + b."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))


class LlamaRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scalar, self.vector = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(5))
        self.stack, self.kernel = nn.Parameter(torch.ones(3, 4, 5)), nn.Parameter(torch.ones(4, 5, 2, 3))


def role(kind, fan_out, fan_in, **more):
    return {"kind": kind, "fan_out": fan_out, "fan_in": fan_in} | more


VECTOR = {"kind": "vector", "fan_in": 1}
PARAMETRIZATIONS = nn.utils.parametrizations
# module, name, and what has to be found
CASES = [
    (lambda: nn.Linear(5, 7), "weight", role("matrix", 7, 5, why="Linear")),
    (lambda: nn.Linear(5, 7), "bias", VECTOR | {"fan_out": 7}),
    (lambda: nn.Embedding(50, 8), "weight", role("embedding", 8, 50)),
    (lambda: nn.EmbeddingBag(50, 8), "weight", role("embedding", 8, 50)),
    (lambda: nn.Conv1d(4, 6, 5), "weight", role("conv", 6, 4, positions=5)),
    (lambda: nn.Conv2d(8, 12, (2, 3), groups=4), "weight", role("conv", 3, 2, positions=6, groups=4)),
    (lambda: nn.Conv3d(4, 6, 3), "weight", role("conv", 6, 4, positions=27)),
    (lambda: nn.ConvTranspose1d(8, 12, 5), "weight", role("conv", 12, 8, positions=5, transposed=True)),
    (lambda: nn.ConvTranspose2d(8, 12, 2, groups=4), "weight", role("conv", 3, 2, positions=4, groups=4)),
    (lambda: nn.ConvTranspose3d(8, 12, 2, groups=2), "weight", role("conv", 6, 4, positions=8, transposed=True)),
    (lambda: nn.LayerNorm((3, 4)), "weight", role("gain", 12, 12)),
    (lambda: nn.LayerNorm((3, 4)), "bias", VECTOR | {"fan_out": 12}),
    (lambda: nn.RMSNorm(6), "weight", role("gain", 6, 6)),
    (lambda: nn.GroupNorm(2, 6), "weight", role("gain", 6, 6)),
    (lambda: nn.BatchNorm2d(6), "bias", VECTOR | {"fan_out": 6}),
    (lambda: nn.SyncBatchNorm(6), "weight", role("gain", 6, 6)),
    (lambda: nn.InstanceNorm1d(6, affine=True), "weight", role("gain", 6, 6)),
    (lambda: LlamaRMSNorm(6), "weight", role("gain", 6, 6, why="LlamaRMSNorm, by name")),
    (lambda: nn.PReLU(6), "weight", role("gain", 6, 6)),
    (lambda: nn.MultiheadAttention(8, 2), "in_proj_weight", role("matrix", 8, 8, blocks=(8, 8, 8))),
    (lambda: nn.MultiheadAttention(8, 2), "in_proj_bias", VECTOR | {"fan_out": 8}),
    (lambda: nn.MultiheadAttention(8, 2), "out_proj.weight", role("matrix", 8, 8)),
    (lambda: nn.MultiheadAttention(8, 2, kdim=5), "k_proj_weight", role("matrix", 8, 5, blocks=())),
    (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "bias_k", VECTOR | {"fan_out": 8}),
    (lambda: nn.RNN(5, 6), "weight_ih_l0", role("matrix", 6, 5, blocks=())),
    (lambda: nn.GRU(5, 6, num_layers=2), "weight_hh_l1", role("matrix", 6, 6, blocks=(6, 6, 6))),
    (lambda: nn.LSTM(5, 6, bidirectional=True), "weight_ih_l0_reverse", role("matrix", 6, 5, blocks=(6,) * 4)),
    (lambda: nn.LSTM(5, 6, proj_size=3), "weight_hr_l0", role("matrix", 3, 6, blocks=())),
    (lambda: nn.LSTM(5, 6, proj_size=3), "weight_hh_l0", role("matrix", 6, 3, blocks=(6,) * 4)),
    (lambda: nn.LSTM(5, 6), "bias_hh_l0", VECTOR | {"fan_out": 6}),
    (lambda: nn.LSTMCell(5, 6), "weight_ih", role("matrix", 6, 5, blocks=(6,) * 4)),
    (lambda: nn.Bilinear(5, 6, 7), "weight", role("conv", 7, 5, positions=6)),
    (lambda: Conv1D(12, 4), "weight", role("matrix", 12, 4, transposed=True, why="Conv1D")),
    (lambda: PARAMETRIZATIONS.spectral_norm(nn.Linear(5, 7)), "parametrizations.weight.original", role("matrix", 7, 5)),
    (lambda: PARAMETRIZATIONS.weight_norm(nn.Linear(5, 7)), "parametrizations.weight.original0", role("gain", 7, 7)),
    (lambda: PARAMETRIZATIONS.weight_norm(nn.Linear(5, 7)), "parametrizations.weight.original1", role("matrix", 7, 5)),
    (
        lambda: PARAMETRIZATIONS.spectral_norm(nn.ConvTranspose1d(8, 12, 5)),
        "parametrizations.weight.original",
        role("conv", 12, 8, positions=5, why="ConvTranspose1d, parametrized weight"),
    ),
    (lambda: nn.utils.spectral_norm(nn.Embedding(9, 4)), "weight_orig", role("embedding", 4, 9)),
    (Loose, "scalar", role("vector", 1, 1, why="shape alone")),
    (Loose, "vector", role("vector", 5, 1, why="shape alone")),
    (Loose, "stack", role("matrix", 4, 5, positions=1, why="shape alone")),
    (Loose, "kernel", role("conv", 4, 5, positions=6, why="shape alone")),
]


def roles(model, overrides=None):
    return {entry.name: entry.role for entry in named_roles(model, overrides)}


@pytest.mark.parametrize(("build", "name", "wanted"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_module(build, name, wanted):
    got = roles(build())[name]
    assert {key: getattr(got, key) for key in wanted} == wanted


def test_names_and_order_are_those_of_the_model():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert [entry.name for entry in named_roles(model)] == [name for name, _ in model.named_parameters()]
    assert all(entry.known for entry in named_roles(model))


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_readout_tied_to_an_embedding_is_a_matrix_once(first):
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict(
        {"embedding": embedding, "head": head} if first == "embedding" else {"head": head, "x": embedding}
    )
    ((name, got),) = roles(model).items()
    assert name == f"{first}.weight"
    assert (got.kind, got.fan_out, got.fan_in, got.why) == ("matrix", 50, 8, "Linear, tied with Embedding")


def test_a_module_knows_more_than_a_shape():
    model = Loose()
    model.table = nn.Embedding(50, 8)
    model.copy = model.table.weight
    assert roles(model)["copy"].kind == "embedding"


def test_overrides():
    model = nn.ModuleDict({"qkv": nn.Linear(8, 20), "other": nn.Linear(8, 6), "position": Loose()})
    got = roles(
        model,
        {
            "*.weight": {"num_heads": 2},
            "qkv.weight": {"num_heads": None, "split_sizes": [8, 6, 6]},
            "position.vector": {"kind": "gain"},
            "position.stack": {"transposed": True},
        },
    )
    assert (got["qkv.weight"].blocks, got["qkv.weight"].fan_out) == ((8, 6, 6), 6)
    assert (got["other.weight"].blocks, got["other.weight"].num_heads) == ((3, 3), 2)
    assert (got["position.vector"].kind, got["position.vector"].why) == ("gain", "override")
    assert (got["position.stack"].fan_out, got["position.stack"].fan_in) == (5, 4)
    assert got["qkv.weight"].why == "Linear, override"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"wieght": {"kind": "gain"}}, "'wieght' matches no parameter"),
        ({"weight": {"kinds": "gain"}}, "unknown option 'kinds'"),
        ({"weight": {"kind": "table"}}, "weight: kind must be one of"),
        ({"weight": {"num_heads": 5}}, "weight: num_heads=5 does not divide the 6 rows"),
        ({"weight": {"split_sizes": [3, 4]}}, "weight: .*must add up to the 6 rows"),
        ({"weight": {"split_sizes": [3, 3], "num_heads": 2}}, "not both"),
        ({"weight": {"groups": 2}}, "groups=2 goes with kind 'conv'"),
        ({"bias": {"kind": "matrix"}}, "bias: kind 'matrix' needs at least 2 dimensions"),
        ({"bias": {"transposed": True}}, "bias: transposed goes with"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        named_roles(nn.Linear(4, 6), overrides)


def test_lazy_parameters_are_refused():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="0.weight is not initialized yet: run one forward pass"):
        named_roles(model)
    model(torch.ones(2, 3))
    assert roles(model)["0.weight"].fan_in == 3


def test_kind_of():
    assert [kind_of((2,) * n) for n in range(6)] == ["vector", "vector", "matrix", "matrix", "conv", "conv"]
    with pytest.raises(ValueError, match="no kind by shape"):
        kind_of((2,) * 6)
    assert role_of((5, 7)).why == "shape alone" and role_of(torch.ones(3)).fan_out == 3


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_slices_are_what_a_convolution_applies(groups, transposed, memory):
    """Each kernel position alone acts on an impulse as its block-diagonal matrix does."""
    build = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = build(8, 12, (2, 3), groups=groups, bias=False).to(memory_format=memory)
    ((_, got),) = roles(conv).items()
    (views,) = matrices(conv.weight, got)  # (2, 3, g, m, n)
    assert views.shape == (2, 3, groups, got.fan_out, got.fan_in)
    assert views.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()
    x = torch.randn(8)
    for i in range(2):
        for j in range(3):
            wanted = torch.block_diag(*views[i, j]) @ x
            if transposed:  # a pixel in, its kernel out
                seen = conv(x.view(1, 8, 1, 1))[0, :, i, j]
            else:
                image = torch.zeros(1, 8, 2, 3)
                image[0, :, i, j] = x
                seen = conv(image)[0, :, 0, 0]
            torch.testing.assert_close(seen, wanted)


def test_blocks_are_views_of_the_rows():
    weight = torch.randn(4, 9)
    blocks = matrices(weight, role_of(weight, transposed=True, split_sizes=[2, 3, 4]))
    assert [tuple(b.shape) for b in blocks] == [(2, 4), (3, 4), (4, 4)]
    assert torch.equal(torch.cat(blocks), weight.mT)
    blocks[1].zero_()
    assert not weight[:, 2:5].any() and weight[:, :2].all()
    with pytest.raises(ValueError, match="holds no matrices"):
        matrices(weight, role_of(weight, kind="embedding"))


def test_a_bilinear_form_by_slices_is_a_sum_over_the_second_input():
    layer = nn.Bilinear(5, 6, 7, bias=False)
    (views,) = matrices(layer.weight, roles(layer)["weight"])  # (6, 1, 7, 5)
    x, y = torch.randn(5), torch.randn(6)
    torch.testing.assert_close(layer(x, y), sum(y[j] * views[j, 0] @ x for j in range(6)))
