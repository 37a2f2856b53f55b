"""The gradient u v' of spectral_norm: gradcheck, repeated and zero values, functorch, double backward."""

from __future__ import annotations

import pytest
import torch

import spectral_kernels as sk
from tests.kernels.lists import DTYPES, kernel
from tests.matrices import with_spectrum

METHODS = ["krylov", "power", "gram", "svd"]
OPAQUE = ["krylov", "power"]


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


def separated(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A simple sigma_max: 1 over 0.5 and less."""
    s = 0.5 * torch.rand(min(m, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    s[0] = 1
    return with_spectrum(s, m, n, torch.Generator().manual_seed(seed + 1)).A.to(dtype)


def leading(A: torch.Tensor) -> torch.Tensor:
    """u v' of the last two dimensions, from a float64 SVD."""
    U, _, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return U[..., :, :1] @ Vh[..., :1, :]


def gradient(A: torch.Tensor, tol: float = 1e-10, **options) -> torch.Tensor:
    A = A.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    (found,) = torch.autograd.grad(sk.spectral_norm(A, tol, **options).sum(), A)
    return found


# wide and tall, on both sides of the sizes at which the block changes its side
SHAPES = [(5, 4), (4, 7), (1, 6), (6, 1), (1, 1), (3, 5, 4), (2, 2, 4, 5), (140, 200), (200, 140), (2, 150, 150)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_u_v(shape, method, backend):
    k = 1
    for size in shape[:-2]:
        k *= size
    A = torch.stack([separated(*shape[-2:], seed) for seed in range(k)]).view(shape)
    for layout in (A, A.mT.contiguous().mT):
        found = gradient(layout, method=method)
        assert found.shape == A.shape and found.dtype == A.dtype
        # first order in the vectors, whose error is of order sqrt(tol): 1e-5; gram averages over its Schatten norm
        torch.testing.assert_close(found, leading(A), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_dtype_and_strides(dtype, backend):
    for A in (separated(60, 40), separated(150, 180), separated(180, 150).mT):
        A = A.to(dtype)
        found = gradient(A, 1e-5)
        assert found.dtype == dtype and found.shape == A.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), leading(A), rtol=eps, atol=3e-3)


def _check(function, *inputs):
    # fast mode: random projections of both Jacobians, a tenth of the time
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_tensor_stack_and_list(method, backend):
    a, b = separated(6, 4).requires_grad_(), separated(4, 7, 5).requires_grad_()
    stack = torch.stack([separated(4, 3, s) for s in range(3)]).requires_grad_()

    def norm(x, **options):
        return sk.spectral_norm(x, 1e-12, method=method, **options)

    _check(norm, a)
    _check(norm, b)
    _check(norm, stack)
    _check(lambda *list_: norm(list(list_)), a, b)
    _check(lambda *list_: tuple(norm(list(list_))), a, stack, b)
    _check(lambda x: norm(x * 3).square() + 1, a)


def test_gradcheck_through_dim_and_keepdim(backend):
    A = torch.stack([separated(4, 5, s) for s in range(3)]).requires_grad_()  # (3, 4, 5)
    for dim in ((0, 1), (2, 0), (-1, -2)):
        _check(lambda x, dim=dim: sk.spectral_norm(x, 1e-12, dim=dim), A)
        _check(lambda x, dim=dim: sk.spectral_norm(x, 1e-12, dim=dim, keepdim=True), A)
    _check(lambda x: sk.spectral_norm(x, 1e-12, dim=(0, 2), steps=6), A)


def test_gradcheck_of_a_wide_contiguous_matrix(backend):
    """130 x 140: the block lives on the longer side there. Directions, since the whole Jacobian would take minutes."""
    A = separated(130, 140)
    found = gradient(A, 1e-13)
    for seed in range(3):
        D = torch.randn(A.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = 1e-6
        slope = (torch.linalg.matrix_norm(A + step * D, 2) - torch.linalg.matrix_norm(A - step * D, 2)) / (2 * step)
        assert float((found * D).sum()) == pytest.approx(float(slope), abs=1e-5 * float(D.norm()))


@pytest.mark.parametrize("method", OPAQUE)
@pytest.mark.parametrize("multiplicity", [2, 3, 6, 40])
def test_repeated_value_gives_one_subgradient(method, multiplicity, backend):
    """A subgradient G: ||G||_* = 1 (so spectral norm at most 1) and <G, A> = sigma_max."""
    for m, n in ((60, 40), (150, 170)):
        s = torch.linspace(0.9, 0.1, min(m, n), dtype=torch.float64)
        s[:multiplicity] = 1
        A = with_spectrum(s, m, n, torch.Generator().manual_seed(multiplicity)).A
        G = gradient(A, 1e-8, method=method)
        singular = torch.linalg.svdvals(G)
        assert singular[0] <= 1 + 1e-10 and singular.sum() == pytest.approx(1, abs=1e-8)
        assert float((G * A).sum()) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_non_finite_matrices_have_zero_or_nan_gradients_of_their_own(method, backend):
    A = torch.stack([separated(20, 30, s) for s in range(4)])
    A[1] = 0
    A[2, 3, 4] = torch.nan
    A.requires_grad_()
    value = sk.spectral_norm(A, 1e-10, method=method)
    assert value[1] == 0 and value[2].isnan()
    (found,) = torch.autograd.grad(value[[0, 1, 3]].sum(), A)
    assert not found[1].any()
    torch.testing.assert_close(found[[0, 3]], leading(A[[0, 3]].detach()), rtol=0, atol=3e-5)
    alone = torch.zeros(5, 4, requires_grad=True)
    sk.spectral_norm(alone, method=method).backward()
    assert not alone.grad.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_tensors_have_empty_gradients(shape, method, backend):
    A = torch.ones(shape, requires_grad=True)
    value = sk.spectral_norm(A, method=method)
    assert value.shape == shape[:1] and not value.any()
    value.sum().backward()
    assert A.grad.shape == shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-30, 1e30, 1e-42])
