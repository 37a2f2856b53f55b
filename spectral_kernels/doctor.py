"""What `doctor` says: versions, devices, the native library, which backend serves each word, why the others do not."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from . import __version__
from .kernels import contracts_products, cpu, registry
from .ops.estimate import BLOCK

PACKAGES = ("torch", "triton", "numpy", "rich", "safetensors", "matplotlib", "scipy", "pytest-benchmark")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain JSON values."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    try:
        forced, problem = registry.forced(), None
    except ValueError as error:
        forced, problem = os.environ.get(registry.ENVIRONMENT), f"{registry.ENVIRONMENT}: {error}"
    return {
        "spectral_kernels": __version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {"devices": _cuda_devices(), "why_none": _why_no_cuda()},
        "native_library": {"loaded": cpu.load() is None, "why_not": cpu.load()},
        "forced_backend": forced,
        "problem": problem,
        "words": {} if problem else {d: {w: _service(w, d) for w in registry.WORDS} for d in devices},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _cuda_devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": d.name,
            "capability": f"{d.major}.{d.minor}",
            "memory_bytes": d.total_memory,
            "cores": d.multi_processor_count,
        }
        for d in found
    ]


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    return "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"


def _service(word: str, device: str) -> dict[str, dict[str, Any]]:
    """dtype (of the products, for words that multiply) -> the backend that serves, and why every other one does not."""
    out = {}
    for dtype in DTYPES:
        try:
            choice = registry.choose(word, device, dtype, BLOCK)
            served, declined = choice.backend, dict(choice.declined)
        except registry.BackendUnavailable as error:
            served, declined = None, {"all": str(error)}
        row = registry.table()[word]
        own = served in row and row[served].fn is not None
        for backend in registry.BACKENDS:
            if backend not in declined and (backend != served or not own):
                declined[backend] = _reason(word, device, dtype, backend, served)
        how = None if served is None or own else f"the default over the other words, which {served} serves"
        out[str(dtype).removeprefix("torch.")] = {"backend": served, "how": how, "others": declined}
    return out


def _reason(word: str, device: str, dtype: torch.dtype, backend: str, served: str | None) -> str:
    kernel = registry.table()[word].get(backend)
    if kernel is None or kernel.fn is None:
        return f"has no {word} kernel"
    reason = kernel.supports(word, device, dtype, BLOCK)
    return reason or (
        f"could serve; {served} comes before it" if served else "could serve, and is not the one insisted on"
    )


def serves(found: dict[str, Any]) -> bool:
    """Whether every word is served for every dtype on every device there is."""
    rows = [row for words in found["words"].values() for word in words.values() for row in word.values()]
    return found["problem"] is None and all(row["backend"] is not None for row in rows)


def show(found: dict[str, Any], stream: IO[str]) -> None:
    """Print what `examine` found, one matter a line."""

    def line(key: str, text: str) -> None:
        print(f"{key:<17} {text}", file=stream)

    line("spectral-kernels", f"{found['spectral_kernels']}  ({found['location']})")
    line("python", f"{found['python']}  {found['platform']}")
    for name, number in found["packages"].items():
        line(name, number or "not installed")
    cpu_ = found["cpu"]
    line("cpu", f"{cpu_['model']}, {cpu_['cores']} cores, {cpu_['threads']} threads, {cpu_['vector_instructions']}")
    for i, device in enumerate(found["cuda"]["devices"]):
        memory = device["memory_bytes"] / 2**30
        line(f"cuda:{i}", f"{device['name']}, sm_{device['capability'].replace('.', '')}, {memory:.0f} GiB")
    if found["cuda"]["why_none"]:
        line("cuda", f"none: {found['cuda']['why_none']}")
    native = found["native_library"]
    line("native library", "loaded" if native["loaded"] else f"not loaded: {native['why_not']}")
    if found["forced_backend"]:
        line("insisted on", f"{found['forced_backend']} ({registry.ENVIRONMENT} or force)")
    if found["problem"]:
        line("problem", found["problem"])
    for device, words in found["words"].items():
        print(f"\nwords on {device}", file=stream)
        for word, rows in words.items():
            print(f"  {word}{', by dtype of products' if word in contracts_products.WORDS else ''}", file=stream)
            for text, dtypes in _merged(rows).items():
                print(f"    {', '.join(dtypes)}: {text}", file=stream)


def _merged(rows: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Text -> the dtypes it holds for."""
    merged: dict[str, list[str]] = {}
    for dtype, row in rows.items():
        head = row["how"] or row["backend"] or "NOT SERVED"
        others = "".join(f"\n      not {name}: {why}" for name, why in row["others"].items())
        merged.setdefault(head + others.replace(f"torch.{dtype}", "this dtype"), []).append(dtype)
    return merged


def run(as_json: bool) -> int:
    """Print the findings; 0 where every word is served, else 1."""
    found = examine()
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
    else:
        show(found, sys.stdout)
    return 0 if serves(found) else 1
