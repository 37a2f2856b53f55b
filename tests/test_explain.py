"""explain: which kernel serves a call, and why the others do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import spectral_kernels as sk
from spectral_kernels.kernels import registry
from spectral_kernels.ops.newton_schulz import recipe, short_first, way
from tests.kernels.lists import kernel

FUNCTIONS = [
    "spectral_norm",
    "spectral_norm_",
    "singular_triplet",
    "spectral_bounds",
    "stable_rank",
    "leading_subspace",
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_explained(name):
    assert callable(getattr(sk, name))
    said = sk.explain(name, torch.randn(3, 20, 30))
    assert said.function == name and said.matrices == 3 and said.blocks == [20]
    assert {choice.word for choice in said.choices} >= {"gram_matvec", "rayleigh_ritz_"}
    assert {choice.word for choice in said.choices} <= set(registry.WORDS)
    assert str(said).splitlines()[0] == f"{name}: 3 matrices, blocks of 4 x [20]"


def test_names_stay_functions_whatever_was_imported_first():
    """A submodule of a public function's name would take its place."""
    code = (
        "import importlib, pkgutil, spectral_kernels as sk\n"
        "for module in pkgutil.iter_modules(sk.__path__):\n"
        "    if module.name not in ('__main__', '_C_cpu'):\n"
        "        importlib.import_module(f'spectral_kernels.{module.name}')\n"
        "print([name for name in sk._PUBLIC if not callable(getattr(sk, name))])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_native_kernels_serve_the_cpu():
    kernel("block_krylov", "cpu", "cpu", torch.float32, 4)
    text = str(sk.explain("spectral_norm", torch.randn(20, 30)))
    assert text.splitlines() == [
        "spectral_norm: 1 matrices, blocks of 4 x [20]",
        "  gram_matvec: served by cpu",
        "  rayleigh_ritz_: served by cpu",
        "  block_krylov: served by cpu",
    ]


def test_what_force_chooses_and_what_declines():
    with sk.force("reference"):
        said = sk.explain("spectral_norm", torch.randn(20, 30))
        assert [choice.backend for choice in said.choices] == ["reference"] * 3
        assert "served by reference" in str(said)
    with sk.force("cuda"), pytest.raises(sk.BackendUnavailable, match="cuda: has no gram_matvec kernel"):
        sk.explain("spectral_norm", torch.randn(20, 30))


def test_the_reasons_of_those_that_declined(monkeypatch):
    from spectral_kernels.kernels import cpu

    monkeypatch.setattr(cpu, "load", lambda: "the native library is not built")
    registry._choose.cache_clear()
    try:
        text = str(sk.explain("spectral_norm", torch.randn(20, 30)))
    finally:
        registry._choose.cache_clear()
    assert text.count("served by reference") == 3
    assert text.count("    cpu declined: the native library is not built") == 3


def test_it_tells_what_the_call_does():
    """The choice shown is the function that is run."""
    A = torch.randn(150, 140)
    for backend in ("cpu", "reference"):
        kernel("gram_matvec", backend, "cpu", torch.float32, 4)
        with sk.force(backend):
            said = {choice.word: choice for choice in sk.explain("spectral_norm", A).choices}
            words = registry.words("cpu", torch.float32, 4)
            assert words.gram_matvec is said["gram_matvec"].fn


def test_orthogonalize_by_shape_and_dtype():
    A = [torch.randn(30, 20), torch.randn(2, 40, 4000), torch.randn(4000, 40)]
    said = sk.explain("orthogonalize", A)
    assert said.matrices == 4 and said.blocks == []
    assert [choice.word for choice in said.choices] == ["gram", "square_add", "multiply_add", "newton_schulz"]
    text = str(said).splitlines()
    assert text[:2] == [
        "orthogonalize: 4 matrices",
        "  products in float32, divided by the Schatten-4 norm first",
    ]
    made, ways = recipe("polar_express"), {}
    for a in A:  # what the call itself would take
        gram, restarts, dtype = way(made, short_first(a.view(-1, *a.shape[-2:])))
        ways[tuple(a.shape[-2:])] = f"method {'gram' if gram else 'standard'}"
        assert dtype == torch.float32
        if gram and restarts:
            ways[tuple(a.shape[-2:])] += f", a new Gram matrix after steps {', '.join(map(str, restarts))}"
    assert text[2:5] == [f"  {m} x {n}: {ways[m, n]}" for m, n in sorted(ways)]
    assert ways[30, 20] == "method standard" and ways[40, 4000].startswith("method gram")
    assert text[5:] == [f"  {choice.word}: served by cpu" for choice in said.choices]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_words_that_multiply_are_served_by_the_dtype_of_products(dtype):
    products = "float64" if dtype == torch.float64 else "float32"
    said = sk.explain("orthogonalize", torch.randn(20, 30).to(dtype))
    assert f"products in {products}" in str(said) and {choice.backend for choice in said.choices} == {"cpu"}
    step = sk.explain("spectral_step_", torch.randn(20, 30).to(dtype))
    assert f"\n  direction orthogonalize: products in {products}\n" in str(step)
    served = {choice.word: choice for choice in step.choices}
    for word in ("multiply_update_", "newton_schulz"):
        assert served[word].fn is registry.choose(word, "cpu", getattr(torch, products), 1).fn
    with sk.force("reference"):
        assert {choice.backend for choice in sk.explain("orthogonalize", torch.randn(3, 4)).choices} == {"reference"}


def test_lists_and_empty_lists():
    said = sk.explain("spectral_norm", [torch.randn(4, 20, 30), torch.randn(9, 7), torch.randn(150, 200)])
    assert said.matrices == 6 and said.blocks == [20, 7, 200]  # the last one along its rows in memory
    nothing = sk.explain("spectral_norm", [])
    assert nothing.matrices == 0 and nothing.choices == []
    assert "0 matrices" in str(nothing)


@pytest.mark.parametrize("name", ["", "norm", "spectral_radius", None])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"explain knows leading_subspace, .*spectral_step_, stable_rank, not "):
        sk.explain(name, torch.randn(3, 4))


def test_nothing_is_computed_or_changed():
    A = torch.full((3, 4), torch.nan)
    sk.explain("spectral_norm_", A)
    assert A.isnan().all()


def test_wide_blocks_of_a_clipped_step():
    """A backend serves words up to a number of columns and says so beyond it."""
    found = sk.explain("spectral_step_", torch.randn(300, 200), columns=48)
    assert "blocks of 48 x [200]" in str(found)
    backends = {choice.word: choice.backend for choice in found.choices}
    wide = {choice.word: choice for choice in sk.explain("spectral_step_", torch.randn(300, 200), 400).choices}
    if registry.choose("clip_", "cpu", torch.float32, 4).backend == "cpu":
        assert backends["clip_"] == "cpu" and wide["clip_"].backend == "reference"
        assert "columns, not 400" in dict(wide["clip_"].declined)["cpu"]
    with pytest.raises(ValueError, match="columns must be at least 1, not 0"):
        sk.explain("spectral_norm", torch.randn(3, 3), columns=0)
