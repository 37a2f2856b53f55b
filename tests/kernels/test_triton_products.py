"""The Triton words that multiply matrices, against the reference: in the interpreter on CPU tensors, or on a GPU."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectral_kernels.kernels import composites_products, reference_products
from spectral_kernels.kernels.contracts import counts
from spectral_kernels.ops import schedules
from spectral_kernels.ops.published import PUBLISHED

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETER):
    # Triton is imported here and decides, once, whether its kernels are compiled or interpreted
    from spectral_kernels.kernels import triton as backend
    from spectral_kernels.kernels.triton import on_chip, products

f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# of a result's Frobenius norm, roundings of the words' own order included; the interpreter cuts bfloat16 off
LIMIT = {f32: 2e-6, f16: 1e-3, bf16: 8e-3 if DEVICE == "cuda" else 3e-2}
SLACK = 1 if DEVICE == "cpu" else 10  # float32 as three TF32 products, where errors of a Gram matrix are amplified
POLAR = [number for triple in schedules.schedule("polar_express", 5).steps for number in triple]


@pytest.fixture(autouse=True)
def _interpreted():
    with mock.patch.dict(os.environ, INTERPRETER):
        yield


def make(shape: tuple[int, int, int], layout: str = "rows", dtype: torch.dtype = f32) -> Tensor:
    k, m, n = shape
    if layout == "columns":
        a = torch.empty((k, n, m), dtype=dtype, device=DEVICE).mT
    elif layout == "sliced":
        a = torch.empty((k, 2 * m, 2 * n), dtype=dtype, device=DEVICE)[:, ::2, ::2]
    elif layout == "padded":
        a = torch.empty((k, m, n + 3), dtype=dtype, device=DEVICE)[..., :n]
    else:
        a = torch.empty((k, m, n), dtype=dtype, device=DEVICE)
    return a.copy_(torch.randn(shape) / n**0.5)


def symmetric(X: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Symmetric (k, m, m) with norms of about 1."""
    out = []
    for x in X:
        b = torch.randn(x.shape[0], x.shape[1], x.shape[1])
        out.append(((b + b.mT) / (2 * max(x.shape[1], 1) ** 0.5)).to(DEVICE, dtype))
    return out


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative difference; infinite for a wrong shape, dtype or stride."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        same = a.shape == b.shape and a.dtype == b.dtype
        if not same or (a.numel() > 1 and min(a.shape[1:]) > 1 and a.stride() != b.stride()):
            return float("inf")
        worst = max(worst, float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)))
    return worst


def is_symmetric(A: list[Tensor]) -> bool:
    return all(torch.equal(a, a.mT) for a in A)


SHAPES = [(1, 70, 90), (1, 66, 33), (1, 1, 7), (2, 16, 24), (1, 5, 0), (0, 4, 4), (1, 33, 1)]
CASES = [  # dtype of the products, of X and of P, layouts of X and P, with factors
    (f32, f32, f32, "rows", "rows", False),
    (f32, f16, f64, "columns", "rows", True),
    (f32, f64, f32, "sliced", "columns", True),
    (f16, f16, f16, "padded", "sliced", False),
    (f16, f32, bf16, "columns", "columns", True),
    (f16, f16, f32, "rows", "padded", True),
    (bf16, bf16, bf16, "columns", "rows", False),
    (bf16, f32, f32, "sliced", "sliced", True),
]
# large tiles are for aligned matrices
LARGE = [case for case in CASES if case[3] != "sliced" and case[0] != bf16]