def test_gradient_does_not_know_the_scale(method, size, backend):
    for A in (separated(30, 20, 0, torch.float32), separated(140, 150, 0, torch.float32)):
        tiny = A * size
        atol = 3e-3 if size > 1e-40 else 0.02  # subnormal entries keep 2^-149 / size of their digits
        torch.testing.assert_close(gradient(tiny, 1e-5, method=method).double(), leading(A), rtol=0, atol=atol)


@pytest.mark.parametrize("method", METHODS)
def test_forward_twice_then_backward(method, backend):
    A = separated(30, 20).requires_grad_()
    first = sk.spectral_norm(A, 1e-10, method=method)
    second = sk.spectral_norm(2 * A, 1e-10, method=method)
    (first + second).backward()
    torch.testing.assert_close(A.grad, 3 * leading(A.detach()), rtol=0, atol=1e-4)
    third = sk.spectral_norm(A, method=method)
    third.backward(retain_graph=True)
    third.backward()


def test_a_matrix_changed_in_place_after_the_forward(backend):
    """u and v are saved, not A: what happens to the weight later is of no account."""
    A = separated(30, 20).requires_grad_()
    value = sk.spectral_norm(A, 1e-10)
    truth = leading(A.detach())
    with torch.no_grad():
        A.mul_(0)
    value.backward()
    torch.testing.assert_close(A.grad, truth, rtol=0, atol=3e-5)


def test_partial_requires_grad_in_a_list(backend):
    a, b = separated(6, 4).requires_grad_(), separated(4, 7)
    value = sk.spectral_norm([a, b], 1e-10)
    assert value.requires_grad
    value.sum().backward()
    torch.testing.assert_close(a.grad, leading(a.detach()), rtol=0, atol=3e-5)
    assert b.grad is None


