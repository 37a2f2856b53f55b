"""How much of the way from Eq. 17 to Muon does clipping the momentum's singular values at the s-th one go?

    spectral-kernels paper dial --out benchmarks/results/dial.json [--widths 128 256] [--methods AdamW "clip 8" ...]
    spectral-kernels paper dial --out benchmarks/results/dial.json --times
    spectral-kernels paper dial --out benchmarks/results/dial.json --report --docs docs/clip.md --plot docs/figures

A character transformer of two layers; the hidden matrices are moved by the method, the rest by AdamW at its own best
rate. Rates are 1.5^k: from a start (at a wider model the best of the narrower one) the grid goes on until the best has
both neighbours; the best is run with every seed. Every finished run is in the file at once and is not run again, and
several processes may fill one file. --times belongs on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import scaling
from ..bench import environment
from ..bench.measure import Record, rounded
from ..bench.runs import LAST, Muon, Results, adamw, climb, follow, hidden, loss_of, schedule, with_adamw
from ..bench.timer import clock_for, interleave, ratio
from ..bench.training import Spikes, Task, task, train
from ..checkpoints import InputError
from . import dial_page
from .dial_results import GRID_SEED, METHODS, best_of, rank_of

STARTS = {  # k of the rate 1.5^k at which a grid starts; clip: by rank
    "AdamW": -14, "SGD": -8, "frobenius": -10, "normalize": -11, "Muon": -9,
    "clip 4": -11, "clip 8": -11, "clip 16": -11, "clip 32": -10, "clip 64": -10,
}  # fmt: skip
ALONE = ("AdamW", "SGD")  # they move every parameter
SPIKED = ("clip 8", "clip 32")  # run once more with each of these spikes, in Frobenius norms of the gradient
SIZES, EVERY = (3.0, 40.0), 20
WIDTHS, STEPS, SEEDS, LAYERS, BATCH, MOMENTUM = (128, 256), 200, (GRID_SEED, 1, 2), 2, 16, 0.95
RULE = "original"  # Muon's, as its Nesterov momentum: directions are all that differs
MOST = 14  # rates of one grid
POINTS = 50  # of a curve
SAMPLED = 10  # steps between two exact norms


def rate(k: int) -> float:
    return float(f"{1.5**k:.4g}")


class Case(NamedTuple):
    """What the runs of a width have in common."""

    width: int
    steps: int = STEPS
    device: str = "cpu"

    def task(self, seed: int) -> Task:
        sizes = {"layers": LAYERS, "heads": self.width // 32}
        return task("transformer", width=self.width, seed=seed, batch=BATCH, device=self.device, **sizes)

    @property
    def key(self) -> dict[str, int]:
        return {"width": self.width, "steps": self.steps}

    def skips(self, method: str) -> bool:
        """The rank reaches the short side of every hidden matrix: the polar factor, not a clip."""
        return (rank_of(method) or 0) >= self.width


def build(method: str, run: Task, lr: float, other: float | None) -> Any:
    """The optimizer of a method; other: AdamW's rate for what is not a hidden matrix."""
    if method == "AdamW":
        return adamw(run.model.parameters(), lr)
    if method == "SGD":
        return torch.optim.SGD(run.model.parameters(), lr, momentum=MOMENTUM)
    assert other is not None
    if method == "Muon":
        return with_adamw(run, lambda matrices: Muon(matrices, lr, MOMENTUM), other)
    from ..optim import SpectralOptimizer

    rank = rank_of(method)
    options: dict[str, Any] = {"direction": method} if rank is None else {"direction": "clip", "rank": rank}

    def spectral(matrices: list[Tensor]) -> torch.optim.Optimizer:
        group = {"params": matrices, "kind": "matrix"}
        return SpectralOptimizer([group], lr, momentum=MOMENTUM, nesterov=True, rule=RULE, **options)

    return with_adamw(run, spectral, other)


# -- what is looked at during a run


