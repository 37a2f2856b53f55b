"""The README's example runs and prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
NUMBER = re.compile(r"\d+\.\d+(?:e[-+]?\d+)?")


def example() -> tuple[str, str]:
    text = README.read_text(encoding="utf-8")
    section = text.split("<!-- example -->")[1].split("<!-- /example -->")[0]
    code, output = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    return code, output


def test_the_example_prints_what_it_says():
    code, expected = example()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {})
    ours = printed.getvalue()
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", expected)
    for a, b in zip(NUMBER.findall(ours), NUMBER.findall(expected), strict=True):
        assert float(a) == pytest.approx(float(b), rel=2e-3)  # processors differ in the last digits


@pytest.mark.parametrize("page", ["docs/accuracy.md", "docs/parametrization.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = README.read_text(encoding="utf-8")
    assert f"]({page})" in text and (README.parent / page).exists()
