"""The Triton words of a step against the reference: through the interpreter on CPU tensors, or on a GPU."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectral_kernels.kernels import composites, composites_step, reference, reference_step, registry
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, NORMS, STATS, counts, sides

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETER):
    # Triton is imported here and decides, once, whether its kernels are compiled or interpreted
    from spectral_kernels.kernels import triton as backend
    from spectral_kernels.kernels.triton import next_block, step

EPS = 2.0**-23
f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def _interpreted():
    with mock.patch.dict(os.environ, INTERPRETER):
        yield


def make(shape: tuple[int, int, int], layout: str = "rows", dtype: torch.dtype = f32) -> Tensor:
    k, m, n = shape
    if layout == "columns":
        a = torch.empty_strided((k, m, n), (m * n, 1, m), dtype=dtype, device=DEVICE)
    elif layout == "sliced":
        a = torch.empty((k, 2 * m, 2 * n), dtype=dtype, device=DEVICE)[:, ::2, ::2]
    else:
        a = torch.empty((k, m, n), dtype=dtype, device=DEVICE)
    return a.copy_(torch.randn(shape))


def close(ours: Tensor, exact: Tensor, eps: float = 64 * EPS) -> bool:
    return bool((ours.double() - exact.double()).norm() <= eps * exact.double().norm())


CASES = [  # kind of read, layouts of M and G, dtypes of M and G, b
    ((2, 40, 24), "rows", "rows", f32, f32, 4),
    ((1, 60, 130), "columns", "rows", f32, bf16, 3),
    ((1, 2, 4100), "rows", "columns", f16, f32, 4),
    ((2, 30, 9), "sliced", "rows", f16, f64, 4),
    ((1, 40, 24), "rows", "sliced", f32, f16, 6),  # more columns than a program holds: a pass of its own first
    ((1, 40, 24), "columns", "sliced", f32, bf16, 17),  # one program holds the block again
    ((1, 24, 40), "rows", "rows", f16, f32, 36),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[0])))
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_and_a_read(case, nesterov) -> None:
    shape, layout, layout_g, dtype, dtype_g, b = case
    if nesterov and shape[2] > 4096 and DEVICE == "cpu":
        pytest.skip("a second time would take the interpreter ten seconds")
    M, G = [make(shape, layout, dtype), make((1, 6, 5), dtype=dtype)], [make(shape, layout_g, dtype_g)]
    G.append(make((1, 6, 5), dtype=dtype_g))
    G[0][0, 1, 2], G[0][-1, 0, 1] = float("nan"), float("inf")
    V, scale = torch.randn(b * sum(sides(M, 2))).to(DEVICE), torch.full((counts(M),), 0.5, device=DEVICE)
    skip = torch.zeros(counts(M), dtype=torch.bool, device=DEVICE)
    skip[-1] = True
    ours, theirs = [m.clone() for m in M], [m.clone() for m in M]
    ours[0] = M[0].clone(memory_format=torch.preserve_format)
    options = (skip, 0.9, -0.5, nesterov)
    found = backend.momentum_gram_matvec_(ours, G, V, scale, *options, True, False, b)
    exact = reference_step.momentum_gram_matvec_(theirs, G, V, scale, *options, True, False, b)
    assert (ours[0].double() - theirs[0].double()).abs().max() <= 4 * torch.finfo(dtype).eps * theirs[0].abs().max()
    assert torch.equal(ours[1], M[1])
    # the reference reads what it stored, which may differ in a last bit of a half precision
    limit = 64 * EPS if dtype == f32 else torch.finfo(dtype).eps
    assert all(close(x, y, limit) for x, y in zip(found, exact, strict=True))
    flags = [STATS["nan"], STATS["inf"]]
    assert found[2][:, flags].tolist() == exact[2][:, flags].tolist()
    again = backend.momentum_gram_matvec_(ours, G, V, scale, *options, False, False, b)
    if b <= 4 or b > 16:  # between, the update was no part of the read
        assert all(torch.equal(x, y) for x, y in zip(found[:2], again[:2], strict=True))


@pytest.mark.parametrize(("shape", "layout", "dtype"), [
    ((2, 40, 24), "rows", f32), ((1, 70, 2), "columns", f16), ((1, 3, 5000), "rows", f32),
    ((1, 33, 300), "sliced", f16), ((1, 1, 140000), "rows", f32)])  # fmt: skip
def test_momentum_and_norms(shape, layout, dtype) -> None:
    M, G = [make(shape, layout, dtype)], [make(shape, "rows", f32)]
    scale = torch.full((shape[0],), 0.25, device=DEVICE)
    ours, theirs = [M[0].clone()], [M[0].clone()]
    norms = backend.momentum_norms_(ours, G, scale, None, 0.9, 1.0, True, True, False)
    exact = reference_step.momentum_norms_(theirs, G, scale, None, 0.9, 1.0, True, True, False)
    assert (ours[0].double() - theirs[0].double()).abs().max() <= 4 * torch.finfo(dtype).eps * theirs[0].abs().max()
    limit = 32 * EPS if dtype == f32 else torch.finfo(dtype).eps
    assert ((norms - exact).abs() <= limit * exact.abs()).all() and not norms[:, NORMS["nan"] : NORMS["row2"]].any()


def test_norms_of_what_is_not_finite_skipped_or_empty() -> None:
    M = [torch.zeros(4, 6, 5, device=DEVICE), torch.zeros(1, 0, 5, device=DEVICE)]
    G = [make((4, 6, 5)), torch.zeros(1, 0, 5, device=DEVICE)]
    G[0][1, 5, 4], G[0][2, 0, 0] = float("nan"), float("-inf")
    skip = torch.tensor([False, False, False, True, False], device=DEVICE)
    norms = backend.momentum_norms_(M, G, torch.ones(5, device=DEVICE), skip, 0.9, 1.0, False, True, False)
    assert norms[:, NORMS["nan"]].tolist() == [0, 1, 0, 0, 0] and norms[:, NORMS["inf"]].tolist() == [0, 0, 1, 0, 0]
    assert torch.isfinite(M[0]).all() and not M[0][3].any() and not norms[3:].any() and torch.isfinite(norms).all()


@pytest.mark.parametrize(("layouts", "dtypes", "ahead", "r"), [
    (("rows", "rows"), (f32, f32), False, 0), (("columns", "columns"), (f16, f32), True, 0),
    (("rows", "columns"), (f32, f16), True, 0), (("sliced", "rows"), (f64, f32), False, 0),
    (("rows", "rows"), (f32, f32), True, 3), (("columns", "columns"), (f16, f32), False, 1),
    (("columns", "rows"), (f32, f16), True, 20), (("sliced", "columns"), (f64, f32), False, 7),
    (("rows", "sliced"), (bf16, bf16), False, 70)])  # fmt: skip
def test_apply_update(layouts, dtypes, ahead, r) -> None:
    shapes = [(2, 30, 9), (1, 70, 33), (1, 16, 8)]
    P = [make(s, layouts[0], dtypes[0]) for s in shapes]
    M, G = ([make(s, layouts[1], dtypes[1]) for s in shapes] for _ in range(2))
    size, scale = torch.rand(4, device=DEVICE), torch.full((4,), 0.5, device=DEVICE)
    decay = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=f64, device=DEVICE)
    skip = torch.tensor([False, True, False, False], device=DEVICE)
    theirs, before = [p.clone() for p in P], P[0].clone()
    L, R = (torch.randn(r * sum(sides(P, dim)), device=DEVICE) if r else None for dim in (1, 2))
    for word, target in ((backend.apply_update_, P), (reference_step.apply_update_, theirs)):
        word(target, M, G if ahead else [], size, scale, decay, skip, 0.9, 0.5, L, R, r)
    for p, q in zip(P, theirs, strict=True):
        # beta and alpha are single precision here
        assert (p.double() - q.double()).abs().max() <= 4 * max(EPS, torch.finfo(dtypes[0]).eps) * q.abs().max()
    assert torch.equal(P[0][1], before[1]) and not torch.equal(P[0][0], before[0])


def space(A: list[Tensor], b: int, reads: int):
    """(Q, T, info) of the reference's words."""
    n, N = sides(A, 2), counts(A)
    V, rows = composites.start_blocks(A, b, 0), reads * b + b
    Q, T = torch.zeros(rows * sum(n), device=DEVICE), torch.zeros((N, rows, rows), dtype=f64, device=DEVICE)
    info = torch.zeros((N, INFO_COLUMNS), dtype=f64, device=DEVICE)
    scale = torch.ones(N, device=DEVICE)
    info[:, INFO["scale"]] = 1.0
    composites.store(Q, V, n, b, rows)
    for read in range(reads):
        W, S, stats, _ = reference.gram_matvec(A, V, scale, None, b, read == 0, False)
        if read == 0:
            info[:, INFO["frob2"]] = stats[:, STATS["frob2"]]
        reference.rayleigh_ritz_(n, Q, V, T, info, W, S, scale, b, read * b, 1, 0.0, 1)
    return Q, T, info


