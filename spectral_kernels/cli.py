"""The command `spectral-kernels`: inspect, bench, paper, schedules, doctor: arguments and exit statuses.

Exit status: 0 done; 1 `bench` measured a wrong result, or `doctor` found a word that nothing serves; 2 bad arguments or
input, said in one line; 130 interrupted; 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .checkpoints import READABLE, Checkpoint, InputError, open_checkpoint

if TYPE_CHECKING:
    from .reporting import Inspection

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
DTYPES = ("float32", "bfloat16", "float16", "float64")
SORTS = ("name", "sigma", "ratio", "stable_rank", "size", "change")

_INSPECT = f"""\
Spectral norms of the matrices in a checkpoint ({READABLE}).

One row per matrix: sigma_max to --tol with a bracket that holds with probability 1 - delta, the root of
fan_out / fan_in, the ratio of the two, and the stable rank. The file is memory-mapped and read a few tensors
at a time. With several files, every layer of the later ones is compared with the first one, with the spectral
norm of the difference.
"""
_INSPECT_NOTES = """\
How tensors are read: 2-D is a matrix (fan_out, fan_in) as torch.nn.Linear stores it. 3-D is a stack, one row
per matrix, unless its name contains "conv". Those, and everything of more dimensions, are convolutions
(out, in, ...), taken as the matrix (out, in * ...). Embedding tables (by convention "embed" in the name) are
stored transposed, (vocabulary, width) = (fan_in, fan_out), and so are transposed convolutions; they are shown
as stored: turn their root around when you read it. 1-D tensors are listed with their Euclidean norm and RMS.
Integer, boolean, complex, sparse and quantized tensors are named and not measured. NaN and infinite entries
show as nan and inf; JSON has them as the strings "NaN" and "Infinity".

.pt, .pth and .bin are read with weights_only=True; those written by torch < 1.6 cannot be mapped and are read
as a whole.
"""
_SCHEDULES = """\
Schedules of orthogonalization. Each step replaces every singular value s by s (a + b s^2 + c s^4).

One row per list of coefficients: what its polynomial does, where method "gram" has to compute its Gram matrix anew,
and whether the arithmetic of --dtype carries it with --method, measured on test matrices; below, f(sigma).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"spectral-kernels: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the interpreter flushes stdout once more at exit
        return BROKEN_PIPE


