"""The contract of clipped_step_: the default over the words of every backend, and every kernel of its own."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_kernels.kernels import composites_step, registry
from spectral_kernels.kernels.composites import start_blocks
from spectral_kernels.kernels.contracts import INFO, acc_dtype, counts, sides
from tests.kernels import test_tracked_step as tracked
from tests.kernels.lists import kernel, served
from tests.kernels.steps import blocks_of, copies, matrices, same_bits
from tests.kernels.test_clip import family, floor
from tests.kernels.test_next_block import spectrum
from tests.kernels.test_tracked_step import changes, draw, norms, turning
from tests.matrices import FAMILIES

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
COMPOSITE = [(backend, device, "default") for backend, device in served()]
OWN = [(backend, device, "own") for backend, device in served() if "clipped_step_" in registry.table() and
       backend in registry.table()["clipped_step_"]]  # fmt: skip
ROUTES = [*COMPOSITE, *OWN]
SHAPES = [(2, 40, 30), (1, 130, 64), (1, 20, 9), (1, 12, 3), (3, 50, 1), (1, 1, 7)]


def stepper(backend, device, route, dtype, b=8):
    """The step; the default runs over what serves this backend's device, the reference where a word is missing."""
    if route == "own":
        return kernel("clipped_step_", backend, device, dtype, b)
    kernel("momentum_gram_matvec_", backend, device, dtype, b)
    insist = "reference" if backend == "reference" else None
    return partial(composites_step.clipped_step_, registry.Words(device, dtype, b, insist))


class State:
    """Parameters, momenta, blocks and what they missed, all zero but the blocks, and a step over them."""

    def __init__(self, step, shapes, device="cpu", dtype=f32, dtype_p=None, b=8, P=None, M=None):
        self.fn, self.b, self.t = step, b, 0
        self.M = [torch.zeros(s, dtype=dtype, device=device) for s in shapes] if M is None else M
        self.P = [torch.zeros(s, dtype=dtype_p or f32, device=device) for s in shapes] if P is None else P
        self.V = start_blocks(self.M, b, 0)
        self.scale = torch.zeros(counts(self.M), dtype=self.V.dtype, device=device)
        self.before = torch.full((counts(self.M), 2), -1.0, dtype=f64, device=device)

    def copy(self):
        other = State(self.fn, (), b=self.b, P=copies(self.P), M=copies(self.M))
        other.V, other.scale, other.before = self.V.clone(), self.scale.clone(), self.before.clone()
        other.t = self.t
        return other

    def tensors(self):
        return [*self.P, *self.M, self.V, self.scale, self.before]

    def step(self, G, size=0.1, decay=0.0, *, rank=4, limit=None, skip=None, rates=(0.95, 1.0), nesterov=False,
             propagate=False, r=None, fresh=1, reads=2, tol=0.12, seed=0):  # fmt: skip
        """rank is clamped to min(m, n), as the optimizer clamps it."""
        N, device = counts(self.M), self.V.device
        given = [torch.as_tensor(x, dtype=f64, device=device).expand(N).contiguous() for x in (size, decay)]
        t = torch.as_tensor(self.t, dtype=torch.int64, device=device).expand(N).contiguous()
        most = torch.tensor([min(x) for x in zip(sides(self.M, 1), sides(self.M, 2), strict=True)], device=device)
        rank = torch.minimum(torch.as_tensor(rank, device=device).expand(N), most.clamp(min=1))
        if limit is not None:
            limit = torch.as_tensor(limit, dtype=f64, device=device).expand(N).contiguous()
        inputs = [*G, t, rank, *given, *([] if limit is None else [limit])]
        before = [x.clone() for x in inputs]
        info = self.fn(
            P=self.P, M=self.M, G=G, V=self.V, scale=self.scale, before=self.before, step=t, size=given[0],
            decay=given[1], rank=rank, limit=limit, skip=skip, beta=rates[0], alpha=rates[1], nesterov=nesterov,
            propagate=propagate, b=self.b, r=self.b if r is None else r, fresh=fresh, reads=reads, tol=tol, seed=seed,
        )  # fmt: skip
        assert all(same_bits(x, y) for x, y in zip(inputs, before, strict=True))
        self.t += 1
        return info


