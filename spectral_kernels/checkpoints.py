"""Checkpoints on disk, read lazily: the headers say what they hold, tensors are memory-mapped a few at a time.

Formats: `.safetensors`, `.pt` / `.pth` / `.bin` (torch.save, read with weights_only=True), a sharded `*.index.json` of
either, or a folder that holds one of these. What is wrong with a file is raised as `InputError`, one line of text.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("float64", "float32", "bfloat16", "float16")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
READABLE = ".safetensors, .pt, .pth, .bin, *.index.json, or a folder with one of them"
LEGACY_MAGIC = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickled MAGIC_NUMBER of torch/serialization.py, before torch 1.6
)

# dtype codes of the safetensors header -> torch's names
_SAFETENSORS_DTYPES = {
    **{
        f"{letter}{bits}": f"{word}{bits}" for letter, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class InputError(Exception):
    """What is wrong with what the user gave, in one line."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else "?" for c in line))


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it; `skip` says why it has no norm to measure, None where it has."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    skip: str | None
    file: Path

    @property
    def nbytes(self) -> int:
        size = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        for side in self.shape:
            size *= side
        return size


class Checkpoint:
    """The tensors of one file or of a sharded set, in storage order."""

    def __init__(self, path: Path, entries: list[Entry], kept: dict[Path, dict[str, Tensor]]) -> None:
        self.path = path
        self.entries = entries
        self._kept = kept  # files without a memory map: torch.save before torch 1.6

    def read(self, names: Sequence[Entry]) -> list[Tensor]:
        """Memory-mapped tensors of these entries; the map goes when the tensors go, and with it their pages."""
        tensors: dict[Entry, Tensor] = {}
        for file in dict.fromkeys(entry.file for entry in names):
            here = [entry for entry in names if entry.file == file]
            if file in self._kept:
                tensors.update((entry, self._kept[file][entry.name]) for entry in here)
            elif file.suffix == ".safetensors":
                tensors.update(zip(here, _read_safetensors(file, [entry.name for entry in here]), strict=True))
            else:
                held = _load_torch(file, mmap=True)
                tensors.update((entry, held[entry.name]) for entry in here)
        return [_aligned(tensors[entry]) for entry in names]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint. Raises InputError for whatever cannot be read."""
    path = Path(path)
    kept: dict[Path, dict[str, Tensor]] = {}
    file = _find_in_folder(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        entries = list(_index_entries(file, kept))
    else:
        entries = _entries(file, kept)
    if not entries:
        raise InputError(f"{path}: holds no tensors")
    return Checkpoint(path, entries, kept)


def _find_in_folder(folder: Path) -> Path:
    """The index of a folder, safetensors before torch, else its only checkpoint."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for kind in (".safetensors.index.json", ".bin.index.json", ".safetensors"):
        found = [file for file in files if file.name.endswith(kind)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{folder}: holds {len(found)} {kind} files: name the one that is meant")
    raise InputError(f"{folder}: a folder without a *.safetensors.index.json or a .safetensors file")


def _check_file(file: Path) -> None:
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise InputError(f"{file}: not a regular file")
        with file.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    if size == 0:
        raise InputError(f"{file}: empty file (0 bytes)")


def _entries(file: Path, kept: dict[Path, dict[str, Tensor]]) -> list[Entry]:
    _check_file(file)
    if file.suffix == ".safetensors":
        return _safetensors_entries(file)
    if file.suffix in TORCH_SUFFIXES:
        return _torch_entries(file, kept)
    raise InputError(f"{file}: not a checkpoint by its name (expected {READABLE})")


def _index_entries(index: Path, kept: dict[Path, dict[str, Tensor]]) -> Iterator[Entry]:
    _check_file(index)
    try:
        content = json.loads(index.read_bytes())
        shards = {str(name): str(shard) for name, shard in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f'{index}: not a checkpoint index (JSON with a "weight_map" from tensor to file)') from None
    for shard in dict.fromkeys(shards.values()):
        if Path(shard).name != shard:
            raise InputError(f"{index}: names the shard {shard!r}, which is not a file beside it")
        file = index.parent / shard
        if not file.exists():
            raise InputError(f"{index}: its shard {shard} is not there")
        held = _entries(file, kept)
        absent = {name for name in shards if shards[name] == shard}.difference(entry.name for entry in held)
        if absent:
            raise InputError(f"{index}: says that {shard} holds {min(absent)!r}, which it does not")
        yield from (entry for entry in held if shards.get(entry.name) == shard)


def _safe_open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise InputError(
            f"{file}: reading .safetensors needs the package safetensors: pip install 'spectral-kernels[inspect]'"
        ) from None
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: corrupt or truncated safetensors file ({error})") from None


def _safetensors_entries(file: Path) -> list[Entry]:
    with _safe_open(file) as handle:
        entries = []
        for name in getattr(handle, "offset_keys", handle.keys)():  # storage order, where this release tells it
            view = handle.get_slice(name)
            code = str(view.get_dtype())
            dtype = _SAFETENSORS_DTYPES.get(code, code.lower())
            entries.append(Entry(name, tuple(view.get_shape()), dtype, skip_reason(dtype), file))
    return entries


def _read_safetensors(file: Path, names: Sequence[str]) -> list[Tensor]:
    _check_file(file)
    with _safe_open(file) as handle:
        return [handle.get_tensor(name) for name in names]


def _torch_entries(file: Path, kept: dict[Path, dict[str, Tensor]]) -> list[Entry]:
    import torch

    with file.open("rb") as stream:
        head = stream.read(len(LEGACY_MAGIC))
    mapped = head[:4] == b"PK\x03\x04"
    if not mapped and head != LEGACY_MAGIC:
        raise InputError(f"{file}: not a file written by torch.save, or its beginning is damaged")
    held = _load_torch(file, mmap=mapped)
    if not mapped:
        kept[file] = held
    entries = []
    for name, tensor in held.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        skip = skip_reason(dtype)
        if tensor.layout != torch.strided:
            skip = f"sparse ({str(tensor.layout).removeprefix('torch.')})"
        elif tensor.is_meta:
            skip = "on the meta device: no data"
        entries.append(Entry(name, tuple(tensor.shape), dtype, skip, file))
    return entries


def _load_torch(file: Path, *, mmap: bool) -> dict[str, Tensor]:
    """Every tensor of the file under its path in the nested containers, `optimizer.state.0.exp_avg`."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        found: dict[str, Tensor] = {}
        for path, tensor in _flatten(content, ()):
            name = ".".join(path) or file.stem
            while name in found:  # {"a.b": x, "a": {"b": y}}
                name += "'"
            found[name] = tensor.detach()
        return found
    except Exception as error:  # a damaged pickle raises nearly anything; none of it is of use to the reader
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            why = f"holds pickled objects ({unsafe[1]}), and only tensors and plain containers are read"
        else:
            text = str(error) or type(error).__name__
            detail = "its pickle is damaged" if "Weights only load failed" in text else text[:160]
            why = f"corrupt or truncated torch checkpoint, or one of more than tensors ({detail})"
        raise InputError(f"{file}: {why}") from None


def _flatten(node: Any, path: tuple[str, ...], above: tuple[int, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    import torch

    if isinstance(node, torch.Tensor):
        yield path, node
    elif id(node) not in above:  # a pickle may hold itself
        above = (*above, id(node))
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield from _flatten(value, (*path, str(key)), above)
        elif isinstance(node, list | tuple):
            for number, value in enumerate(node):
                yield from _flatten(value, (*path, str(number)), above)


def skip_reason(dtype: str) -> str | None:
    """Why tensors of this dtype are not measured; None for the four dtypes that are."""
    if dtype in FLOATS:
        return None
    if dtype == "bool":
        return "boolean"
    if dtype.startswith("complex"):
        return "complex"
    if dtype.startswith(("int", "uint")):
        return "integer"
    return "quantized: its values mean nothing without a scale kept elsewhere"


def _aligned(tensor: Tensor) -> Tensor:
    """A safetensors header of odd length leaves its data off the boundaries that vector loads expect."""
    return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()