@pytest.mark.parametrize(("b", "fresh", "reads"), [(4, 1, 1), (4, 1, 2), (3, 0, 1), (1, 0, 3), (8, 2, 1), (4, 4, 1)])
def test_next_block(b, fresh, reads) -> None:
    A = [
        make((2, 40, 30)) * torch.arange(1.0, 31.0, device=DEVICE),
        make((1, 50, 3)),
        torch.zeros(1, 8, 9, device=DEVICE),
    ]
    Q, T, info = space(A, b, reads)
    V = torch.full((b * sum(sides(A, 2)),), 7.0, device=DEVICE)
    other, steps = V.clone(), torch.tensor([0, 3, 1 << 40, 1], device=DEVICE)
    rest = (b, fresh, 5)
    upper = backend.next_block_(sides(A, 1), sides(A, 2), Q, T, info, V, steps, *rest)
    exact = reference_step.next_block_(sides(A, 1), sides(A, 2), Q, T, info, other, steps, *rest)
    torch.testing.assert_close(upper, exact, rtol=1e-12, atol=0)
    for v, w, n in zip(V.split([b * n for n in sides(A, 2)]), other.split([b * n for n in sides(A, 2)]), sides(A, 2),
                       strict=True):  # fmt: skip
        v, w = v.view(b, n).double(), w.view(b, n).double()
        assert ((v * w).sum(1).abs() - w.square().sum(1)).abs().max() <= 1e-4 * w.square().sum(1).max()
    assert (V[-9 * b :] == 7).all() and upper[-1] == 0


