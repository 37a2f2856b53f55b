"""orthogonalize: its gradient against that of plain torch, and under torch's transformations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.ops import schedules
from spectral_kernels.ops.newton_schulz import SPECTRAL_TOL
from spectral_kernels.ops.orthogonalize import orthogonalize_backward_op, orthogonalize_op
from tests.kernels.lists import DTYPES
from tests.matrices import with_spectrum
from tests.ops.test_orthogonalize import FORMS, METHODS

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(5, 5), (3, 12), (12, 3), (2, 100), (1, 6), (6, 1), (2, 4, 5), (2, 2, 5, 3)]
EXPRESS = schedules.schedule("polar_express")


def plain(A: Tensor, schedule, method: str, normalizer: str) -> Tensor:
    """The definition, for autograd to differentiate."""
    if method == "svd":
        U, _, Vh = torch.linalg.svd(A, full_matrices=False)
        return U @ Vh
    S = torch.linalg.svdvals(A)
    norm = {"frobenius": S.square().sum(-1) ** 0.5, "schatten4": S.pow(4).sum(-1) ** 0.25}
    norm["spectral"] = S[..., 0] * (1 + 2 * SPECTRAL_TOL)
    X = A / norm[normalizer][..., None, None]
    for a, b, c in schedules.schedule(schedule).steps:
        R = X @ X.mT
        X = a * X + (b * R + c * R @ R) @ X
    return X


def gradient(function, A: Tensor, H: Tensor) -> Tensor:
    A = A.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    (found,) = torch.autograd.grad((function(A) * H).sum(), A)
    assert found.shape == A.shape and found.dtype == A.dtype
    return found


@pytest.mark.parametrize(("method", "normalizer"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_definition(shape, method, normalizer):
    A, H = torch.randn(shape, dtype=f64), torch.randn(shape, dtype=f64)
    for schedule in ("polar_express", "cubic"):

        def run(a, schedule=schedule):
            return sk.orthogonalize(a, schedule, method=method, normalizer=normalizer)

        want = gradient(lambda a, schedule=schedule: plain(a, schedule, method, normalizer), A, H)
        # the singular vectors of the estimated norm are not those of an SVD to the last bits
        limit = (1e-5 if normalizer == "spectral" else 1e-9) * float(want.abs().max()) + 1e-12
        for given in (A, A.mT.contiguous().mT):
            torch.testing.assert_close(gradient(run, given, H), want, rtol=0, atol=limit)


@pytest.mark.parametrize(("method", "normalizer"), FORMS)
def test_gradcheck_of_tensor_stack_and_list(method, normalizer):
    def run(*tensors):
        given = tensors[0] if len(tensors) == 1 else list(tensors)
        return sk.orthogonalize(given, "classic_quintic", method=method, normalizer=normalizer)

    tensors = [torch.randn(s, dtype=f64, requires_grad=True) for s in [(4, 4), (2, 8), (8, 2), (1, 64), (2, 3, 5)]]
    for given in (*((t,) for t in tensors), tensors):
        assert torch.autograd.gradcheck(run, given, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(("method", "normalizer"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_other_dtypes(dtype, method, normalizer):
    """That of float32 arithmetic, rounded to the dtype of the input; also where products ran in another one."""
    A, H = torch.randn(12, 9).to(dtype), torch.randn(12, 9).to(dtype)
    want = gradient(lambda a: plain(a, "polar_express", method, normalizer), A.double(), H.double())
    size = float(want.abs().max())
    for computed in (None, f32, bf16):
        found = gradient(
            lambda a, c=computed: sk.orthogonalize(a, method=method, normalizer=normalizer, compute_dtype=c), A, H
        )
        limit = 1e-11 if dtype == f64 else 2e-4  # five steps of a slope of 4 to 8 in float32
        torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps, atol=limit * size)


@pytest.mark.parametrize(("method", "normalizer"), FORMS)
@pytest.mark.parametrize(("dtype", "size"), [(f64, 2.0**-900), (f64, 2.0**900), (f32, 2.0**-100), (f32, 2.0**100)])
def test_gradient_does_not_know_the_scale(method, normalizer, dtype, size):
    """d f(tA) = 1/t: what is small has a large gradient."""
    A, H = torch.randn(6, 5, dtype=dtype), torch.randn(6, 5, dtype=dtype)

    def run(a):
        return sk.orthogonalize(a, method=method, normalizer=normalizer)

    here, there = gradient(run, A, H), gradient(run, A * size, H)
    torch.testing.assert_close(there * size, here, rtol=0, atol=1e-6 * float(here.abs().max()))


@pytest.mark.parametrize(("method", "normalizer"), FORMS)
def test_zero_and_non_finite_matrices_have_zero_gradients(method, normalizer):
    A, H = torch.randn(5, 6, 5, dtype=f64), torch.randn(5, 6, 5, dtype=f64)
    want = gradient(lambda a: plain(a, "polar_express", method, normalizer), A, H)
    A[1], A[2, 2, 3], A[3, 1, 1] = 0, torch.nan, torch.inf
    found = gradient(lambda a: sk.orthogonalize(a, method=method, normalizer=normalizer), A, H)
    torch.testing.assert_close(found[[0, 4]], want[[0, 4]], rtol=0, atol=1e-9 * float(want.abs().max()))
    assert not found[1:4].any()


def test_gradient_of_the_exact_factor_on_a_null_space():
    """Between the null space and itself zero, where the factor jumps; all else finite, whatever the SVD's rounding."""
    A = with_spectrum(torch.tensor([2.0, 1.0, 0, 0]).double(), 6, 4, torch.Generator().manual_seed(0)).A
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    H = torch.randn(6, 4, dtype=f64)
    found = gradient(lambda a: sk.orthogonalize(a, method="svd"), A, H)
    null = U[:, 2:].mT @ found @ Vh[2:].mT
    assert float(found.norm()) <= 4 * float(H.norm()) and float(null.norm()) <= 1e-12
    # along matrices of the same rank the factor is smooth
    D = U[:, :2] @ torch.randn(2, 2, dtype=f64) @ Vh[:2]
    ends = [sk.orthogonalize(A + t * D, method="svd") for t in (1e-6, -1e-6)]
    slope = float(((ends[0] - ends[1]) * H).sum()) / 2e-6
    assert float((found * D).sum()) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_backward_again_and_double_backward(method):
    A = torch.randn(6, 4, requires_grad=True)
    value = sk.orthogonalize(A, method=method).square().sum() + A.sum()
    first = torch.autograd.grad(value, A, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, A, retain_graph=True)[0])
    (found,) = torch.autograd.grad(value, A, create_graph=True)
    with pytest.raises(RuntimeError, match="orthogonalize.*double backward"):
        found.square().sum().backward()


