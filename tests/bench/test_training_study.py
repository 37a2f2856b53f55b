"""The comparison of whole trainings: its rivals, its search for a rate, resuming, table and picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import report, training_page
from benchmarks import training as study
from spectral_kernels.bench.training import task, train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "training.json"
CASE = study.Case("mlp", 16, 12, {"AdamW": 2**-7, "SGD": 2**-3, "Muon": 2**-6})
METHODS = ("AdamW", "SGD", "Muon")


# -- Muon


@pytest.mark.parametrize("shape", [(20, 20), (12, 40), (40, 12)])
def test_newton_schulz_sends_singular_values_near_one_and_keeps_the_vectors(shape):
    generator = torch.Generator().manual_seed(1)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    G = U @ torch.diag(torch.linspace(1, 0.05, min(shape), dtype=torch.float64)) @ Vh
    X = study.newton_schulz(G)
    inner = U.mT @ X @ Vh.mT
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-10
    assert 0.65 < inner.diagonal().min() < inner.diagonal().max() < 1.25
    torch.testing.assert_close(study.newton_schulz(1000 * G), X)
    assert not study.newton_schulz(torch.zeros(shape)).any()


def test_muon_steps_by_the_formula_and_leaves_the_rest_to_adamw():
    W = torch.nn.Parameter(torch.zeros(6, 3))
    optimizer = study.Muon([W], lr=0.1, momentum=0.5)
    gradients = [torch.randn(6, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected, M = torch.zeros(6, 3), torch.zeros(6, 3)
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        M = 0.5 * M + G
        expected = expected - 0.1 * 2**0.5 * study.newton_schulz(G + 0.5 * M)
        assert torch.equal(W.grad, G)
    torch.testing.assert_close(W.detach(), expected)
    for run, count in ((task("transformer", width=8, layers=2), 8), (task("mlp", width=8), 1)):
        pair = study.muon(run, 0.1, 0.01)
        muons, others = ([p for g in part.param_groups for p in g["params"]] for part in pair.parts)
        assert len(muons) == count and len(muons) + len(others) == len(list(run.model.parameters()))
        before = [p.detach().clone() for p in run.model.parameters()]
        train(run, pair, 1)
        moved = [not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)]
        assert all(moved)


# -- grids, schedule, resuming


def test_the_search_ends_with_both_neighbours_measured():
    seen = []

    def measure(lr):
        seen.append(lr)
        return abs(math.log2(lr) - 2.2)

    assert study.search(measure, 1.0) == 4 and sorted(seen) == [0.5, 1, 2, 4, 8]
    seen.clear()
    assert study.search(measure, 4.0) == 4 and sorted(seen) == [2, 4, 8]
    assert study.search(lambda lr: math.inf if lr > 1 else -lr, 8.0) == 1  # rates that diverge
    assert study.search(lambda lr: lr, 1.0, most=4) == 2**-3 and len(seen) == 3


def test_the_schedule_warms_up_and_ends_at_zero():
    factors = [study.schedule(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.2) and max(factors) == factors[4] == pytest.approx(0.96)
    assert factors[99] == pytest.approx(0.01) and factors[100] == 0
    assert all(a > b for a, b in zip(factors[4:], factors[5:], strict=False))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study's file."""
    path = tmp_path_factory.mktemp("training") / "results" / "training.json"
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "times", lambda case, rates: timed(case, rates, seconds=0.05))
    study.study(study.Results(path), (CASE,), METHODS)
    patch.undo()
    return path


timed = study.times


def test_every_run_is_recorded_once_and_finished_runs_are_kept(finished, monkeypatch):
    environment, records = report.load(finished)
    runs = [r for r in records if r["table"] == "run"]
    assert {"machine", "threads", "versions", "commit", "text"} <= environment.keys()
    for method in METHODS:
        mine = [r for r in runs if r["method"] == method]
        best = training_page.best_of(records, CASE.label, method)
        assert [r["seed"] for r in best] == list(study.SEEDS) and len(mine) >= 5
        assert best[0]["validation"] == min(r["validation"] for r in mine if r["seed"] == 0)
        assert len({r["validation"] for r in best}) == 3
    adam = training_page.best_of(records, CASE.label, "AdamW")[0]["lr"]
    assert {r["other"] for r in runs if r["method"] == "Muon"} == {adam}
    before = finished.read_text()
    monkeypatch.setattr(study, "trained", lambda *args: pytest.fail("a finished run was run again"))
    study.study(study.Results(finished), (CASE,), METHODS)
    assert finished.read_text() == before and before.count("\n") == len(records) + 1
    assert str(finished.parent) not in before


