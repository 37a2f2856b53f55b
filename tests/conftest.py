"""What every test shares: reproducible examples, and no thread count or random state that leaks into the next test."""

from __future__ import annotations

import importlib.util
import os
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    # Triton decides at its first import whether its library of functions is interpreted, and torch's test helpers,
    # which some modules of tests import before others, import it too.
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        importlib.import_module("triton.language")

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


@pytest.fixture(scope="module")
def one_thread():
    """Trainings whose losses are compared run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