def _run(argv: list[str]) -> int:
    parser = build_parser(argv)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help and --version end here too
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; the options of `bench` and of an experiment are imported only when argv asks for them."""
    parser = argparse.ArgumentParser(
        prog="spectral-kernels", description="Spectral norms, cheap enough for every step."
    )
    parser.add_argument("--version", action="version", version=f"spectral-kernels {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    raw = argparse.RawDescriptionHelpFormatter
    inspect = commands.add_parser(
        "inspect",
        help="spectral norms of the weights in a checkpoint, or between checkpoints",
        description=_INSPECT,
        epilog=_INSPECT_NOTES,
        formatter_class=raw,
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint; with several, compared with the first")
    inspect.add_argument(
        "--sort",
        choices=SORTS,
        default="name",
        help='order of the rows; numbers go downwards; "change" needs two files',
    )
    inspect.add_argument("--reverse", action="store_true", help="turn the order around")
    inspect.add_argument(
        "--json", metavar="PATH", help='write everything as JSON; "-" is stdout, instead of the tables'
    )
    inspect.add_argument("--csv", metavar="PATH", help='write every row as CSV; "-" is stdout, instead of the tables')
    inspect.add_argument("--plot", metavar="PICTURE", help="draw norms and stable ranks per layer (.png, .pdf, .svg)")
    inspect.add_argument("--tol", type=_fraction, default=1e-3, help="relative error of the norms (default 1e-3)")
    inspect.add_argument(
        "--delta", type=_fraction, default=1e-6, help="probability that a bracket may miss its norm (default 1e-6)"
    )
    inspect.add_argument("--seed", type=int, default=0, help="of the random start vectors (default 0)")
    inspect.set_defaults(command=_inspect)

    bench = commands.add_parser("bench", help="measure against torch.linalg, power iteration and scipy on this machine")
    asked = next((word for word in argv if not word.startswith("-")), None)
    if asked == "bench":
        from .bench import runner

        runner.add_arguments(bench)
    bench.set_defaults(command=_bench)

    paper = commands.add_parser("paper", help="experiments on the paper's claims, one subcommand each")
    if asked == "paper":
        from . import experiments

        experiments.add_parsers(paper, argv[1:])

    schedules = commands.add_parser(
        "schedules",
        help="coefficients of orthogonalization: what every list does, and whether an arithmetic carries it",
        description=_SCHEDULES,
        formatter_class=raw,
    )
    schedules.add_argument("names", nargs="*", metavar="NAME", help="published lists or aliases; by default all")
    schedules.add_argument("--steps", type=int, metavar="N", help="that many steps, by the tail rule of a list")
    schedules.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the products (default bfloat16)")
    schedules.add_argument("--method", choices=("standard", "gram"), default="standard", help="(default standard)")
    schedules.add_argument("--json", metavar="PATH", help='write everything as JSON; "-" is stdout, not the table')
    schedules.add_argument("--plot", metavar="PICTURE", help="draw f(sigma) of the names (.png, .pdf, .svg)")
    schedules.set_defaults(command=_schedules, files=(), csv=None, sort="name")  # what _check_outputs reads

    doctor = commands.add_parser("doctor", help="versions, devices, and which backend serves each word and why")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return value


def _bench(args: argparse.Namespace) -> int:
    from .bench import runner

    return runner.run(args)


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run(args.json)


def _schedules(args: argparse.Namespace) -> int:
    _check_outputs(args)
    from . import schedules_page

    schedules_page.run(args, _writing)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    _check_outputs(args)
    checkpoints = [open_checkpoint(file) for file in args.files]
    from .kernels import registry

    try:
        registry.forced()
    except ValueError as error:
        raise InputError(f"{registry.ENVIRONMENT}: {error}") from None
    try:
        inspection = _measure(checkpoints, args)
    except registry.BackendUnavailable as error:
        raise InputError(str(error)) from None
    inspection.order(args.sort, args.reverse)
    from . import reporting

    for report in inspection.reports:
        for note in report.notes:
            print(f"note: {reporting.plain(report.path)}: {note}", file=sys.stderr)
    outputs = [(form, target) for form, target in (("json", args.json), ("csv", args.csv)) if target is not None]
    outputs.sort(
        key=lambda output: output[1] == "-"
    )  # files first: they are whole even when the reader of stdout leaves
    if args.plot is not None:
        from . import inspection_plot

        with _writing(args.plot):
            inspection_plot.draw(inspection, args.plot)
    for form, target in outputs:
        with _writing(target):
            reporting.write(inspection, form, target)
    if "-" not in (args.json, args.csv):
        reporting.show(inspection, sys.stdout)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Whatever can be refused is refused before the first tensor is read."""
    if args.json == "-" and args.csv == "-":
        raise InputError("--json - and --csv - both ask for stdout")
    if args.sort == "change" and len(args.files) < 2:
        raise InputError("--sort change needs two files or more to compare")
    if args.plot is not None:
        from . import inspection_plot

        inspection_plot.check(args.plot)
    taken = {Path(file).resolve() for file in args.files}
    for option in ("json", "csv", "plot"):
        target = getattr(args, option)
        if target in (None, "-"):
            continue
        path = Path(target).resolve()
        if path in taken:
            raise InputError(f"--{option} {target}: would overwrite an input or another output")
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"--{option} {target}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
        taken.add(path)


@contextlib.contextmanager
def _writing(target: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


def _measure(checkpoints: list[Checkpoint], args: argparse.Namespace) -> Inspection:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from . import comparison, inspection, reporting

    options = inspection.Options(tol=args.tol, delta=args.delta, seed=args.seed)
    inspection.check_options(checkpoints, options)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:

        def track(text: str, checkpoint: Checkpoint) -> Callable[[int], None]:
            total = sum(entry.nbytes for entry in checkpoint.entries if entry.skip is None)
            task = bar.add_task(reporting.plain(text), total=total)
            return lambda count: bar.advance(task, count)

        first = checkpoints[0]
        reports = [inspection.inspect_checkpoint(c, options, track(c.path.name, c)) for c in checkpoints]
        changes = [
            comparison.compare(first, later, options, track(f"{later.path.name} - {first.path.name}", first))
            for later in checkpoints[1:]
        ]
    return reporting.Inspection(reports, changes, options)
