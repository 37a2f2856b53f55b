"""The contracts of momentum_gram_matvec_ and momentum_norms_: against float64, flags, what must not change."""

from __future__ import annotations

import itertools

import pytest
import torch

from spectral_kernels.kernels.contracts import NORMS, STATS, acc_dtype, counts, sides
from tests.kernels.lists import DTYPES, LAYOUTS, SHAPES, flat_block, kernel, ones, ragged, served
from tests.kernels.steps import (
    GRADIENTS,
    blocks_of,
    copies,
    flat_parts,
    gradient,
    matrices,
    pairwise,
    powers,
    same_bits,
    spacing,
    untouched_outside,
)

WIDTHS = [1, 3, 4, 8]
RATES = [(0.95, 1.0), (0.9, 0.1), (0.0, -1.0), (0.8, -0.5)]  # (beta, alpha)
# of G, its dtype, rates, nesterov, update, with_y
OPTIONS = (GRADIENTS, DTYPES, RATES, [False, True], [True, False], [True, False])
PAIRWISE = pairwise(list(SHAPES), list(LAYOUTS), DTYPES, WIDTHS, *map(list, OPTIONS))
CROSS = [  # every list, layout, dtype and width; the other options take turns
    (*case, *(list(option)[(i // 7 + i) % len(option)] for option in OPTIONS))
    for i, case in enumerate(itertools.product(SHAPES, LAYOUTS, DTYPES, WIDTHS))
]
NATIVE = [pair for pair in served() if pair[0] != "reference"]
BOTH = ["momentum_gram_matvec_", "momentum_norms_"]
LOW = [torch.bfloat16, torch.float16]
f32, f64 = torch.float32, torch.float64


def call(word, backend, device, M, G, V, scale, b=4, *, skip=None, rates=(0.9, 1.0), nesterov=False, update=True,
         propagate=False, with_y=True):  # fmt: skip
    """Either word: (W, S, Y, stats) or (norms,)."""
    fn = kernel(word, backend, device, M[0].dtype, b)
    options = (skip, *rates, nesterov, update, propagate)
    if word == "momentum_norms_":
        return (fn(M, G, scale, *options),)
    W, S, stats, Y = fn(M, G, V, scale, *options, b, with_y)
    return W, S, Y, stats


def by_matrix(out, b, M):
    """One sequence per output, with one entry per matrix."""
    if len(out) == 1:
        return out
    W, S, Y, stats = out
    return blocks_of(W, b, M), S, flat_parts(Y, b, sides(M, 1)), stats


def stats_of(word, out):
    return out[-1]  # the first columns of norms are those of stats


def test_the_first_columns_of_norms_are_stats():
    assert list(NORMS)[:4] == list(STATS) and [NORMS[name] for name in STATS] == list(STATS.values())


def moved(m, g, rates, dtype):
    """(beta m + alpha g in float64, bound of the rounding in acc, less that to dtype): entries and rates are rounded
    to acc (half an eps each), then two products and a sum."""
    (beta, alpha), eps = rates, torch.finfo(acc_dtype(dtype)).eps
    old, new = beta * m.double(), alpha * g.double()
    return old + new, 2 * eps * (old.abs() + new.abs())


def check_against_float64(backend, device, case):
    family, layout, dtype, b, of_gradient, dtype_g, rates, nesterov, update, with_y = case
    before = ragged(family, layout, dtype, device)
    G = gradient(family, of_gradient, dtype_g, device)
    G_before = copies(G)
    V, scale, eps = flat_block(before, b), powers(counts(before), acc_dtype(dtype), device), None
    eps = torch.finfo(V.dtype).eps
    V_before, scale_before = V.clone(), scale.clone()
    for word in BOTH:
        M = copies(before)
        options = dict(rates=rates, nesterov=nesterov, update=update, with_y=with_y)
        out = call(word, backend, device, M, G, V, scale, b, **options)
        inputs = zip([*G, V, scale], [*G_before, V_before, scale_before], strict=True)
        assert all(same_bits(now, then) for now, then in inputs)
        for m, m0, g in zip(M, before, G, strict=True):
            assert untouched_outside(m, m0)
            if not update:
                assert same_bits(m, m0)
                continue
            exact, rounding = moved(m0, g, rates, dtype)
            half = spacing(exact, dtype) / 2 if dtype in LOW else 0  # of float32 and float64: in `rounding`
            assert ((m.double() - exact).abs() <= half + rounding).all()
        W, S, Y, stats = out if word == BOTH[0] else (None, None, None, out[0])
        assert all(x.dtype == f64 for x in (S, stats) if x is not None) and (W is None or W.dtype == V.dtype)
        if W is not None:
            W_parts = blocks_of(W, b, M)
            V_parts = blocks_of(V.double(), b, M)
            assert Y.dtype == V.dtype and Y.shape == (b * sum(sides(M, 1)) * with_y,)
            Y_parts = flat_parts(Y, b, sides(M, 1)) if with_y else []
        for (j, m), (_, g) in zip(matrices(M), matrices(G), strict=True):
            stored, slack = m.double(), torch.zeros((), dtype=f64)
            if nesterov:
                stored, slack = moved(m, g, rates, dtype)
            x = scale[j].double() * stored  # a power of two: exact
            # sums of m (n) products, partial sums of at most 256: see test_gram_matvec.py; a look-ahead has rounding
            # of its own
            if W is not None:
                y = x @ V_parts[j].mT
                w, s = (x.mT @ y).mT, y.mT @ y
                assert (W_parts[j] - w).norm() <= 64 * eps * (1 + w.norm())
                assert (S[j] - s).norm() <= 64 * eps * (1 + s.norm())
                assert not with_y or (Y_parts[j] - y.mT).norm() <= 32 * eps * (1 + y.norm())
            square = x.square()
            assert abs(stats[j, STATS["frob2"]] - square.sum()) <= 32 * eps * square.sum()
            largest = stored.abs().max() if x.numel() else 0.0
            assert abs(stats[j, STATS["amax"]] - largest) <= (slack.max() if slack.numel() else 0)
            assert stats[j, STATS["nan"]] == stats[j, STATS["inf"]] == 0
            if W is None:
                longest = square.sum(1).amax() if x.numel() else 0.0
                assert abs(stats[j, NORMS["row2"]] - longest) <= 32 * eps * longest


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: f"{case[0]}-{case[1]}-{PAIRWISE.index(case)}")
def test_agrees_with_float64(backend, device, case):
    check_against_float64(backend, device, case)


@pytest.mark.full
@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, case[:4])))
def test_agrees_with_float64_everywhere(backend, device, case):
    check_against_float64(backend, device, case)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("b", [16, 24, 80])
