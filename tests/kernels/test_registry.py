"""Which kernel serves which word: order, refusals in words, force, the environment variable."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels import (
    composites,
    composites_step,
    contracts_products,
    reference,
    reference_clip,
    reference_products,
    reference_step,
    registry,
)
from spectral_kernels.ops.estimate import oriented
from tests.kernels.lists import DTYPES, kernel


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in (registry.ENVIRONMENT, "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)


def test_every_word_has_a_reference_or_a_default():
    rows = registry.table()
    assert set(rows) == {*registry.WORDS, *registry.SHORT_CUTS}
    served_by = dict.fromkeys(("gram_matvec", "rayleigh_ritz_"), reference) | dict.fromkeys(
        ("momentum_gram_matvec_", "momentum_norms_", "apply_update_", "next_block_"), reference_step
    )
    served_by["clip_"] = reference_clip
    served_by |= dict.fromkeys(contracts_products.WORDS[:-1], reference_products)
    for word, module in served_by.items():
        assert rows[word]["reference"].fn is getattr(module, word)
    assert set(registry.WORDS) == {*served_by, *registry.COMPOSITES}
    for word, (default, reader) in registry.COMPOSITES.items():
        assert callable(default) and reader in served_by and "reference" not in rows[word]
    for word, row in rows.items():
        for backend, entry in row.items():
            assert (entry.word, entry.backend) == (word, backend)
            assert callable(entry.fn) and callable(entry.supports)
            assert backend in registry.BACKENDS


@pytest.mark.parametrize("word", [word for word in registry.WORDS if word not in contracts_products.WORDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_kernels_come_first_on_the_cpu(word, dtype):
    kernel("gram_matvec", "cpu", "cpu", dtype, 4)
    choice = registry.choose(word, "cpu", dtype, 4)
    assert choice.backend == "cpu" and choice.word == word
    own = registry.table()[word].get("cpu")
    if own is None:  # a default over native words
        assert choice.fn.func is registry.COMPOSITES[word][0]
        assert choice.declined == (("cpu", f"has no {word} kernel"), ("reference", f"has no {word} kernel"))
    else:
        assert choice.fn is own.fn and choice.declined == ()


def test_an_unserved_width_goes_down_the_order_with_a_reason():
    kernel("gram_matvec", "cpu", "cpu", torch.float32, 4)
    choice = registry.choose("gram_matvec", "cpu", torch.float32, 129)
    assert choice.backend == "reference" and choice.fn is reference.gram_matvec
    assert choice.declined == (("cpu", "serves blocks of 1 to 128 columns, not 129"),)
    whole = registry.choose("block_krylov", "cpu", torch.float32, 129)
    assert whole.backend == "reference"
    assert ("cpu", "serves blocks of 1 to 128 columns, not 129") in whole.declined


def test_other_devices_fall_to_the_reference():
    choice = registry.choose("gram_matvec", "mps", torch.float32, 4)
    assert choice.backend == "reference"


def test_the_default_composite_runs_over_the_words_of_its_backend():
    with sk.force("reference"):
        choice = registry.choose("block_krylov", "cpu", torch.float32, 4)
        assert choice.backend == "reference" and choice.fn.func is composites.block_krylov
        words = choice.fn.args[0]
        assert words.gram_matvec is reference.gram_matvec and words.rayleigh_ritz_ is reference.rayleigh_ritz_
        step = registry.choose("tracked_step_", "cpu", torch.bfloat16, 8)
        assert step.backend == "reference" and step.fn.func is composites_step.tracked_step_
        for word in ("momentum_gram_matvec_", "momentum_norms_", "apply_update_", "next_block_"):
            assert getattr(step.fn.args[0], word) is getattr(reference_step, word)
        assert step.fn.args[0].gram_matvec is reference.gram_matvec
        clipped = registry.choose("clipped_step_", "cpu", torch.float32, 80)
        assert clipped.backend == "reference" and clipped.fn.func is composites_step.clipped_step_
        assert clipped.fn.args[0].clip_ is reference_clip.clip_
        with pytest.raises(AttributeError):
            words.orthogonalize  # noqa: B018


def test_force_insists_and_gives_back():
    kernel("gram_matvec", "cpu", "cpu", torch.float32, 4)
    before = registry.forced()
    with sk.force("reference"):
        assert registry.forced() == "reference"
        assert registry.choose("gram_matvec", "cpu", torch.float32, 4).backend == "reference"
        with sk.force("cpu"):
            assert registry.choose("gram_matvec", "cpu", torch.float32, 4).backend == "cpu"
            with sk.force("reference"):
                assert registry.words("cpu", torch.float32, 4).gram_matvec is reference.gram_matvec
        assert registry.forced() == "reference"
        with pytest.raises(ZeroDivisionError), sk.force("cpu"):
            raise ZeroDivisionError
        assert registry.forced() == "reference"
    assert registry.forced() == before


def test_force_reaches_the_kernels(monkeypatch):
    """Under force the other backend's kernels are not called, short cut included."""
    kernel("krylov_norm", "cpu", "cpu", torch.float32, 4)
    calls = []
    monkeypatch.setattr(
        torch.ops.spectral_kernels.krylov_norm, "default", lambda *args: calls.append(args) or torch.ones(())
    )
    assert sk.spectral_norm(torch.eye(3)) == 1 and len(calls) == 1
    with sk.force("reference"):
        assert float(sk.spectral_norm(5 * torch.eye(3))) == pytest.approx(5)
    assert len(calls) == 1
    with sk.force("cpu"):
        sk.spectral_norm(torch.eye(3))
    assert len(calls) == 2


