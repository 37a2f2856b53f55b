"""`make gpu`: what only a GPU can show, in at most nine minutes, without network.

Parts, each in a process of its own with a time limit, so that one that hangs or breaks the device harms no other:
  tests    the contract tests on the real kernels
  host     no synchronization with the host, and CUDA-graph capture, of `spectral_norm(A, steps=8)`
  G1       one read against device copy bandwidth
  G2       a whole optimizer step against fused AdamW; no synchronization, and capture
  G7       the same with clipped singular values, against torch's Muon too
  G4       orthogonalization of stacks of small matrices against torch.compile
  G5       the same of large matrices, against gram-newton-schulz too where it is installed
  G3       a model's matrices against a two-bmm loop inside a CUDA graph
Results go to benchmarks/results/<gpu>/ and to the folder $OUT where that is set. Exit status 1 if anything failed or
was left out. Without a GPU nothing is run. --rehearse runs the same logic on a CPU over tiny shapes (gpu_parts.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .environment import machine
from .gpu_orthogonal import g4, g5
from .gpu_parts import Outcome, Rehearsal, RunOnCuda, Step, failed, g1, g3, host, outcome
from .gpu_step import g2, g7
from .measure import describe_target, describe_value, document, failures

PARTS: dict[str, Callable[[RunOnCuda, Callable[[], float]], Iterator[Step]]] = {
    "host": host,
    "G1": g1,
    "G2": g2,
    "G7": g7,
    "G4": g4,
    "G5": g5,
    "G3": g3,
}
TESTS = ("tests/kernels", "tests/ops", "tests/optim")
WITHOUT_GPU = "tests/kernels/test_triton_compile.py"  # compiles for other devices
DEADLINE = 520.0  # seconds; nine minutes less the start of the process and the last write
LIMITS = {  # most seconds of a part
    "tests": 300.0,
    "host": 90.0,
    "G1": 120.0,
    "G2": 150.0,
    "G7": 90.0,
    "G4": 60.0,
    "G5": 75.0,
    "G3": 180.0,
}
# with less time left a part is not begun
LEAST = {
    "tests": 20.0,
    "host": 20.0,
    "G1": 30.0,
    "G2": 40.0,
    "G7": 30.0,
    "G4": 30.0,
    "G5": 30.0,
    "G3": 40.0,
}


class Deadline:
    """Seconds left of a budget that starts now."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.end = now() + seconds

    def left(self) -> float:
        return max(0.0, self.end - self.now())

    def limit(self, part: str, later: Sequence[str]) -> float:
        """Most seconds this part may take so that the later ones can still begin; 0: too little to begin."""
        granted = min(LIMITS[part], self.left() - sum(LEAST[p] for p in later))
        return granted if granted >= LEAST[part] else 0.0


def run_limited(command: Sequence[str], seconds: float, env: dict[str, str]) -> tuple[int | None, str]:
    """(exit status, output); None where the time ran out and the whole process group was ended."""
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    try:
        output, _ = child.communicate(timeout=seconds)
        return child.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        return None, output


def test_command(paths: Sequence[str]) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--maxfail=25",
        "-p",
        "no:cacheprovider",
        f"--ignore={WITHOUT_GPU}",
        *paths,
    ]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    return command


def run_tests(paths: Sequence[str], seconds: float, env: dict[str, str]) -> list[Outcome]:
    missing = [p for p in paths if not Path(p).exists()]
    if missing:
        return [outcome("tests", "contract tests", "failed", f"no such tests here: {', '.join(missing)}")]
    # several workers share the cores: two threads each
    status, output = run_limited(test_command(paths), seconds, {**env, "OMP_NUM_THREADS": "2"})
    last = output.strip().splitlines()[-1] if output.strip() else "no output"
    export = os.environ.get("OUT")
    if status != 0 and export and Path(export).is_dir():
        (Path(export) / "tests.log").write_text(output)
    if status is None:
        return [outcome("tests", "contract tests", "failed", f"not done within {seconds:.0f} s; last line: {last}")]
    if status:
        print(output[-6000:])
    return [outcome("tests", "contract tests", "failed" if status else "passed", last)]


