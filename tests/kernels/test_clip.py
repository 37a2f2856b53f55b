"""The contract of clip_: triplets, correction, error, next block, over every kernel; against float64 from A and V."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_kernels.kernels import composites, reference
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, NEW_ENERGY, STATS, acc_dtype, counts, sides
from tests.kernels.lists import kernel, served
from tests.kernels.steps import blocks_of, flat_parts, matrices, same_bits
from tests.kernels.test_next_block import SEED, draws, orthonormal, spectrum
from tests.matrices import FAMILIES, make

NATIVE = [pair for pair in served() if pair[0] != "reference"]
f32, f64 = torch.float32, torch.float64
SET = ("sigma", "theta", "trace", "columns", "error", "done", "tau", "outside", "beyond")
STATE = ("V", "L", "R", "info", "before")


def floor(dtype):
    """The contract's smallest tau, in units of sigma_1."""
    return math.sqrt(8 * torch.finfo(acc_dtype(dtype)).eps)


def read(A, b, V=None, scale=None, before=(-1.0, -1.0)):
    """What clip_ is given after one read of A: block, products, info, a state with nothing of it right yet."""
    device, N, acc = A[0].device, counts(A), acc_dtype(A[0].dtype)
    V = composites.start_blocks(A, b, 0) if V is None else V.clone()
    scale = torch.ones(N, dtype=acc, device=device) if scale is None else scale.to(acc)
    W, S, stats, Y = reference.gram_matvec(A, V, scale, None, b, True, True)
    info = torch.full((N, INFO_COLUMNS), 0.125, dtype=f64, device=device)
    info[:, INFO["done"]], info[:, INFO["tau"]], info[:, INFO["scale"]] = 0, 0, scale.double()
    info[:, INFO["frob2"]], info[:, INFO["amax"]] = stats[:, STATS["frob2"]], stats[:, STATS["amax"]]
    of_before = torch.as_tensor(before, dtype=f64, device=device).expand(N, 2).clone()
    return dict(V=V, W=W, S=S, Y=Y, info=info, scale=scale, before=of_before)


def clip(fn, A, given, rank=1, limit=None, r=None, fresh=0, tol=0.0, steps=0, seed=SEED):
    """clip_ of a read, which stays as it is: {V, L, R, info, before} after the call."""
    N, device, b = counts(A), A[0].device, given["S"].shape[1]
    r = b if r is None else r
    m, n = sides(A, 1), sides(A, 2)
    state = {name: given[name].clone() for name in ("V", "info", "before")}
    for name, side in (("L", m), ("R", n)):
        state[name] = given[name].clone() if name in given else given["V"].new_full((r * sum(side),), 7.0)
    rank, step = (torch.as_tensor(x, dtype=torch.int64, device=device).expand(N).contiguous() for x in (rank, steps))
    if limit is not None:
        limit = torch.as_tensor(limit, dtype=f64, device=device).expand(N).contiguous()
    inputs = [given[name] for name in ("W", "S", "Y", "scale")] + [rank, step] + ([] if limit is None else [limit])
    copies = [x.clone() for x in inputs]
    fn(m, n, *(state[name] for name in ("V", "L", "R", "info")), *inputs[:4], rank, limit, state["before"], step, b, r,
       fresh, tol, seed)  # fmt: skip
    assert all(same_bits(x, y) for x, y in zip(inputs, copies, strict=True))
    kept = [c for name, c in INFO.items() if name not in SET]
    assert same_bits(state["info"][:, kept], given["info"][:, kept])
    return state


def column(state, name):
    return state["info"][:, INFO[name]]


def low_rank(state, A):
    """L'R of every matrix, float64."""
    r = state["L"].numel() // max(sum(sides(A, 1)), 1)
    lefts, rights = (flat_parts(state[x].double(), r, sides(A, dim)) for x, dim in (("L", 1), ("R", 2)))
    return [left.mT @ right for left, right in zip(lefts, rights, strict=True)]


