"""spectral_clip: values, errors and derivatives against clipped float64 SVDs."""

from __future__ import annotations

import math
import re

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.ops import clip
from spectral_kernels.ops.clip import spectral_clip_backward_op, spectral_clip_op
from tests.kernels.lists import DTYPES, LAYOUTS, kernel
from tests.matrices import FAMILIES, make, with_spectrum

SHAPES = [(30, 20), (20, 30), (25, 25), (130, 160), (9, 300), (300, 9), (1, 6), (6, 1), (1, 1)]
EXACT = ["svd", "auto"]  # for sides below 256


def parts(A: torch.Tensor, rank: int | None = None, threshold: float | None = None):
    """Float64 factors and tau of the matrices in the last two dimensions."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    tau = S[..., rank - 1 : rank] if rank else torch.full_like(S[..., :1], float(threshold or 0))
    return U, S, Vh, tau


def expected(A: torch.Tensor, rank: int | None = None, threshold: float | None = None) -> torch.Tensor:
    U, S, Vh, tau = parts(A, rank, threshold)
    return (U * torch.minimum(S, tau)[..., None, :]) @ Vh


def norm(A: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(A.double(), 2).max()) if A.numel() else 0.0


def check(found, A: torch.Tensor, tol: float, rank: int | None = None, threshold: float | None = None) -> float:
    """Error at most tol sigma_max, beside the rounding of the result; norm at most tau + tol sigma_max."""
    assert found.shape == A.shape and found.dtype == A.dtype and found.device == A.device
    U, S, Vh, tau = parts(A, rank, threshold)
    top, tau = float(S[..., 0].max()), float(tau.max())
    # entries rounded to the dtype: at most eps / 2 ||result||_F in the spectral norm
    rounding = torch.finfo(A.dtype).eps * float(torch.linalg.matrix_norm(found.double()).max()) + 1e-14 * top
    error = norm(found.double() - expected(A, rank, threshold))
    assert error <= tol * top + rounding
    assert norm(found) <= tau + tol * top + rounding
    return error / top


def options(A: torch.Tensor) -> list[dict]:
    """Ranks and thresholds between the ends of a single matrix."""
    S, short = torch.linalg.svdvals(A.double()), min(A.shape)
    ranks = sorted({1, min(2, short), min(7, short)} | ({short} if short < 100 else set()))
    between = [float(S[r - 1] + S[min(r, short - 1)]) / 2 for r in (1, min(7, short))]
    return [{"rank": r} for r in ranks] + [{"threshold": t} for t in between]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_dtypes_and_ranks(shape, dtype, method):
    A = torch.randn(shape).to(dtype)
    before = A.clone()
    for option in options(A):
        tol = 0.0 if method in EXACT else 2e-3
        check(sk.spectral_clip(A, method=method, **option), A, tol, **option)
    assert torch.equal(A, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_of_every_family(family):
    """The bound that the docstring states; the errors are above rounding, so it was no SVD."""
    seen = 0.0
    for seed, dtype, tolerances in ((1, torch.float32, (1e-2, 1e-3, 1e-4)), (2, torch.float64, (1e-3, 1e-6))):
        A = make(family, 64, seed).A.to(dtype)
        S = torch.linalg.svdvals(A.double())
        for rank in (3, 10):
            between = float((S[rank - 1] * S[rank - 2]).sqrt()) or float(S[0]) / 2
            for option in ({"rank": rank}, {"threshold": between}):
                for tol in tolerances:
                    found = sk.spectral_clip(A, method="block", tol=tol, seed=seed, **option)
                    bound = 2 * tol if dtype == torch.float64 else max(2 * tol, 1e-4) + 1e-6
                    seen = max(seen, check(found, A, bound, **option))
    assert seen > 1e-8


@pytest.mark.parametrize("family", ["flat", "decaying", "graded rows"])
def test_the_block_of_every_backend(family, backend):
    A = make(family, 64, 0).A.float()
    tau = float(torch.linalg.svdvals(A)[4])
    for option in ({"rank": 5}, {"threshold": 0.99 * tau}):
        check(sk.spectral_clip(A, method="block", **option), A, 2e-3, **option)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_svd_of_every_family(family):
    A = make(family, 40, 3).A
    for rank in (2, 9, 40):
        found = sk.spectral_clip(A, rank, method="svd")
        check(found, A, 0.0, rank=rank)
        values = torch.linalg.svdvals(A)
        want = torch.minimum(values, values[rank - 1])
        torch.testing.assert_close(torch.linalg.svdvals(found), want, rtol=0, atol=1e-13 * float(values[0]))


def test_a_tighter_tolerance_is_nearer():
    A = make("trained", 120, 0).A
    loose, tight = (
        norm(sk.spectral_clip(A, 16, method="block", tol=tol) - expected(A, 16)) / norm(A) for tol in (1e-1, 1e-9)
    )
    assert tight < 1e-6 < 1e-4 < loose


@pytest.mark.parametrize("method", clip.METHODS)
def test_the_ends_of_the_rank(method):
    """1: nothing is clipped. min(m, n): all values equal, the polar factor times the smallest."""
    A = torch.randn(2, 30, 20, dtype=torch.float64)
    assert torch.equal(sk.spectral_clip(A, 1, method=method), A)
    full = sk.spectral_clip(A, 20, method=method, tol=1e-10)
    U, S, Vh, _ = parts(A, 1)
    torch.testing.assert_close(full, S[:, -1:, None] * (U @ Vh), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_below_the_threshold_leave_the_bits(method, dtype):
    for A in (torch.randn(3, 30, 40).to(dtype), torch.eye(20, 30).to(dtype), torch.randn(140, 130).to(dtype).mT):
        top = norm(A)
        for threshold in (top, 2 * top, 1e300):
            assert torch.equal(sk.spectral_clip(A, threshold=threshold, method=method), A)
        assert not torch.equal(sk.spectral_clip(A, threshold=top / 2, method=method), A)
    A = torch.stack([torch.eye(20), 3 * torch.eye(20)])  # each by itself
    found = sk.spectral_clip(A, threshold=2.0, method=method)
    assert torch.equal(found[0], A[0])
    torch.testing.assert_close(found[1], 2 * torch.eye(20), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", clip.METHODS)
def test_low_rank(method):
    """tau = 0 beyond the rank of the matrix."""
    s = torch.zeros(50, dtype=torch.float64)
    s[:3] = torch.tensor([3.0, 2.0, 1.0])
    A = with_spectrum(s, 60, 50, torch.Generator().manual_seed(0)).A
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        a = A.to(dtype)
        assert norm(sk.spectral_clip(a, 5, method=method)) <= atol
        torch.testing.assert_close(
            sk.spectral_clip(a, 3, method=method, tol=1e-5).double(), expected(A, 3), rtol=0, atol=2e-5
        )


# ------------------------------------------------------------------------------------------------- stacks and lists


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_stacks(layout, method):
    A = LAYOUTS[layout](torch.randn(3, 40, 50))
    for option in ({"rank": 6}, {"threshold": 9.0}):
        tol = 0.0 if method in EXACT else 2e-3
        check(sk.spectral_clip(A, method=method, **option), A, tol, **option)
    deep = torch.randn(2, 3, 9, 7)
    check(sk.spectral_clip(deep, 4, method=method), deep, 2e-3, rank=4)


@pytest.mark.parametrize("method", clip.METHODS)
def test_lists(method):
    A = [torch.randn(s) for s in [(30, 20), (2, 60, 80), (3, 5, 9), (0, 4, 5), (4, 0), (2, 0, 3), (140, 130)]]
    for option in ({"rank": 4}, {"threshold": 8.0}):
        found = sk.spectral_clip(A, method=method, **option)
        assert isinstance(found, list) and [f.shape for f in found] == [a.shape for a in A]
        for f, a in zip(found, A, strict=True):
            if a.numel():
                check(f, a, 2e-3, **option)
        for f, same in zip(found, sk.spectral_clip(tuple(A), method=method, **option), strict=True):
            assert torch.equal(f, same)
    assert sk.spectral_clip([], 3) == [] == sk.spectral_clip((), threshold=1.0)


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (2, 0, 5), (0, 4, 3)])
def test_empty_matrices(shape, method):
    A = torch.ones(shape, requires_grad=True)
    for option in ({"rank": 3}, {"threshold": 2.0}):
        found = sk.spectral_clip(A, method=method, **option)
        assert found.shape == shape and found.dtype == A.dtype
        found.sum().backward()
        assert A.grad is not None and A.grad.shape == shape


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("option", [{"rank": 1}, {"rank": 5}, {"threshold": 3.0}])
def test_non_finite_and_zero_matrices_and_their_neighbours(option, method):
    for shape in ((5, 30, 20), (5, 40, 50)):
        A = torch.randn(shape)
        clean = sk.spectral_clip(A, method=method, **option)
        A[1], A[2, 3, 4], A[3, 5, 6] = 0, torch.nan, -torch.inf
        found = sk.spectral_clip(A, method=method, **option)
        assert not found[1].any() and found[2:4].isnan().all()
        # products of a batch may sum in another order
        torch.testing.assert_close(found[[0, 4]], clean[[0, 4]], rtol=0, atol=2e-5)
        several = sk.spectral_clip([A[2], A[0], A[1]], method=method, **option)
        assert several[0].isnan().all() and not several[2].any()
        torch.testing.assert_close(several[1], clean[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("exponent", [-120, -90, 30, 100])
def test_powers_of_two_pass_through(exponent, method):
    for A in (torch.randn(2, 30, 20), torch.randn(40, 50)):
        A = torch.where(A.abs() < 0.1, 0.1, A)  # entries of the results far from zero would be subnormal at 2^-120
        for option, moved in (({"rank": 4}, {"rank": 4}), ({"threshold": 6.0}, {"threshold": 6 * 2.0**exponent})):
            here = sk.spectral_clip(A, method=method, **option).double() * 2.0**exponent
            there = sk.spectral_clip(A * 2.0**exponent, method=method, **moved).double()
            torch.testing.assert_close(there, here, rtol=0, atol=2.0**-149 if exponent < -100 else 0)


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 2e38])
def test_scale_does_not_matter(size, dtype, method):
    A = (torch.rand(30, 20, dtype=torch.float64) - 0.3).mul(size).to(dtype)
    for option in ({"rank": 3}, {"threshold": 2 * size}):
        found = sk.spectral_clip(A, method=method, **option)
        unit = {k: v / size if k == "threshold" else v for k, v in option.items()}
        error = norm(found.double() / size - expected(A.double() / size, **unit))
        rounding = torch.finfo(dtype).eps + 2.0**-133 / size * (dtype == torch.bfloat16) + 2.0**-149 / size
        assert error <= (2e-3 + 30 * rounding) * norm(A.double() / size)


# ----------------------------------------------------------------------------------------------------------- choices


@pytest.fixture
def asked(monkeypatch):
    """(rank, rows) of every call of leading_subspace."""
    calls = []

    def recorded(A, rank, *args, **more):
        calls.append((rank, sorted(a.shape[0] for a in A)))
        return inner(A, rank, *args, **more)

    inner = clip.leading_subspace
    monkeypatch.setattr(clip, "leading_subspace", recorded)
    return calls


def test_auto_takes_the_method_that_explain_names(asked):
    sides = [((255, 300), 2, 0), ((300, 256), 16, 16), ((256, 300), 17, 16), ((2, 420, 410), 25, 25)]
    for shape, rank, widest in sides:
        short = min(shape[-2:])
        A = torch.randn(shape)
        text = str(sk.explain("spectral_clip", A))
        assert clip.widest_block(short) == widest
        words = f"method block up to rank {widest}" if widest else "method svd at any rank"
        assert f"shorter side {short}: {words}" in text and "gram_matvec: served by" in text
        asked.clear()
        check(sk.spectral_clip(A, rank), A, 2e-3, rank=rank)
        assert bool(asked) is (rank <= widest)
    assert "method" not in str(sk.explain("spectral_norm", A))


def test_a_list_is_one_launch_and_methods_can_be_insisted_on(asked):
    A = [torch.randn(260, 300), torch.randn(2, 300, 270), torch.randn(20, 30)]
    sk.spectral_clip(A, 4)
    assert asked == [(4, [1, 2])]
    sk.spectral_clip(A, 4, method="block")
    assert asked[1:] == [(4, [1, 2]), (4, [1])]
    asked.clear()
    sk.spectral_clip(A, 4, method="svd")
    assert asked == []


def test_a_threshold_doubles_the_rank_where_more_values_lie_above(asked):
    s = torch.linspace(2, 1, 90, dtype=torch.float64)
    A = torch.stack([with_spectrum(s * f, 90, 100, torch.Generator().manual_seed(1)).A for f in (0.5, 0.95, 1)])
    option = {"threshold": float(s[11] + s[12]) / 2}  # above it: no, 4 and 12 values
    found = sk.spectral_clip(A, method="block", **option)
    for f, a in zip(found, A, strict=True):
        check(f, a, 2e-3, **option)
    assert asked == [(8, [3]), (16, [1])] and torch.equal(found[0], A[0])
    asked.clear()
    check(sk.spectral_clip(A[2], method="block", threshold=0.5), A[2], 2e-3, threshold=0.5)
    assert [rank for rank, _ in asked] == [8, 16, 32, 64, 90]
    asked.clear()
    A = torch.randn(2, 256, 300)
    A[1] *= 0.1
    option = {"threshold": norm(A) / 2}
    found = sk.spectral_clip(A, **option)
    assert asked == [(8, [2]), (16, [1])] and torch.equal(found[1], A[1])
    check(found[0], A[0], 1e-6, **option)  # the SVD took over


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be in [1, 20], not 0"),
        ({"rank": -3}, ValueError, "rank must be in [1, 20], not -3"),
        ({"rank": 21}, ValueError, "rank must be in [1, 20], not 21"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, not float"),
        ({"rank": True}, TypeError, "rank must be an integer, not bool"),
        ({"rank": "2"}, TypeError, "rank must be an integer, not str"),
        ({}, ValueError, "either rank or threshold, not neither"),
        ({"rank": 2, "threshold": 1.0}, ValueError, "not both (rank=2, threshold=1.0)"),
        ({"threshold": 0}, ValueError, "threshold must be a finite number above 0, not 0"),
        ({"threshold": -1.0}, ValueError, "above 0, not -1.0"),
        ({"threshold": math.nan}, ValueError, "above 0, not nan"),
        ({"threshold": math.inf}, ValueError, "above 0, not inf"),
        ({"threshold": True}, TypeError, "threshold must be a number, not bool"),
        ({"threshold": "1"}, TypeError, "threshold must be a number, not str"),
        ({"rank": 2, "method": "krylov"}, ValueError, "method must be one of 'auto', 'block', 'svd', not 'krylov'"),
        ({"rank": 2, "tol": 0.0}, ValueError, "tol must lie in"),
        ({"rank": 2, "tol": True}, TypeError, "tol must be a number, not bool"),
        ({"rank": 2, "seed": 1.5}, TypeError, "seed must be an integer, not float"),
    ],
)
def test_bad_options(given, error, message):
    for A in (torch.randn(30, 20), [torch.randn(30, 40), torch.randn(2, 20, 90), torch.randn(0, 3)]):
        with pytest.raises(error, match=re.escape(message)):
            sk.spectral_clip(A, **given)


@pytest.mark.parametrize("option", [{"rank": 1}, {"rank": 2}, {"threshold": 1.0}])
def test_bad_matrices(option):
    for A, error, message in (
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.ones(3, 4, dtype=torch.complex64), TypeError, "complex"),
        (torch.eye(4).to_sparse(), TypeError, "dense"),
        (torch.ones(3), ValueError, "at least 2 dimensions"),
        (3.0, TypeError, "must be a torch.Tensor, not float"),
        ([torch.ones(3, 4), torch.ones(3, 4).double()], ValueError, "one dtype and device"),
    ):
        with pytest.raises(error, match=message):
            sk.spectral_clip(A, **option)


# --------------------------------------------------------------------------------------------------------- gradients

GRADIENT_SHAPES = [(5, 4), (4, 7), (1, 5), (5, 1), (3, 5, 5), (2, 2, 3, 4)]


def through_svd(A: torch.Tensor, H: torch.Tensor, rank: int | None = None, threshold: float | None = None):
    A = A.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad((expected(A, rank, threshold) * H).sum(), A)
    return found


def pulled(A: torch.Tensor, H: torch.Tensor, **given) -> torch.Tensor:
    A = A.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    (found,) = torch.autograd.grad((sk.spectral_clip(A, **given) * H).sum(), A)
    assert found.shape == A.shape and found.dtype == A.dtype
    return found


@pytest.mark.parametrize("method", clip.METHODS)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
def test_gradient_is_that_of_the_svd(shape, method):
    A, H = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    S = torch.linalg.svdvals(A)
    middle = float(S.flatten().median()) * 1.01
    ranks = [{"rank": r} for r in range(1, min(shape[-2:]) + 1)]
    for option in [*ranks, {"threshold": middle}, {"threshold": 100.0}, {"threshold": 1e-3}]:
        want = through_svd(A, H, **option)
        torch.testing.assert_close(pulled(A, H, method=method, tol=1e-10, **option), want, rtol=0, atol=1e-10)
        strided = pulled(A.mT.contiguous().mT, H, method=method, tol=1e-10, **option)
        torch.testing.assert_close(strided, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ["block", "svd"])
def test_gradcheck_of_tensor_stack_and_list(method):
    def run(*tensors, **option):
        given = tensors[0] if len(tensors) == 1 else list(tensors)
        return sk.spectral_clip(given, method=method, tol=1e-12, **option)

    a, b, c = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(6, 4), (4, 7), (2, 5, 5)])
    for option in ({"rank": 2}, {"rank": 4}, {"threshold": 1.5}):
        for given in ((a,), (b,), (c,), (a, b, c)):
            assert torch.autograd.gradcheck(
                lambda *x, option=option: run(*x, **option), given, eps=1e-6, atol=1e-5, fast_mode=True
            )


def test_gradcheck_at_repeated_values_where_the_clip_is_smooth():
    """Equal values on one side of tau: autograd through torch.linalg.svd divides by their difference."""
    s = torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0])
    A = with_spectrum(s.double(), 7, 5, torch.Generator().manual_seed(0)).A.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sk.spectral_clip(x, threshold=2.0), A, eps=1e-6, atol=1e-6)
    s = torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0])
    A = with_spectrum(s.double(), 5, 6, torch.Generator().manual_seed(0)).A.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sk.spectral_clip(x, rank=3), A, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (5, 5)])
def test_gradient_at_a_tie_with_tau_is_a_limit_of_gradients(shape, rank):
    """sigma = 1, 1/2, 1/2, 1/2, 1/4: the limit along matrices of the same vectors with separate values."""
    s = torch.tensor([1, 0.5, 0.5, 0.5, 0.25], dtype=torch.float64)
    A = with_spectrum(s, *shape, torch.Generator().manual_seed(2)).A
    A = A * 2.0 ** -math.frexp(float(A.abs().max()))[1]  # entries in [1/2, 1): the SVD in backward is of these bits
    H = torch.randn(shape, dtype=torch.float64)
    tall = shape[0] >= shape[1]  # the vectors that backward finds: a wide matrix is transposed there
    U, S, Vh = torch.linalg.svd(A if tall else A.mT, full_matrices=False)
    U, Vh = (U, Vh) if tall else (Vh.mT, U.mT)
    place, step = torch.arange(5), 1e-4 * float(S[0])
    apart = torch.where(place < rank - 1, step * (5 - place), -(step**2) * (place - rank + 1))
    near = (U * (S + apart)) @ Vh
    torch.testing.assert_close(pulled(A, H, rank=rank), through_svd(near, H, rank=rank), rtol=0, atol=5e-3)
    wrong = through_svd(near, H, rank=rank - 1)
    assert float((pulled(A, H, rank=rank) - wrong).abs().max()) > 0.05


@pytest.mark.parametrize("method", ["block", "svd"])
def test_gradients_where_values_are_zero(method):
    H = torch.randn(6, 5, dtype=torch.float64)
    zero = torch.zeros(6, 5, dtype=torch.float64)
    torch.testing.assert_close(pulled(zero, H, threshold=1.0, method=method), H, rtol=0, atol=1e-14)
    low = with_spectrum(torch.tensor([2.0, 1.0, 0, 0, 0]).double(), 6, 5, torch.Generator().manual_seed(0)).A
    # tau = 1.5 lies between the values: the clip is smooth there, zeros or not
    slopes = []
    for seed in range(3):
        D = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ends = [expected(low + step * D, threshold=1.5) for step in (1e-6, -1e-6)]
        slopes.append(float(((ends[0] - ends[1]) * H).sum()) / 2e-6)
        assert float((pulled(low, H, threshold=1.5, method=method) * D).sum()) == pytest.approx(slopes[-1], abs=1e-6)
    for A in (zero, low):  # tau = 0, a kink: what is known is that the clip is Lipschitz in the Frobenius norm
        for rank in (3, 5):
            found = pulled(A, H, rank=rank, method=method)
            assert torch.isfinite(found).all() and float(found.norm()) <= 5 * float(H.norm())


@pytest.mark.parametrize("option", [{"rank": 1}, {"rank": 3}, {"threshold": 2.0}])
@pytest.mark.parametrize("method", clip.METHODS)
def test_non_finite_neighbours_have_zero_gradients_of_their_own(method, option):
    A, H = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    want = through_svd(A, H, **option)
    A[1, 2, 3], A[2, 1, 1] = torch.nan, torch.inf
    found = pulled(A, H, method=method, **option)
    torch.testing.assert_close(found[[0, 3]], want[[0, 3]], rtol=0, atol=1e-10)
    assert not found[1:3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_other_dtypes(dtype):
    A, H = torch.randn(12, 9).to(dtype), torch.randn(12, 9).to(dtype)
    want = through_svd(A.double(), H.double(), rank=4)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(pulled(A, H, rank=4).double(), want, rtol=eps, atol=1e-13 + eps * 1e-3)


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_gradient_does_not_know_the_scale(size):
    A, H = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    for option, moved in (({"rank": 3}, {"rank": 3}), ({"threshold": 2.0}, {"threshold": 2 * size})):
        torch.testing.assert_close(pulled(A * size, H, **moved), through_svd(A, H, **option), rtol=0, atol=1e-10)


def test_only_what_asks_gets_a_gradient_and_later_changes_are_refused():
    a, b = torch.randn(6, 4, requires_grad=True), torch.randn(4, 7)
    found = sk.spectral_clip([a, b], 2)
    found[0].sum().backward()
    assert a.grad is not None and b.grad is None
    with torch.no_grad():
        assert not sk.spectral_clip(a, 2).requires_grad
    c = a.detach().clone().requires_grad_()
    value = sk.spectral_clip(c, 2)
    with torch.no_grad():
        c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("method", clip.METHODS)
def test_double_backward_is_refused(method):
    A = torch.randn(6, 4, requires_grad=True)
    (found,) = torch.autograd.grad(sk.spectral_clip(A, 2, method=method).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="spectral_clip.*double backward"):
        found.square().sum().backward()


# ------------------------------------------------------------------------------------------------------ transformations


@pytest.mark.parametrize("method", clip.METHODS)
def test_vmap(method):
    A = torch.randn(4, 12, 9, dtype=torch.float64)

    def run(a):
        return sk.spectral_clip(a, 3, method=method, tol=1e-10)

    want = expected(A, 3)
    torch.testing.assert_close(torch.func.vmap(run)(A), want, rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.func.vmap(run, in_dims=2)(A.movedim(0, 2)), want, rtol=0, atol=1e-8)
    nested = torch.func.vmap(torch.func.vmap(run))(A.view(2, 2, 12, 9))
    torch.testing.assert_close(nested, want.view(2, 2, 12, 9), rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.func.vmap(run)(A.view(2, 2, 12, 9)), nested, rtol=0, atol=1e-8)
    A.requires_grad_()
    H = torch.randn_like(A)
    (found,) = torch.autograd.grad((torch.func.vmap(run)(A) * H).sum(), A)
    torch.testing.assert_close(found, through_svd(A, H, rank=3), rtol=0, atol=1e-10)
    value = run(A)
    several = torch.func.vmap(lambda h: torch.autograd.grad(value, A, h, retain_graph=True)[0])(torch.stack([H, 2 * H]))
    torch.testing.assert_close(several, torch.stack([found, 2 * found]), rtol=0, atol=1e-10)
    with pytest.raises(NotImplementedError, match="spectral_clip.*pass the list directly"):
        torch.func.vmap(lambda a, b: sk.spectral_clip([a, b], 2))(torch.randn(3, 4, 5), torch.randn(3, 5, 6))


def test_functional_derivatives_are_refused_by_name():
    A = torch.randn(6, 5)
    for call in (
        lambda: torch.func.grad(lambda a: sk.spectral_clip(a, 2).sum())(A),
        lambda: torch.func.jacrev(lambda a: sk.spectral_clip(a, 2))(A),
        lambda: torch.func.jvp(lambda a: sk.spectral_clip(a, 2), (A,), (A,)),
    ):
        with pytest.raises(RuntimeError, match="spectral_clip (does not go with|has no forward-mode)"):
            call()


@pytest.fixture
def traced():
    torch._dynamo.reset()
    yield lambda function, **more: torch.compile(function, fullgraph=True, backend="aot_eager", **more)
    torch._dynamo.reset()


@pytest.mark.parametrize("option", [{"rank": 1}, {"rank": 3}, {"threshold": 2.0}])
def test_compiled_without_a_graph_break(option, traced):
    A, H = torch.randn(2, 12, 9, dtype=torch.float64), torch.randn(2, 12, 9, dtype=torch.float64)

    def loss(a):
        return (sk.spectral_clip(a.tanh(), **option) * H).sum()

    eager, compiled = A.clone().requires_grad_(), A.clone().requires_grad_()
    loss(eager).backward()
    traced(loss)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)
    several = traced(lambda a, b: sk.spectral_clip([a, b], **option), dynamic=True)
    for shape in ((5, 6), (9, 4)):
        B = torch.randn(shape, dtype=torch.float64)
        for ours, eager in zip(several(A, B), sk.spectral_clip([A, B], **option), strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("method", ["block", "svd"])
def test_the_ops_are_registered_as_torch_wants_them(method):
    A = [torch.randn(2, 12, 9), torch.randn(1, 7, 11).mT.contiguous().mT]
    for rank, threshold in ((3, 0.0), (0, 2.0)):
        with_grad = [a.clone(memory_format=torch.preserve_format).requires_grad_() for a in A]
        torch.library.opcheck(spectral_clip_op, (with_grad, rank, threshold, method, 1e-3, 0))
    torch.library.opcheck(spectral_clip_backward_op, (A, [torch.randn_like(a) for a in A], 3, 0.0))


def test_autocast_changes_nothing():
    A = torch.randn(300, 260)
    for method in ("block", "svd"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = sk.spectral_clip(A, 4, method=method)
        assert torch.equal(found, sk.spectral_clip(A, 4, method=method))