@pytest.mark.parametrize(
    ("case", "large"), [(case, large) for large in (False, True) for case in (LARGE if large else CASES)], ids=str
)
def test_words_are_those_of_the_reference(case, large) -> None:
    dtype, dtype_x, dtype_p, layout, layout_p, with_factor = case
    shapes = [(1, 136, 152)] if large else SHAPES
    X = [make(s, layout if s[1] > 1 else "rows", dtype_x) for s in shapes]
    N = counts(X)
    factor = (
        torch.stack((2.0 ** torch.randint(-3, 3, (N,)), 0.5 + torch.rand(N)), 1).to(DEVICE) if with_factor else None
    )
    B = symmetric(X, dtype)
    with mock.patch.object(products, "FILLING", 1 if large else products.FILLING):
        grams = backend.gram(X, factor, dtype)
        assert error(grams, reference_products.gram(X, factor, dtype)) <= LIMIT[dtype] and is_symmetric(grams)
        squares = backend.square_add(B, -2.5, 0.75)
        assert error(squares, reference_products.square_add(B, -2.5, 0.75)) <= LIMIT[dtype] and is_symmetric(squares)
        exact = reference_products.square_add(B, -2.5, 0.75)
        both = backend.multiply_add(B, exact, None, 3.0, True, dtype)
        wanted = reference_products.multiply_add(B, exact, None, 3.0, True, dtype)
        assert error(both, wanted) <= LIMIT[dtype] and is_symmetric(both)
        for a in (0.0, 3.5):
            found = backend.multiply_add(B, X, factor, a, False, dtype)
            assert error(found, reference_products.multiply_add(B, X, factor, a, False, dtype)) <= LIMIT[dtype]
        P = [make(s, layout_p, dtype_p) for s in shapes]
        theirs = [p.clone() for p in P]
        before = [p.clone() for p in P]
        size, decay = torch.rand(N, dtype=f64).to(DEVICE), (0.5 * torch.rand(N, dtype=f64)).to(DEVICE)
        skip = torch.arange(N, device=DEVICE) % 2 == 1
        backend.multiply_update_(P, B, X, factor, size, decay, skip, dtype)
        reference_products.multiply_update_(theirs, B, X, factor, size, decay, skip, dtype)
    limit = LIMIT[dtype] + (LIMIT[dtype_p] if dtype_p != f64 else 0)
    assert error([p.contiguous() for p in P], [p.contiguous() for p in theirs]) <= limit
    own = iter(skip.tolist())
    assert all(torch.equal(p[i], old[i]) == (next(own) or p[i].numel() == 0)
               for p, old in zip(P, before, strict=True) for i in range(p.shape[0]))  # fmt: skip


def test_products_are_exact_where_float32_is() -> None:
    """Small integers leave no room for rounding: every tile, every mirror image, every factor."""
    X = [torch.randint(-4, 5, s).to(DEVICE, f32) for s in [(2, 67, 70), (1, 80, 40)]]
    factor = torch.tensor([[2.0, 1.0], [0.5, 2.0], [1.0, 4.0]], device=DEVICE)
    scaled = [x.double() * f.prod(1)[:, None, None].double() for x, f in zip(X, factor.split([2, 1]), strict=True)]
    assert all(torch.equal(g.double(), x @ x.mT) for g, x in zip(backend.gram(X, factor, f32), scaled, strict=True))
    B = [(b + b.mT) for b in (torch.randint(-4, 5, (k, m, m)).to(DEVICE, f32) for k, m, _ in [(2, 67, 1), (1, 80, 1)])]
    found = backend.multiply_add(B, X, factor, -3.0, False, f32)
    assert all(torch.equal(y.double(), b.double() @ x - 3 * x) for y, b, x in zip(found, B, scaled, strict=True))
    wanted = [2 * b.double() - 0.5 * b.double() @ b.double() for b in B]
    assert all(torch.equal(y.double(), w) for y, w in zip(backend.square_add(B, 2.0, -0.5), wanted, strict=True))


def test_no_product_with_c_zero_and_symmetric_input_of_any_layout() -> None:
    A = torch.full((1, 20, 20), 1e30, device=DEVICE)  # its square is beyond float32
    assert torch.equal(backend.square_add([A], 0.5, 0.0)[0], A / 2)
    B = symmetric([make((2, 40, 40))], f32)
    turned = [torch.cat((B[0], B[0]), 1)[:, :40].mT]
    assert torch.equal(backend.square_add(turned, 1.0, 2.0)[0], backend.square_add(B, 1.0, 2.0)[0])


def test_zero_rows_stay_zero_and_neighbours_do_not_matter() -> None:
    X = [make((2, 40, 50), dtype=f16), make((1, 20, 48), "columns", f16), make((1, 9, 30), dtype=f16)]
    X[0][1, 7:] = 0
    factor = torch.rand(4, 2).to(DEVICE) + 0.5
    B = backend.gram(X, factor, f16)
    Y = backend.multiply_add(B, X, factor, 2.0, False, f16)
    assert not B[0][1, 7:].any() and not B[0][1, :, 7:].any() and not Y[0][1, 7:].any() and B[0][1, :7, :7].all()
    alone = backend.gram(X[1:2], factor[2:3], f16)
    assert torch.equal(alone[0], B[1])
    assert torch.equal(backend.multiply_add(alone, X[1:2], factor[2:3], 2.0, False, f16)[0], Y[1])
    assert all(torch.equal(a, b) for a, b in zip(backend.gram(X, factor, f16), B, strict=True))
    X[0][0] = float("nan")
    again = backend.gram(X, factor, f16)
    assert again[0][0].isnan().all() and torch.equal(again[0][1], B[0][1]) and torch.equal(again[2], B[2])