def family(name, size, dtype, device, seed=0):
    """(1, m, n), n the shorter side."""
    A = make(name, size, seed).A
    return (A if A.shape[0] >= A.shape[1] else A.mT.contiguous())[None].to(dtype).to(device)


def reached(a, v):
    """(sigma (b,), their left and right vectors as columns, eigenvalues of S (b,)) of what rows v reach; float64."""
    b = v.shape[0]
    y = a @ v.mT
    q, lengths, _ = torch.linalg.svd(y, full_matrices=False)
    q = q[:, lengths > 1e-12 * lengths[0]]
    u, s, vt = torch.linalg.svd(q.mT @ a, full_matrices=False)
    sigma, lam = a.new_zeros(b), a.new_zeros(b)
    sigma[: len(s)], lam[: len(lengths)] = s, lengths.square()
    return sigma, q @ u, vt.mT, lam


def expected(a, v, before, rank, limit=None, r=None):
    """The contract in float64, from matrix and block alone."""
    b, frob2 = v.shape[0], a.square().sum()
    sigma, u, vectors, lam = reached(a, v)
    beyond, tau = False, sigma[rank - 1]
    if limit is not None:
        beyond = bool(sigma[-1] > limit) and b < min(a.shape)
        tau = sigma[-1] if beyond else a.new_tensor(limit)
    outside = frob2 - sigma.square().sum()
    clipped = sigma >= tau * (1 - 1e-12)
    gap = float((sigma - lam.sqrt())[clipped].max()) / tau if clipped.any() else 0.0
    known = 0.0 if min(before) < 0 else min(before[0], before[1] * frob2 / tau**2)
    excess = (sigma - tau).clamp(min=0)[: b if r is None else r][: u.shape[1]]
    return dict(
        sigma=sigma[0], theta=sigma[0] ** 2, trace=sigma.square().sum(), tau=tau, outside=outside, beyond=float(beyond),
        error=max(gap, 0.0) + NEW_ENERGY * max(outside / tau**2 - known, 0.0), columns=b,
        low_rank=(u[:, : len(excess)] * excess) @ vectors[:, : len(excess)].mT, vectors=vectors,
        before=(outside / tau**2, outside / frob2),
    )  # fmt: skip


def check(A, given, state, wanted, dtype, scale=None):
    """Everything but the next block. One eps of every product, and what is divided by tau squared grows with it."""
    eps = torch.finfo(dtype).eps
    for j, (w, lr) in enumerate(zip(wanted, low_rank(state, A), strict=True)):
        top, tau, frob2 = float(w["sigma"]), float(w["tau"]), float(given["info"][j, INFO["frob2"]])
        # a row of W has the rounding eps sigma_1^2; the i-th vector is made of it divided by sigma_i squared. The
        # decompositions of b x b matrices in float64 come on top
        steep = (16 * eps + 128 * torch.finfo(f64).eps) * (top / tau) ** 2
        assert (lr - w["low_rank"]).norm() <= steep * tau, j
        unscaled = 1.0 if scale is None else float(scale[j])
        assert unscaled * float(column(state, "sigma")[j]) == pytest.approx(top, abs=steep * tau)
        assert float(column(state, "tau")[j]) == pytest.approx(tau, abs=steep * tau)
        for name in ("theta", "trace"):
            assert float(column(state, name)[j]) == pytest.approx(float(w[name]), abs=32 * eps * frob2), name
        assert float(column(state, "outside")[j]) == pytest.approx(max(float(w["outside"]), 0), abs=32 * eps * frob2)
        loose = steep * (1 + frob2 / top**2)
        assert float(column(state, "error")[j]) == pytest.approx(float(w["error"]), abs=loose)
        assert float(state["before"][j, 0]) == pytest.approx(max(float(w["before"][0]), 0), abs=loose)
        assert float(state["before"][j, 1]) == pytest.approx(max(float(w["before"][1]), 0), abs=32 * eps)
        assert float(column(state, "columns")[j]) == w["columns"]
        assert float(column(state, "beyond")[j]) == w["beyond"]


