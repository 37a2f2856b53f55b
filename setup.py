"""Builds the native library `spectral_kernels._C_cpu`; all else about the package stands in pyproject.toml.

A build that fails is reported and left out: the package then works on its reference kernels, and `_C_cpu.txt` beside
the modules keeps the reason. SPECTRAL_KERNELS_NATIVE=1 makes a failure fatal, =0 skips the build.
torch must be importable while building (`pip install --no-build-isolation .`): an isolated build gives a pure wheel.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "spectral_kernels"
ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("SPECTRAL_KERNELS_NATIVE", "")
STABLE_ABI = "0x020b000000000000"  # torch 2.11: the oldest torch that the library loads in
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fopenmp-simd", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
METADATA_ONLY = {"egg_info", "dist_info", "--version", "--name"}  # torch is not imported for these

if NATIVE not in ("", "0", "1"):
    raise SystemExit(f"SPECTRAL_KERNELS_NATIVE={NATIVE!r}: allowed are 0 (skip), 1 (a failure is fatal) or nothing")


class NotBuilt(RuntimeError):
    """The native library cannot be built here; the message says why."""


Build, make_extension, obstacle = build_ext, Extension, ""
if NATIVE == "0":
    obstacle = "SPECTRAL_KERNELS_NATIVE=0 was set"
elif not METADATA_ONLY & set(sys.argv[1:]):
    try:
        from torch.utils.cpp_extension import BuildExtension as Build  # noqa: F811
        from torch.utils.cpp_extension import CppExtension as make_extension  # noqa: F811
    except Exception as error:  # whatever a broken torch raises at import
        obstacle = f"torch cannot be imported while building ({error}); try pip with --no-build-isolation"


class BuildNative(Build):
    """build_ext that reports a failure in words, drops the library and lets the install go on."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # not a folder of the day: ninja then compiles only what has changed
            self.build_temp = str(ROOT / "build" / "editable")

    def run(self) -> None:
        self.folders = [Path(self.build_lib, PACKAGE)]
        if self.inplace:  # editable installs and build_ext --inplace: the library lies beside the sources
            self.folders.append(ROOT / PACKAGE)
        super().run()

    def build_extensions(self) -> None:
        names = [extension.name.rpartition(".")[2] for extension in self.extensions]
        try:
            if obstacle:
                raise NotBuilt(obstacle)
            super().build_extensions()
        except (Exception, SystemExit) as error:  # torch, setuptools and the compiler each raise their own
            if NATIVE == "1":
                raise
            self.drop(names, " ".join(str(error).split()) or type(error).__name__)
        else:
            self.remove(f"{name}.txt" for name in names)

    def drop(self, names: list[str], reason: str) -> None:
        """Go on as a pure package: no library, none left from an earlier build, the reason on record."""
        self.extensions = self.distribution.ext_modules = []
        self.distribution.get_command_obj("bdist_wheel").root_is_pure = True
        self.remove(f"{name}.*so" for name in names)
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                (folder / f"{name}.txt").write_text(reason + "\n")
        print(
            f"\nspectral_kernels: the native library is not built: {reason}\n"
            "  The package works without it, on slower reference kernels. pip install -v shows the compiler's output;\n"
            "  SPECTRAL_KERNELS_NATIVE=1 makes this an error, SPECTRAL_KERNELS_NATIVE=0 does not try.\n",
            file=sys.stderr,
        )

    def remove(self, patterns) -> None:
        for pattern in patterns:
            for folder in self.folders:
                for path in folder.glob(pattern):
                    path.unlink()


def native_extensions() -> list[Extension]:
    """One library per kind of device; each is loaded with torch.ops.load_library and holds no Python symbol."""
    os.chdir(ROOT)
    cpu = make_extension(
        f"{PACKAGE}._C_cpu",
        sources=sorted(map(str, [*Path("csrc").glob("bindings_cpu*.cpp"), *Path("csrc/cpu").glob("*.cpp")])),
        depends=sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.inc")])),
        extra_compile_args=CXX_FLAGS,
        py_limited_api=True,
    )
    return [cpu]


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