@pytest.mark.parametrize(("rows", "columns", "symmetric"), [(300, 300, True), (64, 65, False), (1100, 200, False)])
def test_every_tile_once(rows, columns, symmetric) -> None:
    tiles = products.tiles_of(rows, columns, 64, symmetric)
    pairs = [(t >> 15, t & 0x7FFF) for t in tiles]
    down, across = -(-rows // 64), -(-columns // 64)
    assert sorted(pairs) == [(i, j) for i in range(down) for j in range(across) if not symmetric or j >= i]
    with pytest.raises(NotImplementedError, match="sides"):
        products.tiles_of(1 << 22, 1, 64, False)


def normalized(X: list[Tensor], margin: float = 1.01) -> Tensor:
    """(N, 2) float64 factors that bring norms to 1 / margin."""
    norms = torch.cat([torch.linalg.matrix_norm(x.double()) for x in X]).clamp(min=1e-30)
    return torch.stack((torch.full_like(norms, 2.0), 0.5 / (margin * norms)), 1)


def exactly(
    X: list[Tensor], factor: Tensor, schatten4: bool, gram: bool = False, restarts=(), dtype=f64, P=(), rest=()
):
    """The composite over the reference's words."""
    size, decay, skip = rest or (None, None, None)
    return composites_products.newton_schulz(
        reference_products, X, factor, schatten4, POLAR, gram, restarts, dtype, P, size, decay, skip
    )


def test_on_chip_is_no_worse_than_the_composite() -> None:
    """Against float64, beside the composite's own error: both methods in halves, "gram" in float32.

    There R and Q are symmetric up to rounding, and exactly so in the composite: a few times closer where Q is large.
    """
    shapes = [(2, 20, 50), (1, 48, 48), (1, 7, 90), (1, 70, 75)]
    cases = [(f32, f32, "rows", True), (f16, f16, "columns", False), (f16, f32, "sliced", True)]
    for dtype, dtype_x, layout, gram in cases:
        X = [make(s, layout, dtype_x) for s in shapes]
        factor, restarts = normalized(X), [2] if gram else []
        for schatten4 in (False, True):
            with mock.patch.object(composites_products, "newton_schulz", side_effect=AssertionError("not on chip")):
                found, used = backend.newton_schulz(
                    X, factor, schatten4, POLAR, gram, restarts, dtype, [], None, None, None
                )
            exact, wanted = exactly([x.double() for x in X], factor, schatten4)
            torch.testing.assert_close(used, wanted, rtol=1e-3 if dtype == f16 else 1e-6, atol=0)
            theirs = exactly(X, factor, schatten4, gram, restarts, dtype)[0]
            assert all(y.stride() == t.stride() and y.dtype == dtype for y, t in zip(found, theirs, strict=True))
            errors = [
                [float((y - z).norm() / z.norm()) for y, z in zip(ours, exact, strict=True)] for ours in (found, theirs)
            ]
            assert all(
                ours <= (8 * SLACK if dtype == f32 else 2) * other for ours, other in zip(*errors, strict=True)
            ), errors


def test_restarts_of_float32_and_what_is_left_to_the_words() -> None:
    X = [make((1, 30, 60))]
    results = []
    for restarts in ([], [2], [1, 2, 3, 4]):
        Y, _ = backend.newton_schulz(X, normalized(X), False, POLAR, True, restarts, f32, [], None, None, None)
        assert error(Y, exactly(X, normalized(X), False, True, restarts, f32)[0]) <= 2e-5 * SLACK
        results.append(Y[0])
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    with mock.patch.object(on_chip, "_run", side_effect=AssertionError("on chip")):
        Y, _ = backend.newton_schulz(X, normalized(X), False, POLAR, False, [], f32, [], None, None, None)
    assert error(Y, exactly(X, normalized(X), False, dtype=f32)[0]) <= 1e-5 * SLACK


@pytest.mark.parametrize(
    ("dtype", "dtype_p", "layout"), [(f32, f32, "rows"), (f16, f64, "columns"), (f16, f16, "sliced")]
)
def test_results_into_parameters_on_chip_and_beyond(dtype, dtype_p, layout) -> None:
    """Matrices of more rows than a program holds go over the words, between others that do not."""
    shapes = [(1, 21, 40), (2, 12, 40), (1, 0, 3), (1, 16, 32), (1, 17, 17)]
    X = [make(s, "rows", dtype) for s in shapes]
    gram = dtype == f32  # what is served on chip
    P, N = [make(s, layout, dtype_p) for s in shapes], counts(X)
    theirs, before = [p.clone() for p in P], [p.clone() for p in P]
    size, decay = torch.rand(N, dtype=f64).to(DEVICE), (0.5 * torch.rand(N, dtype=f64)).to(DEVICE)
    skip = torch.tensor([False, False, True, False, False, True], device=DEVICE)
    rest = (size, decay, skip)
    with mock.patch.object(on_chip, "ORDERS", (16,)):
        out, used = backend.newton_schulz(X, normalized(X), True, POLAR, gram, [], dtype, P, *rest)
        found, _ = backend.newton_schulz(X, normalized(X), True, POLAR, gram, [], dtype, [], None, None, None)
    _, wanted = exactly(X, normalized(X), True, gram, dtype=dtype, P=theirs, rest=rest)
    assert out == [] and used.shape == (N, 2)
    torch.testing.assert_close(used, wanted, rtol=1e-3, atol=0)
    limit = 1e-4 * SLACK if dtype == dtype_p == f32 else 2e-2
    assert error([p.contiguous() for p in P], [p.contiguous() for p in theirs]) <= limit
    assert (
        torch.equal(P[1][1], before[1][1]) and torch.equal(P[4], before[4]) and not torch.equal(P[1][0], before[1][0])
    )
    assert [tuple(y.shape) for y in found] == shapes
    assert error(found, exactly(X, normalized(X), True, gram, dtype=dtype)[0]) <= (
        1e-4 * SLACK if dtype == f32 else 2e-2
    )


def test_zero_and_non_finite_matrices_on_chip() -> None:
    X = [make((4, 10, 24)), make((1, 16, 16)).mT]
    X[0][1], X[0][2, 0, 0] = 0, float("inf")
    X[0][3, 4:] = 0
    factor = normalized(X)
    factor[2] = 1
    kept = factor.clone()
    found, used = backend.newton_schulz(X, factor, True, POLAR, True, [], f32, [], None, None, None)
    assert torch.equal(factor, kept) and torch.equal(used[1], factor[1]) and used[:, 0].tolist() == kept[:, 0].tolist()
    assert not found[0][1].any() and not found[0][3, 4:].any() and found[0][3, :4].all() and found[1].isfinite().all()
    alone, _ = backend.newton_schulz(X[1:], factor[4:], True, POLAR, True, [], f32, [], None, None, None)
    assert torch.equal(alone[0], found[1])
    again, _ = backend.newton_schulz(X, factor, True, POLAR, True, [], f32, [], None, None, None)
    assert torch.equal(again[0][[0, 1, 3]], found[0][[0, 1, 3]])


def test_own_restarts_are_safe() -> None:
    """The validator's worst case for float32 is that of the kernel's sums, whatever the dtype."""
    checked = 0
    for name in PUBLISHED:
        one = schedules.schedule(name)
        if schedules.validate(one, dtype=f32, method="standard").safe:
            points = on_chip.restarts_of([number for triple in one.steps for number in triple])
            assert schedules.validate(one, dtype=f32, method="gram", restarts=points).reasons == (), name
            checked += 1
    assert checked >= 10


def test_lists_that_move_send_nothing() -> None:
    """Results come out of one allocation: their places in it are those of the call before."""
    X = [make((2, 40, 24)), make((1, 16, 32))]
    factor = normalized(X)

    def run() -> None:
        backend.newton_schulz(X, factor, False, POLAR, True, [], f32, [], None, None, None)
        B = backend.gram(X, factor.float(), f32)
        backend.multiply_add(backend.square_add(B, 1.0, 2.0), X, None, 2.0, False, f32)

    run()
    kept = [make((1, 8, 8))]  # what is allocated now lies elsewhere
    failing = mock.Mock(side_effect=AssertionError("described again"))
    with mock.patch.object(products, "_describe", failing), mock.patch.object(on_chip, "_describe", failing):
        with mock.patch.object(on_chip, "_steps", failing):
            run()
            with pytest.raises(AssertionError, match="described again"):
                backend.gram(kept, None, f32)


def test_declined_in_words() -> None:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        for word in ("gram", "square_add", "multiply_add", "multiply_update_", "newton_schulz"):
            assert backend.supports(word, "cuda", bf16, 1) is None
            assert "float64" in (backend.supports(word, "cuda", f64, 1) or "")
    assert backend.gram([], None, f32) == backend.square_add([], 1.0, 1.0) == []
    assert backend.newton_schulz([], torch.ones(0, 2), False, POLAR, False, [], f32, [], None, None, None)[0] == []
