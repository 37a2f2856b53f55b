"""Rows C9 and C10: the oracle, what its check rejects, operations counted, rivals that are absent or inaccurate."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch

import spectral_kernels as sk
from benchmarks import report
from spectral_kernels.bench import cases_orthogonal as cases
from spectral_kernels.bench import measure, rivals_orthogonal
from spectral_kernels.bench.cases import gaussian
from spectral_kernels.bench.rivals import Tuned
from spectral_kernels.ops import schedules

CEILING = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}
ONE = schedules.schedule("polar_express")


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 8, 8), (1, 7)])
def test_the_oracle_is_the_polynomial_of_the_singular_values(shape):
    G = gaussian(*shape)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    f = torch.from_numpy(ONE((S / S.norm(dim=-1, keepdim=True)).numpy()))
    torch.testing.assert_close(cases.oracle(G, ONE), (U * f[..., None, :]) @ Vh, rtol=0, atol=1e-12)


def test_the_oracle_keeps_zero_singular_values():
    G = gaussian(20, 3) @ gaussian(3, 40, seed=1)
    s = torch.linalg.svdvals(cases.oracle(G, ONE))
    assert (s[:3] > 0.5).all() and s[3:].max() < 1e-4  # 1e-4: float32 rounding of G, lifted by the schedule
    assert cases.oracle(torch.zeros(4, 5), ONE).abs().max() == 0


def test_direction_error_is_that_of_the_worst_matrix():
    truth = gaussian(3, 5, 7).double()
    wrong = truth.clone()
    wrong[1] *= 1.5
    assert cases.direction_error(wrong, truth) == pytest.approx(0.5)
    assert cases.direction_error(truth.mT, truth) == math.inf
    assert cases.direction_error(truth * math.nan, truth) == math.inf
    assert cases.direction_error(None, truth) == math.inf


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32), (3, 16, 40)])
def test_providers_are_right_and_other_results_are_rejected(shape):
    G = gaussian(*shape)
    p = cases.orthogonalize_problem(G)
    for call in (p.ours, p.rivals[cases.PLAIN]):
        assert p.check("ours", call()) <= p.limit
    right = p.ours()
    others = (
        right * (1 + 2 * p.limit),
        sk.orthogonalize(G, "keller_quintic", normalizer="frobenius"),
        sk.orthogonalize(G, normalizer="schatten4"),
        sk.orthogonalize(G, method="svd"),
        right.bfloat16().float(),
    )
    for wrong in others:
        assert p.check("ours", wrong) > p.limit


def test_operations_are_counted_as_they_are_done():
    for shape in ((24, 96), (96, 24), (2, 16, 40)):
        G = gaussian(*shape)
        *copies, m, n = shape
        counted = rivals_orthogonal.flops_of(lambda G=G: rivals_orthogonal.newton_schulz(G, ONE.steps))
        assert counted == rivals_orthogonal.products(m, n, 5, copies[0] if copies else 1)
    A = torch.zeros(3, 5)
    assert rivals_orthogonal.flops_of(lambda: A.addmm_(torch.ones(3, 4), torch.ones(4, 5))) == 2 * 3 * 4 * 5
    p = cases.orthogonalize_problem(gaussian(64, 512))
    assert 0 < p.work["ours"] < p.work[cases.PLAIN]  # in Gram space
    (record,) = measure.measure(
        cases.Case("C10", "a", lambda: p, {cases.PLAIN: cases.WIDE}), p, seconds=0, ceiling=CEILING
    )
    assert record["status"] == "ok" and record["flops"] == p.flops and record["rival_flops"] == p.work[cases.PLAIN]
    seconds = record["rival_seconds"]["median"]
    assert record["rival_share_of_ceiling"] == pytest.approx(p.work[cases.PLAIN] / seconds / 1e11, rel=1e-2)


def test_rivals_that_are_not_installed_are_no_win(monkeypatch):
    monkeypatch.setattr(rivals_orthogonal, "installed", lambda name: None)
    names = (cases.PYTORCH_OPTIMIZER, cases.HEAVYBALL, cases.GRAM)
    p = cases.orthogonalize_problem(gaussian(8, 16), names)
    assert set(p.missing) == set(names) and not p.rivals
    case = cases.Case("C10", "a", lambda: p, {name: cases.Goal() for name in names})
    records = measure.measure(case, p, seconds=0, ceiling=CEILING)
    assert [r["status"] for r in records] == ["no rival"] * 3
    assert all("is not installed" in r["reason"] and "value" not in r for r in records)


def test_a_compilation_that_fails_is_reported(monkeypatch):
    def compile_(call, dynamic):
        def fail(*arguments):
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    assert rivals_orthogonal.compiled(gaussian(4, 4), ONE.steps) == Tuned(
        None, "torch.compile fails here: RuntimeError"
    )


def test_a_half_precision_rival_is_held_to_its_own_coefficients(monkeypatch):
    """As heavyball's: bfloat16, and coefficients that cannot be chosen."""
    theirs = schedules.schedule("youjiacheng_5").steps
    fake = types.SimpleNamespace(
        compile_mode="max-autotune",
        zeropower_via_newtonschulz5=lambda G: rivals_orthogonal.newton_schulz(G.bfloat16(), theirs).float(),
    )
    monkeypatch.setattr(rivals_orthogonal, "installed", lambda name: fake)
    p = cases.orthogonalize_problem(gaussian(16, 64), (cases.HEAVYBALL,))
    error = p.check(cases.HEAVYBALL, p.rivals[cases.HEAVYBALL]())
    assert p.limit < error <= p.allowed(cases.HEAVYBALL)
    assert p.check(cases.HEAVYBALL, p.ours()) > p.allowed(cases.HEAVYBALL)  # right for others, wrong for these
    setting = p.settings[cases.HEAVYBALL]
    assert "bf16" in setting and "youjiacheng_5, compiled, error" in setting and fake.compile_mode == "default"


