"""The contract of gram_matvec, over every kernel that runs here: against float64, determinism, neighbours, flags."""

from __future__ import annotations

import itertools

import pytest
import torch

from spectral_kernels.kernels import reference
from spectral_kernels.kernels.contracts import STATS, acc_dtype
from tests.kernels.lists import DTYPES, LAYOUTS, SHAPES, flat_block, kernel, ones, ragged, served

FAMILIES = list(SHAPES)
WIDTHS = [1, 4, 6, 16]
CROSS = list(itertools.product(FAMILIES, LAYOUTS, DTYPES, WIDTHS))
# every family with every layout, dtypes and widths taking turns; the whole product is `make test-full`
PAIRWISE = [
    (family, layout, DTYPES[(i + turn) % 4], WIDTHS[(i // 4 + 2 * turn) % 4])
    for i, (family, layout) in enumerate(itertools.product(FAMILIES, LAYOUTS))
    for turn in range(2)
]
NATIVE = [pair for pair in served() if pair[0] != "reference"]


def check_against_float64(backend, device, family, layout, dtype, b):
    A = ragged(family, layout, dtype, device)
    before = [a.clone() for a in A]
    fn = kernel("gram_matvec", backend, device, dtype, b)
    V, scale = flat_block(A, b), ones(A)
    W, S, stats, Y = fn(A, V, scale, None, b, True, True)
    exact = reference.gram_matvec([a.double() for a in A], V.double(), scale.double(), None, b, True, True)
    eps = torch.finfo(acc_dtype(dtype)).eps
    assert W.dtype == V.dtype and S.dtype == stats.dtype == torch.float64
    at = at_y = j = 0
    for a in A:
        k, m, n = a.shape
        for _ in range(k):
            w, truth = W[at : at + b * n].double(), exact[0][at : at + b * n]
            y, truth_y = Y[at_y : at_y + b * m].double(), exact[3][at_y : at_y + b * m]
            at, at_y = at + b * n, at_y + b * m
            # rounding of sums of m (n) products, partial sums of at most 256: a few sqrt(256) eps of the vectors'
            # lengths
            assert (y - truth_y).norm() <= 32 * eps * (1 + truth_y.norm())
            assert (w - truth).norm() <= 64 * eps * (1 + truth.norm())
            assert (S[j] - exact[1][j]).norm() <= 64 * eps * (1 + exact[1][j].norm())
            assert abs(stats[j, 0] - exact[2][j, 0]) <= 16 * eps * exact[2][j, 0]
            assert torch.equal(stats[j, 1:], exact[2][j, 1:])
            j += 1
    for a, b_ in zip(A, before, strict=True):
        assert torch.equal(a, b_)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize(("family", "layout", "dtype", "b"), PAIRWISE)
def test_agrees_with_float64(backend, device, family, layout, dtype, b):
    check_against_float64(backend, device, family, layout, dtype, b)


@pytest.mark.full
@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize(("family", "layout", "dtype", "b"), CROSS)
def test_agrees_with_float64_everywhere(backend, device, family, layout, dtype, b):
    check_against_float64(backend, device, family, layout, dtype, b)


def test_pairwise_sample_covers():
    for family, layout in itertools.product(FAMILIES, LAYOUTS):
        assert any(c[:2] == (family, layout) for c in PAIRWISE)
    for dtype, b in itertools.product(DTYPES, WIDTHS):
        assert sum(c[2:] == (dtype, b) for c in PAIRWISE) >= 2


@pytest.mark.parametrize(("backend", "device"), NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_list_and_for_any_threads(backend, device, dtype):
    fn = kernel("gram_matvec", backend, device, dtype, 4)
    A = [a for family in ("odd", "chunks", "stacks", "vectors") for a in ragged(family, "contiguous", dtype, device)]
    A += [a for a in ragged("chunks", "transposed", dtype, device, seed=3)]
    V, scale = flat_block(A, 4), ones(A)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fn(A, V, scale, None, 4, True, True))
    results.append(fn(A, V, scale, None, 4, True, True))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)
    W, S, stats, Y = results[0]
    at = at_y = j = 0
    for a in A:
        k, m, n = a.shape
        for i in range(k):
            alone = fn([a[i : i + 1]], V[at : at + 4 * n], scale[j : j + 1], None, 4, True, True)
            assert torch.equal(alone[0], W[at : at + 4 * n])
            assert torch.equal(alone[1][0], S[j]) and torch.equal(alone[2][0], stats[j])
            assert torch.equal(alone[3], Y[at_y : at_y + 4 * m])
            at, at_y, j = at + 4 * n, at_y + 4 * m, j + 1


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "both strided"])
def test_flags_belong_to_their_matrix_alone(backend, device, dtype, layout):
    fn = kernel("gram_matvec", backend, device, dtype, 4)
    A = ragged("stacks", layout, dtype, device)
    V, scale = flat_block(A, 4), ones(A)
    clean = fn(A, V, scale, None, 4, True, False)
    A[0][1, 3, 39] = float("nan")
    A[0][3, 23, 0] = float("-inf")
    A[1][2, 129, 63] = float("inf")
    A[1][2, 5, 5] = float("nan")
    W, S, stats, _ = fn(A, V, scale, None, 4, True, False)
    nan, inf = (stats[:, STATS[name]].nonzero().flatten().tolist() for name in ("nan", "inf"))
    assert nan == [1, 7] and inf == [3, 7]
    at = 0
    for j, n in enumerate(n for a in A for n in [a.shape[2]] * a.shape[0]):
        if j not in (1, 3, 7):
            assert torch.equal(W[at : at + 4 * n], clean[0][at : at + 4 * n]) and torch.equal(S[j], clean[1][j])
        at += 4 * n


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_matrices_give_zeros_and_leave_the_others(backend, device, dtype):
    fn = kernel("gram_matvec", backend, device, dtype, 4)
    A = ragged("stacks", "contiguous", dtype, device)
    V, scale = flat_block(A, 4), ones(A)
    everything = fn(A, V, scale, None, 4, True, True)
    skip = torch.zeros(15, dtype=torch.bool, device=device)
    skip[[0, 6, 14]] = True
    A[0][0] = float("nan")  # not even looked at
    W, S, stats, Y = fn(A, V, scale, skip, 4, True, True)
    assert not S[skip].any() and not stats[skip].any()
    assert torch.equal(S[~skip], everything[1][~skip]) and torch.equal(stats[~skip], everything[2][~skip])
    assert not W[: 4 * 40].any() and torch.equal(W[4 * 40 : 4 * 200], everything[0][4 * 40 : 4 * 200])
    assert not Y[: 4 * 24].any() and torch.equal(Y[4 * 24 : 4 * 120], everything[3][4 * 24 : 4 * 120])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_power_of_two_scale_is_exact(backend, device, layout):
    fn = kernel("gram_matvec", backend, device, torch.float32, 4)
    A = ragged("odd", layout, torch.float32, device)
    V, one = flat_block(A, 4), ones(A)
    W, S, stats, _ = fn(A, V, one, None, 4, True, False)
    down = [a * 2.0**-70 for a in A]
    W2, S2, stats2, _ = fn(down, V, one * 2.0**70, None, 4, True, False)
    assert torch.equal(W, W2) and torch.equal(S, S2)
    assert torch.equal(stats[:, 0], stats2[:, 0]) and torch.equal(stats[:, 1] * 2.0**-70, stats2[:, 1])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_agrees(isa):
    """The variants for older processors, in a process of their own."""
    import os
    import subprocess
    import sys

    kernel("gram_matvec", "cpu", "cpu", torch.float32, 4)
    code = (
        "import torch, spectral_kernels as sk\n"
        "torch.manual_seed(0)\n"
        "A = [torch.randn(2, 65, 33), torch.randn(1, 33, 400), torch.randn(1, 300, 1030), torch.randn(3, 20, 20)]\n"
        "for cast in (torch.float32, torch.float64, torch.bfloat16):\n"
        "    B = [a.to(cast) for a in A]\n"
        "    for ours, a in zip(sk.spectral_norm(B), B):\n"
        "        exact = torch.linalg.matrix_norm(a.double(), 2)\n"
        "        assert ((ours - exact) / exact).abs().max() < 1e-3, (cast, ours, exact)\n"
    )
    environment = {**os.environ, "SPECTRAL_KERNELS_ISA": isa, "SPECTRAL_KERNELS_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
