"""The commands of the paper's figures: images, bad input, finished trials that stay, pages and pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.bench import runs as studies
from spectral_kernels.checkpoints import InputError
from spectral_kernels.experiments import data, fits, page, runs, trainings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "paper.md"
RESULTS = ROOT / "benchmarks" / "results" / "paper"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """One thread, and no images but those a test names."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.delenv(data.ENVIRONMENT, raising=False)
    yield
    torch.set_num_threads(threads)


def write_records(path, labels, seed=0):
    """Random pictures, the red plane of the class 1 brighter."""
    labels = np.asarray(labels, dtype=np.uint8)
    pixels = np.random.default_rng(seed).integers(0, 200, (len(labels), data.ENTRIES), dtype=np.uint8)
    pixels[labels == 1, :1024] += 55
    path.write_bytes(np.concatenate([labels[:, None], pixels], 1).tobytes())
    return pixels


@pytest.fixture
def two_classes(tmp_path):
    path = tmp_path / "two.bin"
    write_records(path, [0, 1] * 10)
    return path


def command(*arguments):
    return cli.main(["paper", *map(str, arguments)])


# -- images


def test_a_file_is_read_plane_by_plane_and_standardized(tmp_path):
    path = tmp_path / "images.bin"
    pixels = write_records(path, [0, 1, 9, 1])
    images = data.load(str(path))
    assert images.labels.tolist() == [0, 1, 9, 1] and images.classes == images.outputs == 10
    x = torch.from_numpy(pixels[2]).double()
    torch.testing.assert_close(images.inputs[2].double(), (x - x.mean()) / x.std(correction=0), rtol=1e-5, atol=1e-5)
    pair = data.load(str(path), two_classes=True)
    assert torch.equal(pair.inputs, images.inputs[[0, 1, 3]]) and pair.targets.tolist() == [[-1.0], [1.0], [1.0]]
    assert pair.outputs == 1 and pair.key != images.key and "3 images of 2 classes" in pair.name


def test_a_folder_is_its_five_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BATCH", 3)
    monkeypatch.setattr(data, "PER_CLASS", 4)
    for i, name in enumerate(data.FOLDER):
        write_records(tmp_path / name, [0, 1, 2 + i], seed=i)
    assert data.load(str(tmp_path)).labels.tolist() == [label for i in range(5) for label in (0, 1, 2 + i)]
    assert data.load(str(tmp_path), two_classes=True).labels.tolist() == [0, 1] * 4
    write_records(tmp_path / data.FOLDER[4], [0, 1])
    with pytest.raises(InputError, match=f"{data.FOLDER[4]}: not CIFAR-10: 6146 bytes are not 3 records"):
        data.load(str(tmp_path))
    (tmp_path / data.FOLDER[1]).unlink()
    with pytest.raises(InputError, match=f"a folder without {data.FOLDER[1]}"):
        data.load(str(tmp_path))


def test_digits_are_the_default_unless_the_environment_names_images(two_classes, monkeypatch):
    assert data.default() == "digits"
    digits = data.load("digits", two_classes=True)
    assert digits.inputs.shape == (200, 64) and digits.targets.sum() == 0
    assert data.load("digits").outputs == 10
    monkeypatch.setenv(data.ENVIRONMENT, str(two_classes))
    assert len(data.load(data.default()).labels) == 20


@pytest.mark.parametrize("figure", ["fig1", "fig2", "uniqueness"])
def test_what_is_not_cifar_is_one_line_and_nothing_is_written(tmp_path, capsys, figure):
    good = tmp_path / "good.bin"
    write_records(good, [0, 1, 0])
    cases = {
        "cut.bin": (good.read_bytes()[:-1], "9218 bytes are not a whole number of records of 3073 bytes"),
        "empty.bin": (b"", "0 bytes"),
        "text.bin": (b"x" * data.RECORD, "record 0 has the label 120, above 9"),
    }
    out = tmp_path / "out"
    for name, (content, part) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert command(figure, "--data", tmp_path / name, "--out", out) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1 and not out.exists()
    for path, part in ((tmp_path / "gone.bin", "No such file"), (tmp_path, "a folder without data_batch_1.bin")):
        assert command(figure, "--data", path, "--out", out) == 2
        assert part in capsys.readouterr().err and not out.exists()


