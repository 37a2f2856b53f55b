"""The study of clipping: its grid, what a run records, resuming, the command, page and pictures from a made-up file."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from spectral_kernels import cli, scaling
from spectral_kernels.bench import runs
from spectral_kernels.bench.measure import document
from spectral_kernels.bench.training import Spikes
from spectral_kernels.experiments import EXPERIMENTS, dial, dial_page, dial_plot, module_of
from spectral_kernels.experiments.dial_results import best_of, order, parts_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "clip.md"
RESULT = ROOT / "benchmarks" / "results" / "dial.json"
CASE = dial.Case(32, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


# -- the grid


def test_the_climb_measures_only_what_is_not_known():
    seen = []

    def measure(k):
        seen.append(k)
        return abs(k - 3.2)

    assert runs.climb(measure, 0, 14) == 3 and sorted(seen) == [-1, 0, 1, 2, 3, 4]
    seen.clear()
    assert runs.climb(measure, -50, 14, {2: 1.2, 3: 0.2}) == 3 and seen == [4]
    seen.clear()
    assert runs.climb(measure, -50, 14, {k: abs(k - 3.2) for k in (2, 3, 4)}) == 3 and seen == []
    assert runs.search(lambda lr: abs(math.log(lr, 1.5) - 2.2), 1.0, factor=1.5) == 1.5**2


def test_rates_are_powers_that_every_width_shares():
    rates = [dial.rate(k) for k in range(-25, 5)]
    assert all(b / a == pytest.approx(1.5, rel=1e-3) for a, b in zip(rates, rates[1:], strict=False))
    assert dial.rate(0) == 1 and len({f"{r:.2g}" for r in rates}) == len(rates)  # the tables tell them apart


def test_the_rates_of_a_run_follow_the_schedule():
    run, seen = CASE.task(0), []
    optimizer = torch.optim.SGD(run.model.parameters(), 0.5)
    group = optimizer.param_groups[0]
    losses, times = runs.follow(run, optimizer, 4, on_step=lambda step: seen.append(group["lr"]))
    assert seen == [0.5 * runs.schedule(step, 4) for step in range(4)] and group["lr"] == 0
    assert len(losses) == len(times) == 4 and times == sorted(times)


# -- a run


@pytest.mark.parametrize("method", ["frobenius", "clip 4", "Muon"])
def test_the_method_moves_the_hidden_matrices_and_adamw_the_rest(method):
    run = CASE.task(0)
    pair = dial.build(method, run, 0.1, 0.01)
    mine, others = ([p for g in part.param_groups for p in g["params"]] for part in pair.parts)
    assert [tuple(p.shape) for p in mine] == [(96, 32), (32, 32), (128, 32), (32, 128)] * 2
    assert len(mine) + len(others) == len(list(run.model.parameters())) and [g["lr"] for g in pair.param_groups] == [
        0.1,
        0.01,
    ]
    group = pair.parts[0].param_groups[0]
    assert group["momentum"] == dial.MOMENTUM
    if method == "clip 4":
        assert (group["direction"], group["rank"], group["kind"]) == ("clip", 4, "matrix")
        assert group["nesterov"] and group["rule"] == "original"  # as Muon: only directions differ


class Known(torch.optim.Optimizer):
    """W <- W - lr factor D, all singular values of D equal to `size` (of a matrix: the number of its step, first 1)."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.steps = 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for group in self.param_groups:
            for W in group["params"]:
                D = torch.eye(*W.shape, dtype=torch.float64) * self.steps
                W.copy_(W.double() - group["lr"] * scaling.target(dial.RULE, *W.shape) * D)