SHAPES = [(60, 40), (40, 60), (150, 33)]
BEFORE = [(-1.0, -1.0), (0.3, 0.02), (5.0, 0.9), (-1.0, 0.1), (0.0, 0.0)]


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("b", [1, 3, 8, 20])
@pytest.mark.parametrize("start", ["random", "one step behind"])
def test_triplets_of_what_the_block_reaches(backend, device, dtype, b, start):
    """Ranks from 1 to b, every entry of `before`: sigma, tau, correction and error from A and the block alone."""
    fn = kernel("clip_", backend, device, dtype, b)
    decay = [10 * 0.9**i for i in range(30)]
    A = [torch.cat([spectrum(m, n, decay, dtype, device, seed) for seed in range(4)]) for m, n in SHAPES]
    given = read(A, b)
    if start != "random":  # rows of A'A V, orthonormal: the next block
        given = read(A, b, clip(fn, A, given)["V"])
    N = counts(A)
    given["before"] = torch.tensor([BEFORE[j % 5] for j in range(N)], dtype=f64, device=device)
    rank = [1 + j % b for j in range(N)]
    state = clip(fn, A, given, rank)
    blocks = blocks_of(given["V"].double(), b, A)
    wanted = [expected(a.double(), blocks[j], BEFORE[j % 5], rank[j]) for j, a in matrices(A)]
    check(A, given, state, wanted, dtype)
    # the block of the next read: the same vectors, and the correction ends at r
    assert all((v @ v.mT - torch.eye(b, device=device)).abs().max() <= 20 * torch.finfo(dtype).eps
               for v in blocks_of(state["V"].double(), b, A))  # fmt: skip
    if b > 2:
        short = clip(fn, A, given, b, r=2)
        wanted = [expected(a.double(), blocks[j], BEFORE[j % 5], b, r=2) for j, a in matrices(A)]
        check(A, given, short, wanted, dtype)


def full_block(name, dtype, device):
    """A matrix whose shorter side is at most 12."""
    edges = {
        "condition 1e12": lambda: spectrum(20, 12, [10.0**-i for i in range(13)][:12], dtype, device),
        "rank 3 of 12": lambda: spectrum(30, 12, [3.0, 2.0, 1.0], dtype, device),
        "pairs": lambda: spectrum(14, 10, [4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25], dtype, device),
        "one column": lambda: spectrum(50, 1, [2.0], dtype, device),
        "one entry": lambda: spectrum(1, 1, [2.0], dtype, device),
        "near the floor": lambda: spectrum(40, 12, [1.0, *(floor(dtype) * x for x in (4, 2, 1.01, 0.99, 0.5))], dtype,
                                           device),
    }  # fmt: skip
    return edges[name]() if name in edges else family(name, 12, dtype, device)


EDGES = ["condition 1e12", "rank 3 of 12", "pairs", "one column", "one entry", "near the floor"]


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("name", [*FAMILIES, *EDGES])
def test_a_block_that_covers_everything_clips_exactly(backend, device, dtype, name):
    """A - L'R has the singular values min(sigma, tau), tau = sigma_rank or the floor, for any rank and width."""
    eps = torch.finfo(dtype).eps
    a = full_block(name, dtype, device)
    n = a.shape[2]
    exact = torch.linalg.svdvals(a[0].double())
    for b in (n, n + 3):
        fn = kernel("clip_", backend, device, dtype, b)
        A = [a.repeat(n, 1, 1)]
        given = read(A, b)
        for _ in range(2):  # the second time from its own block
            state = clip(fn, A, given, torch.arange(1, n + 1))
            for rank, ((_, x), lr) in enumerate(zip(matrices(A), low_rank(state, A), strict=True), 1):
                tau = max(float(exact[rank - 1]), floor(dtype) * float(exact[0]))
                # see check; at the floor this is half of tau. And the decompositions of b x b matrices in float64
                room = 4 * eps * float(exact[0]) ** 2 / tau + 32 * torch.finfo(f64).eps * float(exact[0])
                assert float(column(state, "tau")[rank - 1]) == pytest.approx(tau, abs=room)
                left = torch.linalg.svdvals(x.double() - lr)
                assert (left - exact.clamp(max=tau)).abs().max() <= room, (b, rank)
            assert (column(state, "done") == 1).all()  # nothing is left to read
            eye = torch.diag((torch.arange(b, device=device) < n).double())
            for v in blocks_of(state["V"].double(), b, A):
                assert (v @ v.mT - eye).abs().max() <= 20 * eps
            given = read(A, b, state["V"])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("b", [4, 12])