def test_two_classes_need_both(tmp_path, capsys):
    path = tmp_path / "one.bin"
    write_records(path, [0, 0, 3])
    assert command("fig2", "--data", path, "--out", tmp_path / "out") == 2
    assert "no images of the classes 0 and 1" in capsys.readouterr().err


# -- the commands


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("fig7",), "'fig7'"),
        (("fig2", "--widths", "0"), "'0' is not a whole number from 1 to 16384"),
        (("fig2", "--widths", "64", "20000"), "'20000'"),
        (("fig2", "--steps", "0"), "'0' is not a whole number from 1"),
        (("fig1", "--trials", "-3"), "'-3'"),
        (("fig2", "--lines", "mu"), "'mu'"),
        (("transfer", "--steps", "1.5"), "'1.5'"),
        (("page",), "--docs"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert part in capsys.readouterr().err and not any(tmp_path.iterdir())


SMALL = ("--widths", 8, 16, "--steps", 4, "--trials", 2)


def test_figures_share_their_trainings_and_run_nothing_twice(two_classes, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    given = ("--data", two_classes, "--out", out)
    assert command("fig2", *SMALL, *given) == 0
    printed = capsys.readouterr().out
    assert "| μP A |" in printed and "| NTP D |" in printed and "| SP C |" in printed
    path = out / "trainings.json"
    whole = path.read_text()
    assert str(tmp_path) not in whole and len(studies.load(path)[1]) == 2 * 2 * 3
    made = []
    trained = trainings.trained
    monkeypatch.setattr(trainings, "trained", lambda *a, **k: made.append(a) or trained(*a, **k))
    for figure in ("fig2", "fig4", "fig5", "fig6"):
        assert command(figure, *SMALL, *given) == 0
        assert (out / f"paper-{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert made == [] and path.read_text() == whole
    assert command("fig2", "--widths", 8, "--steps", 4, "--trials", 3, "--lines", "mup", *given) == 0
    assert [a[4] for a in made] == [[2]]  # only the third trial
    assert (
        command("fig2", "--widths", 8, "--steps", 4, "--trials", 2, "--lines", "ntp", "--seed", 1, "--no-stack", *given)
        == 0
    )
    assert [a[4] for a in made[1:]] == [[0], [1]]


def test_an_interrupted_run_keeps_its_finished_parts(two_classes, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "out", []
    trained = trainings.trained

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return trained(*args, **options)

    monkeypatch.setattr(trainings, "trained", interrupted)
    given = ("fig2", *SMALL, "--data", two_classes, "--out", out)
    assert command(*given) == cli.INTERRUPTED
    kept = studies.load(out / "trainings.json")[1]
    assert [(r["width"], r["line"], r["trial"]) for r in kept] == [
        (8, line, t) for line in ("mup", "ntp") for t in (0, 1)
    ]
    assert command(*given) == 0 and len(calls) == 3 + 4
    after = studies.load(out / "trainings.json")[1]
    assert after[:4] == kept and len(after) == 12


@pytest.mark.parametrize(
    ("figure", "arguments", "part"),
    [
        ("fig1", ("--widths", 8, "--steps", 2, "--trials", 2), "Stable rank and alignment 1 at B = 1: **met**"),
        ("fig3", ("--widths", 8, "--steps", 2, "--trials", 2), "Largest stable rank of G₂ at B = 16"),
        ("table1", ("--widths", 8, 16, "--trials", 2), "| ΔW2 stable rank |"),
        ("appb", SMALL, "| σ1 adam trained |"),
        ("uniqueness", ("--widths", 8, 16, "--trials", 1), "| σ of layer 1 |"),
        ("ntp-mup", ("--widths", 1, 8, "--steps", 3, "--trials", 1), "| 8 |"),
        ("transfer", SMALL, "| Adam, SP |"),
        ("stacking", SMALL, "| n | loop over trials | one stack | loop / stack |"),
    ],
)  # fmt: skip
def test_every_experiment_prints_writes_and_draws(figure, arguments, part, two_classes, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(figure, *arguments, "--data", two_classes, "--out", out) == 0
    assert part in capsys.readouterr().out
    picture = out / f"paper-{figure}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and 2000 < picture.stat().st_size < 60_000
    file = out / f"{page.figure(figure).FILE}.json"
    records = studies.load(file)[1]
    assert records and all({"machine", "commit", "seconds", "crc"} <= r.keys() for r in records)
    before = file.read_text()
    assert command(figure, *arguments, "--data", two_classes, "--out", out) == 0 and file.read_text() == before


def test_results_that_are_none_are_refused(two_classes, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "trainings.json").write_text("[]")
    file = tmp_path / "file"
    file.touch()
    for folder, part in ((out, "trainings.json: not a result file"), (file, "is not a folder")):
        assert command("fig2", *SMALL, "--data", two_classes, "--out", folder) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    if not torch.cuda.is_available():
        assert command("fig2", *SMALL, "--data", two_classes, "--device", "cuda") == 2


@pytest.mark.parametrize("blocked", ["file/inside", "/dev/null/inside", "/proc/inside"])
def test_what_cannot_be_written_is_said_before_anything_is_run(blocked, two_classes, tmp_path, capsys, monkeypatch):
    if not Path("/proc/self").exists():
        pytest.skip("folders of Linux")
    (tmp_path / "file").touch()
    monkeypatch.setattr(trainings, "trained", lambda *a, **k: pytest.fail("trained before"))
    assert command("fig2", *SMALL, "--data", two_classes, "--out", tmp_path / blocked) == 2
    error = capsys.readouterr().err
    assert "inside: cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_result_that_cannot_be_written_is_one_line(error, two_classes, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(studies.Results, "add", full)
    assert command("fig2", *SMALL, "--data", two_classes, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert f"trainings.json: cannot be written ({error.strerror})" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        "", "null", '{"benchmarks": [1]}', '{"benchmarks": [{"extra_info": 3}]}',
        '{"benchmarks": [{"extra_info": {"records": [1]}}]}', '{"benchmarks": [{"extra_info": {"records": [{}]}}]}',
    ],
)  # fmt: skip
def test_files_that_hold_no_records_are_refused_by_experiments_and_page(content, two_classes, tmp_path, capsys):
    (tmp_path / "trainings.json").write_text(content)
    for arguments in (
        ("fig2", *SMALL, "--data", two_classes, "--out"),
        ("page", "--docs", PAGE, "--check", "--results"),
    ):
        assert command(*arguments, tmp_path) == 2
        error = capsys.readouterr().err
        assert "trainings.json: not a result file" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".bin"] == ["trainings.json"]


def test_one_width_has_no_verdict(two_classes, tmp_path, capsys):
    given = ("--widths", 8, "--trials", 1, "--data", two_classes, "--out", tmp_path / "out")
    assert command("transfer", "--steps", 2, *given) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| SGD, SP |"))
    assert "|  | more than 1 |  |" in row
    assert command("uniqueness", *given) == 0
    assert "no answer from one width" in capsys.readouterr().out


# -- tables and page, from made-up records


def made_up(power):
    return [{"width": n, "trial": t, "A": (1 + 0.01 * t) * n**power} for n in (64, 128, 256) for t in (0, 1)]


def test_a_fit_says_whether_the_prediction_holds():
    for power, bounds, verdict in (
        (-0.1, fits.near(0.0), "yes"), (-0.2, fits.near(0.0), "no"), (-0.3, fits.at_most(-0.25, -0.5), "yes"),
        (-0.2, fits.at_most(-0.25, -0.5), "no"), (0.4, fits.NO_DECAY, "yes"), (-0.4, fits.NO_DECAY, "no"),
        (-0.4, fits.UNKNOWN, ""),
    ):  # fmt: skip
        one = fits.line("A", made_up(power), lambda r: r["A"], bounds)
        assert one.exponent[0] == pytest.approx(power) and one.verdict == verdict
    table = fits.table([fits.line("A", made_up(-0.5), lambda r: r["A"], fits.near(-0.5))])
    assert "| A | 0.126 | 0.0888 | 0.0628 | -0.50 ± 0.00 | -0.50 | -0.65 to -0.35 | yes |" in table
    lost = fits.line("A", [*made_up(0), {"width": 64, "A": None}], lambda r: r["A"], fits.near(0.0))
    assert lost.verdict == "no" and "not finite" in fits.table([lost])
    alone = fits.line("A", made_up(0)[:2], lambda r: r["A"], fits.near(0.0))
    assert alone.verdict == "" and "none" in fits.table([alone])


@pytest.fixture
def results(two_classes, tmp_path):
    out = tmp_path / "out"
    assert command("fig2", *SMALL, "--data", two_classes, "--out", out) == 0
    assert command("ntp-mup", "--widths", 1, 8, "--steps", 2, "--trials", 1, "--data", two_classes, "--out", out) == 0
    return out


def test_the_page_is_made_from_the_files(results, tmp_path, capsys):
    text = PAGE.read_text(encoding="utf-8")
    made = page.render(text, results)
    assert page.render(made, results) == made and page.MARKER.sub("", made) == page.MARKER.sub("", text)
    assert sorted(m["part"] for m in page.MARKER.finditer(text)) == sorted(page.PARTS)
    assert made.count(page.NOTHING) == len(page.PARTS) - 5 and "| μP A |" in made and "| 8 | " in made
    copy, figures = tmp_path / "paper.md", tmp_path / "figures"
    copy.write_text(text, encoding="utf-8")
    given = ("page", "--results", results, "--docs", copy)
    assert command(*given, "--check") == 1 and copy.read_text(encoding="utf-8") == text
    assert command(*given, "--plot", figures) == 0 and copy.read_text(encoding="utf-8") == made
    assert command(*given, "--check") == 0 and len(list(figures.iterdir())) == 5
    changed = json.loads((results / "trainings.json").read_text())
    changed["benchmarks"][0]["extra_info"]["records"][0]["A"] = 17.0
    (results / "trainings.json").write_text(json.dumps(changed))
    assert command(*given, "--check") == 1


def test_the_page_takes_records_of_its_own_experiment_only(results, tmp_path, capsys):
    ours, theirs = results / "trainings.json", results / "ntp-mup.json"
    theirs.write_text(ours.read_text())
    assert page.body("ntp-mup", results) == page.NOTHING
    ours.write_text('{"benchmarks": [{"extra_info": {"records": [{"table": "trainings"}]}}]}')
    with pytest.raises(InputError, match="trainings.json: not a result file .a record without 'trial'"):
        page.body("fig2", results)


def test_bad_pages_are_one_line_and_2(results, tmp_path, capsys):
    bare, wrong = tmp_path / "bare.md", tmp_path / "wrong.md"
    bare.write_text("no markers")
    wrong.write_text("<!-- paper:fig9 -->\n<!-- /paper -->")
    capsys.readouterr()
    for docs, folder, part in (
        (bare, results, "no lines <!-- paper:PART -->"),
        (wrong, results, "an unknown marker paper:fig9"),
        (tmp_path / "gone.md", results, "No such file"),
        (bare, tmp_path / "nowhere", "no such folder"),
    ):
        assert command("page", "--results", folder, "--docs", docs) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1


def test_the_page_is_that_of_the_committed_files():
    text = PAGE.read_text(encoding="utf-8")
    if not RESULTS.is_dir():
        pytest.skip(f"{RESULTS.name} is not there yet: run spectral-kernels paper fig2")
    assert page.render(text, RESULTS) == text
    shown = re.findall(r"\]\((figures/[\w.-]+)\)", text)
    assert len(shown) == len(page.PARTS)
    assert all((PAGE.parent / name).stat().st_size < 60_000 for name in shown)


def test_options_share_their_defaults():
    assert runs.whole(1, 5)("5") == 5 and runs.FOLDER == Path("paper-results")
