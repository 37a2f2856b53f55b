"""spectral_norm on tensors: accuracy, shapes and strides, scale, non-finite entries, determinism, steps, warnings."""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels.contracts import INFO, acc_dtype
from spectral_kernels.ops import norm
from spectral_kernels.ops.estimate import estimate
from tests.kernels.lists import DTYPES, LAYOUTS, kernel
from tests.matrices import EDGE_SHAPES, FAMILIES, exact, make, with_spectrum

METHODS = ["krylov", "power", "gram", "svd"]
BACKENDS = ["cpu", "reference"]
TOLS = [1e-2, 1e-3, 1e-4, 1e-5]
# every family with every dtype; methods, tolerances and backends take turns so that each pair of them occurs
PAIRWISE = [
    (family, DTYPES[d], METHODS[(i + d) % 4], TOLS[(i // 4 + 2 * d + d // 2) % 4], BACKENDS[(i // 2 + d) % 2])
    for i, family in enumerate(FAMILIES)
    for d in range(4)
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    kernel("block_krylov" if request.param == "cpu" else "gram_matvec", request.param, "cpu", torch.float32, 4)
    with sk.force(request.param):
        yield request.param


def near(value, truth: float, tol: float) -> bool:
    """Relative error at most tol, and the rounding of the result itself."""
    eps = torch.finfo(value.dtype).eps
    return abs(float(value) - truth) <= (tol + eps) * truth + torch.finfo(value.dtype).smallest_normal * eps


@pytest.mark.parametrize(("family", "dtype", "method", "tol", "backend"), PAIRWISE, indirect=["backend"])
def test_accuracy(family, dtype, method, tol, backend):
    for seed, transpose in ((0, False), (1, True)):
        A = make(family, 72, seed).A.to(dtype)
        A = A.mT.contiguous() if transpose else A
        value = sk.spectral_norm(A, tol, method=method, seed=seed)
        truth = exact(A)
        assert value.shape == () and value.dtype == acc_dtype(dtype)
        assert near(value, truth, tol)
        if method == "gram":  # the upper side: below by rounding only
            assert float(value) >= truth * (1 - 8 * torch.finfo(value.dtype).eps)


def test_pairwise_sample_covers():
    for columns in itertools.combinations(range(1, 5), 2):
        pairs = {tuple(case[c] for c in columns) for case in PAIRWISE}
        sizes = [len({case[c] for case in PAIRWISE}) for c in columns]
        assert len(pairs) == sizes[0] * sizes[1], columns


@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_of_large_sides(family):
    """Beyond what is solved densely or in one panel, in both orders of memory, down to the reach of each dtype."""
    A = make(family, 200, 3).A
    for a, tol in ((A, 1e-10), (A.float(), 1e-3), (A.float().mT, 2e-6), (A.bfloat16(), 1e-3)):
        assert near(sk.spectral_norm(a, tol), exact(a), tol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge_shape(dtype, backend):
    for shape in EDGE_SHAPES:
        A = torch.randn(shape).to(dtype)
        for method in METHODS:
            value = sk.spectral_norm(A, method=method)
            assert value.shape == () and value.dtype == acc_dtype(dtype)
            assert near(value, exact(A), 1e-3), (shape, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 0, 0), (2, 0, 4), (2, 4, 0), (2, 0, 3, 4), (2, 3, 0, 5)])
def test_empty_stacks_and_sides(method, shape, backend):
    value = sk.spectral_norm(torch.ones(shape), method=method)
    assert value.shape == shape[:-2] and value.dtype == torch.float32 and not value.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_three_is_three(method, dtype, backend):
    A = torch.tensor([[3.0]], dtype=dtype)
    assert float(sk.spectral_norm(A, method=method)) == 3.0
    assert float(sk.spectral_norm(-A, method=method)) == 3.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 150, 300), (2, 300, 150), (2, 9, 400)])
def test_strides(layout, shape, backend):
    A = LAYOUTS[layout](torch.randn(shape))
    before = A.clone()
    for a in (A, A.mT):
        value = sk.spectral_norm(a)
        for i in range(shape[0]):
            assert near(value[i], exact(a[i]), 1e-3) and near(sk.spectral_norm(a[i]), exact(a[i]), 1e-3)
    assert torch.equal(A, before)


