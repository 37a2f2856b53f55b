"""The contract of next_block_: rows, draws, the upper bound; against float64 from the basis itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spectral_kernels.kernels import composites, random, reference
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, STATS, acc_dtype, counts, sides
from tests.kernels.lists import kernel, served
from tests.kernels.steps import blocks_of, flat_parts, matrices, same_bits

NATIVE = [pair for pair in served() if pair[0] != "reference"]
f32, f64 = torch.float32, torch.float64
SEED = 5


def space(A, b, reads, V=None, tol=0.0, scale=None):
    """(Q, T, info) after so many rounds of the reference's words, from V or the start blocks."""
    acc, device, n, N = acc_dtype(A[0].dtype), A[0].device, sides(A, 2), counts(A)
    rows = reads * b + b
    V = composites.start_blocks(A, b, 0) if V is None else V.clone()
    Q = torch.zeros(rows * sum(n), dtype=acc, device=device)
    T = torch.zeros((N, rows, rows), dtype=f64, device=device)
    info = torch.zeros((N, INFO_COLUMNS), dtype=f64, device=device)
    scale = torch.ones(N, dtype=acc, device=device) if scale is None else scale.to(acc)
    info[:, INFO["scale"]] = scale.double()
    composites.store(Q, V, n, b, rows)
    for read in range(reads):
        W, S, stats, _ = reference.gram_matvec(A, V, scale, None, b, read == 0, False)
        if read == 0:
            info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
        reference.rayleigh_ritz_(n, Q, V, T, info, W, S, scale, b, read * b, 1, tol, 1)
    return Q, T, info


def follow(fn, A, of_space, b, fresh, steps, seed=SEED, V=None):
    """next_block_ of a space; returns the flat V and the bound."""
    Q, T, info = of_space
    V = torch.full((b * sum(sides(A, 2)),), 7.0, dtype=Q.dtype, device=Q.device) if V is None else V.clone()
    step = torch.as_tensor(steps, dtype=torch.int64, device=Q.device).expand(counts(A)).contiguous()
    before = [x.clone() for x in (Q, T, info, step)]
    bound = fn(sides(A, 1), sides(A, 2), Q, T, info, V, step, b, fresh, seed)
    assert all(same_bits(x, y) for x, y in zip((Q, T, info, step), before, strict=True))
    return V, bound


def spectrum(m, n, values, dtype=f32, device="cpu", seed=3):
    """(1, m, n) with these leading singular values, the others zero."""
    g = torch.Generator().manual_seed(seed)
    k = len(values)
    U, W = (torch.linalg.qr(torch.randn(x, k, generator=g, dtype=f64))[0] for x in (m, n))
    return ((U * torch.as_tensor(values, dtype=f64)) @ W.mT)[None].to(dtype).to(device)


def orthonormal(rows, basis):
    """Gram-Schmidt in float64: the rows, in order, against `basis` and those before; zero rows are left out."""
    found = list(basis)
    for row in rows:
        x = row.clone()
        for _ in range(2):
            for q in found:
                x = x - (x @ q) * q
        if x.norm() > 1e-6 * row.norm() and len(found) < x.shape[0]:
            found.append(x / x.norm())
    return torch.stack(found[len(basis) :]) if len(found) > len(basis) else rows[:0]


def draws(m, n, b, step, device, seed=SEED):
    """(b, n): step t of a parameter takes draw t + 2 of (seed, shape)."""
    return random.normals(random.key(seed, n, m, step + 2), b * n, device).view(b, n)


def images(a, q, kept):
    """A'A z of the leading Ritz vectors z in the rows of q, descending, from A and q alone."""
    product = a @ q.mT
    _, vectors = torch.linalg.eigh(product.mT @ product)
    z = vectors.flip(1)[:, :kept].mT @ q
    return z @ a.mT @ a


