"""The contract of apply_update_: against float64 with the rounding of P's dtype, skips, exponents, threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectral_kernels.kernels.contracts import acc_dtype, counts, sides
from tests.kernels.lists import DTYPES, LAYOUTS, SHAPES, kernel, ragged, served
from tests.kernels.steps import (
    GRADIENTS,
    copies,
    corrections,
    flat_parts,
    gradient,
    matrices,
    pairwise,
    powers,
    same_bits,
    spacing,
    untouched_outside,
)

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
# layout and dtype of P, layout and dtype of M, of G (None: X = M), (beta, alpha), rank of the correction
AHEAD = [(None, None), *zip(GRADIENTS, itertools.cycle(DTYPES), strict=False)]
RATES = [(0.95, 1.0), (0.9, 0.1), (0.0, -1.0)]
RANKS = [0, 1, 4, 7, 16, 40]
FACTORS = (list(SHAPES), list(LAYOUTS), DTYPES, list(LAYOUTS), DTYPES, AHEAD, RATES, RANKS)
PAIRWISE = pairwise(*FACTORS)
CROSS = [  # every list, layout and pair of dtypes; the other options take turns
    (family, layout, dtype, list(LAYOUTS)[i % 6], dtype_m, AHEAD[i % 7], RATES[i // 7 % 3], RANKS[i // 5 % 6])
    for i, (family, layout, dtype, dtype_m) in enumerate(itertools.product(SHAPES, LAYOUTS, DTYPES, DTYPES))
]
NATIVE = [pair for pair in served() if pair[0] != "reference"]


def amounts(N, dtype, device, seed=6):
    """(size, decay) of every matrix, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(N, generator=g, dtype=f64) * 3 * (torch.arange(N) % 5 != 4)
    decay = torch.rand(N, generator=g, dtype=f64) * 0.1 * (torch.arange(N) % 3 != 2)
    return size.to(dtype).to(device), decay.to(device)


def check_against_float64(backend, device, case):
    family, layout, dtype, layout_m, dtype_m, (layout_g, dtype_g), (beta, alpha), r = case
    before, M = ragged(family, layout, dtype, device, seed=2), ragged(family, layout_m, dtype_m, device)
    G = [] if layout_g is None else gradient(family, layout_g, dtype_g, device)
    correction = corrections(M, r) if r else (None, None)
    inputs = [*M, *G, *(correction if r else ())]
    P, sources = copies(before), copies(inputs)
    acc, N = acc_dtype(dtype_m), counts(M)
    size, decay = amounts(N, acc, device)
    scale = powers(N, acc, device)
    kernel("apply_update_", backend, device, dtype_m, 4)(P, M, G, size, scale, decay, None, beta, alpha, *correction, r)
    assert all(same_bits(now, then) for now, then in zip(inputs, sources, strict=True))
    assert all(untouched_outside(p, p0) for p, p0 in zip(P, before, strict=True))
    eps = torch.finfo(acc_dtype(dtype)).eps
    eps_x = max(eps, torch.finfo(acc).eps)
    ahead = matrices(G) if G else ((j, None) for j in itertools.count())
    if r:
        lefts, rights = (flat_parts(x.double(), r, sides(M, dim)) for x, dim in zip(correction, (1, 2), strict=True))
    for (j, p), (_, p0), (_, m), (_, g) in zip(matrices(P), matrices(before), matrices(M), ahead, strict=False):
        kept, pull = (1 - decay[j]) * p0.double(), size[j].double() * scale[j].double()
        x, absolute = m.double(), m.double().abs()
        if G:
            x, absolute = beta * x + alpha * g.double(), beta * absolute + abs(alpha) * g.double().abs()
        exact = kept - pull * x
        # 1 - decay, beta, alpha, G, their products and the sums are rounded to acc, the last sum to P's dtype
        rounding = 3 * eps_x * pull * absolute + 2 * eps * kept.abs()
        if r:  # a sum of r products in any order, and a sum with what is there
            exact = exact + size[j].double() * (lefts[j].mT @ rights[j])
            rounding = rounding + (r + 3) * eps_x * size[j].double() * (lefts[j].abs().mT @ rights[j].abs())
        assert ((p.double() - exact).abs() <= spacing(exact, dtype) / 2 + rounding).all()


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: f"{case[0]}-{case[1]}-{PAIRWISE.index(case)}")
def test_agrees_with_float64(backend, device, case):
    check_against_float64(backend, device, case)