def test_overlapping_and_reversed_memory():
    row = torch.randn(30)
    for A in (row.expand(20, 30), row[:, None].expand(30, 20), row.as_strided((11, 20), (1, 1)), row.unfold(0, 8, 2)):
        assert near(sk.spectral_norm(A), exact(A), 1e-3)
        assert near(sk.spectral_norm(A[None].expand(3, *A.shape))[2], exact(A), 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_batch_dimensions_and_dim_follow_torch(method):
    A = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    for dim in itertools.permutations(range(-4, 0), 2):
        for keepdim in (False, True):
            ours = sk.spectral_norm(A, 1e-6, dim=dim, keepdim=keepdim, method=method)
            exact_ = torch.linalg.matrix_norm(A, 2, dim=dim, keepdim=keepdim)
            assert ours.shape == exact_.shape, (dim, keepdim)
            torch.testing.assert_close(ours, exact_, rtol=1e-6, atol=0)
    assert torch.equal(sk.spectral_norm(A, dim=(1, 3)), sk.spectral_norm(A, dim=[-3, -1]))
    assert sk.spectral_norm(A[0, 0], keepdim=True).shape == (1, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 30), (150, 300), (2, 40, 200)])
def test_scale_by_powers_of_two_is_exact(method, shape, backend):
    """Entries from 1e-30 to 1e30: the same bits, moved."""
    A = torch.randn(shape)
    value = sk.spectral_norm(A, method=method)
    for exponent in (-100, -64, -21, -1, 7, 30, 100):
        assert torch.equal(sk.spectral_norm(A * 2.0**exponent, method=method), value * 2.0**exponent), exponent


@pytest.mark.parametrize("family", FAMILIES)
def test_the_repeated_read_changes_nothing_but_the_count(family, backend):
    """At another scale the first read is repeated: the same steps follow, to the same end."""
    for size in (40, 160):
        A = make(family, size, 0).A
        one = estimate([A[None]]).info[0]
        for exponent in (-500, 500):
            moved = estimate([A[None] * 2.0**exponent]).info[0]
            assert moved[INFO["columns"]] == one[INFO["columns"]]
            assert moved[INFO["reads"]] == one[INFO["reads"]] + 1
            value = moved[INFO["sigma"]] * 2.0**-exponent
            if backend == "cpu":
                assert value == one[INFO["sigma"]]
            else:  # LAPACK's eigenvectors of a cluster move by a rounding with the scale
                assert float(value) == pytest.approx(float(one[INFO["sigma"]]), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_scale_in_float64(method, backend):
    A = torch.randn(40, 70, dtype=torch.float64)
    value = sk.spectral_norm(A, 1e-8, method=method)
    assert near(value, exact(A), 1e-8)
    for exponent in (-990, -500, -210, 210, 500, 990):  # 1e-298 to 1e298
        assert torch.equal(sk.spectral_norm(A * 2.0**exponent, 1e-8, method=method), value * 2.0**exponent), exponent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(30, 40), (140, 160)])
def test_scale_of_half_dtypes(dtype, shape, backend):
    A = torch.randn(shape).to(dtype)
    exponents = (-100, 100) if dtype == torch.bfloat16 else (-12, 10)
    A = torch.where(A.abs() < 2**-2, torch.zeros_like(A), A)  # no entry becomes subnormal, for fp16 either
    value = sk.spectral_norm(A)
    for exponent in exponents:
        assert torch.equal(sk.spectral_norm(A * 2.0**exponent), value * 2.0**exponent)
    huge = torch.full(shape, torch.finfo(dtype).max / 256, dtype=dtype)
    assert near(sk.spectral_norm(huge), exact(huge), 1e-3)
    tiny = torch.full(shape, 3 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=dtype)
    assert near(sk.spectral_norm(tiny), exact(tiny), 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-40, 3e-45, 1e-37])
def test_subnormal_entries(method, size, backend):
    for shape in ((30, 20), (150, 200)):
        A = torch.randn(shape).mul(size)
        truth = exact(A)
        assert truth > 0
        assert abs(float(sk.spectral_norm(A, method=method)) - truth) <= 1e-3 * truth + 2.0**-149


def test_subnormal_float64(backend):
    A = torch.randn(30, 20, dtype=torch.float64) * 1e-310
    truth = exact(A * 2.0**1000)  # of these bits: the product is exact
    assert float(sk.spectral_norm(A)) * 2.0**1000 == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_above_the_range_is_inf(method, backend):
    assert sk.spectral_norm(torch.full((64, 64), 3e38), method=method) == torch.inf


def test_wide_range_of_entries(backend):
    """One entry of 1e30 beside ones of 1e-30: the large one decides."""
    A = torch.randn(50, 60) * 1e-30
    A[20, 30] = 1e30
    assert near(sk.spectral_norm(A), 1e30, 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 30, 20), (6, 140, 130)])