def test_a_limit_is_a_value_of_the_unscaled_matrix(backend, device, dtype, b):
    """Below the last value of the block, between its values, above all of them; a block of all values serves any."""
    fn = kernel("clip_", backend, device, dtype, b)
    decay = [8 * 0.85**i for i in range(24)]
    limits = [0.5, 3.0, 6.5, 100.0, 0.01, 5.0]
    A = [spectrum(50, 30, decay, dtype, device), spectrum(40, 4, decay[:4], dtype, device)]
    A = [a.repeat(6, 1, 1) for a in A]
    scale = torch.tensor([2.0 ** (i - 6) for i in range(12)], device=device)
    leading = torch.linalg.svd(A[0][0].double())[2][:b].flatten().repeat(6)
    V = torch.cat((leading.to(dtype), composites.start_blocks(A[1:], b, 0)))
    given = read(A, b, V, scale)
    state = clip(fn, A, given, b, limits * 2)
    wanted = []
    for (j, a), v in zip(matrices(A), blocks_of(V.double(), b, A), strict=True):
        by = scale[j].double()
        wanted.append(expected(by * a.double(), v, (-1.0, -1.0), b, float(limits[j % 6] * by)))
    check(A, given, state, wanted, dtype, scale)
    # 24 values: the last of the block is 4.9 or 1.3
    few = [1, 1, 0, 0, 1, 0] if b == 4 else [1, 0, 0, 0, 1, 0]
    assert column(state, "beyond").tolist() == [*few, 0, 0, 0, 0, 0, 0]
    assert not any(low_rank(state, A)[j].any() for j in (3, 9))  # nothing exceeds the limit


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(("b", "fresh"), [(1, 0), (1, 1), (4, 1), (4, 4), (8, 2), (20, 3)])
def test_rows_of_the_next_block(backend, device, dtype, b, fresh):
    """The leading right vectors in descending order, then the draws of next_block_."""
    fn = kernel("clip_", backend, device, dtype, b)
    decay = [10 * 0.8**i for i in range(30)]
    A = [spectrum(m, n, decay, dtype, device, seed) for seed, (m, n) in enumerate([(40, 30), (90, 200), (30, 40)])]
    given, steps, kept = read(A, b), [0, 7, 1 << 40], b - fresh
    state = clip(fn, A, given, fresh=fresh, steps=steps)
    eps = torch.finfo(dtype).eps
    for (j, a), v0, v in zip(matrices(A), *(blocks_of(x["V"].double(), b, A) for x in (given, state)), strict=True):
        assert (v @ v.mT - torch.eye(b, device=device)).abs().max() <= 20 * eps
        sigma, _, vectors, _ = reached(a.double(), v0)
        # eigenvectors of a matrix known to eps sigma_1^2: divided by the gap to the next one
        square = sigma.square()
        gaps = (square[:-1] - square[1:]).tolist() + [float(square[-1])]
        for i in range(kept):
            gap = min(gaps[max(i - 1, 0) : i + 1])
            assert abs(vectors[:, i] @ v[i]) >= 1 - 64 * eps - (64 * eps * float(square[0]) / gap) ** 2
        fresh_rows = orthonormal(draws(*a.shape, b, steps[j], device), list(v[:kept]))[:fresh]
        assert len(fresh_rows) == fresh and (fresh == 0 or (fresh_rows - v[kept:]).abs().max() <= 200 * eps)
    other = clip(fn, A, given, fresh=fresh, steps=[0, 8, 1 << 40], seed=SEED)
    reseeded = clip(fn, A, given, fresh=fresh, steps=steps, seed=SEED + 1)
    for name in ("L", "R", "info", "before"):
        assert same_bits(state[name], other[name]) and same_bits(state[name], reseeded[name])
    blocks = zip(*(blocks_of(x["V"], b, A) for x in (state, other, reseeded)), strict=True)
    for j, (v, at_other_step, of_other_seed) in enumerate(blocks):
        assert same_bits(v[:kept], at_other_step[:kept]) and same_bits(v[:kept], of_other_seed[:kept])
        assert same_bits(v, at_other_step) == (j != 1 or fresh == 0) and same_bits(v, of_other_seed) == (fresh == 0)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_rows_that_are_missing_are_random(backend, device, dtype):
    """Rank 2, fresh = 1: two right vectors, then draws; never zero while the matrix has columns."""
    fn = kernel("clip_", backend, device, dtype, 6)
    A, eps = [spectrum(40, 30, [3.0, 2.0], dtype, device)], torch.finfo(dtype).eps
    found = [clip(fn, A, read(A, 6), fresh=1, steps=step)["V"].view(6, 30).double() for step in (0, 1)]
    right = torch.linalg.svd(A[0][0].double())[2][:2]
    for step, v in enumerate(found):
        assert (v @ v.mT - torch.eye(6, device=device)).abs().max() <= 20 * eps
        assert ((v[:2] * right).sum(1).abs() >= 1 - 1e3 * eps).all()
        assert (orthonormal(draws(40, 30, 6, step, device), list(v[:2]))[:4] - v[2:]).abs().max() <= 1e3 * eps
    assert not torch.equal(found[0][2:], found[1][2:])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@settings(max_examples=25)
