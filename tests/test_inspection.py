"""What `inspect` measures, against torch.linalg in float64; memory; comparison; tables, JSON, CSV and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="needs safetensors (extra `inspect`)")

from safetensors.torch import save_file  # noqa: E402

from spectral_kernels import inspection, reporting  # noqa: E402
from spectral_kernels.checkpoints import Entry, open_checkpoint  # noqa: E402
from spectral_kernels.comparison import compare  # noqa: E402
from spectral_kernels.inspection import Options, groups, inspect_checkpoint  # noqa: E402

EXACT_ROUNDING = 1e-5  # float32 values of float64 truths: a few hundred eps, sums of up to 1e4 squares


def exact(matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), ord=2)) if matrix.numel() else 0.0


def inspected(tmp_path: Path, tensors: dict[str, torch.Tensor], **options) -> inspection.Report:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return inspect_checkpoint(open_checkpoint(path), Options(**options))


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return {
        "wide": draw(30, 200) / 7,
        "tall": draw(150, 20),
        "row": draw(1, 40),
        "column": draw(40, 1),
        "one": torch.tensor([[-3.0]]),
        "double": draw(25, 25).double(),
        "bf16": draw(64, 48).bfloat16(),
        "fp16": draw(48, 64).half() * 0.01,
        "huge": draw(20, 30) * 1e30,
        "tiny": draw(20, 30) * 1e-36,
        "rank one": draw(40, 1) @ draw(1, 60),
        "zero": torch.zeros(12, 8),
        "empty": torch.zeros(0, 8),
        "no inputs": torch.zeros(8, 0),
        "embed_tokens.weight": draw(300, 16),
        "features.conv.weight": draw(8, 3, 5, 5),
        "features.video": draw(4, 2, 3, 3, 3),
        "conv1d.weight": draw(6, 4, 3),
    }


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_values_brackets_and_ranks_against_float64(tol, tmp_path):
    held = weights()
    report = inspected(tmp_path, held, tol=tol)
    rows = {row.name: row for row in report.matrices}
    assert rows.keys() == held.keys() and not report.skipped and not report.vectors
    for name, tensor in held.items():
        row = rows[name]
        matrix = tensor.double().flatten(1)
        sigma, (m, n) = exact(matrix), matrix.shape
        assert row.shape == tuple(tensor.shape) and (row.fan_out, row.fan_in) == (m, n), name
        assert abs(row.sigma - sigma) <= tol * sigma * (1 + EXACT_ROUNDING), name
        assert row.lower <= sigma * (1 + EXACT_ROUNDING) and sigma <= row.upper * (1 + EXACT_ROUNDING), name
        assert row.lower <= row.sigma <= row.upper, name
        if sigma:
            assert row.ratio == pytest.approx(row.sigma / math.sqrt(m / n), rel=1e-12), name
            rank = float((matrix / sigma).square().sum())
            assert row.stable_rank == pytest.approx(rank, rel=2.5 * tol), name
        else:
            assert row.stable_rank == 0, name
    assert rows["one"].sigma == 3.0


def test_a_stack_has_one_row_per_matrix(tmp_path):
    stack = torch.randn(5, 12, 7)
    report = inspected(tmp_path, {"experts": stack, "cls_token": torch.randn(1, 1, 9), "none": torch.zeros(0, 3, 3)})
    rows = {row.name: row for row in report.matrices}
    assert list(rows) == [f"experts[{i}]" for i in range(5)] + ["cls_token"] or set(rows) == {
        *(f"experts[{i}]" for i in range(5)),
        "cls_token",
    }
    for i in range(5):
        assert rows[f"experts[{i}]"].sigma == pytest.approx(exact(stack[i]), rel=1e-3)
        assert rows[f"experts[{i}]"].shape == (12, 7)
    assert [(row.name, row.reason) for row in report.skipped] == [("none", "an empty stack")]


def test_vectors_and_skipped_tensors(tmp_path):
    held = {
        "bias": torch.tensor([3.0, 4.0]),
        "gain": torch.tensor([1e300, 1e300], dtype=torch.float64),
        "half": torch.full((1000,), 250.0).half(),  # its square overflows float16
        "scalar": torch.tensor(-2.0),
        "nan": torch.tensor([1.0, math.nan, math.inf]),
        "inf": torch.tensor([1.0, -math.inf]),
        "none": torch.zeros(0),
        "ids": torch.arange(3),
    }
    report = inspected(tmp_path, held)
    rows = {row.name: row for row in report.vectors}
    assert rows["bias"].l2 == pytest.approx(5) and rows["bias"].rms == pytest.approx(5 / math.sqrt(2))
    assert rows["gain"].l2 == pytest.approx(math.sqrt(2) * 1e300) and rows["half"].rms == pytest.approx(250)
    assert rows["scalar"].l2 == 2 and rows["none"].l2 == 0 and rows["none"].rms == 0
    assert math.isnan(rows["nan"].l2) and rows["inf"].l2 == math.inf
    assert [(row.name, row.reason) for row in report.skipped] == [("ids", "integer")] and not report.matrices


def test_nonfinite_matrices_leave_their_neighbours_alone(tmp_path):
    held = {name: torch.randn(20, 20) for name in ("a", "bad", "b", "worse")}
    held["bad"][3, 4], held["worse"][0, 0], held["worse"][1, 1] = math.inf, math.nan, math.inf
    rows = {row.name: row for row in inspected(tmp_path, held).matrices}
    assert rows["bad"].sigma == rows["bad"].upper == math.inf and math.isnan(rows["bad"].stable_rank)
    assert math.isnan(rows["worse"].sigma) and math.isnan(rows["worse"].ratio)
    for name in "ab":
        assert rows[name].sigma == pytest.approx(exact(held[name]), rel=1e-3)


def entry(name: str, *shape: int, dtype: str = "float32", file: str = "f") -> Entry:
    return Entry(name, shape, dtype, None, Path(file))


def test_groups_are_bounded_complete_and_of_one_dtype_and_file():
    entries = [entry(f"w{i}", 10, 10 + i % 3) for i in range(30)]
    entries += [entry(f"h{i}", 20, 20, dtype="bfloat16") for i in range(5)]
    entries += [entry("stack", 50, 10, 10), entry("large", 100, 100), entry("other", 10, 10, file="g")]
    limit = 4000
    seen: dict[str, list[int]] = {}
    for group in groups(entries, limit):
        assert len({(piece.entry.file, piece.entry.dtype) for piece in group}) == 1
        size = sum(piece.nbytes for piece in group)
        assert size <= limit or (len(group) == 1 and group[0].entry.name == "large")
        for piece in group:
            seen.setdefault(piece.entry.name, []).extend(range(piece.start, piece.stop))
    assert seen == {e.name: list(range(50 if e.name == "stack" else 1)) for e in entries}
    assert len(list(groups(entries, 1 << 30))) == 3  # many small matrices make one call


def test_results_do_not_depend_on_the_group_size(tmp_path):
    held = {f"w{i}": torch.randn(16, 8 + i) for i in range(6)} | {"s": torch.randn(7, 9, 5)}
    one = inspected(tmp_path, held)
    many = inspected(tmp_path, held, group_bytes=600)
    for a, b in zip(one.matrices, many.matrices, strict=True):
        assert (
            a.name == b.name
            and a.sigma == pytest.approx(b.sigma, rel=1e-6)
            and a.upper == pytest.approx(b.upper, rel=1e-5)
        )


PEAK = """
import sys
from spectral_kernels.checkpoints import open_checkpoint
from spectral_kernels.inspection import Options, inspect_checkpoint
def peak():  # KiB; ru_maxrss would count the parent's
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
small, large = map(open_checkpoint, sys.argv[1:])
inspect_checkpoint(small, Options())
start = peak()
for limit in (4 << 20, 1 << 30):
    assert len(inspect_checkpoint(large, Options(tol=0.1, group_bytes=limit)).matrices) == 64
    print(peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_memory_stays_with_the_group_not_with_the_file(suffix, tmp_path):
    """Peak memory while inspecting 128 MiB: in groups of 4 MiB, and in one, where the same measure sees the file."""
    save = save_file if suffix == ".safetensors" else torch.save
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    save({"w": torch.randn(64, 1024)}, small)
    save({f"w{i}": torch.randn(16, 1 << 15) for i in range(64)}, large)
    command = [sys.executable, "-c", PEAK, str(small), str(large)]
    grouped, at_once = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    file_kib = large.stat().st_size // 1024
    assert grouped < 0.3 * file_kib
    assert at_once > 0.5 * file_kib  # of the file's pages some fit below the peak of the imports


def pair(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[Path]]:
    a = {
        "kept": torch.randn(30, 20),
        "moved": torch.randn(24, 36),
        "stack": torch.randn(3, 8, 9),
        "conv.weight": torch.randn(4, 3, 3, 3),
        "bias": torch.randn(10),
        "cast": torch.randn(12, 12),
        "reshaped": torch.randn(6, 6),
        "gone": torch.randn(5, 5),
        "gone bias": torch.randn(5),
        "became ids": torch.randn(4, 4),
        "ids": torch.arange(3),
    }
    b = {name: tensor.clone() for name, tensor in a.items() if not name.startswith("gone")}
    b["moved"] += 1e-3 * torch.randn(24, 1) @ torch.randn(1, 36)
    b["stack"][1] += torch.randn(8, 9)
    b["conv.weight"] *= 2
    b["bias"] += 1
    b["cast"] = b["cast"].bfloat16()
    b["reshaped"] = torch.randn(6, 7)
    b["became ids"] = torch.ones(4, 4, dtype=torch.int32)
    b["added"] = torch.randn(3, 3)
    b["added stack"] = torch.randn(2, 3, 3)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.pt"]
    save_file(a, paths[0])
    torch.save(b, paths[1])
    return a, b, paths


@pytest.mark.parametrize("group_bytes", [1 << 26, 500])
def test_changes_are_the_norms_of_the_differences(group_bytes, tmp_path):
    a, b, paths = pair(tmp_path)
    options = Options(tol=1e-4, group_bytes=group_bytes)
    changes = compare(*map(open_checkpoint, paths), options)
    status = {name: change.status for name, change in changes.items()}
    assert {name for name, s in status.items() if s == "new"} == {"added", "added stack[0]", "added stack[1]"}
    assert {name for name, s in status.items() if s == "missing"} == {"gone", "gone bias"}
    assert {name for name, s in status.items() if s == "skipped"} == {"ids", "became ids"}
    assert status["reshaped"] == "reshaped" and changes["reshaped"].note == "shape changed: 6x6 -> 6x7"
    assert changes["cast"].note == "float32 -> bfloat16" and changes["became ids"].note == "integer"
    for name in ("kept", "moved", "conv.weight", "cast"):
        truth = exact((b[name].double() - a[name].double()).flatten(1))
        change = changes[name]
        assert change.delta == pytest.approx(truth, rel=1.1e-4, abs=1e-12), name
        assert change.lower <= change.delta <= change.upper
        assert change.upper >= truth * (1 - EXACT_ROUNDING)
    assert changes["kept"].delta == 0
    assert changes["moved"].stable_rank == pytest.approx(1, abs=1e-2)
    assert [changes[f"stack[{i}]"].delta for i in (0, 2)] == [0, 0]
    assert changes["stack[1]"].delta == pytest.approx(exact(b["stack"][1] - a["stack"][1]), rel=1.1e-4)
    assert changes["bias"].delta == pytest.approx(math.sqrt(10), rel=1e-6) and changes["bias"].lower is None
    assert list(changes)[-3:] == ["added", "added stack[0]", "added stack[1]"]


def whole(tmp_path: Path) -> reporting.Inspection:
    _, _, paths = pair(tmp_path)
    first, later = map(open_checkpoint, paths)
    options = Options()
    reports = [inspect_checkpoint(checkpoint, options) for checkpoint in (first, later)]
    return reporting.Inspection(reports, [compare(first, later, options)], options)


def alone(**sigmas: float) -> reporting.Inspection:
    rows = [
        inspection.Matrix(name, (2 + i, 2), "float32", 2 + i, 2, sigma, sigma, sigma, 1.0, sigma, 9.0 - i)
        for i, (name, sigma) in enumerate(sigmas.items())
    ]
    return reporting.Inspection([inspection.Report("f", matrices=rows)])


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("name", ["w2", "w9", "w10", "x"]),
        ("sigma", ["w9", "w2", "x", "w10"]),  # NaN before all numbers
        ("ratio", ["w9", "w2", "x", "w10"]),
        ("stable_rank", ["w10", "w2", "w9", "x"]),
        ("size", ["x", "w9", "w2", "w10"]),
    ],
)
def test_sorting(by, names):
    for reverse in (False, True):
        shown = alone(w10=1.0, w2=5.0, w9=math.nan, x=2.0)
        shown.order(by, reverse)
        assert [row.name for row in shown.reports[0].matrices] == (names[::-1] if reverse else names)


