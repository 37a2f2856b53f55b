"""torch.library's own checks of every op: schema, fakes, autograd registration; and fakes against real results."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spectral_kernels.kernels import contracts_products, registry
from spectral_kernels.kernels.composites import start_blocks
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, acc_dtype, sides
from spectral_kernels.ops import track  # noqa: F401  registers track_
from spectral_kernels.ops.triplet import spectral_norm_op
from tests.kernels.lists import DTYPES, flat_block, kernel, ones
from tests.kernels.steps import corrections

SHAPES = [(2, 30, 20), (1, 140, 150), (3, 5, 9)]


def stacks(dtype, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    A = [torch.randn(s, generator=g).to(dtype) for s in SHAPES]
    A[1] = A[1].mT.contiguous().mT
    return [a.requires_grad_(requires_grad) for a in A]


def state(A, b=4, cap=12):
    """Arguments of rayleigh_ritz_ after the first read."""
    n = [a.shape[2] for a in A for _ in range(a.shape[0])]
    acc, N = acc_dtype(A[0].dtype), len(n)
    V = start_blocks(A, b, 0)
    Q = torch.zeros((cap + b) * sum(n), dtype=acc)
    at = 0
    for size in n:
        Q[at * (cap + b) : at * (cap + b) + b * size] = V[at * b : (at + size) * b]
        at += size
    info = torch.zeros(N, INFO_COLUMNS, dtype=torch.float64)
    info[:, INFO["scale"]] = 1
    info[:, INFO["reads"]] = 1
    return [n, Q, V, torch.zeros(N, cap + b, cap + b, dtype=torch.float64), info]


def arguments(word, dtype, requires_grad=False):
    A = stacks(dtype, requires_grad)
    if word == "gram_matvec":
        skip = torch.tensor([False, True, False, False, False, True])
        return [
            (A, flat_block(A, 4), ones(A), None, 4, True, True),
            (A, flat_block(A, 6), ones(A), skip, 6, False, False),
        ]
    if word == "rayleigh_ritz_":
        n, Q, V, T, info = state(A)
        W, S, stats, _ = torch.ops.spectral_kernels.gram_matvec(A, V, ones(A), None, 4, True, False)
        info[:, INFO["frob2"]] = stats[:, 0]
        return [(n, Q, V, T, info, W, S, ones(A), 4, 0, 1, 1e-3, 3)]
    if word == "block_krylov":
        return [
            (A, None, 4, 6, 128, 1, 1e-3, 3, 0, 0, False),
            (A, start_blocks(A, 4, 1), 4, 3, 128, 2, 0.0, 3, 0, 4, True),
            (A, None, 4, 8, 16, 1, 0.0, 3, 0, 1, False),
        ]
    if word == "krylov_norm":
        return [(a, 4, 64, 128, 1e-3, 3, 0) for a in (*A, A[1][0], A[0][1])]
    return arguments_of_a_step(word, dtype, A)


def arguments_of_a_step(word, dtype, M):
    """Arguments of the optimizer's words: momenta as above, gradients and parameters of other dtypes and strides."""
    acc, N = acc_dtype(dtype), 6
    G = [torch.randn(m.shape).mT.contiguous().mT.bfloat16() for m in M]
    P = [torch.randn(m.shape) for m in M]
    skip = torch.tensor([False, True, False, False, False, True])
    size, decay = torch.full((N,), 0.1, dtype=torch.float64), torch.full((N,), 0.01, dtype=torch.float64)
    step = torch.arange(N)
    if word == "momentum_gram_matvec_":
        V = flat_block(M, 4)
        return [
            (M, G, V, ones(M), None, 0.9, 1.0, False, True, False, 4),
            (M, G, V, ones(M), skip, 0.9, -0.1, True, True, True, 4),
            (M, G, V, ones(M), skip, 0.9, 1.0, True, False, False, 4),
            (M, G, V, ones(M), skip, 0.9, 1.0, False, True, False, 4, True),
        ]
    if word == "momentum_norms_":
        return [
            (M, G, ones(M), None, 0.9, 1.0, False, True, False),
            (M, G, ones(M), skip, 0.9, 0.1, True, False, True),
        ]
    if word == "apply_update_":
        return [
            (P, M, [], size.to(acc), ones(M), decay, None, 0.9, 1.0),
            (P, M, G, size.to(acc), ones(M), decay, skip, 0.9, 1.0),
            (P, M, G, size.to(acc), ones(M), decay, skip, 0.9, 1.0, *corrections(M, 3), 3),
        ]
    if word == "next_block_":
        n, Q, V, T, info = state(M)
        m = [a.shape[1] for a in M for _ in range(a.shape[0])]
        info[:, INFO["frob2"]] = torch.cat([a.double().square().sum((1, 2)) for a in M])
        W, S, _, _ = torch.ops.spectral_kernels.gram_matvec(M, V, ones(M), None, 4, False, False)
        torch.ops.spectral_kernels.rayleigh_ritz_(n, Q, V, T, info, W, S, ones(M), 4, 0, 1, 0.0, 1)
        return [(m, n, Q, T, info, V, step, 4, 1, 0)]
    if word == "tracked_step_":
        V, rest = start_blocks(M, 4, 0), (4, 1, 2, 0.1, 1, 0)
        return [
            (P, M, G, V, ones(M), step, size, decay, None, 0.9, 1.0, False, False, False, *rest),
            (P, M, G, V, 0 * ones(M), step, size, decay, skip, 0.9, 0.1, True, True, True, *rest),
        ]
    rank, limit = 1 + torch.arange(N) % 4, torch.full((N,), 0.5, dtype=torch.float64)
    before = torch.full((N, 2), -1.0, dtype=torch.float64)
    if word == "clip_":
        V, info = start_blocks(M, 4, 0), torch.zeros(N, INFO_COLUMNS, dtype=torch.float64)
        info[:, INFO["scale"]] = 1
        info[2, INFO["done"]] = 1
        W, S, stats, Y = torch.ops.spectral_kernels.gram_matvec(M, V, ones(M), None, 4, True, True)
        info[:, INFO["frob2"]] = stats[:, 0]
        of_read = (sides(M, 1), sides(M, 2), V, *corrections(M, 4), info, W, S, Y, ones(M), rank)
        return [(*of_read, some, before, step, 4, 4, 1, 0.1, 0) for some in (None, limit)]
    if word == "clipped_step_":
        V, rest = start_blocks(M, 4, 0), (4, 4, 1, 2, 0.1, 0)
        return [
            (P, M, G, V, ones(M), before, step, size, decay, rank, None, None, 0.9, 1.0, False, False, *rest),
            (P, M, G, V, 0 * ones(M), before, step, size, decay, rank, limit, skip, 0.9, 0.1, True, True, *rest),
        ]
    raise AssertionError(word)