class Watch:
    """Reads of every step, and at sampled steps the exact ||D||_2 of every hidden matrix, W <- W - lr factor D."""

    def __init__(self, run: Task, optimizer: Any, case: Case, spikes: Spikes | None) -> None:
        self.matrices, self.case, self.spikes = hidden(run), case, spikes
        self.spectral = optimizer.parts[0]
        self.lr = self.spectral.param_groups[0]["lr"]
        self.reads: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.before: list[Tensor] = []
        self._keep(0)

    def _keep(self, step: int) -> None:
        spiked = self.spikes is not None and self.spikes.hits(step)
        sampled = step % SAMPLED == 0 or spiked
        last = step >= self.case.steps - 1 > 0  # its rate is so small that the weights' rounding would be measured
        self.before = [W.detach().clone() for W in self.matrices] if sampled and not last else []

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        if hasattr(self.spectral, "last_step"):
            self.reads.append(torch.stack([info.reads.mean() for _, info in self.spectral.last_step()]).mean())
        lr = self.lr * schedule(step, self.case.steps)
        for before, W in zip(self.before, self.matrices, strict=False):
            D = (before.double() - W.double()) / (lr * scaling.target(RULE, *W.shape))
            if bool(D.isfinite().all()):
                self.norms.append(torch.linalg.svdvals(D)[0])
        self._keep(step + 1)

    def summary(self) -> dict[str, Any]:
        """Mean reads per step and matrix; mean, p99 and largest of the sampled norms."""
        reads = float(torch.stack(self.reads).mean()) if self.reads else None
        if not self.norms:
            return {"reads": rounded(reads), "norms": None}
        norms = torch.stack(self.norms).sort().values
        found = {"mean": norms.mean(), "p99": norms[min(len(norms) - 1, int(0.99 * len(norms)))], "max": norms[-1]}
        norm_row = {key: rounded(float(value)) for key, value in found.items()} | {"samples": len(norms)}
        return {"reads": rounded(reads), "norms": norm_row}


