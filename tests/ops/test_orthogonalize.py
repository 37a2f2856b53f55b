"""orthogonalize: values against numpy's SVD and the scalar polynomial, errors, and derivatives."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels.kernels.contracts import acc_dtype
from spectral_kernels.ops import arithmetic, newton_schulz, schedules
from tests.kernels.lists import DTYPES, LAYOUTS
from tests.kernels.steps import copies, pairwise, same_bits
from tests.matrices import with_spectrum

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ASPECTS = {"1:1": (24, 24), "1:4": (16, 64), "4:1": (64, 16), "1:64": (5, 320)}
FLAT, SPREAD = "flat", "spread"  # spectra: Gaussian, and log-spaced over three decades
COMPUTED = [None, f32, f64, bf16, f16]
METHODS, NORMALIZERS = newton_schulz.METHODS, newton_schulz.NORMALIZERS
FACTORS = (list(schedules.PUBLISHED), METHODS, DTYPES, list(ASPECTS), NORMALIZERS, COMPUTED, [FLAT, SPREAD])
SAMPLE = pairwise(*FACTORS)
CROSS = [  # all schedules, methods, dtypes and aspects; the other options take turns
    (*case, NORMALIZERS[i % 4], COMPUTED[i % 5], (FLAT, SPREAD)[i % 2])
    for i, case in enumerate(itertools.product(*FACTORS[:4]))
]
ITERATED = ["standard", "gram"]
FORMS = [(method, normalizer) for method in ITERATED for normalizer in NORMALIZERS[1:]] + [("svd", "auto")]


def named(case) -> str:
    return "-".join(str(x).removeprefix("torch.") for x in case)


def matrix(aspect: str, kind: str = FLAT, dtype: torch.dtype = f32, seed: int = 0) -> Tensor:
    g, (m, n) = torch.Generator().manual_seed(seed), ASPECTS[aspect]
    if kind == FLAT:
        return torch.randn(m, n, generator=g, dtype=f64).to(dtype)
    return with_spectrum(torch.logspace(0, -3, min(m, n), dtype=f64), m, n, g).A.to(dtype)


def unit(A: Tensor) -> tuple[np.ndarray, float]:
    """The float64 matrix divided by a power of two near its largest entry, and that."""
    size = 2.0 ** (math.frexp(float(A.double().abs().max()))[1] - 1)
    return A.double().numpy() / size, size


def exact(A: Tensor, norm: float, steps) -> np.ndarray:
    """U f(S / norm) V'; f = 1 without steps."""
    x, size = unit(A)
    U, S, Vh = np.linalg.svd(x, full_matrices=False)
    outputs = schedules.Schedule("", tuple(steps))(S * (size / norm)) if steps else np.ones_like(S)
    return (U * outputs) @ Vh


def check(found: Tensor, A: Tensor, norm: float, steps, way: tuple[bool, tuple[int, ...], torch.dtype] | None) -> None:
    """Within five times the error of numpy's recursion in the same arithmetic, beside the rounding of the result.

    Both are draws: for matrices with five singular values three times were too few in one of 1152 cases.
    """
    assert found.shape == A.shape and found.dtype == A.dtype and found.is_contiguous()
    target = exact(A, norm, steps)
    limit = 1.01 * torch.finfo(A.dtype).eps / 2 * np.linalg.norm(target) + 1e-10
    if way is not None:
        gram, restarts, dtype = way
        x, size = unit(A)
        x = (x if x.shape[0] <= x.shape[1] else x.T) * (size / norm)
        run = arithmetic.gram(x, steps, dtype, restarts) if gram else arithmetic.standard(x, steps, dtype)
        run = run.astype(np.float64)
        limit += 5 * np.linalg.norm((run if A.shape[0] <= A.shape[1] else run.T) - target)
    assert np.linalg.norm(found.double().numpy() - target) <= limit


