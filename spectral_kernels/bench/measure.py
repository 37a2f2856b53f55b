"""A case becomes records: check, time in turns, check again. A wrong result is a failure, whatever its speed.

A record is a flat dict, the same in `bench --json`, in the result files and in the tables. `status` is one of
  ok        measured; `value` with `p20`, `p80`: the speedup, the share of the rival's bandwidth, the memory's share
  wrong     our result is outside the limit: a failure, no value
  no rival  the rival cannot run here or is not accurate enough: `reason` says so, no value, not a win
  skipped   the case cannot be measured here: `reason` says so
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

from .cases import Case, Goal, Problem, Skipped
from .timer import Call, Clock, Spread, clock_for, interleave, ratio, spread

Record = dict[str, Any]


def rounded(value: float | None) -> float | None:
    """Four significant digits: result files stay small, and no digit that noise wrote is kept."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def seconds_of(s: Spread) -> dict[str, float | None]:
    return {"median": rounded(s.median), "p20": rounded(s.p20), "p80": rounded(s.p80)}


@lru_cache(maxsize=4)
def ceilings(device: str = "cpu", side: int = 4096) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written, per second) and fp32 matrix product rate (flop/s), in this process."""
    clock = clock_for(device)
    a = torch.randn(side, side, device=device)
    b = torch.empty_like(a)
    half = a[: side // 2, : side // 2].contiguous()
    times = interleave(
        {"copy": lambda: b.copy_(a), "gemm": lambda: half @ half}, seconds=0.5, min_rounds=3, max_rounds=20, clock=clock
    )
    return {
        "copy_bytes_per_s": 2 * a.numel() * a.element_size() / spread(times["copy"]).median,
        "gemm_flop_per_s": 2 * half.shape[0] ** 3 / spread(times["gemm"]).median,
    }


def start(case: Case, rival: str | None, goal: Goal) -> Record:
    return {
        "row": case.row,
        "case": case.name,
        "rival": rival,
        "measure": goal.measure,
        "target": goal.target,
        "better": goal.better,
    }


def met(value: float, goal: Goal) -> bool | None:
    if goal.target is None:
        return None
    return value >= goal.target if goal.better == "higher" else value <= goal.target


def skipped(case: Case, reason: str) -> list[Record]:
    return [{**start(case, rival, goal), "status": "skipped", "reason": reason} for rival, goal in case.goals.items()]


def measure(
    case: Case,
    problem: Problem | None = None,
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    clock: Clock | None = None,
    ceiling: dict[str, float] | None = None,
) -> list[Record]:
    """One record per rival of the case, in the order of its goals."""
    if problem is None:
        try:
            problem = case.build()
        except Skipped as why:
            return skipped(case, str(why))
    providers: dict[str, Call] = {"ours": problem.ours, **problem.rivals}
    errors = {name: problem.check(name, call()) for name, call in providers.items()}
    timed = {name: call for name, call in providers.items() if errors[name] <= problem.allowed(name)}
    samples: dict[str, list[float]] = {}
    if "ours" in timed and len(timed) > 1:
        samples = interleave(timed, seconds=seconds, min_rounds=min_rounds, clock=clock)
        for name in (
            "ours",
            *(r for r in timed if spread(samples[r]).median < 0.1),
        ):  # again, after timing; slow ones once only
            errors[name] = max(errors[name], problem.check(name, timed[name]()))
    if ceiling is None:
        ceiling = ceilings()
    out = []
    for rival, goal in case.goals.items():
        record = start(case, rival, goal)
        record.update(
            error=rounded(errors["ours"]),
            error_limit=rounded(problem.limit),
            rival_error=rounded(errors.get(rival)),
            rival_setting=problem.settings.get(rival, ""),
            reads=rounded(problem.reads),
            bytes=problem.bytes,
            flops=problem.flops,
        )
        if not errors["ours"] <= problem.limit:
            record.update(status="wrong", reason=f"error {errors['ours']:.2g} above {problem.limit:.2g}")
        elif rival in problem.missing:
            record.update(status="no rival", reason=problem.missing[rival])
        elif rival not in errors:
            record.update(status="no rival", reason="no such provider")
        elif not errors[rival] <= problem.allowed(rival):
            reason = f"its error is {errors[rival]:.2g}, above {problem.allowed(rival):.2g}"
            record.update(status="no rival", reason=reason)
        else:
            value = ratio(samples, rival, "ours").scaled(problem.factors.get(rival, 1.0))
            ours = spread(samples["ours"])
            share, unit = share_of_ceiling(problem, ours.median, ceiling)
            record.update(
                status="ok",
                value=rounded(value.median),
                p20=rounded(value.p20),
                p80=rounded(value.p80),
                rounds=value.rounds,
                met=met(value.median, goal),
                ours_seconds=seconds_of(ours),
                rival_seconds=seconds_of(spread(samples[rival])),
                share_of_ceiling=rounded(share),
                ceiling=unit,
            )
            if rival in problem.work:
                took = spread(samples[rival]).median
                rate = problem.work[rival] / took / ceiling["gemm_flop_per_s"]
                record.update(rival_flops=problem.work[rival], rival_share_of_ceiling=rounded(rate))
        out.append(record)
    return out


def share_of_ceiling(problem: Problem, seconds: float, ceiling: dict[str, float]) -> tuple[float, str]:
    """The larger of bytes / copy bandwidth and flops / product rate: above 1 where the matrix stays in a cache."""
    by_bytes = problem.bytes / seconds / ceiling["copy_bytes_per_s"]
    by_flops = problem.flops / seconds / ceiling["gemm_flop_per_s"]
    return (by_bytes, "copy bandwidth") if by_bytes >= by_flops else (by_flops, "matrix product rate")


def describe_value(record: Record) -> str:
    """`83× (80–86)`, `91 % (88–93)`, or the reason why there is none."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    value, low, high = record["value"], record.get("p20"), record.get("p80")
    factor, unit = (1, "×") if record["measure"] == "speedup" else (100, " %")
    text = f"{number(factor * value)}{unit}"
    if low is None or high is None:
        return text
    return f"{text} ({number(factor * low)}–{number(factor * high)})"


def number(x: float) -> str:
    """Two or three significant digits, never in exponent form."""
    if x >= 99.5:
        return f"{x:.0f}"
    return f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def describe_target(record: Record) -> str:
    """`≥ 60×: met`, `≥ 85 %: missed`, or nothing where no target was set."""
    target = record["target"]
    if target is None:
        return ""
    sign = "≥" if record["better"] == "higher" else "≤"
    wanted = f"{target:g}×" if record["measure"] == "speedup" else f"{100 * target:g} %"
    if record["status"] != "ok":
        return f"{sign} {wanted}"
    return f"{sign} {wanted}: {'met' if record['met'] else 'missed'}"


def failures(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r["status"] == "wrong"]


def document(records: list[Record], environment: dict[str, Any]) -> dict[str, Any]:
    """The shape of a result file: that of pytest-benchmark, as far as the tables read it."""
    return {"benchmarks": [{"name": "interleaved", "extra_info": {"environment": environment, "records": records}}]}