@given(data=st.data())
def test_the_next_block_is_orthonormal_for_any_spectrum(backend, device, dtype, data):
    """Nearly equal, tiny and missing values in any order; and what is clipped is bounded by what was missed."""
    b = data.draw(st.sampled_from([1, 4, 9]))
    fn = kernel("clip_", backend, device, dtype, b)
    values = data.draw(st.lists(st.one_of(st.floats(1e-9, 1.0), st.sampled_from([1.0, 0.5, 1e-4])), min_size=1,
                                max_size=14))  # fmt: skip
    m, n = (data.draw(st.integers(len(values), 40)) for _ in range(2))
    rank, fresh = data.draw(st.integers(1, b)), data.draw(st.integers(0, min(2, b)))
    A = [spectrum(m, n, values, dtype, device, data.draw(st.integers(0, 99)))]
    given = read(A, b)
    state = clip(fn, A, given, rank, fresh=fresh)
    eye, eps = torch.diag((torch.arange(b, device=device) < n).double()), torch.finfo(dtype).eps
    v, a = state["V"].view(b, n).double(), A[0][0].double()
    assert (v @ v.mT - eye).abs().max() <= 20 * eps
    tau, top = float(column(state, "tau")), float(torch.linalg.matrix_norm(a, 2))
    outside = column(state, "outside").sqrt()
    bound = torch.hypot(torch.tensor(tau, dtype=f64), outside.cpu())
    assert torch.linalg.matrix_norm(a - low_rank(state, A)[0], 2).cpu() <= bound + 256 * eps * top**2 / tau


