"""docs/diagnostics.md: its blocks run one after the other, its links lead somewhere, and it names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from spectral_kernels import diagnostics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "diagnostics.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python") == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], PAGE.name, "exec"), names)  # errors name the line of the page
    assert {path.name for path in tmp_path.iterdir()} == {"check.png", "transfer.png"}
    printed = capsys.readouterr().out
    assert "change vanishes" in printed and "the optimum moves by" in printed and "srank dW" in printed


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([\w./-]+\.md)\)", PAGE.read_text(encoding="utf-8"))
    assert targets and [name for name in targets if not (PAGE.parent / name).is_file()] == []


def test_every_function_is_named():
    functions = {name for name in diagnostics.__all__ if name[0].islower()} | {"SpectralMonitor"}
    text = PAGE.read_text(encoding="utf-8")
    assert {name for name in functions if f"`{name}`" not in text and f"diagnostics.{name}(" not in text} == set()
