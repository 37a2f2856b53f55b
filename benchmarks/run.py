"""Run the suites and write benchmarks/results/<machine>/<subject>.json, then the README's tables.

    python -m benchmarks.run [--rows C1,C4] [subject ...]

On a shared machine set OMP_WAIT_POLICY=passive; the setting is recorded. With --rows the result goes to .benchmarks/,
which is not committed: a table has all its rows from one run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from spectral_kernels.bench import environment

HERE = Path(__file__).resolve().parent


def subjects() -> list[str]:
    return sorted(p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py"))


def run(subject: str, rows: str | None) -> int:
    folder = HERE.parent / ".benchmarks" if rows else HERE / "results" / environment.machine()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{subject}.py", "-q", "-p", "no:cacheprovider"]
    command += [
        f"--benchmark-json={folder / subject}.json",
        "--benchmark-columns=median,iqr,rounds",
        "--benchmark-sort=name",
    ]
    if rows:
        command.append(f"--rows={rows}")
    return subprocess.run(command, cwd=HERE.parent).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", nargs="*", help=f"of {', '.join(subjects())}; all of them by default")
    parser.add_argument("--rows", help="only these rows, for a trial")
    args = parser.parse_args()
    unknown = set(args.subject) - set(subjects())
    if unknown:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(subjects())}")
    codes = [run(subject, args.rows) for subject in args.subject or subjects()]
    if not args.rows:
        codes.append(subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=HERE.parent).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