def column(info, name):
    return info[:, INFO[name]]


def directions(now, before, size):
    """D of every matrix, float64: (before - now) / size."""
    pairs = zip(matrices(now), matrices(before), strict=True)
    return [(q.double() - p.double()) / size for (_, p), (_, q) in pairs]


def clipped(a, tau):
    """sum of min(sigma_i / tau, 1) u_i v_i', float64."""
    u, s, vt = torch.linalg.svd(a.double(), full_matrices=False)
    return (u * (s / tau).clamp(max=1)) @ vt


def missed(a, v):
    """(I - Q Q') A for an orthonormal basis Q of A V, float64."""
    q, lengths, _ = torch.linalg.svd(a.double() @ v.double().mT, full_matrices=False)
    q = q[:, lengths > 1e-12 * lengths[0]]
    return a.double() - q @ (q.mT @ a.double())


def looked_at(state, G, rates, nesterov):
    return [rates[0] * m.double() + rates[1] * g.double() if nesterov else m.double()
            for m, g in zip(state.M, G, strict=True)]  # fmt: skip


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "nesterov"), [(f32, False), (f32, True), (f64, False), (bf16, True)])
def test_a_first_step_of_many_reads_clips_exactly(backend, device, route, dtype, nesterov):
    """Decaying spectra, ranks 1 to 4 of a block of 8: after 12 reads (4/5)^(2 x 12 x 4) is left of what was outside."""
    shapes = [(4, 60, 40), (2, 40, 90), (1, 25, 5)]
    G = [torch.cat([spectrum(m, n, [10 * 0.8**i for i in range(min(m, n))], f32, device, seed) for seed in range(k)])
         .to(dtype) for k, m, n in shapes]  # fmt: skip
    state = State(stepper(backend, device, route, dtype), shapes, device, dtype, f64)
    rank = torch.tensor([1, 2, 3, 4, 2, 4, 3], device=device)
    info = state.step(G, 0.5, rank=rank, nesterov=nesterov, reads=12, tol=0.0)
    eps = torch.finfo(acc_dtype(dtype)).eps
    X = looked_at(state, G, (0.95, 1.0), nesterov)
    tau = column(info, "tau") / column(info, "scale")
    for (j, x), (_, p) in zip(matrices(X), matrices(state.P), strict=True):
        s = torch.linalg.svdvals(x)
        last, d = s[rank[j] - 1], -p / 0.5
        assert (d - clipped(x, last)).norm() <= 128 * eps * (s[0] / last) ** 2 + 1e-8
        assert float(tau[j]) == pytest.approx(float(last), rel=1e-5)
        assert float(torch.linalg.matrix_norm(d, 2)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("reads", [1, 3])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_the_direction_is_that_of_the_exact_clip_up_to_what_is_missed(backend, device, route, reads, dtype):
    """Every family. Clipping at tau is the projection onto the ball of matrices with norm tau, so it is not expansive:
    ||tau D - clip(M)||_F <= 2 ||(I - QQ') M||_F, and tau is within ||(I - QQ') M||_2 of the s-th value."""
    A = [family(name, 24, dtype, device) for name in FAMILIES]
    state = State(stepper(backend, device, route, dtype), [a.shape for a in A], device, dtype, f64)
    rank = torch.arange(len(A), device=device) % 8 + 1
    info = state.step(A, 1.0, rank=rank, reads=reads, tol=0.0)
    eps = torch.finfo(dtype).eps
    found = directions(state.P, [torch.zeros_like(p) for p in state.P], 1.0)
    for j, (a, d) in enumerate(zip(A, found, strict=True)):
        s = torch.linalg.svdvals(a[0].double())
        tau = column(info, "tau")[j] / column(info, "scale")[j]
        outside = column(info, "outside")[j].sqrt() / column(info, "scale")[j]
        room = 128 * eps * s[0] ** 2 / tau
        assert (tau * d - tau * clipped(a[0], tau)).norm() <= 2 * outside + room
        assert s[rank[j] - 1] - outside - room <= tau <= s[rank[j] - 1] + room
        if s[0] > 1.1 * s[rank[j] - 1]:  # something has been clipped
            assert (tau * d - a[0].double()).norm() > 0.05 * tau


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("dtype", [f32, f64])
@settings(max_examples=20)
@given(data=st.data())
def test_the_norm_of_a_direction_is_bounded_by_what_was_missed(backend, device, route, dtype, data):
    """One read of a cold block: ||D||_2 <= sqrt(1 + (||(I - QQ') M||_2 / tau)^2)."""
    b = data.draw(st.sampled_from([4, 8]))
    values = data.draw(st.lists(st.one_of(st.floats(1e-3, 1.0), st.sampled_from([1.0, 0.5])), min_size=1, max_size=16))
    m, n = (data.draw(st.integers(len(values), 40)) for _ in range(2))
    rank = data.draw(st.integers(1, min(b, m, n)))
    A = [spectrum(m, n, values, dtype, device, data.draw(st.integers(0, 99)))]
    state = State(stepper(backend, device, route, dtype, b), [(1, m, n)], device, dtype, f64, b)
    V = state.V.clone()
    info = state.step(A, 1.0, rank=rank, reads=1)
    tau, eps = float(column(info, "tau") / column(info, "scale")), torch.finfo(dtype).eps
    steep = 256 * eps * (max(values) / tau) ** 2
    if steep > 0.1:  # at the floor: 8 eps (sigma_1 / tau)^2 = 1, only the order is known
        steep = 1.0
    left = float(torch.linalg.matrix_norm(missed(A[0][0], V.view(b, n)), 2))
    assert float(norms(state.P)) <= math.hypot(1, left / tau) + steep


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "nesterov"), [(f32, False), (f32, True), (bf16, False)])
def test_rank_one_is_the_normalized_step(backend, device, route, dtype, nesterov):
    """The same direction as tracked_step_'s; the norms differ by tracked_step_'s own error estimate at most."""
    shapes = SHAPES[:4]
    state = State(stepper(backend, device, route, dtype), shapes, device, dtype, f64)
    other = tracked.State(tracked.stepper(backend, device, "default", dtype, 8), shapes, device, dtype, f64, 8)
    for t, G in enumerate(turning(shapes, 4, device, dtype)):
        before = copies(state.P), copies(other.P)
        info = state.step(G, rank=1, nesterov=nesterov, tol=0.0, reads=2, r=1)
        theirs, _ = other.step(G, nesterov=nesterov, tol=0.0, reads=2)
        assert all(same_bits(x, y) for x, y in zip(state.M, other.M, strict=True))
        sigma, of_theirs = column(info, "sigma"), column(theirs, "sigma")
        assert torch.equal(sigma, column(info, "tau") / column(info, "scale"))
        for j, (d, e) in enumerate(zip(*(directions(x.P, y, 0.1) for x, y in zip((state, other), before, strict=True)),
                                       strict=True)):  # fmt: skip
            torch.testing.assert_close(d * sigma[j], e * of_theirs[j], rtol=1e-5, atol=1e-5 * float(sigma[j]))
        if t > 1:  # both blocks are warm
            assert ((sigma / of_theirs - 1).abs() <= 10 * column(theirs, "error") + 1e-4).all()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("dtype", [f32, f64])