@pytest.mark.parametrize("method", OPAQUE)
def test_double_backward_is_refused(method, backend):
    A = separated(6, 4).requires_grad_()
    (found,) = torch.autograd.grad(sk.spectral_norm(A, method=method), A, create_graph=True)
    with pytest.raises(RuntimeError, match="spectral_norm.*double backward"):
        found.square().sum().backward()
    (found,) = torch.autograd.grad(sk.spectral_norm(A, method=method).square(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="spectral_norm.*double backward"):
        torch.autograd.grad(found.sum(), A)


def test_value_with_gradient_has_the_bits_of_the_value_without():
    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    for shape in ((3, 160, 150), (150, 400), (2, 700, 90)):
        A = torch.randn(shape)
        with_gradient = sk.spectral_norm(A.clone().requires_grad_(), 1e-4)
        torch.testing.assert_close(with_gradient.detach(), sk.spectral_norm(A, 1e-4), rtol=1e-4, atol=0)
        assert with_gradient.requires_grad and torch.equal(
            with_gradient, sk.spectral_norm(A.clone().requires_grad_(), 1e-4)
        )


@pytest.mark.parametrize("method", METHODS)
def test_autocast_gives_the_same_gradient(method, backend):
    A = separated(150, 140, 0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(A, 1e-5, method=method)
    assert torch.equal(found, gradient(A, 1e-5, method=method))


def test_blocks_and_gradients_exclude_each_other():
    A = torch.randn(20, 30)
    _, block = sk.spectral_norm(A, return_block=True)
    for options in ({"v0": block}, {"return_block": True}):
        with pytest.raises(ValueError, match="v0 and return_block.*autograd"):
            sk.spectral_norm(A.clone().requires_grad_(), **options)
        with torch.no_grad():
            sk.spectral_norm(A.clone().requires_grad_(), **options)


# --------------------------------------------------------------------------------------------------------- functorch


@pytest.mark.parametrize("method", METHODS)
def test_vmap(method, backend):
    A = torch.randn(4, 12, 9, dtype=torch.float64)
    truth = torch.linalg.matrix_norm(A, 2)

    def norm(a):
        return sk.spectral_norm(a, 1e-6, method=method)

    torch.testing.assert_close(torch.func.vmap(norm)(A), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.vmap(norm, in_dims=2)(A.movedim(0, 2)), truth, rtol=1e-6, atol=0)
    nested = torch.func.vmap(torch.func.vmap(norm))(A.view(2, 2, 12, 9))
    torch.testing.assert_close(nested, truth.view(2, 2), rtol=1e-6, atol=0)
    of_stacks = torch.func.vmap(norm)(A.view(2, 2, 12, 9))
    torch.testing.assert_close(of_stacks, truth.view(2, 2), rtol=1e-6, atol=0)


def test_gradient_through_vmap(backend):
    A = torch.stack([separated(6, 5, s) for s in range(3)]).requires_grad_()
    torch.func.vmap(lambda a: sk.spectral_norm(a, 1e-10))(A).sum().backward()
    torch.testing.assert_close(A.grad, leading(A.detach()), rtol=0, atol=3e-5)


def _works_or_says_no(call, truth):
    """Right, or a RuntimeError that names spectral_norm; never a wrong number."""
    try:
        found = call()
    except RuntimeError as error:
        assert "spectral_norm" in str(error) and "setup_context" not in str(error)
    else:
        torch.testing.assert_close(found, truth, rtol=0, atol=3e-5)


@pytest.mark.parametrize("method", METHODS)
def test_functional_derivatives_work_or_are_refused(method):
    A = separated(6, 5)

    def norm(a):
        return sk.spectral_norm(a, 1e-10, method=method)

    stack = torch.stack([A, 2 * A])
    D = torch.randn(6, 5, dtype=torch.float64)
    slope = (leading(A) * D).sum()
    _works_or_says_no(lambda: torch.func.grad(norm)(A), leading(A))
    _works_or_says_no(lambda: torch.func.vmap(torch.func.grad(norm))(stack), leading(stack))
    _works_or_says_no(lambda: torch.func.grad(lambda x: torch.func.vmap(norm)(x).sum())(stack), leading(stack))
    _works_or_says_no(lambda: torch.func.jvp(norm, (A,), (D,))[1], slope)
    _works_or_says_no(lambda: torch.func.jacrev(norm)(A), leading(A))

    def forward_mode():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(A, D)
            return torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent

    _works_or_says_no(forward_mode, slope)


def test_vmap_over_a_list_is_refused():
    with pytest.raises(NotImplementedError, match="pass the list directly"):
        torch.func.vmap(lambda a, b: sk.spectral_norm([a, b]))(torch.randn(3, 4, 5), torch.randn(3, 5, 6))
