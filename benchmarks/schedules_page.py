"""The tables of docs/orthogonalize.md, made from the result file that benchmarks/schedules.py writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from spectral_kernels.bench.measure import Record
from spectral_kernels.bench.runs import load, where
from spectral_kernels.ops.schedules import ALIASES

FILE = "schedules.json"
Records = Sequence[Record]
NORMALIZERS = ("frobenius", "schatten4", "spectral")
DEFAULT, NAME, NORMALIZER = "polar_express", ALIASES["polar_express"], "schatten4"  # of sk.orthogonalize
SHOWN = ("momenta of training", "Gaussian 1:4")
REFERENCE = 5  # steps with the Frobenius norm that the others are compared with
TORCHS, LONG, SLOW = "keller_quintic", "polar_express_8_safety2e2", "deepseek_v4_10"


def of(records: Records, table: str, **wanted: Any) -> list[Record]:
    return [r for r in records if r["table"] == table and all(r[key] == value for key, value in wanted.items())]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))


def plain(name: str) -> str:
    return f"`{name}`" + (" (the default)" if name == NAME else "")


def quoted(name: str) -> str:
    return f'`"{name}"`'


def size(x: float | None) -> str:
    """Three significant digits, small numbers with an exponent."""
    if x is None:
        return "not finite"
    if x < 1e-6:
        return "< 1e-6"
    return f"{x:.1e}".replace("e-0", "e-") if x < 1e-3 else f"{x:.3g}"


def percent(x: float) -> str:
    return f"{100 * x:.3g} %"


# -- tables


def schedule_table(records: Records) -> str:
    """Every safe schedule, its outputs for two families, with the default normalizer."""
    head = ["schedule", "steps"]
    for family in SHOWN:
        head += [f"{family}: f, 5 % / median / max", "below 0.5", "defect", "cosine"]
    lines = []
    for name in dict.fromkeys(r["schedule"] for r in of(records, "range")):
        cells = [plain(name)]
        for family in SHOWN:
            (r,) = of(records, "range", schedule=name, family=family, normalizer=NORMALIZER)
            cells += [] if len(cells) > 1 else [str(r["steps"])]
            values = " / ".join(size(r[key]) for key in ("p5", "median", "max"))
            cells += [values, percent(r["below_half"]), size(r["defect"]), size(r["cosine"])]
        lines.append(cells)
    refused = [
        f"- `{r['schedule']}`: {r['reasons'][0].replace('; rounding', ', and rounding')}."
        for r in of(records, "refused")
    ]
    return table(head, lines) + "\n\nRefused in float32 already:\n\n" + "\n".join(refused)


def family_table(records: Records) -> str:
    """The default schedule: every family with every normalizer."""
    head = ["singular values of", "matrices"]
    head += [f"{name}: defect, cosine, below 0.5" for name in NORMALIZERS]
    lines = []
    for family in dict.fromkeys(r["family"] for r in of(records, "range")):
        found = [of(records, "range", schedule=NAME, family=family, normalizer=n)[0] for n in NORMALIZERS]
        cells = [f"{size(r['defect'])}, {size(r['cosine'])}, {percent(r['below_half'])}" for r in found]
        lines.append([family, str(found[0]["matrices"]), *cells])
    return table(head, lines)


def steps_for(records: Records, family: str, normalizer: str, key: str, wanted: float) -> float | None:
    """Steps until the defect is `wanted`: its logarithm linear between two counts; None: beyond those measured."""
    before: Record | None = None
    for r in of(records, "saving", family=family, normalizer=normalizer):
        if r[key] <= wanted:
            if before is None or r[key] == wanted:
                return float(r["steps"])
            share = math.log(before[key] / wanted) / math.log(before[key] / r[key])
            return before["steps"] + share * (r["steps"] - before["steps"])
        before = r
    return None


def saving_table(records: Records) -> str:
    """What a tighter normalizer saves: the defect after as many steps, and the steps for the same defect."""
    head = [f"singular values of: defect after {REFERENCE} steps", *NORMALIZERS]
    head += [f"steps for the defect of frobenius after {REFERENCE}: {name}" for name in NORMALIZERS[1:]]
    blocks = []
    for key, title in (("defect", "One list for all"), ("fitted", "Each fitted to the family")):
        lines = []
        for family in dict.fromkeys(r["family"] for r in of(records, "saving")):
            found = [of(records, "saving", family=family, normalizer=n, steps=REFERENCE)[0] for n in NORMALIZERS]
            counts = [steps_for(records, family, n, key, found[0][key]) for n in NORMALIZERS[1:]]
            shown = ["more than measured" if c is None else f"{c:.2f}" for c in counts]
            lines.append([family, *(size(r[key]) for r in found), *shown])
        blocks.append(f"{title}:\n\n{table(head, lines)}")
    return "\n\n".join(blocks)


def noise_table(records: Records) -> str:
    """The largest output of a zero singular value, per dtype; what is refused there says so."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in of(records, "noise")))
    head = ["schedule", "steps", *(f"{dtype}, {method}" for dtype in dtypes for method in ("standard", "gram"))]
    lines = []
    for name in dict.fromkeys(r["schedule"] for r in of(records, "noise")):
        found = of(records, "noise", schedule=name)
        if not any(r["safe"] for r in found):
            continue
        cells = []
        for r in found:
            restarts = ", ".join(map(str, r["restarts"])) if r["restarts"] else ""
            cells.append(size(r["noise"]) + (f" (restarts {restarts})" if restarts else "") if r["safe"] else "refused")
        lines.append([plain(name), str(found[0]["steps"]), *cells])
    return table(head, lines)