@pytest.mark.parametrize("with_y", [False, True])
def test_wide_blocks(backend, device, b, with_y):
    """Wider than the columns that one pass over a matrix may take."""
    for turn, dtype in enumerate((f32, f64, torch.bfloat16)):
        for family in ("odd", "stacks"):
            case = (family, "contiguous", dtype, b, "transposed", f32, RATES[turn], turn == 1, True, with_y)
            check_against_float64(backend, device, case)


def test_pairwise_sample_covers():
    factors = [list(SHAPES), list(LAYOUTS), DTYPES, WIDTHS, *map(list, OPTIONS)]
    for i, j in itertools.combinations(range(len(factors)), 2):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(factors[i], factors[j]))


def stacks(dtype, device, layout="contiguous", dtype_g=None):
    return ragged("stacks", layout, dtype, device), gradient("stacks", "convolution", dtype_g or dtype, device)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", BOTH)
def test_a_look_ahead_is_read_but_not_stored(backend, device, dtype, word):
    before, G = stacks(dtype, device)
    V, scale = flat_block(before, 4), ones(before)
    plain, ahead = copies(before), copies(before)
    seen = call(word, backend, device, plain, G, V, scale)
    seen_ahead = call(word, backend, device, ahead, G, V, scale, nesterov=True)
    assert all(same_bits(x, y) for x, y in zip(plain, ahead, strict=True))
    assert (stats_of(word, seen)[:, 0] != stats_of(word, seen_ahead)[:, 0]).all()
    # a second read without an update sees what the first saw
    for M, nesterov, first in ((plain, False, seen), (ahead, True, seen_ahead)):
        again = call(word, backend, device, M, G, V, scale, nesterov=nesterov, update=False)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(same_bits(x, y) for x, y in zip(plain, ahead, strict=True))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", BOTH)
def test_without_memory_the_momentum_is_the_gradient(backend, device, dtype, word):
    M, G = stacks(dtype, device)
    call(word, backend, device, M, G, flat_block(M, 4), ones(M), rates=(0.0, 1.0))
    assert all(torch.equal(m, g) for m, g in zip(M, G, strict=True))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("word", BOTH)