def run_case(case) -> None:
    name, method, dtype, aspect, normalizer, computed, kind = case
    A = matrix(aspect, kind, dtype)
    before = A.clone()
    options = dict(method=method, normalizer=normalizer, compute_dtype=computed)
    steps = schedules.PUBLISHED[name].steps
    way = None
    if method != "svd":
        made = newton_schulz.recipe(name, **options)
        dtype_of_products = computed or acc_dtype(dtype)
        assert newton_schulz.products_dtype(made, dtype, "cpu") == dtype_of_products
        gram = "gram" if method == "gram" else "standard"
        if not schedules.validate(name, dtype=dtype_of_products, method=gram).safe:
            with pytest.raises(ValueError, match=re.escape(f"schedule {name!r} is not safe")):
                sk.orthogonalize(A, name, **options)
            return
        way = newton_schulz.way(made, newton_schulz.short_first(A[None]))
        assert method == "auto" or way[0] == (method == "gram")
    found, info = sk.orthogonalize(A, name, return_info=True, **options)
    check(found, A, float(info.norm), () if method == "svd" else steps, way)
    assert torch.equal(A, before) and info.orthogonalized
    assert same_bits(found, sk.orthogonalize(A, name, **options))


@pytest.mark.parametrize("case", SAMPLE, ids=named)
def test_agrees_with_the_polynomial_of_the_singular_values(case):
    run_case(case)


@pytest.mark.full
@pytest.mark.parametrize("case", CROSS, ids=named)
def test_agrees_with_the_polynomial_of_the_singular_values_everywhere(case):
    run_case(case)


@pytest.mark.parametrize("method", ITERATED)
@pytest.mark.parametrize("shape", [(515, 530), (300, 270), (3, 300, 256)])
def test_larger_matrices(shape, method):
    """Halved products, and stacks that are served matrix by matrix."""
    A = torch.randn(shape)
    found, info = sk.orthogonalize(A, method=method, return_info=True)
    steps, made = schedules.schedule("polar_express").steps, newton_schulz.recipe("polar_express", method=method)
    way = newton_schulz.way(made, newton_schulz.short_first(A.view(-1, *shape[-2:])))
    for x, a, norm in zip(*(t.view(-1, *shape[-2:]) for t in (found, A)), info.norm.view(-1), strict=True):
        check(x, a, float(norm), steps, way)


@pytest.mark.parametrize("given", [(2.0, -1.5, 0.5), [(3, -3.2, 1.2), (1.5, -0.5, 0)], schedules.PUBLISHED["cubic"]])
def test_schedules_of_any_kind(given):
    A = matrix("1:4")
    one = schedules.schedule(given)
    found, info = sk.orthogonalize(A, given, return_info=True)
    check(found, A, float(info.norm), one.steps, (False, (), f32))
    assert same_bits(found, sk.orthogonalize(A, one))
    assert same_bits(sk.orthogonalize(A, "cubic", steps=3), sk.orthogonalize(A, [(1.5, -0.5, 0.0)] * 3))


# -------------------------------------------------------------------------------------------------------- normalizers


@pytest.mark.parametrize("kind", [FLAT, SPREAD])
@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("computed", [f32, f64, bf16, f16])
def test_what_the_matrix_was_divided_by(computed, aspect, kind):
    A = matrix(aspect, kind)
    S = torch.linalg.svdvals(A.double())
    sigma, eps = float(S[0]), torch.finfo(computed).eps
    norm = {
        name: float(sk.orthogonalize(A, normalizer=name, compute_dtype=computed, return_info=True)[1].norm)
        for name in NORMALIZERS
    }
    # norms are summed in float32 at least, the Gram matrix in the dtype of the products
    assert norm["frobenius"] == pytest.approx(float(S.norm()), rel=1e-6)
    assert norm["schatten4"] == pytest.approx(float(S.pow(4).sum()) ** 0.25, rel=2 * eps + 1e-6)
    assert norm["auto"] == norm["schatten4"]
    assert sigma * 1.004 <= norm["spectral"] <= sigma * 1.011
    assert min(norm.values()) >= sigma * (1 - 2 * eps) and norm["schatten4"] <= norm["frobenius"] * (1 + 2 * eps)
    if kind == FLAT:  # what the closer norms are for
        assert norm["schatten4"] < 0.8 * norm["frobenius"]