@pytest.mark.full
@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("case", CROSS, ids=lambda case: "-".join(map(str, (*case[:3], case[4]))))
def test_agrees_with_float64_everywhere(backend, device, case):
    check_against_float64(backend, device, case)


def test_pairwise_sample_covers():
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(FACTORS[i], FACTORS[j]))


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_convolution_moves_at_its_own_strides(backend, device, layout):
    """P is the (kh kw, out, in) view of a weight (out, in, kh, kw); M is kept contiguous."""
    fn = kernel("apply_update_", backend, device, f32, 4)
    memory = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    weight = torch.randn(10, 6, 3, 3, device=device).contiguous(memory_format=memory)
    before, M = weight.clone(), torch.randn(9, 10, 6, device=device)
    view = weight.permute(2, 3, 0, 1).view(9, 10, 6) if layout == "contiguous" else weight.as_strided(
        (9, 10, 6), (6, 54, 1)
    )  # fmt: skip
    size, one = torch.rand(9, device=device), torch.ones(9, device=device)
    fn([view], [M], [], size, one, torch.full((9,), 0.5, dtype=f64, device=device), None, 0.9, 1.0)
    for position in range(9):
        exact = 0.5 * before[..., position // 3, position % 3] - size[position] * M[position]
        torch.testing.assert_close(weight[..., position // 3, position % 3], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ahead", "r"), [(False, 0), (True, 0), (False, 7), (True, 1)])
def test_skipped_matrices_stay_to_the_last_bit(backend, device, dtype, ahead, r):
    fn = kernel("apply_update_", backend, device, f32, 4)
    before = ragged("stacks", "transposed", dtype, device)
    before[0][0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0], dtype=dtype)
    M, G = ragged("stacks", "contiguous", f32, device, seed=3), gradient("stacks", "convolution", f32, device)
    M[0][0, 1, 1], G[0][0, 1, 1] = float("nan"), float("inf")
    size, decay = amounts(15, f32, device)
    size[0], decay[6] = float("nan"), 0.5
    correction = [*corrections(M, r), r] if r else []
    if r:
        flat_parts(correction[0], r, sides(M, 1))[0][0, 3] = float("nan")
        flat_parts(correction[1], r, sides(M, 2))[6].fill_(float("inf"))
    skip = torch.zeros(15, dtype=torch.bool, device=device)
    skip[[0, 6, 14]] = True
    scale, P, everything = powers(15, f32, device), copies(before), copies(before)
    fn(everything, M, G if ahead else [], size, scale, decay, None, 0.9, 1.0, *correction)
    fn(P, M, G if ahead else [], size, scale, decay, skip, 0.9, 1.0, *correction)
    for (j, now), (_, then), (_, full) in zip(matrices(P), matrices(before), matrices(everything), strict=True):
        assert same_bits(now, then if skip[j] else full)
        if j not in (0, 14):  # amounts: of 14 size and decay are zero
            assert not torch.equal(then, full)


@pytest.mark.parametrize(("backend", "device"), served())
def test_a_half_precision_parameter_takes_what_rounds_to_nearest(backend, device):
    """bf16 P, fp32 M: 1 + x moves to the next number from half of the distance on, and not before."""
    fn = kernel("apply_update_", backend, device, f32, 4)
    P = [torch.ones(1, 2, 3, dtype=bf16, device=device)]
    next_up = 1 + 2.0**-7
    move = torch.tensor([[0.49, 0.51, 1.49], [-0.26, -0.24, 0.0]], device=device)[None] * 2.0**-7
    one = torch.ones(1, device=device)
    fn(P, [-move], [], one, one, torch.zeros(1, dtype=f64, device=device), None, 0.9, 1.0)
    assert P[0][0].tolist() == [[1.0, next_up, next_up], [1 - 2.0**-8, 1.0, 1.0]]


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("by", [100.0, 2.0**-40])
def test_entries_near_the_smallest_float(backend, device, dtype, ahead, by):
    """scale X is of order 1 where size * scale would be infinite, or size * X zero."""
    fn = kernel("apply_update_", backend, device, f32, 4)
    M = [torch.ldexp(torch.randint(1, 9, (2, 5, 4), device=device).float(), torch.tensor(-126, device=device))]
    scale = torch.tensor([2.0**126, 2.0**120], device=device)
    size = by * torch.tensor([1.0, 64.0], device=device)
    assert torch.isinf(size * scale).all() if by > 1 else not (size[:, None, None] * M[0]).any()
    P = [torch.zeros(2, 5, 4, dtype=dtype, device=device)]
    G = [torch.zeros_like(M[0])] if ahead else []
    fn(P, M, G, size, scale, torch.zeros(2, dtype=f64, device=device), None, 1.0, 1.0)
    exact = -by * torch.ldexp(M[0].double(), torch.tensor(126, device=device))
    assert torch.equal(P[0], exact.to(dtype))


@pytest.mark.parametrize(("backend", "device"), served())
@given(data=st.data())
def test_single_precision_entries_of_any_size(backend, device, data):
    """1 x 1 matrices, each with numbers of its own."""
    fn = kernel("apply_update_", backend, device, f32, 4)
    number = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
    rows = data.draw(st.lists(st.tuples(number, number, st.floats(0, 8, width=32), st.floats(0, 1)), min_size=1))
    p, x, size, decay = (torch.tensor(column, dtype=f64, device=device) for column in zip(*rows, strict=True))
    P, X = [p.to(f32).view(-1, 1, 1)], [x.to(f32).view(-1, 1, 1)]
    fn(P, X, [], size.to(f32), torch.ones(len(rows), device=device), decay, None, 0.9, 1.0)
    exact, terms = (1 - decay) * p - size * x, ((1 - decay) * p).abs() + (size * x).abs()
    smallest = torch.finfo(f32).tiny  # a kernel may flush what is below
    assert ((P[0].flatten().double() - exact).abs() <= 2 * torch.finfo(f32).eps * terms + smallest).all()


@pytest.mark.parametrize(("backend", "device"), served())
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_numbers_that_are_not_finite_stay_where_they_are(backend, device, dtype):
    fn = kernel("apply_update_", backend, device, f32, 4)
    P, M = [torch.zeros(3, 4, 5, dtype=dtype, device=device)], [torch.ones(3, 4, 5, device=device)]
    M[0][1, 2, 3] = float("nan")
    one, none = torch.ones(3, device=device), torch.zeros(3, dtype=f64, device=device)
    size = torch.tensor([1.0, 1.0, float("nan")], device=device)
    fn(P, M, [], size, one, none, None, 0.9, 1.0)
    hit = torch.zeros(3, 4, 5, dtype=torch.bool, device=device)
    hit[1, 2, 3] = hit[2] = True
    assert torch.equal(P[0].isnan(), hit) and (P[0][~hit] == -1).all()


@pytest.mark.parametrize(("backend", "device"), NATIVE)
@pytest.mark.parametrize(("dtype", "dtype_m"), [(f32, f32), (bf16, f32), (bf16, bf16), (f64, f64)])
@pytest.mark.parametrize("r", [0, 7, 16])
def test_same_bits_alone_in_a_list_and_for_any_threads(backend, device, dtype, dtype_m, r):
    fn = kernel("apply_update_", backend, device, dtype_m, 4)
    families = ("odd", "chunks", "stacks", "vectors")
    before = [a for family in families for a in ragged(family, "both strided", dtype, device, seed=2)]
    M = [a for family in families for a in ragged(family, "contiguous", dtype_m, device)]
    G = [a for family in families for a in gradient(family, "transposed", dtype_m, device)]
    acc, N = acc_dtype(dtype_m), counts(M)
    (size, decay), scale = amounts(N, acc, device), powers(N, acc, device)
    correction = corrections(M, r) if r else (None, None)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        P = copies(before)
        fn(P, M, G, size, scale, decay, None, 0.9, 1.0, *correction, r)
        results.append(P)
    for other in results[1:]:
        assert all(same_bits(p, q) for p, q in zip(results[0], other, strict=True))
    sources = [flat_parts(x, r, sides(M, dim)) for x, dim in zip(correction, (1, 2), strict=True)] if r else None
    j = 0
    for i, p in enumerate(before):
        for k in range(p.shape[0]):
            one, own = copies([p[k : k + 1]]), slice(j, j + 1)
            mine = [x[j].flatten() for x in sources] if sources else (None, None)
            moving = ([M[i][k : k + 1]], [G[i][k : k + 1]], size[own], scale[own], decay[own])
            fn(one, *moving, None, 0.9, 1.0, *mine, r)
            assert same_bits(one[0][0], results[0][i][k])
            j += 1
