"""Starting from a former block: one or two reads where little changed, and never stuck on a stale direction."""

from __future__ import annotations

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels.contracts import INFO, acc_dtype
from spectral_kernels.ops import norm
from spectral_kernels.ops.estimate import tracked
from tests.kernels.lists import DTYPES, kernel
from tests.matrices import FAMILIES, exact, make, with_spectrum


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


@pytest.fixture
def reads(monkeypatch):
    """Reads of every matrix of every call that went through the estimator, in order."""
    seen: list[list[int]] = []
    real = norm.estimate

    def spy(*args, **options):
        result = real(*args, **options)
        seen.append([int(r) for r in result.info[:, INFO["reads"]]])
        return result

    monkeypatch.setattr(norm, "estimate", spy)
    return seen


def changed(A: torch.Tensor, share: float, seed: int = 0) -> torch.Tensor:
    """A + E with ||E||_2 = share ||A||_2, E random."""
    E = torch.randn(A.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A + E * (share * exact(A) / exact(E))


# A change of 1e-3 mixes a whole cluster of singular values at the top: no former direction survives it.
CLUSTERED = {"orthogonal", "repeated top", "two values", "seven values"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slightly_changed_matrix_takes_one_or_two_reads(family, reads, backend):
    A = make(family, 200, 0).A
    for a in (A, A.mT):
        value, block = sk.spectral_norm(a, return_block=True)
        assert float(value) == pytest.approx(exact(a), rel=1e-3)
        b = changed(a, 1e-3)
        reads.clear()
        value = sk.spectral_norm(b, v0=block)
        assert float(value) == pytest.approx(exact(b), rel=1e-3)
        sk.spectral_norm(b, return_block=True)
        (warm,), (cold,) = reads
        assert 1 <= warm <= (2 * cold if family in CLUSTERED else 2)


def test_the_chain_of_a_training_run(reads, backend):
    """Fifty small steps, each from the block of the one before: never more than two reads, never out of tolerance."""
    A = make("trained", 160, 1).A.float()
    _, block = sk.spectral_norm(A, return_block=True)
    reads.clear()
    for step in range(50):
        A = changed(A.double(), 1e-3, step).float()
        value, block = sk.spectral_norm(A, v0=block, seed=step, return_block=True)
        assert float(value) == pytest.approx(exact(A), rel=1e-3)
    assert max(r[0] for r in reads) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_stacks_and_lists(dtype, reads, backend):
    # two whose block lives on the longer, contiguous side
    A = [torch.randn(s).to(dtype) for s in [(3, 40, 20), (150, 180), (2, 180, 150), (5, 3), (2, 3, 6, 7), (7, 1)]]
    values, blocks = sk.spectral_norm(A, return_block=True)
    assert isinstance(values, list) and isinstance(blocks, list)
    for a, v, b in zip(A, values, blocks, strict=True):
        stack = a.reshape(-1, *a.shape[-2:])
        assert b.shape == (*a.shape[:-2], 4, tracked(stack)) and b.dtype == acc_dtype(dtype)
        one, of_one = sk.spectral_norm(a, return_block=True)
        assert torch.equal(one, v) or torch.allclose(one, v, rtol=1e-4)
        assert of_one.shape == b.shape
        lengths = b.double().norm(dim=-1)
        assert ((lengths - 1).abs() < 1e-4).logical_or(lengths == 0).all()
    reads.clear()
    again = sk.spectral_norm([1.0001 * a.double() for a in A] if dtype == torch.float64 else A, v0=blocks)
    assert max(reads[0]) <= 2
    for a, v in zip(A, again, strict=True):
        torch.testing.assert_close(v, torch.linalg.matrix_norm(a.double(), 2).to(v.dtype), rtol=1.2e-3, atol=0)


def test_the_block_leads(backend):
    """Its first row is the leading singular vector; the rows are orthonormal Ritz vectors in order."""
    s = torch.cat([torch.tensor([1.0, 0.8, 0.6]), torch.linspace(0.4, 0.0, 97)]).double()
    A = with_spectrum(s, 120, 100, torch.Generator().manual_seed(0)).A
    _, block = sk.spectral_norm(A, 1e-8, return_block=True)
    torch.testing.assert_close(block @ block.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    products = (block @ A.mT).norm(dim=1)
    torch.testing.assert_close(products[:2], s[:2], rtol=1e-6, atol=0)
    assert (products[:-1] >= products[1:]).all()


@pytest.mark.parametrize("shape", [(60, 50), (140, 150), (150, 140)])
def test_a_start_orthogonal_to_the_leading_vector(shape, backend):
    """Spectrum 2, 1, 1, ...: exact zeros towards the leading vector in every row given; one call finds it."""
    m, n = shape
    A = torch.eye(m, n, dtype=torch.float64)
    A[0, 0] = 2
    side = tracked(A[None])
    v0 = torch.zeros(4, side, dtype=torch.float64)
    v0[range(4), range(1, 5)] = 1
    for seed in range(5):
        assert float(sk.spectral_norm(A, v0=v0, seed=seed)) == pytest.approx(2, rel=1e-3)
        assert float(sk.spectral_norm(A.float(), v0=v0.float(), seed=seed)) == pytest.approx(2, rel=1e-3)


def test_a_direction_that_rises_from_nothing_is_found(backend):
    """A linear spectrum, and 5 % above it a new direction orthogonal to the block: found within a few calls."""
    n = 200
    s = torch.linspace(1, 0.01, n, dtype=torch.float64)
    for trial in range(4):
        A = with_spectrum(s, 220, n, torch.Generator().manual_seed(trial)).A
        _, block = sk.spectral_norm(A, return_block=True)
        g = torch.Generator().manual_seed(100 + trial)
        v = torch.randn(n, generator=g, dtype=torch.float64)
        v -= block.mT @ (block @ v)
        v /= v.norm()
        u = torch.randn(220, generator=g, dtype=torch.float64)
        B = (A - (A @ v)[:, None] * v) + 1.05 * torch.outer(u / u.norm(), v)
        truth = exact(B)
        for step in range(1, 6):
            value, block = sk.spectral_norm(B, v0=block, seed=step, return_block=True)
            if float(value) >= truth * (1 - 1e-3):
                break
        assert float(value) == pytest.approx(truth, rel=1e-3), (trial, step)


@pytest.mark.parametrize("family", FAMILIES)
def test_useless_blocks(family, backend):
    """Zero, repeated and another matrix's rows: the value meets tol as it does from scratch."""
    for size, number in ((40, 0), (40, 1), (150, 1)):
        A = make(family, size, number).A
        truth, side = exact(A), tracked(A[None])
        one = torch.randn(1, side, dtype=torch.float64)
        other = torch.linalg.qr(torch.randn(side, 4, dtype=torch.float64)).Q.mT
        for v0 in (torch.zeros(4, side).double(), one.expand(4, side), one.expand(4, side) * 1e-200, other):
            assert float(sk.spectral_norm(A, v0=v0, seed=number)) == pytest.approx(truth, rel=1e-3)


def test_the_block_of_a_matrix_of_rank_one(backend):
    """It knows one direction; the matrix that follows has full rank."""
    for number in range(8):
        A = make("geometric", 40, number).A
        B = torch.outer(torch.randn(A.shape[0]), torch.randn(A.shape[1])).double()
        value, block = sk.spectral_norm(B, return_block=True)
        assert float(value) == pytest.approx(exact(B), rel=1e-3)
        assert float(sk.spectral_norm(A, v0=block, seed=number)) == pytest.approx(exact(A), rel=1e-3)


def test_a_block_with_nan_does_not_spread(backend):
    A = torch.randn(3, 30, 20)
    _, blocks = sk.spectral_norm(A, return_block=True)
    clean = sk.spectral_norm(A, v0=blocks)
    bad = blocks.clone()
    bad[1] = torch.nan
    value = sk.spectral_norm(A, v0=bad)
    assert torch.equal(value[[0, 2]], clean[[0, 2]])


def test_blocks_of_zero_and_non_finite_matrices_serve_as_a_start(backend):
    A = torch.randn(4, 30, 20)
    A[1], A[2, 0, 0], A[3, 1, 1] = 0, torch.nan, torch.inf
    _, blocks = sk.spectral_norm(A, return_block=True)
    assert torch.isfinite(blocks).all()
    for seed in range(10):
        B = torch.randn(4, 30, 20)
        value = sk.spectral_norm(B, v0=blocks, seed=seed)
        torch.testing.assert_close(value, torch.linalg.matrix_norm(B, 2), rtol=1e-3, atol=0)


def test_scale_does_not_matter_to_a_warm_start(backend):
    A = torch.randn(200, 150)
    _, block = sk.spectral_norm(A, return_block=True)
    value = sk.spectral_norm(A, v0=block)
    for exponent in (-100, 5, 100):
        moved, of_moved = sk.spectral_norm(A * 2.0**exponent, v0=block, return_block=True)
        assert torch.equal(moved, value * 2.0**exponent)
        assert torch.equal(of_moved, sk.spectral_norm(A, v0=block, return_block=True)[1])


def test_v0_and_steps(reads, backend):
    A = torch.randn(200, 150)
    _, block = sk.spectral_norm(A, return_block=True)
    reads.clear()
    value = sk.spectral_norm(A, v0=block, steps=1)
    assert reads == [[1]]
    assert float(value) == pytest.approx(exact(A), rel=1e-3)
    assert float(sk.spectral_norm(A, steps=1)) < 0.99 * exact(A)  # what one read from scratch knows


def test_singular_triplet_takes_the_same_blocks(backend):
    A = make("close second", 150, 0).A
    _, block = sk.spectral_norm(A, 1e-8, return_block=True)
    u, s, v = sk.singular_triplet(changed(A, 1e-6), 1e-6, v0=block)
    assert float(s) == pytest.approx(exact(changed(A, 1e-6)), rel=1e-6)
    assert float(u @ changed(A, 1e-6) @ v) == pytest.approx(float(s), rel=2e-6)


def test_a_spent_budget_is_bracketed_for_the_wider_block(monkeypatch, backend):
    """8 rows, 4 of them random: the basis is full after half as many reads, which is what the bracket may count."""
    from spectral_kernels.ops import certificates

    bracket, widths = certificates.upper_of_restarted, []

    def spy(row, n, b, *, fresh=None, delta=1e-6):
        widths.append((b, fresh))
        return bracket(row, n, b, fresh=fresh, delta=delta)

    A = make("clustered", 300, 0).A
    _, block = sk.spectral_norm(A, return_block=True)
    monkeypatch.setattr(certificates, "upper_of_restarted", spy)
    monkeypatch.setattr("spectral_kernels.ops.estimate.MOST_READS", 2)
    monkeypatch.setattr(norm, "DENSE_FINISH", 0)
    with pytest.warns(sk.AccuracyWarning):
        sk.spectral_norm(A.roll(1, 1), 1e-9, v0=block)
    assert widths == [(8, 4)]
