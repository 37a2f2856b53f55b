"""torch.compile: the public functions trace without a graph break and give the numbers of eager mode."""

from __future__ import annotations

import pytest
import torch

import spectral_kernels as sk
from tests.kernels.lists import kernel

METHODS = ["krylov", "power", "gram", "svd"]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("method", METHODS)
def test_values(method):
    A = torch.randn(60, 40)
    norm = traced(lambda a: 2 * sk.spectral_norm(a, method=method))
    torch.testing.assert_close(norm(A), 2 * sk.spectral_norm(A, method=method), rtol=1e-3, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(norm(2 * A), 4 * sk.spectral_norm(A, method=method), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    A = torch.randn(30, 50, dtype=torch.float64)

    def loss(a):
        return (sk.spectral_norm(a.tanh(), 1e-8, method=method) - 1).square()

    eager, compiled = A.clone().requires_grad_(), A.clone().requires_grad_()
    loss(eager).backward()
    traced(loss)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-4, atol=1e-4)
    assert compiled.grad.norm() > 0.1


def test_stacks_lists_dim_and_keepdim():
    A, B = torch.randn(3, 20, 30), torch.randn(150, 200)

    def several(a, b):
        return (
            sk.spectral_norm(a),
            sk.spectral_norm([b, b.mT]),
            *sk.spectral_norm([a, b]),
            sk.spectral_norm(a, dim=(0, 2), keepdim=True),
            sk.spectral_norm(b, steps=6),
        )

    compiled = traced(several)(A, B)
    for ours, eager in zip(compiled, several(A, B), strict=True):
        assert ours.shape == eager.shape and ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    A = torch.randn(40, 30).to(dtype)
    value = traced(sk.spectral_norm)(A)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value, sk.spectral_norm(A), rtol=1e-3, atol=0)


def test_dynamic_shapes():
    norm = traced(sk.spectral_norm, dynamic=True)
    for shape in ((20, 30), (35, 25), (150, 200), (200, 130)):
        A = torch.randn(shape)
        torch.testing.assert_close(norm(A), sk.spectral_norm(A), rtol=1e-3, atol=0)


def test_non_finite_and_zero_matrices():
    A = torch.randn(4, 20, 30)
    A[1], A[2, 3, 4], A[3, 5, 6] = 0, torch.nan, torch.inf
    value = traced(sk.spectral_norm)(A)
    assert value[0] > 1 and value[1] == 0 and value[2].isnan() and value[3] == torch.inf


def test_a_parameter_of_a_module():
    layer = torch.nn.Linear(30, 20)

    def penalty(x):
        return layer(x).square().mean() + 0.1 * sk.spectral_norm(layer.weight, 1e-5)

    x = torch.randn(5, 30)
    penalty(x).backward()
    eager = layer.weight.grad.clone()
    layer.weight.grad = None
    traced(penalty)(x).backward()
    torch.testing.assert_close(layer.weight.grad, eager, rtol=1e-3, atol=1e-3)


def test_singular_triplet():
    A = torch.randn(2, 40, 25)
    u, s, v = traced(lambda a: tuple(sk.singular_triplet(a)))(A)
    torch.testing.assert_close(s, torch.linalg.matrix_norm(A, 2), rtol=1e-3, atol=0)
    torch.testing.assert_close((u[:, None] @ A @ v[..., None]).flatten(), s, rtol=2e-3, atol=0)


def test_stable_rank():
    A = torch.randn(2, 40, 25)
    torch.testing.assert_close(traced(lambda a: sk.stable_rank(a))(A), sk.stable_rank(A), rtol=4e-3, atol=0)


@pytest.mark.parametrize("mode", ["normalize", "cap"])
def test_in_place(mode):
    W = 3 * torch.randn(2, 40, 25)
    eager = sk.spectral_norm_(W.clone(), 0.5, mode=mode)
    compiled = W.clone()
    traced(lambda w: sk.spectral_norm_(w, 0.5, mode=mode))(compiled)
    torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=1e-6)


def test_autocast_inside():
    A = torch.randn(150, 130)

    def norm(a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sk.spectral_norm(a)

    torch.testing.assert_close(traced(norm)(A), sk.spectral_norm(A), rtol=1e-3, atol=0)


def test_bad_arguments_still_raise():
    with pytest.raises(Exception, match="tol must lie in"):
        traced(lambda a: sk.spectral_norm(a, 2.0))(torch.randn(3, 4))
    with pytest.raises(Exception, match="at least 2 dimensions"):
        traced(sk.spectral_norm)(torch.randn(3))


def test_the_graph_holds_one_opaque_op():
    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    A = torch.randn(40, 30)
    value = torch.compile(sk.spectral_norm, fullgraph=True, backend=backend)(A)
    assert sum("spectral_kernels" in t for t in targets) == 1 and len(targets) < 12
    torch.testing.assert_close(value, sk.spectral_norm(A), rtol=1e-3, atol=0)