def test_the_watch_measures_what_moved(monkeypatch):
    def build(method, run, lr, other):
        return runs.with_adamw(run, lambda matrices: Known(matrices, lr), other)

    monkeypatch.setattr(dial, "build", build)
    monkeypatch.setattr(dial, "SAMPLED", 4)
    record = dial.trained(dial.Case(32, 9), "normalize", -3, 0, 0.01)
    assert record["norms"] == {  # after steps 0 and 4; step 8 is the last
        "mean": pytest.approx(3, rel=1e-4), "p99": pytest.approx(5, rel=1e-4), "max": pytest.approx(5, rel=1e-4),
        "samples": 16,
    }  # fmt: skip
    spiked = dial.trained(dial.Case(32, 9), "normalize", -3, 0, 0.01, Spikes(3, 2.0))
    assert spiked["norms"]["samples"] == 32 and spiked["norms"]["max"] == pytest.approx(6, rel=1e-4)  # 0, 2, 4, 5
    assert spiked["spikes"] == 2.0 and spiked["train"] is not None
    assert dial.trained(CASE, "normalize", -3, 1, 0.01)["norms"] is None  # another seed


def test_a_run_records_losses_reads_and_norms():
    record = dial.trained(CASE, "clip 2", -9, 0, 0.005)
    assert (record["width"], record["steps"], record["method"], record["lr"]) == (32, 4, "clip 2", dial.rate(-9))
    assert len(record["curve"]) == 4 and record["curve"][0][1] == pytest.approx(math.log(96), abs=0.4)
    assert 1 <= record["reads"] <= 6 and record["norms"]["samples"] == 8
    assert 0.99 < record["norms"]["mean"] < 1.1 and record["validation"] < record["curve"][0][1]
    lost = dial.trained(dial.Case(32, 8), "SGD", 60, 0, None)
    assert lost["validation"] is None and runs.loss_of(lost) == math.inf
    json.dumps(lost, allow_nan=False)


# -- the study and its file


def small(path, monkeypatch):
    monkeypatch.setattr(dial, "MOST", 3)
    return dial.Study(runs.Results(path), 2, say=lambda text: None)


def test_finished_runs_are_kept_and_a_cut_file_is_completed(tmp_path, monkeypatch):
    path = tmp_path / "results" / "dial.json"
    monkeypatch.setattr(dial, "SPIKED", ("clip 1",))
    methods = ("SGD", "clip 1", "clip 32")
    small(path, monkeypatch).run(32, methods, (0, 1))
    whole, (_, records) = path.read_text(), runs.load(path)
    counts = {m: [r for r in records if r["method"] == m] for m in ("AdamW", *methods)}
    assert {m: len(found) for m, found in counts.items()} == {"AdamW": 3, "SGD": 4, "clip 1": 6, "clip 32": 0}
    adam = best_of(records, 32, 2, "AdamW")[0]["lr"]
    assert {r["other"] for r in counts["clip 1"]} == {adam} and {r["other"] for r in counts["SGD"]} == {None}
    assert [r["spikes"] for r in counts["clip 1"] if r["spikes"]] == list(dial.SIZES)
    assert [r["seed"] for r in best_of(records, 32, 2, "clip 1")] == [0, 1]
    trained, made = dial.trained, []
    monkeypatch.setattr(dial, "trained", lambda *args: made.append(args) or trained(*args))
    small(path, monkeypatch).run(32, methods, (0, 1))
    assert made == [] and path.read_text() == whole and str(tmp_path) not in whole
    cut = tmp_path / "cut.json"
    described = runs.Results(path).described
    cut.write_text(json.dumps(document(records[:5] + records[6:8], described)))
    small(cut, monkeypatch).run(32, methods, (0, 1))
    key = ("method", "k", "seed", "spikes", "validation")
    assert len(made) == len(records) - 7
    found = [sorted([str([r[x] for x in key]) for r in part]) for part in (records, runs.load(cut)[1])]
    assert found[0] == found[1]


def test_two_processes_fill_one_file(tmp_path):
    path = tmp_path / "dial.json"
    ours, theirs = runs.Results(path), runs.Results(path)
    for i, results in enumerate((ours, theirs, ours, theirs)):
        results.add({"table": "run", "number": i})
    assert [r["number"] for r in runs.load(path)[1]] == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["dial.json"]
    ours.described["threads"] += 1
    with pytest.raises(ValueError, match="threads"):
        ours.add({"table": "run"})
    assert len(runs.load(path)[1]) == 4