def test_force_belongs_to_its_thread():
    seen = []
    with sk.force("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.forced()))
        thread.start()
        thread.join()
    assert seen == [registry._forced.get()]


@pytest.mark.parametrize("name", ["fpga", "", "CPU", "torch"])
def test_unknown_backends(name):
    with pytest.raises(ValueError, match=rf"unknown backend {name!r}: expected one of cuda, triton, cpu, reference"):
        with sk.force(name):
            pass


@pytest.mark.parametrize("call", [sk.spectral_norm, sk.singular_triplet, sk.stable_rank, sk.spectral_norm_])
def test_a_backend_that_cannot_serve_says_why(call):
    with sk.force("cuda"), pytest.raises(sk.BackendUnavailable, match="no backend serves .* cuda: has no .* kernel"):
        call(torch.randn(3, 4))


def test_triton_on_cpu_tensors_says_why():
    """In a process without the interpreter."""
    code = (
        "import torch, spectral_kernels as sk\n"
        "try:\n"
        "    with sk.force('triton'): sk.spectral_norm(torch.randn(3, 4))\n"
        "except sk.BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "no backend serves gram_matvec for torch.float32 on cpu: triton: " in done.stdout
    assert "CPU tensors need TRITON_INTERPRET=1" in done.stdout or "triton is not installed" in done.stdout


def test_the_environment_insists():
    code = (
        "import torch, spectral_kernels as sk\n"
        "from spectral_kernels.kernels import registry\n"
        "print(registry.choose('gram_matvec', 'cpu', torch.float32, 4).backend)\n"
        "print(float(sk.spectral_norm(torch.eye(3) * 3)))\n"
        "with sk.force('cpu'): print(registry.forced())\n"
    )
    done = run(code, **{registry.ENVIRONMENT: "reference"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference", "3.0", "cpu"]
    bad = run(code, **{registry.ENVIRONMENT: "fpga"})
    assert bad.returncode != 0 and "unknown backend 'fpga': expected one of cuda, triton, cpu, reference" in bad.stderr


def test_without_the_native_library_the_reference_serves(monkeypatch):
    from spectral_kernels.kernels import cpu

    monkeypatch.setattr(cpu, "load", lambda: "the native library is not built")
    registry._choose.cache_clear()
    registry._short_cut.cache_clear()
    registry._words.cache_clear()
    try:
        choice = registry.choose("gram_matvec", "cpu", torch.float32, 4)
        assert choice.backend == "reference" and choice.declined == (("cpu", "the native library is not built"),)
        assert registry.short_cut("krylov_norm", "block_krylov", "cpu", torch.float32, 4) is None
        A = torch.randn(150, 130)
        assert float(sk.spectral_norm(A)) == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-3)
        with sk.force("cpu"), pytest.raises(sk.BackendUnavailable, match="cpu: the native library is not built"):
            sk.spectral_norm(A)
    finally:
        registry._choose.cache_clear()
        registry._short_cut.cache_clear()
        registry._words.cache_clear()


# Shapes on both sides of every threshold of `oriented`: short side 128, long side 16 times the short one.
THRESHOLDS = [
    (s, t)
    for short, longs in ((127, (127, 128, 200)), (128, (128, 129, 2047, 2048, 2049)), (129, (2064, 2065)), (40, (300,)))
    for long in longs
    for s, t in {(short, long), (long, short)}
]


def layouts(A: torch.Tensor) -> list[torch.Tensor]:
    """Both orders of memory, padded rows, no unit stride."""
    wide = torch.zeros(A.shape[0], A.shape[1] + 3)
    wide[:, : A.shape[1]] = A
    return [A.contiguous(), A.mT.contiguous().mT, wide[:, : A.shape[1]], A.repeat_interleave(2, 1)[:, ::2]]


@pytest.mark.parametrize("shape", [*THRESHOLDS, (1, 300), (300, 1)])
def test_python_and_native_orientation_agree(shape):
    """krylov_norm orients by itself, block_krylov is given what Python oriented: the same bits."""
    alone = kernel("krylov_norm", "cpu", "cpu", torch.float32, 4)
    of_list = kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    s = torch.randn(shape)
    for a in layouts(s):
        value = alone(a, 4, 2, 128, 1e-6, 3, 0)
        stack = a[None]
        found = {}
        for name, A in (("oriented", oriented(stack)), ("other", oriented(stack).mT)):
            info, _, _ = of_list([A], None, 4, 2, 128, 1, 1e-6, 3, 0, 0, False)
            found[name] = info[0, 0].float()
        assert torch.equal(value.abs(), found["oriented"])
        if min(shape) > 64:  # two reads: the other side gives another number, so that the test can fail
            assert not torch.equal(value.abs(), found["other"])
        assert torch.equal(value, alone(stack, 4, 2, 128, 1e-6, 3, 0)[0])


def test_a_kernel_with_limits_leaves_larger_problems_to_the_reference(monkeypatch):
    rows = registry.table()["rayleigh_ritz_"]
    row = rows["cpu"]
    if row.supports("rayleigh_ritz_", "cpu", torch.float32, 4) is not None:
        pytest.skip("no native library")
    monkeypatch.setitem(rows, "cpu", dataclasses.replace(row, column_limit=8, rank_limit=2))
    words = registry.Words("cpu", torch.float32, 4, "cpu")
    assert words.rayleigh_ritz_for(8, 2) is row.fn
    assert words.rayleigh_ritz_for(12, 1) is rows["reference"].fn
    assert words.rayleigh_ritz_for(8, 3) is rows["reference"].fn
