"""The one timer: providers take turns (A, B, A, B, ...), so that a noisy machine disturbs all of them alike.

A ratio is taken round by round and summarized by its median with the 20th and 80th percentile. Absolute times are
facts only on a GPU whose name is given.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]
MOST_CALLS = 2000  # calls per sample
SLOW = 0.1  # seconds: beyond it the first call's extra cost is lost in the call


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile of `rounds` samples."""

    median: float
    p20: float
    p80: float
    rounds: int

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.p20 * factor, self.p80 * factor, self.rounds)


class Clock(Protocol):
    """Times calls: `sample` returns seconds per call, `now` seconds of wall time for the budget."""

    def sample(self, call: Call, number: int) -> float: ...

    def now(self) -> float: ...


class HostClock:
    """Wall time of `number` calls in a row; for CPUs."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def sample(self, call: Call, number: int) -> float:
        start = self.now()
        for _ in range(number):
            call()
        return (self.now() - start) / number


class CudaClock:
    """Device time between two events around every call, the L2 cache flushed before each; median of `number` calls.

    The flush reads a buffer many times the cache's size. A read leaves clean lines: dirty ones (a memset's) would be
    written back while the call runs. It also keeps the device busy while the host enqueues the call, so that launch
    gaps stay out of the time.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = torch.device(device)
        self.buffer = torch.ones(max(8 * cache, 1 << 29) // 4, device=device)
        self.sink = torch.empty((), device=device)

    def now(self) -> float:
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def sample(self, call: Call, number: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(number)]
        for before, after in events:
            torch.sum(self.buffer, dim=0, out=self.sink)
            before.record()
            call()
            after.record()
        torch.cuda.synchronize(self.device)
        return spread([before.elapsed_time(after) * 1e-3 for before, after in events]).median


def clock_for(device: torch.device | str) -> Clock:
    return CudaClock(device) if torch.device(device).type == "cuda" else HostClock()


def spread(samples: Sequence[float]) -> Spread:
    """Order statistics with linear interpolation between neighbours."""
    if not samples:
        raise ValueError("spread of no samples")
    ordered = sorted(samples)

    def quantile(q: float) -> float:
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    return Spread(quantile(0.5), quantile(0.2), quantile(0.8), len(ordered))


def interleave(
    calls: Mapping[str, Call],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    sample_seconds: float = 2e-3,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of every provider, one sample a round, providers in turn.

    Each provider is warmed up by one call (a fast one by two) and timed to choose how many calls make a sample of about
    `sample_seconds`. Rounds go on until `seconds` of wall time have passed, but at least `min_rounds` and at most
    `max_rounds`. Sample i of all providers belongs to round i.
    """
    if not calls:
        raise ValueError("no providers to time")
    clock = clock or HostClock()
    numbers: dict[str, int] = {}
    for name, call in calls.items():
        once = clock.sample(call, 1)
        if once < SLOW:
            once = clock.sample(call, 1)
        numbers[name] = MOST_CALLS if once <= 0 else min(MOST_CALLS, max(1, math.ceil(sample_seconds / once)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock.now()
        for done in range(max_rounds):
            if done >= min_rounds and clock.now() - start >= seconds:
                break
            for name, call in calls.items():
                samples[name].append(clock.sample(call, numbers[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def ratio(samples: Mapping[str, Sequence[float]], slow: str, fast: str) -> Spread:
    """Round by round: time of `slow` over time of `fast`."""
    return spread([a / b for a, b in zip(samples[slow], samples[fast], strict=True)])
