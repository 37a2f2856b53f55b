"""The Triton `rayleigh_ritz_` against the reference, step by step on the same inputs, and its own promises."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectral_kernels.kernels import reference
from spectral_kernels.kernels.composites import start_block, start_blocks
from spectral_kernels.kernels.contracts import INFO, INFO_COLUMNS, counts, sides

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETER):
    from spectral_kernels.kernels import triton as backend
    from spectral_kernels.kernels.triton import rayleigh_ritz

EPS = 2.0**-23


@pytest.fixture(autouse=True)
def _interpreted():
    with mock.patch.dict(os.environ, INTERPRETER):
        yield


class Run:
    """The state of a block Krylov run over a list, with the words called one at a time."""

    def __init__(self, A: list[Tensor], b: int = 4, steps: int = 4, rank: int = 1, tol: float = 0.0) -> None:
        self.A, self.b, self.rank, self.tol = [a.to(DEVICE) for a in A], b, rank, tol
        self.n, self.N, self.rows, self.columns = sides(A, 2), counts(A), (steps + 1) * b, 0
        self.V = start_blocks(self.A, b, 0)
        self.Q = torch.zeros(self.rows * sum(self.n), device=DEVICE)
        self.T = torch.zeros((self.N, self.rows, self.rows), dtype=torch.float64, device=DEVICE)
        self.info = torch.zeros((self.N, INFO_COLUMNS), dtype=torch.float64, device=DEVICE)
        self.scale = torch.ones(self.N, device=DEVICE)
        for q, v in zip(self.basis(self.Q), self.blocks(self.V), strict=True):
            q[:b] = v

    def basis(self, Q: Tensor) -> list[Tensor]:
        return [q.view(self.rows, -1) for q in Q.split([self.rows * n for n in self.n])]

    def blocks(self, V: Tensor) -> list[Tensor]:
        return [v.view(self.b, -1) for v in V.split([self.b * n for n in self.n])]

    def read(self) -> None:
        self.W, self.S, stats, _ = reference.gram_matvec(self.A, self.V, self.scale, None, self.b, True, False)
        self.info[:, INFO["reads"]] += 1
        self.info[:, INFO["frob2"]] = stats[:, 0]

    def step(self, word) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(Q, V, T, info) after one call of `word` on copies of the state."""
        state = self.Q.clone(), self.V.clone(), self.T.clone(), self.info.clone()
        word(self.n, *state, self.W, self.S, self.scale, self.b, self.columns, self.rank, self.tol, 2)
        return state

    def take(self, state: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        self.Q, self.V, self.T, self.info = state
        self.columns += self.b


def clustered(n: int, top: list[float]) -> Tensor:
    """A diagonal matrix with the given largest values and the rest spread below 0.9 of the smallest of them."""
    return torch.diag(torch.cat((torch.tensor(top), torch.linspace(0.9 * min(top), 0, n - len(top)))))[None]


def close_infos(ours: Tensor, theirs: Tensor) -> None:
    def column(name: str) -> tuple[Tensor, Tensor]:
        return ours[:, INFO[name]], theirs[:, INFO[name]]

    for name in ("theta", "trace", "sigma"):
        torch.testing.assert_close(*column(name), rtol=2e-6, atol=1e-12)
    assert (ours[:, INFO["theta"]] <= theirs[:, INFO["theta"]] * (1 + 1e-12)).all()  # a Rayleigh quotient of the same T
    # squaring in float32 leaves a residual of its own of about 1e-6
    torch.testing.assert_close(*column("rho"), rtol=1e-4, atol=4e-6)
    torch.testing.assert_close(*column("error"), rtol=1e-2, atol=4e-6)
    for name in ("columns", "done", "reads", "frob2"):
        assert torch.equal(*column(name)), name


@pytest.mark.parametrize(
    ("make", "b", "steps", "rank"),
    [
        (lambda: [torch.randn(2, 60, 40), clustered(50, [1.0, 1.0, 1.0])], 4, 5, 1),
        (lambda: [clustered(60, [1.0, 0.9999, 0.999, 0.99]), torch.randn(1, 40, 30)], 4, 4, 3),
        (lambda: [torch.randn(1, 20, 600)], 3, 3, 1),
        (lambda: [torch.randn(1, 12, 4100)], 4, 2, 1),
        (lambda: [torch.randn(1, 200, 70)], 1, 4, 1),
        (lambda: [clustered(80, [1.0])], 4, 9, 1),
        (lambda: [torch.randn(1, 70, 40), torch.randn(1, 30, 600)], 8, 2, 2),
    ],
    ids=["ragged", "rank 3", "n 600 b 3", "n 4100", "b 1", "36 columns", "b 8"],
)
def test_steps_follow_the_reference(make, b: int, steps: int, rank: int) -> None:
    run = Run(make(), b, steps, rank)
    for _ in range(steps):
        run.read()
        ours, theirs = run.step(backend.rayleigh_ritz_), run.step(reference.rayleigh_ritz_)
        K = run.columns + b
        close_infos(ours[3], theirs[3])
        for j, (q, v) in enumerate(zip(run.basis(ours[0]), run.blocks(ours[1]), strict=True)):
            size = run.n[j]
            assert torch.equal(q[K : K + b], v)
            x = q[: K + b].double()
            kept = x.norm(dim=1) > 0.5
            gram = x[kept] @ x[kept].mT
            assert (gram - torch.eye(len(gram), dtype=torch.float64, device=DEVICE)).abs().max() <= 32 * EPS
            theta = ours[3][j, INFO["theta"]]
            if kept.all() and K + b <= size:  # W = Q'Q W + X R, whatever the signs and rotations inside noise
                w = run.blocks(run.W)[j].double()
                R = ours[2][j, K : K + b, run.columns : K]
                rest = w - (w @ x[:K].mT) @ x[:K] - R.mT @ x[K:]
                assert rest.abs().max() <= 64 * EPS * theta
        assert torch.equal(ours[2], ours[2].mT)
        torch.testing.assert_close(
            ours[2][:, :K, :K], theirs[2][:, :K, :K], rtol=0, atol=1e-12 * theirs[3][:, INFO["theta"]].max().item()
        )
        run.take(ours)


@pytest.mark.parametrize("n", [40, 4100])
def test_nearly_collinear_rows_stay_orthogonal_to_the_basis(n: int) -> None:
    """Rows that differ by 1e-4 of their length, in the basis but for as much: what is left is mostly rounding."""
    run = Run([torch.randn(1, 12, n)], 4, 1)
    run.read()
    basis = run.blocks(run.V)[0]
    one = basis.sum(0) + torch.randn(n, device=DEVICE) / n**0.5
    run.W = torch.cat([one + 1e-4 * torch.randn(n, device=DEVICE) / n**0.5 for _ in range(4)])
    run.S = torch.eye(4, dtype=torch.float64, device=DEVICE)[None]
    Q, V, T, info = run.step(backend.rayleigh_ritz_)
    x = run.basis(Q)[0].double()
    assert (x @ x.mT - torch.eye(8, dtype=torch.float64, device=DEVICE)).abs().max() <= 32 * EPS
    rest = run.W.view(4, n).double()
    rest = rest - (rest @ x[:4].mT) @ x[:4] - T[0, 4:8, :4].mT @ x[4:]
    assert rest.abs().max() <= 8 * EPS


def test_blocks_energy_and_tolerance_decide_when_to_stop() -> None:
    """At least `min_reads` = 2 blocks, one more while frob2 - trace > theta / 2, and 10 error <= tol."""
    run = Run([torch.randn(1, 60, 40)], 4, 3)
    for _ in range(2):
        run.read()
        run.take(run.step(reference.rayleigh_ritz_))
    run.read()
    for columns, hidden, within in ((0, 0, 0), (4, 0, 1), (4, 1, 0), (8, 1, 1)):
        run.columns, run.tol = columns, 0.0
        info = run.step(backend.rayleigh_ritz_)[3][0]
        error = info[INFO["error"]].item()
        run.info[:, INFO["frob2"]] = info[INFO["trace"]] + (0.4 + 0.2 * hidden) * info[INFO["theta"]]
        for run.tol, done in ((11 * error, within), (9 * error, 0)):
            assert run.step(backend.rayleigh_ritz_)[3][0, INFO["done"]] == done
            assert run.step(reference.rayleigh_ritz_)[3][0, INFO["done"]] == done


def test_stop_flags_of_finished_exhausted_and_zero_matrices() -> None:
    # rank 1: exhausted after one read; zero; n = b: exhausted; still running
    A = [torch.ones(1, 20, 30), torch.zeros(1, 8, 8), torch.randn(1, 9, 4), torch.randn(1, 40, 40)]
    run = Run(A, 4, 3)
    for expected in ([0, 1, 1, 0], [1, 1, 1, 0]):
        run.read()
        finished = run.info[:, INFO["done"]] > 0
        before = run.info.clone(), run.V.clone(), run.T.clone()
        ours, theirs = run.step(backend.rayleigh_ritz_), run.step(reference.rayleigh_ritz_)
        assert ours[3][:, INFO["done"]].tolist() == theirs[3][:, INFO["done"]].tolist() == expected
        assert torch.equal(ours[3][finished], before[0][finished]) and torch.equal(
            ours[2][finished], before[2][finished]
        )
        for j, (new, old) in enumerate(zip(run.blocks(ours[1]), run.blocks(before[1]), strict=True)):
            if finished[j]:
                assert torch.equal(new, old)
        assert ours[3][1, INFO["sigma"]] == 0 and torch.isfinite(ours[3]).all()
        run.take(ours)


def test_tolerance_and_least_reads_decide() -> None:
    run = Run([clustered(60, [100.0, 1.0])], 4, 6, tol=1e-3)
    flags = []
    for _ in range(4):
        run.read()
        ours, theirs = run.step(backend.rayleigh_ritz_), run.step(reference.rayleigh_ritz_)
        flags.append(int(ours[3][0, INFO["done"]]))
        assert flags[-1] == int(theirs[3][0, INFO["done"]])
        run.take(ours)
        if flags[-1]:
            break
    assert flags[0] == 0 and flags[-1] == 1


def test_the_same_bits_alone_and_in_a_list() -> None:
    A = [torch.randn(1, 30, 20), torch.randn(1, 25, 25), torch.randn(1, 700, 5), torch.randn(1, 20, 530)]
    together = Run(A)
    alone = [Run([a]) for a in A]
    for _ in range(2):
        for run in (together, *alone):
            run.read()
        # the same W for both: batched products of the reference may round differently
        together.W = torch.cat([run.W for run in alone])
        together.S = torch.cat([run.S for run in alone])
        for run in (together, *alone):
            run.take(run.step(backend.rayleigh_ritz_))
        assert torch.equal(together.V, torch.cat([run.V for run in alone]))
        assert torch.equal(together.Q, torch.cat([run.Q for run in alone]))
        assert torch.equal(together.T, torch.cat([run.T for run in alone]))
        assert torch.equal(together.info, torch.cat([run.info for run in alone]))


@pytest.mark.parametrize("order", [32, 128])
@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6, 1e-5, 1e-3, 0.5])
def test_the_small_eigenproblem_at_any_gap(order: int, gap: float) -> None:
    """theta from a given T, alone: never above the largest eigenvalue, and its own residual stays near 1e-6."""
    columns = order - 4
    basis = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64))[0]
    values = torch.linspace(0.5, 0, order, dtype=torch.float64)
    values[0], values[1] = 1, 1 - gap
    T = torch.zeros(1, order + 4, order + 4, dtype=torch.float64)
    T[0, :order, :order] = (basis * values) @ basis.mT
    S = T[:, columns:order, columns:order].clone()
    n = 200
    Q, W = torch.zeros((order + 4) * n), torch.zeros(4 * n)  # no coupling: only the residual inside T is left
    info = torch.zeros(1, INFO_COLUMNS, dtype=torch.float64)
    state = [x.to(DEVICE) for x in (Q, torch.zeros(4 * n), T, info)]
    backend.rayleigh_ritz_([n], *state, W.to(DEVICE), S.to(DEVICE), torch.ones(1, device=DEVICE), 4, columns, 1, 0.0, 1)
    theta, rho, error = (state[3][0, INFO[name]].item() for name in ("theta", "rho", "error"))
    assert 1 - 2e-7 <= theta <= 1 + 1e-13  # a pair closer than 2^-20 is not told apart: sigma within eps of float32
    assert rho <= 4e-6
    assert min(abs(theta - 1), abs(theta - 1 + gap)) <= rho + 1e-13  # a residual bounds the distance to some eigenvalue
    assert error <= 0.5 * rho + 1e-15


