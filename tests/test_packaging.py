"""What an install leaves behind: with a compiler, without one, and without being asked for a library."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import spectral_kernels

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "matplotlib", "safetensors", "scipy", "rich")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything built."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the package is installed without its sources")
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "_C_*")
    for folder in ("spectral_kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SPECTRAL_KERNELS_")}
    clean |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=checkout, env=clean, capture_output=True, text=True)


def build(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(checkout, "setup.py", "--quiet", *(arguments or ("build_ext", "--inplace")), **environment)


def libraries(checkout: Path) -> list[str]:
    return sorted(path.name for path in (checkout / "spectral_kernels").glob("_C_*.so"))


def test_a_failed_build_says_why_and_leaves_a_working_package(checkout):
    stale = checkout / "spectral_kernels" / "_C_cpu.abi3.so"
    stale.write_text("a library of an earlier build")
    done = build(checkout, CXX="/bin/false", CC="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "native library is not built" in done.stderr and "/bin/false" in done.stderr
    assert "/bin/false" in (checkout / "spectral_kernels" / "_C_cpu.txt").read_text()
    assert libraries(checkout) == []
    code = "import torch, spectral_kernels as sk; print(sk.__file__); print(sk.spectral_norm(3 * torch.eye(2)))"
    use = run(checkout, "-c", code)
    assert use.returncode == 0, use.stderr
    where, value = use.stdout.splitlines()[-2:]
    assert where.startswith(str(checkout)) and value.startswith("tensor(3.")


def test_native_1_makes_a_failed_build_fatal(checkout):
    done = build(checkout, CXX="/bin/false", CC="/bin/false", SPECTRAL_KERNELS_NATIVE="1")
    assert done.returncode != 0
    assert libraries(checkout) == []


def test_native_0_makes_a_pure_wheel_of_every_module(checkout):
    done = build(checkout, "bdist_wheel", SPECTRAL_KERNELS_NATIVE="0", CXX="/bin/false", CC="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "SPECTRAL_KERNELS_NATIVE=0" in done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name == f"spectral_kernels-{spectral_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(checkout).as_posix() for path in (checkout / "spectral_kernels").rglob("*.py")}
    assert modules and names == modules | {"spectral_kernels/py.typed", "spectral_kernels/_C_cpu.txt"}


def test_an_unknown_value_of_native_is_refused(checkout):
    done = build(checkout, SPECTRAL_KERNELS_NATIVE="yes")
    assert done.returncode != 0 and "SPECTRAL_KERNELS_NATIVE='yes'" in done.stderr


def test_a_build_without_torch_is_pure(checkout):
    (checkout / "torch.py").write_text("raise ImportError('no torch in this build')")
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    assert "no torch in this build" in done.stderr and "--no-build-isolation" in done.stderr
    assert libraries(checkout) == []


def test_version_is_the_same_everywhere(checkout):
    assert build(checkout, "--version").stdout.split()[-1] == spectral_kernels.__version__
    try:
        installed = importlib.metadata.version("spectral-kernels")
    except importlib.metadata.PackageNotFoundError:
        return  # the tests run on a source tree that is not installed
    assert installed == spectral_kernels.__version__


def test_import_does_no_work():
    code = f"""
import sys
import spectral_kernels
heavy = [name for name in {(*HEAVY, "torch")!r} if name in sys.modules]
import spectral_kernels.ops.norm
heavy += [name for name in {HEAVY!r} if name in sys.modules]
libraries = [line for line in open("/proc/self/maps") if "/_C_cpu" in line] if sys.platform == "linux" else []
print(heavy, libraries)
"""
    done = run(ROOT, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"


def test_every_public_name_resolves():
    missing = [name for name in spectral_kernels.__all__ if not hasattr(spectral_kernels, name)]
    assert missing == [] and set(spectral_kernels.__all__) <= set(dir(spectral_kernels))
