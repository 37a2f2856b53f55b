"""The contract of tracked_step_: every kernel of its own, and the default over the words of every backend."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_kernels.kernels import composites_step, registry
from spectral_kernels.kernels.composites import start_blocks
from spectral_kernels.kernels.contracts import INFO, acc_dtype, counts, sides
from tests.kernels.lists import kernel, served
from tests.kernels.steps import blocks_of, copies, matrices, same_bits

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
COMPOSITE = [(backend, device, "default") for backend, device in served()]
ROUTES = [*COMPOSITE, *((backend, device, "own") for backend, device in served() if backend != "reference")]
NATIVE = [route for route in ROUTES if route[0] != "reference"]
SHAPES = [(2, 40, 30), (1, 130, 64), (1, 20, 9), (1, 12, 3), (3, 50, 1), (1, 1, 7)]


def stepper(backend, device, route, dtype, b=4):
    """The step, all of its arguments named; skips where a backend lacks one of the words."""
    if route == "own":
        return kernel("tracked_step_", backend, device, dtype, b)
    for word in ("gram_matvec", "rayleigh_ritz_", "momentum_gram_matvec_", "apply_update_", "next_block_"):
        kernel(word, backend, device, dtype, b)
    return partial(composites_step.tracked_step_, registry.Words(device, dtype, b, backend))


class State:
    """Parameters, momenta and blocks of a list, all of them zero but the blocks, and a step over them."""

    def __init__(self, step, shapes, device="cpu", dtype=f32, dtype_p=None, b=4, P=None, M=None):
        self.fn, self.b, self.t = step, b, 0
        self.M = [torch.zeros(s, dtype=dtype, device=device) for s in shapes] if M is None else M
        self.P = [torch.zeros(s, dtype=dtype_p or f32, device=device) for s in shapes] if P is None else P
        self.V = start_blocks(self.M, b, 0)
        self.scale = torch.zeros(counts(self.M), dtype=self.V.dtype, device=device)

    def copy(self):
        other = State(self.fn, (), b=self.b, P=copies(self.P), M=copies(self.M) or [])
        other.V, other.scale, other.t = self.V.clone(), self.scale.clone(), self.t
        return other

    def tensors(self):
        return [*self.P, *self.M, self.V, self.scale]

    def step(self, G, size=0.1, decay=0.0, *, skip=None, rates=(0.95, 1.0), nesterov=False, propagate=False,
             upper=False, fresh=1, reads=2, tol=0.1, min_reads=1, seed=0):  # fmt: skip
        N, device = counts(self.M), self.V.device
        given = [torch.as_tensor(x, dtype=f64, device=device).expand(N).contiguous() for x in (size, decay)]
        t = torch.as_tensor(self.t, dtype=torch.int64, device=device).expand(N).contiguous()
        before = [x.clone() for x in (*G, t, *given)]
        out = self.fn(
            P=self.P, M=self.M, G=G, V=self.V, scale=self.scale, step=t, size=given[0], decay=given[1], skip=skip,
            beta=rates[0], alpha=rates[1], nesterov=nesterov, propagate=propagate, upper=upper, b=self.b, fresh=fresh,
            reads=reads, tol=tol, min_reads=min_reads, seed=seed,
        )  # fmt: skip
        assert all(same_bits(x, y) for x, y in zip((*G, t, *given), before, strict=True))
        self.t += 1
        return out


def draw(shapes, seed, device="cpu", dtype=f32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]


def norms(A):
    return torch.cat([torch.linalg.matrix_norm(a.double(), 2) for a in A])


def changes(now, before):
    return norms([p.double() - q.double() for p, q in zip(now, before, strict=True)])


def turning(shapes, steps, device="cpu", dtype=f32, turn=0.05, noise=0.3):
    """Gradients whose leading directions turn slowly, under noise: lists for `steps` steps."""
    one, other = draw(shapes, 1, device), draw(shapes, 2, device)
    outer = [[x[..., :1] @ y[..., :1, :] * 2 for x, y in zip(a, a, strict=True)] for a in (one, other)]
    for t in range(steps):
        fuzz = draw(shapes, 100 + t, device)
        c, s = math.cos(turn * t), math.sin(turn * t)
        parts = zip(*outer, one, fuzz, strict=True)
        yield [(c * x + s * y + noise * (z + w)).to(dtype) for x, y, z, w in parts]


def columns(info, *names):
    return [info[:, INFO[name]] for name in names]


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "nesterov", "b", "rates"), [
    (f32, False, 4, (0.95, 1.0)), (f32, True, 8, (0.9, 0.1)), (bf16, False, 4, (0.9, 1.0)), (f64, False, 4, (0.0, 1.0)),
    (f32, False, 1, (0.9, -1.0)), (f16, True, 3, (0.9, 0.1))])  # fmt: skip
def test_follows_a_slowly_turning_momentum(backend, device, route, dtype, nesterov, b, rates):
    """30 steps: never above the exact norm of what is applied beyond rounding, close below in the end."""
    state = State(stepper(backend, device, route, dtype, b), SHAPES, device, dtype, f64, b)
    N = counts(state.M)
    size = torch.linspace(0.05, 0.4, N, dtype=f64, device=device)
    for t, G in enumerate(turning(SHAPES, 30, device, dtype)):
        before, old = copies(state.P), copies(state.M)
        info, bound = state.step(G, size, rates=rates, nesterov=nesterov, fresh=min(1, b - 1), tol=0.02)
        expected = [rates[0] * m.double() + rates[1] * g.double() for m, g in zip(old, G, strict=True)]
        eps = torch.finfo(dtype).eps
        assert all((m - x).abs().max() <= 2 * eps * x.abs().max() for m, x in zip(state.M, expected, strict=True))
        X = state.M
        if nesterov:
            X = [rates[0] * m.double() + rates[1] * g.double() for m, g in zip(state.M, G, strict=True)]
        exact, (sigma, reads) = norms(X), columns(info, "sigma", "reads")
        assert (sigma <= exact * (1 + 1e-5)).all() and (exact * (1 - 1e-6) <= bound).all()
        # two reads of a cold start leave more, one column most of all
        assert (sigma >= (0.99 if t == 29 else 0.8 if b > 1 else 0.3) * exact).all()
        assert (bound <= torch.cat([torch.linalg.matrix_norm(x.double()) for x in X]) * (1 + 1e-5)).all()
        # size is the spectral norm of the update, as far as sigma is that of X
        torch.testing.assert_close(changes(state.P, before), size * exact / sigma, rtol=1e-5, atol=0)
        assert ((reads == 1) | (reads == 2)).all()
    assert all(torch.isfinite(x).all() for x in state.tensors())


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_a_spike_is_seen_in_its_own_step(backend, device, route, nesterov, dtype):
    """A random rank-one term of 40 times the gradient's norm after 12 quiet steps."""
    shapes = [(3, 60, 40), (2, 200, 150), (1, 30, 8)]
    state = State(stepper(backend, device, route, dtype), shapes, device, dtype)
    for t, G in enumerate(turning(shapes, 14, device, dtype)):
        if t == 12:
            for i, (g, u, v) in enumerate(zip(G, draw(shapes, 51, device), draw(shapes, 52, device), strict=True)):
                spike = u[..., :1] @ v[..., :1, :]
                by = 40 * torch.linalg.matrix_norm(g.float(), keepdim=True) / torch.linalg.matrix_norm(
                    spike, keepdim=True
                )  # fmt: skip
                G[i] = (g + by * spike).to(dtype)
        before = copies(state.P)
        info, _ = state.step(G, nesterov=nesterov, tol=0.02)
        if t >= 12:
            X = state.M
            if nesterov:
                X = [0.95 * m.double() + g.double() for m, g in zip(state.M, G, strict=True)]
            sigma, reads = columns(info, "sigma", "reads")
            assert (sigma >= 0.99 * norms(X)).all() and (sigma <= (1 + 1e-5) * norms(X)).all()
            torch.testing.assert_close(changes(state.P, before), 0.1 * norms(X) / sigma, rtol=1e-4, atol=0)
            assert t > 12 or (reads == 2).all()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("exponent", [-30, 30, -37])
