"""The Triton `gram_matvec` against float64: through the interpreter on CPU tensors, or on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections import OrderedDict
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectral_kernels.kernels import reference
from spectral_kernels.kernels.contracts import STATS, counts, sides

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, INTERPRETER):
    # Triton is imported here and decides, once, whether its kernels are compiled or interpreted
    from spectral_kernels.kernels import triton as backend
    from spectral_kernels.kernels.triton import one_read
    from spectral_kernels.kernels.triton import ragged as tables


@pytest.fixture(autouse=True)
def _interpreted():
    with mock.patch.dict(os.environ, INTERPRETER):
        yield


def make(m: int, n: int, layout: str, k: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A stack (k, m, n) of normals in one of the layouts that a caller may bring."""
    if layout == "rows":
        a = torch.randn(k, m, n)
    elif layout == "columns":
        a = torch.randn(k, n, m).mT
    elif layout == "padded":  # inner stride 1, rows apart
        a = torch.randn(k, m, n + 3)[:, :, 1 : n + 1]
    elif layout == "sliced":  # no stride is 1
        a = torch.randn(k, 2 * m, 3 * n)[:, ::2, ::3]
    elif layout == "broadcast":
        a = torch.randn(1, m, 1).expand(k, m, n)
    else:
        raise ValueError(layout)
    strides = a.stride()
    a = torch.empty_strided(a.shape, strides, dtype=dtype).copy_(a) if layout != "broadcast" else a.to(dtype)
    return a.to(DEVICE) if layout == "broadcast" or DEVICE == "cpu" else torch.empty_strided(
        a.shape, strides, dtype=dtype, device=DEVICE
    ).copy_(a)  # fmt: skip


def inputs(A: list[Tensor], b: int) -> tuple[Tensor, Tensor]:
    V = torch.randn(b * sum(sides(A, 2))).to(DEVICE)
    return V, (2.0 ** torch.randint(-3, 4, (counts(A),))).to(DEVICE)