def moderate(dtype, device, count=6):
    return [
        torch.cat([spectrum(40, 30, [10 * 0.8**i for i in range(20)], dtype, device, seed) for seed in range(count)])
    ]


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_a_block_that_sees_nothing_is_drawn_anew(backend, device, dtype):
    """All columns of the block are zeros of A: the next read starts from random ones."""
    fn = kernel("clip_", backend, device, dtype, 4)
    A = [torch.randn(2, 40, 30, dtype=dtype, device=device)]
    A[0][0, :, :10] = 0
    V = composites.start_blocks(A, 4, 0).view(2, 4, 30)
    V[0, :, 10:] = 0
    V[0, :, :10] = torch.linalg.qr(V[0, :, :10].mT).Q.mT
    given = read(A, 4, V.reshape(-1))
    found = clip(fn, A, given, fresh=0)
    block = found["V"].view(2, 4, 30)[0].double()
    torch.testing.assert_close(block @ block.mT, torch.eye(4, dtype=f64, device=device), rtol=0, atol=1e-5)
    assert float(block[:, 10:].norm()) > 0.5
    assert column(found, "error").tolist()[0] == math.inf and column(found, "done").tolist() == [0, 0]
    assert column(found, "tau").tolist()[0] == 0 and column(found, "tau").tolist()[1] > 0
    assert same_bits(found["before"][0], given["before"][0])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_matrices_without_a_result_keep_their_state(backend, device, dtype):
    """Not finite products, zero products, done before: everything to the last bit; neighbours as ever."""
    fn, A = kernel("clip_", backend, device, dtype, 4), moderate(dtype, device, 8)
    given = read(A, 4, before=(0.5, 0.25))
    r = 3
    whole = clip(fn, A, given, 3, r=r)
    spoiled = {name: x.clone() for name, x in given.items()}
    W, Y = blocks_of(spoiled["W"], 4, A), flat_parts(spoiled["Y"], 4, sides(A, 1))
    W[1][2, 3], W[2][0, 0] = math.nan, math.inf
    spoiled["S"][3], Y[3][:] = math.nan, math.nan
    spoiled["S"][4, 1, 1] = math.inf
    W[5][:], Y[5][:], spoiled["S"][5] = 0, 0, 0
    spoiled["info"][5, INFO["frob2"]] = 0
    spoiled["info"][6, INFO["done"]] = 1
    for name, side in (("L", 40), ("R", 30)):
        spoiled[name] = torch.randn(r * 8 * side, dtype=dtype, device=device)
    state = clip(fn, A, spoiled, 3, r=r)
    for j in range(8):
        kept = j not in (0, 7)
        then = spoiled if kept else whole
        mine = slice(j, j + 1)
        assert same_bits(state["before"][mine], then["before"][mine])
        assert same_bits(blocks_of(state["V"], 4, A)[j], blocks_of(then["V"], 4, A)[j])
        if kept:
            assert all(
                same_bits(*(flat_parts(x[name], r, sides(A, dim))[j] for x in (state, then)))
                for name, dim in (("L", 1), ("R", 2))
            )
            assert column(state, "tau")[j] == 0
            assert j != 6 or same_bits(state["info"][mine], then["info"][mine])
        else:
            assert same_bits(state["info"][mine], then["info"][mine])
            assert same_bits(low_rank(state, A)[j], low_rank(whole, A)[j]) and column(state, "tau")[j] > 0


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
def test_a_matrix_is_done_where_its_error_is_within_the_tolerance(backend, device, dtype):
    fn, A = kernel("clip_", backend, device, dtype, 4), moderate(dtype, device)
    given = read(A, 4)
    error = column(clip(fn, A, given, 2), "error")
    assert (error > 0.01).all()
    order = error.sort().values
    tol = float(order[2] + order[3]) / 2
    state = clip(fn, A, given, 2, tol=tol)
    assert torch.equal(column(state, "done") == 1, error <= tol) and 0 < int(column(state, "done").sum()) < 6
    again = clip(fn, A, {**given, **{name: state[name] for name in ("V", "info", "before", "L", "R")}}, 2, tol=1e9)
    assert (column(again, "done") == 1).all()


@pytest.mark.parametrize(("backend", "device"), served())
def test_no_room_for_a_correction(backend, device):
    """rank 1 needs none: r = 0, and everything else as with room for it."""
    fn, A = kernel("clip_", backend, device, f32, 4), moderate(f32, device)
    given = read(A, 4)
    none, some = clip(fn, A, given, 1, r=0), clip(fn, A, given, 1, r=4)
    assert not none["L"].numel() and not none["R"].numel() and not any(x.any() for x in low_rank(some, A))
    assert all(same_bits(none[name], some[name]) for name in ("V", "info", "before"))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("by", [-100, -10, 10, 100])
