"""Reading checkpoints: formats, laziness, and files that cannot be read."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch

from spectral_kernels.checkpoints import Entry, InputError, open_checkpoint

safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors (extra `inspect`)")
save_file = safetensors_torch.save_file


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "layer.10.weight": torch.randn(6, 9, generator=g),
        "layer.2.weight": torch.randn(7, 3, generator=g).bfloat16(),
        "layer.2.bias": torch.randn(7, generator=g).double(),
        "half": torch.randn(2, 3, 4, generator=g).half(),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "f8": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "wave": torch.ones(2, 2, dtype=torch.complex64),
    }


REASONS = {"ids": "integer", "mask": "boolean", "bytes": "integer", "f8": "quantized", "wave": "complex"}


def by_name(entries: list[Entry]) -> dict[str, Entry]:
    assert len({entry.name for entry in entries}) == len(entries)
    return {entry.name: entry for entry in entries}


def shards(folder: Path, saver, suffix: str) -> Path:
    held = tensors()
    half = list(held)[: len(held) // 2]
    names = {name: f"part-{1 if name in half else 2}{suffix}" for name in held}
    for part in set(names.values()):
        saver({name: held[name] for name in held if names[name] == part}, folder / part)
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def single(folder: Path, suffix: str) -> Path:
    path = folder / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path)
    return path


@pytest.fixture(
    params=[".safetensors", ".pt", ".pth", ".bin", "legacy", "safetensors shards", "torch shards", "folder"]
)
def checkpoint_path(request, tmp_path) -> Path:
    if request.param == "legacy":
        path = tmp_path / "old.pt"
        held = {name: tensor for name, tensor in tensors().items() if name != "f8"}  # torch cannot read its own there
        torch.save(held, path, _use_new_zipfile_serialization=False)
        return path
    if request.param == "safetensors shards":
        return shards(tmp_path, save_file, ".safetensors")
    if request.param == "torch shards":
        return shards(tmp_path, torch.save, ".bin")
    if request.param == "folder":
        return shards(tmp_path, save_file, ".safetensors").parent
    return single(tmp_path, request.param)


def test_every_format_gives_the_same_names_shapes_dtypes_and_values(checkpoint_path):
    checkpoint = open_checkpoint(checkpoint_path)
    found = by_name(checkpoint.entries)
    expected = tensors()
    if checkpoint_path.name == "old.pt":
        del expected["f8"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        entry = found[name]
        assert entry.shape == tuple(tensor.shape)
        assert f"torch.{entry.dtype}" == str(tensor.dtype)
        assert (entry.skip or "").startswith(REASONS.get(name, "")) and (entry.skip is None) == (name not in REASONS)
        if entry.skip is None:
            assert entry.nbytes == tensor.numel() * tensor.element_size()
    wanted = [entry for entry in checkpoint.entries if entry.skip is None][::-1]  # an order of the caller's
    for entry, tensor in zip(wanted, checkpoint.read(wanted), strict=True):
        assert torch.equal(tensor, expected[entry.name]) and tensor.dtype == expected[entry.name].dtype


def test_storage_is_mapped_not_copied(tmp_path):
    """Two reads of a mapped tensor see what is on disk now; a copy made at opening would not."""
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"w{suffix}"
        before, after = torch.zeros(64, 64), torch.full((64, 64), 3.0)
        (save_file if suffix == ".safetensors" else torch.save)({"w": before}, path)
        checkpoint = open_checkpoint(path)
        (save_file if suffix == ".safetensors" else torch.save)({"w": after}, path)
        assert torch.equal(checkpoint.read(checkpoint.entries)[0], after)


def test_nested_containers_are_flattened_with_dotted_names(tmp_path):
    path = tmp_path / "train.pt"
    w = torch.randn(3, 2)
    content = {
        "model": {"a.weight": w, "a": {"weight": w + 1}},
        "optimizer": {
            "state": {0: {"exp_avg": w, "step": torch.tensor(4.0)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "epoch": 3,
        "history": [w, (w, None)],
        "parameter": torch.nn.Parameter(w),
        "sparse": w.to_sparse(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch retires these; files that hold them stay
        content["quantized"] = torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)
    content["itself"] = content
    torch.save(content, path)
    checkpoint = open_checkpoint(path)
    found = by_name(checkpoint.entries)
    assert {"model.a.weight", "model.a.weight'", "optimizer.state.0.exp_avg", "optimizer.state.0.step"} < found.keys()
    assert {"history.0", "history.1.0", "parameter"} < found.keys() and len(found) == 9
    assert "sparse" in found["sparse"].skip and "quantized" in found["quantized"].skip
    first, second = checkpoint.read([found["model.a.weight"], found["model.a.weight'"]])
    assert torch.equal(first, w) and torch.equal(second, w + 1)
    assert not checkpoint.read([found["parameter"]])[0].requires_grad


def test_a_lone_tensor_is_named_after_its_file(tmp_path):
    torch.save(torch.ones(2, 2), tmp_path / "kernel.pt")
    assert [entry.name for entry in open_checkpoint(tmp_path / "kernel.pt").entries] == ["kernel"]


def test_headers_of_odd_length_give_aligned_tensors(tmp_path):
    w = torch.randn(5, 7)
    header = json.dumps({"w": {"dtype": "F32", "shape": [5, 7], "data_offsets": [0, 140]}}).encode()
    for padding in range(4):
        padded = header + b" " * padding
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(len(padded).to_bytes(8, "little") + padded + w.numpy().tobytes())
        checkpoint = open_checkpoint(path)
        (read,) = checkpoint.read(checkpoint.entries)
        assert torch.equal(read, w) and read.data_ptr() % 4 == 0


def test_a_folder_prefers_its_index_and_takes_an_only_file(tmp_path):
    save_file({"only": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert [entry.name for entry in open_checkpoint(tmp_path).entries] == ["only"]
    shards(tmp_path, save_file, ".safetensors")
    assert len(open_checkpoint(tmp_path).entries) == len(tensors())


def damaged(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is wrong -> (path, a part of the message that says so)."""
    folder.mkdir(exist_ok=True)

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    whole = single(folder, ".safetensors").read_bytes()
    torch_file = single(folder, ".pt").read_bytes()
    torch.save({"w": torch.randn(9, 9)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"layer": torch.nn.Linear(2, 2)}, folder / "pickled.pt")
    torch.save({"epoch": 3}, folder / "without.pt")
    bare, two = folder / "bare", folder / "two"
    bare.mkdir(), two.mkdir()
    save_file({"a": torch.ones(1)}, two / "a.safetensors")
    save_file({"a": torch.ones(1)}, two / "b.safetensors")
    save_file({}, folder / "nothing.safetensors")
    index = {"a": "gone.safetensors"}
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 99]}}).encode()
    return {
        "missing": (folder / "missing.safetensors", "No such file"),
        "missing pt": (folder / "missing.pt", "No such file"),
        "below a file": (file("plain.pt", b"x") / "w.pt", "Not a directory"),
        "empty": (file("empty.safetensors", b""), "empty file"),
        "empty pt": (file("empty.pt", b""), "empty file"),
        "truncated data": (file("cut.safetensors", whole[:-7]), "truncated"),
        "truncated header": (file("cut2.safetensors", whole[:40]), "truncated"),
        "noise": (file("noise.safetensors", b"\xff" * 500), "corrupt"),
        "wrong offsets": (file("far.safetensors", len(header).to_bytes(8, "little") + header + bytes(16)), "corrupt"),
        "truncated pt": (file("cut.pt", torch_file[: len(torch_file) // 2]), "truncated"),
        "truncated old pt": (file("cutold.pt", (folder / "old.pt").read_bytes()[:-40]), "truncated"),
        "noise pt": (file("noise.pth", b"\x00\x01" * 300), "not a file written by torch.save"),
        "pickled objects": (folder / "pickled.pt", "torch.nn.modules.linear.Linear"),
        "no tensors": (folder / "without.pt", "holds no tensors"),
        "no tensors either": (folder / "nothing.safetensors", "holds no tensors"),
        "wrong extension": (file("model.gguf", whole), "not a checkpoint by its name"),
        "bare folder": (bare, "a folder without"),
        "two files": (two, "holds 2 .safetensors files"),
        "index without shard": (
            file("gone.safetensors.index.json", json.dumps({"weight_map": index}).encode()),
            "its shard gone.safetensors is not there",
        ),
        "index outside": (
            file("out.safetensors.index.json", json.dumps({"weight_map": {"a": "../model.safetensors"}}).encode()),
            "not a file beside it",
        ),
        "index with an absent tensor": (
            file("absent.safetensors.index.json", json.dumps({"weight_map": {"zz": "model.safetensors"}}).encode()),
            "'zz'",
        ),
        "index of other JSON": (file("odd.safetensors.index.json", b"[1, 2]"), "not a checkpoint index"),
        "index not JSON": (file("text.safetensors.index.json", b"{"), "not a checkpoint index"),
    }


def test_unreadable_files_say_why_in_one_line(tmp_path):
    for name, (path, message) in damaged(tmp_path / "bad").items():
        with pytest.raises(InputError) as raised:
            open_checkpoint(path)
        text = str(raised.value)
        assert message in text and text.isprintable() and len(text) < 600, (name, text)
        assert str(path.name) in text, (name, text)


def test_a_shard_lost_after_opening_is_one_line_too(tmp_path):
    path = single(tmp_path, ".safetensors")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="truncated"):
        checkpoint.read(checkpoint.entries[:1])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "legacy"])
def test_random_damage_is_read_or_refused_never_a_traceback(suffix, tmp_path):
    path = tmp_path / ("base" + (".pt" if suffix == "legacy" else suffix))
    held = {"w": torch.randn(4, 4), "b": torch.randn(4)}
    if suffix == ".safetensors":
        save_file(held, path)
    else:
        torch.save({"model": held, "step": 3}, path, _use_new_zipfile_serialization=suffix != "legacy")
    base, rng, refused = path.read_bytes(), random.Random(7), 0
    target = tmp_path / f"damaged{path.suffix}"
    for _ in range(60):
        content = bytearray(base)
        if rng.random() < 0.4:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.randrange(1, 6)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        target.write_bytes(content)
        try:
            checkpoint = open_checkpoint(target)
            checkpoint.read([entry for entry in checkpoint.entries if entry.skip is None])
        except InputError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 20


def test_missing_safetensors_names_the_extra(tmp_path, monkeypatch):
    path = single(tmp_path, ".safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"pip install 'spectral-kernels\[inspect\]'"):
        open_checkpoint(path)
