"""The study behind docs/orthogonalize.md: its numbers against real results, its tables, the page and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import spectral_kernels as sk
from benchmarks import report, schedules_page
from benchmarks import schedules as study
from spectral_kernels.bench.cases import gaussian
from spectral_kernels.bench.measure import document
from spectral_kernels.ops import schedules

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "orthogonalize.md"
RESULTS = ROOT / "benchmarks" / "results"
ENVIRONMENT = {
    "machine": "cpu-2core-avx512",
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "omp_wait_policy": "passive",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789",
}
NAMES = ("keller_quintic", schedules_page.NAME, "polar_express_8_safety2e2", "deepseek_v4_10", "cans_5")
SMALL = {
    "momenta of training": study.spectra([gaussian(24, 24), gaussian(24, 24, seed=1)]),
    "Gaussian 1:4": study.spectra([gaussian(16, 64)]),
}


@pytest.fixture(scope="module")
def records():
    return [*study.ranges(SMALL, NAMES), *study.savings(SMALL), *study.noises(NAMES)]


@pytest.mark.parametrize("normalizer", study.NORMALIZERS)
def test_numbers_are_those_of_a_real_result(normalizer):
    G = gaussian(20, 50, dtype=torch.float64)
    X, info = sk.orthogonalize(G, normalizer=normalizer, return_info=True)
    one = schedules.schedule("polar_express")
    inputs = study.normalized(study.spectra([G]), normalizer)
    found = study.judged(one, inputs)
    s = torch.linalg.svdvals(X)
    rough = 0.02 if normalizer == "spectral" else 1e-3  # the norm there is an estimate; four digits are kept
    assert found["min"] == pytest.approx(float(s.min()), rel=rough)
    assert found["max"] == pytest.approx(float(s.max()), rel=rough)
    assert found["defect"] == pytest.approx(float(info.defect), rel=10 * rough)
    exact = sk.orthogonalize(G, method="svd")
    assert found["cosine"] == pytest.approx(float((X * exact).sum() / X.norm() / exact.norm()), rel=rough)
    assert float(inputs[0].max() * info.norm) == pytest.approx(float(torch.linalg.matrix_norm(G, 2)), rel=6e-3)


def test_defect_cosine_and_share_of_known_outputs():
    f = [torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)]
    assert study.defect(f) == pytest.approx(0.5**0.5) and study.cosine(f) == pytest.approx(0.5**0.5)
    one = schedules.schedule([(1.0, 0.0, 0.0)])  # the identity
    found = study.judged(one, [torch.tensor([0.4, 0.5, 1.0], dtype=torch.float64)])
    assert (found["below_half"], found["median"], found["values"]) == (0.3333, 0.5, 3)


def test_spectra_leave_out_what_is_rounding():
    (s,) = study.spectra([gaussian(40, 5) @ gaussian(5, 60, seed=1)])
    assert len(s) == 5 and float(s[0]) == 1
    assert study.spectra([torch.zeros(3, 4)]) == []


def test_momenta_are_moving_averages_with_nesterovs_look_ahead(monkeypatch):
    recorded = [[torch.full((2, 2), float(k + 1))] for k in range(3)]
    monkeypatch.setattr(study, "record", lambda model, steps, kept, batch: [step * 100 for step in recorded])
    gradients, momenta = study.in_training(16, 3)
    assert len(gradients) == len(momenta) == 12  # matrices of three blocks
    buffer = 0.05 * (0.95**2 * 1 + 0.95 * 2 + 3)
    assert float(gradients[0][0, 0]) == 3.0
    assert float(momenta[0][0, 0]) == pytest.approx(0.05 * 3 + 0.95 * buffer, rel=1e-6)


def test_a_training_gives_gradients(one_thread):
    gradients, momenta = study.in_training(16, 2)
    assert [g.shape for g in gradients] == [m.shape for m in momenta]
    assert all(float(g.norm()) > 0 and not torch.equal(g, m) for g, m in zip(gradients, momenta, strict=True))


def test_unsafe_schedules_are_refused_and_have_no_numbers(records):
    of = schedules_page.of
    (refused,) = of(records, "refused")
    assert refused["schedule"] == "cans_5" and "diverges" in refused["reasons"][0]
    assert not of(records, "range", schedule="cans_5")
    assert not any(r["safe"] for r in of(records, "noise", schedule="cans_5", dtype="bfloat16"))
    assert "`cans_5`: it diverges" in schedules_page.schedule_table(records)
    assert "cans_5" not in schedules_page.noise_table(records)


def test_fitted_lists_are_never_worse_and_more_steps_are_better(records):
    found = schedules_page.of(records, "saving")
    assert all(r["fitted"] <= r["defect"] and r["lower"] in study.LOWERS for r in found)
    for family in SMALL:
        for normalizer in study.NORMALIZERS:
            series = [r["fitted"] for r in schedules_page.of(found, "saving", family=family, normalizer=normalizer)]
            assert len(series) == len(study.STEPS)
            assert all(b <= a or b < 1e-13 for a, b in zip(series, series[1:], strict=False))


def test_steps_for_a_defect_are_interpolated():
    kept = {"table": "saving", "family": "a", "normalizer": "n"}
    records = [{**kept, "steps": k, "defect": 10.0**-k} for k in (3, 4, 5)]

    def steps(wanted):
        return schedules_page.steps_for(records, "a", "n", "defect", wanted)

    assert steps(1e-4) == pytest.approx(4) and steps(10**-4.5) == pytest.approx(4.5)
    assert steps(1.0) == 3.0 and steps(1e-9) is None


def test_noise_is_the_validators(records):
    (r,) = schedules_page.of(records, "noise", schedule="keller_quintic", dtype="bfloat16", method="standard")
    noise = schedules.validate("keller_quintic", dtype=torch.bfloat16).noise
    assert r["noise"] == pytest.approx(noise, rel=1e-3) and r["safe"] and r["restarts"] is None
    assert f"{noise:.3g}" in schedules_page.noise_table(records)


def test_report_writes_the_tables_and_finds_stale_ones(records, tmp_path, capsys):
    page, results = tmp_path / "orthogonalize.md", tmp_path / "results"
    results.mkdir()
    page.write_text("".join(f"<!-- table:{name} -->\nold\n<!-- /table -->\nkept\n" for name in schedules_page.TABLES))
    options = [str(page), "--results", str(results)]
    assert report.main(options) == 0 and page.read_text().count("Not measured yet.") == len(schedules_page.TABLES)
    path = results / schedules_page.FILE
    path.write_text(json.dumps(document(records, ENVIRONMENT)))
    assert report.main([*options, "--check"]) == 1 and "schedules_saving" in capsys.readouterr().out
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    text = page.read_text()
    assert "old" not in text and text.count("kept") == len(schedules_page.TABLES)
    keller = schedules_page.of(records, "range", schedule="keller_quintic", family="Gaussian 1:4")[1]
    assert f"| {schedules_page.size(keller['defect'])} |" in text and "commit 0123456789" in text
    assert report.main([str(page), str(tmp_path / "absent.md"), "--results", str(results), "--check"]) == 2


def test_the_command_writes_the_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "families", lambda: SMALL)
    for name in ("ranges", "noises"):
        call = getattr(study, name)
        given = (SMALL, NAMES) if name == "ranges" else (NAMES,)
        monkeypatch.setattr(study, name, lambda *_, call=call, given=given: call(*given))
    out = tmp_path / "results" / "schedules.json"
    assert study.main(["--out", str(out)]) == 0
    described, records = report.load(out)
    assert {"versions", "commit", "threads", "seconds"} <= described.keys() and str(tmp_path) not in out.read_text()
    assert schedules_page.noise_table(records) in capsys.readouterr().out


# -- the page and the committed file


@pytest.fixture(scope="module")
def committed():
    path = RESULTS / schedules_page.FILE
    if not path.is_file():
        pytest.skip("no schedules.json yet: run python -m benchmarks.schedules")
    return report.load(path)[1]


def test_tables_of_the_page_are_those_of_the_file(committed):
    text = PAGE.read_text(encoding="utf-8")
    assert {m["subject"] for m in report.MARKER.finditer(text)} == set(schedules_page.TABLES)
    assert report.stale(text, RESULTS) == []


def test_every_safe_list_is_in_the_file(committed):
    safe = {name for name in schedules.PUBLISHED if schedules.validate(name).safe}
    assert {r["schedule"] for r in schedules_page.of(committed, "range")} == safe
    assert {r["schedule"] for r in schedules_page.of(committed, "refused")} == schedules.PUBLISHED.keys() - safe


def test_what_the_pages_say_in_words_holds_in_the_file(committed):
    of = schedules_page.of
    momenta = of(committed, "range", family="momenta of training", normalizer="schatten4", steps=5)
    assert min(momenta, key=lambda r: r["below_half"])["schedule"] == schedules_page.NAME  # README.md

    def steps(family, normalizer, key):
        (first,) = of(committed, "saving", family=family, normalizer="frobenius", steps=5)
        return schedules_page.steps_for(committed, family, normalizer, key, first[key])

    families = list(dict.fromkeys(r["family"] for r in of(committed, "saving")))
    for family in families:
        for normalizer in ("schatten4", "spectral"):
            assert 4.5 < steps(family, normalizer, "defect") < 5.05  # one list for all: no step is saved
    for family in families:
        saved = 5 - steps(family, "spectral", "fitted")
        flat = family.startswith("Gaussian 1:1") or family.startswith("weights")
        assert 1 <= saved <= 2.05 if flat else abs(saved) < 0.3
