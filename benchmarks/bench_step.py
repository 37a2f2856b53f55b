"""Rows C7, C11: a whole optimizer step against fused AdamW, clipped also against Muon; row M: the optimizer's state."""

from __future__ import annotations

import pytest

from benchmarks.providers import Cache, listed, plain, run_entry, store
from spectral_kernels.bench.cases_clip import clip_cases
from spectral_kernels.bench.cases_step import STATE, state_cases, state_share, step_cases
from spectral_kernels.bench.measure import met, rounded, start

cache = Cache()


@pytest.mark.parametrize("entry", listed([*step_cases(), *clip_cases()]))
def test_step(benchmark, entry):
    run_entry(benchmark, cache, entry)


@pytest.mark.parametrize("entry", [pytest.param(e, id=plain(f"M {e[0].name}")) for e in state_cases()])
def test_state(benchmark, entry):
    case, width = entry
    benchmark.group = f"M {case.name}"
    share = benchmark.pedantic(state_share, args=(width,), rounds=1)
    goal = case.goals[STATE]
    record = start(case, STATE, goal)
    store(benchmark, [{**record, "status": "ok", "value": rounded(share), "met": met(share, goal)}])
