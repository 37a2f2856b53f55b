"""Ragged lists: what comes back for them, and that a matrix never depends on its neighbours."""

from __future__ import annotations

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels.contracts import acc_dtype
from tests.kernels.lists import DTYPES, SHAPES, kernel, ragged
from tests.matrices import EDGE_SHAPES, exact

METHODS = ["krylov", "power", "gram", "svd"]
BACKENDS = ["cpu", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_list_of_matrices_gives_one_tensor(method, dtype, backend):
    A = [torch.randn(s).to(dtype) for s in EDGE_SHAPES] + [torch.randn(150, 200).to(dtype)]
    value = sk.spectral_norm(A, method=method)
    assert value.shape == (len(A),) and value.dtype == acc_dtype(dtype)
    for ours, a in zip(value, A, strict=True):
        assert float(ours) == pytest.approx(exact(a), rel=1e-3)
    assert torch.equal(sk.spectral_norm(tuple(A), method=method), value)
    assert sk.spectral_norm(A, method=method, keepdim=True).shape == (len(A), 1, 1)
    one = sk.spectral_norm(A[-1:], method=method)
    assert one.shape == (1,) and float(one[0]) == pytest.approx(exact(A[-1]), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_list_with_stacks_gives_a_list(method, backend):
    A = [torch.randn(s) for s in [(4, 20, 30), (7, 9), (2, 3, 12, 5), (0, 5, 6), (1, 3, 0)]]
    values = sk.spectral_norm(A, method=method)
    assert isinstance(values, list)
    assert [tuple(v.shape) for v in values] == [(4,), (), (2, 3), (0,), (1,)]
    for v, a in zip(values, A, strict=True):
        truth = torch.tensor([exact(x) for x in a.reshape(-1, *a.shape[-2:])] if a.numel() else [0.0] * v.numel())
        torch.testing.assert_close(v.reshape(-1), truth, rtol=1e-3, atol=0)
    kept = sk.spectral_norm(A, method=method, keepdim=True)
    assert [tuple(v.shape) for v in kept] == [(4, 1, 1), (1, 1), (2, 3, 1, 1), (0, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_list_gives_an_empty_tensor(method):
    for nothing in ([], ()):
        value = sk.spectral_norm(nothing, method=method)
        assert value.shape == (0,) and value.dtype == torch.float32
    assert sk.singular_triplet([]) == [] and sk.leading_subspace([], 3) == []
    assert sk.stable_rank([]).shape == (0,)
    empty: list = []
    assert sk.spectral_norm_(empty) is empty
    value, blocks = sk.spectral_norm([], return_block=True)
    assert value.shape == (0,) and blocks == []


@pytest.mark.parametrize("family", SHAPES)
def test_ragged_lists(family, backend):
    if (family, backend) == ("three hundred", "reference"):
        pytest.skip("five seconds of small matrices, which the other families hold as well")
    A = ragged(family, "contiguous", torch.float32)
    for v, a in zip(sk.spectral_norm(A), A, strict=True):
        torch.testing.assert_close(v, torch.tensor([exact(x) for x in a]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_matter(dtype):
    """Native bits: alone, and beside NaN, inf, zero, huge, tiny and empty matrices, in another order."""
    kernel("block_krylov", "cpu", "cpu", dtype, 4)
    A = [torch.randn(s).to(dtype) for s in [(30, 20), (150, 260), (260, 150), (30, 20), (9, 600), (2, 2)]]
    odd = [
        torch.full((30, 20), torch.nan),
        torch.full((150, 260), torch.inf),
        torch.zeros(260, 150),
        torch.full((30, 20), torch.finfo(dtype).max / 2, dtype=dtype),
        torch.full((150, 260), torch.finfo(dtype).tiny, dtype=dtype),
        torch.zeros(0, 4),
    ]
    mixed = [a for pair in zip(A, odd, strict=True) for a in (pair[0], pair[1].to(dtype))]
    alone = torch.stack([sk.spectral_norm(a) for a in A])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        value = sk.spectral_norm(mixed)
        assert torch.equal(value[::2], alone)
        assert value[1].isnan() and value[3] == torch.inf and value[5] == 0 and value[11] == 0
        assert torch.equal(sk.spectral_norm(mixed[::-1]).flip(0)[::2], alone)


def test_reference_neighbours_do_not_matter_beyond_rounding():
    A = [torch.randn(s) for s in [(30, 20), (150, 260), (9, 600)]]
    with sk.force("reference"):
        alone = torch.stack([sk.spectral_norm(a, steps=4) for a in A])
        bad = [torch.full((30, 20), torch.nan), torch.full((150, 260), torch.inf), torch.zeros(9, 600)]
        value = sk.spectral_norm([x for pair in zip(A, bad, strict=True) for x in pair], steps=4)
    torch.testing.assert_close(value[::2], alone, rtol=64 * 1.2e-7, atol=0)  # sums in another order
    assert value[1].isnan() and value[3] == torch.inf and value[5] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_arguments_stay_as_they_were(dtype, backend):
    A = [torch.randn(40, 30), torch.randn(2, 150, 170).mT, torch.randn(5, 6) * 1e-5, torch.full((3, 3), torch.nan)]
    A = [a.to(dtype) for a in A]
    before = [a.clone() for a in A]
    for method in METHODS:
        sk.spectral_norm(A, method=method)
    sk.singular_triplet(A)
    sk.stable_rank(A)
    sk.leading_subspace(A[:3], 2)
    _, blocks = sk.spectral_norm(A[:3], return_block=True)
    kept = [b.clone() for b in blocks]
    sk.spectral_norm(A[:3], v0=blocks)
    sk.singular_triplet(A[:3], v0=blocks)
    for a, b in zip([*A, *blocks], [*before, *kept], strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_three_hundred_matrices_at_once_take_one_call(monkeypatch):
    """The list goes down as one call of the word, not as a loop."""
    from spectral_kernels.kernels import registry

    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    calls = []
    words = registry.words("cpu", torch.float32, 4)
    real = words.block_krylov
    monkeypatch.setattr(words, "block_krylov", lambda A, *rest: calls.append(len(A)) or real(A, *rest), raising=False)
    A = [a[0] for a in ragged("three hundred", "contiguous", torch.float32)]
    value = sk.spectral_norm(A)
    assert calls == [300] and value.shape == (300,)
