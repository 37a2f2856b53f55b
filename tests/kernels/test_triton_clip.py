"""The Triton `clip_` against the reference in float64: through the interpreter on CPU tensors, or on a GPU."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectral_kernels.kernels import composites, composites_step, reference, reference_clip, registry
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, STATS, counts, sides
from tests.kernels.steps import flat_parts

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETER):
    # Triton is imported here and decides, once, whether its kernels are compiled or interpreted
    from spectral_kernels.kernels import triton as backend
    from spectral_kernels.kernels.triton import clip, mixing

EPS = 2.0**-23
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(autouse=True)
def _interpreted():
    torch.manual_seed(0)
    with mock.patch.dict(os.environ, INTERPRETER):
        yield


class State(NamedTuple):
    V: Tensor
    L: Tensor
    R: Tensor
    info: Tensor
    before: Tensor


def matrix(m: int, n: int, values: Tensor) -> Tensor:
    """(1, m, n) float32 with these singular values."""
    left, right = (torch.linalg.qr(torch.randn(size, len(values), dtype=f64))[0] for size in (m, n))
    return ((left * values) @ right.mT)[None].float().to(DEVICE)


def fresh_state(A: list[Tensor], b: int, r: int, dtype: torch.dtype = f32) -> State:
    N, V = counts(A), composites.start_blocks(A, b, 0).to(dtype)
    L, R = (torch.full((r * sum(sides(A, dim)),), 7.0, dtype=dtype, device=DEVICE) for dim in (1, 2))
    info = torch.zeros((N, INFO_COLUMNS), dtype=f64, device=DEVICE)
    return State(V, L, R, info, torch.full((N, 2), -1.0, dtype=f64, device=DEVICE))


def call(word, A: list[Tensor], state: State, b: int, r: int, rank=None, limit=None, step: int = 0, **changes) -> State:
    """One read and clip_, in the dtype of the block; `state` is replaced, and returned."""
    N, options = counts(A), {"fresh": 1, "tol": 0.1, "seed": 3, **changes}
    scale = torch.full((N,), 0.5, dtype=state.V.dtype, device=DEVICE)
    W, S, stats, Y = reference.gram_matvec([a.to(state.V.dtype) for a in A], state.V, scale, None, b, True, True)
    state.info[:, INFO["scale"]] = 0.5
    state.info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
    ranks = torch.tensor(rank or [1] * N, device=DEVICE)
    limits = None if limit is None else torch.tensor(limit, dtype=f64, device=DEVICE)
    word(
        sides(A, 1), sides(A, 2), *state[:4], W, S, Y, scale, ranks, limits, state.before,
        torch.full((N,), step, device=DEVICE), b, r, **options,
    )  # fmt: skip
    return state


def three(A: list[Tensor], b: int, r: int, **options) -> tuple[State, State, State]:
    """(ours, plain float32, float64) after one call from the same block."""
    words = ((backend.clip_, f32), (reference_clip.clip_, f32), (reference_clip.clip_, f64))
    return tuple(call(word, A, fresh_state(A, b, r, dtype), b, r, **options) for word, dtype in words)  # type: ignore[return-value]


def clipped(A: list[Tensor], state: State, r: int) -> list[Tensor]:
    """L'R of every matrix, of A unscaled."""
    parts = zip(flat_parts(state.L, r, sides(A, 1)), flat_parts(state.R, r, sides(A, 2)), strict=True)
    return [2 * left.double().mT @ right.double() for left, right in parts]


def no_worse(ours: Tensor, plain: Tensor, exact: Tensor, size: float) -> bool:
    """At most twice the error of plain float32, plus rounding of numbers of this size."""
    error, theirs = ((x.double() - exact).abs().max().item() for x in (ours, plain))
    return error <= 2 * theirs + 32 * EPS * size


NUMBERS = ("sigma", "theta", "trace", "error", "tau", "outside")
FACTS = ("done", "beyond", "columns")


