"""The contract of rayleigh_ritz_: kernels against the reference in float64, and against what the words promise."""

from __future__ import annotations

import pytest
import torch

from spectral_kernels.kernels import composites, reference, registry
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, STATS, acc_dtype, counts, sides
from tests.kernels.lists import kernel, ones, ragged, served

NATIVE = [pair for pair in served() if pair[0] != "reference"]


def run(words, A, b, steps, tol=0.0, rank=1):
    """`steps` rounds of the two words; returns everything a round leaves behind."""
    acc, device = acc_dtype(A[0].dtype), A[0].device
    n, N, rows = sides(A, 2), counts(A), steps * b + b
    V = composites.start_blocks(A, b, 0)
    Q = torch.zeros(rows * sum(n), dtype=acc, device=device)
    T = torch.zeros((N, rows, rows), dtype=torch.float64, device=device)
    info = torch.zeros((N, INFO_COLUMNS), dtype=torch.float64, device=device)
    info[:, INFO["scale"]] = 1
    composites.store(Q, V, n, b, rows)
    scale = ones(A)
    for step in range(steps):
        W, S, stats, _ = words.gram_matvec(A, V, scale, None, b, step == 0, False)
        if step == 0:
            info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
        info[:, INFO["reads"]] += 1
        words.rayleigh_ritz_(n, Q, V, T, info, W, S, scale, b, step * b, rank, tol, 3)
    return Q, V, T, info


class Words:
    def __init__(self, backend, device, dtype, b):
        self.gram_matvec = kernel("gram_matvec", backend, device, dtype, b)
        self.rayleigh_ritz_ = kernel("rayleigh_ritz_", backend, device, dtype, b)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", [2, 4])
def test_projection_of_the_matrix(backend, device, dtype, b):
    """Q has orthonormal rows, T = Q A'A Q', and theta, rho belong to T's leading pair."""
    words = Words(backend, device, dtype, b)
    A = [torch.randn(2, 90, 70, dtype=dtype, device=device), torch.randn(1, 200, 150, dtype=dtype, device=device)]
    steps = 5
    Q, _, T, info = run(words, A, b, steps)
    rows, K, eps = steps * b + b, steps * b, torch.finfo(dtype).eps
    at = 0
    for j, a in enumerate(x for stack in A for x in stack):
        n = a.shape[1]
        q = Q[at : at + rows * n].view(rows, n)[:K].double()
        at += rows * n
        assert (q @ q.mT - torch.eye(K, device=device)).abs().max() <= 100 * eps
        product = a.double() @ q.mT
        exact = product.mT @ product
        assert (T[j, :K, :K] - exact).norm() <= 200 * eps * exact.norm()
        values, vectors = torch.linalg.eigh(T[j, :K, :K])
        theta = values[-1]
        assert abs(info[j, INFO["theta"]] - theta) <= 1e-6 * theta
        residual = (T[j, K : K + b, :K] @ vectors[:, -1]).norm() / theta
        assert abs(info[j, INFO["rho"]] - residual) <= 1e-3 * residual + 1e-6
        sigma = torch.linalg.svdvals(a.double())[0]
        assert info[j, INFO["sigma"]] <= sigma * (1 + 8 * eps)
        assert abs(info[j, INFO["trace"]] - T[j, :K, :K].trace()) <= 1e-12 * info[j, INFO["trace"]]