def test_full_rank_is_the_polar_factor(backend, device, route, dtype):
    """s = min(m, n) = b: U V', for any matrix with values above the floor."""
    shapes = [(3, 40, 12), (1, 12, 12), (1, 90, 7), (1, 5, 1)]
    spectra = [[1.0 - 0.07 * i for i in range(12)], [0.8**i for i in range(7)], [2.0]]
    G = [torch.cat([spectrum(m, n, spectra[{12: 0, 7: 1, 1: 2}[n]], dtype, device, j) for j in range(k)])
         for k, m, n in shapes]  # fmt: skip
    state = State(stepper(backend, device, route, dtype, 12), shapes, device, dtype, f64, 12)
    for _ in range(2):
        before = copies(state.P)
        info = state.step(G, 0.3, rank=12)
        assert (column(info, "reads") == 1).all() and (column(info, "done") == 1).all()
        for (_, m), d in zip(matrices(state.M), directions(state.P, before, 0.3), strict=True):
            u, s, vt = torch.linalg.svd(m.double(), full_matrices=False)
            assert (d - u @ vt).norm() <= 128 * torch.finfo(dtype).eps * (s[0] / s[-1]) ** 2


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("dtype", [f32, f64])
def test_momentum_of_lower_rank_than_s(backend, device, route, dtype):
    """tau stops at sqrt(8 eps) sigma_1: the two values there are become 1, and the rest stays rounding."""
    G = [spectrum(60, 40, [5.0, 0.1], dtype, device)]
    state = State(stepper(backend, device, route, dtype), [(1, 60, 40)], device, dtype, f64)
    for t in range(3):
        before = copies(state.P)
        info = state.step(G, 1.0, rank=6, rates=(0.0, 1.0))
        tau = float(column(info, "tau") / column(info, "scale"))
        assert tau == pytest.approx(floor(dtype) * 5, rel=1e-3)
        s = torch.linalg.svdvals(directions(state.P, before, 1.0)[0])
        # entries of M have the rounding eps sigma_1, divided by tau: sqrt(eps / 8); what tracks it is no larger
        assert (s[:2] - 1).abs().max() <= 16 * math.sqrt(torch.finfo(dtype).eps) * (10 if t == 0 else 1)
        assert s[2] <= 64 * math.sqrt(torch.finfo(dtype).eps)
        v = state.V.view(8, 40).double()
        assert (v @ v.mT - torch.eye(8, device=device)).abs().max() <= 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