def check(A: list[Tensor], b: int = 4, skip: Tensor | None = None) -> tuple[Tensor, ...]:
    """Every result of one call against float64: at most twice the error of plain float32 torch, plus rounding."""
    V, scale = inputs(A, b)
    before = [a.clone() for a in A], V.clone(), scale.clone()
    ours = backend.gram_matvec(A, V, scale, skip, b, True, True)
    plain = reference.gram_matvec(A, V, scale, skip, b, True, True)
    exact = reference.gram_matvec([a.double() for a in A], V.double(), scale.double(), skip, b, True, True)
    for name, x, y, z in zip(("W", "S", "stats", "Y"), ours, plain, exact, strict=True):
        assert x.shape == z.shape and x.dtype == y.dtype, name
        columns = x.unbind(1) if name == "stats" else (x,)
        for i, column in enumerate(columns):
            truth = z.unbind(1)[i] if name == "stats" else z
            theirs = y.unbind(1)[i] if name == "stats" else y
            if truth.numel():
                largest = truth.abs().max().item()
                error = (column.double() - truth).abs().max().item()
                allowed = 2 * (theirs.double() - truth).abs().max().item() + 8 * 2.0**-23 * largest
                assert error <= allowed, (name, i, error, allowed)
    for a, old in zip(A, before[0], strict=True):
        torch.testing.assert_close(a, old, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(V, before[1]) and torch.equal(scale, before[2])
    return ours


def test_the_kernels_run_here() -> None:
    expected = "JITFunction" if DEVICE == "cuda" else "InterpretedFunction"
    assert type(one_read.rows_kernel).__name__ == expected, (
        "Triton was imported before these tests chose the interpreter"
    )


@pytest.mark.parametrize(
    ("m", "n", "layout", "dtype", "b"),
    [  # every kind of the kernel, the edges of its tiles, and every dtype, layout and block width at least twice
        (64, 48, "rows", torch.float32, 4),
        (700, 48, "rows", torch.bfloat16, 4),
        (700, 48, "columns", torch.float16, 3),
        (48, 700, "rows", torch.float32, 1),
        (16, 300, "columns", torch.bfloat16, 4),
        (129, 128, "padded", torch.float32, 4),
        (70, 129, "sliced", torch.float16, 2),
        (33, 1028, "rows", torch.float16, 4),
        (3, 4096, "rows", torch.bfloat16, 2),
        (40, 4100, "rows", torch.float32, 4),
        (24, 140, "columns", torch.float32, 8),
        (20, 132, "columns", torch.float32, 1),
        (70, 300, "rows", torch.bfloat16, 16),
        (9, 700, "rows", torch.float32, 5),
        (600, 9, "columns", torch.bfloat16, 6),
        (6, 4100, "rows", torch.float16, 12),
        (31, 17, "sliced", torch.bfloat16, 3),
        (37, 101, "columns", torch.float32, 4),
        (20, 70, "broadcast", torch.float32, 4),
        (1, 9, "rows", torch.float32, 4),
        (9, 1, "rows", torch.float16, 4),
        (1, 1, "columns", torch.float32, 1),
        (70, 40, "rows", torch.float32, 17),  # more than 16 columns: two products, every width of the accumulators
        (20, 70, "columns", torch.bfloat16, 80),
        (33, 520, "sliced", torch.float16, 20),  # 520: K in two chunks
        (530, 33, "padded", torch.bfloat16, 33),
        (1, 34, "broadcast", torch.float32, 64),
        (20000, 4, "rows", torch.float32, 4) if DEVICE == "cuda" else (2000, 4, "rows", torch.float32, 4),
    ],
)
def test_one_matrix(m: int, n: int, layout: str, dtype: torch.dtype, b: int) -> None:
    check([make(m, n, layout, dtype=dtype)], b)


@pytest.mark.parametrize(("m", "n", "b"), [(0, 5, 4), (5, 0, 4), (0, 0, 4), (0, 5, 17), (5, 0, 17)])
def test_empty_sides(m: int, n: int, b: int) -> None:
    W, S, stats, Y = check([make(m, n, "rows"), make(3, 2, "rows")], b)
    assert not W[: b * n].any() and not S[0].any() and not stats[0].any() and not Y[: b * m].any()
    assert S[1].any()


def test_empty_lists() -> None:
    nothing = torch.empty(0, device=DEVICE)
    results = backend.gram_matvec([make(4, 3, "rows", k=0)], nothing, nothing, None, 4, True, True)
    assert [tuple(x.shape) for x in results] == [(0,), (0, 4, 4), (0, 4), (0,)]


def ragged(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((5, 3), (64, 64), (33, 32), (1, 7), (7, 1), (0, 4), (40, 130), (16, 12), (96, 20), (21, 21))
    layouts = ("rows", "columns", "sliced", "padded")
    return [make(m, n, layouts[i % 4], k=1 + (i % 3 == 1), dtype=dtype) for i, (m, n) in enumerate(shapes)]


@pytest.mark.parametrize(("dtype", "b"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float32, 17)])
def test_a_ragged_list_and_the_same_bits_alone(dtype: torch.dtype, b: int) -> None:
    A = ragged(dtype)[: 10 if b == 4 else 4]
    V, scale = inputs(A, b)
    check(A, b)
    W, S, stats, Y = backend.gram_matvec(A, V, scale, None, b, True, True)
    again = backend.gram_matvec(A, V, scale, None, b, True, True)
    assert all(torch.equal(x, y) for x, y in zip((W, S, stats, Y), again, strict=True))
    j = v = y = 0
    for a in A:
        for i in range(a.shape[0]):
            m, n = a.shape[1:]
            alone = backend.gram_matvec([a[i : i + 1]], V[v : v + b * n], scale[j : j + 1], None, b, True, True)
            assert torch.equal(alone[0], W[v : v + b * n])
            assert torch.equal(alone[1][0], S[j]) and torch.equal(alone[2][0], stats[j])
            assert torch.equal(alone[3], Y[y : y + b * m])
            j, v, y = j + 1, v + b * n, y + b * m


def test_three_hundred_tiny_matrices() -> None:
    check([make(1 + i % 5, 1 + i % 3, "rows") for i in range(100)] + [make(4, 4, "columns", k=200)], b=2)


@pytest.mark.parametrize("b", [4, 18])
def test_skipped_matrices_give_zeros_and_are_not_read(b: int) -> None:
    A = ragged()[: 10 if b == 4 else 4]
    A[1][0] = float("nan")  # matrix 1
    skip = torch.zeros(counts(A), dtype=torch.bool, device=DEVICE)
    skip[1] = skip[4] = True
    W, S, stats, Y = check(A, b, skip)
    assert torch.isfinite(W).all() and not S[1].any() and not stats[4].any() and torch.isfinite(Y).all()


def test_nothing_is_written_where_it_was_not_asked_for() -> None:
    A = ragged()
    V, scale = inputs(A, 4)
    W, S, stats, Y = backend.gram_matvec(A, V, scale, None, 4, False, False)
    full = backend.gram_matvec(A, V, scale, None, 4, True, True)
    for ours, theirs in ((W, full[0]), (S, full[1])):  # statistics take registers, hence other tiles and roundings
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert not stats.any() and Y.numel() == 0


@pytest.mark.parametrize(
    ("m", "n", "layout", "b"),
    [(40, 20, "rows", 4), (40, 20, "columns", 4), (33, 140, "sliced", 4), (33, 40, "rows", 17)],
)
def test_nan_and_inf_are_flagged_per_matrix(m: int, n: int, layout: str, b: int) -> None:
    A = [make(m, n, layout, k=4)]
    V, scale = inputs(A, b)
    clean = backend.gram_matvec(A, V, scale, None, b, True, False)
    A[0][0, m - 1, n - 1] = float("nan")
    A[0][1, 0, n // 2] = float("-inf")
    A[0][2, m // 2, 0] = float("inf")
    A[0][2, m // 3, 1] = float("nan")
    W, S, stats, _ = backend.gram_matvec(A, V, scale, None, b, True, False)
    assert stats[:, STATS["nan"]].tolist() == [1, 0, 1, 0]
    assert stats[:, STATS["inf"]].tolist() == [0, 1, 1, 0]
    assert torch.isfinite(stats[0, STATS["amax"]])
    assert torch.equal(W.view(4, b, n)[3], clean[0].view(4, b, n)[3])
    assert torch.equal(S[3], clean[1][3]) and torch.equal(stats[3], clean[2][3])


def test_huge_entries_are_not_taken_for_infinite_ones() -> None:
    A = [torch.full((1, 8, 8), 3e38, device=DEVICE)]  # squares overflow at scale 1
    V, _ = inputs(A, 4)
    stats = backend.gram_matvec(A, V, torch.ones(1, device=DEVICE), None, 4, True, False)[2][0].tolist()
    assert stats[1:] == [torch.tensor(3e38).item(), 0, 0]


def test_powers_of_two_scale_every_result_exactly() -> None:
    A = [make(50, 30, "rows")]
    V, _ = inputs(A, 4)
    one = backend.gram_matvec(A, V, torch.ones(1, device=DEVICE), None, 4, True, True)
    up = backend.gram_matvec([A[0] * 2.0**30], V, torch.full((1,), 2.0**-30, device=DEVICE), None, 4, True, True)
    assert torch.equal(one[0], up[0]) and torch.equal(one[1], up[1]) and torch.equal(one[3], up[3])
    assert up[2][0, 0] == one[2][0, 0] and up[2][0, 1] == one[2][0, 1] * 2.0**30


def test_a_list_seen_before_sends_nothing() -> None:
    A = ragged()
    V, scale = inputs(A, 4)
    backend.gram_matvec(A, V, scale, None, 4, False, False)
    with mock.patch.object(one_read, "_describe", side_effect=AssertionError("described again")):
        backend.gram_matvec(A, V, scale, None, 4, False, False)
        with pytest.raises(AssertionError, match="described again"):
            backend.gram_matvec([make(3, 2, "rows")], V[:8], scale[:1], None, 4, False, False)


def test_forms_and_launches_depend_on_layout_and_width() -> None:
    """Wide loads only where every address that a thread computes is a multiple of their size."""
    assert one_read.form_of(64, 48, 48, 1) == one_read.ALIGNED
    assert one_read.form_of(68, 48, 48, 1) == one_read.UNIT
    assert one_read.form_of(64, 47, 48, 1) == one_read.UNIT
    assert one_read.form_of(64, 48, 47, 1) == one_read.UNIT
    assert one_read.form_of(64, 48, 48, 2) == one_read.STRIDED

    def launched(a: Tensor, b: int = 4) -> list[str]:
        return [launch.kernel for launch in one_read._describe([a], b, None)[1].launches]

    assert launched(torch.empty(1, 8, 4096)) == ["rows", "finish"]
    assert launched(torch.empty(1, 8, 4096), 5) == ["rows", "square", "finish"]
    assert launched(torch.empty(1, 8, 4097)) == ["long dots", "long sums", "square", "finish"]
    assert launched(torch.empty(1, 9, 8).mT) == ["column sums", "add", "column dots", "square", "finish"]
    assert launched(torch.empty(1, 0, 8)) == launched(torch.empty(1, 8, 0)) == ["finish"]
    widths = {one_read._describe([torch.empty(1, 3, c.width)], 4, None)[1].launches[0].config for c in one_read.ROWS}
    assert widths == set(range(len(one_read.ROWS)))


def test_a_table_that_a_graph_reads_outlives_its_place_among_those_kept() -> None:
    kept, captured = OrderedDict(), set()
    with mock.patch.object(tables, "_tables", kept), mock.patch.object(tables, "_captured", captured):
        for key in range(3):
            kept["cuda", 0, key] = tables.Table(torch.tensor([key]), None)
        refs = [weakref.ref(each.tensor) for each in kept.values()]
        device, failing = torch.device("cuda", 0), mock.Mock(side_effect=AssertionError("not kept"))
        for key, capturing in ((0, True), (1, False)):
            with mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing):
                assert tables.table(key, device, failing) is kept["cuda", 0, key]
        for number in range(tables.KEPT):
            tables.table(number, torch.device("cpu"), lambda: ([], None))
        assert [ref() is not None for ref in refs] == [True, False, False] and len(kept) == tables.KEPT


def test_supports_says_no_in_words() -> None:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        assert backend.supports("gram_matvec", "cpu", torch.float32, 4) is None
        assert "interpreter" in (backend.supports("gram_matvec", "cuda", torch.float32, 4) or "")
        assert "float64" in (backend.supports("gram_matvec", "cpu", torch.float64, 4) or "")
        assert "81" in (backend.supports("gram_matvec", "cpu", torch.float32, 81) or "")
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        assert "TRITON_INTERPRET" in (backend.supports("gram_matvec", "cpu", torch.float32, 4) or "")
        assert backend.supports("rayleigh_ritz_", "cuda", torch.bfloat16, 4) is None
        assert "mps" in (backend.supports("rayleigh_ritz_", "mps", torch.bfloat16, 4) or "")
    assert "block_krylov" in (backend.supports("block_krylov", "cuda", torch.float32, 4) or "")
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert backend.supports("gram_matvec", "cuda", torch.float32, 4) == "triton is not installed"
