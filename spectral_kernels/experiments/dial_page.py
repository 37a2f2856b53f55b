"""The generated parts of docs/clip.md, made from the result files that dial.py writes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..bench.measure import Record, number
from ..bench.runs import where
from .dial_results import Part, parts_of, rank_of

MARKER = re.compile(r"(<!-- dial:(?P<part>[a-z]+) -->\n)(?P<body>.*?)(<!-- /dial -->)", re.DOTALL)
GOALS = ((8, 0.65), (4, 0.85))  # clip n/8 and n/4: at least this share of the way from normalize to Muon
P99, WORST = 1.05, 1.1  # of the exact norm of the direction
NAMES = {
    "AdamW": "AdamW",
    "SGD": "SGD",
    "frobenius": "`frobenius`",
    "normalize": "`normalize` (s = 1)",
    "Muon": "Muon",
}


def name(method: str) -> str:
    return NAMES.get(method, f"`clip`, s = {rank_of(method)}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def spread(values: Sequence[float | None]) -> str:
    """Mean and range over the seeds."""
    found = [v for v in values if v is not None]
    if not found or len(found) < len(values):
        return "not finite"
    mean = f"{sum(found) / len(found):.3f}"
    return f"{mean} ({min(found):.3f}–{max(found):.3f})" if len(found) > 1 else mean


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def title(part: Part) -> str:
    return f"**{part.label[0].upper()}{part.label[1:]}.**"


def verdict(met: Iterable[bool]) -> str:
    return "met" if all(met) else "missed"


# -- the parts


def runs(parts: Sequence[Part]) -> str:
    """A table per width: best rate, losses, reads, share of the way, the grid."""
    blocks = []
    for part in parts:
        rows = []
        for method in part.methods:
            best = part.best(method)
            share = percent(part.share(method)) if rank_of(method) else ""
            reads = "" if best[0]["reads"] is None else f"{best[0]['reads']:.2f}"
            losses = [spread([r[key] for r in best]) for key in ("validation", "train")]
            rows.append([name(method), f"{best[0]['lr']:.2g}", *losses, share, reads, grid(part, best[0])])
        head = ["optimizer", "best rate", "validation loss", "training loss", "of the way", "reads", "grid"]
        seeds = max((len(part.best(m)) for m in part.methods), default=0)
        note = f"{where(part.described)}; mean (range) of {seeds} seeds."
        blocks.append(f"{title(part)} {note}\n\n{table(head, rows)}")
    return "\n\n".join(blocks)


def grid(part: Part, best: Record) -> str:
    """Rate: validation loss of every run of the grid, by rate."""
    found = part.runs(method=best["method"], other=best["other"], seed=best["seed"], spikes=None)
    lost = "not finite"
    return ", ".join(
        f"{r['lr']:.2g}: {lost if r['validation'] is None else format(r['validation'], '.3f')}"
        for r in sorted(found, key=lambda r: r["lr"])
    )


def answers(parts: Sequence[Part]) -> str:
    """What was asked for and what came out, and the rank that goes a share of the way at each width."""
    lines = []
    told = [(p, p.loss("clip 8"), p.loss("AdamW")) for p in parts if {"clip 8", "AdamW"} <= set(p.methods)]
    if told:
        shown = "; ".join(f"{p.label}: {a:.3f} against {b:.3f}" for p, a, b in told)
        lines.append(f"- Clip 8 better than AdamW at every width: **{verdict(a < b for _, a, b in told)}** ({shown}).")
    for divisor, goal in GOALS:
        shares = [(p, p.width // divisor, p.share(f"clip {p.width // divisor}")) for p in parts]
        known = [(p, rank, share) for p, rank, share in shares if share is not None]
        if known:
            shown = "; ".join(f"{p.label}: s = {rank}, {percent(share)}" for p, rank, share in known)
            met = verdict(share >= goal for _, _, share in known)
            lines.append(f"- Clip n/{divisor} goes at least {percent(goal)} of the way: **{met}** ({shown}).")
    for _, goal in GOALS:
        found = [(p, p.rank_for(goal)) for p in parts if p.share("normalize") is not None and _clips(p)]
        if found:
            ranks = "; ".join(f"{p.label}: {_rank(p, rank)}" for p, rank in found)
            how = "linear in log s between those measured"
            lines.append(f"- Rank that goes {percent(goal)} of the way ({how}): {ranks}.")
    return "\n".join(lines)


def _clips(part: Part) -> bool:
    return any(rank_of(method) for method in part.methods)


def _rank(part: Part, rank: float | None) -> str:
    return "beyond those measured" if rank is None else f"{rank:.0f}, n/{part.width / rank:.1f}"


def norms(parts: Sequence[Part]) -> str:
    """Exact norms of the direction in the seed-0 runs at the best rates, spiked ones included."""
    rows, worst = [], []
    for part in parts:
        for method in part.methods:
            best = part.best(method)[0]
            key = {"method": method, "k": best["k"], "other": best["other"], "seed": best["seed"]}
            for r in part.runs(**key):
                found = r["norms"]
                if not found:
                    continue
                spiked = "" if r["spikes"] is None else f", spikes of {r['spikes']:g} × the norm"
                numbers = [f"{found[k]:.3f}" for k in ("mean", "p99", "max")]
                reads = "" if r["reads"] is None else f"{r['reads']:.2f}"
                rows.append([part.label, name(method) + spiked, reads, *numbers, str(found["samples"])])
                if rank_of(method):
                    worst.append(found)
    if not rows:
        return ""
    text = table(["run", "direction", "reads", "‖D‖₂ mean", "p99", "largest", "norms taken"], rows)
    if worst:
        p99, most = max(n["p99"] for n in worst), max(n["max"] for n in worst)
        text += (
            f"\n\nAsked for: p99 at most {P99:g}: **{verdict([p99 <= P99])}** ({p99:.3f}); "
            f"never above {WORST:g}: **{verdict([most <= WORST])}** ({most:.3f})."
        )
    return text


def transfer(parts: Sequence[Part]) -> str:
    """How the best rate moves from a width to the next, and what keeping the narrower one's costs."""
    rows = []
    for narrow, wide in zip(parts, parts[1:], strict=False):
        if (narrow.steps, narrow.width < wide.width) != (wide.steps, True):
            continue
        for method in (m for m in wide.methods if m in narrow.methods):
            a, b = narrow.best(method)[0], wide.best(method)[0]
            kept = wide.runs(method=method, other=b["other"], seed=b["seed"], spikes=None, k=a["k"])
            lost = kept[0]["validation"] - b["validation"] if kept and kept[0]["validation"] is not None else None
            cells = [f"{narrow.width} → {wide.width}", name(method), f"{a['lr']:.2g}", f"{b['lr']:.2g}"]
            rows.append([*cells, f"{b['k'] - a['k']:+d}".replace("+0", "0"), "" if lost is None else f"{lost:.3f}"])
    if not rows:
        return ""
    return table(["width", "optimizer", "best rate", "of the wider", "places on the grid", "loss if kept"], rows)