def run_part(part: str, seconds: float, args: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """The part's outcomes and records; what it had written before it broke or ran out of time is kept."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "part.json"
        command = [sys.executable, "-m", "spectral_kernels.bench.gpu", "--part", part, "--write", str(written)]
        # the child's clock starts after its imports
        command += ["--seconds", str(max(seconds - 15, 0.6 * seconds))] + (
            ["--rehearse", "--backend", args.backend] if args.rehearse else []
        )
        status, output = run_limited(command, seconds, env)
        result: dict[str, Any] = {"outcomes": [], "records": {}, "environment": {}}
        if written.exists():
            result = json.loads(written.read_text())
        if status != 0:
            print(output[-6000:])
            why = f"ended after {seconds:.0f} s" if status is None else f"exit status {status}"
            result["outcomes"].append(outcome(part, "the part as a whole", "failed", why))
        return result


def in_child(args: argparse.Namespace) -> int:
    """One part in this process, its results written after every step."""
    place = Rehearsal(args.backend) if args.rehearse else RunOnCuda()
    deadline = Deadline(args.seconds)
    result: dict[str, Any] = {"outcomes": [], "records": {}, "environment": place.environment()}

    def save() -> None:
        temporary = args.write.with_suffix(".new")
        temporary.write_text(json.dumps(result))
        temporary.replace(args.write)

    with place.forced():
        for outcomes, subject, records in PARTS[args.part](place, deadline.left):
            result["outcomes"] += outcomes
            if records:
                result["records"].setdefault(subject, []).extend(records)
            save()
    return 0


def write_results(folder: Path, results: list[dict[str, Any]]) -> list[Path]:
    """One file per subject, as the tables read it, and checks.json with every outcome."""
    folder.mkdir(parents=True, exist_ok=True)
    environment: dict[str, Any] = next((r["environment"] for r in results if r["environment"]), {})
    merged: dict[str, list[Any]] = {}
    for result in results:
        for subject, records in result["records"].items():
            merged.setdefault(subject, []).extend(records)
    paths = []
    for subject, records in merged.items():
        paths.append(folder / f"{subject}.json")
        paths[-1].write_text(json.dumps(document(records, environment), indent=1) + "\n")
    paths.append(folder / "checks.json")
    checks = {"environment": environment, "outcomes": [o for r in results for o in r["outcomes"]]}
    paths[-1].write_text(json.dumps(checks, indent=1) + "\n")
    return paths


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--rehearse", action="store_true", help="on the CPU, tiny shapes; needs --results")
    out.add_argument("--backend", default="triton", help="whose kernels a rehearsal runs")
    out.add_argument("--results", type=Path, help="folder for the result files")
    out.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for everything")
    out.add_argument("--tests", nargs="*", default=list(TESTS), help="test folders; none to leave the tests out")
    out.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS), help="the others are left out")
    out.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    out.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    out.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.part:
        return in_child(args)
    if not args.rehearse and not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here; nothing was run and nothing is claimed.")
        return 0
    if args.rehearse and args.results is None:
        print("--rehearse needs --results: its numbers do not belong among the results", file=sys.stderr)
        return 2
    deadline = Deadline(args.deadline)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH", ""))))}
    if args.rehearse:
        env["TRITON_INTERPRET"] = "1"
    else:
        env.pop("TRITON_INTERPRET", None)
    results: list[dict[str, Any]] = []
    parts = (["tests"] if args.tests else []) + [part for part in PARTS if part in args.parts]
    for i, part in enumerate(parts):
        seconds = deadline.limit(part, parts[i + 1 :])
        print(f"== {part}: {deadline.left():.0f} s left, at most {seconds:.0f} s for this", flush=True)
        if not seconds:
            outcomes = [outcome(part, "the part as a whole", "not run", "the deadline left too little time")]
            results.append({"outcomes": outcomes, "records": {}, "environment": {}})
        elif part == "tests":
            outcomes = run_tests(args.tests, seconds, env)
            results.append({"outcomes": outcomes, "records": {}, "environment": {}})
        else:
            results.append(run_part(part, seconds, args, env))
        show(results[-1])
    paths = write_results(args.results or Path("benchmarks/results") / machine("cuda"), results)
    export = os.environ.get("OUT")
    if export and Path(export).is_dir():
        for path in paths:
            shutil.copy(path, Path(export) / path.name)
    print("written:", ", ".join(str(p) for p in paths))
    return 1 if any(failed(o) for r in results for o in r["outcomes"]) else 0


def show(result: dict[str, Any]) -> None:
    for o in result["outcomes"]:
        print(f"{o['status']:>8}  {o['part']}  {o['check']}: {o['detail']}")
    for records in result["records"].values():
        for r in records:
            against = f" vs {r['rival']}" if r["rival"] else ""
            print(f"{r['status']:>8}  {r['row']}  {r['case']}{against}: {describe_value(r)}  {describe_target(r)}")
        for r in failures(records):
            print(f"   WRONG  {r['row']}  {r['case']}: {r['reason']}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