def test_info():
    A = torch.randn(2, 3, 20, 30, dtype=f64)
    A[0, 1], A[1, 0, 3, 4], A[1, 2, 5, 5] = 0, torch.nan, -torch.inf
    for method in METHODS:
        found, info = sk.orthogonalize(A, method=method, return_info=True)
        assert info.norm.shape == info.defect.shape == info.orthogonalized.shape == (2, 3)
        assert info.orthogonalized.tolist() == [[True, False, True], [False, True, False]]
        assert info.norm[0, 1] == 0 and info.norm[1, 0].isnan() and info.norm[1, 2] == torch.inf
        S = torch.linalg.svdvals(found.nan_to_num(0.0))
        defect = (S**2 - 1).square().mean(-1).sqrt()
        usable = info.norm.isfinite()
        torch.testing.assert_close(info.defect[usable], defect[usable], rtol=1e-9, atol=1e-12)
        assert info.defect[0, 1] == 1 and info.defect[~usable].isnan().all()
        assert not found[0, 1].any() and found[1, 0].isnan().all() and found[1, 2].isnan().all()
        good = found[info.orthogonalized]
        assert (info.defect[info.orthogonalized] < (1e-12 if method == "svd" else 0.4)).all() and good.isfinite().all()
    tall = A.mT[1, 1]
    assert float(sk.orthogonalize(tall, method="svd", return_info=True)[1].defect) < 1e-12


# -------------------------------------------------------------------------------------------------------------- scale

