"""Leading singular vectors: singular_triplet, leading_subspace, stable_rank, against float64 SVDs."""

from __future__ import annotations

import math

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels.contracts import acc_dtype
from tests.kernels.lists import DTYPES, LAYOUTS, kernel
from tests.matrices import EDGE_SHAPES, FAMILIES, exact, make, with_spectrum

# tall, wide and square, on both sides of the sizes at which the block changes its side, in both orders of memory
SHAPES = [(30, 20), (20, 30), (25, 25), (200, 150), (150, 200), (160, 160), (9, 400), (400, 9), (1, 6), (6, 1), (1, 1)]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


def both_orders(A: torch.Tensor) -> list[torch.Tensor]:
    return [A.contiguous(), A.mT.contiguous().mT]


def check_triplet(A: torch.Tensor, triplet, tol: float) -> None:
    """Unit vectors whose quotient is sigma_max to tol; the residual is of order sqrt(tol)."""
    u, s, v = (t.double() for t in triplet)
    m, n = A.shape
    a = A.double()
    assert u.shape == (m,) and s.shape == () and v.shape == (n,)
    assert float(s) == pytest.approx(exact(A), rel=tol)
    assert float(u.norm()) == pytest.approx(1, abs=1e-5) and float(v.norm()) == pytest.approx(1, abs=1e-5)
    assert float(u @ a @ v) == pytest.approx(float(s), rel=2 * tol)
    bound = 2 * math.sqrt(tol) * float(s)
    assert float((a @ v - s * u).norm()) <= bound and float((a.mT @ u - s * v).norm()) <= bound