def test_skipped_matrices_stay_and_give_zeros(backend, device, dtype, nesterov, word):
    before, G = stacks(dtype, device, "transposed")
    V, scale = flat_block(before, 4), ones(before)
    all_moved = copies(before)
    everything = call(word, backend, device, all_moved, G, V, scale, nesterov=nesterov)
    skip = torch.zeros(15, dtype=torch.bool, device=device)
    skip[[0, 6, 14]] = True
    before[0][0, 2, 3] = float("nan")  # not even looked at
    G[0] = G[0].clone()
    G[0][0] = float("inf")
    M = copies(before)
    out = call(word, backend, device, M, G, V, scale, skip=skip, nesterov=nesterov)
    for (j, now), (_, then), (_, full) in zip(matrices(M), matrices(before), matrices(all_moved), strict=True):
        assert same_bits(now, then if skip[j] else full)
    for parts, of_all in zip(by_matrix(out, 4, M), by_matrix(everything, 4, M), strict=True):
        for j, (part, of_full) in enumerate(zip(parts, of_all, strict=True)):
            assert not part.any() if skip[j] else torch.equal(part, of_full)


def spoiled(dtype, device, layout):
    """(M, G, the same without the spoiled entries, NaN flags, inf flags) for beta = 1, alpha = 1."""
    M, G = stacks(dtype, device, layout)
    G = [g.clone() for g in G]
    top = torch.finfo(dtype).max
    nan, inf = float("nan"), float("inf")
    entries = [  # matrix, row, column, entry of M, entry of G
        (1, 3, 39, 2.0, nan),
        (3, 23, 0, 1.0, -inf),
        (7, 129, 63, -1.0, inf),  # both in one matrix
        (7, 5, 5, 0.5, nan),
        (9, 0, 0, top, top / 2),  # overflows
        (10, 7, 7, -top, -top / 2),
        (14, 2, 1, top, spacing(torch.tensor(top, dtype=f64), dtype).item() * 0.75),  # overflows by rounding
    ]
    where = [(i, k) for i, m in enumerate(M) for k in range(m.shape[0])]
    M_clean, G_clean = copies(M), [g.clone() for g in G]
    for j, row, column, m, g in entries:
        i, k = where[j]
        M[i][k, row, column], G[i][k, row, column] = m, g
        # an entry of G that is not finite counts as zero; so does one of the new momentum
        M_clean[i][k, row, column], G_clean[i][k, row, column] = 0.0 if j >= 9 else m, 0.0
    return M, G, M_clean, G_clean, [1, 7], [3, 7, 9, 10, 14]


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("word", "layout", "nesterov"), [
    (BOTH[0], "contiguous", False), (BOTH[0], "transposed", False), (BOTH[0], "both strided", True),
    (BOTH[1], "contiguous", False), (BOTH[1], "transposed", True)])  # fmt: skip
def test_entries_that_are_not_finite_count_as_zero(backend, device, dtype, word, layout, nesterov):
    M, G, M_clean, G_clean, nan, inf = spoiled(dtype, device, layout)
    V, scale = flat_block(M, 4), ones(M)
    options = dict(rates=(1.0, 1.0), nesterov=nesterov)
    truth = call(word, backend, device, M_clean, G_clean, V, scale, **options)
    out = call(word, backend, device, M, G, V, scale, **options)
    flags = [stats_of(word, out)[:, STATS[name]].nonzero().flatten().tolist() for name in ("nan", "inf")]
    assert flags == [nan, inf]
    for m, clean in zip(M, M_clean, strict=True):
        assert torch.isfinite(m).all() and same_bits(m, clean)
    if nesterov:  # the look-ahead adds G once more where the momentum overflowed: not what zeros in G give
        same = [j for j in range(15) if j not in (9, 10, 14)]
    else:
        same = list(range(15))
    free_of_flags = [c for c in range(stats_of(word, out).shape[1]) if c not in (STATS["nan"], STATS["inf"])]
    out, truth = ((*x[:-1], x[-1][:, free_of_flags]) for x in (out, truth))
    for x, y in zip(by_matrix(out, 4, M), by_matrix(truth, 4, M), strict=True):
        assert all(torch.equal(x[j], y[j]) for j in same)
    if not nesterov:  # with it the large entries of G are still there, and their squares overflow acc
        assert all(torch.isfinite(x).all() for x in out)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, torch.bfloat16])
