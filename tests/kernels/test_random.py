"""The counter-based generator: keys, moments, independence of position, and the same start in C++."""

from __future__ import annotations

import math

import pytest
import torch

from spectral_kernels.kernels import random
from spectral_kernels.kernels.composites import start_block, start_blocks
from tests.kernels.lists import kernel


def test_known_values():
    """splitmix64 (Steele, Lea, Flood 2014) from state 0: the first two outputs of the published generator."""
    golden = 0x9E3779B97F4A7C15
    assert random.mix(golden) == 0xE220A8397B1DCDAF
    assert random.mix(2 * golden % (1 << 64)) == 0x6E789E6AA1B965F4


def test_keys_know_seed_shape_and_step():
    seen = {}
    for seed in (0, 1, -1, 7, (1 << 63) - 1, -(1 << 63)):
        for m, n in ((0, 0), (1, 2), (2, 2), (3, 5), (30, 20), (20, 31), (4096, 1024)):
            for step in (0, 1, 2, 1000):
                seen[random.key(seed, m, n, step)] = (seed, m, n, step)
    assert len(seen) == 6 * 7 * 4
    assert all(0 <= key < 1 << 64 for key in seen)


def test_keys_are_symmetric_in_the_shape():
    for m, n in ((3, 5), (1, 100), (4096, 64)):
        assert random.key(2, m, n, 1) == random.key(2, n, m, 1)


@pytest.mark.parametrize("draw", [0, 1, random.key(0, 30, 20, 0), (1 << 64) - 1])
def test_moments(draw):
    count = 200_000
    x = random.normals(draw, count)
    assert x.shape == (count,) and x.dtype == torch.float64 and torch.isfinite(x).all()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        # the moment's own standard deviation over `count` samples, five of them
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / count)
        assert float(x.pow(power).mean()) == pytest.approx(moment, abs=5 * spread)
    normal = torch.distributions.Normal(0.0, 1.0)
    sorted_ = normal.cdf(x).sort().values
    distance = (sorted_ - (torch.arange(count, dtype=torch.float64) + 0.5) / count).abs().max()
    assert float(distance) < 2 / math.sqrt(count)  # Kolmogorov: exceeded once in 1,500 for the true distribution
    for lag in (1, 2, 3, 100):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(count)
    assert abs(float((x[::2].square() * x[1::2].square()).mean()) - 1) < 5 * math.sqrt(8 / (count / 2))  # pairs, too


def test_draws_of_neighbouring_keys_are_unrelated():
    base = random.normals(random.key(0, 64, 64, 0), 50_000)
    for seed, m, step in ((1, 64, 0), (0, 65, 0), (0, 64, 1)):
        other = random.normals(random.key(seed, m, 64, step), 50_000)
        assert abs(float((base * other).mean())) < 5 / math.sqrt(50_000)


def test_an_element_depends_on_its_index_alone():
    whole = random.normals(5, 1001)
    for count in (0, 1, 2, 7, 1000):
        assert torch.equal(random.normals(5, count), whole[:count])


def test_scalar_and_tensor_mixers_agree():
    """The i-th pair from Python integers, without int64 tricks."""
    draw = random.key(-3, 17, 9, 2)
    found = random.normals(draw, 20)
    for pair in range(10):
        z = random.mix((pair * 0x9E3779B97F4A7C15 + draw) % (1 << 64))
        radius = math.sqrt(-2 * math.log(((z >> 32) + 0.5) / 2**32))
        angle = 2 * math.pi * ((z & 0xFFFFFFFF) + 0.5) / 2**32
        assert float(found[2 * pair]) == pytest.approx(radius * math.cos(angle), abs=1e-12)
        assert float(found[2 * pair + 1]) == pytest.approx(radius * math.sin(angle), abs=1e-12)


def test_global_random_state_has_no_say():
    torch.manual_seed(1)
    first, state = random.normals(9, 10), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, random.normals(9, 10))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("m", "n", "b"), [(30, 20, 4), (20, 30, 4), (100, 7, 7), (5, 3, 4), (9, 1, 4), (200, 150, 16)])
def test_start_blocks_are_orthonormal(m, n, b):
    for dtype, eps in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        V = start_block(m, n, b, 0, dtype, torch.device("cpu"))
        assert V.shape == (b, n) and V.dtype == dtype
        eye = torch.diag((torch.arange(b) < n).to(torch.float64))  # more rows than entries: the last ones are zero
        torch.testing.assert_close(V.double() @ V.double().mT, eye, rtol=0, atol=eps)


def test_start_blocks_of_a_list_do_not_depend_on_place():
    A = [torch.zeros(2, 30, 20), torch.zeros(1, 9, 50), torch.zeros(1, 30, 20)]
    flat = start_blocks(A, 4, 3)
    first = start_block(30, 20, 4, 3, torch.float32, torch.device("cpu")).flatten()
    assert torch.equal(flat[:80], first) and torch.equal(flat[80:160], first) and torch.equal(flat[-80:], first)
    assert torch.equal(flat[160:-80], start_block(9, 50, 4, 3, torch.float32, torch.device("cpu")).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30), (100, 7), (7, 100), (300, 200), (150, 1)])
@pytest.mark.parametrize("b", [1, 4, 6, 16])
def test_native_and_python_starts_agree(dtype, m, n, b):
    """One read from the kernel's own start and from Python's: the same projected matrix to rounding."""
    krylov = kernel("block_krylov", "cpu", "cpu", dtype, b)
    A = [torch.randn(2, m, n, dtype=dtype)]
    for seed in (0, 5, -1, -(1 << 63)):
        own = krylov(A, None, b, 1, b, 1, 0.0, 1, seed, 0, True)
        given = krylov(A, start_blocks(A, b, seed), b, 1, b, 1, 0.0, 1, seed, 0, True)
        size = float(own[2].abs().max())
        # normals of float32 agree to a few roundings, a dozen where Gram-Schmidt cancels
        torch.testing.assert_close(own[2], given[2], rtol=0, atol=2000 * torch.finfo(dtype).eps * size)
    other = krylov(A, start_blocks(A, b, 1), b, 1, b, 1, 0.0, 1, 1, 0, True)
    if n > b:
        assert float((other[2] - given[2]).abs().max()) > 1e-3 * size