def test_gram_newton_schulz_is_asked_without_kernels(monkeypatch):
    given = {}

    def make(**options):
        given.update(options)
        return lambda G: rivals_orthogonal.newton_schulz(G.half().float(), ONE.steps)

    monkeypatch.setattr(rivals_orthogonal, "installed", lambda name: types.SimpleNamespace(GramNewtonSchulz=make))
    p = cases.orthogonalize_problem(gaussian(16, 64), (cases.GRAM,))
    assert given["ns_use_kernels"] is False and given["ns_coefficients"] == [list(t) for t in ONE.steps]
    assert p.check(cases.GRAM, p.rivals[cases.GRAM]()) <= p.allowed(cases.GRAM)


def test_the_faster_of_two_accurate_forms_is_taken(monkeypatch):
    G = gaussian(8, 24)
    values = {"slow": 1.0, "fast": 1.0}

    class Clock:
        def now(self):
            return 0.0

        def sample(self, call, number):
            return {"slow": 2.0, "fast": 1.0}[call()]

    fake = types.SimpleNamespace(
        zero_power_via_newton_schulz_5=lambda G, **options: "slow",
        zero_power_via_gram_newton_schulz=lambda G, **options: "fast",
    )
    monkeypatch.setattr(rivals_orthogonal, "installed", lambda name: fake)

    def tuned(accurate):
        return rivals_orthogonal.pytorch_optimizer(G, ONE.steps, accurate, Clock())

    assert tuned(lambda X: X in values).setting == "its Gram form, fp32"
    assert tuned(lambda X: X == "slow").setting == "its standard form, fp32"
    assert tuned(lambda X: False).call is None


def test_a_muon_step_is_held_to_the_oracle_of_its_momentum():
    p = cases.muon_problem(64)
    assert p.check("ours", None) <= p.limit < p.check(cases.MUON, None) <= p.allowed(cases.MUON)
    assert "error" in p.settings[cases.MUON] and p.work["ours"] > 0
    assert "oneDNN off" in cases.muon_problem(64, off=True).settings[cases.MUON]
    recorded, gradients = cases.recorded_block(64)
    assert [tuple(x.shape) for x in recorded.parameters()] == [(192, 64), (64, 64), (256, 64), (64, 256)]
    parameters = list(cases.holding(list(recorded.parameters())).parameters())
    other = sk.optim.Muon(parameters, lr=0.02, weight_decay=0.0, schedule="polar_express")
    assert cases.step_error(cases.Replay(other, parameters, gradients)) > p.limit
    scaled = sk.optim.Muon(parameters, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    assert cases.step_error(cases.Replay(scaled, parameters, gradients)) > p.limit


def test_onednn_is_off_for_the_rival_alone():
    before = torch.backends.mkldnn.enabled
    with cases.without_onednn(True):
        assert not torch.backends.mkldnn.enabled
    with cases.without_onednn(False):
        assert torch.backends.mkldnn.enabled == before
    assert torch.backends.mkldnn.enabled == before


def test_cases_cover_both_aspects_and_have_their_targets():
    listed = cases.orthogonalize_cases()
    assert len({c.name for c in listed}) == len(listed) and {c.row for c in listed} == {"C10"}
    targets = {c.name: c.goals[cases.PLAIN].target for c in listed}
    for n in (64, 128, 256, 512, 1024, 2048):
        assert targets[f"Gaussian {n}×{4 * n} fp32"] == 1.3 and targets[f"Gaussian {n}×{n} fp32"] == 1.0
    assert targets["Gaussian 64×64×256 fp32"] == 1.3
    named = {name for c in listed for name in c.goals}
    assert named == {cases.PLAIN, cases.COMPILED, cases.PYTORCH_OPTIMIZER, cases.HEAVYBALL, cases.GRAM}
    assert [c.goals[cases.MUON].target for c in cases.muon_cases()] == [50, None, None]
    assert all(c.subject == "orthogonalize" for c in (*listed, *cases.muon_cases()))


def test_the_table_has_operations_in_place_of_reads(tmp_path):
    p = cases.orthogonalize_problem(gaussian(64, 256))
    goals = {cases.PLAIN: cases.WIDE, cases.HEAVYBALL: cases.Goal()}
    records = measure.measure(cases.Case("C10", "a", lambda: p, goals), p, seconds=0, ceiling=CEILING)
    environment = {"machine": "m", "cores": 2, "processor": "p", "threads": 2, "omp_wait_policy": "passive"}
    environment |= {"versions": {"torch": "2.13.0"}, "commit": "0123456789"}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "orthogonalize.json").write_text(json.dumps(measure.document(records, environment)))
    text = report.tables("orthogonalize", tmp_path)
    assert report.WORK in text and "| reads |" not in text
    row = next(line for line in text.splitlines() if "| C10 | a | plain torch" in line)
    ours, theirs = row.split("|")[-2].split(";")
    assert ours.strip().startswith("0.0131,") and theirs.strip().startswith("0.0236,") and row.count("%") == 2
    assert "no rival: no such provider" in text