def test_only_what_asks_gets_a_gradient_and_later_changes_are_refused():
    a, b, c = torch.randn(6, 4, requires_grad=True), torch.randn(4, 7), torch.randn(3, 3, requires_grad=True)
    found, info = sk.orthogonalize([a, b, c], return_info=True)
    assert not any(x.requires_grad for column in info for x in column)
    found[0].sum().backward()
    assert a.grad is not None and a.grad.any() and b.grad is None and (c.grad is None or not c.grad.any())
    with torch.no_grad():
        assert not sk.orthogonalize(a).requires_grad
    value = sk.orthogonalize(a)
    assert torch.equal(value, sk.orthogonalize(a.detach()))
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# ------------------------------------------------------------------------------------------------------ transformations


@pytest.mark.parametrize("method", METHODS)
def test_vmap(method):
    A = torch.randn(4, 12, 9, dtype=f64)

    def run(a):
        return sk.orthogonalize(a, method=method)

    want = run(A)
    torch.testing.assert_close(torch.func.vmap(run)(A), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.func.vmap(run, in_dims=2)(A.movedim(0, 2)), want, rtol=0, atol=1e-10)
    nested = torch.func.vmap(torch.func.vmap(run))(A.view(2, 2, 12, 9))
    torch.testing.assert_close(nested, want.view(2, 2, 12, 9), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.func.vmap(run)(A.view(2, 2, 12, 9)), nested, rtol=0, atol=1e-10)
    A.requires_grad_()
    H = torch.randn_like(A)
    (found,) = torch.autograd.grad((torch.func.vmap(run)(A) * H).sum(), A)
    expected = gradient(run, A, H)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    value = run(A)
    several = torch.func.vmap(lambda h: torch.autograd.grad(value, A, h, retain_graph=True)[0])(torch.stack([H, 2 * H]))
    torch.testing.assert_close(several, torch.stack([found, 2 * found]), rtol=1e-9, atol=1e-10)
    with pytest.raises(NotImplementedError, match="orthogonalize.*pass the list directly"):
        torch.func.vmap(lambda a, b: sk.orthogonalize([a, b]))(torch.randn(3, 4, 5), torch.randn(3, 5, 6))