def test_nothing_to_apply(backend, device, route):
    """Zero gradient, zero momentum: P only decays, block, scale and `before` stay; then a step like any other."""
    state = State(stepper(backend, device, route, f32), SHAPES, device, P=draw(SHAPES, 3, device))
    zeros = [torch.zeros(s, device=device) for s in SHAPES]
    before = state.copy()
    info = state.step(zeros, decay=0.25)
    assert all(torch.equal(p, 0.75 * q) for p, q in zip(state.P, before.P, strict=True))
    assert all(same_bits(getattr(state, name), getattr(before, name)) for name in ("V", "scale", "before"))
    assert not any(column(info, name).any() for name in ("tau", "sigma", "error", "outside", "beyond"))
    state.step(draw(SHAPES, 1, device))
    before = state.copy()
    state.step(zeros, reads=12, tol=0.0)  # the momentum alone
    assert ((changes(state.P, before.P) - 0.1).abs() <= 1e-3).all()
    assert all(torch.isfinite(x).all() for x in state.tensors())


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-12])  # read at scale 1, and once more at another scale
def test_skipped_and_bad_matrices(backend, device, route, nesterov, size):
    """Skipped: all stays. Bad: P stays, the momentum takes what is finite, the flags say so."""
    state = State(stepper(backend, device, route, f32), [(6, 40, 30)], device, P=draw([(6, 40, 30)], 3, device))
    state.step([size * g for g in draw([(6, 40, 30)], 1, device)])
    state.scale.fill_(1.0)
    before, clean = state.copy(), state.copy()
    skip = torch.tensor([False, True, False, False, False, True], device=device)
    G = [size * g for g in draw([(6, 40, 30)], 2, device)]
    usable = [G[0].clone()]
    for (matrix, row, entry), x in {(1, 0, 0): math.nan, (2, 3, 4): math.nan, (3, 39, 29): -math.inf}.items():
        G[0][matrix, row, entry], usable[0][matrix, row, entry] = x, 0.0
    options = dict(decay=0.5, skip=skip, nesterov=nesterov)
    truth, info = clean.step(usable, **options), state.step(G, **options)
    for j in range(6):
        same_p, same = before if j in (1, 2, 3, 5) else clean, before if skip[j] else clean
        assert same_bits(state.P[0][j], same_p.P[0][j]) and same_bits(state.M[0][j], same.M[0][j])
        assert same_bits(*(blocks_of(x.V, 8, x.M)[j] for x in (state, same)))
        assert same_bits(state.scale[j], same.scale[j]) and same_bits(state.before[j], same.before[j])
    assert column(info, "nan").tolist() == [0, 0, 1, 0, 0, 0] and column(info, "inf").tolist() == [0, 0, 0, 1, 0, 0]
    assert not column(info, "reads")[skip].any() and not column(info, "tau")[skip].any()
    assert torch.equal(column(info, "tau"), column(truth, "tau"))
    assert not same_bits(clean.P[0][0], before.P[0][0]) and not same_bits(clean.M[0][2], before.M[0][2])


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagated_entries_reach_the_parameter(backend, device, route, bad):
    state = State(stepper(backend, device, route, f32), [(3, 40, 30)], device, P=draw([(3, 40, 30)], 3, device))
    clean, start = state.copy(), state.copy()
    G = draw([(3, 40, 30)], 1, device)
    clean.step(G, propagate=True)
    G[0][1, 2, 3] = bad
    info = state.step(G, propagate=True)
    assert state.P[0][1].isnan().all() and torch.isfinite(state.M[0]).logical_not().sum() == 1
    for j in (0, 2):
        assert same_bits(state.P[0][j], clean.P[0][j]) and same_bits(state.before[j], clean.before[j])
    assert column(info, "nan" if math.isnan(bad) else "inf").tolist() == [0, 1, 0]
    assert not torch.isfinite(column(info, "sigma")[1]) and same_bits(state.before[1], start.before[1])
    blocks = zip(blocks_of(state.V, 8, state.M), blocks_of(start.V, 8, state.M), strict=True)
    assert [same_bits(v, w) for v, w in blocks] == [False, True, False]


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("exponent", [-30, 30, -37])
def test_entries_of_any_size_have_the_same_direction(backend, device, route, dtype, exponent):
    """A first step, then one at another size: the scale follows, with a repeated read."""
    fn, shapes = stepper(backend, device, route, dtype), SHAPES[:4]
    state, plain = State(fn, shapes, device, dtype), State(fn, shapes, device, dtype)
    for factor in (10.0**exponent, 1.0, 10.0**exponent):
        power = 2.0 ** round(math.log2(factor))
        G = draw(shapes, 1, device, dtype)
        before, of_plain = copies(state.P), copies(plain.P)
        info = state.step([power * g for g in G], reads=2, tol=0.0, rates=(0.0, 1.0))
        plain.step(G, reads=2, tol=0.0, rates=(0.0, 1.0))
        for d, e in zip(directions(state.P, before, 0.1), directions(plain.P, of_plain, 0.1), strict=True):
            assert (d - e).norm() <= (1e-3 if factor == 10.0**-37 else 1e-4) * e.norm()
        assert all(torch.isfinite(x).all() for x in state.tensors())
        tau, (mantissa, _) = column(info, "tau") / column(info, "scale"), torch.frexp(state.scale)
        assert (mantissa == 0.5).all() and torch.equal(state.scale.double(), column(info, "scale"))
        assert (tau > 0).all() and torch.isfinite(tau).all() and (column(info, "reads")[:4] == 3).all()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("by", [-80, 7, 80])
