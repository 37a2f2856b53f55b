"""What a result must say about where it was taken: never a host name, a path or a user."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__

RIVALS = ("scipy", "numpy", "triton", "heavyball", "pytorch-optimizer", "gram-newton-schulz")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def gpu_slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> `h100`, `NVIDIA GeForce RTX 4090` -> `rtx-4090`: up to the first word with a digit."""
    words = [
        w
        for w in re.split(r"[^a-z0-9]+", name.lower())
        if w not in ("", "nvidia", "geforce", "tesla", "amd", "instinct")
    ]
    for i, word in enumerate(words):
        if any(c.isdigit() for c in word):
            return "-".join(words[: i + 1])
    return "-".join(words) or "gpu"


def machine(device: torch.device | str = "cpu") -> str:
    """The folder of a machine's results: `cpu-2core-avx512`, `h100`."""
    if torch.device(device).type == "cuda":
        return gpu_slug(torch.cuda.get_device_name(device))
    simd = torch.backends.cpu.get_cpu_capability().lower()
    simd = platform.machine().lower() if simd in ("default", "no avx") else simd
    return f"cpu-{cores()}core-{simd}"


def processor() -> str:
    """The processor's model as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@lru_cache(maxsize=1)
def commit() -> str:
    """Short hash of the checkout that holds the package, `+` added where the tree is changed; else `unknown`."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "timer.py"):
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: torch.device | str = "cpu") -> dict[str, object]:
    """Threads, versions, commit and device of this process."""
    versions = {"spectral_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in RIVALS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    out: dict[str, object] = {
        "machine": machine(device),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "versions": versions,
        "commit": commit(),
    }
    if torch.device(device).type == "cuda":
        out["device"] = torch.cuda.get_device_name(device)
    return out