def test_a_wider_model_starts_where_the_narrower_one_ended(made_up, tmp_path):
    study = dial.Study(runs.Results(tmp_path / "none.json"), 300)
    assert study.start(dial.Case(256, 300), "clip 8") == dial.STARTS["clip 8"]
    assert study.start(dial.Case(256, 300), "clip 24") in (dial.STARTS["clip 16"], dial.STARTS["clip 32"])
    study.results.records = runs.load(made_up)[1]
    assert study.start(dial.Case(256, 300), "clip 8") == -8 and study.start(dial.Case(512, 300), "clip 8") == -7
    assert study.start(dial.Case(128, 300), "clip 8") == dial.STARTS["clip 8"]  # nothing narrower


# -- page and pictures, from a made-up file

LOSSES = {  # width -> method -> loss at the best rate; n/8 is clip 16 and 32, n/4 clip 32 and 64
    128: {"AdamW": 2.2, "SGD": 2.9, "normalize": 2.4, "clip 8": 2.1, "clip 16": 2.05, "clip 32": 1.98, "Muon": 1.9},
    256: {"AdamW": 2.0, "normalize": 2.2, "clip 8": 1.95, "clip 32": 1.85, "clip 64": 1.78, "Muon": 1.7},
}
RATIOS = {"AdamW": 1.0, "clip 8": 0.5, "Muon": 4.0}


@pytest.fixture
def made_up(tmp_path):
    """Two widths, grids of three rates; the best is k = -8 at 128 and k = -7 at 256; three seeds."""
    records = []
    for width, losses in LOSSES.items():
        for method, loss in losses.items():
            best = -8 if width == 128 else -7
            seeds = ((best, 0, 0.0), (best, 1, 0.01), (best, 2, -0.01))
            for k, seed, more in ((best - 1, 0, 0.05), (best + 1, 0, None), *seeds):
                value = None if more is None else loss + more
                clips = seed == 0 and method.startswith("clip")
                norms = {"mean": 1.0, "p99": 1.02, "max": 1.15 if method == "clip 32" else 1.06, "samples": 240}
                records.append({
                    "table": "run", "width": width, "steps": 300, "method": method, "k": k, "lr": dial.rate(k),
                    "other": None if method in dial.ALONE else 0.003, "seed": seed, "spikes": None, "status": "ok",
                    "train": value, "validation": value, "seconds": 1.0, "reads": 1.25 if clips else None,
                    "norms": norms if clips else None, "commit": "0",
                    "curve": [[3 + 6 * i, 4.0 if value is None else 4 + (value - 4) * i / 49] for i in range(50)],
                })  # fmt: skip
        spread = {m: {k: {"median": r, "p20": r, "p80": r} for k in ("step", "whole")} for m, r in RATIOS.items()}
        records.append({"table": "times", "width": width, "steps": 300, "status": "ok", "methods": spread})
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps(document(records, runs.Results(tmp_path / "none.json").described)))
    return path


def test_the_answers_follow_from_the_numbers(made_up):
    text = dial_page.answers(list(parts_of([made_up])))
    assert "Clip 8 better than AdamW at every width: **met** (width 128, 300 steps: 2.100 against 2.200;" in text
    both = "width 128, 300 steps: s = 16, 70 %; width 256, 300 steps: s = 32, 70 %"
    assert f"at least 65 % of the way: **met** ({both})" in text
    assert "at least 85 % of the way: **missed** (width 128, 300 steps: s = 32, 84 %;" in text
    narrow, wide = parts_of([made_up])
    assert narrow.rank_for(0.65) == pytest.approx(8 * 2 ** (0.05 / 0.1)) and narrow.rank_for(0.85) is None
    assert (
        wide.rank_for(0.7) == pytest.approx(32)
        and "85 % of the way (linear" in text
        and "beyond those measured; width 256" in text
    )
    changed = made_up.read_text().replace('"validation": 1.95,', '"validation": 2.25,')
    made_up.write_text(changed)
    assert "at every width: **missed**" in dial_page.answers(list(parts_of([made_up])))


