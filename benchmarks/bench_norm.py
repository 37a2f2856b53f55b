"""Rows C1 to C5: `spectral_norm` against matrix_norm, power iteration, scipy; row M: memory beside the matrix."""

from __future__ import annotations

import pytest

from benchmarks.providers import Cache, entries, plain, run_entry, store
from spectral_kernels.bench.measure import failures
from spectral_kernels.bench.memory import measure_memory, memory_cases

cache = Cache()


@pytest.mark.parametrize("entry", entries("norm", "C1", "C2", "C3", "C4", "C5"))
def test_norm(benchmark, entry):
    run_entry(benchmark, cache, entry)


@pytest.mark.parametrize("entry", [pytest.param(e, id=plain(f"M {e[0].name}")) for e in memory_cases()])
def test_memory(benchmark, entry):
    case, shape, copies = entry
    benchmark.group = f"M {case.name}"
    records = benchmark.pedantic(measure_memory, args=(case, shape, copies), rounds=1)
    store(benchmark, records)
    assert not failures(records), failures(records)[0]["reason"]
