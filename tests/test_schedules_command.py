"""`spectral-kernels schedules`: the table, the drawing, files, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from spectral_kernels import cli, schedules_page
from spectral_kernels.ops.schedules import PUBLISHED, Schedule, schedule, validate


def run(capsys, *arguments: object) -> str:
    assert cli.main(["schedules", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refusal(capsys, *arguments: object) -> str:
    assert cli.main(["schedules", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("spectral-kernels: ") and err.count("\n") == 1, err
    return err


def row(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.split())


def test_every_list_has_a_row(capsys):
    out = run(capsys)
    for name in PUBLISHED:
        assert row(out, name)
    assert "standard in bfloat16" in out
    one = row(out, "polar_express_5_safety2e2_cushion2")
    assert one.startswith("polar_express_5_safety2e2_cushion2 5 989.5 0.8589 .. 1.1411 1.021817") and "safe" in one
    assert "flips the sign of inputs above 0.8836981" in row(out, "aol_4_old")
    assert "outputs pass 2 for inputs above 1.0000042" in row(out, "polar_express_8_unscaled")
    assert "polar_express, 5 steps: f(sigma)" in out and "\u2812" in out


def test_names_dtypes_methods_and_steps(capsys):
    out = run(capsys, "keller_quintic", "polar_express", "--dtype", "float16", "--method", "gram")
    assert "gram in float16" in out
    rows = [line for line in out.splitlines() if line.startswith(tuple(PUBLISHED) + ("polar_express",))]
    assert len([line for line in rows if "f(sigma)" not in line]) == 2
    assert row(out, "keller_quintic").endswith(" 2 safe") and " 1, 2 safe" in row(out, "polar_express")
    assert out.count("f(sigma)") == 2
    longer = run(capsys, "keller_quintic", "--steps", 8, "--dtype", "float32")
    assert row(longer, "keller_quintic").startswith("keller_quintic 8 1.982e+04")


def test_lists_without_that_number_of_steps_say_so(capsys):
    out = run(capsys, "--steps", 8, "--dtype", "float64")
    assert row(out, "youjiacheng_5").endswith("its coefficients hold together")
    assert row(out, "cubic").endswith("safe") and "polar_express, 5 steps" in out


def test_json(capsys, tmp_path):
    content = json.loads(run(capsys, "--json", "-", "--dtype", "float32", "--method", "gram"))
    assert content["dtype"] == "float32" and content["method"] == "gram"
    entries = {entry["name"]: entry for entry in content["schedules"]}
    assert list(entries) == list(PUBLISHED)
    one = entries["polar_express_8_s101"]
    assert [tuple(t) for t in one["steps"]] == list(PUBLISHED["polar_express_8_s101"].steps)
    assert one["restarts_for_gram"] == [5] == one["validation"]["restarts"] and one["validation"]["safe"] is True
    assert one["properties"]["largest_safe_sigma"] == pytest.approx(1.0109155)
    assert one["validation"]["deviation"] == validate("polar_express_8_s101", method="gram").deviation
    broken = entries["polar_express_8_unscaled"]
    assert broken["validation"]["noise"] is None and broken["restarts_for_gram"] is None
    target = tmp_path / "all.json"
    assert "safe" in run(capsys, "cubic", "--json", target)
    assert [entry["name"] for entry in json.loads(target.read_text())["schedules"]] == ["cubic"]


def test_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "f.svg"
    run(capsys, "polar_express", "cubic", "--plot", target)
    assert target.read_text().startswith("<?xml")
    figure = schedules_page.picture([(name, schedule(name)) for name in ("polar_express", "cubic", "aol_4_old")])
    lines = [line for line in figure.axes[0].lines if "steps" in str(line.get_label())]
    for line, name in zip(lines, ("polar_express", "cubic", "aol_4_old"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), schedule(name)(line.get_xdata()))
    assert figure.axes[0].get_ylim()[0] < -1  # the reversed outputs are seen


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["unheard"], "schedule must be one of 'polar_express', 'keller_quintic'"),
        (["cubic", "youjiacheng_5", "--steps", "7"], "steps must be 5 or None for schedule 'youjiacheng_5', not 7"),
        (["cubic", "--steps", "0"], "--steps must be in [1, 99], not 0"),
        (["--steps", "100"], "--steps must be in [1, 99], not 100"),
        (["--plot", "f.txt"], "--plot f.txt: a picture's name ends in one of"),
        (["--json", "nowhere/f.json"], "--json nowhere/f.json: its folder does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = [] if "--json" in arguments else ["--json", "kept.json"]
    assert part in refusal(capsys, *arguments, *extra)
    assert not list(tmp_path.iterdir())


def test_unknown_choices_are_refused(capsys):
    for arguments in (["--dtype", "int8"], ["--method", "svd"], ["--steps", "x"]):
        assert cli.main(["schedules", *arguments]) == 2
        assert arguments[1] in capsys.readouterr().err


def test_the_drawing_is_the_polynomial():
    half = Schedule("half", ((0.5, 0.0, 0.0),))
    lines = schedules_page.draw(half, width=40, height=12)
    assert len(lines) == 14 and lines[-1].split() == ["0.0001", "0.001", "0.01", "0.1", "1"]
    marked = [line for line in lines if line.lstrip().startswith("0.5 |")]
    assert marked[0][-1] > "\u2800"  # the last dots, at sigma = 1, lie on the line of 0.5
    assert lines[0].endswith("|")  # nothing above 1
    flat = schedules_page.draw(Schedule("one", ((1e4, 0.0, 0.0), (0.0, 0.0, 0.0))), width=20, height=6)
    assert flat[5].endswith("\u28c0" * 20)  # zero everywhere: the lowest dots of the lowest line


def test_a_terminal_without_braille():
    rows = schedules_page.collect(["cubic"], None, torch.float32, "standard")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    schedules_page.show(rows, [("cubic", schedule("cubic"))], "standard in float32", stream)
    stream.seek(0)
    out = stream.read()
    assert row(out, "cubic").endswith("|none |safe") and "*" in out


def test_help_is_quick():
    lines = ["import sys", "from spectral_kernels.cli import main", "assert main(['schedules', '--help']) == 0"]
    lines += ["assert 'torch' not in sys.modules and 'numpy' not in sys.modules"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--method" in done.stdout and "f(sigma)" in done.stdout