def check(A: list[Tensor], found: tuple[State, State, State], b: int, r: int, fresh: int = 1) -> None:
    ours, plain, exact = found
    for name in NUMBERS:
        x, y, z = (state.info[:, INFO[name]] for state in found)
        assert no_worse(x, y, z, max(1.0, exact.info[:, INFO["trace"]].max().item())), name
    for name in FACTS:
        assert ours.info[:, INFO[name]].tolist() == exact.info[:, INFO[name]].tolist(), name
    assert no_worse(ours.before, plain.before, exact.before, exact.before.max().item())
    for x, y, z in zip(*(clipped(A, state, r) for state in found), strict=True):
        assert no_worse(x, y, z, z.abs().max().item() + EPS)
    for v, w, n in zip(
        flat_parts(ours.V, b, sides(A, 2)), flat_parts(exact.V, b, sides(A, 2)), sides(A, 2), strict=True
    ):
        square = torch.eye(b, device=DEVICE) * (torch.arange(b, device=DEVICE) < n)
        assert (v @ v.mT - square).abs().max() <= 16 * EPS
        # one vector lies along the other, up to its sign and what float32 knows of it
        assert ((v.double() * w).sum(1).abs() - square.diagonal()).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("shapes", "b", "r", "options"),
    [
        ([(1, 9, 7), (1, 5, 12)], 5, 3, {"rank": [3, 1]}),
        ([(1, 30, 80)], 4, 4, {"rank": [4], "fresh": 4, "step": 1 << 33}),
        ([(1, 6, 3), (1, 9, 3)], 4, 2, {"rank": [2, 3], "fresh": 0}),  # more rows than the space has
        ([(2, 12, 9)], 3, 3, {"limit": [1.0, 50.0]}),  # more values above it than the block holds; none
        ([(1, 1, 1), (1, 9, 1)], 1, 1, {"limit": [1e-3, 1e-3], "fresh": 0}),
    ],
)
def test_against_float64(shapes, b, r, options) -> None:
    A = [torch.randn(shape).to(DEVICE) for shape in shapes]
    found = three(A, b, r, **options)
    check(A, found, b, r)
    if "limit" in options and b == 3:
        assert found[0].info[:, INFO["beyond"]].tolist() == [1, 0]


def test_a_block_in_slices() -> None:
    """Order 16 in two slices of rows, as 64 and 128 are in more; the block is almost that of the matrix."""
    values = torch.linspace(12, 1, 12, dtype=f64)
    A = [matrix(20, 12, values)]
    b, r, V = 9, 4, torch.linalg.svd(A[0][0])[2][:9]
    V = torch.linalg.qr((V + 1e-2 * torch.randn(b, 12).to(DEVICE)).mT)[0].mT
    options = {**mixing.small_options(16), "SLICE": 8}
    with mock.patch.object(composites, "start_blocks", lambda A, b, seed: V.flatten().clone()):
        with mock.patch.object(mixing, "small_options", lambda order: options):
            with mock.patch.object(clip, "small_options", lambda order: options):
                found = three(A, b, r, rank=[4])
    check(A, found, b, r)
    exact = (values[:r] - values[r - 1]).square().sum().sqrt()
    assert abs(clipped(A, found[0], r)[0].norm() - exact) <= 0.05 * exact


def test_two_reads_follow_what_was_missed() -> None:
    A = [torch.randn(1, 24, 16).to(DEVICE)]
    states = [fresh_state(A, 4, 2, dtype) for dtype in (f32, f32, f64)]
    for step in range(2):
        for word, state in zip((backend.clip_, reference_clip.clip_, reference_clip.clip_), states, strict=True):
            call(word, A, state, 4, 2, rank=[2], step=step, tol=0.0)
    check(A, tuple(states), 4, 2)  # type: ignore[arg-type]


def test_ill_conditioned() -> None:
    """Condition 1e12, repeated values, rank below the block's, zero: as the reference in float32, whose limits these
    are; everything that is clipped is known there."""
    b, r = 4, 3
    A = [
        matrix(12, 6, torch.logspace(0, -12, 6, dtype=f64)),
        matrix(9, 8, torch.ones(8, dtype=f64)),
        matrix(10, 7, torch.tensor([3.0, 2.0], dtype=f64)),
        torch.zeros(1, 5, 6, device=DEVICE),
    ]
    rank = [3, 2, 3, 1]
    ours, plain = (
        call(word, A, fresh_state(A, b, r), b, r, rank=rank) for word in (backend.clip_, reference_clip.clip_)
    )
    for name in NUMBERS:
        torch.testing.assert_close(
            ours.info[:, INFO[name]],
            plain.info[:, INFO[name]],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: name + text,
        )
    for x, y, a in zip(clipped(A, ours, r), clipped(A, plain, r), A, strict=True):
        assert (x - y).norm() <= 1e-5 * a.norm() + (not a.any()) * 1e-12
    assert (ours.V[-6 * b :] == plain.V[-6 * b :]).all() and (ours.L[-5 * r :] == 7).all()  # zero: left alone
    for v in flat_parts(ours.V, b, sides(A, 2))[:3]:
        assert (v @ v.mT - torch.eye(b, device=DEVICE)).abs().max() <= 16 * EPS
    assert ours.info[2, INFO["tau"]] == pytest.approx((8 * EPS) ** 0.5 * ours.info[2, INFO["sigma"]].item() * 0.5)