def choice(records: Records) -> str:
    """Which schedule to use, in sentences with their numbers."""

    def on(name: str, family: str = SHOWN[0], normalizer: str = NORMALIZER) -> Record:
        return of(records, "range", schedule=name, family=family, normalizer=normalizer)[0]

    def noise(name: str, dtype: str) -> str:
        return size(of(records, "noise", schedule=name, dtype=dtype, method="standard")[0]["noise"])

    def sentence(name: str) -> str:
        r = on(name)
        return (
            f"on momenta of training {percent(r['below_half'])} of the singular values end below 0.5, "
            f"cosine with the polar factor {size(r['cosine'])}"
        )

    torchs, flat = on(TORCHS, SHOWN[1]), on(NAME, SHOWN[1])
    lines = (
        (
            f"Without a reason for another: {quoted(DEFAULT)}",
            f"the default, {on(NAME)['steps']} steps: {sentence(NAME)}; flat spectra (Gaussian 1:4) come out with a "
            f"defect of {size(flat['defect'])}.",
        ),
        (
            f"Runs that must be comparable with torch.optim.Muon's: {quoted(TORCHS)}",
            f"{on(TORCHS)['steps']} steps, the default of `sk.optim.Muon` too: {sentence(TORCHS)}; it never converges "
            f"(Gaussian 1:4: outputs up to {size(torchs['max'])}, defect {size(torchs['defect'])}).",
        ),
        (
            f"Closer to orthogonal: {quoted(LONG)}",
            f"{on(LONG)['steps']} steps: {sentence(LONG)}. "
            f"{quoted(SLOW)}, {on(SLOW)['steps']} steps: {sentence(SLOW)}.",
        ),
        ('Exact, or a derivative of the exact polar factor: `method="svd"`', "a decomposition in float64."),
        (
            "You know the interval of your singular values: `sk.schedules.polar_express(lower, steps=...)`",
            "the best list for it. Without `safety=1.02` or so it has no headroom for rounding, and is refused.",
        ),
        (
            "Nearly rank-1 inputs: float32",
            "a steeper schedule lifts rounding too. A zero singular value comes out as up to "
            f"{noise(NAME, 'bfloat16')} in bfloat16 with the default ({noise(TORCHS, 'bfloat16')} with "
            f"{quoted(TORCHS)}), {noise(NAME, 'float16')} in float16, {noise(NAME, 'float32')} in float32.",
        ),
    )
    return "\n".join(f"- **{title}**, {text}" for title, text in lines)


TABLES: dict[str, Callable[[Records], str]] = {
    "schedules_choice": choice,
    "schedules_list": schedule_table,
    "schedules_families": family_table,
    "schedules_saving": saving_table,
    "schedules_noise": noise_table,
}


def tables(described: dict[str, Any], records: Records) -> dict[str, str]:
    """Subject of a marker -> what stands between it and the next."""
    found = {name: make(records) for name, make in TABLES.items()}
    found["schedules_list"] = f"{where(described)}\n\n{found['schedules_list']}"
    return {name: f"\n{text}\n\n" for name, text in found.items()}


def made(subject: str, results: Path) -> str | None:
    """What stands behind the marker of one of these subjects; None: it is none of them."""
    if subject not in TABLES:
        return None
    path = results / FILE
    return tables(*load(path))[subject] if path.is_file() else "\nNot measured yet.\n\n"