def test_powers_of_two_leave_the_update(backend, device, route, by):
    """G, M and the limits times 2^by, the scale of the last read with them: the same bits in P, V and before."""
    fn, G = stepper(backend, device, route, f32), draw(SHAPES, 1, device)
    one, other = State(fn, SHAPES, device), State(fn, SHAPES, device)
    one.scale.fill_(1.0), other.scale.fill_(2.0**-by)
    for limit in (None, 3.0):
        info = one.step(G, limit=limit)
        info2 = other.step([g * 2.0**by for g in G], limit=None if limit is None else limit * 2.0**by)
        assert all(same_bits(p, q) for p, q in zip(one.P, other.P, strict=True))
        assert same_bits(one.V, other.V) and same_bits(one.before, other.before)
        assert torch.equal(column(info, "tau"), column(info2, "tau"))


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "nesterov", "rates"), [
    (f32, False, (0.95, 1.0)), (f32, True, (0.9, 0.1)), (bf16, False, (0.95, 1.0))])  # fmt: skip
def test_a_turning_momentum_and_a_spike_stay_bounded(backend, device, route, dtype, nesterov, rates):
    """The guard at work: ||D||_2 within 1.1, also where a rank-one term of 40 times the gradient's norm comes in."""
    shapes = [(3, 60, 40), (2, 90, 70), (1, 30, 8)]
    state = State(stepper(backend, device, route, dtype, 16), shapes, device, dtype, f64, 16)
    reads = []
    for t, G in enumerate(turning(shapes, 12, device, dtype)):
        if t == 9:
            for i, (g, u, v) in enumerate(zip(G, draw(shapes, 51, device), draw(shapes, 52, device), strict=True)):
                spike = u[..., :1] @ v[..., :1, :]
                by = torch.linalg.matrix_norm(g.float(), keepdim=True) / torch.linalg.matrix_norm(spike, keepdim=True)
                G[i] = (g + 40 * by * spike).to(dtype)
        before = copies(state.P)
        info = state.step(G, rank=8, nesterov=nesterov, rates=rates)
        X = looked_at(state, G, rates, nesterov)
        found = directions(state.P, before, 0.1)
        reads.append(column(info, "reads"))
        if t >= 4:
            for (j, x), d in zip(matrices(X), found, strict=True):
                assert 0.999 <= torch.linalg.matrix_norm(d, 2) <= 1.1, t
                tau = column(info, "tau")[j] / column(info, "scale")[j]
                assert (d - clipped(x, tau)).norm() <= 0.2 * d.norm()
        eye = torch.eye(16, device=device)
        assert all((v @ v.mT - eye[: len(v)]).abs().max() <= 1e-5 for v in blocks_of(state.V.double(), 16, state.M)[:5])
    assert all(((count == 1) | (count == 2)).all() for count in reads) and (torch.stack(reads) == 1).any()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("limit", [0.5, 3.0, 1e3])
