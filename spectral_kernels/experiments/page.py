"""The measured parts of docs/paper.md, made from the result files of the other experiments.

    spectral-kernels paper page --results benchmarks/results/paper --docs docs/paper.md --plot docs/figures
    spectral-kernels paper page --results benchmarks/results/paper --docs docs/paper.md --check

Each part stands between <!-- paper:NAME --> and <!-- /paper -->. --check writes nothing and exits with 1
where the page is not that of the files.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checkpoints import InputError
from . import module_of, runs

MARKER = re.compile(r"(<!-- paper:(?P<part>[a-z0-9-]+) -->\n)(?P<body>.*?)(<!-- /paper -->)", re.DOTALL)
PARTS = ("fig1", "fig2", "fig3", "fig4", "fig5", "fig6", "table1", "appb", "uniqueness", "ntp-mup", "transfer")
NOTHING = "Not measured yet."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=runs.FOLDER, metavar="DIR", help=f"(default {runs.FOLDER})")
    parser.add_argument("--docs", type=Path, required=True, metavar="PAGE", help="a page with the markers")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plot", type=Path, metavar="FOLDER", help="write the pictures paper-*.png too")
    what.add_argument("--check", action="store_true", help="exit with 1 where the page is not that of the files")


def figure(part: str) -> Any:
    """The module of a part: FILE, text(records), draw(records, figure)."""
    return import_module(f".{module_of(part)}", __package__)


def body(part: str, folder: Path) -> str:
    """A part's tables; a sentence where its file is not there."""
    module = figure(part)
    path = folder / f"{module.FILE}.json"
    if not path.is_file():
        return NOTHING
    records = runs.load(path, module.FILE)[1]
    try:
        return str(module.text(records)) if records else NOTHING
    except KeyError as error:
        raise InputError(f"{path}: not a result file (a record without {error})") from None


def render(text: str, folder: Path) -> str:
    """The page with every part made anew; ValueError where it has none or names an unknown one."""
    found = [m["part"] for m in MARKER.finditer(text)]
    wrong = sorted(set(found) - set(PARTS))
    if wrong or not found:
        what = f"an unknown marker paper:{wrong[0]}" if wrong else "no lines <!-- paper:PART --> and <!-- /paper -->"
        raise ValueError(f"the page has {what}; PART is one of {', '.join(PARTS)}")
    return MARKER.sub(lambda m: f"{m[1]}\n{body(m['part'], folder)}\n\n{m[4]}", text)


def run(args: argparse.Namespace) -> int:
    if not args.results.is_dir():
        raise InputError(f"--results {args.results}: no such folder")
    try:
        before = args.docs.read_text(encoding="utf-8")
        after = render(before, args.results)
        if args.check:
            print(f"{args.docs}: {'as the files have it' if before == after else 'not that of the files'}")
            return int(before != after)
        args.docs.write_text(after, encoding="utf-8")
        if args.plot:
            for part in PARTS:
                module = figure(part)
                path = args.results / f"{module.FILE}.json"
                if path.is_file():
                    made = args.plot / f"paper-{part}.png"
                    runs.picture(runs.load(path, module.FILE)[1], module.draw, made)
                    print(made)
    except ValueError as error:
        raise InputError(f"{args.docs}: {error}") from None
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror or error}") from None
    print(args.docs)
    return 0