def test_vmap_with_info():
    A = torch.randn(3, 12, 9)
    found, info = torch.func.vmap(lambda a: tuple(sk.orthogonalize(a, return_info=True)))(A)
    _, want = sk.orthogonalize(A, return_info=True)
    assert found.shape == A.shape and info.orthogonalized.all()
    torch.testing.assert_close(info.norm, want.norm)
    torch.testing.assert_close(info.defect, want.defect)


def test_functional_derivatives_are_refused_by_name():
    A = torch.randn(6, 5)
    for call in (
        lambda: torch.func.grad(lambda a: sk.orthogonalize(a).sum())(A),
        lambda: torch.func.jacrev(sk.orthogonalize)(A),
        lambda: torch.func.jvp(sk.orthogonalize, (A,), (A,)),
    ):
        with pytest.raises(RuntimeError, match="orthogonalize (does not go with|has no forward-mode)"):
            call()


@pytest.fixture
def traced():
    torch._dynamo.reset()
    yield lambda function, **more: torch.compile(function, fullgraph=True, backend="aot_eager", **more)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["auto", "svd"])
def test_compiled_without_a_graph_break(method, traced):
    A, H = torch.randn(2, 12, 9, dtype=f64), torch.randn(2, 12, 9, dtype=f64)

    def loss(a):
        return (sk.orthogonalize(a.tanh(), method=method) * H).sum()

    eager, compiled = A.clone().requires_grad_(), A.clone().requires_grad_()
    loss(eager).backward()
    traced(loss)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)
    if method == "svd":
        return
    several = traced(lambda a, b: sk.orthogonalize([a, b], method=method, return_info=True), dynamic=True)
    for shape in ((5, 6), (9, 4)):
        B = torch.randn(shape, dtype=f64)
        ours, theirs = several(A, B), sk.orthogonalize([A, B], method=method, return_info=True)
        for x, y in zip([*ours[0], *ours[1].norm], [*theirs[0], *theirs[1].norm], strict=True):
            torch.testing.assert_close(x, y)
            assert x.stride() == y.stride()


def test_bad_arguments_still_raise_when_compiled(traced):
    with pytest.raises(Exception, match="method must be one of"):
        traced(lambda a: sk.orthogonalize(a, method="qr"))(torch.randn(3, 4))
    with pytest.raises(Exception, match="is not safe"):
        traced(lambda a: sk.orthogonalize(a, "aol_4_old"))(torch.randn(3, 4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_the_ops_are_registered_as_torch_wants_them(method, dtype):
    pytest.importorskip("expecttest")
    A = [torch.randn(2, 12, 9).to(dtype), torch.randn(1, 7, 11).to(dtype).mT.contiguous().mT]
    coefficients = [number for step in EXPRESS.steps for number in step]
    with_grad = [a.clone(memory_format=torch.preserve_format).requires_grad_() for a in A]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    if dtype == f32:
        checks += ("test_aot_dispatch_dynamic",)
    for normalizer, computed in (("auto", None), ("spectral", f64)):
        torch.library.opcheck(
            orthogonalize_op, (with_grad, coefficients, method, normalizer, computed, 0), test_utils=checks
        )
        grads = [torch.randn_like(a) for a in A]
        torch.library.opcheck(
            orthogonalize_backward_op, (A, grads, coefficients, method, normalizer, 0), test_utils=checks
        )


def test_meta_tensors_get_shapes():
    A = [torch.empty(3, 5, 7, device="meta", dtype=bf16), torch.empty(9, 4, device="meta", dtype=bf16).mT]
    for method in METHODS:
        found = sk.orthogonalize(A, method=method)
        assert [(f.shape, f.dtype, f.device.type) for f in found] == [(a.shape, bf16, "meta") for a in A]
        assert all(f.is_contiguous() for f in found)


def test_autocast_changes_nothing():
    A = torch.randn(30, 26, requires_grad=True)
    for method in METHODS:
        with torch.autocast("cpu", dtype=bf16):
            found, info = sk.orthogonalize(A, method=method, return_info=True)
        plain_, of_plain = sk.orthogonalize(A, method=method, return_info=True)
        assert torch.equal(found, plain_) and torch.equal(info.defect, of_plain.defect)
        with torch.autocast("cpu", dtype=bf16):
            (inside,) = torch.autograd.grad(found.sum(), A)
        assert torch.equal(inside, torch.autograd.grad(plain_.sum(), A)[0])
