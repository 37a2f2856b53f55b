"""Write the README's tables from the result files.

    python -m benchmarks.report [--check] [README.md]

Between `<!-- table:<subject> -->` and `<!-- /table -->` the README holds one table per machine, made from
benchmarks/results/<machine>/<subject>.json. --check changes nothing and exits 1 where a table differs from its files.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from spectral_kernels.bench.measure import describe_target, describe_value
from spectral_kernels.bench.runs import load, where

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"(<!-- table:(?P<subject>[a-z_]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
HEAD = "| row | case | against | ratio (p20–p80) | target | error (limit) | reads |\n|---|---|---|---|---|---|---|\n"


def line(record: dict[str, Any]) -> str:
    against = record["rival"] or ("the matrix's own bytes" if record["measure"] == "memory" else "")
    if record.get("rival_setting"):
        against += f" ({record['rival_setting']})"
    error = "" if record.get("error") is None else f"{record['error']:.1e} ({record['error_limit']:.0e})"
    reads = "" if record.get("reads") is None else f"{record['reads']:g}"
    target = describe_target(record)
    if target.endswith("missed"):
        target = f"**{target}**"
    cells = [record["row"], record["case"], against, describe_value(record), target, error, reads]
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def tables(subject: str, results: Path) -> str:
    """All machines' tables of a subject; a line in words where there is none yet."""
    parts = []
    for path in sorted(results.glob(f"*/{subject}.json")):
        environment, records = load(path)
        parts.append(where(environment) + "\n\n" + HEAD + "\n".join(map(line, records)) + "\n")
    return "\n" + "\n".join(parts or ["Not measured yet.\n"]) + "\n"


def render(text: str, results: Path) -> str:
    """The text with every table made anew."""
    return MARKER.sub(lambda m: m[1] + tables(m["subject"], results) + m[4], text)


def stale(text: str, results: Path) -> list[str]:
    """Subjects whose table in the text is not what the result files say."""
    return [m["subject"] for m in MARKER.finditer(text) if m["body"] != tables(m["subject"], results)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if not args.file.is_file():
        print(f"{args.file.name}: no such file, so no table was written", file=sys.stderr)
        return 2
    text = args.file.read_text()
    old = stale(text, args.results)
    if args.check:
        for subject in old:
            print(
                f"{args.file.name}: table:{subject} is not what the result files say; run python -m benchmarks.report"
            )
        return 1 if old else 0
    args.file.write_text(render(text, args.results))
    print(f"{args.file.name}: {len(old)} of {len(MARKER.findall(text))} tables changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
