"""`make gpu` without a GPU: its logic over the interpreter on tiny shapes, its deadline, and what must make it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.bench import cases, gpu, gpu_parts
from spectral_kernels.bench.gpu_parts import Rehearsal

ROOT = Path(__file__).resolve().parents[2]


def rehearse(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess, dict, dict[str, list]]:
    """(process, checks, records by file) of a rehearsal."""
    command = [sys.executable, "-m", "spectral_kernels.bench.gpu", "--rehearse", "--results", str(folder), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    checks = json.loads((folder / "checks.json").read_text())
    files = {
        p.stem: json.loads(p.read_text())["benchmarks"][0]["extra_info"]["records"]
        for p in folder.glob("*.json")
        if p.stem != "checks"
    }
    return done, checks, files


def test_all_parts_over_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    passing = tmp_path / "test_passing.py"
    passing.write_text("def test_passing():\n    assert True\n")
    done, checks, files = rehearse(tmp_path / "results", "--backend", "triton", "--tests", str(passing))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    statuses = {(o["part"], o["check"]): o["status"] for o in checks["outcomes"]}
    assert set(statuses.values()) == {"passed"}
    assert {part for part, _ in statuses} == {"tests", "host", "G1", "G2", "G7", "G4", "G5", "G3"}
    assert ("host", "graph replay equals the eager call: ragged list") in statuses
    assert {r["row"] for r in files["gram_matvec"]} == {"G1"} and {r["row"] for r in files["norm"]} == {"G3"}
    assert [(r["row"], r["case"]) for r in files["step"]] == [
        ("G2", "tiny, matrices fp32, captured"),
        ("G2", "tiny, matrices fp32, eager"),
        ("G7", "tiny, matrices fp32, clip 4, captured"),
        ("G7", "tiny, matrices fp32, clip 4, captured"),  # against AdamW, against Muon
    ]
    assert {(r["row"], r["rival"]) for r in files["orthogonalize"]} == {
        ("G4", "torch.compile of plain torch"),
        ("G5", "torch.compile of plain torch"),
        ("G5", "gram-newton-schulz"),
    }
    without = {r["rival"] for records in files.values() for r in records if r["status"] == "no rival"}
    assert without <= {"gram-newton-schulz"}  # where it is not installed
    assert {r["status"] for records in files.values() for r in records if r["rival"] not in without} == {"ok"}
    assert checks["environment"]["rehearsal"] is True


def test_a_failing_test_and_a_short_deadline_are_failures(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_failing():\n    assert False\n")
    # enough for the tests alone: what is not run is said, and is no success
    done, checks, files = rehearse(tmp_path / "results", "--tests", str(failing), "--deadline", "20")
    assert done.returncode == 1 and not files
    assert {o["part"]: o["status"] for o in checks["outcomes"]} == {
        "tests": "not run",
        "host": "not run",
        "G1": "not run",
        "G2": "not run",
        "G7": "not run",
        "G4": "not run",
        "G5": "not run",
        "G3": "not run",
    }


def test_outcome_of_the_contract_tests(tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_failing():\n    assert False\n")
    env = {**os.environ}
    assert gpu.run_tests([str(failing)], 60, env)[0]["status"] == "failed"
    assert gpu.run_tests([str(tmp_path / "absent")], 60, env)[0]["status"] == "failed"


def test_a_part_that_hangs_is_ended():
    start = time.monotonic()
    status, _ = gpu.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5, dict(os.environ))
    assert status is None and time.monotonic() - start < 30
    assert gpu.run_limited([sys.executable, "-c", "print(5); raise SystemExit(3)"], 30, dict(os.environ)) == (3, "5\n")


def test_deadline_keeps_time_for_the_later_parts():
    now = [0.0]
    deadline = gpu.Deadline(400, lambda: now[0])
    assert deadline.limit("tests", ("host", "G1", "G3")) == gpu.LIMITS["tests"]
    now[0] = 250
    assert deadline.limit("G1", ("G3",)) == 150 - gpu.LEAST["G3"]
    now[0] = 399
    assert deadline.limit("G3", ()) == 0 and deadline.left() == 1
    assert sum(gpu.LEAST.values()) < gpu.DEADLINE < 540


def test_without_a_gpu_nothing_is_claimed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0
    said = capsys.readouterr().out.strip()
    assert len(said.splitlines()) == 1 and "nothing is claimed" in said and not list(tmp_path.iterdir())


def test_a_rehearsal_needs_a_folder_of_its_own(capsys):
    assert gpu.main(["--rehearse"]) == 2


def outcomes(place) -> dict[str, str]:
    return {o["check"]: o["status"] for step in gpu_parts.host(place, lambda: 100.0) for o in step[0]}


def test_a_call_that_waits_for_the_host_is_caught(monkeypatch):
    exact = sk.spectral_norm

    def waiting(A, **options):
        value = exact(A, **options)
        value.sum().item()
        return value

    monkeypatch.setattr(sk, "spectral_norm", waiting)
    found = outcomes(Rehearsal("reference"))
    assert found["no synchronization: fp32 matrix"] == "failed"
    assert found["the detector sees a synchronization"] == "passed"


def test_a_blind_detector_is_caught(monkeypatch):
    import contextlib

    monkeypatch.setattr(Rehearsal, "no_sync", lambda self: contextlib.nullcontext())
    assert outcomes(Rehearsal("reference"))["the detector sees a synchronization"] == "failed"


def test_a_graph_that_does_not_see_its_input_is_caught(monkeypatch):
    def frozen(self, call):
        result = call().clone()
        return lambda: result

    monkeypatch.setattr(Rehearsal, "capture", frozen)
    found = outcomes(Rehearsal("reference"))
    assert found["graph replay equals the eager call: fp32 matrix"] == "failed"


def test_a_wrong_kernel_is_a_failed_case():
    def build():
        p = cases.gram_matvec_problem(cases.gaussian(16, 8))
        right = p.ours
        p.ours = lambda: right() * 1.01
        return p

    place = Rehearsal("reference")
    case = cases.Case("G1", "wrong", build, {"copy": cases.Goal(0.85, "share")})
    found, _, records = gpu_parts.step("G1", place, case, lambda: 100.0, place.clock(), "gram_matvec")
    assert found[0]["status"] == "failed" and records[0]["status"] == "wrong"
    found, _, records = gpu_parts.step("G1", place, case, lambda: 1.0, place.clock(), "gram_matvec")
    assert found[0]["status"] == "not run" and not records