def test_draws_are_those_of_every_backend() -> None:
    """A block of draws alone, from a space that is empty but for its estimate."""
    info = torch.zeros((1, INFO_COLUMNS), dtype=f64, device=DEVICE)
    for name in ("sigma", "theta", "frob2", "scale"):
        info[:, INFO[name]] = 1.0
    V, T = torch.zeros(2000, device=DEVICE), torch.zeros((1, 4, 4), dtype=f64, device=DEVICE)
    args = ([2000], [1000], torch.zeros(4000, device=DEVICE), T, info)
    other = V.clone()
    step_of = torch.tensor([11], device=DEVICE)
    backend.next_block_(*args, V, step_of, 2, 2, -3)
    reference_step.next_block_(*args, other, step_of, 2, 2, -3)
    assert (V - other).abs().max() <= 8 * EPS * other.abs().max()


def test_a_whole_step_is_that_of_the_reference() -> None:
    """Three steps of the composite over these words and over the reference's, from the same state."""
    shapes = [(1, 40, 24), (1, 9, 30)]
    sets = [[make(s) * 1e-12 if t == 2 else make(s) for s in shapes] for t in range(2)]
    states = []
    for name in ("triton", "reference"):
        words = registry.Words(DEVICE, f32, 4, name)
        M, P = ([torch.zeros(s, device=DEVICE) for s in shapes] for _ in range(2))
        V, scale = composites.start_blocks(M, 4, 0), torch.zeros(2, device=DEVICE)
        size, decay = torch.full((2,), 0.1, dtype=f64, device=DEVICE), torch.zeros(2, dtype=f64, device=DEVICE)
        for t, G in enumerate(sets):
            at = torch.full((2,), t, device=DEVICE)
            found = composites_step.tracked_step_(
                words, P, M, G, V, scale, at, size, decay, None, 0.9, 1.0, False, False, False, 4, 1, 2, 0.1, 1, 0
            )
        states.append((*P, *M, found[1], found[0][:, INFO["sigma"]]))
    assert all(close(x, y, 1e-4) for x, y in zip(*states, strict=True))


def test_gradients_that_move_send_places_and_no_items() -> None:
    M, P = [make((2, 40, 24))], [make((2, 40, 24))]
    scale, one, none = (
        torch.ones(2, device=DEVICE),
        torch.ones(2, device=DEVICE),
        torch.zeros(2, dtype=f64, device=DEVICE),
    )

    def run() -> None:
        G = [make((2, 40, 24))]
        backend.momentum_norms_(M, G, scale, None, 0.9, 1.0, False, True, False)
        backend.apply_update_(P, M, G, one, scale, none, None, 0.9, 1.0)

    run()
    failing = mock.Mock(side_effect=AssertionError("described again"))
    with mock.patch.object(step, "_describe_norms", failing), mock.patch.object(step, "_describe_apply", failing):
        run()
        with pytest.raises(AssertionError, match="described again"):
            backend.momentum_norms_(M * 2, M * 2, torch.ones(4, device=DEVICE), None, 0.9, 1.0, False, True, False)


def test_declined_in_words() -> None:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        for word in ("momentum_gram_matvec_", "momentum_norms_", "apply_update_", "next_block_"):
            assert backend.supports(word, "cuda", bf16, 4) is None
            assert "float64" in (backend.supports(word, "cuda", f64, 4) or "")
        assert "9" in (backend.supports("next_block_", "cuda", f32, 9) or "")
        words = registry.Words("cuda", f32, 4)
        assert words.next_block_for(128).__module__ == backend.__name__
        assert words.next_block_for(129) is reference_step.next_block_
    assert backend.column_limit == next_block.ORDERS[-1]
    T = torch.zeros((1, 132, 132), dtype=f64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="132"):
        backend.next_block_([9], [9], T, T, T, T, T, 4, 1, 0)