def test_the_tables_follow_from_the_numbers(made_up):
    narrow, wide = parts = list(parts_of([made_up]))
    table = dial_page.runs(parts)
    assert "| `clip`, s = 16 | 0.039 | 2.050 (2.040–2.060) | 2.050 (2.040–2.060) | 70 % | 1.25 |" in table
    assert "0.026: 2.100, 0.039: 2.050, 0.059: not finite |" in table
    lines = [line for line in table.split("Width 256")[0].splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        dial_page.name(m) for m in ("AdamW", "SGD", "normalize", "clip 8", "clip 16", "clip 32", "Muon")
    ]
    norms = dial_page.norms(parts)
    assert "p99 at most 1.05: **met** (1.020); never above 1.1: **missed** (1.150)" in norms and "AdamW" not in norms
    assert "| 128 → 256 | `clip`, s = 8 | 0.039 | 0.059 | +1 | 0.050 |" in dial_page.transfer(parts)
    assert dial_page.transfer(parts[:1]) == ""
    # the curve is linear from 4 to the loss and smoothing holds it 1.5 points back; Muon gets to step 69, point 11
    assert narrow.time_to("clip 8", 2.2) == pytest.approx(0.5 * 1.8 / 1.9, abs=0.04)
    assert narrow.loss_in_time("Muon") == pytest.approx(4 - 2.1 * 9.5 / 49)
    assert narrow.loss_in_time("clip 8") == narrow.smooth("clip 8")[-1][1]
    assert narrow.time_to("AdamW", 2.1) is None and wide.ratio("normalize") is None
    time = dial_page.time(parts)
    assert "| `clip`, s = 8 | 0.50 (0.50–0.50) | 0.50" in time and "`normalize`" not in time and "SGD" not in time


def test_methods_are_in_the_order_of_the_dial():
    assert sorted(["Muon", "clip 16", "clip 4", "SGD", "clip 6", "AdamW"], key=order) == [
        "AdamW", "SGD", "clip 4", "clip 6", "clip 16", "Muon",
    ]  # fmt: skip


def test_the_page_is_made_from_the_file(made_up):
    text = PAGE.read_text(encoding="utf-8")
    made = dial_page.render(text, [made_up])
    assert dial_page.render(made, [made_up]) == made and "Not measured yet" not in made
    assert {m["part"] for m in dial_page.MARKER.finditer(text)} == dial_page.PARTS.keys()
    assert dial_page.MARKER.sub("", made) == dial_page.MARKER.sub("", text)
    assert "width 128, 300 steps, cpu-" in dial_page.render(text, [made_up, made_up])  # several files: the machine
    for page, part in (("no markers", "no lines"), ("<!-- dial:best -->\n<!-- /dial -->", "dial:best")):
        with pytest.raises(ValueError, match=part):
            dial_page.render(page, [made_up])


def test_the_pictures_are_made_from_the_file(made_up, tmp_path):
    paths = dial_plot.draw([made_up], tmp_path / "figures")
    assert [p.name for p in paths] == ["dial-steps.png", "dial-time.png", "dial-rank.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in paths)
    bare = json.loads(made_up.read_text())
    records = bare["benchmarks"][0]["extra_info"]["records"]
    bare["benchmarks"][0]["extra_info"]["records"] = [r for r in records if r["table"] == "run"]
    made_up.write_text(json.dumps(bare))
    assert [p.name for p in dial_plot.draw([made_up], tmp_path)] == ["dial-steps.png", "dial-rank.png"]


def test_the_page_is_that_of_the_committed_file():
    if not RESULT.is_file():
        pytest.skip(f"{RESULT.name} is not there yet: run spectral-kernels paper dial")
    text = PAGE.read_text(encoding="utf-8")
    assert dial_page.render(text, [RESULT]) == text


def test_the_examples_of_the_page_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), {})


