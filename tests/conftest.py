"""What every test shares: reproducible examples, and no thread count or random state that leaks into the next test."""

from __future__ import annotations

import os

import pytest
import torch

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a machine that runs only the contract tests, `make gpu` for one
    pass
else:
    settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
    settings.register_profile("search", deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _isolated():
    """Each test starts from the same seed and leaves threads, seed and default dtype as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