# ---------------------------------------------------------------------------------------------------- singular_triplet


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triplets_of_every_shape_and_order(shape, dtype, backend):
    tol = 1e-8 if dtype == torch.float64 else 1e-4
    for A in both_orders(torch.randn(shape).to(dtype)):
        before = A.clone()
        triplet = sk.singular_triplet(A, tol)
        assert isinstance(triplet, sk.SingularTriplet) and all(t.dtype == acc_dtype(dtype) for t in triplet)
        check_triplet(A, triplet, tol)
        assert torch.equal(A, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_triplets_of_every_family(family, backend):
    A = make(family, 90, 1).A
    for a in (A, A.mT):
        check_triplet(a, sk.singular_triplet(a, 1e-6, seed=3), 1e-6)


def test_vectors_where_the_gap_is_wide(backend):
    """Up to one sign, they are the SVD's."""
    for m, n in ((60, 40), (150, 200), (160, 160)):
        s = torch.linspace(0.5, 0, min(m, n), dtype=torch.float64)
        s[0] = 1
        for A in both_orders(with_spectrum(s, m, n, torch.Generator().manual_seed(1)).A):
            u, _, v = sk.singular_triplet(A, 1e-10)
            U, _, Vh = torch.linalg.svd(A)
            assert float(u @ U[:, 0]).__abs__() == pytest.approx(1, abs=1e-8)
            assert float(v @ Vh[0]).__abs__() == pytest.approx(1, abs=1e-8)
            torch.testing.assert_close(torch.outer(u, v), torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_triplets_of_stacks_of_any_strides(layout, backend):
    A = LAYOUTS[layout](torch.randn(3, 140, 150))
    u, s, v = sk.singular_triplet(A, 1e-4)
    assert (u.shape, s.shape, v.shape) == ((3, 140), (3,), (3, 150))
    for i in range(3):
        check_triplet(A[i], (u[i], s[i], v[i]), 1e-4)
    deep = sk.singular_triplet(A.view(3, 1, 140, 150) if A.is_contiguous() else A[:, None], 1e-4)
    assert deep.u.shape == (3, 1, 140) and deep.s.shape == (3, 1) and deep.v.shape == (3, 1, 150)


def test_triplets_of_lists(backend):
    A = [torch.randn(s) for s in [(30, 20), (2, 150, 200), (200, 150), (3, 5, 9), (0, 4, 5), (4, 0)]]
    triplets = sk.singular_triplet(A, 1e-4)
    assert isinstance(triplets, list) and len(triplets) == len(A)
    check_triplet(A[0], triplets[0], 1e-4)
    check_triplet(A[2], triplets[2], 1e-4)
    for i in (1, 3):
        for j in range(A[i].shape[0]):
            check_triplet(A[i][j], tuple(t[j] for t in triplets[i]), 1e-4)
    assert triplets[4].u.shape == (0, 4) and triplets[5].u.shape == (4,) and triplets[5].v.shape == (0,)
    assert triplets[5].s == 0


def test_triplets_of_zero_and_non_finite_matrices(backend):
    for shape in ((5, 30, 20), (5, 140, 150)):
        A = torch.randn(shape)
        clean = sk.singular_triplet(A)
        A[1], A[2, 3, 4], A[3, 5, 6] = 0, torch.nan, torch.inf
        u, s, v = sk.singular_triplet(A)
        assert s[1] == 0 and s[2].isnan() and s[3] == torch.inf
        assert not u[1:4].any() and not v[1:4].any()
        for ours, before in zip((u, s, v), clean, strict=True):
            assert torch.equal(ours[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("exponent", [-100, 100])
def test_triplets_do_not_know_the_scale(exponent, backend):
    for A in (torch.randn(30, 20), torch.randn(150, 200)):
        u, s, v = sk.singular_triplet(A)
        for ours, moved in zip((u, s * 2.0**exponent, v), sk.singular_triplet(A * 2.0**exponent), strict=True):
            assert torch.equal(ours, moved)
    tiny = torch.randn(30, 20) * 1e-41
    check_triplet(tiny * 2.0**100, sk.singular_triplet(tiny)._replace(s=sk.singular_triplet(tiny).s * 2.0**100), 1e-3)


def test_triplets_with_fixed_steps(backend):
    A = make("flat", 200, 0).A
    few, many = (float(sk.singular_triplet(A, steps=steps).s) for steps in (1, 12))
    assert few < 0.99 * exact(A) and many == pytest.approx(exact(A), rel=1e-2)


def test_triplets_record_no_gradient(backend):
    A = torch.randn(20, 30, requires_grad=True)
    assert not any(t.requires_grad for t in sk.singular_triplet(A))
    assert not sk.stable_rank(A).requires_grad and not sk.leading_subspace(A, 2).S.requires_grad


def test_triplets_have_the_same_bits_alone_in_a_list_and_for_any_threads():
    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    A = [torch.randn(30, 20), torch.randn(150, 200), torch.randn(400, 140)]
    alone = [sk.singular_triplet(a) for a in A]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(alone, sk.singular_triplet(A), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------------- leading_subspace


def check_subspace(A: torch.Tensor, subspace, rank: int, tol: float, values: bool = True) -> None:
    U, S, Vh = (t.double() for t in subspace)
    m, n = A.shape
    a = A.double()
    assert U.shape == (m, rank) and S.shape == (rank,) and Vh.shape == (rank, n)
    assert (S[:-1] >= S[1:]).all() and (S >= 0).all()
    eye, rounding = torch.eye(rank, dtype=torch.float64), 1e-5 if subspace[0].dtype == torch.float32 else 1e-12
    torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=rounding)
    torch.testing.assert_close(Vh @ Vh.mT, eye, rtol=0, atol=rounding)
    truth = torch.linalg.svdvals(a)[:rank]
    assert (S <= truth * (1 + 1e-5) + rounding * truth[0]).all()
    if values:
        assert ((truth - S).abs() <= tol * truth + rounding * truth[0]).all()
    torch.testing.assert_close(U.mT @ a @ Vh.mT, torch.diag(S), rtol=0, atol=2 * rounding * float(truth[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subspaces_of_every_shape_order_and_rank(shape, dtype, backend):
    short = min(shape)
    for rank in sorted({1, min(3, short), min(9, short)} | ({short} if short < 100 else set())):
        for A in both_orders(torch.randn(shape).to(dtype)):
            before = A.clone()
            subspace = sk.leading_subspace(A, rank)
            assert isinstance(subspace, sk.LeadingSubspace) and all(t.dtype == acc_dtype(dtype) for t in subspace)
            check_subspace(A, subspace, rank, 1e-3)
            assert torch.equal(A, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_subspaces_of_every_family(family, backend):
    A = make(family, 80, 2).A
    for a in (A, A.mT.float()):
        check_subspace(a, sk.leading_subspace(a, 5, seed=1), 5, 1e-3)


def test_the_whole_space_of_a_large_side():
    """More columns than native kernels serve: another backend does, and one that is insisted on says why not."""
    for A in both_orders(torch.randn(150, 170)):
        check_subspace(A, sk.leading_subspace(A, 150), 150, 1e-3)
        check_subspace(A, sk.leading_subspace(A, 64), 64, 1e-3)
    kernel("gram_matvec", "cpu", "cpu", torch.float32, 4)
    with sk.force("cpu"), pytest.raises(sk.BackendUnavailable, match="blocks of 1 to 128 columns, not 150"):
        sk.leading_subspace(A, 150)


@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("true_rank", [1, 3, 8])
def test_low_rank_matrices(rank, true_rank, backend):
    """Beyond the rank of the matrix: values zero, vectors still orthonormal."""
    for m, n in ((60, 40), (150, 200)):
        s = torch.zeros(min(m, n), dtype=torch.float64)
        s[:true_rank] = torch.linspace(1, 0.5, true_rank)
        for A in both_orders(with_spectrum(s, m, n, torch.Generator().manual_seed(3)).A):
            U, S, Vh = subspace = sk.leading_subspace(A, rank)
            check_subspace(A, subspace, rank, 1e-3)
            kept = min(rank, true_rank)
            torch.testing.assert_close(S[:kept], s[:kept], rtol=1e-3, atol=0)
            if rank >= true_rank:
                torch.testing.assert_close(U @ torch.diag(S) @ Vh, A, rtol=0, atol=1e-10)


def test_the_subspace_where_it_is_separated(backend):
    s = torch.cat([torch.tensor([1.0, 0.9, 0.9, 0.8]), torch.linspace(0.3, 0, 96)]).double()
    A = with_spectrum(s, 130, 100, torch.Generator().manual_seed(4)).A
    U, _, Vh = sk.leading_subspace(A, 4, 1e-8)
    exact_U, _, exact_Vh = torch.linalg.svd(A)
    torch.testing.assert_close(U @ U.mT, exact_U[:, :4] @ exact_U[:, :4].mT, rtol=0, atol=1e-3)
    torch.testing.assert_close(Vh.mT @ Vh, exact_Vh[:4].mT @ exact_Vh[:4], rtol=0, atol=1e-3)


def test_subspaces_of_stacks_and_lists(backend):
    stack = torch.randn(2, 3, 20, 30)
    U, S, Vh = sk.leading_subspace(stack, 4)
    assert (U.shape, S.shape, Vh.shape) == ((2, 3, 20, 4), (2, 3, 4), (2, 3, 4, 30))
    for i in range(2):
        for j in range(3):
            check_subspace(stack[i, j], tuple(t[i, j] for t in (U, S, Vh)), 4, 1e-3)
    A = [torch.randn(150, 200), torch.randn(2, 9, 30), torch.randn(40, 7), torch.randn(0, 8, 9)]
    subspaces = sk.leading_subspace(A, 5)
    assert isinstance(subspaces, list)
    check_subspace(A[0], subspaces[0], 5, 1e-3)
    check_subspace(A[1][1], tuple(t[1] for t in subspaces[1]), 5, 1e-3)
    check_subspace(A[2], subspaces[2], 5, 1e-3)
    assert subspaces[3].U.shape == (0, 8, 5)


def test_subspaces_of_zero_and_non_finite_matrices(backend):
    A = torch.randn(4, 30, 20)
    clean = sk.leading_subspace(A, 3)
    A[1, 2, 3], A[2, 4, 5] = torch.nan, torch.inf
    found = sk.leading_subspace(A, 3)
    for ours, before in zip(found, clean, strict=True):
        assert ours[[1, 2]].isnan().all()
        # LAPACK's batches may sum in another order
        torch.testing.assert_close(ours[[0, 3]], before[[0, 3]], rtol=0, atol=0 if backend == "cpu" else 1e-4)
    U, S, Vh = sk.leading_subspace(torch.zeros(7, 5), 2)
    assert not S.any()
    assert all(torch.isfinite(t).all() for t in (U, Vh))


@pytest.mark.parametrize("size", [1e-30, 1e30, 1e-41])
def test_subspaces_do_not_know_the_scale(size, backend):
    A = torch.randn(40, 30) * size
    exponent = -math.frexp(float(A.abs().max()))[1]
    unit = torch.ldexp(A.double(), torch.tensor(float(exponent), dtype=torch.float64))
    U, S, Vh = sk.leading_subspace(A, 4)
    S = torch.ldexp(S.double(), torch.tensor(float(exponent), dtype=torch.float64))
    if size > 1e-40:
        check_subspace(unit, (U, S.float(), Vh), 4, 1e-3)
    else:  # the values themselves are rounded to subnormals
        torch.testing.assert_close(S, torch.linalg.svdvals(unit)[:4], rtol=2e-3, atol=0)


def test_subspaces_under_autocast(backend):
    A = torch.randn(150, 140)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sk.leading_subspace(A, 4)
    check_subspace(A, found, 4, 1e-3)


# --------------------------------------------------------------------------------------------------------- stable_rank


def exact_stable_rank(A: torch.Tensor) -> float:
    top = A.double().abs().max()
    return float((A.double() / top).square().sum()) / exact(A.double() / top) ** 2 if A.numel() and top else 0.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_rank_of_every_family(family, dtype, backend):
    A = make(family, 60, 1).A.to(dtype)
    value = sk.stable_rank(A)
    assert value.shape == () and value.dtype == acc_dtype(dtype)
    assert float(value) == pytest.approx(exact_stable_rank(A), rel=2e-3)
    assert 1 - 2e-3 <= float(value) <= min(A.shape) * (1 + 2e-3)


@pytest.mark.parametrize("shape", [s for s in EDGE_SHAPES + SHAPES if 0 not in s])
def test_stable_rank_of_every_shape(shape, backend):
    for A in both_orders(torch.randn(shape)):
        assert float(sk.stable_rank(A)) == pytest.approx(exact_stable_rank(A), rel=2e-3)
        assert 1 - 1e-3 <= float(sk.stable_rank(A)) <= min(shape) * (1 + 2e-3)


def test_stable_rank_ends(backend):
    assert float(sk.stable_rank(torch.outer(torch.randn(40), torch.randn(30)))) == pytest.approx(1, abs=1e-5)
    assert float(sk.stable_rank(torch.eye(40, 30))) == pytest.approx(30, rel=1e-5)
    assert float(sk.stable_rank(torch.eye(140, 150))) == pytest.approx(140, rel=1e-5)
    assert float(sk.stable_rank(torch.tensor([[3.0]]))) == 1


def test_stable_rank_of_stacks_lists_and_special_matrices(backend):
    A = torch.randn(2, 3, 20, 30)
    A[0, 1], A[1, 0, 2, 3], A[1, 2, 4, 5] = 0, torch.nan, torch.inf
    value = sk.stable_rank(A)
    assert value.shape == (2, 3) and value[0, 1] == 0 and value[1, 0].isnan() and value[1, 2].isnan()
    for i, j in ((0, 0), (0, 2), (1, 1)):
        assert float(value[i, j]) == pytest.approx(exact_stable_rank(A[i, j]), rel=2e-3)
    flat = sk.stable_rank([torch.randn(9, 7), torch.ones(5, 6), torch.zeros(0, 4)])
    assert flat.shape == (3,) and float(flat[1]) == pytest.approx(1, abs=1e-5) and flat[2] == 0
    ragged = sk.stable_rank([A, torch.eye(4)])
    assert ragged[0].shape == (2, 3) and float(ragged[1]) == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e30, 2.0**-130])
def test_stable_rank_does_not_know_the_scale(size, backend):
    A = torch.randn(40, 30)
    assert float(sk.stable_rank(A * size)) == pytest.approx(exact_stable_rank(A * size), rel=2e-3)
    wide = torch.randn(150, 200)
    assert float(sk.stable_rank(wide * size)) == pytest.approx(exact_stable_rank(wide * size), rel=2e-3)


def test_stable_rank_where_the_budget_ends(monkeypatch, backend):
    """The dense finish serves the ratio too, not the value alone."""
    monkeypatch.setattr("spectral_kernels.ops.estimate.MOST_READS", 1)
    A = torch.randn(300, 260, dtype=torch.float64)
    assert float(sk.stable_rank(A, 1e-6)) == pytest.approx(exact_stable_rank(A), rel=2e-6)
