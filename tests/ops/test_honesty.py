"""The published accuracy of spectral_norm, on a reduced study; docs/accuracy.md has the full one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from spectral_kernels.bench import honesty


@pytest.fixture(scope="module")
def result():
    with torch.random.fork_rng(devices=[]):
        return honesty.study(seeds=20, starts=2, sizes=(90, 190))


def test_the_promise_is_kept(result):
    assert len({row["family"] for row in result["rows"]}) >= 12
    for total in result["totals"]:
        assert total["samples"] >= 700
        assert total["share"] <= honesty.SHARE, total  # no miss at all at this size
        assert total["worst"] <= 1.0, total
    assert honesty.kept(result)


def test_rows_and_reads_add_up(result):
    for total in result["totals"]:
        rows = [row for row in result["rows"] if row["tol"] == total["tol"]]
        assert sum(row["samples"] for row in rows) == total["samples"]
        assert max(row["worst"] for row in rows) == total["worst"]
        assert all(1 <= row["reads"] <= 64 for row in rows)
    means = [sum(r["reads"] for r in result["rows"] if r["tol"] == tol) for tol in honesty.TOLS]
    assert means == sorted(means)  # tighter tolerances read more
    assert json.loads(json.dumps(result)) == result


def test_brackets_hold_and_their_tightness_is_reported(result):
    assert [row["family"] for row in result["bounds"]] == list(dict.fromkeys(r["family"] for r in result["rows"]))
    for row in result["bounds"]:
        assert row["wrong"] == 0
        assert row["16 reads"] <= row["4 reads"] * 1.01 + 1e-6
        assert 0 <= row["8 reads"] < 0.1


def test_a_broken_promise_shows(monkeypatch):
    monkeypatch.setattr(honesty, "spectral_norm", lambda A, tol, seed: torch.full((len(A),), math.nan))
    lying = honesty.study(names=("flat",), seeds=2, starts=1, sizes=(20, 30), tols=(1e-3,))
    assert not honesty.kept(lying)
    assert lying["totals"][0]["missed"] == 2


def test_the_table_goes_between_the_markers(result, tmp_path):
    page = tmp_path / "accuracy.md"
    page.write_text(f"above\n{honesty.BEGIN}\nold\n{honesty.END}\nbelow\n")
    honesty.write_table(page, result)
    honesty.write_table(page, result)
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert text.count("| clustered |") == 2  # accuracy and tightness
    page.write_text("no markers")
    with pytest.raises(ValueError, match="honesty"):
        honesty.write_table(page, result)


def test_the_page_says_what_the_result_file_says(tmp_path):
    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "benchmarks" / "results" / "honesty.json").read_text(encoding="utf-8"))
    assert honesty.kept(result)
    page = root / "docs" / "accuracy.md"
    copy = tmp_path / "accuracy.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    honesty.write_table(copy, result)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