# -- the command


def command(*arguments):
    return cli.main(["paper", "dial", *map(str, arguments)])


def test_the_command_trains_times_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dial, "MOST", 2)
    monkeypatch.setattr(
        dial, "interleave", lambda calls, **_: {m: [0.5 * (call() is not call)] for m, call in calls.items()}
    )
    out, page, figures = tmp_path / "dial.json", tmp_path / "page.md", tmp_path / "figures"
    page.write_text("above\n<!-- dial:time -->\nold\n<!-- /dial -->\n")
    common = ("--out", out, "--widths", "32", "--steps", "2", "--seeds", "0", "--threads", "1")
    assert command(*common, "--methods", "sgd", "AdamW") == 0
    printed = capsys.readouterr().out
    assert "width 32, SGD, lr 0.02601 = 1.5^-9, seed 0: " in printed and "| AdamW | 0.00" in printed
    assert {r["method"] for r in runs.load(out)[1]} == {"SGD", "AdamW"}
    assert command(*common, "--times") == 0
    assert "Muon: not timed, its best rate is not known yet" in capsys.readouterr().out
    (timed,) = (r for r in runs.load(out)[1] if r["table"] == "times")
    assert timed["methods"].keys() == {"AdamW", "SGD"} and timed["methods"]["SGD"]["step"]["median"] == 1.0
    before = out.read_text()
    monkeypatch.setattr(dial, "trained", lambda *args: pytest.fail("--report trained"))
    assert command("--out", out, "--report", "--docs", page, "--plot", figures) == 0
    assert out.read_text() == before and len(list(figures.iterdir())) == 3
    assert "| SGD | 1.00 (1.00–1.00) |" in page.read_text() and "old" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--out"),
        (("--methods", "adam"), "'adam' is not one of AdamW, SGD"),
        (("--methods", "clip-0"), "'clip-0'"),
        (("--widths", "16"), "'16' is not a multiple of 32"),
        (("--widths", "128", "100"), "'100'"),
        (("--steps", "0"), "'0'"),
        (("--times", "--report"), "not allowed"),
        (("--device", "tpu"), "tpu"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, part, capsys, tmp_path):
    out = ("--out", tmp_path / "never.json") if arguments else ()
    assert command(*out, *arguments) == 2
    assert part in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_bad_input_is_one_line_and_2(made_up, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    another = tmp_path / "another.json"
    another.write_text(made_up.read_text().replace('"machine": "', '"machine": "another-'))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(made_up.read_text().replace('"method": "SGD"', '"method": "Lion"'))
    for arguments, part in (
        (("--out", tmp_path / "gone.json", "--report"), "gone.json: no such file"),
        (("--out", made_up, "--report", "--docs", page), "no lines <!-- dial:PART -->"),
        (("--out", another), "made with machine another-"),
        (("--out", unknown, "--report"), "a method 'Lion', which is not one of AdamW"),
        (("--out", page, "--report"), "Expecting value"),
        (("--out", tmp_path / "new.json", "--times", "--widths", "32"), "needs AdamW's runs"),
    ):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    if not torch.cuda.is_available():
        assert command("--out", tmp_path / "new.json", "--device", "cuda") == 2
        assert dial.main(["--out", str(tmp_path / "new.json"), "--device", "cuda"]) == 2
    assert cli.main(["paper"]) == 2 and cli.main(["paper", "unheard"]) == 2


def test_experiments_are_commands_imported_when_asked_for():
    for name in EXPERIMENTS:
        module = import_module(f"spectral_kernels.experiments.{module_of(name)}")
        assert callable(module.add_arguments) and callable(module.run)
    lines = "import sys; from spectral_kernels.cli import main; assert main(['paper', '--help']) == 0; "
    lines += "assert 'torch' not in sys.modules, 'slow to start'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and all(name in done.stdout for name in EXPERIMENTS), done.stderr
