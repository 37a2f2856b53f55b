"""Write the tables of README.md and docs/orthogonalize.md from the result files.

    python -m benchmarks.report [--check] [page ...]

Between `<!-- table:<subject> -->` and `<!-- /table -->` a page holds one table per machine, made from
benchmarks/results/<machine>/<subject>.json, or, for subjects schedules_..., one made from
benchmarks/results/schedules.json. --check changes nothing and exits 1 where a table differs from its files.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import schedules_page
from spectral_kernels.bench.measure import describe_target, describe_value
from spectral_kernels.bench.runs import load, where

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"(<!-- table:(?P<subject>[a-z_]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
PAGES = (ROOT / "README.md", ROOT / "docs" / "orthogonalize.md")
HEAD = "| row | case | against | ratio (p20–p80) | target | error (limit) | {} |\n|---|---|---|---|---|---|---|\n"
WORK = "Gflop, share of the product rate: ours; theirs"


def work(record: dict[str, Any]) -> str:
    """`13.1, 61 %; 23.6, 80 %`: what each provider's products come to, and how fast they are done."""
    if record["status"] != "ok":
        return ""
    parts = []
    for flops, share in (("flops", "share_of_ceiling"), ("rival_flops", "rival_share_of_ceiling")):
        if record.get(flops):
            parts.append(f"{record[flops] / 1e9:.3g}, {100 * record[share]:.0f} %")
    return "; ".join(parts)


def line(record: dict[str, Any], counted: bool = False) -> str:
    """A row of a table; counted: of one whose last column is work instead of reads."""
    against = record["rival"] or ("the matrix's own bytes" if record["measure"] == "memory" else "")
    if record.get("rival_setting"):
        against += f" ({record['rival_setting']})"
    error = "" if record.get("error") is None else f"{record['error']:.1e} ({record['error_limit']:.0e})"
    last = work(record) if counted else "" if record.get("reads") is None else f"{record['reads']:g}"
    target = describe_target(record)
    if target.endswith("missed"):
        target = f"**{target}**"
    cells = [record["row"], record["case"], against, describe_value(record), target, error, last]
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def tables(subject: str, results: Path) -> str:
    """All machines' tables of a subject; a line in words where there is none yet."""
    study = schedules_page.made(subject, results)
    if study is not None:
        return study
    parts = []
    for path in sorted(results.glob(f"*/{subject}.json")):
        environment, records = load(path)
        counted = any("rival_flops" in record for record in records)
        head = HEAD.format(WORK if counted else "reads")
        parts.append(where(environment) + "\n\n" + head + "\n".join(line(r, counted) for r in records) + "\n")
    return "\n" + "\n".join(parts or ["Not measured yet.\n"]) + "\n"


def render(text: str, results: Path) -> str:
    """The text with every table made anew."""
    return MARKER.sub(lambda m: m[1] + tables(m["subject"], results) + m[4], text)


def stale(text: str, results: Path) -> list[str]:
    """Subjects whose table in the text is not what the result files say."""
    return [m["subject"] for m in MARKER.finditer(text) if m["body"] != tables(m["subject"], results)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    return max(page(path, args.results, args.check) for path in args.pages)


def page(path: Path, results: Path, check: bool) -> int:
    """0: its tables are those of the files; 1: they are not, and were only checked; 2: there is no such page."""
    if not path.is_file():
        print(f"{path.name}: no such file, so no table was written", file=sys.stderr)
        return 2
    text = path.read_text(encoding="utf-8")
    old = stale(text, results)
    if check:
        for subject in old:
            print(f"{path.name}: table:{subject} is not what the result files say; run python -m benchmarks.report")
        return 1 if old else 0
    path.write_text(render(text, results), encoding="utf-8")
    print(f"{path.name}: {len(old)} of {len(MARKER.findall(text))} tables changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
