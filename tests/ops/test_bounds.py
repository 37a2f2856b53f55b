"""spectral_bounds: brackets that hold, probabilities that are what they say, and the odd inputs."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import EDGE_SHAPES, FAMILIES, cases, exact, make, with_spectrum
from scipy import stats

import spectral_kernels as sk
from spectral_kernels.kernels import registry
from spectral_kernels.ops.bounds import SpectralBounds

TRUTH = 1e-13  # relative accuracy of the float64 SVD that serves as truth
ROUNDING = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}


def holds(bounds: SpectralBounds, sigma) -> torch.Tensor:
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    return (bounds.lower.double() <= sigma * (1 + TRUTH)) & (bounds.upper.double() >= sigma * (1 - TRUTH))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_family_is_bracketed(dtype, deterministic):
    members = [c for seed in range(2) for c in cases(90, seed, dtype)]
    sigma = torch.tensor([s for _, _, s in members], dtype=torch.float64)
    got = sk.spectral_bounds([A for _, A, _ in members], deterministic=deterministic)
    assert got.kind == ("deterministic" if deterministic else "probabilistic")
    assert got.delta == (0.0 if deterministic else 1e-6)
    assert got.lower.dtype == got.upper.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert holds(got, sigma).all()
    slack = got.upper.double() / sigma - 1
    assert float(slack.max()) < 0.1  # eight reads
    assert (got.lower.double() / sigma).min() > 0.98
    assert (got.reads <= 8).all()
    easy = [i for i, (name, _, _) in enumerate(members) if name in ("decaying", "rank 1 + noise", "trained")]
    assert float(slack[easy].max()) < 1e-3


def test_the_deterministic_side_never_fails_over_starts():
    for name, A, sigma in cases(24):
        for seed in range(25):
            assert holds(sk.spectral_bounds(A, deterministic=True, steps=2, seed=seed), sigma).all(), (name, seed)


def gaussians(count: int, m: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack and its norms. Leading vectors are uniform and independent: a start shared by all is as good as many."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(count, m, n, generator=g, dtype=torch.float64)
    return A, torch.linalg.eigvalsh(A.mT @ A)[:, -1].sqrt()


def count_violations(delta: float, seeds: int, **options) -> tuple[int, int]:
    bad = total = 0
    for seed in range(seeds):
        A, sigma = gaussians(200, 40, 32, seed)
        got = sk.spectral_bounds(A, delta=delta, seed=seed, **options)
        assert (got.lower <= sigma * (1 + TRUTH)).all()
        bad += int((got.upper < sigma * (1 - TRUTH)).sum())
        total += len(sigma)
    return bad, total


@pytest.mark.parametrize(("block", "steps"), [(4, 3), (4, 4), (1, 6), (2, 4)])
def test_upper_side_fails_with_probability_at_most_delta(block, steps):
    bad, total = count_violations(0.05, 15, block=block, steps=steps)
    assert stats.binomtest(bad, total, 0.05, alternative="greater").pvalue > 1e-3
    assert bad > 0  # a bound that never fails at 5 % wastes reads


@pytest.mark.parametrize(("block", "steps"), [(4, 2), (4, 4), (1, 6)])
def test_no_violation_at_the_default_delta(block, steps):
    bad, _ = count_violations(1e-6, 8, block=block, steps=steps)
    assert bad == 0


@pytest.mark.parametrize("fresh", [1, 2, 4])
def test_a_warm_start_keeps_the_probability_when_its_block_is_useless(fresh):
    bad = total = 0
    for seed in range(10):
        A, sigma = gaussians(200, 40, 32, 100 + seed)
        kept = torch.linalg.svd(A)[2][:, 1:5]  # orthogonal to x1: only the fresh columns can find it
        got = sk.spectral_bounds(A, delta=0.05, seed=seed, v0=kept, block=fresh, steps=3)
        assert (got.lower <= sigma * (1 + TRUTH)).all()
        bad += int((got.upper < sigma * (1 - TRUTH)).sum())
        total += len(sigma)
    assert stats.binomtest(bad, total, 0.05, alternative="greater").pvalue > 1e-3
    assert bad > 0


def test_a_warm_start_tightens():
    A = make("clustered", 150, 0).A
    cold = sk.spectral_bounds(A, steps=8)
    warm = sk.spectral_bounds(A, steps=8, v0=cold.block, seed=1)
    assert warm.lower > cold.lower
    assert warm.upper <= cold.upper
    assert holds(warm, 1.0)


def test_its_block_starts_spectral_norm_and_back():
    A = make("rank 8 + noise", 100, 0).A.float()
    sigma = exact(A)
    bounds = sk.spectral_bounds(A)
    value = sk.spectral_norm(A, v0=bounds.block)
    assert abs(float(value) / sigma - 1) < 1e-3
    _, block = sk.spectral_norm(A, return_block=True)
    warm = sk.spectral_bounds(A, v0=block, steps=2)
    assert holds(warm, sigma)
    assert float(warm.lower) > sigma * (1 - 1e-4)


def test_a_poisoned_block_does_no_harm():
    A = make("flat", 60, 0).A
    side = sk.spectral_bounds(A).block.shape[-1]
    for fill in (math.nan, math.inf, 0.0):
        got = sk.spectral_bounds(A, v0=torch.full((4, side), fill, dtype=torch.float64))
        assert holds(got, exact(A))
        assert float(got.upper / got.lower) < 1.2


@pytest.mark.parametrize("name", ["flat", "clustered", "heavy tails", "decaying", "two values"])
def test_lower_grows_and_the_best_upper_falls_with_the_reads(name):
    A = make(name, 100, 0).A
    runs = [sk.spectral_bounds(A, steps=k) for k in range(1, 11)]
    lowers = [float(r.lower) for r in runs]
    assert all(b >= a * (1 - 1e-14) for a, b in zip(lowers, lowers[1:], strict=False))
    assert all(float(r.lower) <= float(r.upper) for r in runs)
    assert max(lowers) <= min(float(r.upper) for r in runs)
    assert float(runs[9].upper) < float(runs[0].upper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_scale_bit_for_bit(dtype):
    A = make("flat", 48, 0).A.to(dtype)
    plain = sk.spectral_bounds(A)
    for power in (-60, 3, 60) if dtype == torch.float32 else (-600, 3, 600):
        scaled = sk.spectral_bounds(torch.ldexp(A, torch.tensor(power)))
        assert torch.equal(scaled.lower, torch.ldexp(plain.lower, torch.tensor(power)))
        assert torch.equal(scaled.upper, torch.ldexp(plain.upper, torch.tensor(power)))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e37])
def test_extreme_magnitudes_are_bracketed(scale):
    A = (make("flat", 24, 0).A * scale / 10).float()
    for deterministic in (False, True):
        got = sk.spectral_bounds(A, deterministic=deterministic)
        assert holds(got, exact(A))
        assert float(got.upper) < 1.1 * exact(A)


def test_transpose_and_permutations_share_the_norm():
    A = make("spike", 70, 0).A
    g = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(s, generator=g) for s in A.shape)
    brackets = [sk.spectral_bounds(x) for x in (A, A.mT, A.mT.contiguous(), A[rows], A[:, columns], -A)]
    assert max(float(b.lower) for b in brackets) <= min(float(b.upper) for b in brackets)


def test_the_same_bits_alone_and_in_any_list_and_arguments_as_they_were():
    members = [A for _, A, _ in cases(40, 0, torch.float32)]
    before = [A.clone() for A in members]
    native = registry.choose("block_krylov", "cpu", torch.float32, 4).backend != "reference"
    together = sk.spectral_bounds(members)
    for i, A in enumerate(members):
        alone = sk.spectral_bounds(A)
        rounding = 0 if native else 1e-6  # batched matrix products of the reference depend on the batch
        assert float(alone.upper) == pytest.approx(float(together.upper[i]), rel=rounding, abs=0)
        assert float(alone.lower) == pytest.approx(float(together.lower[i]), rel=rounding, abs=0)
    assert all(torch.equal(a, b) for a, b in zip(members, before, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", EDGE_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_shapes(shape, dtype, deterministic):
    A = torch.randn(shape, dtype=torch.float64).to(dtype)
    got = sk.spectral_bounds(A, deterministic=deterministic)
    assert got.lower.shape == got.upper.shape == ()
    assert holds(got, exact(A))
    if min(shape) <= 4:  # the start spans the whole space: one read is exact to rounding
        assert float(got.upper - got.lower) <= 10 * ROUNDING[dtype] * float(got.upper)


def test_special_values_stay_with_their_matrix():
    A = make("flat", 20, 0).A.float().repeat(5, 1, 1)
    A[0, 3, 4] = math.nan
    A[1, 0, 0] = -math.inf
    A[2] = 0
    A[3, 1, 1], A[3, 2, 2] = math.nan, math.inf
    for deterministic in (False, True):
        got = sk.spectral_bounds(A, deterministic=deterministic)
        assert got.lower[[0, 3]].isnan().all()
        assert got.upper[[0, 3]].isnan().all()
        assert got.lower[1] == got.upper[1] == math.inf
        assert got.lower[2] == got.upper[2] == 0
        assert holds(SpectralBounds(got.lower[4], got.upper[4], *got[2:]), exact(A[4]))
        alone = sk.spectral_bounds(A[4], deterministic=deterministic)
        assert float(alone.upper) == pytest.approx(float(got.upper[4]), rel=1e-6)


def test_shapes_of_results():
    A = torch.randn(2, 3, 9, 6)
    got = sk.spectral_bounds(A)
    assert got.lower.shape == got.upper.shape == got.reads.shape == (2, 3)
    assert got.block.shape[:3] == (2, 3, 4)
    assert len(got.method) == 6
    plain = sk.spectral_bounds([A[0, 0], torch.randn(4, 30)])
    assert plain.lower.shape == (2,)
    assert [x.shape[0] for x in plain.block] == [4, 4]
    mixed = sk.spectral_bounds([A[0], torch.randn(4, 30)])
    assert [b.lower.shape for b in mixed] == [(3,), ()]
    assert [len(b.method) for b in mixed] == [3, 1]
    assert torch.equal(mixed[0].upper, sk.spectral_bounds(A[0]).upper)
    assert sk.spectral_bounds([]).lower.shape == (0,)
    assert sk.spectral_bounds(torch.empty(0, 3, 4)).upper.shape == (0,)
    assert sk.spectral_bounds(A, block=2).block.shape[:3] == (2, 3, 4)


def test_float64_is_tight_to_its_own_rounding():
    case = with_spectrum(
        torch.tensor([2.0, 1.0, 0.5, 0.25], dtype=torch.float64), 9, 4, torch.Generator().manual_seed(0)
    )
    got = sk.spectral_bounds(case.A)
    assert 0 < float(got.upper - got.lower) < 1e-13


def test_a_delta_below_what_the_arithmetic_sees_leaves_the_deterministic_bounds():
    got = sk.spectral_bounds(make("flat", 200, 0).A.float(), delta=1e-30)
    assert set(got.method) <= {"frobenius", "trace_lanczos"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"delta": 0.0}, ValueError, "delta"),
        ({"delta": 1.0}, ValueError, "delta"),
        ({"delta": math.nan}, ValueError, "delta"),
        ({"delta": "small"}, TypeError, "delta"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.5}, TypeError, "steps"),
        ({"block": 0}, ValueError, "block"),
        ({"block": 99}, ValueError, "block"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"deterministic": 1}, TypeError, "deterministic"),
        ({"v0": torch.zeros(3, 5)}, ValueError, "v0"),
        ({"v0": "block"}, TypeError, "v0"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        sk.spectral_bounds(torch.randn(6, 5), **options)


@pytest.mark.parametrize(
    "A", [torch.ones(3), torch.ones(3, 3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.cfloat), 3]
)
def test_bad_matrices(A):
    with pytest.raises((TypeError, ValueError), match="A must"):
        sk.spectral_bounds(A)


def test_there_are_enough_families():
    assert len(FAMILIES) >= 12
