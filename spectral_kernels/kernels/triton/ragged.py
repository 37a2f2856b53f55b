"""Descriptor tables: a ragged list as one int64 tensor on the device, so that any number of matrices is one launch.

A table holds Python integers only (addresses, sizes, strides, offsets), travels with one non-blocking copy, and is
kept for the lists seen last: a list with the same addresses, shapes and strides sends nothing. Under CUDA-graph
capture such a hit leaves kernel launches alone in the graph, so call once with the same tensors before the capture; a
miss under capture puts the copy into the graph. What a graph reads, a table that was kept or the pinned source of a
copy, stays alive for as long as the process runs, whatever later calls push out.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = 64  # tables; a table is 8 bytes a field, at most a few hundred KB for a large model


@dataclass(frozen=True)
class Table:
    """A device table and the sizes that its launcher needs. `tensor` is int64; `sizes` is the builder's business."""

    tensor: Tensor
    sizes: Any


_tables: OrderedDict[Hashable, Table] = OrderedDict()
_captured: set[Tensor] = set()  # what captured graphs read: tables, pinned sources of copies


def table(key: Hashable, device: torch.device, build: Callable[[], tuple[list[int], Any]]) -> Table:
    """The table of `key` on `device`; `build() -> (entries, sizes)` is called where it is not kept yet."""
    full = (device.type, device.index, key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _tables.get(full)
    if found is not None:
        _tables.move_to_end(full)
        if capturing:
            _captured.add(found.tensor)
        return found
    entries, sizes = build()
    host = torch.tensor(entries, dtype=torch.int64, device="cpu")  # whatever the default device is
    if device.type == "cpu":
        made = Table(host, sizes)
    else:
        host = host.pin_memory()
        made = Table(host.to(device, non_blocking=True), sizes)
        if capturing:
            _captured.add(host)
            return made  # its memory belongs to the graph: not for calls outside
    _tables[full] = made
    if len(_tables) > KEPT:
        _tables.popitem(last=False)
    return made


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