def exact_bound(a, q):
    """The contract's formula from A and the basis alone."""
    product = a.mT @ (a @ q.mT)  # A'A Q
    r = torch.linalg.matrix_norm(product - q.mT @ (q @ product))
    theta, tau = torch.linalg.eigvalsh(q @ product)[-1], a.square().sum() - (q @ product).trace()
    square = torch.linalg.eigvalsh(torch.tensor([[theta, r], [r, tau]], dtype=f64))[-1]
    return float(torch.minimum(square, a.square().sum().cpu()).sqrt())


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("reads", [1, 2, 3])
@pytest.mark.parametrize(("b", "fresh"), [(1, 0), (1, 1), (3, 1), (4, 0), (4, 1), (4, 4), (8, 2)])
def test_rows_are_images_of_ritz_vectors_and_then_draws(backend, device, dtype, reads, b, fresh):
    fn = kernel("next_block_", backend, device, dtype, b)
    decay = [10 * 0.8**i for i in range(30)]
    A = [spectrum(40, 30, decay, dtype, device), spectrum(90, 200, decay, dtype, device), spectrum(30, 40, decay, dtype,
         device), spectrum(40, 30, decay, dtype, device, seed=8)]  # fmt: skip
    Q, T, info = of_space = space(A, b, reads)
    steps = torch.tensor([0, 1, 7, 1 << 40])
    V, bound = follow(fn, A, of_space, b, fresh, steps)
    n, kept, eps = sides(A, 2), b - fresh, torch.finfo(dtype).eps
    bases = flat_parts(Q, reads * b + b, n)
    for (j, a), v, q in zip(matrices(A), blocks_of(V.double(), b, A), bases, strict=True):
        assert (v @ v.mT - torch.eye(b, device=device)).abs().max() <= 20 * eps
        exact = orthonormal(images(a.double(), q[: reads * b].double(), kept), [])
        # eigenvectors of a matrix known to eps: eps / gap, the gaps of the lower ones being the smaller
        assert ((exact * v[:kept]).sum(1).abs() >= 1 - 5e3 * eps).all()
        fresh_rows = orthonormal(draws(*a.shape, b, int(steps[j]), device), list(v[:kept]))[:fresh]
        assert (fresh_rows - v[kept:]).abs().max() <= 100 * eps if fresh else v.shape[0] == kept
        assert float(bound[j]) == pytest.approx(exact_bound(a.double(), q[: reads * b].double()), rel=1e3 * eps)


def test_draws_are_those_of_their_keys():
    shapes, steps = [(30, 20), (20, 30), (5, 9)], [2, 2, 1 << 40]
    found = random.draws([random.base(SEED, *shape) for shape in shapes], torch.tensor(steps), 41)
    for row, shape, step in zip(found, shapes, steps, strict=True):
        assert torch.equal(row, random.normals(random.key(SEED, *shape, step), 41))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_only_fresh_rows_know_step_and_seed(backend, device, dtype):
    fn = kernel("next_block_", backend, device, dtype, 4)
    A = [torch.randn(2, 40, 30, dtype=dtype, device=device), torch.randn(1, 50, 64, dtype=dtype, device=device)]
    of_space = space(A, 4, 2)
    first, bound = follow(fn, A, of_space, 4, 1, 3)
    again, same_bound = follow(fn, A, of_space, 4, 1, 3)
    assert same_bits(first, again) and same_bits(bound, same_bound)
    for steps, seed in (([3, 4, 4], SEED), ([3, 4, 4], SEED + 1)):
        other, other_bound = follow(fn, A, of_space, 4, 1, steps, seed)
        assert same_bits(bound, other_bound)
        for j, (v, w) in enumerate(zip(blocks_of(first, 4, A), blocks_of(other, 4, A), strict=True)):
            assert same_bits(v[:3], w[:3])
            if j == 0 and seed == SEED:
                assert same_bits(v, w)
            else:
                assert abs(float(v[3].double() @ w[3].double())) < 0.9


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(("m", "n"), [(30, 20), (20, 30), (70, 3), (3, 70), (50, 1), (1, 1), (5, 4)])
def test_a_block_of_draws_alone(backend, device, dtype, m, n):
    """fresh = b; with fewer columns than rows of the block the last rows are zero."""
    fn = kernel("next_block_", backend, device, dtype, 4)
    A = [torch.randn(1, m, n, dtype=dtype, device=device)]
    V, _ = follow(fn, A, space(A, 4, 1), 4, 4, 6)
    exact = torch.zeros(4, n, dtype=f64, device=device)
    rows = orthonormal(random.normals(random.key(SEED, max(m, n), min(m, n), 8), 4 * n, device).view(4, n), [])
    exact[: len(rows)] = rows
    assert len(rows) == min(4, n)
    assert (V.view(4, n) - exact).abs().max() <= 200 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("fresh", [0, 1, 2])
