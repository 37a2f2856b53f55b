"""What the suites share: the entries of a row, and how one entry is timed and what it stores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from spectral_kernels.bench import environment
from spectral_kernels.bench.cases import Case, Problem, Skipped, cpu_cases
from spectral_kernels.bench.measure import Record, failures, measure, skipped

Measured = tuple[Case, Problem, list[Record]]


def entries(subject: str, *rows: str) -> list[Any]:
    """pytest parameters (case, provider): the cases of these rows, ours first."""
    return listed(case for case in cpu_cases() if case.subject == subject and case.row in rows)


def listed(cases: Iterable[Case]) -> list[Any]:
    return [
        pytest.param((case, provider), id=plain(f"{case.row} {case.name} {provider}"))
        for case in cases
        for provider in ("ours", *case.goals)
    ]


def plain(text: str) -> str:
    """An id that `pytest -k` can name: C4-Gaussian-8x8-fp32-ours."""
    return text.replace("×", "x").replace(",", "").replace(" ", "-")


class Cache:
    """The last case that was built: inputs, tuning and the ratio are made once for all providers of a case."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.problem: Problem | None = None

    def get(self, case: Case) -> Problem:
        if self.case is None or self.case.name != case.name or self.case.row != case.row:
            self.problem = None  # free the old inputs first
            self.problem = case.build()
            self.case = case
        assert self.problem is not None
        return self.problem


def time_entry(benchmark: Any, call: Callable[[], Any], seconds: float = 1.0) -> None:
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    if once > 2 * seconds:  # the ratio in turns is what counts; once more for the file
        benchmark.pedantic(call, rounds=1)
        return
    rounds = max(3, min(50, int(seconds / once)))
    iterations = max(1, min(1000, math.ceil(1e-3 / once)))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)


def store(benchmark: Any, records: list[Record]) -> None:
    benchmark.extra_info["environment"] = environment.describe()
    benchmark.extra_info["records"] = records


def run_entry(benchmark: Any, cache: Cache, entry: tuple[Case, str], **timing: Any) -> None:
    """Time one provider; for ours also take the ratios in turns, store them, and fail if the result is wrong.

    timing: seconds and min_rounds of the turns (measure).
    """
    case, provider = entry
    benchmark.group = f"{case.row} {case.name}"
    try:
        problem = cache.get(case)
    except Skipped as reason:
        if provider != "ours":
            pytest.skip(str(reason))
        store(benchmark, skipped(case, str(reason)))  # visible in the table, not only in this log
        benchmark.pedantic(lambda: None, rounds=1)
        return
    if provider == "ours":
        records = measure(case, problem, **timing)
        store(benchmark, records)
        time_entry(benchmark, problem.ours)
        assert not failures(records), failures(records)[0]["reason"]
    elif provider in problem.rivals:
        benchmark.extra_info["setting"] = problem.settings.get(provider, "")
        time_entry(benchmark, problem.rivals[provider])
    else:
        pytest.skip(problem.missing.get(provider, "no such provider"))
