"""The study of row C8: its statistics on hand-made numbers, its rival against SVDs, its page, and a quick run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectral_kernels.bench import tracking, tracking_page
from spectral_kernels.bench.tracking import Run, Trace, WarmPower, matrices_of, observed, shortfall, spread_of, summary
from spectral_kernels.bench.training import Spikes, groups, task

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tracking.md"
RESULT = ROOT / "benchmarks" / "results" / "tracking.json"
try:
    from spectral_kernels.optim import SpectralOptimizer  # noqa: F401
except ImportError as error:
    NO_OPTIMIZER = f"SpectralOptimizer cannot be imported: {error}"
else:
    NO_OPTIMIZER = ""


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hand_made(steps: int = 103) -> Trace:
    """Two matrices of norm 2: three bad steps, then errors of 1 % at one sample in 50 and 0.1 % else."""
    truth = torch.full((steps, 2), 2.0, dtype=torch.float64)
    sigma, reads = truth * 0.999, torch.ones_like(truth)
    sigma[:3] = truth[:3] * 0.5
    sigma[3::50, 0] = 2 * 0.99
    sigma[10, 1] = 2 * 1.001  # too high
    reads[0] = 8
    reads[5:15] = 2
    upper = truth * 1.25
    upper[20, 0] = 1.9
    return Trace(truth, sigma, reads, upper, truth * 0.75)


# -- statistics


def test_the_summary_counts_what_the_steps_were():
    row = summary(hand_made())
    errors = row["errors"]
    assert row["matrices"] == 2 and row["samples"] == 200
    assert (errors["p50"], errors["p90"], errors["p99"]) == pytest.approx((1e-3, 1e-3, 1e-2))
    assert errors["worst"] == pytest.approx(1e-2) and errors["above"] == pytest.approx(1e-3)
    assert errors["mean"] == pytest.approx((2 * 1e-2 + 198 * 1e-3) / 200)
    assert row["above"] == pytest.approx(1e-3)
    assert row["power"] == pytest.approx(dict.fromkeys(("mean", "p50", "p90", "p99", "worst"), 0.25) | {"above": 0.0})
    assert row["reads"] == pytest.approx(1.1) and row["again"] == pytest.approx(0.1)
    assert [f["worst"] for f in row["first"]] == [0.5] * 3 and [f["reads"] for f in row["first"]] == [8, 1, 1]
    assert row["bound"]["wrong"] == 1 and row["bound"]["mean"] == pytest.approx(0.25 - 0.3 / 206, rel=1e-3)


def test_first_steps_do_not_enter_the_steady_statistics():
    trace = hand_made()
    for x in (trace.sigma, trace.power):
        x[: tracking.UNSTEADY] = 0.0
    assert summary(trace)["errors"]["worst"] == pytest.approx(1e-2)
    assert summary(trace)["first"][0] == {"worst": 1.0, "mean": 1.0, "reads": 8.0}


def test_percentiles_are_errors_that_occurred():
    errors = torch.arange(100, dtype=torch.float64)
    found = spread_of(errors[torch.randperm(100)])
    assert [found[key] for key in ("p50", "p90", "p99", "worst")] == [50, 90, 99, 99] and found["above"] == 0
    assert spread_of(-errors)["above"] == 99 and spread_of(doubles(0.3))["p50"] == 0.3


def test_shortfalls_of_zero_matrices_and_of_values_that_are_not_finite():
    truth = doubles(2, 2, 0, 0, 2, 2)
    sigma = doubles(1, 3, 0, 1, torch.nan, torch.inf)
    assert shortfall(sigma, truth).tolist() == [0.5, -0.5, 0.0, -torch.inf, torch.inf, torch.inf]
    trace = hand_made()
    trace.sigma[7, 0] = torch.nan
    row = summary(trace) | {"momentum": 0.95}
    assert row["errors"]["worst"] is None and "worst not finite > 0.01" in tracking.misses(row)
    json.dumps(row, allow_nan=False)


def test_mean_reads_weigh_runs_by_their_samples():
    row = {"momentum": 0.95, "block": 4}
    rows = [row | {"reads": 1.0, "samples": 300}, row | {"reads": 2.0, "samples": 100}]
    found = tracking_page.mean_reads([*rows, {"momentum": 0.0, "block": 4, "reads": 2.0, "samples": 5}])
    assert found == {(0.95, 4): 1.25, (0.0, 4): 2.0}


def test_misses_names_every_limit():
    good = summary(hand_made()) | {"momentum": 0.95, "above": 0.0}
    good["errors"] |= {"p99": 1e-3, "worst": 9e-3}
    good["first"], good["bound"] = [{"worst": 5e-3}], {"wrong": 0}
    assert tracking.misses(good) == []
    assert tracking.misses(good | {"reads": 1.9}) == ["reads 1.9 > 1.7"]
    assert tracking.misses(good | {"reads": 1.9, "momentum": 0.0}) == []
    assert tracking.misses(good | {"first": [{"worst": 0.02}]}) == ["first step 0.02 > 0.01"]
    assert tracking.misses(good | {"above": 1e-3}) == ["above 0.001 > 2e-06"]
    assert tracking.misses(good | {"bound": {"wrong": 2}}) == ["wrong upper bounds 2 > 0"]
    assert len(tracking.misses(good | {"errors": good["errors"] | {"p99": 0.1, "worst": 0.1}})) == 2


# -- the rival


def test_one_power_step_is_the_half_step_quotient_and_many_find_the_norm():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 20, 12, generator=generator, dtype=torch.float64)
    exact = torch.linalg.matrix_norm(X, 2)
    power = WarmPower()
    first = power("w", X)
    v = WarmPower()  # the same start
    v("w", torch.eye(20, 12, dtype=torch.float64).expand(3, 20, 12))
    start = v.vectors["w"] / torch.linalg.vector_norm(v.vectors["w"], dim=1, keepdim=True)
    y = X @ start
    expected = torch.linalg.vector_norm(X.mT @ y, dim=(1, 2)) / torch.linalg.vector_norm(y, dim=(1, 2))
    torch.testing.assert_close(first, expected)
    assert (first < exact).all() and (first > 0.4 * exact).all()
    values = [first, *(power("w", X) for _ in range(300))]
    assert all((b >= a * (1 - 1e-12)).all() for a, b in zip(values, values[1:], strict=False))  # never falls
    torch.testing.assert_close(values[-1], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(power("w", 3 * X), 3 * exact, rtol=1e-6, atol=0)  # started warm


def test_the_rival_survives_a_zero_matrix_and_starts_apart_for_each_name():
    power = WarmPower()
    X = torch.ones(2, 4, 3)
    X[0] = 0
    assert power("a", X).tolist() == pytest.approx([0, 12**0.5])
    assert torch.isfinite(power.vectors["a"]).all() and power("a", X.flip(0))[0] == pytest.approx(12**0.5)
    power("b", X)
    power("c", X)
    assert not torch.equal(power.vectors["b"][0], power.vectors["c"][0])


# -- the adapter


def test_matrices_of_gradients_and_momenta():
    assert matrices_of(torch.ones(3, 4), "matrix").shape == (1, 3, 4)
    assert matrices_of(torch.ones(2, 3, 4), "matrix").shape == (2, 3, 4)
    G = torch.arange(4 * 3 * 2 * 2.0).view(4, 3, 2, 2)
    X = matrices_of(G, "conv")
    assert X.shape == (4, 4, 3) and torch.equal(X[0], G[:, :, 0, 0]) and torch.equal(X[1], G[:, :, 0, 1])
    assert torch.equal(matrices_of(X, "conv"), X)
    grouped = matrices_of(G, "conv", groups=2)
    assert grouped.shape == (8, 2, 3) and torch.equal(grouped[0], G[:2, :, 0, 0])
    assert torch.equal(grouped[1], G[2:, :, 0, 0])


class Told(torch.optim.SGD):
    """SGD that tells of its last step what `SpectralOptimizer` tells, exact norms times `factor`."""

    factor = 1.0

    def last_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if group["kind"] not in ("matrix", "conv"):
                    yield p, None
                else:
                    buffer = self.state[p].get("momentum_buffer")
                    X = matrices_of(p.grad if buffer is None else buffer, group["kind"])
                    sigma = torch.linalg.matrix_norm(X.double(), 2)
                    reads = torch.ones(len(X))
                    yield p, SimpleNamespace(sigma=self.factor * sigma, upper=1.5 * sigma, reads=reads, error=sigma)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_following_a_run_compares_every_matrix_of_every_step(momentum):
    run = task("convnet", width=4)
    optimizer = Told(groups(run.model), lr=0.01, momentum=momentum)
    optimizer.factor = 0.75
    trace, losses = tracking.follow(run, optimizer, 5, spikes=Spikes(3, 40.0))
    assert len(losses) == 5 and trace.exact.shape == (5, 3 * 9 + 1)
    torch.testing.assert_close(shortfall(trace.sigma, trace.exact), torch.full_like(trace.exact, 0.25))
    torch.testing.assert_close(trace.upper, 1.5 * trace.exact)
    assert (trace.reads == 1).all() and (shortfall(trace.power, trace.exact) > -1e-5).all()
    assert (trace.exact[2] > 3 * trace.exact[1]).any()  # the spike
    names = {p: name for name, p in run.model.named_parameters()}
    assert {o.name for o in observed(optimizer, names)} == {name for name, _ in run.matrices()}


def test_an_optimizer_that_leaves_a_matrix_out_is_refused(monkeypatch):
    run = task("mlp", width=8)
    optimizer = Told(groups(run.model), lr=0.01, momentum=0.9)
    told = optimizer.last_step
    monkeypatch.setattr(optimizer, "last_step", lambda: list(told())[1:])
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        tracking.follow(run, optimizer, 1)


# -- result and page


@pytest.fixture
def stand_in(monkeypatch):
    def build(model, run, momentum, block):
        optimizer = Told(groups(model), lr=run.lr, momentum=momentum)
        optimizer.factor = 0.5 if block == 8 else 1.0
        return optimizer

    monkeypatch.setattr(tracking, "optimizer_for", build)
    monkeypatch.setattr(tracking, "QUICK", (Run("mlp", 8, 6, 0.01), Run("mlp", 8, 6, 0.01, Spikes(5, 3.0))))


def test_the_page_is_rendered_from_the_result(stand_in, tmp_path):
    result = tracking.study(tracking.QUICK, (0.95,), (4, 8))
    assert [row["missed"] == [] for row in result["rows"]] == [True, False, True, False]
    assert {row["run"] for row in result["rows"]} == {"mlp 8", "mlp 8, spikes of 3 × the norm"}
    page = tmp_path / "page.md"
    page.write_text(f"above\n{tracking_page.BEGIN}\nold\n{tracking_page.END}\nbelow\n")
    tracking_page.write_table(page, result)
    text = page.read_text()
    assert text.startswith("above") and text.endswith("below\n") and "old" not in text
    assert text.count("| mlp 8 |") == 2 and "- mlp 8, momentum 0.95, block 8: p99 0.5 > 0.002, worst 0.5" in text
    tracking_page.write_table(page, json.loads(json.dumps(result, allow_nan=False)))
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="table:tracking"):
        tracking_page.write_table(page, result)
    assert "Mean reads over all runs: 1.00 (momentum 0.95, block 4), 1.00 (momentum 0.95, block 8)." in text
    assert "Every limit is met." in tracking_page.markdown(result | {"rows": result["rows"][:1]})


def test_the_command_writes_file_and_page(stand_in, tmp_path, capsys):
    page, out = tmp_path / "page.md", tmp_path / "results" / "tracking.json"
    page.write_text(f"{tracking_page.BEGIN}\n{tracking_page.END}\n")
    assert tracking.main(["--quick", "--out", str(out), "--docs", str(page)]) == 0
    result = json.loads(out.read_text())
    assert [(row["momentum"], row["block"]) for row in result["rows"]] == [(0.95, 4), (0.0, 4)] * 2
    assert tracking_page.markdown(result) in page.read_text() and str(tmp_path) not in out.read_text()
    assert "0 of 4 runs miss a limit" in capsys.readouterr().out


@pytest.mark.skipif(bool(NO_OPTIMIZER), reason=NO_OPTIMIZER)
def test_quick_end_to_end(tmp_path):
    out = tmp_path / "tracking.json"
    tracking.main(["--quick", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * len(tracking.QUICK)
    for row in rows:
        missed = [
            miss for miss in tracking.misses(row) if not miss.startswith("reads")
        ]  # few, small matrices read more
        assert missed == [], (row["run"], row["momentum"])
        assert row["power"]["worst"] > 5 * row["errors"]["worst"] and row["losses"][1] < row["losses"][0]
        assert row["again"] - 1e-3 <= row["reads"] - 1 <= 2 * row["again"] + 1e-3  # at most three


# -- the committed result


@pytest.fixture
def committed():
    if not RESULT.is_file():
        pytest.skip(f"{RESULT.name} is not there yet: run python -m spectral_kernels.bench.tracking")
    return json.loads(RESULT.read_text())


def test_the_table_of_the_page_is_that_of_the_result_file(committed):
    assert f"{tracking_page.BEGIN}\n{tracking_page.markdown(committed)}\n{tracking_page.END}" in PAGE.read_text(
        encoding="utf-8"
    )


def test_the_committed_study_is_the_full_one(committed):
    wanted = [(r.label, m, b) for r in tracking.RUNS for m in tracking.MOMENTA for b in tracking.BLOCKS]
    assert [(row["run"], row["momentum"], row["block"]) for row in committed["rows"]] == wanted
    assert all(row["missed"] == tracking.misses(row) for row in committed["rows"])