def test_limits_say_no_in_words() -> None:
    run = Run([torch.randn(1, 9, 200)], 4, 1)
    run.read()
    run.columns = rayleigh_ritz.ORDERS[-1]
    with pytest.raises(NotImplementedError, match="128 basis columns, not 132"):
        run.step(backend.rayleigh_ritz_)
    run.columns, run.rank = 0, 16
    with pytest.raises(NotImplementedError, match="15 Ritz values, not 16"):
        run.step(backend.rayleigh_ritz_)
    assert (backend.rank_limit, backend.column_limit) == (rayleigh_ritz.RANK_LIMIT, rayleigh_ritz.ORDERS[-1])


def test_an_empty_list_and_matrices_without_columns() -> None:
    empty = torch.empty(0, device=DEVICE)
    none = torch.empty((0, 8, 8), dtype=torch.float64, device=DEVICE)
    info = torch.empty((0, INFO_COLUMNS), dtype=torch.float64, device=DEVICE)
    backend.rayleigh_ritz_([], empty, empty, none, info, empty, none[:, :4, :4], empty, 4, 0, 1, 0.0, 1)
    run = Run([torch.randn(1, 5, 0), torch.randn(1, 5, 6)], 4, 1)
    run.read()
    ours = run.step(backend.rayleigh_ritz_)
    assert ours[3][0, INFO["done"]] == 1 and ours[3][0, INFO["sigma"]] == 0 and ours[3][1, INFO["sigma"]] > 0


def test_start_blocks_are_drawn_once_and_never_shared() -> None:
    A = [torch.randn(2, 30, 20, device=DEVICE), torch.randn(1, 9, 7, device=DEVICE)]
    first = start_blocks(A, 4, 123)
    expected = [start_block(m, n, 4, 123, torch.float32, A[0].device).reshape(-1) for m, n in ((30, 20), (9, 7))]
    assert torch.equal(first, torch.cat([expected[0], expected[0], expected[1]]))
    with mock.patch("spectral_kernels.kernels.composites.start_block", side_effect=AssertionError("drawn again")):
        first.zero_()  # what a caller does to his copy stays his
        assert torch.equal(start_blocks(A, 4, 123)[:80], expected[0])
        with pytest.raises(AssertionError, match="drawn again"):
            start_blocks(A, 4, 124)