def test_eigenvalues_against_lapack() -> None:
    b = 5
    Q = torch.linalg.qr(torch.randn(b, b, dtype=f64))[0]
    spectra = [
        torch.logspace(0, -12, b, dtype=f64),
        torch.tensor([2.0, 2, 2, 1, 1], dtype=f64),
        torch.ones(b, dtype=f64),
    ]
    spectra += [torch.tensor([1.0, 1e-9, 0, 0, 0], dtype=f64), torch.zeros(b, dtype=f64)]
    X = torch.stack([(Q * values) @ Q.mT for values in spectra]).to(DEVICE)
    N = len(X)
    values, vectors = X.new_empty((N, b)), X.new_empty((N, b, b))
    info, scratch = X.new_zeros((N, INFO_COLUMNS)), X.new_empty(N * clip.SCRATCH.value * (b + 1) ** 2)
    clip.eigen_kernel[(N,)](info, X, values, vectors, scratch, b, **mixing.small_options(mixing.order_of(b)))
    exact = torch.linalg.eigvalsh(X).flip(1).clamp(min=0)
    assert (values - exact).abs().max() <= 64 * 2.0**-52 * 2
    assert (vectors.mT @ vectors - torch.eye(b, dtype=f64, device=DEVICE)).abs().max() <= 64 * 2.0**-52
    assert (X @ vectors - vectors * values[:, None]).abs().max() <= 1e-12  # clip.REST, of 2


def test_matrices_that_stay_and_the_same_bits_alone() -> None:
    A = [torch.randn(4, 9, 8).to(DEVICE), torch.randn(1, 5, 6).to(DEVICE)]
    A[0][2, 0, 0] = float("inf")
    b, r = 3, 2
    state, start = fresh_state(A, b, r), fresh_state(A, b, r)
    for x in (state, start):
        x.info[1, INFO["done"]] = 1
    call(backend.clip_, A, state, b, r, rank=[2] * 5)
    alone = fresh_state(A[1:], b, r)
    alone.V.copy_(start.V[-6 * b :])
    call(backend.clip_, A[1:], alone, b, r, rank=[2])
    for x, y, z, rows, dim in ((state.V, start.V, alone.V, b, 2), (state.L, start.L, alone.L, r, 1),
                               (state.R, start.R, alone.R, r, 2)):  # fmt: skip
        new, old = (flat_parts(flat, rows, sides(A, dim)) for flat in (x, y))
        assert [torch.equal(p, q) for p, q in zip(new, old, strict=True)] == [False, True, True, False, False]
        assert torch.equal(new[4].flatten(), z)
    assert torch.equal(state.info[4], alone.info[0]) and torch.equal(state.before[4], alone.before[0])
    assert (state.before[1:3] == -1).all() and not state.info[1:3, INFO["tau"]].any()


def test_a_whole_step_is_that_of_the_reference() -> None:
    """Two steps of the composite over these words and over the reference's, from the same state."""
    shapes, b, r = [(1, 20, 12), (1, 5, 9)], 3, 2
    sets = [[torch.randn(s).to(DEVICE) for s in shapes] for _ in range(2)]
    states = []
    for name in ("triton", "reference"):
        words = registry.Words(DEVICE, f32, b, name)
        assert words.choice("clip_").backend == name
        M, P = ([torch.zeros(s, device=DEVICE) for s in shapes] for _ in range(2))
        state, scale = fresh_state(M, b, r), torch.zeros(2, device=DEVICE)
        size, decay = torch.full((2,), 0.1, dtype=f64, device=DEVICE), torch.zeros(2, dtype=f64, device=DEVICE)
        for t, G in enumerate(sets):
            info = composites_step.clipped_step_(
                words, P, M, G, state.V, scale, state.before, torch.full((2,), t, device=DEVICE), size, decay,
                torch.tensor([2, 1], device=DEVICE), None, None, 0.9, 1.0, True, False, b, r, 1, 1, 0.1, 0,
            )  # fmt: skip
        states.append((*P, *M, info[:, INFO["tau"]], info[:, INFO["error"]]))
    for x, y in zip(*states, strict=True):
        assert (x.double() - y.double()).norm() <= 1e-4 * y.double().norm()


def test_declined_in_words() -> None:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        assert backend.supports("clip_", "cuda", bf16, 80) is None
        assert "81" in (backend.supports("clip_", "cuda", f32, 81) or "")
        assert "float64" in (backend.supports("clip_", "cuda", f64, 4) or "")
    nothing = torch.empty(0, device=DEVICE)
    backend.clip_([], [], *[nothing] * 9, None, nothing, nothing, 4, 2, 1, 0.1, 0)


def test_a_block_that_sees_nothing_is_drawn_anew() -> None:
    A = [torch.randn(1, 24, 20, device=DEVICE)]
    A[0][:, :, :10] = 0
    state = fresh_state(A, 4, 2)
    V = state.V.view(4, 20)
    V[:, 10:] = 0
    V[:, :10] = torch.linalg.qr(V[:, :10].mT).Q.mT
    before = state.before.clone()
    call(backend.clip_, A, state, 4, 2)
    block = state.V.view(4, 20).double()
    torch.testing.assert_close(block @ block.mT, torch.eye(4, dtype=f64, device=DEVICE), rtol=0, atol=1e-5)
    assert float(block[:, 10:].norm()) > 0.5
    found = [float(state.info[0, INFO[name]]) for name in ("error", "done", "tau")]
    assert found == [float("inf"), 0, 0] and torch.equal(state.before, before)