RANGE = {f32: (-120, -30, -20, 1, 21, 60, 120), f64: (-1000, -300, 7, 201, 1000), bf16: (-110, 3, 110), f16: (-8, 5, 9)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("computed", [None, f32, f16])
@pytest.mark.parametrize(("method", "normalizer"), FORMS)
def test_powers_of_two_leave_the_bits(method, normalizer, computed, dtype):
    A = matrix("1:4", dtype=f64)
    A = torch.where(A.abs() < 2.0**-5, 2.0**-5, A).to(dtype)
    options = dict(method=method, normalizer=normalizer, compute_dtype=computed, return_info=True)
    here, info = sk.orthogonalize(A, **options)
    for exponent in RANGE[dtype]:
        there, moved = sk.orthogonalize(torch.ldexp(A.double(), torch.tensor(exponent)).to(dtype), **options)
        assert same_bits(here, there), exponent
        assert float(moved.norm) == float(info.norm) * 2.0**exponent


@pytest.mark.parametrize("method", ["standard", "gram", "svd"])
@pytest.mark.parametrize("computed", [None, f32, f64])
@pytest.mark.parametrize(
    ("dtype", "size"), [(f32, 1e-41), (f32, 1e-38), (f32, 6e37), (bf16, 1e-38), (bf16, 6e37), (f16, 1e-5), (f16, 1e4)]
    + [(f64, 1e-318), (f64, 1e-300), (f64, 4e306)],
)  # fmt: skip
def test_the_ends_of_the_range(dtype, size, computed, method):
    """Subnormal entries too: what is expected is of the bits that they have."""
    A = (matrix("4:1", dtype=f64) * size).to(dtype)
    steps = schedules.schedule("polar_express").steps
    for normalizer in NORMALIZERS[1:]:
        found, info = sk.orthogonalize(
            A, method=method, normalizer=normalizer, compute_dtype=computed, return_info=True
        )
        restarts = (schedules.restarts_for("polar_express", computed or acc_dtype(dtype)) or ()) * (method == "gram")
        way = None if method == "svd" else (method == "gram", restarts, computed or acc_dtype(dtype))
        x, scale = unit(A)
        norm = float(info.norm) / scale
        if scale < 1e-290:  # the norm itself is subnormal
            norm = np.linalg.norm(x) if normalizer == "frobenius" else (np.linalg.svd(x)[1] ** 4).sum() ** 0.25
        if normalizer != "spectral" or scale > 1e-290:
            check(found, torch.from_numpy(x).to(dtype), norm, () if method == "svd" else steps, way)
        assert info.orthogonalized


# ---------------------------------------------------------------------------------------------------- stacks and lists


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (2, 0, 5), (0, 4, 3)])
def test_empty_matrices(shape, method):
    A = torch.ones(shape, requires_grad=True)
    found, info = sk.orthogonalize(A, method=method, return_info=True)
    assert found.shape == shape and not info.orthogonalized.any() and info.norm.shape == shape[:-2]
    found.sum().backward()
    assert A.grad is not None and A.grad.shape == shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_a_single_row_or_column(shape, dtype, method):
    A = torch.randn(shape).to(dtype)
    found, info = sk.orthogonalize(A, method=method, return_info=True)
    steps = schedules.schedule("polar_express").steps
    norm = float(A.double().norm())
    assert float(info.norm) == pytest.approx(norm, rel=1e-6)
    output = 1.0 if method == "svd" else float(schedules.Schedule("", steps)(norm / float(info.norm)))
    # the schedule is steep near 1: what the norm is off by comes out many times as large
    torch.testing.assert_close(found.double(), A.double() / norm * output, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_unchanged_inputs(layout, method):
    for shape in ((3, 20, 30), (2, 30, 20), (1, 260, 300)):
        A = LAYOUTS[layout](torch.randn(shape))
        (before,) = copies([A])
        found = sk.orthogonalize(A, method=method)
        assert same_bits(A, before) and found.is_contiguous()
        torch.testing.assert_close(found, sk.orthogonalize(A.contiguous(), method=method), rtol=0, atol=2e-5)
    expanded = torch.randn(20, 1).expand(20, 30)
    torch.testing.assert_close(
        sk.orthogonalize(expanded, method=method), sk.orthogonalize(expanded.clone(), method=method), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_lists_and_stacks(method):
    A = [torch.randn(s) for s in [(30, 20), (2, 60, 80), (3, 5, 9), (0, 4, 5), (4, 0), (30, 20), (2, 2, 9, 5)]]
    found, info = sk.orthogonalize(A, method=method, return_info=True)
    assert isinstance(found, list) and [f.shape for f in found] == [a.shape for a in A]
    assert [n.shape for n in info.norm] == [a.shape[:-2] for a in A] and [n.shape for n in info.defect] == [
        a.shape[:-2] for a in A
    ]
    for f, a, norm in zip(found, A, info.norm, strict=True):
        alone, of_it = sk.orthogonalize(a, method=method, return_info=True)
        torch.testing.assert_close(f, alone, rtol=0, atol=2e-5)  # sums of a batch may have another order
        torch.testing.assert_close(norm, of_it.norm, rtol=1e-6, atol=0)
        assert bool(f.any()) == (a.numel() > 0)
    assert all(map(same_bits, found, sk.orthogonalize(tuple(A), method=method)))
    assert sk.orthogonalize([]) == [] and sk.orthogonalize((), return_info=True) == ([], ([], [], []))


@pytest.mark.parametrize("dtype", [f32, bf16, f64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 20, 30), (4, 300, 260)])
def test_bad_matrices_and_their_neighbours(shape, method, dtype):
    if method == "svd" and shape[1] > 100:
        pytest.skip("seconds of SVDs, of which every one is by itself")
    A = torch.randn(shape).to(dtype)
    clean = sk.orthogonalize(A, method=method)
    A[1], A[2, 3, 4], A[3, 5, 6] = 0, torch.nan, -torch.inf
    found = sk.orthogonalize(A, method=method)
    assert not found[1].any() and found[2:4].isnan().all()
    assert same_bits(found[0], clean[0]) and same_bits(found[4:], clean[4:])
    several = sk.orthogonalize([A[2], A[0], A[1]], method=method)
    assert several[0].isnan().all() and not several[2].any()
    torch.testing.assert_close(several[1], clean[0], rtol=torch.finfo(dtype).eps, atol=2e-5)


def test_matrices_of_all_sizes_beside_each_other():
    A = torch.randn(20, 30)
    stack = torch.stack([A * 2.0**e for e in (-120, -60, 0, 60, 110)])
    for method, normalizer in FORMS:
        found = sk.orthogonalize(stack, method=method, normalizer=normalizer)
        for x in found:
            torch.testing.assert_close(x, found[2], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- rank 1


@pytest.mark.parametrize("name", ["polar_express", "classic_quintic", "cubic", "aol_4_fixed", "keller_quintic"])
@pytest.mark.parametrize("method", ITERATED)
def test_rank_one_gains_no_further_values(name, method):
    """Beyond the noise that the schedule states for the dtype of the products, and the rounding of the result."""
    for seed, (m, n) in enumerate([(40, 60), (64, 16), (8, 128)]):
        g = torch.Generator().manual_seed(seed)
        signs = 2.0 ** torch.randint(-2, 3, (m, 1), generator=g) * (torch.rand(m, 1, generator=g) - 0.5).sign()
        A = (signs * torch.randn(1, n, generator=g)).bfloat16()  # products with powers of two are exact: of rank 1
        assert torch.linalg.svdvals(A.double())[1] < 1e-12
        B = (torch.randn(m, 1, generator=g) * torch.randn(1, n, generator=g)).bfloat16()  # of rank 1 but for rounding
        for computed, X in ((bf16, A), (bf16, B), (None, A)):
            noise = schedules.validate(name, dtype=computed or f32, method=method).noise
            found = sk.orthogonalize(X, name, method=method, compute_dtype=computed).double()
            S = torch.linalg.svdvals(found)
            # measured on 24 matrices, these are others; the result is rounded to bfloat16
            assert float(S[1]) <= 1.25 * noise + 2.0**-9 * float(found.norm())
            assert float(S[0]) > 0.5
        if name == "polar_express":  # what products in float32 are for: torch's Muon gives 0.47
            assert float(S[1]) < 0.005


def test_the_exact_factor_of_low_rank():
    """Zeros stay zero, also where the SVD finds their rounding."""
    S = torch.tensor([3.0, 2.0, 1.0, 0, 0, 0], dtype=f64)
    for m, n in ((6, 9), (9, 6), (6, 6)):
        A = with_spectrum(S, m, n, torch.Generator().manual_seed(0)).A
        for dtype in DTYPES:
            low = (A.to(bf16) if dtype != f64 else A)[:1].expand(m, n).to(dtype)  # of rank 1, exactly
            values = torch.linalg.svdvals(sk.orthogonalize(low, method="svd").double())
            assert values[0] == pytest.approx(1, rel=2 * torch.finfo(dtype).eps) and values[1] < torch.finfo(dtype).eps
        values = torch.linalg.svdvals(sk.orthogonalize(A, method="svd"))
        torch.testing.assert_close(values, (S > 0).double(), rtol=0, atol=1e-13)


# ----------------------------------------------------------------------------------------------------- what auto takes


@pytest.mark.parametrize("name", ["polar_express", "keller_quintic", "cubic", "deepseek_v4_10"])
@pytest.mark.parametrize("computed", [f32, f64, bf16])
def test_auto_takes_what_costs_less(name, computed):
    one, taken = schedules.schedule(name), set()
    points = schedules.restarts_for(one, computed)
    for m, n in ((16, 16), (20, 40), (12, 60), (80, 4), (6, 900), (520, 530)):
        standard, gram = newton_schulz.costs(len(one), len(points), "cpu", min(m, n), max(m, n))
        method = "gram" if gram < newton_schulz.GAIN * standard else "standard"
        taken.add(method)
        if m > 500 and (computed == bf16 or name != "polar_express"):
            continue
        A = torch.randn(m, n)
        auto, explicit = (sk.orthogonalize(A, name, method=x, compute_dtype=computed) for x in ("auto", method))
        assert same_bits(auto, explicit)
    assert taken == {"standard", "gram"}


# ------------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"schedule": "polar"}, ValueError, "schedule must be one of 'polar_express', 'keller_quintic', "),
        ({"schedule": 3}, TypeError, "schedule must be a name, a Schedule, a triple (a, b, c) or a list"),
        ({"schedule": [(1, 2)]}, ValueError, "three finite numbers (a, b, c), not (1, 2)"),
        ({"steps": 7}, ValueError, "steps must be 5 or None for schedule 'polar_express_5_safety2e2_cushion2', not 7"),
        ({"steps": 0, "schedule": "cubic"}, ValueError, "steps must be in [1, 99], not 0"),
        ({"method": "newton"}, ValueError, "method must be one of 'auto', 'standard', 'gram', 'svd', not 'newton'"),
        ({"normalizer": "l2"}, ValueError, "one of 'auto', 'frobenius', 'schatten4', 'spectral', not 'l2'"),
        ({"compute_dtype": torch.int8}, ValueError, "compute_dtype must be a float dtype, not torch.int8"),
        ({"compute_dtype": "bf16"}, ValueError, "compute_dtype must be a float dtype, not bf16"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, not float"),
        ({"schedule": "aol_4_old"}, ValueError, "'aol_4_old' is not safe (4 steps, float32, method 'standard'): it"),
        ({"schedule": "cans_5"}, ValueError, "it diverges: outputs pass 2 for inputs above 1.0000078"),
        ({"schedule": "cubic5", "compute_dtype": bf16}, ValueError, "bfloat16, method 'standard'): it flips"),
        ({"schedule": (3.4445, -4.775, 3.0), "method": "gram"}, ValueError, "method 'gram'): it diverges"),
    ],
)
def test_bad_options(given, error, message):
    for A in (torch.randn(9, 7), [torch.randn(3, 4), torch.randn(2, 2, 9)]):
        before = copies(A if isinstance(A, list) else [A])
        with pytest.raises(error, match=re.escape(message)):
            sk.orthogonalize(A, **given)
        assert all(map(same_bits, A if isinstance(A, list) else [A], before))


def test_known_names_are_listed():
    with pytest.raises(ValueError) as caught:
        sk.orthogonalize(torch.eye(3), "unknown")
    assert all(repr(name) in str(caught.value) for name in (*schedules.PUBLISHED, *schedules.ALIASES))


@pytest.mark.parametrize(
    ("A", "error", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "torch.int64 is not a served float type"),
        (torch.ones(3, 4, dtype=torch.complex64), TypeError, "torch.complex64 is complex"),
        (torch.eye(4).to_sparse(), TypeError, "dense (strided) tensor, not torch.sparse_coo"),
        (torch.ones(3), ValueError, "at least 2 dimensions (..., fan_out, fan_in), not shape (3,)"),
        (3.0, TypeError, "must be a torch.Tensor, not float"),
        ([torch.ones(3, 4), torch.ones(3, 4).double()], ValueError, "one dtype and device"),
        ([torch.ones(3, 4), torch.ones(3, 4).int()], TypeError, "A[1] must be float32"),
    ],
)
def test_bad_matrices(A, error, message):
    for method in METHODS:
        with pytest.raises(error, match=re.escape(message)):
            sk.orthogonalize(A, method=method)