def test_non_finite_matrices_stay_alone(method, dtype, shape, backend):
    A = torch.randn(shape).to(dtype)
    clean = sk.spectral_norm(A, method=method)
    A[1, 2, 3] = float("nan")
    A[2, 29, 19] = float("inf")
    A[3, 0, 0] = float("-inf")
    A[4, 5, 5], A[4, 6, 6] = float("inf"), float("nan")
    for value in (sk.spectral_norm(A, method=method), torch.stack([sk.spectral_norm(a, method=method) for a in A])):
        assert value[[1, 4]].isnan().all() and (value[[2, 3]] == torch.inf).all()
    value = sk.spectral_norm(A, method=method)
    assert torch.equal(value[[0, 5]], clean[[0, 5]])


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrices(method, backend):
    A = torch.randn(3, 150, 140)
    A[1] = 0
    value = sk.spectral_norm(A, method=method)
    assert value[1] == 0 and (value[[0, 2]] > 1).all()
    assert sk.spectral_norm(torch.zeros(5, 4), method=method) == 0
    assert sk.spectral_norm(-torch.zeros(5, 4), method=method) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_alone_in_a_stack_in_a_list(dtype):
    kernel("block_krylov", "cpu", "cpu", dtype, 4)
    shapes = [(3, 12, 9), (2, 150, 300), (3, 500, 140), (2, 20, 2000), (1, 400, 400)]
    stacks = [torch.randn(s).to(dtype) for s in shapes]
    stacks[1] = stacks[1].mT.contiguous().mT
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        in_list = torch.cat(sk.spectral_norm(stacks))
        in_stack = torch.cat([sk.spectral_norm(a) for a in stacks])
        alone = torch.stack([sk.spectral_norm(m) for a in stacks for m in a])
        flat = sk.spectral_norm([m for a in reversed(stacks) for m in a.flip(0)]).flip(0)
        results += [in_list, in_stack, alone, flat]
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_reference_agrees_alone_and_in_a_list_within_rounding():
    stacks = [torch.randn(3, 12, 9), torch.randn(2, 150, 300), torch.randn(2, 20, 500)]
    with sk.force("reference"):
        in_list = torch.cat(sk.spectral_norm(stacks, steps=4))
        alone = torch.stack([sk.spectral_norm(m, steps=4) for a in stacks for m in a])
        again = torch.cat(sk.spectral_norm(stacks, steps=4))
    # one more rounding of a sum of up to 300 products per read, four reads
    torch.testing.assert_close(in_list, alone, rtol=64 * 1.2e-7, atol=0)
    assert torch.equal(in_list, again)


def test_backends_agree():
    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    for name in FAMILIES:
        A = make(name, 90, 5).A
        for dtype, eps in ((torch.float32, 1.2e-7), (torch.float64, 2.3e-16)):
            values = []
            for backend_name in BACKENDS:
                with sk.force(backend_name):
                    values.append(float(sk.spectral_norm(A.to(dtype), steps=5)))
            # the same Krylov space from the same start; its edge is known to about sqrt(size) roundings a read
            assert abs(values[0] - values[1]) <= 400 * eps * values[0], (name, dtype)


def test_seed_draws_another_start():
    A = make("flat", 200, 0).A
    values = {float(sk.spectral_norm(A, steps=2, seed=seed)) for seed in (0, 1, 2, -1, 1 << 62)}
    assert len(values) == 5
    assert float(sk.spectral_norm(A, steps=2, seed=1)) in values


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_steps_are_so_many_reads(steps, backend):
    for shape in ((2, 300, 200), (2, 200, 300), (1, 90, 400)):
        info = estimate([torch.randn(shape)], steps=steps).info
        assert (info[:, INFO["reads"]] == steps).all()
        rescaled = estimate([torch.randn(shape) * 1e-30], steps=steps).info
        # a first read at the wrong scale is repeated, and counted
        assert (rescaled[:, INFO["reads"]] == steps + 1).all()


def test_more_steps_are_better_and_never_above(backend):
    A = make("flat", 300, 1).A
    truth = exact(A)
    errors = [1 - float(sk.spectral_norm(A, steps=steps)) / truth for steps in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2 > 1e-3 > errors[-1] > -1e-12


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (3, 2), (130, 132)])
def test_steps_beyond_the_whole_space(shape, backend):
    """As many columns as the matrix has: exact, and the reads end there."""
    for dtype, tol in ((torch.float32, 4e-6), (torch.float64, 1e-14)):
        A = torch.randn(shape, dtype=dtype)
        assert near(sk.spectral_norm(A, steps=40), exact(A), tol)
    info = estimate([torch.randn(1, 30, 12)], steps=40).info
    assert info[0, INFO["reads"]] == 3


