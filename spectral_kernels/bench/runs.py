"""What studies of whole trainings share: rivals, the rate's schedule, the search for the best rate, the result file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import environment, rivals_orthogonal
from .measure import Record, document
from .training import Spikes, Task, train
from .training_data import text_crc

MOST = 7  # rates of one grid
LAST = 20  # steps whose mean is the final training loss


# -- optimizers


class Muon(torch.optim.Optimizer):
    """W <- W - lr sqrt(max(1, m/n)) NS(nesterov momentum), Newton-Schulz in float32 with Keller Jordan's quintic.

    Coefficients (3.4445, -4.7750, 2.0315) and five steps: kellerjordan.github.io/posts/muon; they send singular values
    into about [0.7, 1.2].
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for W in group["params"]:
                state = self.state[W]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(W)
                M = state["momentum_buffer"]
                M.mul_(group["momentum"]).add_(W.grad)
                update = newton_schulz(W.grad + group["momentum"] * M)
                W.add_(update, alpha=-group["lr"] * max(1, W.shape[0] / W.shape[1]) ** 0.5)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """U f(S) V' for G = U S V' (m, n), f(S) near 1, by Keller Jordan's coefficients."""
    return rivals_orthogonal.newton_schulz(G, [(3.4445, -4.7750, 2.0315)] * steps)


class Pair:
    """Two optimizers as one: Muon leaves embeddings, readout and vectors to AdamW."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def hidden(run: Task) -> list[Tensor]:
    """The matrices between first and last layer."""
    matrices = [W for _, W in run.matrices()][:-1]
    return matrices[1:] if run.name == "mlp" else matrices


def with_adamw(run: Task, build: Callable[[list[Tensor]], torch.optim.Optimizer], other: float) -> Pair:
    """`build` for the hidden matrices; AdamW at the rate `other` for first and last layer and vectors."""
    matrices = hidden(run)
    mine = {id(W) for W in matrices}
    return Pair(build(matrices), adamw([p for p in run.model.parameters() if id(p) not in mine], other))


# -- runs


def schedule(step: int, steps: int) -> float:
    """Factor of the rate at a step: up over 5 % of the steps, then linearly down to 0 behind the last."""
    return min((step + 1) / max(1.0, 0.05 * steps), (steps - step) / steps)


def follow(
    run: Task,
    optimizer: Any,
    steps: int,
    *,
    on_step: Callable[[int], Any] | None = None,
    spikes: Spikes | None = None,
    seed: int = 0,
) -> tuple[list[float], list[float]]:
    """Train with the rates of `schedule`; loss of every step, and seconds until its end without those in on_step."""
    peaks = [(group, group["lr"]) for group in optimizer.param_groups]
    times: list[float] = []
    began = time.perf_counter()

    def set_rates(step: int) -> None:
        for group, peak in peaks:
            group["lr"] = peak * schedule(step, steps)

    def after(step: int) -> None:
        nonlocal began
        now = time.perf_counter()
        times.append(now - began)
        if on_step is not None:
            on_step(step)
            began += time.perf_counter() - now
        set_rates(step + 1)

    set_rates(0)
    losses = train(run, optimizer, steps, on_step=after, spikes=spikes, seed=seed)
    times[-1] = time.perf_counter() - began  # until then a GPU may still have been at work
    return losses, times


def loss_of(record: Record) -> float:
    return math.inf if record["validation"] is None else record["validation"]


def climb(
    measure: Callable[[int], float], start: int, most: int = MOST, known: Mapping[int, float] | None = None
) -> int:
    """The k with the lowest value whose neighbours were measured too, or the best of `most` measured ones."""
    found = dict(known or {})
    if not found:
        found[start] = measure(start)
    while len(found) < most:
        best = min(found, key=lambda k: (found[k], k))  # where all diverge, the smallest
        beside = [k for k in (best - 1, best + 1) if k not in found]
        if not beside:
            break
        found[beside[0]] = measure(beside[0])
    return min(found, key=lambda k: found[k])


def search(measure: Callable[[float], float], start: float, most: int = MOST, factor: float = 2.0) -> float:
    """The rate start · factor^k with the lowest value whose neighbours were measured too, or the best of `most`."""
    return start * factor ** climb(lambda k: measure(start * factor**k), 0, most)


# -- the result file


def load(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """(environment, records) of a result file, records in file order."""
    described: dict[str, Any] = {}
    records: list[Record] = []
    for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        extra = entry.get("extra_info", {})
        described = extra.get("environment", described)
        records += extra.get("records", [])
    return described, records


def where(described: dict[str, Any]) -> str:
    """One line under which conditions a file was made."""
    versions = described["versions"]
    parts = [
        described.get("device") or f"{described['cores']} cores ({described['processor']})",
        f"{described['threads']} threads",
        *(f"{name} {versions[name]}" for name in ("torch", "scipy", "triton") if name in versions),
        f"OMP_WAIT_POLICY {described['omp_wait_policy']}",
        f"commit {described['commit']}",
    ]
    return f"`{described['machine']}`: " + ", ".join(parts)


class Results:
    """The records of a file, written after each one; several processes may add to one file."""

    SAME = ("machine", "threads", "text")

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        self.path = path
        self.described: dict[str, Any] = environment.describe(device) | {"text": text_crc()}
        self.records: list[Record] = []
        self.read()

    def read(self) -> None:
        """Take over what the file holds; ValueError where it was made under other conditions."""
        if not self.path.is_file():
            return
        before, self.records = load(self.path)
        for key in self.SAME:
            if before.get(key) != self.described[key]:
                raise ValueError(
                    f"{self.path} was made with {key} {before.get(key)}, not {self.described[key]}: move it away"
                )

    def find(self, **key: Any) -> list[Record]:
        """The records with these entries, in file order."""
        return [record for record in self.records if key.items() <= record.items()]

    def add(self, record: Record) -> Record:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            self.read()
            self.records.append(record)
            text = json.dumps(document(self.records, self.described), ensure_ascii=False)
            draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            draft.write_text(text.replace('{"table"', '\n{"table"') + "\n", encoding="utf-8")  # a record a line
            os.replace(draft, self.path)  # a reader sees the old file or the new one
        return record


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; where the system has no fcntl, nothing waits."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