def test_powers_of_two_are_exact(backend, device, dtype, by):
    """A times 2^by, read at 2^-by: the same bits; read at another scale: L carries it."""
    fn, A = kernel("clip_", backend, device, dtype, 4), moderate(dtype, device)
    plain = clip(fn, A, read(A, 4), 2, limit=[3.0] * 6, tol=0.5)
    scale = torch.full((6,), 2.0**-by, dtype=dtype, device=device)
    larger = clip(fn, [a * 2.0**by for a in A], read([a * 2.0**by for a in A], 4, scale=scale), 2,
                  limit=[3.0 * 2.0**by] * 6, tol=0.5)  # fmt: skip
    assert all(same_bits(plain[name], larger[name]) for name in ("V", "L", "R", "before"))
    assert torch.equal(column(plain, "sigma") * 2.0**by, column(larger, "sigma"))
    for name in SET[1:]:
        assert torch.equal(column(plain, name), column(larger, name)), name
    if abs(by) == 10:
        read_larger = clip(fn, A, read(A, 4, scale=scale), 2, limit=[3.0] * 6, tol=0.5)
        assert all(same_bits(plain[name], read_larger[name]) for name in ("V", "R", "before"))
        assert torch.equal(plain["L"] * 2.0**-by, read_larger["L"])
        assert torch.equal(column(plain, "tau") * 2.0**-by, column(read_larger, "tau"))
        assert torch.equal(column(plain, "sigma"), column(read_larger, "sigma"))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("b", [4, 20])
def test_neighbours_and_place_have_no_say(backend, device, dtype, b):
    """Alone and in a list: the same bits from native kernels, the same to rounding from the reference's batches."""
    fn = kernel("clip_", backend, device, dtype, b)
    decay = [10 * 0.8**i for i in range(20)]
    A = [spectrum(m, n, decay, dtype, device, seed) for seed, (m, n) in enumerate([(40, 30)] * 3 + [(20, 90)])]
    A += [torch.randn(1, 60, 3, dtype=dtype, device=device), spectrum(300, 200, decay, dtype, device)]
    A[0] = torch.cat((A[0], A[1] * 0.5, torch.zeros_like(A[0])))
    given, N = read(A, b), counts(A)
    rank = [1 + j % 4 for j in range(N)]
    results, native = [], (backend, device) in NATIVE
    for threads in (1, 2, 3) if native else (1,):
        torch.set_num_threads(threads)
        results.append(clip(fn, A, given, rank, fresh=1, steps=2, r=4))
    assert all(same_bits(results[0][name], other[name]) for other in results[1:] for name in STATE)
    of_read = {name: flat_parts(given[name], b, sides(A, dim)) for name, dim in (("V", 2), ("W", 2), ("Y", 1))}
    together = {"V": blocks_of(results[0]["V"], b, A)} | {
        name: flat_parts(results[0][name], 4, sides(A, dim)) for name, dim in (("L", 1), ("R", 2))
    }
    for j, a in matrices(A):
        mine = slice(j, j + 1)
        one = {name: parts[j].flatten() for name, parts in of_read.items()}
        one |= {name: given[name][mine].clone() for name in ("S", "info", "scale", "before")}
        alone = clip(fn, [a[None]], one, rank[j], fresh=1, steps=2, r=4)
        if native:
            assert all(same_bits(alone[name], results[0][name][mine]) for name in ("info", "before"))
            assert all(same_bits(alone[name], parts[j].flatten()) for name, parts in together.items())
        else:
            torch.testing.assert_close(alone["info"][0], results[0]["info"][j], rtol=1e-4, atol=1e-4)
            lr = low_rank(results[0], A)[j]
            assert (low_rank(alone, [a[None]])[0] - lr).norm() <= 1e3 * torch.finfo(dtype).eps * (1 + a.norm())
