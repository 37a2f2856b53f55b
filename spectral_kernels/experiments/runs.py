"""What the paper's experiments share: options, the result file that is never run twice, the bar, table and picture."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..bench import environment
from ..bench import runs as studies
from ..bench.measure import Record, rounded
from ..checkpoints import InputError
from . import data

WIDEST, LONGEST, MOST = 16_384, 1_000_000, 1000  # width, steps, trials
FOLDER = Path("paper-results")

Table = Callable[[Sequence[Record]], str]
Draw = Callable[[Sequence[Record], Any], None]


# -- options


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    widths: Sequence[int] = (),
    steps: int | None = None,
    trials: int | None = None,
    stacks: bool = True,
) -> None:
    """The options of an experiment; those without a default here are left out."""
    parser.add_argument(
        "--data", default=None, metavar="digits|PATH",
        help=f"a CIFAR-10 .bin file or the folder cifar-10-batches-bin (default ${data.ENVIRONMENT}, else digits)",
    )  # fmt: skip
    if widths:
        shown = " ".join(map(str, widths))
        parser.add_argument(
            "--widths", type=whole(1, WIDEST), nargs="+", default=list(widths), metavar="N", help=f"(default {shown})"
        )
    if steps is not None:
        parser.add_argument("--steps", type=whole(1, LONGEST), default=steps, metavar="N", help=f"(default {steps})")
    if trials is not None:
        parser.add_argument("--trials", type=whole(1, MOST), default=trials, metavar="N", help=f"(default {trials})")
    if trials is not None and stacks:
        parser.add_argument("--no-stack", action="store_true", help="run trials one after the other")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, metavar="N", help="(default 0)")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="DIR",
        help=f"for results and pictures; finished runs in it stay and are not run again (default {FOLDER})",
    )  # fmt: skip


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argument type: whole numbers from low to high."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


# -- the result file


class Results(studies.Results):
    """Records of experiments: they hold on every machine, each says on which it was made."""

    SAME: tuple[str, ...] = ()  # type: ignore[assignment]

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self.described = environment.describe(device)
        self.records: list[Record] = load(path)[1] if path.exists() else []


class Study:
    """One call of an experiment: its images, its result file, and what of it is asked for."""

    def __init__(self, args: argparse.Namespace, name: str, images: data.Images) -> None:
        device = getattr(args, "device", "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds none here")
        drawing()
        self.args, self.images, self.name = args, images, name
        _check_writable(args.out)
        self.results = Results(args.out / f"{name}.json", device)
        self.shown: list[Mapping[str, Any]] = []  # keys of the records that this call asked for

    def fill(self, key: Mapping[str, Any], trials: int, make: Callable[[list[int]], Iterable[Record]]) -> None:
        """Run the trials of `key` that the file does not hold, as one stack unless --no-stack; `make(trials)` yields
        a record per trial, in their order."""
        whole_key = {"table": self.name, **self._common(), **key}
        self.results.read()
        done = {record["trial"] for record in self.results.find(**whole_key)}
        missing = [trial for trial in range(trials) if trial not in done]
        self.shown += [whole_key | {"trial": trial} for trial in range(trials)]
        for group in [[trial] for trial in missing] if getattr(self.args, "no_stack", False) else [missing]:
            if not group:
                continue
            began = time.perf_counter()
            made = list(make(group))
            seconds = rounded((time.perf_counter() - began) / len(group))
            for trial, record in zip(group, made, strict=True):
                extra = {"status": "ok", "seconds": seconds, "stacked": len(group), **self._where()}
                try:
                    self.results.add({**whole_key, "trial": trial, **record, **extra})
                except OSError as error:
                    raise InputError(f"{self.results.path}: cannot be written ({error.strerror or error})") from None

    def _common(self) -> dict[str, Any]:
        return {"seed": self.args.seed, "crc": self.images.key, "images": self.images.name}

    def _where(self) -> dict[str, Any]:
        return {"machine": self.results.described["machine"], "commit": environment.commit()}

    def records(self) -> list[Record]:
        """The records that this call asked for, in that order."""
        return [record for key in self.shown for record in self.results.find(**key)[:1]]

    @contextlib.contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar where stderr is a terminal; yields what advances it by one."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        hidden = not sys.stderr.isatty()
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
            task = progress.add_task(text, total=total)
            yield lambda *_: progress.advance(task)

    def finish(self, name: str, table: Table, draw: Draw) -> int:
        """Print the table, write the picture; exit status 0."""
        records = self.records()
        print(table(records))
        path = self.args.out / f"paper-{name}.png"
        try:
            picture(records, draw, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
        seconds = sum(record["seconds"] for record in records)
        print(f"\n{seconds:.1f} s of computing over all calls\n{self.results.path}\n{path}")
        return 0


def study(args: argparse.Namespace, name: str, *, two_classes: bool = False) -> Study:
    """Everything that can be refused is refused before anything is run or written."""
    return Study(args, name, data.load(args.data or data.default(), two_classes=two_classes))


def _check_writable(folder: Path) -> None:
    """Make the folder; InputError where no file can be in it."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror or error})") from None


def load(path: Path, name: str | None = None) -> tuple[dict[str, Any], list[Record]]:
    """(environment, records) of an experiment, all where name is None; InputError where the file is none of ours."""
    try:
        described, records = studies.load(path)
        tables = [record["table"] for record in records]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a result file ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return described, [r for r, table in zip(records, tables, strict=True) if name in (None, table)]


# -- records


def groups(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """The records by the values of some entries, in file order."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return found


def title(records: Sequence[Record]) -> str:
    """What a group of records has in common, as a line above its table."""
    first = records[0]
    parts = [first["images"]] if "images" in first else []
    parts += [f"{first['steps']} steps"] if "steps" in first else []
    trials = len({record["trial"] for record in records})
    parts.append(f"{trials} trials" if trials != 1 else "1 trial")
    machines = sorted({record["machine"] for record in records})
    return ", ".join([*parts, *machines])


def drawing() -> tuple[Any, Any]:
    """matplotlib's Figure and PIL's Image; InputError without them."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image  # matplotlib brings it
    except ImportError:
        raise InputError("pictures need the package matplotlib: pip install 'spectral-kernels[paper]'") from None
    return Figure, Image


def picture(records: Sequence[Record], draw: Draw, path: Path) -> None:
    """Draw into a PNG; matplotlib without a display."""
    Figure, Image = drawing()
    figure = Figure(layout="constrained")
    draw(records, figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110 if figure.get_figheight() < 8 else 90)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


def pairs(*options: Iterable[Any]) -> list[tuple[Any, ...]]:
    return list(itertools.product(*options))
