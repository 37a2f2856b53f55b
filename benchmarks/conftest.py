"""One group per case, one entry per provider. pytest-benchmark times the providers one after the other; the ratio that
the tables use is taken in turns by the package's own timer and stored in `extra_info` of the entry "ours".

Nothing that names a person, a host or a folder gets into the JSON, and no per-round data.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from spectral_kernels.bench import environment

KEPT_MACHINE = ("machine", "python_version", "python_implementation", "system")
KEPT_STATS = ("min", "max", "mean", "stddev", "rounds", "median", "iqr", "q1", "q3", "iterations")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", default="", help="only these rows of the table, as in C1,C4")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the entries of the rows asked for: a parameter's first part is its case."""
    rows = [row for row in config.getoption("--rows").upper().split(",") if row]
    if rows:
        items[:] = [i for i in items if i.callspec.params["entry"][0].row in rows]  # type: ignore[attr-defined]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what describes the machine; drop its host name, kernel and everything else."""
    kept = {key: machine_info[key] for key in KEPT_MACHINE if key in machine_info}
    machine_info.clear()
    machine_info.update(kept, processor=environment.processor(), cores=environment.cores())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """The commit alone: the project's name is that of a folder, the branch that of somebody's work."""
    kept = {"id": commit_info.get("id"), "dirty": commit_info.get("dirty")}
    commit_info.clear()
    commit_info.update(kept)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Summaries with four digits instead of every round."""
    for entry in output_json["benchmarks"]:
        entry["stats"] = {
            key: float(f"{entry['stats'][key]:.4g}") if isinstance(entry["stats"][key], float) else entry["stats"][key]
            for key in KEPT_STATS
            if key in entry["stats"]
        }
        for key in ("options", "params", "fullname"):
            entry.pop(key, None)
        entry["name"] = re.sub(r"^test_", "", entry["name"])
        if entry.get("param") is not None:
            entry["param"] = str(entry["param"])