def test_a_limit(backend, device, route, limit):
    """P moves by what a threshold leaves, over the threshold; where more than b values exceed it, over the b-th."""
    state = State(stepper(backend, device, route, f32), SHAPES, device, dtype_p=f64)
    G = draw(SHAPES, 1, device)
    info = state.step(G, 1.0, limit=limit, reads=12, tol=0.0, fresh=0)
    tau = column(info, "tau") / column(info, "scale")
    for (j, g), d in zip(matrices(G), directions(state.P, [torch.zeros_like(p) for p in state.P], 1.0), strict=True):
        s = torch.linalg.svdvals(g.double())
        more = int((s > limit).sum()) > 8 and min(g.shape) > 8
        assert column(info, "beyond")[j] == more
        if more:
            assert limit < tau[j] <= s[7] * (1 + 1e-5)
        else:
            assert float(tau[j]) == pytest.approx(max(limit, floor(f32) * float(s[0])), rel=1e-6)
        outside = column(info, "outside")[j].sqrt() / column(info, "scale")[j]
        assert (tau[j] * d - tau[j] * clipped(g, tau[j])).norm() <= 2 * outside + 1e-3 * s[0]
        if limit == 1e3:  # nothing is clipped
            assert (tau[j] * d - g.double()).norm() <= 1e-5 * g.double().norm()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_reads_are_counted(backend, device, route, nesterov):
    """tol = 0: all of them, but where the block fills the space; a repeated first read is one more."""
    state = State(stepper(backend, device, route, f32), [(1, 60, 50), (1, 60, 8), (1, 60, 50)], device)
    state.scale.fill_(1.0)
    G = draw([(1, 60, 50), (1, 60, 8)], 1, device)
    G.append(G[0] * 1e-12)
    for reads in (1, 2, 3):
        info = state.copy().step(G, reads=reads, tol=0.0, nesterov=nesterov)
        assert column(info, "reads").tolist() == [reads, 1, reads + 1]
    info = state.copy().step(G, reads=9, tol=1e9, nesterov=nesterov)
    assert column(info, "reads").tolist() == [1, 1, 2] and (column(info, "done") == 1).all()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "dtype_p", "dtype_g"), [(f32, bf16, bf16), (bf16, bf16, f32), (f32, f16, f16),
                                                          (f64, f64, f64), (f64, f32, f32)])  # fmt: skip