# ------------------------------------------------------------------------------------------------- backends and threads


@pytest.mark.parametrize("method", ITERATED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_gives_the_same_within_rounding(dtype, method):
    A = [torch.randn(s).to(dtype) for s in [(20, 30), (3, 40, 12), (300, 260)]]
    ours = sk.orthogonalize(A, method=method)
    with sk.force("reference"):
        theirs = sk.orthogonalize(A, method=method)
    different = 0
    for x, y in zip(ours, theirs, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x, y, rtol=0, atol=2 * eps + (1e-4 if dtype != f64 else 1e-12))
        different += not torch.equal(x, y)
    assert different or dtype in (bf16, f16)  # it was another backend


def test_a_backend_that_cannot_serve_says_so():
    with sk.force("cpu"):
        with pytest.raises(sk.BackendUnavailable, match="cpu: computes in float32 and float64, not torch.bfloat16"):
            sk.orthogonalize(torch.randn(5, 6), compute_dtype=bf16)
        assert sk.orthogonalize(torch.randn(5, 6).bfloat16()).dtype == bf16


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_the_same_bits_run_to_run(method, threads):
    torch.set_num_threads(threads)
    A = [torch.randn(s) for s in [(2, 20, 30), (270, 300)]]
    first = sk.orthogonalize(A, method=method)
    again = sk.orthogonalize([a.clone() for a in A], method=method)
    assert all(map(same_bits, first, again))
