"""The words that multiply matrices at sizes that only a GPU can show: all tiles, long sums, no waiting, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.kernels import registry

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# relative: a rounding of the result, and what tensor cores cut off in sums of thousands
LIMIT = {f32: 3e-6, f16: 6e-4, bf16: 5e-3}
SHAPES = [(1, 2048, 2304), (1, 1100, 1501), (2, 300, 4096), (3, 64, 9000), (1, 2200, 2200)]


def stacks(dtype: torch.dtype, turned: bool) -> list[Tensor]:
    g = torch.Generator(device="cuda").manual_seed(0)
    made = [torch.randn(s, generator=g, device="cuda") / s[2] ** 0.5 for s in SHAPES]
    return [(x.mT.contiguous().mT if turned else x).to(dtype) for x in made]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_products_of_large_matrices(dtype, turned) -> None:
    words = registry.words("cuda", dtype, 1)
    assert words.choice("gram").backend == "triton"
    X = stacks(dtype, turned)
    wide = [x.double() for x in X]
    A = words.gram(X, None, dtype)
    assert error(A, [x @ x.mT for x in wide]) <= LIMIT[dtype] and all(torch.equal(a, a.mT) for a in A)
    exact = [a.double() for a in A]
    B = words.square_add(A, -2.0, 0.5)
    assert error(B, [0.5 * a @ a - 2 * a for a in exact]) <= LIMIT[dtype] and all(torch.equal(b, b.mT) for b in B)
    left = [b.double() for b in B]
    wanted = [b @ x + 3 * x for b, x in zip(left, wide, strict=True)]
    assert error(words.multiply_add(B, X, None, 3.0, False, dtype), wanted) <= LIMIT[dtype]
    both = words.multiply_add(B, A, None, 3.0, True, dtype)
    # B and A commute up to B's own rounding alone
    assert error(both, [b @ a + 3 * a for b, a in zip(left, exact, strict=True)]) <= 2 * LIMIT[dtype]
    assert all(torch.equal(b, b.mT) for b in both)
    assert all(torch.equal(a, b) for a, b in zip(words.gram(X, None, dtype), A, strict=True))
    assert torch.equal(words.gram(X[2:3], None, dtype)[0], A[2])


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_orthogonalize_neither_waits_nor_differs_in_a_graph(dtype) -> None:
    G = [torch.randn(s, device="cuda", dtype=dtype) for s in [(4, 48, 96), (1, 128, 128), (1, 700, 300), (2, 1, 9)]]

    def call() -> list[Tensor]:
        return sk.orthogonalize(G, steps=5)

    eager = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    for a in G:
        a.copy_(a.flip(1) * 2.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))
    assert not torch.equal(captured[0], eager[0])