def trained(case: Case, method: str, k: int, seed: int, other: float | None, spikes: Spikes | None = None) -> Record:
    """One training as a record; losses None where they are not finite. Norms: of clip and normalize, seed 0."""
    run = case.task(seed)
    optimizer = build(method, run, rate(k), other)
    watched = seed == GRID_SEED and (method == "normalize" or rank_of(method) is not None)
    watch = Watch(run, optimizer, case, spikes) if watched else None
    losses, times = follow(run, optimizer, case.steps, on_step=watch, spikes=spikes, seed=seed)
    width = max(1, case.steps // POINTS)
    firsts = range(0, len(losses) - width + 1, width)
    last = losses[-LAST:]
    return {
        "table": "run",
        **case.key,
        "method": method,
        "k": k,
        "lr": rate(k),
        "other": other,
        "seed": seed,
        "spikes": spikes.size if spikes else None,
        "status": "ok",
        "train": rounded(sum(last) / len(last)),
        "validation": rounded(run.evaluate()),
        "seconds": rounded(times[-1]),
        **(watch.summary() if watch else {"reads": None, "norms": None}),
        "commit": environment.commit(),
        "curve": [[i + width // 2, rounded(sum(losses[i : i + width]) / width)] for i in firsts],
    }


# -- the study


class Study:
    """The runs of one file."""

    def __init__(self, results: Results, steps: int, device: str = "cpu", say: Callable[[str], Any] = print) -> None:
        self.results, self.steps, self.device, self.say = results, steps, device, say

    def get(
        self, case: Case, method: str, k: int, seed: int, other: float | None, spikes: Spikes | None = None
    ) -> Record:
        """The run from the file, or made and written now."""
        key = {**case.key, "method": method, "k": k, "other": other, "seed": seed}
        key |= {"spikes": spikes.size if spikes else None}
        self.results.read()  # another process may have made it meanwhile
        found = self.results.find(table="run", **key)
        if found:
            return found[0]
        record = self.results.add(trained(case, method, k, seed, other, spikes))
        spiked = f", spikes of {spikes.size:g}" if spikes else ""
        shown = f"{record['validation']} in {record['seconds']} s"
        self.say(f"width {case.width}, {method}, lr {record['lr']:g} = 1.5^{k}, seed {seed}{spiked}: {shown}")
        return record

    def known(self, case: Case, method: str, other: float | None) -> dict[int, float]:
        """k -> validation loss of the grid's runs in the file."""
        found = self.results.find(table="run", **case.key, method=method, other=other, seed=GRID_SEED, spikes=None)
        return {record["k"]: loss_of(record) for record in found}

    def start(self, case: Case, method: str) -> int:
        """The best k at the next narrower width in the file, else that of STARTS (of the nearest rank)."""
        narrower = {r["width"] for r in self.results.find(table="run", steps=case.steps, method=method)}
        for width in sorted((w for w in narrower if w < case.width), reverse=True):
            best = best_of(self.results.records, width, case.steps, method)
            if best:
                return best[0]["k"]
        if method in STARTS:
            return STARTS[method]
        rank = rank_of(method) or 1
        nearest = min((m for m in STARTS if rank_of(m)), key=lambda m: abs((rank_of(m) or 1) - rank))
        return STARTS[nearest]

    def best(self, case: Case, method: str, other: float | None) -> int:
        """The k of the method's best rate; runs what the grid still needs."""
        self.results.read()
        known = self.known(case, method, other)

        def measure(k: int) -> float:
            return loss_of(self.get(case, method, k, GRID_SEED, other))

        return climb(measure, self.start(case, method), MOST, known)

    def run(self, width: int, methods: Sequence[str], seeds: Sequence[int] = SEEDS) -> None:
        """Grids, seeds and spiked runs of one width; AdamW's grid first where a method needs its best rate."""
        case = Case(width, self.steps, self.device)
        needed = "AdamW" in methods or any(m not in ALONE for m in methods)
        adam = rate(self.best(case, "AdamW", None)) if needed else None
        for method in methods:
            if case.skips(method):
                self.say(f"width {width}, {method}: skipped, no hidden matrix has more than {width} singular values")
                continue
            other = None if method in ALONE else adam
            k = self.best(case, method, other)
            for seed in seeds:
                self.get(case, method, k, seed, other)
            for size in SIZES if method in SPIKED and GRID_SEED in seeds else ():
                self.get(case, method, k, GRID_SEED, other, Spikes(EVERY, size))

    def times(self, width: int, methods: Sequence[str], seconds: float = 30.0) -> Record:
        """Time over AdamW's, in turns, at the best rates: the optimizer's step, and a whole training step."""
        case = Case(width, self.steps, self.device)
        steps: dict[str, Callable[[], object]] = {}
        whole: dict[str, Callable[[], object]] = {}
        for method in dict.fromkeys(("AdamW", *methods)):
            best = best_of(self.results.records, width, self.steps, method)
            if not best:
                self.say(f"width {width}, {method}: not timed, its best rate is not known yet")
                continue
            run = case.task(0)
            optimizer = build(method, run, best[0]["lr"], best[0]["other"])
            train(run, optimizer, 10)
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the same work, and the model stays as it is
            steps[method] = optimizer.step
            whole[method] = partial(train, run, optimizer, 1, first=10)
        if "AdamW" not in steps:
            raise InputError(f"width {width}: --times needs AdamW's runs first, all else is measured against it")
        clock = clock_for(self.device)
        calls = {"step": steps, "whole": whole}
        taken = {kind: interleave(those, seconds=seconds / 2, clock=clock) for kind, those in calls.items()}
        made: Record = {"table": "times", **case.key, "status": "ok", "commit": environment.commit()}
        made["methods"] = {
            method: {
                kind: {key: rounded(value) for key, value in ratio(samples, method, "AdamW")._asdict().items()}
                for kind, samples in taken.items()
            }
            for method in steps
        }
        return self.results.add(made)


# -- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result file; finished runs stay")
    parser.add_argument("--widths", type=_width, nargs="+", default=list(WIDTHS), metavar="N", help="multiples of 32")
    parser.add_argument(
        "--methods", type=_method, nargs="+", default=list(METHODS), metavar="METHOD",
        help=f"some of {', '.join(METHODS)}, or any other clip rank; clip-8 is clip 8",
    )  # fmt: skip
    parser.add_argument("--steps", type=_count, default=STEPS, metavar="N", help=f"of a run (default {STEPS})")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="N", help="run at the best rate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--threads", type=_count, metavar="N", help="of torch (default: torch's own choice)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--times", action="store_true", help="measure the time of steps at the best rates; train nothing")
    what.add_argument("--report", action="store_true", help="run nothing: only the page and the pictures")
    parser.add_argument("--more", type=Path, nargs="+", default=[], metavar="FILE", help="further files to show")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="a page with the markers, whose tables are replaced")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write the pictures dial-*.png (needs matplotlib)")


def _method(text: str) -> str:
    rank = rank_of(text)
    named = {method.lower(): method for method in METHODS}
    if rank is None and text.lower() not in named:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(METHODS)} or another clip rank")
    return named[text.lower()] if rank is None else f"clip {rank}"


def _width(text: str) -> int:
    if not text.isdecimal() or int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32, the width of a head")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Train or time what the file does not hold yet, then write the page and the pictures."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds none here")
    files = [args.out, *args.more]
    missing = [file for file in (files if args.report else args.more) if not file.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such file")
    try:
        if not args.report:
            study = Study(Results(args.out, args.device), args.steps, args.device, say=lambda t: print(t, flush=True))
            for width in sorted(set(args.widths)):
                if args.times:
                    study.times(width, args.methods)
                else:
                    study.run(width, args.methods, args.seeds)
        if args.docs:
            dial_page.write(args.docs, files)
        if args.plot:
            from . import dial_plot

            for path in dial_plot.draw(files, args.plot):
                print(path)
        print(dial_page.summary(files))
    except ValueError as error:
        raise InputError(str(error)) from None
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spectral_kernels.experiments.dial", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except InputError as error:
        print(f"dial: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