@pytest.mark.parametrize("word", BOTH)
def test_a_look_ahead_that_overflows_counts_as_zero(backend, device, dtype, word):
    """0.9 (0.9 M + G) + G is too large where 0.9 M + G is not."""
    M, G = [torch.zeros(2, 6, 5, dtype=dtype, device=device)], [torch.zeros(2, 6, 5, dtype=dtype, device=device)]
    G[0][0, 1, 2] = 0.75 * torch.finfo(f32).max
    G[0][0, 2, 2] = 3.0
    V, scale = flat_block(M, 4), ones(M)
    out = call(word, backend, device, M, G, V, scale, nesterov=True)
    assert torch.equal(M[0], G[0])
    stats = stats_of(word, out)
    assert stats[:, STATS["inf"]].tolist() == [1, 0] and stats[:, STATS["nan"]].tolist() == [0, 0]
    assert float(stats[0, STATS["amax"]]) == pytest.approx(5.7, rel=1e-6)  # 1.9 * 3, in acc
    assert all(torch.isfinite(x).all() for x in out)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("word", BOTH)
def test_propagated_entries_enter_the_momentum_as_in_torch(backend, device, dtype, nesterov, word):
    M, G, M_clean, G_clean, nan, inf = spoiled(dtype, device, "contiguous")
    V, scale = flat_block(M, 4), ones(M)
    options = dict(rates=(1.0, 1.0), nesterov=nesterov, propagate=True)
    truth = call(word, backend, device, M_clean, G_clean, V, scale, **options)
    torches = [torch.nn.Parameter(torch.zeros_like(m)) for m in M]
    sgd = torch.optim.SGD(torches, lr=1.0, momentum=1.0)
    for p, m, g in zip(torches, M, G, strict=True):
        sgd.state[p]["momentum_buffer"] = m.clone()
        p.grad = g.clone()
    sgd.step()
    out = call(word, backend, device, M, G, V, scale, **options)
    stats = stats_of(word, out)
    for name, hit in (("nan", nan), ("inf", inf)):  # what overflows by rounding to a half precision is infinite, too
        assert stats[:, STATS[name]].nonzero().flatten().tolist() == hit
    for m, p in zip(M, torches, strict=True):
        buffer = sgd.state[p]["momentum_buffer"]
        assert torch.equal(m.isnan(), buffer.isnan()) and torch.equal(m.isinf(), buffer.isinf())
        assert torch.equal(m.nan_to_num().sign(), buffer.nan_to_num().sign())
    for (j, m), (_, clean) in zip(matrices(M), matrices(M_clean), strict=True):
        if j not in (*nan, *inf):
            assert same_bits(m, clean) and torch.equal(stats[j], stats_of(word, truth)[j])


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16])
@pytest.mark.parametrize("word", BOTH)
@pytest.mark.parametrize("by", [-60, 60])
def test_powers_of_two_are_exact(backend, device, dtype, word, by):
    M, G = stacks(dtype, device)
    V, scale = flat_block(M, 4), ones(M)
    M2, G2 = [m * 2.0**by for m in M], [g * 2.0**by for g in G]
    out = call(word, backend, device, M, G, V, scale, nesterov=True)
    out2 = call(word, backend, device, M2, G2, V, scale * 2.0**-by, nesterov=True)
    out[-1][:, STATS["amax"]] *= 2.0**by  # unscaled
    assert all(torch.equal(m * 2.0**by, m2) for m, m2 in zip(M, M2, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(out, out2, strict=True))


@pytest.mark.parametrize(("backend", "device"), NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", BOTH)
def test_same_bits_alone_in_a_list_and_for_any_threads(backend, device, dtype, word):
    families = [("odd", "contiguous"), ("chunks", "convolution"), ("stacks", "channels last"), ("vectors", "expanded")]
    before = [a for family, _ in families for a in ragged(family, "contiguous", dtype, device)]
    G = [g for family, layout in families for g in gradient(family, layout, f32, device)]
    V, scale = flat_block(before, 4), powers(counts(before), acc_dtype(dtype), device)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        M = copies(before)
        results.append((*call(word, backend, device, M, G, V, scale, nesterov=True), *M))
    for other in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True))
    together, M = by_matrix(results[0][: -len(before)], 4, before), results[0][-len(before) :]
    parts = blocks_of(V, 4, before)
    where = [(i, k) for i, m in enumerate(before) for k in range(m.shape[0])]
    for j, (i, k) in enumerate(where):
        one = copies([before[i][k : k + 1]])
        alone = call(word, backend, device, one, [G[i][k : k + 1]], parts[j].flatten(), scale[j : j + 1], nesterov=True)
        assert same_bits(one[0][0], M[i][k])
        for x, y in zip(by_matrix(alone, 4, one), together, strict=True):
            assert same_bits(x[0], y[j])