def test_mixed_dtypes_strides_and_decay(backend, device, route, dtype, dtype_p, dtype_g):
    """M contiguous, P and G as convolutions are stored; P is rounded once, whatever it held."""
    P = [draw([(24, 16, 9)], 3, device, dtype_p)[0].movedim(-1, 0)]
    G = [draw([(24, 9, 16)], 4, device, dtype_g)[0].movedim(1, 0)]
    state = State(stepper(backend, device, route, dtype), [(9, 24, 16)], device, dtype, P=P)
    wide = State(state.fn, [(9, 24, 16)], device, dtype, f64)  # the same direction, not rounded
    before = copies(P)
    state.step(G, 0.5, 0.1)
    wide.step(G, 0.5, 0.1)
    exact = 0.9 * before[0].double() + wide.P[0]
    eps = max(torch.finfo(dtype_p).eps / 2, 4 * torch.finfo(f32).eps if dtype != f64 else 1e-15)
    assert ((P[0].double() - exact).abs() <= 1.01 * eps * exact.abs() + 8 * torch.finfo(f32).eps).all()
    assert torch.equal(state.M[0], G[0].to(dtype)) and state.V.dtype == acc_dtype(dtype)
    assert float(norms(wide.P).min()) >= 0.499  # and it is a direction of norm 0.5


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
def test_empty_and_narrow_matrices(backend, device, route):
    """A block wider than the matrix has zero rows; empty matrices have nothing."""
    fn, shapes = stepper(backend, device, route, f32), [(2, 0, 5), (1, 5, 0), (0, 3, 4), (2, 6, 5), (1, 9, 1)]
    state, alone = State(fn, shapes, device), State(fn, shapes[3:], device)
    for G in (draw(shapes, 1, device), draw(shapes, 2, device)):
        before = copies(alone.P)
        info = state.step(G, rank=5)
        alone.step(G[3:], rank=5)
        assert not column(info, "tau")[:3].any()
        for p, q in zip(state.P[3:], alone.P, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        for d, v in zip(directions(alone.P, before, 0.1), blocks_of(alone.V.double(), 8, alone.M), strict=True):
            assert (torch.linalg.svdvals(d) - 1).abs().max() <= 1e-2  # full rank: the polar factor
            rows = torch.diag((torch.arange(8, device=device) < v.shape[1]).double())
            assert (v @ v.mT - rows).abs().max() <= 1e-5


@pytest.mark.parametrize(("backend", "device", "route"), COMPOSITE)
def test_a_parameter_of_many_matrices_stays_as_a_whole(backend, device, route):
    fn, shape = stepper(backend, device, route, f32), (6, 20, 10)
    owner = torch.tensor([0, 0, 1, 1, 1, 2], device=device)
    state, apart = State(partial(fn, owner=owner), [shape], device), State(fn, [shape], device)
    G = draw([shape], 1, device)
    G[0][3, 2, 2] = math.nan
    for each in (state, apart):
        each.step(G)
    still = torch.tensor([False, False, True, True, True, False], device=device)
    assert not state.P[0][still].any() and torch.equal(state.P[0][~still], apart.P[0][~still])
    assert apart.P[0].flatten(1).any(1).tolist() == [True, True, True, False, True, True]
    assert same_bits(state.M[0], apart.M[0]) and same_bits(state.V, apart.V)


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "nesterov"), [(f32, False), (bf16, True)])
def test_same_numbers_alone_again_and_for_any_threads(backend, device, route, dtype, nesterov):
    """The same bits run to run and, from native kernels, alone, in a list and for any number of threads."""
    fn = stepper(backend, device, route, dtype)
    shapes = [*SHAPES, (1, 300, 200)]
    Gs, start = list(turning(shapes, 3, device, dtype)), draw(shapes, 3, device)

    def run(threads, pick=None):
        torch.set_num_threads(threads)
        stacks = range(len(shapes)) if pick is None else [pick]
        state = State(fn, [shapes[i] for i in stacks], device, dtype, P=copies([start[i] for i in stacks]))
        out = [state.step([G[i] for i in stacks], decay=0.01, nesterov=nesterov) for G in Gs]
        return state, out[-1]

    state, info = run(1)
    native = backend != "reference" and "clip_" in registry.table() and backend in registry.table()["clip_"]
    for threads in (1, 2, 3) if native else (1,):
        again, info_again = run(threads)
        pairs = zip((*state.tensors(), info), (*again.tensors(), info_again), strict=True)
        assert all(same_bits(x, y) for x, y in pairs)
    first = 0
    for i, (k, _, _) in enumerate(shapes):
        alone, info_alone = run(1, i)
        mine = slice(first, first + k)
        first += k
        if native:
            v = torch.cat([x.flatten() for x in blocks_of(state.V, 8, state.M)[mine]])
            pairs = [(alone.P[0], state.P[i]), (alone.M[0], state.M[i]), (alone.V, v), (info_alone, info[mine]),
                     (alone.before, state.before[mine])]  # fmt: skip
            assert all(same_bits(x, y) for x, y in pairs)
        else:
            assert (alone.P[0] - state.P[i]).norm() <= 1e-2 * state.P[i].norm()
            torch.testing.assert_close(column(info_alone, "tau"), column(info[mine], "tau"), rtol=1e-3, atol=0)