def test_sorting_by_change_orders_every_file(tmp_path):
    shown = whole(tmp_path)
    shown.order("change", False)
    deltas = [c.delta for c in shown.changes[0].values() if c.lower is not None]
    assert deltas == sorted(deltas, reverse=True) and len(deltas) == 7
    common = [row.name for row in shown.reports[0].matrices if row.name in {r.name for r in shown.reports[1].matrices}]
    assert common == [row.name for row in shown.reports[1].matrices if row.name in common]


def test_printed_brackets_round_outwards():
    assert reporting.bracket(1.23456789, 1.23456789) == "1.2345 .. 1.2346"
    assert reporting.number(1.23456789) == "1.2346" and reporting.number(30522.0) == "30522"
    assert reporting.number(math.inf) == "inf" and reporting.number(None) == "" and reporting.number(0.0) == "0.0000"
    assert reporting.bracket(math.nan, math.nan) == ""


def test_names_from_files_cannot_reach_the_terminal_as_control_codes():
    shown = alone(**{"bad\x1b[31m[red]\n": 2.0})
    stream = io.StringIO()
    reporting.show(shown, stream)
    assert "\x1b" not in stream.getvalue() and r"bad\x1b[31m[red]\n" in stream.getvalue()


def test_a_narrow_terminal_cuts_no_number(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    shown, stream = whole(tmp_path), Terminal()
    shown.order("name", False)
    reporting.show(shown, stream)
    change = shown.changes[0]["conv.weight"]
    for text in (reporting.bracket(change.lower, change.upper), reporting.number(change.stable_rank), "4x3x3x3"):
        assert text in stream.getvalue()


def test_tables_name_everything(tmp_path):
    stream = io.StringIO()
    shown = whole(tmp_path)
    shown.order("name", False)
    reporting.show(shown, stream)
    text = stream.getvalue()
    for part in (*shown.changes[0], "shape changed: 6x6 -> 6x7", "integer", "float32 -> bfloat16", "a = ", "b = "):
        assert part in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["gone"].rstrip().endswith("missing") and lines["added"].rstrip().endswith("new")
    assert reporting.number(shown.changes[0]["moved"].delta) in lines["moved"]


def test_three_files_have_a_column_each(tmp_path):
    shown = whole(tmp_path)
    third = dict.fromkeys(shown.changes[0])
    third = {name: type(change)(name, "measured", "", 77.0) for name, change in shown.changes[0].items()}
    shown = reporting.Inspection([*shown.reports, shown.reports[0]], [*shown.changes, third])
    shown.order("name", False)
    stream = io.StringIO()
    reporting.show(shown, stream)
    text = stream.getvalue()
    assert "||b - a||" in text and "||c - a||" in text and "sigma(c)" in text and "77.000" in text


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_json_is_strict_and_holds_every_number(tmp_path):
    shown = whole(tmp_path)
    shown.reports[0].matrices += alone(nan=math.nan, inf=math.inf).reports[0].matrices
    stream = io.StringIO()
    reporting.write_json(shown, stream)
    content = json.loads(stream.getvalue(), parse_constant=refuse)
    rows = {row["name"]: row for row in content["files"][0]["matrices"]}
    assert rows["nan"]["sigma"] == "NaN" and rows["inf"]["sigma"] == "Infinity"
    truth = {row.name: row for row in shown.reports[0].matrices}
    assert all(
        rows[name]["sigma"] == truth[name].sigma and rows[name]["upper"] == truth[name].upper
        for name in ("kept", "cast")
    )
    layers = {layer["name"]: layer for layer in content["changes"][0]["layers"]}
    assert layers["moved"]["delta"] == shown.changes[0]["moved"].delta and layers["gone"]["status"] == "missing"
    assert content["tol"] == 1e-3 and content["files"][1]["skipped"][0]["reason"] == "integer"


def test_csv_reads_back(tmp_path):
    shown = whole(tmp_path)
    shown.reports[0].matrices += alone(nan=math.nan).reports[0].matrices
    stream = io.StringIO()
    reporting.write_csv(shown, stream)
    rows = list(csv.DictReader(io.StringIO(stream.getvalue())))
    assert set(rows[0]) == set(reporting.CSV_COLUMNS) and not any(None in row for row in rows)
    a, b = ({row["name"]: row for row in rows if row["file"].endswith(end)} for end in ("a.safetensors", "b.pt"))
    assert float(b["moved"]["delta"]) == shown.changes[0]["moved"].delta and a["moved"]["delta"] == ""
    assert b["gone"]["kind"] == "missing" and b["added"]["change"] == "new" and a["ids"]["note"] == "integer"
    assert a["conv.weight"]["shape"] == "4x3x3x3" and a["conv.weight"]["fan_in"] == "27"
    nan = next(row for row in rows if row["name"] == "nan")
    assert math.isnan(float(nan["sigma"]))


def test_the_picture_shows_every_layer_and_keeps_its_labels_apart(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra `plot`)")
    from spectral_kernels import inspection_plot

    for count in (1, 150, 900):
        shown = alone(**{f"model.layers.{i}.mlp.weight": 1.0 + i for i in range(count)}, bad=math.nan)
        figure = inspection_plot.picture(shown)
        left, right = figure.axes
        assert len(left.lines[0].get_ydata()) == len(right.lines[0].get_ydata()) == count
        labels = [label for label in left.get_yticklabels() if label.get_text()]
        assert len(labels) == (count + 1 if count < 400 else math.ceil((count + 1) / 3))
        if count > 400:
            continue
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
        assert all(a.y0 >= b.y1 - 1 for a, b in zip(boxes, boxes[1:], strict=False)), "labels overlap"
        assert min(box.x0 for box in boxes) >= 0
    inspection_plot.draw(alone(w=1.0, v=2.0), str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
