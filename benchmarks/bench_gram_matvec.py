"""Row C6: one read of a matrix of 64 MiB and more against copying it and against two torch products."""

from __future__ import annotations

import pytest

from benchmarks.providers import Cache, entries, run_entry

cache = Cache()


@pytest.mark.parametrize("entry", entries("gram_matvec", "C6"))
def test_gram_matvec(benchmark, entry):
    run_entry(benchmark, cache, entry)