def test_a_cut_file_is_completed(finished, tmp_path, monkeypatch):
    path = tmp_path / "training.json"
    results = study.Results(finished)
    results.path, results.records = path, results.records[:3]
    results.add(results.records.pop())
    made = []
    trained = study.trained
    monkeypatch.setattr(study, "trained", lambda *args: made.append(args) or trained(*args))
    monkeypatch.setattr(study, "times", lambda case, rates: timed(case, rates, seconds=0.05))
    study.study(study.Results(path), (CASE,), METHODS)
    kept, again = report.load(finished)[1], report.load(path)[1]
    assert len(made) == len([r for r in kept if r["table"] == "run"]) - 3
    assert [r.get("validation") for r in again] == [r.get("validation") for r in kept]


def test_a_file_of_another_machine_is_refused(finished, tmp_path):
    path = tmp_path / "training.json"
    path.write_text(finished.read_text().replace('"machine": "', '"machine": "another-'))
    with pytest.raises(ValueError, match="machine another-"):
        study.Results(path)


def test_a_run_that_diverges_is_recorded_as_such():
    record = study.trained(CASE, "SGD", 1e9, 0, 0.0)
    assert record["validation"] is None and study.loss_of(record) == math.inf
    json.dumps(record, allow_nan=False)
    lost = [record, {"table": "times", "case": CASE.label, "methods": {}}]
    assert training_page.best_of(lost, CASE.label, "SGD") == []
    assert "| none | not finite |" in training_page.table(study.environment.describe(), lost)


def test_times_leave_the_models_as_they_are(monkeypatch):
    taken = []
    monkeypatch.setattr(study, "interleave", lambda calls, seconds: taken.append(calls) or {m: [2.0] for m in calls})
    run = task("mlp", width=16)
    monkeypatch.setattr(study, "task", lambda *args, **options: run)
    record = study.times(CASE, {"AdamW": 0.01, "SGD": 0.1})
    assert record["methods"]["SGD"]["whole"]["median"] == 1.0
    before = [p.detach().clone() for p in run.model.parameters()]
    for calls in taken:
        for call in calls.values():
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


# -- table and picture


def test_the_page_and_the_picture_are_made_from_the_file(finished, tmp_path):
    _, records = report.load(finished)
    text = training_page.render("above\n<!-- study:training -->\nold\n<!-- /study -->\nbelow\n", finished)
    assert text.startswith("above") and text.endswith("below\n") and "old" not in text
    assert training_page.render(text, finished) == text
    losses = [float(row.split("|")[4].split("(")[0]) for row in text.splitlines() if row.startswith("| mlp 16")]
    assert len(losses) == 3 and losses == sorted(losses)
    best = training_page.best_of(records, CASE.label, "Muon")[0]
    assert f"{best['lr']:.2g}: {best['validation']:.3f}" in text
    with pytest.raises(ValueError, match="study:training"):
        training_page.render("no markers", finished)
    picture = tmp_path / "training.png"
    training_page.draw(records, CASE.label, picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_the_command_writes_file_picture_and_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "CASES", (CASE,))
    monkeypatch.setattr(study, "METHODS", {name: study.METHODS[name] for name in ("AdamW", "SGD")})
    monkeypatch.setattr(study, "times", lambda case, rates: timed(case, rates, seconds=0.05))
    out, picture, page = tmp_path / "results" / "training.json", tmp_path / "p" / "a.png", tmp_path / "page.md"
    page.write_text("<!-- study:training -->\n<!-- /study -->\n")
    assert study.main(["--out", str(out), "--plot", str(picture), "--docs", str(page)]) == 0
    assert training_page.render(page.read_text(), out) == page.read_text() and picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "mlp 16, AdamW, lr 0.0078125" in printed and "| SGD, momentum 0.9 |" in printed


def test_the_readme_has_the_table_of_the_committed_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if not RESULT.is_file() or not training_page.MARKER.search(readme):
        pytest.skip(f"{RESULT.name} is not there yet: run python -m benchmarks.training")
    assert training_page.render(readme, RESULT) == readme
