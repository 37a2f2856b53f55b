"""Row M: what a call takes beside the matrix, as the operating system counts it.

In a fresh process: call once on small matrices (library, threads), make the matrix, hand free memory back to the
system, reset the peak of the resident set (Linux: /proc/self/clear_refs), call, read the peak. Blocks of 64 KiB and
more are mapped, so that memory freed before the call cannot hide what the call takes. The kernel's counters may lag by
some 0.3 MB.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Goal, Problem, Skipped, label
from .measure import Record, met, rounded, skipped, start

REQUEST = "estimator scratch"


def resident() -> tuple[int, int]:
    """(now, peak) resident set in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def supported() -> str | None:
    if not Path("/proc/self/clear_refs").exists():
        return "needs Linux: the peak of the resident set cannot be reset here"
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as refusal:
        return f"the peak of the resident set cannot be reset here: {refusal.strerror}"
    return None


def trim() -> None:
    """Free memory back to the system (glibc)."""
    gc.collect()
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Largest growth of the resident set during the call."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident()
    call()
    _, peak = resident()
    return max(0, peak - before)


def in_this_process(shape: tuple[int, ...], copies: int, tol: float) -> dict[str, Any]:
    """Measure spectral_norm on `copies` Gaussian matrices of a shape: {extra, matrix} in bytes and the worst error."""
    import spectral_kernels as sk

    from .cases import gaussian, relative_error
    from .rivals import exact

    sk.spectral_norm([gaussian(300, 200, seed=1)] * 2, tol)
    A = [gaussian(*shape, seed=i) for i in range(copies)]
    kept: list[Any] = []
    extra = peak_extra_bytes(lambda: kept.append(sk.spectral_norm(A, tol)))
    truth = torch.stack([exact(a) for a in A])
    matrix = sum(a.numel() * a.element_size() for a in A)
    return {"extra": extra, "matrix": matrix, "error": relative_error(kept[0], truth)}


def in_a_fresh_process(
    shape: tuple[int, ...], copies: int = 1, tol: float = 1e-3, timeout: float = 300
) -> dict[str, Any]:
    reason = supported()
    if reason:
        raise Skipped(reason)
    command = [sys.executable, "-m", "spectral_kernels.bench.memory", "--copies", str(copies), "--tol", str(tol)]
    command += ["--shape", *map(str, shape)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    env = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    if done.returncode:
        raise RuntimeError(f"the memory measurement failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_cases() -> list[tuple[Case, tuple[int, ...], int]]:
    """(case, shape, copies): one large matrix, a list of mid-sized ones, one mid-sized one."""

    def build() -> Problem:
        raise Skipped("row M runs in a process of its own")

    wanted = (((4096, 4096), 1, 0.05), ((1024, 1024), 16, 0.15), ((1024, 1024), 1, 0.15))
    return [
        (Case("M", (f"{c} × " if c > 1 else "") + label(s), build, {REQUEST: Goal(target, "memory")}), s, c)
        for s, c, target in wanted
    ]


def measure_memory(case: Case, shape: tuple[int, ...], copies: int, tol: float = 1e-3) -> list[Record]:
    try:
        seen = in_a_fresh_process(shape, copies, tol)
    except Skipped as reason:
        return skipped(case, str(reason))
    goal = case.goals[REQUEST]
    record = {**start(case, None, goal), "error": rounded(seen["error"]), "error_limit": tol, "bytes": seen["extra"]}
    if not seen["error"] <= tol:
        return [{**record, "status": "wrong", "reason": f"error {seen['error']:.2g} above {tol:.2g}"}]
    share = seen["extra"] / seen["matrix"]
    return [{**record, "status": "ok", "value": rounded(share), "met": met(share, goal)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, required=True)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--tol", type=float, default=1e-3)
    args = parser.parse_args()
    print(json.dumps(in_this_process(tuple(args.shape), args.copies, args.tol)))


if __name__ == "__main__":
    main()
