"""The contract of the words that multiply matrices: against float64, with the rounding of the dtype of the products."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import spectral_kernels as sk
from spectral_kernels.kernels import registry
from spectral_kernels.kernels.contracts import acc_dtype, counts
from spectral_kernels.ops import arithmetic, schedules
from tests.kernels.lists import DTYPES, LAYOUTS, served
from tests.kernels.steps import copies, matrices, pairwise, same_bits, spacing, untouched_outside

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HALVED = 768  # from this side on symmetric products are halved on CPUs
LISTS = {  # (k, m, n) with m <= n
    "empty": [(0, 4, 5), (2, 0, 5), (2, 0, 0), (2, 3, 0), (1, 2, 3)],
    "vectors": [(1, 1, 1), (3, 1, 70), (1, 1, 3)],
    "odd": [(1, 33, 65), (2, 17, 17), (1, 15, 255), (1, 129, 130)],
    "same shape": [(1, 20, 30), (1, 7, 8), (2, 20, 30), (1, 20, 30)],
    "three hundred": [(1, 300, 317)],
    "halved": [(1, 771, 775), (1, 5, 6)],
}
FACTORS = [None, "ones", "pair"]
CASES = pairwise(list(LISTS), list(LAYOUTS), DTYPES, DTYPES, FACTORS)
MULTIPLIED = pairwise(list(LISTS), list(LAYOUTS), DTYPES, DTYPES, FACTORS, [3.4445, 0.0])
UPDATES = pairwise(list(LISTS), list(LAYOUTS), DTYPES, DTYPES, FACTORS, list(LAYOUTS), DTYPES, [False, True])
STEPS = ((3.4445, -4.775, 2.0315), (2.9, -3.1, 1.2), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375))
COEFFICIENTS = [number for step in STEPS for number in step]
BOTH = [False, True]


def named(case) -> str:
    return "-".join(str(x).removeprefix("torch.") for x in case)


def word(name: str, backend: str, device: str, dtype: torch.dtype):
    """The kernel that `backend` serves; one that declines skips the test, with its own reason."""
    try:
        with sk.force(backend):
            return getattr(registry.words(device, dtype, 1), name)
    except sk.BackendUnavailable as error:
        pytest.skip(str(error))


def drawn(name: str, layout: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Normal entries of variance 1 / n."""
    g = torch.Generator().manual_seed(seed)
    draws = [torch.randn(s, generator=g, dtype=f64) / max(1, s[2]) ** 0.5 for s in LISTS[name]]
    return [LAYOUTS[layout](x.to(dtype)).to(device) for x in draws]