@pytest.mark.parametrize("method", ["krylov", "power"])
def test_fixed_steps_serve_every_kind_of_matrix(method, backend):
    A = torch.randn(4, 30, 40)
    A[1], A[2], A[3] = 0, 1e-30, torch.nan
    value = sk.spectral_norm(A, steps=20, method=method)
    assert (
        near(value[0], exact(A[0]), 1e-2) and value[1] == 0 and near(value[2], exact(A[2]), 1e-6) and value[3].isnan()
    )


def _hard(m: int = 300, n: int = 260):
    """A spectrum that two reads cannot resolve to 1e-6."""
    p = min(m, n)
    return with_spectrum(1 - 0.3 * torch.arange(p, dtype=torch.float64) / p, m, n, torch.Generator().manual_seed(0)).A


def test_a_spent_budget_warns_with_a_bracket_that_holds(monkeypatch, backend):
    monkeypatch.setattr("spectral_kernels.ops.estimate.MOST_READS", 4)
    monkeypatch.setattr(norm, "MOST_READS", 4)
    monkeypatch.setattr(norm, "DENSE_FINISH", 0)
    for A, scale in ((_hard(), 1.0), (_hard().float(), 1e-25), (_hard().mT, 1e100), (_hard(260, 900), 1.0)):
        A = A * scale
        with pytest.warns(sk.AccuracyWarning, match="tol=1e-06") as caught:
            value = sk.spectral_norm(A.double(), 1e-6)
        assert len(caught) == 1 and caught[0].filename == __file__
        lower, upper = map(float, re.search(r"\[(\S+), (\S+)\]", str(caught[0].message)).groups())
        truth = exact(A)
        assert lower * (1 - 1e-6) <= truth <= upper * (1 + 1e-6)
        assert float(value) == pytest.approx(lower, rel=1e-6) and upper < 2 * lower


def test_a_spent_budget_names_its_matrix_alone(monkeypatch, backend):
    monkeypatch.setattr("spectral_kernels.ops.estimate.MOST_READS", 3)
    monkeypatch.setattr(norm, "MOST_READS", 3)
    monkeypatch.setattr(norm, "DENSE_FINISH", 100)
    easy = torch.outer(torch.randn(200), torch.randn(150)).double()
    with pytest.warns(sk.AccuracyWarning) as caught:
        values = sk.spectral_norm([easy, _hard(), _hard(90, 60), torch.full((40, 20), torch.nan).double()], 1e-8)
    assert len(caught) == 1 and "(300, 260)" in str(caught[0].message)
    assert near(values[0], exact(easy), 1e-8) and near(values[2], exact(_hard(90, 60)), 1e-8)


def test_small_matrices_finish_by_a_dense_method(monkeypatch, backend):
    monkeypatch.setattr("spectral_kernels.ops.estimate.MOST_READS", 3)
    monkeypatch.setattr(norm, "MOST_READS", 3)
    A = torch.stack([_hard(), torch.zeros(300, 260).double(), 2 * _hard()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = sk.spectral_norm(A, 1e-9)
        one = sk.spectral_norm(_hard().mT.float(), 2e-6)
    assert near(value[0], exact(A[0]), 1e-12) and value[1] == 0 and near(value[2], exact(A[2]), 1e-12)
    assert near(one, exact(_hard().float()), 2e-6)


def test_steps_never_warn(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(sk.spectral_norm(_hard(), 1e-12, steps=1)) < 0.999


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method, backend):
    for A in (torch.randn(200, 150), torch.randn(3, 20, 30), torch.randn(150, 200).double()):
        plain = sk.spectral_norm(A, method=method)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sk.spectral_norm(A, method=method), plain)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_and_parameters(method, backend):
    A = torch.randn(40, 30)
    value = sk.spectral_norm(A, method=method)
    with torch.inference_mode():
        assert torch.equal(sk.spectral_norm(A, method=method), value)
        assert torch.equal(sk.spectral_norm(A.clone(), method=method), value)
    with torch.no_grad():
        found = sk.spectral_norm(torch.nn.Parameter(A), method=method)
    assert torch.equal(found, value) and not found.requires_grad and type(found) is torch.Tensor