def time(parts: Sequence[Part]) -> str:
    """Time of steps over AdamW's, and what a run reaches in the time of AdamW's."""
    blocks = []
    for part in parts:
        target = part.smooth("AdamW")[-1][1] if part.times and part.smooth("AdamW") else math.nan
        rows = []
        for method in (m for m in part.methods if m in part.times):
            kinds = [part.times[method][kind] for kind in ("whole", "step")]
            cells = [name(method), *(f"{number(s['median'])} ({number(s['p20'])}–{number(s['p80'])})" for s in kinds)]
            loss, needed = part.loss_in_time(method), part.time_to(method, target)
            cells += ["" if loss is None else f"{loss:.3f}", "not reached" if needed is None else f"{needed:.2f}"]
            rows.append(cells)
        if rows:
            head = ["optimizer", "training step", "optimizer step", "loss in AdamW's time", "time to AdamW's loss"]
            blocks.append(f"{title(part)} {where(part.described)}.\n\n{table(head, rows)}")
    return "\n\n".join(blocks)


PARTS: dict[str, Callable[[Sequence[Part]], str]] = {
    "runs": runs,
    "answers": answers,
    "norms": norms,
    "transfer": transfer,
    "time": time,
}


def render(text: str, files: Sequence[Path]) -> str:
    """The page with every part between markers made anew; ValueError where it has none or names an unknown one."""
    found = [m["part"] for m in MARKER.finditer(text)]
    wrong = sorted(set(found) - PARTS.keys())
    if wrong or not found:
        what = f"an unknown marker dial:{wrong[0]}" if wrong else "no lines <!-- dial:PART --> and <!-- /dial -->"
        raise ValueError(f"the page has {what}; PART is one of {', '.join(PARTS)}")
    parts = list(parts_of(files))
    return MARKER.sub(lambda m: f"{m[1]}\n{PARTS[m['part']](parts) or 'Not measured yet.'}\n\n{m[4]}", text)


def write(page: Path, files: Sequence[Path]) -> None:
    page.write_text(render(page.read_text(encoding="utf-8"), files), encoding="utf-8")


def summary(files: Sequence[Path]) -> str:
    """The tables of losses and the answers, for the terminal."""
    parts = list(parts_of(files))
    return "\n\n".join(text for text in (runs(parts), answers(parts)) if text)