@pytest.mark.parametrize(("backend", "device"), NATIVE)
def test_agrees_with_the_reference_in_float64(backend, device):
    A = [
        torch.randn(3, 60, 44, dtype=torch.float64, device=device),
        torch.randn(1, 300, 130, dtype=torch.float64, device=device),
    ]
    words = Words(backend, device, torch.float64, 4)
    ours, truth = run(words, A, 4, 4), run(reference, A, 4, 4)
    for name in ("theta", "rho", "error", "sigma", "trace", "columns", "done"):
        a, b = ours[3][:, INFO[name]], truth[3][:, INFO[name]]
        assert torch.allclose(a, b, rtol=2e-2 if name == "error" else 1e-8, atol=1e-12), name
    assert torch.allclose(ours[2].abs(), truth[2].abs(), rtol=1e-6, atol=1e-6 * float(truth[2].max()))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exhausted_and_deflated_spaces_end(backend, device, dtype):
    """Rank 1, rank 6, an orthogonal matrix, fewer columns than the block: finished, and exact."""
    words = Words(backend, device, dtype, 4)
    g = torch.Generator().manual_seed(5)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    matrices = [
        draw(40, 1) @ draw(1, 30),
        draw(40, 6) @ draw(6, 30),
        torch.linalg.qr(draw(40, 30))[0],
        draw(40, 3),
        draw(40, 1),
    ]
    for a in matrices:
        A = [a.to(dtype).to(device)[None]]
        info = run(words, A, 4, 3, tol=1e-3)[3][0]
        exact = torch.linalg.svdvals(a.to(dtype).double())[0]
        assert info[INFO["done"]] == 1
        assert abs(info[INFO["sigma"]] / exact - 1) <= 1e-5 if dtype == torch.float32 else 1e-13


@pytest.mark.parametrize(("backend", "device"), served())
def test_finished_matrices_are_left_alone(backend, device):
    words = Words(backend, device, torch.float32, 4)
    A = [torch.randn(3, 50, 40, device=device)]
    Q, V, T, info = run(words, A, 4, 2)
    Q, T = (torch.zeros(3, 16, *x.shape[2:], device=device, dtype=x.dtype) for x in (Q.view(3, 12, 40), T))
    T = torch.zeros(3, 16, 16, dtype=torch.float64, device=device)
    info[1, INFO["done"]] = 1
    before = [x.clone() for x in (Q, V, T, info)]
    W, S = torch.randn_like(V), torch.randn(3, 4, 4, dtype=torch.float64, device=device)
    words.rayleigh_ritz_([40] * 3, Q.view(-1), V, T, info, W, S, ones(A), 4, 8, 1, 0.0, 3)
    for now, then in zip(
        (Q, V.view(3, 4, 40), T, info), (before[0], before[1].view(3, 4, 40), *before[2:]), strict=True
    ):
        assert torch.equal(now[1], then[1]) and not torch.equal(now[0], then[0])


@pytest.mark.parametrize(("backend", "device"), NATIVE)
def test_same_bits_alone_and_for_any_threads(backend, device):
    words = Words(backend, device, torch.float32, 4)
    A = [
        torch.randn(4, 70, 50, device=device),
        torch.randn(1, 300, 200, device=device),
        torch.randn(1, 20, 9, device=device),
    ]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(words, A, 4, 4))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    alone = run(words, [A[0][2:3]], 4, 4)
    assert torch.equal(alone[3][0], results[0][3][2]) and torch.equal(alone[2][0], results[0][2][2])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_block_krylov_over_the_words_finds_the_norm(backend, device, dtype):
    """The default composite over each backend's words, tol-driven and with a thick restart."""
    kernel("gram_matvec", backend, device, dtype, 4)
    words = registry.Words(device, dtype, 4, backend)
    A = ragged("stacks", "contiguous", dtype, device)
    tol = 1e-4
    info, X, _ = composites.block_krylov(words, A, None, 4, 64, 24, 1, tol, 3, 0, 1, False)
    exact = torch.cat([torch.linalg.matrix_norm(a.double(), 2) for a in A])
    assert bool((info[:, INFO["done"]] == 1).all())
    assert ((info[:, INFO["sigma"]] / exact - 1).abs() <= tol).all()
    at = j = 0
    for a in A:
        n = a.shape[2]
        for x in a.double():
            v = X[at : at + n].double()
            assert abs((x @ v).norm() / exact[j] - 1) <= 10 * tol
            at, j = at + n, j + 1
