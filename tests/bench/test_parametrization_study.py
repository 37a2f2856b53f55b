"""The study behind docs/parametrization.md: a reduced run, and the page against the committed result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import parametrization as study
from benchmarks import parametrization_page, report
from spectral_kernels.bench.measure import document

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "parametrization.md"
RESULT = ROOT / "benchmarks" / "results" / "parametrization.json"
ENVIRONMENT = {
    "machine": "cpu-2core-avx512",
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "omp_wait_policy": "passive",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789",
}


@pytest.fixture(scope="module")
def records():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        found = [
            *study.training(steps=10, seeds=1),
            *study.replacements(starts=1, growths=(3.0,)),
            *study.shares(steps=3, starts=1),
            *study.times(single=((40, 30),), model=(3, 16), seconds=0.05),
        ]
    torch.set_num_threads(threads)
    return found


@pytest.fixture
def result(records, tmp_path):
    path = tmp_path / "parametrization.json"
    path.write_text(json.dumps(document(records, ENVIRONMENT)))
    return path


def of(records, name, **wanted):
    return [r for r in records if r["table"] == name and all(r[key] == value for key, value in wanted.items())]


def test_training_counts_reads_and_orders_the_errors(records):
    reads = {way: [r["reads"] for r in of(records, "training", way=way)] for way in study.WAYS}
    assert reads["torch, 1 iteration"] == [3, 3] and reads["torch, 5 iterations"] == [11, 11]
    assert reads["1 read"] == [1, 1] and reads["2 reads"] == [2, 2]
    assert all(3 < r <= 64 for r in reads["`tol=1e-3`"])
    for rate in study.RATES:
        mean = {r["way"]: r["mean"] for r in of(records, "training", rate=rate)}
        assert mean["`tol=1e-3`"] < mean["2 reads"] < mean["1 read"] < mean["torch, 1 iteration"]
    for r in of(records, "training"):
        assert r["samples"] == 10 * 4 and r["mean"] <= r["p99"] <= r["max"]
        assert (r["above_tol"] > 0) == (r["max"] > study.TOL)


def test_hidden_directions_take_torch_longest(records):
    hidden = {r["way"]: r["forwards"] for r in of(records, "replaced", spectrum="linear, 1 … 0.2", hidden=True)}
    seen = {r["way"]: r["forwards"] for r in of(records, "replaced", spectrum="linear, 1 … 0.2", hidden=False)}
    assert hidden["torch, 1 iteration"] > hidden["1 read"] > hidden["`tol=1e-3`"]
    assert all(seen[way] <= hidden[way] for way in hidden)
    assert [r["share"] for r in of(records, "share")] == list(study.SHARES)


def test_new_vectors_are_hidden_and_the_norm_is_the_claimed_one():
    s = study.SPECTRA["1/i"]
    module = study.settled(study.WAYS["1 read"], s, 0)
    weight = module.parametrizations.weight.original
    torch.testing.assert_close(torch.linalg.svdvals(weight.detach()), s)
    away = torch.randn(5, 64, dtype=torch.float64)
    V = study.frame(64, 64, away)
    torch.testing.assert_close(V.mT @ V, torch.eye(64, dtype=torch.float64))
    assert (away @ V[:, 0]).abs().max() < 1e-13 < (away @ V[:, 1]).abs().max()
    before = weight.detach().clone()
    assert study.replaced(module, torch.cat((3 * s[:1], s[1:])), False, 0) < study.MOST
    assert torch.equal(weight, before)


def test_a_way_that_never_arrives_is_reported_as_such(monkeypatch, records, result):
    monkeypatch.setattr(study, "MOST", 3)
    frozen = study.settled(study.WAYS["1 read"], study.SPECTRA["1/i"], 0).eval()
    assert study.replaced(frozen, torch.cat((torch.tensor([3.0]).double(), study.SPECTRA["1/i"][1:])), True, 0) == 3
    lost = [r | {"forwards": r["most"]} if r["table"] == "replaced" else r for r in records]
    assert "500 or more" in parametrization_page.tables(ENVIRONMENT, lost)["parametrization_replaced"]


def test_times_are_ratios_of_training_forwards(records, monkeypatch):
    found = of(records, "time")
    assert [r["way"] for r in found] == ["1 read", "1 read", "1 read, `spectral_norm_model`"]
    assert all(0 < r["p20"] <= r["value"] <= r["p80"] and r["rounds"] >= 5 for r in found)
    calls = []
    monkeypatch.setattr(study, "interleave", lambda c, seconds: calls.append(c) or {way: [1.0] for way in c})
    study.times(single=((6, 5),), model=(2, 4), seconds=0.0)
    alone, model = calls
    assert isinstance(alone["1 read"](), torch.Tensor) and not torch.equal(alone["1 read"](), nn.Linear(5, 6).weight)
    outputs = [call() for call in model.values()]
    torch.testing.assert_close(outputs[1], outputs[2], rtol=1e-3, atol=1e-3)


def test_the_page_is_rendered_from_the_file_alone(records, result):
    page = "".join(f"above\n<!-- table:{name} -->\nbefore it\n<!-- /table -->\n" for name in _subjects())
    text = parametrization_page.render(page + "<!-- table:norm -->\nkept\n<!-- /table -->\n", result)
    assert "before it" not in text and "kept" in text and text.count("above") == len(_subjects())
    assert text == parametrization_page.render(text, result)
    torchs = of(records, "training", way="torch, 1 iteration")[0]
    assert f"| torch, 1 iteration | 3 | {torchs['mean']:.1e}".replace("e-0", "e-") in text
    assert "torch 2.13.0" in text and "commit 0123456789" in text
    with pytest.raises(ValueError, match="parametrization_time"):
        parametrization_page.render("no markers", result)


def _subjects():
    return [f"parametrization_{name}" for name in parametrization_page.TABLES]


def test_the_command_writes_file_and_page(records, monkeypatch, tmp_path, capsys):
    for name in ("times", "training", "replacements", "shares"):
        wanted = {"times": "time", "replacements": "replaced", "shares": "share"}.get(name, name)
        monkeypatch.setattr(study, name, lambda wanted=wanted: of(records, wanted))
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table:{name} -->\n<!-- /table -->\n" for name in _subjects()))
    out = tmp_path / "results" / "parametrization.json"
    assert study.main(["--out", str(out), "--docs", str(page)]) == 0
    environment, written = report.load(out)
    assert {"versions", "commit", "threads", "seconds"} <= environment.keys()
    assert len(written) == len(records) and str(tmp_path) not in out.read_text()
    assert parametrization_page.render(page.read_text(), out) == page.read_text()
    assert "torch, 1 iteration" in page.read_text() and "torch, 1 iteration" in capsys.readouterr().out


@pytest.fixture
def committed():
    if not RESULT.is_file():
        pytest.skip(f"{RESULT.name} is not there yet: run python -m benchmarks.parametrization")
    return report.load(RESULT)[1]


def test_tables_of_the_page_are_those_of_the_result_file(committed):
    text = PAGE.read_text(encoding="utf-8")
    assert parametrization_page.render(text, RESULT) == text


def test_what_the_page_says_in_words_holds_in_the_result_file(committed):
    for rate in study.RATES:
        mean = {r["way"]: r["mean"] for r in of(committed, "training", rate=rate)}
        assert mean["`tol=1e-3`"] < mean["2 reads"] < mean["1 read"] < mean["torch, 1 iteration"]
    none, *some = (r["forwards"] for r in of(committed, "share"))
    assert none > 3 * max(some)  # how much of the randomness matters little, none at all does
    smallest, largest = (f"one layer, {m} × {n}" for m, n in (min(study.SINGLE), max(study.SINGLE)))
    value = {(r["case"], r["way"]): r["value"] for r in of(committed, "time")}
    assert value[smallest, "1 read"] < 1 and value[smallest, "1 read"] < value[largest, "1 read"]
    alone, model = (r for r in of(committed, "time") if "layers" in r["case"])
    assert model["value"] > alone["value"]
