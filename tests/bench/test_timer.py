"""The timer: order of calls, statistics and budget, on clocks whose every tick is known."""

from __future__ import annotations

import statistics

import pytest
import torch

from spectral_kernels.bench.timer import MOST_CALLS, CudaClock, HostClock, Spread, interleave, ratio, spread


class ScriptedClock:
    """`sample` calls once and returns the next scripted duration of that call; time passes by as much."""

    def __init__(self, script: dict[str, list[float]]) -> None:
        self.script = {name: list(times) for name, times in script.items()}
        self.time = 0.0
        self.log: list[tuple[str, int]] = []

    def now(self) -> float:
        return self.time

    def sample(self, call, number: int) -> float:
        name = call()
        self.log.append((name, number))
        took = self.script[name].pop(0)
        self.time += took * number
        return took


def run(script: dict[str, list[float]], **options):
    clock = ScriptedClock(script)
    calls = {name: (lambda name=name: name) for name in script}
    return interleave(calls, clock=clock, **options), clock


def test_providers_take_turns_and_warm_up_is_not_counted():
    samples, clock = run(
        {"ours": [9, 1, 2, 3], "rival": [9, 10, 20, 90]}, seconds=0, min_rounds=3, max_rounds=3, sample_seconds=1
    )
    assert samples == {"ours": [1, 2, 3], "rival": [10, 20, 90]}
    assert [name for name, _ in clock.log] == ["ours", "rival"] + ["ours", "rival"] * 3


def test_ratio_is_taken_round_by_round():
    """A machine that slows down for one round slows both: the ratio of medians would be 1, the median ratio is 10."""
    samples = {"ours": [1.0, 10.0, 2.0], "rival": [10.0, 100.0, 2.0]}
    assert ratio(samples, "rival", "ours").median == 10
    assert ratio(samples, "ours", "rival").median == pytest.approx(0.1)
    with pytest.raises(ValueError):
        ratio({"ours": [1.0], "rival": [1.0, 2.0]}, "rival", "ours")


@pytest.mark.parametrize("count", [1, 2, 5, 6, 101])
def test_spread_against_the_standard_library(count):
    values = [float((7 * i) % count) ** 1.5 for i in range(count)]
    got = spread(values)
    assert got.median == pytest.approx(statistics.median(values)) and got.rounds == count
    if count > 1:
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        assert (got.p20, got.p80) == (pytest.approx(fifths[0]), pytest.approx(fifths[3]))
    assert got.scaled(2) == Spread(2 * got.median, 2 * got.p20, 2 * got.p80, count)


def test_fast_calls_are_repeated_within_a_sample_and_slow_ones_are_not():
    samples, clock = run(
        {"fast": [5e-5] * 9, "slow": [0.5] * 9}, seconds=0, min_rounds=2, max_rounds=2, sample_seconds=2e-3
    )
    assert ("fast", 40) in clock.log and ("slow", 1) in clock.log
    assert all(number == 1 for name, number in clock.log if name == "slow")
    assert [name for name, _ in clock.log].count("slow") == 1 + 2  # one warm-up, not two
    _, clock = run({"instant": [0.0] * 9}, seconds=0, min_rounds=1, max_rounds=1)
    assert clock.log[-1] == ("instant", MOST_CALLS)


def test_budget_ends_the_rounds_but_not_before_the_fewest():
    script = {"ours": [1.0] * 50}
    assert len(run(script, seconds=4.5, min_rounds=1, sample_seconds=1)[0]["ours"]) == 5
    assert len(run(script, seconds=0.5, min_rounds=3, sample_seconds=1)[0]["ours"]) == 3
    assert len(run(script, seconds=1e9, min_rounds=1, max_rounds=7, sample_seconds=1)[0]["ours"]) == 7


def test_host_clock_divides_by_the_number_of_calls():
    ticks = iter([10.0, 16.0])
    calls = []
    assert HostClock(now=lambda: next(ticks)).sample(lambda: calls.append(1), 3) == 2.0
    assert len(calls) == 3


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="no providers"):
        interleave({})
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_garbage_collection_is_on_again_after_a_provider_that_raises():
    import gc

    def broken():
        broken.calls += 1
        if broken.calls > 2:
            raise RuntimeError("broken")

    broken.calls = 0
    with pytest.raises(RuntimeError, match="broken"):
        interleave({"broken": broken}, seconds=0, min_rounds=5, sample_seconds=0)
    assert gc.isenabled()


def test_cuda_clock_flushes_before_every_call_and_converts_to_seconds(monkeypatch):
    log: list[str] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, after: Event) -> float:
            assert after.number == self.number + 1 and log[-1] == "synchronize"
            return {1: 5.0, 3: 1.0, 5: 3.0}[self.number]  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(torch, "sum", lambda buffer, dim, out: log.append(f"flush {buffer}"))
    clock = CudaClock.__new__(CudaClock)  # its buffer needs a device
    clock.device, clock.buffer, clock.sink = torch.device("cuda"), "buffer", None
    assert clock.sample(lambda: log.append("call"), 3) == pytest.approx(3e-3)
    assert log == ["flush buffer", "event", "call", "event"] * 3 + ["synchronize"]
