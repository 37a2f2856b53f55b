"""Rows C9, C10: a Muon step against torch's, `orthogonalize` against Newton–Schulz in torch and other packages."""

from __future__ import annotations

import pytest

from benchmarks.providers import Cache, listed, run_entry
from spectral_kernels.bench.cases_orthogonal import muon_cases, orthogonalize_cases

cache = Cache()


@pytest.mark.parametrize("entry", listed([*muon_cases(), *orthogonalize_cases()]))
def test_orthogonalize(benchmark, entry):
    run_entry(benchmark, cache, entry, seconds=1.5, min_rounds=3)
