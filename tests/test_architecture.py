"""Imports go downward only, and files stay short enough to read in one sitting."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "spectral_kernels"
# A module may import from its own layer and the layers below it; within a layer there is no cycle.
LAYERS = [
    {"kernels", "scaling"},
    {"ops"},
    {"distributed"},
    {"optim", "parametrizations", "integrations", "explanation", "initialization"},
    {"bench", "diagnostics", "checkpoints", "inspection", "inspection_plot", "comparison", "doctor", "reporting"}
    | {"schedules_page"},
    {"experiments"},
    {"cli", "__main__"},
]
HEIGHT = {unit: height for height, units in enumerate(LAYERS) for unit in units}
FACADE = "__init__"  # the public names, resolved on first use
FACADE_FROM = HEIGHT["bench"]  # from this layer up, modules may use the package as a user does
BACKENDS = {"cpu", "cuda", "triton"}
NAMES_BACKENDS = {"kernels", "bench", "doctor"}  # the registry's package, and what measures or describes one backend
LIMIT = 400

Name = tuple[str, ...]  # a module below the package: ("ops", "norm")


def unit_of(module: Name) -> str:
    """The top-level part of a module below the package: ("ops", "norm") -> "ops", () -> "__init__"."""
    return module[0] if module else FACADE


def modules(package: Path) -> Iterator[tuple[Name, bool, Path]]:
    """(dotted name below the package, is a package, path) of every Python file."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield (parts[:-1] if is_package else parts), is_package, path


def imported(tree: ast.AST, module: Name, is_package: bool, package: Path) -> Iterator[tuple[int, Name]]:
    """(line, module) of everything a file imports from the package, in functions and under TYPE_CHECKING too."""
    here = module if is_package else module[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == PACKAGE:
                    yield node.lineno, tuple(rest)
        elif isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = here[: len(here) - (node.level - 1)] + named
            elif named[0] == PACKAGE:
                base = named[1:]
            else:
                continue
            for alias in node.names:  # `from . import norm` is an import of the module, where there is one
                inner = base + (alias.name,)
                path = package.joinpath(*inner)
                yield node.lineno, inner if path.is_dir() or path.with_suffix(".py").is_file() else base


def cycles(package: Path) -> list[str]:
    """A cycle among the top-level parts of the package, if there is one."""
    graph: dict[str, set[str]] = {}
    for module, is_package, path in modules(package):
        targets = (unit_of(target) for _, target in imported(ast.parse(path.read_text()), module, is_package, package))
        graph.setdefault(unit_of(module), set()).update(targets)
    graph = {unit: targets - {unit, FACADE} for unit, targets in graph.items() if unit != FACADE}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def breaches(package: Path) -> list[str]:
    """Every import that goes upward, as `file:line: from -> to`."""
    found = []
    for module, is_package, path in modules(package):
        own = unit_of(module)
        if own == FACADE:
            continue
        if own not in HEIGHT:
            found.append(f"{path.name}: {own} has no place in LAYERS")
            continue
        for line, target in imported(ast.parse(path.read_text()), module, is_package, package):
            other = unit_of(target)
            where = f"{'/'.join(path.relative_to(package).parts)}:{line}: {own} -> {'.'.join(target) or PACKAGE}"
            if other == FACADE:
                if HEIGHT[own] < FACADE_FROM:
                    found.append(f"{where} (the public names, from below)")
            elif other not in HEIGHT:
                found.append(f"{where} (no place in LAYERS)")
            elif HEIGHT[other] > HEIGHT[own]:
                found.append(where)
            elif target[:1] == ("kernels",) and BACKENDS & set(target[1:2]) and own not in NAMES_BACKENDS:
                found.append(f"{where} (names a backend; ask the registry)")
    return found


def test_imports_go_downward():
    assert breaches(ROOT / PACKAGE) == []
    assert cycles(ROOT / PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fails"),
    [
        ("ops/norm.py", "from ..kernels import registry", False),
        ("ops/norm.py", "from .estimate import estimate", False),
        ("ops/norm.py", "from ..optim import muon", True),
        ("ops/norm.py", "def f():\n    from spectral_kernels.bench.timer import timer", True),
        ("ops/norm.py", "import spectral_kernels.diagnostics", True),
        ("ops/norm.py", "from .. import spectral_norm", True),
        ("ops/norm.py", "from ..kernels.triton import gram_matvec", True),
        ("ops/norm.py", "from ..kernels import cpu", True),
        ("kernels/cpu.py", "from .. import scaling", False),
        ("kernels/triton/gram.py", "from ... import ops", True),
        ("kernels/triton/gram.py", "from .. import contracts", False),
        ("cli.py", "import spectral_kernels as sk", False),
        ("bench/cases.py", "from spectral_kernels import spectral_norm", False),
        ("helpers.py", "import torch", True),
    ],
)
def test_the_check_sees_a_breach(tmp_path, file, line, fails):
    package = tmp_path / PACKAGE
    known = "kernels/registry kernels/contracts kernels/cpu kernels/triton/gram_matvec ops/estimate optim/muon scaling"
    for name in [*known.split(), "bench/timer"]:
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(line + "\n")
    assert bool(breaches(package)) is fails, breaches(package)


def test_the_check_sees_a_cycle(tmp_path):
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "scaling.py").write_text("def f():\n    from .kernels import g\n")
    (package / "kernels.py").write_text("from . import scaling\n")
    assert breaches(package) == [] and set(cycles(package)) == {"scaling", "kernels"}


def test_files_stay_short():
    sources = [path for folder in (PACKAGE, "csrc") for path in (ROOT / folder).rglob("*")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in sources
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
    }
    assert lengths, "no sources found"
    assert {name: lines for name, lines in lengths.items() if lines > LIMIT} == {}


def test_the_optimizer_does_not_import_the_compiler():
    """Triton decides with its first import whether kernels are interpreted; torch's compiler would import it."""
    modules = "spectral_kernels.optim.spectral, spectral_kernels.diagnostics"
    code = f"import sys, {modules}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