def test_narrow_matrices_fill_what_they_can(backend, device, dtype, n, fresh):
    fn = kernel("next_block_", backend, device, dtype, 4)
    A = [torch.randn(3, 60, n, dtype=dtype, device=device)]
    for reads in (1, 2):
        V, bound = follow(fn, A, space(A, 4, reads), 4, fresh, 0)
        eye = torch.diag((torch.arange(4, device=device) < n).double())
        for v in blocks_of(V.double(), 4, A):
            assert (v @ v.mT - eye).abs().max() <= 20 * torch.finfo(dtype).eps
        if n <= 4:  # the whole space: the bound is the value
            torch.testing.assert_close(bound, torch.linalg.matrix_norm(A[0].double(), 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("reads", [1, 2])
def test_rows_that_the_space_does_not_fill_are_random(backend, device, dtype, rank, reads):
    fn = kernel("next_block_", backend, device, dtype, 4)
    A = [spectrum(40, 30, [3.0, 2.0][:rank], dtype, device)]
    Q, T, info = of_space = space(A, 4, reads)
    first, _ = follow(fn, A, of_space, 4, 1, 0)
    other, _ = follow(fn, A, of_space, 4, 1, 1)
    v, w = (x.view(4, 30).double() for x in (first, other))
    eps = torch.finfo(dtype).eps
    for step, x in enumerate((v, w)):
        assert (x @ x.mT - torch.eye(4, device=device)).abs().max() <= 20 * eps
        # A'A z lies in the row space, rank rows of it
        right = torch.linalg.svd(A[0][0].double())[2][:rank]
        assert ((right @ x[:rank].mT).square().sum() - rank).abs() <= 1e3 * eps
        filled = orthonormal(draws(40, 30, 4, step, device), list(x[:rank]))[: 4 - rank]
        assert (filled - x[rank:]).abs().max() <= 1e3 * eps
    assert same_bits(first.view(4, 30)[:rank], other.view(4, 30)[:rank])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_matrices_without_an_estimate_keep_their_block(backend, device, dtype):
    """Zero, empty, theta NaN, sigma NaN: V to the last bit, bound 0; their neighbours follow as ever."""
    fn = kernel("next_block_", backend, device, dtype, 4)
    A = [torch.randn(5, 40, 30, dtype=dtype, device=device), torch.randn(1, 0, 6, dtype=dtype, device=device)]
    A[0][1] = 0
    Q, T, info = space(A, 4, 2)
    whole, bounds = follow(fn, A, (Q, T, info), 4, 1, 2)
    info[2, INFO["theta"]] = float("nan")
    info[3, INFO["sigma"]] = float("nan")
    T[2] = float("nan")
    kept = torch.randn_like(whole)
    V, bound = follow(fn, A, (Q, T, info), 4, 1, 2, V=kept)
    for j, (v, old, moved) in enumerate(zip(*(blocks_of(x, 4, A) for x in (V, kept, whole)), strict=True)):
        assert same_bits(v, moved if j in (0, 4) else old)
        assert bound[j] == (bounds[j] if j in (0, 4) else 0)
    assert bounds[0] > 0 and bounds[4] > 0


def check_bound(fn, A, b, reads, V=None, scale=None):
    """sigma_max <= bound <= ||A||_F (1 + 1e-5), up to the rounding of sigma_max itself."""
    _, bound = follow(fn, A, space(A, b, reads, V, scale=scale), b, min(1, b), 0)
    for (_, a), upper in zip(matrices(A), bound, strict=True):
        exact = torch.linalg.svdvals(a.double())[0]
        assert upper >= exact * (1 - 1e-13)
        assert upper <= torch.linalg.matrix_norm(a.double()) * (1 + 1e-5)
    return bound


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize(
    ("dtype", "b"), [(f32, 1), (f32, 4), (f32, 8), (f64, 3), (f64, 4), (torch.bfloat16, 1), (torch.bfloat16, 4)]
)
def test_the_bound_holds_for_adversaries(backend, device, dtype, b):
    fn = kernel("next_block_", backend, device, dtype, b)
    far = [[10.0**-i for i in range(12)], [1.0] * 12, [1.0] * 11 + [1e-3], [1.0, 1 - 1e-4, 1 - 2e-4], [3.0]]
    A = [
        spectrum(m, n, values, dtype, device, seed) for seed, values in enumerate(far) for m, n in ((40, 30), (20, 70))
    ]
    A += [torch.randn(2, m, n, device=device).to(dtype) for m, n in ((64, 64), (300, 20), (12, 200), (9, 2), (1, 5))]
    # theta hides: a large value outside the block, reached only through tiny couplings or not at all
    hidden = torch.zeros(3, 30, 30, dtype=f64)
    hidden[:, range(30), range(30)] = torch.tensor([1.0] * 29 + [100.0], dtype=f64)
    hidden[1, 29, 0] = 1e-3
    hidden[2, :29, 29] = 1e-4
    A.append(hidden.to(dtype).to(device))
    block = torch.cat([torch.eye(b, n, dtype=acc_dtype(dtype), device=device).flatten() for n in sides(A, 2)])
    for reads, V in itertools.product((1, 2, 3), (None, block)):
        check_bound(fn, A, b, reads, V)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@settings(max_examples=30)
@given(data=st.data())
@example(data=None)
def test_the_bound_holds_for_any_spectrum(backend, device, dtype, data):
    fn = kernel("next_block_", backend, device, dtype, 4)
    if data is None:
        values, m, n, seed, reads = [1.0, 1.0, 1e-6], 3, 3, 0, 1
    else:
        values = data.draw(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
        m, n = (data.draw(st.integers(len(values), 40)) for _ in range(2))
        seed, reads = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 3))
    check_bound(fn, [spectrum(m, n, values, dtype, device, seed)], 4, reads)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("reads", [1, 2])
def test_the_bound_of_rank_one_is_its_value(backend, device, dtype, reads):
    fn = kernel("next_block_", backend, device, dtype, 4)
    A = [spectrum(m, n, [s], dtype, device) for m, n, s in ((40, 30, 1.0), (30, 400, 50.0), (7, 1, 0.1), (2, 2, 3.0))]
    bound = check_bound(fn, A, 4, reads)
    torch.testing.assert_close(bound.cpu(), torch.tensor([1.0, 50.0, 0.1, 3.0], dtype=f64), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("backend", "device"), served())
def test_the_bound_is_of_the_unscaled_matrix(backend, device):
    fn = kernel("next_block_", backend, device, f32, 4)
    A = [torch.randn(2, 40, 30, device=device)]
    V, bound = follow(fn, A, space(A, 4, 2), 4, 1, 0)
    scale = torch.tensor([2.0**90, 2.0**-90], device=device)
    scaled = [A[0] / scale[:, None, None]]
    V2, bound2 = follow(fn, scaled, space(scaled, 4, 2, scale=scale), 4, 1, 0)
    assert same_bits(V, V2) and torch.equal(bound, bound2 * scale)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_neighbours_and_place_have_no_say(backend, device, dtype):
    """Alone and in a list: the same bits from native kernels, the same to rounding from the reference's batches."""
    fn = kernel("next_block_", backend, device, dtype, 4)
    decay = [10 * 0.8**i for i in range(20)]
    A = [spectrum(m, n, decay[:m], dtype, device, seed) for seed, (m, n) in enumerate([(40, 30)] * 3 + [(20, 90)])]
    A += [torch.randn(1, 60, 3, dtype=dtype, device=device), spectrum(300, 200, decay, dtype, device)]
    A[0] = torch.cat((A[0], A[1] * 0.5, torch.zeros_like(A[0])))
    # the narrow matrix and some others end early: their bases are shorter
    of_space = space(A, 4, 3, tol=1.0)
    assert len(set(of_space[2][:, INFO["columns"]].tolist())) > 1
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(follow(fn, A, of_space, 4, 1, 2))
    Q, T, info = of_space
    n, together = sides(A, 2), blocks_of(results[0][0], 4, A)
    bases = flat_parts(Q, 16, n)
    if (backend, device) in NATIVE:
        assert all(same_bits(x, y) for x, y in zip(*results, strict=True))
    for j, (q, (_, a)) in enumerate(zip(bases, matrices(A), strict=True)):
        own = slice(j, j + 1)
        v, bound = follow(fn, [a[None]], (q.flatten(), T[own].contiguous(), info[own].contiguous()), 4, 1, 2)
        if (backend, device) in NATIVE:
            assert same_bits(v.view(4, -1), together[j]) and same_bits(bound[0], results[0][1][j])
        else:
            assert float(bound[0]) == pytest.approx(float(results[0][1][j]), rel=1e-12)
            assert ((v.view(4, -1).double() * together[j].double()).sum(1).abs() - (together[j] != 0).any(1).double()
                    ).abs().max() <= 1e4 * torch.finfo(dtype).eps or info[j, INFO["theta"]] == 0  # fmt: skip