# the products are no native ops: tests/kernels/test_products.py compares their fakes with their results
WORDS = [word for word in (*registry.WORDS, *registry.SHORT_CUTS) if word not in contracts_products.WORDS]
OF_A_STEP = registry.WORDS[3:]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_words(word, dtype):
    pytest.importorskip("expecttest")
    kernel(word, "cpu", "cpu", dtype, 4)
    op = getattr(torch.ops.spectral_kernels, word).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if word in OF_A_STEP and dtype != torch.float32:  # tracing takes seconds and sees no values
        checks = checks[:3]
    for args in arguments(word, dtype):
        torch.library.opcheck(op, args, test_utils=checks)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fakes_agree_with_results(word, dtype):
    kernel(word, "cpu", "cpu", dtype, 4)
    op = getattr(torch.ops.spectral_kernels, word).default
    for args in arguments(word, dtype):
        mode = FakeTensorMode()

        def fake(x, mode=mode):
            if isinstance(x, list) and x and isinstance(x[0], torch.Tensor):
                return [mode.from_tensor(t) for t in x]
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        with mode:
            predicted = op(*[fake(a) for a in args])
        real = op(*args)
        if word in ("rayleigh_ritz_", "apply_update_", "clip_"):
            assert predicted is None and real is None
            continue
        if isinstance(real, torch.Tensor):
            predicted, real = (predicted,), (real,)
        for p, r in zip(predicted, real, strict=True):
            assert (p.shape, p.dtype, p.device, p.stride()) == (r.shape, r.dtype, r.device, r.stride())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["krylov", "power"])
def test_spectral_norm_op(dtype, method):
    pytest.importorskip("expecttest")
    everything = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # with gradients all but the last: it sums every output, and the vectors refuse theirs (tests/ops/test_compile.py)
    for requires_grad, some in ((False, everything), (True, everything[:-1])):
        A = stacks(dtype, requires_grad)
        torch.library.opcheck(spectral_norm_op, (A, 1e-2, 0, 0, method), test_utils=some)
        torch.library.opcheck(spectral_norm_op, (A[:1], 1e-2, 3, 7, method), test_utils=some)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_norm_op_fakes_agree(dtype):
    A = stacks(dtype)
    mode = FakeTensorMode()
    with mode:
        predicted = spectral_norm_op([mode.from_tensor(a) for a in A], 1e-2, 0, 0, "krylov")
    for p, r in zip(predicted, spectral_norm_op(A, 1e-2, 0, 0, "krylov"), strict=True):
        assert (p.shape, p.dtype, p.device) == (r.shape, r.dtype, r.device)


@pytest.mark.parametrize(("reads", "tol"), [(1, 0.0), (3, 0.0), (1, 1e-2)])
def test_track_op(reads, tol):
    pytest.importorskip("expecttest")
    acc, A = torch.float32, [torch.randn(30, 20), torch.randn(30, 20), torch.randn(9, 14)]
    right = [torch.nn.functional.normalize(torch.randn(a.shape[1], dtype=acc), dim=0) for a in A]
    left = [torch.nn.functional.normalize(torch.randn(a.shape[0], dtype=acc), dim=0) for a in A]
    blocks = [torch.randn(4, a.shape[1], dtype=acc) for a in A]
    args = (A, right, left, blocks, reads, tol, 0)
    op = torch.ops.spectral_kernels.track_.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_meta_tensors_get_shapes():
    A = [torch.empty(s, device="meta") for s in SHAPES]
    values, left, right = spectral_norm_op(A, 1e-3, 0, 0, "krylov")
    assert values.shape == (6,) and left.shape == (2 * 30 + 140 + 15,) and right.shape == (2 * 20 + 150 + 27,)
    assert values.device.type == "meta"