def test_entries_of_any_size(backend, device, route, dtype, exponent):
    """A first step, then one at another size: the scale follows, with a repeated read, and the norm is right."""
    state = State(stepper(backend, device, route, dtype), SHAPES, device, dtype)
    for factor in (10.0**exponent, 1.0, 10.0**-exponent if exponent == -30 else 10.0**exponent):
        G = [(g * factor).to(dtype) for g in draw(SHAPES, 1, device)]
        before, used = copies(state.P), state.scale.clone()
        info, bound = state.step(G, reads=12, min_reads=3, tol=0.02, rates=(0.0, 1.0))
        exact, (sigma, reads) = norms(state.M), columns(info, "sigma", "reads")
        assert (sigma <= (1 + 1e-5) * exact).all() and (sigma >= 0.99 * exact).all()
        assert (bound >= (1 - 1e-6) * exact).all() and torch.isfinite(bound).all()
        torch.testing.assert_close(changes(state.P, before), 0.1 * exact / sigma, rtol=1e-4, atol=0)
        assert all(torch.isfinite(x).all() for x in state.tensors())
        if factor == 1.0:
            assert (state.scale != used).all() and (reads >= 2).all()  # 1 x n: one read would do, it is repeated
        power, _ = torch.frexp(state.scale)
        assert (power == 0.5).all() and torch.equal(state.scale.double(), info[:, INFO["scale"]])


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@settings(max_examples=8)
@given(by=st.integers(-80, 80))
def test_powers_of_two_leave_the_update(backend, device, route, by):
    """G and M times 2^by, the scale of the last read with them: the same bits in P and V."""
    fn, G = stepper(backend, device, route, f32), draw(SHAPES, 1, device)
    one, other = State(fn, SHAPES, device), State(fn, SHAPES, device)
    one.scale.fill_(1.0), other.scale.fill_(2.0**-by)
    for t in range(2):
        info, bound = one.step(G)
        # products with 2^by are exact, and sums of them
        info2, bound2 = other.step([g * 2.0**by for g in G])
        assert same_bits(one.V, other.V) and all(same_bits(p, q) for p, q in zip(one.P, other.P, strict=True)), t
        assert torch.equal(info[:, INFO["sigma"]] * 2.0**by, info2[:, INFO["sigma"]])
        assert torch.equal(bound * 2.0**by, bound2)


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
def test_nothing_to_apply(backend, device, route):
    """Zero gradient, zero momentum: P only decays, block and scale stay; a zero gradient alone is no matter."""
    state = State(stepper(backend, device, route, f32), SHAPES, device, P=draw(SHAPES, 3, device))
    zeros = [torch.zeros(s, device=device) for s in SHAPES]
    before = state.copy()
    info, bound = state.step(zeros, decay=0.25)
    assert all(torch.equal(p, 0.75 * q) for p, q in zip(state.P, before.P, strict=True))
    assert same_bits(state.V, before.V) and same_bits(state.scale, before.scale)
    assert not bound.any() and not info[:, INFO["sigma"]].any()
    assert not any(m.any() for m in state.M)
    state.step(draw(SHAPES, 1, device))
    before = state.copy()
    info, _ = state.step(zeros, reads=12)
    torch.testing.assert_close(
        changes(state.P, before.P), 0.1 * norms(state.M) / info[:, INFO["sigma"]], rtol=1e-4, atol=0
    )
    assert all(not same_bits(v, w) for v, w in zip(*(blocks_of(x.V, 4, x.M) for x in (state, before)), strict=True)
               if v.shape[1] > 1)  # fmt: skip


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
    for (matrix, row, column), x in {(1, 0, 0): math.nan, (2, 3, 4): math.nan, (3, 39, 29): -math.inf}.items():
        G[0][matrix, row, column], usable[0][matrix, row, column] = x, 0.0
    options = dict(decay=0.5, skip=skip, nesterov=nesterov)
    truth, truth_bound = clean.step(usable, **options)
    info, bound = state.step(G, **options)
    for j, ((_, p), (_, m), v) in enumerate(zip(matrices(state.P), matrices(state.M), blocks_of(state.V, 4, state.M),
                                                strict=True)):  # fmt: skip
        same_p = before if j in (1, 2, 3, 5) else clean
        same = before if skip[j] else clean
        assert same_bits(p, same_p.P[0][j]) and same_bits(m, same.M[0][j])
        assert same_bits(v, blocks_of(same.V, 4, state.M)[j]) and same_bits(state.scale[j], same.scale[j])
    nan, inf, reads, sigma = columns(info, "nan", "inf", "reads", "sigma")
    assert nan.tolist() == [0, 0, 1, 0, 0, 0] and inf.tolist() == [0, 0, 0, 1, 0, 0]
    assert not reads[skip].any() and not sigma[skip].any() and not bound[skip].any()
    assert torch.equal(sigma, truth[:, INFO["sigma"]]) and torch.equal(bound, truth_bound)
    assert not same_bits(clean.P[0][0], before.P[0][0]) and not same_bits(clean.M[0][2], before.M[0][2])


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagated_entries_reach_the_parameter(backend, device, route, bad):
    state = State(stepper(backend, device, route, f32), [(3, 40, 30)], device, P=draw([(3, 40, 30)], 3, device))
    clean = state.copy()
    G = draw([(3, 40, 30)], 1, device)
    clean.step(G, propagate=True)
    G[0] = G[0].clone()
    G[0][1, 2, 3] = bad
    V = state.V.clone()
    info, _ = state.step(G, propagate=True)
    spoiled = torch.zeros(3, 40, 30, dtype=torch.bool, device=device)
    spoiled[1, 2, 3] = True
    assert torch.equal(~torch.isfinite(state.M[0]), spoiled)
    assert state.P[0][1].isnan().all()  # X / ||X|| with ||X|| not finite
    for j in (0, 2):
        assert same_bits(state.P[0][j], clean.P[0][j]) and same_bits(state.M[0][j], clean.M[0][j])
    assert info[:, INFO["nan" if math.isnan(bad) else "inf"]].tolist() == [0, 1, 0]
    assert not torch.isfinite(info[1, INFO["sigma"]])  # of such input: INFO
    blocks = zip(blocks_of(state.V, 4, state.M), blocks_of(V, 4, state.M), strict=True)
    assert [same_bits(v, w) for v, w in blocks] == [False, True, False]


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("reads", [1, 2])
def test_the_upper_bound_never_moves_too_far(backend, device, route, reads):
    state = State(stepper(backend, device, route, f32), SHAPES, device)
    for t, G in enumerate(turning(SHAPES, 8, device, turn=0.5, noise=1.0)):
        if t == 5:
            G[0] = G[0] + 40 * torch.linalg.matrix_norm(G[0], keepdim=True) * torch.ones_like(G[0]) / 35
        before = copies(state.P)
        _, bound = state.step(G, 0.3, upper=True, reads=reads, rates=(0.5, 1.0))
        moved = changes(state.P, before)
        assert (moved <= 0.3 * (1 + 1e-5)).all()
        torch.testing.assert_close(moved, 0.3 * norms(state.M) / bound, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_reads_are_counted(backend, device, route, nesterov):
    """tol = 0: all of them, but for spaces that end; min_reads; a repeated first read is one more."""
    state = State(stepper(backend, device, route, f32), [(1, 60, 50), (1, 60, 3), (1, 1, 50), (1, 60, 50)], device)
    state.scale.fill_(1.0)
    G = draw([(1, 60, 50), (1, 60, 3), (1, 1, 50)], 1, device)
    G.append(G[0] * 1e-12)
    for reads in (1, 2, 3):
        info, _ = state.copy().step(G, reads=reads, tol=0.0, nesterov=nesterov)
        assert info[:, INFO["reads"]].tolist() == [reads, 1, min(reads, 2), reads + 1]
        assert info[:, INFO["columns"]].tolist() == [4 * reads, 4, 4 * min(reads, 2), 4 * reads]
    info, _ = state.copy().step(G, reads=9, tol=1e9, min_reads=2, nesterov=nesterov)
    hidden = info[0, INFO["frob2"]] - info[0, INFO["trace"]] > info[0, INFO["theta"]] / 2
    assert info[0, INFO["reads"]] == 3 if hidden else 2
    assert (info[:, INFO["done"]] == 1).all()


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
def test_the_step_counter_changes_only_fresh_rows(backend, device, route):
    state = State(stepper(backend, device, route, f32), SHAPES[:3], device)
    for G in turning(SHAPES, 3, device):
        state.step(G[:3])
    other, G = state.copy(), draw(SHAPES[:3], 9, device)
    other.t += 5
    info, bound = state.step(G)
    info2, bound2 = other.step(G)
    assert same_bits(info, info2) and same_bits(bound, bound2)
    for x, y in zip(state.tensors(), other.tensors(), strict=True):
        assert x is state.V or same_bits(x, y)
    for v, w in zip(blocks_of(state.V, 4, state.M), blocks_of(other.V, 4, state.M), strict=True):
        assert same_bits(v[:3], w[:3]) and not same_bits(v[3], w[3])
        eye = torch.eye(4, device=device)
        assert (v.double() @ v.double().mT - eye).abs().max() <= 1e-5


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("nesterov", [False, True])
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

    state, out = run(1)
    again, out_again = run(1)
    assert all(same_bits(x, y) for x, y in zip((*state.tensors(), *out), (*again.tensors(), *out_again), strict=True))
    native = (backend, device, route) in NATIVE
    if native:
        again, out_again = run(2)
        assert all(same_bits(x, y) for x, y in zip((*state.tensors(), *out), (*again.tensors(), *out_again),
                                                   strict=True))  # fmt: skip
    first = 0
    for i, (k, _, _) in enumerate(shapes):
        alone, out_alone = run(1, i)
        mine = slice(first, first + k)
        pairs = [(alone.P[0], state.P[i]), (alone.M[0], state.M[i]), (out_alone[0], out[0][mine])]
        first += k
        if native:
            v = torch.cat([x.flatten() for x in blocks_of(state.V, 4, state.M)[mine]])
            assert all(same_bits(x, y) for x, y in [*pairs, (alone.V, v), (out_alone[1], out[1][mine])])
        else:
            assert all(torch.allclose(x.double(), y.double(), rtol=1e-3, atol=1e-6) for x, y in pairs[:2])
            torch.testing.assert_close(out_alone[0][:, INFO["sigma"]], out[0][mine, INFO["sigma"]], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
@pytest.mark.parametrize(("dtype", "dtype_p", "dtype_g"), [
    (f32, bf16, bf16), (bf16, bf16, f32), (f32, f16, f16), (f64, f64, f64), (f64, f32, f32)])  # fmt: skip
def test_mixed_dtypes_and_strides(backend, device, route, dtype, dtype_p, dtype_g):
    """M contiguous, P and G as convolutions are stored; P is rounded once."""
    shape = (9, 24, 16)
    P = [draw([(24, 16, 9)], 3, device, dtype_p)[0].movedim(-1, 0)]
    G = [draw([(24, 9, 16)], 4, device, dtype_g)[0].movedim(1, 0)]
    state = State(stepper(backend, device, route, dtype), [shape], device, dtype, P=P)
    before = copies(P)
    info, _ = state.step(G, 0.5, 0.1, reads=3)
    assert state.V.dtype == acc_dtype(dtype) and sides(state.M, 2) == [16] * 9
    sigma = info[:, INFO["sigma"], None, None]
    exact = 0.9 * before[0].double() - 0.5 * state.M[0].double() / sigma
    eps = max(torch.finfo(dtype_p).eps / 2, 4 * torch.finfo(f32).eps if dtype != f64 else 1e-15)
    assert ((P[0].double() - exact).abs() <= 1.01 * eps * exact.abs() + 4 * torch.finfo(f32).eps).all()
    assert torch.equal(state.M[0], G[0].to(dtype))


@pytest.mark.parametrize(("backend", "device", "route"), ROUTES)
def test_empty_matrices(backend, device, route):
    fn, shapes = stepper(backend, device, route, f32), [(2, 0, 5), (1, 5, 0), (0, 3, 4), (2, 6, 5)]
    state, alone = State(fn, shapes, device), State(fn, shapes[3:], device)
    for G in (draw(shapes, 1, device), draw(shapes, 2, device)):
        info, bound = state.step(G)
        own, own_bound = alone.step(G[3:])
    assert not info[:3, INFO["sigma"]].any() and not bound[:3].any()
    torch.testing.assert_close(info[3:, INFO["sigma"]], own[:, INFO["sigma"]], rtol=1e-5, atol=0)
    torch.testing.assert_close(state.P[3], alone.P[0], rtol=1e-4, atol=1e-6)


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
