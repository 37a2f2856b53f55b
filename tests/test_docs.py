"""The Python blocks of documentation pages run, one after the other, as a reader would type them."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from spectral_kernels import diagnostics
from spectral_kernels.optim import Muon, SpectralOptimizer

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([\w./-]+\.md)\)")
PAGES = ["optimizer.md"]
LINKED = [*PAGES, "orthogonalize.md", "muon.md"]


class Logged(list):
    """Stands for a logger that is not installed here: keeps what it is given."""

    def add_scalar(self, key: str, value: float, global_step: int) -> None:
        self.append((key, value))

    def log(self, row: dict[str, float], step: int) -> None:
        self.extend(row.items())


@pytest.fixture
def loggers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Logged]:
    board, wandb = Logged(), Logged()
    tensorboard = types.SimpleNamespace(SummaryWriter=lambda folder: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: None, log=wandb.log))
    return {"tensorboard": board, "wandb": wandb}


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page, loggers, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") > 0
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], page, "exec"), names)  # errors name the line of the page
    row = names["row"]
    assert isinstance(row, dict)
    assert dict(loggers["tensorboard"]) == dict(loggers["wandb"]) == row
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 2
    printed = capsys.readouterr().out
    assert "fan_out" in printed and printed.count("\n") > 8


def test_the_examples_of_orthogonalization_run(capsys):
    text = (ROOT / "docs" / "orthogonalize.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") == 5
    names: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], "orthogonalize.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "flips the sign" in printed and "diverges" in printed and "hold together" in printed


def test_the_examples_of_muon_run():
    text = (ROOT / "docs" / "muon.md").read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") == 3
    names: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], "muon.md", "exec"), names)


def test_the_options_of_muon_are_all_explained():
    text = (ROOT / "docs" / "muon.md").read_text(encoding="utf-8")
    beyond = set(inspect.signature(Muon).parameters) - set(inspect.signature(torch.optim.Muon).parameters)
    rows = [line.split("|")[1] for line in text.split("## Options")[1].splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == beyond | {"adjust_lr_fn"}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    targets = LINK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert targets
    assert [name for name in targets if not (ROOT / "docs" / name).is_file()] == []


def test_the_quantities_are_all_explained():
    text = (ROOT / "docs" / "optimizer.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| .*$", text.split("## Watching a run")[1], re.MULTILINE) == [
        *diagnostics.STEP,
        *diagnostics.WEIGHT,
    ]


def test_the_options_are_all_explained():
    section = (ROOT / "docs" / "optimizer.md").read_text(encoding="utf-8").split("## Options")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    accepted = set(inspect.signature(SpectralOptimizer).parameters) - {"params"}
    assert listed == accepted | {"kind", "transposed", "groups", "num_heads", "split_sizes"}
