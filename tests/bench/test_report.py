"""Tables: made from result files alone, stale ones detected, result files without names; the command `bench`."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conftest as hooks
from benchmarks import report
from spectral_kernels.bench import runner

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

ENVIRONMENT = {
    "machine": "cpu-2core-avx512",
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "omp_wait_policy": "passive",
    "versions": {"torch": "2.13.0", "scipy": "1.17.1"},
    "commit": "0123456789",
}
MEASURED = {
    "row": "C1",
    "case": "Gaussian 2048×2048 fp32",
    "rival": "matrix_norm",
    "measure": "speedup",
    "target": 60,
    "better": "higher",
    "status": "ok",
    "value": 83.21,
    "p20": 80.0,
    "p80": 86.4,
    "met": True,
    "error": 4.1e-5,
    "error_limit": 1e-3,
    "rival_setting": "",
    "reads": 17.0,
    "ours_seconds": {"median": 1e-2, "p20": 1e-2, "p80": 1e-2},
    "rival_seconds": {"median": 8.3e-1, "p20": 8e-1, "p80": 9e-1},
}
LOSING = {
    **MEASURED,
    "row": "C4",
    "case": "Gaussian 8×8 fp32",
    "value": 0.84,
    "p20": 0.8,
    "p80": 0.9,
    "target": 1,
    "met": False,
}
SKIPPED = {
    **{k: MEASURED[k] for k in ("rival", "measure", "better")},
    **{"row": "C2", "case": "a checkpoint", "target": 100, "status": "skipped", "reason": "it is not installed"},
}
MEMORY = {
    **{"row": "M", "case": "4096×4096 fp32", "rival": None, "measure": "memory", "target": 0.05, "better": "lower"},
    **{"status": "ok", "value": 0.0312, "met": True, "error": 1e-4, "error_limit": 1e-3},
}


@pytest.fixture
def results(tmp_path):
    """Two entries of a result file as pytest-benchmark writes them."""
    folder = tmp_path / "results" / "cpu-2core-avx512"
    folder.mkdir(parents=True)
    entries = [{"extra_info": {"environment": ENVIRONMENT, "records": [MEASURED, LOSING]}}, {"extra_info": {}}]
    entries.append({"extra_info": {"environment": ENVIRONMENT, "records": [SKIPPED, MEMORY]}})
    (folder / "norm.json").write_text(json.dumps({"benchmarks": entries}))
    return tmp_path / "results"


README = (
    "# Title\n\n<!-- table:norm -->\nold\n<!-- /table -->\n\nBetween.\n\n<!-- table:gram_matvec -->\n<!-- /table -->\n"
)


def test_tables_say_what_the_files_say(results):
    text = report.render(README, results)
    lines = text.splitlines()
    assert (
        "| C1 | Gaussian 2048×2048 fp32 | matrix_norm | 83.2× (80.0–86.4) | ≥ 60×: met | 4.1e-05 (1e-03) | 17 |"
        in lines
    )
    assert any("0.84× (0.80–0.90) | **≥ 1×: missed**" in line for line in lines)
    assert any("skipped: it is not installed | ≥ 100×" in line for line in lines)
    assert any("| M | 4096×4096 fp32 | the matrix's own bytes | 3.12 % | ≤ 5 %: met" in line for line in lines)
    assert "`cpu-2core-avx512`: 2 cores (a processor), 2 threads, torch 2.13.0" in text
    assert "old" not in text and "Between." in text and "Not measured yet." in text
    assert report.render(text, results) == text


def test_a_stale_table_is_detected_and_repaired(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    options = [str(readme), "--results", str(results)]
    assert report.main([*options, "--check"]) == 1
    assert "table:norm" in capsys.readouterr().out and "old" in readme.read_text()
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    path = results / "cpu-2core-avx512" / "norm.json"
    path.write_text(path.read_text().replace("83.21", "93.21"))
    assert report.main([*options, "--check"]) == 1
    assert report.main([str(tmp_path / "absent.md")]) == 2


def test_tables_in_the_readme_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text()
    subjects = {m["subject"] for m in report.MARKER.finditer(text)}
    assert {"norm", "gram_matvec"} <= subjects
    assert all((ROOT / "benchmarks" / f"bench_{subject}.py").is_file() for subject in subjects)
    assert report.stale(text, RESULTS) == []


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_result_files_hold_no_names_and_no_raw_data(path):
    text = path.read_text()
    assert len(text) < 400_000
    assert not re.search(r'"(node|data|user|hostname)":|/home/|/root/|/work/|/tmp/|site-packages', text)
    _, records = report.load(path) if "benchmarks" in json.loads(text) else ({}, [])  # studies have their own shape
    assert not [r for r in records if r["status"] == "wrong"]


def test_hooks_strip_what_names_a_host_a_folder_or_a_person():
    info = {
        "node": socket.gethostname(),
        "release": "6.1-host",
        "machine": "x86_64",
        "system": "Linux",
        "cpu": {"flags": []},
    }
    hooks.pytest_benchmark_update_machine_info(None, info)
    assert set(info) == {"machine", "system", "processor", "cores"}
    commit = {"id": "abc", "dirty": True, "branch": "somebody/work", "project": "folder", "time": "now"}
    hooks.pytest_benchmark_update_commit_info(None, commit)
    assert commit == {"id": "abc", "dirty": True}
    stats = {"median": 0.123456789, "rounds": 5, "data": [1.0] * 1000, "total": 3.0}
    entry = {"name": "test_norm[C1]", "stats": stats, "fullname": "a/b", "options": {}, "params": {}, "param": "C1"}
    output = {"benchmarks": [entry]}
    hooks.pytest_benchmark_update_json(None, [], output)
    assert output["benchmarks"] == [{"name": "norm[C1]", "stats": {"median": 0.1235, "rounds": 5}, "param": "C1"}]


def test_a_suite_writes_a_file_that_the_table_reads(tmp_path):
    """One small case of the real suite, from pytest-benchmark to the table."""
    target = tmp_path / "here" / "norm.json"
    target.parent.mkdir()
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_norm.py", "-q", "--rows=C4", "-k", "8x8"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={target}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**env, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-3000:]
    environment, records = report.load(target)
    assert [(r["row"], r["status"], r["rival"]) for r in records] == [("C4", "ok", "matrix_norm")]
    assert environment["versions"]["torch"] and "| C4 | Gaussian 8×8 fp32 | matrix_norm |" in report.tables(
        "norm", tmp_path
    )
    text = target.read_text()
    assert socket.gethostname() not in text and str(ROOT) not in text and str(tmp_path) not in text
    assert '"data"' not in text and f'"{getpass.getuser()}"' not in text
    assert len(json.loads(text)["benchmarks"]) == 2  # ours and the rival, in one group
    assert len({b["group"] for b in json.loads(text)["benchmarks"]}) == 1


def bench(*options: str) -> int:
    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return runner.run(parser.parse_args(list(options)))


def test_bench_prints_writes_and_draws(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "measure_all", lambda cases, quick, console: [MEASURED, LOSING, SKIPPED, MEMORY])
    assert bench("--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")) == 0
    said = capsys.readouterr().out
    assert "skipped C2 a checkpoint: it is not installed" in said and "C4" in said
    _, records = report.load(tmp_path / "b.json")
    assert records == [MEASURED, LOSING, SKIPPED, MEMORY]
    assert (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_bench_ends_with_1_on_a_wrong_result(monkeypatch, capsys):
    wrong = {**SKIPPED, "status": "wrong", "reason": "error 0.5 above 0.001"}
    monkeypatch.setattr(runner, "measure_all", lambda cases, quick, console: [wrong])
    assert bench("--quick") == 1
    assert "WRONG C2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("--rows", "C9"), ("--rows", ""), ("--quick", "--rows", "C2"), ("--json", "/no/such/folder/x.json")]
)
def test_bench_refuses_in_one_line(options, capsys, monkeypatch):
    monkeypatch.setattr(runner, "measure_all", lambda *a: pytest.fail("measured"))
    assert bench(*options) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_bench_selects_rows():
    assert {c.row for c in runner.selected("c4,C6", False)} == {"C4", "C6"}
    assert {c.row for c in runner.selected(None, True)} == {"C1", "C4", "C5", "C6"}