class HostReads(TorchDispatchMode):
    """Collects what makes the host wait for a number: .item(), bool(), shapes that depend on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self.WAITS):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "device", "route"), COMPOSITE)
@pytest.mark.parametrize(("limit", "propagate"), [(None, False), (2.0, True)])
def test_the_host_asks_for_nothing(backend, device, route, limit, propagate):
    """What a captured graph needs: no number comes to the host, whatever the matrices hold."""
    fn = stepper(backend, device, route, f32)
    state, G = State(fn, SHAPES[2:4], device), draw(SHAPES[2:4], 1, device)
    N = counts(state.M)
    given = [torch.full((N,), 0.1, dtype=f64, device=device) for _ in range(3)]
    step, rank = (torch.ones(N, dtype=torch.int64, device=device) for _ in range(2))
    skip, owner = torch.zeros(N, dtype=torch.bool, device=device), torch.arange(N, device=device)
    of_step = (step, *given[:2], rank, None if limit is None else given[2], skip, 0.9, 1.0)
    for nesterov in (False, True):
        args = (state.P, state.M, G, state.V, state.scale, state.before, *of_step, nesterov, propagate)
        with HostReads() as reads:
            fn(*args, 8, 4, 1, 2, 0.1, 0, owner=owner)
        assert reads.seen == []
    with HostReads() as reads:  # the detector itself
        assert bool(state.P[0].any()) and reads.seen


def test_on_tensors_without_numbers():
    """On the meta device whatever depends on data raises."""
    fn = partial(composites_step.clipped_step_, registry.Words("meta", f32, 8, "reference"))
    P, M, G = ([torch.empty(s, device="meta") for s in SHAPES[:3]] for _ in range(3))
    N, total = counts(M), 8 * sum(sides(M, 2))
    numbers = partial(torch.empty, device="meta", dtype=f64)
    scale, V = torch.empty(N, device="meta"), torch.empty(total, device="meta")
    step, rank = (torch.empty(N, dtype=torch.int64, device="meta") for _ in range(2))
    skip = torch.empty(N, dtype=torch.bool, device="meta")
    for nesterov in (False, True):
        info = fn(P, M, G, V, scale, numbers(N, 2), step, numbers(N), numbers(N), rank, numbers(N), skip, 0.9, 1.0,
                  nesterov, False, 8, 4, 1, 2, 0.1, 0)  # fmt: skip
        assert info.shape == (N, len(INFO)) and info.device.type == "meta"


@pytest.mark.parametrize("word", ["momentum_gram_matvec_", "tracked_step_", "clipped_step_"])
def test_native_words_refuse_blocks_and_numbers_of_another_size(word):
    """What does not fit would be read beyond its end."""
    kernel(word, "cpu", "cpu", torch.float32, 4)
    op = getattr(torch.ops.spectral_kernels, word).default
    M, G, P = ([torch.randn(2, 12, 9)] for _ in range(3))
    moved, one, zero = (None, 0.9, 1.0, False), torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)

    def call(b, count=2):
        V, scale = torch.zeros(2 * 4 * 9), torch.ones(count)
        if word == "momentum_gram_matvec_":
            return op(M, G, V, scale, *moved, True, False, b)
        if word == "tracked_step_":
            return op(P, M, G, V, scale, zero, one, one, *moved, False, False, b, 1, 2, 0.1, 1, 0)
        before = torch.zeros(2, 2, dtype=torch.float64)
        return op(P, M, G, V, scale, before, zero, one, one, zero + 1, None, *moved, False, b, 2, 1, 2, 0.1, 0)

    call(4)
    with pytest.raises(RuntimeError, match="V holds 72 numbers, blocks of 8 columns have 144"):
        call(8)
    with pytest.raises(RuntimeError, match="1 numbers for 2 matrices"):
        call(4, count=1)