def symmetric(X: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """XX' of every matrix, exactly symmetric, of dtype."""
    grams = [x.double() @ x.double().mT for x in X]
    return [((g + g.mT) / 2).to(dtype) for g in grams]


def factors(kind: str | None, X: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    N, device, acc = counts(X), X[0].device, acc_dtype(dtype)
    if kind is None:
        return None
    if kind == "ones":
        return torch.ones(N, 2, dtype=acc, device=device)
    g = torch.Generator().manual_seed(3)
    powers = 2.0 ** torch.randint(-3, 4, (N,), generator=g)
    return torch.stack((powers, 0.5 + torch.rand(N, generator=g)), 1).to(device, acc)


def scaled(X: list[Tensor], factor: Tensor | None) -> list[Tensor]:
    """fX in float64, with nothing rounded to the dtype of the products."""
    if factor is None:
        return [x.double() for x in X]
    both = factor.double().prod(1).split([x.shape[0] for x in X])
    return [x.double() * f[:, None, None] for x, f in zip(X, both, strict=True)]


def rounding(dtype: torch.dtype, inner: int, exact: Tensor, absolute: Tensor) -> Tensor:
    """Bound of a product of operands rounded to dtype, summed in acc, rounded once; absolute: the same of |.|."""
    eps, acc = torch.finfo(dtype).eps, torch.finfo(acc_dtype(dtype)).eps
    return (1.01 * eps + (inner + 8) * acc) * absolute + 0.51 * eps * exact.abs() + torch.finfo(dtype).tiny


def within(found: Tensor, exact: Tensor, bound: Tensor) -> bool:
    return found.shape == exact.shape and bool(((found.double() - exact).abs() <= bound).all())


def is_symmetric(found: Tensor, backend: str, dtype: torch.dtype) -> bool:
    """To the last bit wherever half is computed."""
    if backend == "cpu" and found.shape[-1] < HALVED:
        limit = 8 * found.shape[-1] * torch.finfo(dtype).eps * float(found.abs().max()) if found.numel() else 0.0
        return bool(((found - found.mT).abs() <= limit).all())
    return same_bits(found, found.mT)


def unchanged(now: list[Tensor], before: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(now, before, strict=True))


# ------------------------------------------------------------------------------------------------------ single words


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", CASES, ids=named)
def test_gram(backend, device, case):
    name, layout, given, dtype, kind = case
    fn = word("gram", backend, device, dtype)
    X = drawn(name, layout, given, device)
    factor, before = factors(kind, X, dtype), copies(X)
    found = fn(X, factor, dtype)
    assert unchanged(X, before)
    for r, x in zip(found, scaled(X, factor), strict=True):
        exact, absolute = x @ x.mT, x.abs() @ x.abs().mT
        assert r.dtype == dtype and r.is_contiguous() and is_symmetric(r, backend, dtype)
        assert within(r, exact, rounding(dtype, x.shape[2], exact, absolute))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(("b", "c"), [(-4.775, 2.0315), (-0.5, 0.0), (0.0, 1.0)])
def test_square_add(backend, device, dtype, name, b, c):
    fn = word("square_add", backend, device, dtype)
    A = symmetric(drawn(name, "contiguous", f64, device), dtype)
    before = copies(A)
    found = fn(A, b, c)
    assert unchanged(A, before)
    for z, a in zip(found, A, strict=True):
        wide, absolute = a.double(), a.double().abs()
        exact, absolute = b * wide + c * wide @ wide, abs(b) * absolute + abs(c) * absolute @ absolute
        assert z.dtype == dtype and z.is_contiguous() and is_symmetric(z, backend, dtype)
        assert within(z, exact, rounding(dtype, a.shape[1], exact, absolute))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", MULTIPLIED, ids=named)
def test_multiply_add(backend, device, case):
    name, layout, given, dtype, kind, a = case
    fn = word("multiply_add", backend, device, dtype)
    X = drawn(name, layout, given, device)
    B, factor = symmetric(drawn(name, layout, f64, device, seed=1), dtype), factors(kind, X, dtype)
    before = copies([*X, *B])
    found = fn(B, X, factor, a, False, dtype)
    assert unchanged([*X, *B], before)
    for y, x, b, source in zip(found, scaled(X, factor), B, X, strict=True):
        exact, absolute = a * x + b.double() @ x, a * x.abs() + b.double().abs() @ x.abs()
        assert y.dtype == dtype and (y.is_contiguous() or y.mT.is_contiguous())
        if 1 not in y.shape[1:]:
            assert y.mT.is_contiguous() == (source.stride(1) < source.stride(2)) or not y.numel()
        assert within(y, exact, rounding(dtype, x.shape[1], exact, absolute))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("a", [3.4445, 0.0])
def test_multiply_add_of_matrices_that_commute(backend, device, dtype, name, a):
    fn = word("multiply_add", backend, device, dtype)
    R = symmetric(drawn(name, "contiguous", f64, device), dtype)
    B = [(b + b.mT).div(2).to(dtype) for b in (0.3 * r.double() - r.double() @ r.double() for r in R)]
    for y, r, b in zip(fn(B, R, None, a, True, dtype), R, B, strict=True):
        r, b = r.double(), b.double()
        exact, absolute = a * r + b @ r, a * r.abs() + b.abs() @ r.abs()
        # B rounded to dtype commutes with R up to that rounding
        limit = rounding(dtype, r.shape[1], exact, absolute) + torch.finfo(dtype).eps * absolute
        assert y.dtype == dtype and y.is_contiguous() and is_symmetric(y, backend, dtype)
        assert within(y, exact, limit)


def amounts(N: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """size, decay and skip, one matrix in four."""
    g = torch.Generator().manual_seed(6)
    size, decay = torch.rand(N, generator=g, dtype=f64) * 3, torch.rand(N, generator=g, dtype=f64) * 0.1
    return size.to(device), decay.to(device), (torch.arange(N) % 4 == 3).to(device)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", UPDATES, ids=named)
def test_multiply_update(backend, device, case):
    name, layout, given, dtype, kind, layout_p, dtype_p, skips = case
    fn = word("multiply_update_", backend, device, dtype)
    X, before = drawn(name, layout, given, device), drawn(name, layout_p, dtype_p, device, seed=2)
    B, factor = symmetric(drawn(name, layout, f64, device, seed=1), dtype), factors(kind, X, dtype)
    size, decay, skip = amounts(counts(X), device)
    P, inputs = copies(before), [*X, *B, size, decay]
    sources = copies(inputs)
    assert fn(P, B, X, factor, size, decay, skip if skips else None, dtype) is None
    assert unchanged(inputs, sources)
    assert all(untouched_outside(p, p0) for p, p0 in zip(P, before, strict=True))
    eps = torch.finfo(acc_dtype(dtype_p)).eps
    rows = zip(matrices(P), matrices(before), matrices(B), matrices(scaled(X, factor)), strict=True)
    for (j, p), (_, p0), (_, b), (_, x) in rows:
        if skips and skip[j]:
            assert same_bits(p, p0)
            continue
        kept, pull = (1 - decay[j]) * p0.double(), size[j] * (b.double() @ x)
        exact, absolute = kept - pull, size[j] * (b.double().abs() @ x.abs())
        limit = spacing(exact, dtype_p) / 2 + 3 * eps * (kept.abs() + absolute)
        assert within(p, exact, limit + rounding(dtype, x.shape[0], 0 * exact, absolute))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [20, 300])
def test_skipped_matrices_stay_to_the_last_bit(backend, device, dtype, size):
    update, whole = (word(name, backend, device, dtype) for name in ("multiply_update_", "newton_schulz"))
    X = [torch.randn(3, size, size + 1, dtype=f64).to(device, dtype) / size]
    X[0][1] = torch.nan
    B, ones = symmetric(drawn_like(X), dtype), torch.full((3, 2), 0.5, dtype=acc_dtype(dtype), device=device)
    size_, decay, _ = amounts(3, device)
    size_[1] = torch.nan
    skip = torch.tensor([False, True, False], device=device)
    before = torch.randn(3, size, size + 1, device=device)
    before[1, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])
    P, Q = [before.clone()], [before.clone()]
    update(P, B, X, ones, size_, decay, skip, dtype)
    whole(X, ones, False, COEFFICIENTS, False, [], dtype, Q, size_, decay, skip)
    for found in (P[0], Q[0]):
        assert same_bits(found[1], before[1])
        assert found[[0, 2]].isfinite().all() and not (found[[0, 2]] == before[[0, 2]]).any(2).all()


def drawn_like(X: list[Tensor]) -> list[Tensor]:
    return [torch.randn(x.shape, dtype=f64, device=x.device) / x.shape[2] ** 0.5 for x in X]


# ------------------------------------------------------------------------------------------------------ newton_schulz


def exact_of(x: Tensor, dtype: torch.dtype, gram: bool, restarts: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The recursion on a matrix in float64, and the error of numpy's, rounded to dtype after every product."""
    wide = x.double().cpu().numpy()
    exact = arithmetic.standard(wide, STEPS, f64)
    if dtype == f64:  # the two orders of the same products
        return exact, 1e-15 + float(np.linalg.norm(arithmetic.gram(wide, STEPS, f64, restarts) - exact))
    rounded = arithmetic.gram(wide, STEPS, dtype, restarts) if gram else arithmetic.standard(wide, STEPS, dtype)
    return exact, float(np.linalg.norm(rounded.astype(np.float64) - exact))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize(
    "case", pairwise(list(LISTS), list(LAYOUTS), DTYPES, DTYPES, BOTH, [None, (), (2,), (1, 2, 3)], BOTH), ids=named
)
def test_newton_schulz(backend, device, case):
    """Results and updates within three times the error of numpy's recursion in the same arithmetic."""
    name, layout, given, dtype, schatten4, restarts, updates = case
    fn = word("newton_schulz", backend, device, dtype)
    X = drawn(name, layout, given, device)
    norms = torch.cat([torch.linalg.matrix_norm(x.double()) for x in X])
    factor = torch.stack((torch.full_like(norms, 0.5), 1.5 / torch.where(norms > 0, norms, 1)), 1)
    factor = factor.to(acc_dtype(dtype))
    before, P0 = copies(X), drawn(name, layout, f32, device, seed=2)
    P, (size, decay, _) = copies(P0) if updates else [], amounts(counts(X), device)
    numbers = (size, decay, None) if updates else (None, None, None)
    found, used = fn(X, factor, schatten4, COEFFICIENTS, restarts is not None, list(restarts or ()), dtype, P, *numbers)
    assert unchanged(X, before) and used.shape == (counts(X), 2) and used.dtype == f64
    assert [f.shape for f in found] == ([] if updates else [x.shape for x in X])
    assert all(f.dtype == dtype for f in found)
    results = matrices(P if updates else found)
    for (j, y), (_, p0), (_, x) in zip(results, matrices(P0), matrices([x.double() for x in X]), strict=True):
        if not x.numel():
            continue
        f = factor[j].double()
        fx = f[0] * f[1] * x
        if schatten4:
            norm = torch.linalg.matrix_norm(fx @ fx.mT).sqrt()
            # rounded operands, and the sum of squares of a Gram matrix in dtype
            torch.testing.assert_close(used[j].prod(), f.prod() / norm, rtol=8 * torch.finfo(dtype).eps, atol=0)
            fx = used[j].prod() * x
        else:
            assert torch.equal(used[j], f)
        exact, error = exact_of(fx, dtype, restarts is not None, restarts or ())
        limit = 3 * error + 4 * torch.finfo(dtype).eps * float(np.linalg.norm(exact))
        result = y.double().cpu().numpy()
        if updates:  # of which float32 is the rounding of the parameter
            kept = (1 - decay[j]) * p0.double()
            exact, limit = (kept.cpu().numpy() - float(size[j]) * exact), float(size[j]) * limit
            limit += 4 * torch.finfo(f32).eps * (float(kept.norm()) + np.linalg.norm(exact))
        assert np.linalg.norm(result - exact) <= limit


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("gram", BOTH)
def test_zeros_stay_zero(backend, device, dtype, gram):
    """Zero matrices, rows and columns: padding is exact."""
    fn = word("newton_schulz", backend, device, dtype)
    for size in (20, 260):
        X = torch.randn(3, size, size + 8, device=device)
        X[1], X[2, 5], X[2, :, 7] = 0, 0, 0
        factor = torch.stack((torch.ones(3), torch.tensor([1 / size, 1, 1 / size])), 1).to(device)
        for schatten4 in BOTH:
            (y,), used = fn([X], factor, schatten4, COEFFICIENTS, gram, [], dtype, [], None, None, None)
            assert not y[1].any() and not y[2, 5].any() and not y[2, :, 7].any() and y[[0, 2]].any((1, 2)).all()
            assert torch.equal(used[1], factor[1].double())


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("size", [20, 300])
def test_restarts_bring_back_what_rounding_takes(backend, device, size):
    """The Gram matrix of a matrix of rank 4 has eigenvalues below zero by rounding, which grow until they diverge."""
    fn = word("newton_schulz", backend, device, f32)
    keller = [3.4445, -4.775, 2.0315] * 14
    X = torch.randn(1, size, 4, device=device) @ torch.randn(1, 4, size + 9, device=device)
    factor = torch.stack((torch.ones(1), 1 / torch.linalg.matrix_norm(X).cpu()), 1).to(device)
    largest = []
    for restarts in ([], [3, 6, 9, 12], list(range(1, 14))):
        (y,), _ = fn([X], factor, False, keller, True, restarts, f32, [], None, None, None)
        largest.append(float(torch.linalg.matrix_norm(y.double().nan_to_num(1e9), 2)))
    assert largest[0] > 10 and max(largest[1:]) < 1.3  # Keller's steps end below 1.21


@pytest.mark.parametrize(("backend", "device"), served())
def test_the_schatten_norm_does_not_overflow(backend, device):
    """Gram matrices of 2^66, whose squares leave the range of float32."""
    fn = word("newton_schulz", backend, device, f32)
    X, ones = torch.randn(2, 9, 30, device=device), torch.ones(2, 2, device=device)
    for gram in BOTH:
        options = (True, COEFFICIENTS, gram, [], f32, [], None, None, None)
        (small,), of_small = fn([X], ones, *options)
        (large,), of_large = fn([X * 2.0**30], ones, *options)
        assert same_bits(small, large) and torch.equal(of_small[:, 1], of_large[:, 1] * 2.0**30)


# ----------------------------------------------------------------------------------------- promises of all the words


def calls(backend: str, device: str, dtype: torch.dtype, X: list[Tensor]):
    """name -> what every word gives for a list."""
    R, factor = symmetric(drawn_like(X), dtype), factors("pair", X, dtype)
    size, decay, _ = amounts(counts(X), device)
    fns = {name: word(name, backend, device, dtype) for name in registry.WORDS[-5:]}

    def updated(run) -> list[Tensor]:
        P = [torch.ones_like(x, dtype=f32) for x in X]
        run(P)
        return P

    def schulz(schatten4, gram, P=()):
        return fns["newton_schulz"](
            X, factor, schatten4, COEFFICIENTS, gram, [2] if gram else [], dtype, list(P), size, decay, None
        )[0]

    return {
        "gram": lambda: fns["gram"](X, factor, dtype),
        "square_add": lambda: fns["square_add"](R, 0.5, -1.5),
        "multiply_add": lambda: fns["multiply_add"](R, X, factor, 2.0, False, dtype),
        "multiply_update_": lambda: updated(
            lambda P: fns["multiply_update_"](P, R, X, factor, size, decay, None, dtype)
        ),
        "newton_schulz": lambda: schulz(True, False) + schulz(False, True),
        "newton_schulz of P": lambda: updated(lambda P: schulz(True, True, P)),
    }


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize(("dtype", "threads"), [(f32, 1), (f32, 2), (bf16, 1)])
def test_the_same_bits_run_to_run(backend, device, dtype, threads):
    torch.set_num_threads(threads)
    X = [torch.randn(s, device=device) / 20 for s in [(3, 20, 30), (1, HALVED + 4, HALVED + 8)]]
    torch.manual_seed(7)
    runs = [{name: run() for name, run in calls(backend, device, dtype, X).items()}]
    torch.manual_seed(7)
    runs.append({name: run() for name, run in calls(backend, device, dtype, [x.clone() for x in X]).items()})
    for name, found in runs[0].items():
        assert found and unchanged(found, runs[1][name]), name


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("shape", [(4, 20, 30), (3, 300, 310)])
def test_neighbours_are_untouched(backend, device, dtype, shape):
    """NaN, inf and huge entries in a stack and in the list: the other matrices have the bits that they have without."""
    good = [torch.randn(shape, device=device) / 20 for _ in range(2)]
    bad = [x.clone() for x in good]
    bad[0][1], bad[0][2, 1, 1] = torch.nan, torch.inf
    bad[1][0] = 1e30
    torch.manual_seed(7)
    clean = {name: run() for name, run in calls(backend, device, dtype, good).items()}
    torch.manual_seed(7)
    for name, run in calls(backend, device, dtype, bad).items():
        stacks = zip(run(), clean[name], itertools.cycle(([1, 2], [0])))  # noqa: B905
        for found, expected, spoiled in stacks:
            kept = [i for i in range(shape[0]) if i not in spoiled]
            assert same_bits(found[kept], expected[kept]), name


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_agree_with_results(backend, device, dtype, layout):
    X = [LAYOUTS[layout](torch.randn(s, device=device) / 9) for s in [(2, 9, 14), (1, 8, 8), (3, 1, 5), (1, 260, 300)]]
    R, P = [LAYOUTS[layout](r) for r in symmetric(X, dtype)], [torch.ones_like(x) for x in X]
    factor, (size, decay, skip) = factors("pair", X, dtype), amounts(counts(X), device)
    arguments = [
        ("gram", (X, factor, dtype)),
        ("square_add", (R, 1.0, 2.0)),
        ("square_add", (R, 1.0, 0.0)),
        ("multiply_add", (R, X, factor, 1.0, False, dtype)),
        ("multiply_add", (R, R, None, 1.0, True, dtype)),
        ("multiply_update_", (P, R, X, factor, size, decay, skip, dtype)),
        ("newton_schulz", (X, factor, True, COEFFICIENTS, True, [1], dtype, [], None, None, None)),
        ("newton_schulz", (X, factor, False, COEFFICIENTS, False, [], dtype, P, size, decay, skip)),
    ]
    for name, given in arguments:
        mode = FakeTensorMode()

        def fake(x, mode=mode):
            if isinstance(x, list):
                return [fake(t) for t in x]
            return mode.from_tensor(x) if isinstance(x, Tensor) else x

        with mode:
            predicted = getattr(torch.ops.spectral_kernels, name)(*map(fake, given))
        real = word(name, backend, device, dtype)(*given)
        assert (predicted is None) == (real is None)
        if name == "newton_schulz":
            predicted, real = [*predicted[0], predicted[1]], [*real[0], real[1]]
        for p, r in zip(predicted or (), real or (), strict=True):
            assert (p.shape, p.dtype, p.device, p.stride()) == (r.shape, r.dtype, r.device, r.stride()), name


def test_the_words_are_served_by_the_dtype_of_the_products():
    for dtype, backend in ((f32, "cpu"), (f64, "cpu"), (bf16, "reference"), (f16, "reference")):
        for name in registry.WORDS[-5:]:
            choice = registry.choose(name, "cpu", dtype, 1)
            assert choice.backend == backend
            if backend == "reference":
                assert ("cpu", f"computes in float32 and float64, not {dtype}") in choice.declined
    assert schedules.checked(STEPS, None, bf16, "gram", None).safe  # what is run above is a sound schedule
