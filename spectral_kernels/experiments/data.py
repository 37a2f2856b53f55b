"""The images of the experiments: CIFAR-10 in its binary layout, or the digits that come with scikit-learn.

A record of CIFAR-10 is a label byte and 3072 bytes: red, green and blue planes of 32 x 32, row by row. Inputs are
standardized per image: mean 0 and variance 1 over its entries.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bench import training_data
from ..checkpoints import InputError

ENVIRONMENT = "SPECTRAL_KERNELS_DATA"
DIGITS = "digits"
ENTRIES, CLASSES = 3 * 32 * 32, 10
RECORD = 1 + ENTRIES  # bytes
FOLDER = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
BATCH = 10_000  # records of each of these files
PER_CLASS = 100  # images of each of two classes [paper, Fig. 2: 200 images of airplane and automobile]


class Images(NamedTuple):
    """inputs (B, d) float32; labels (B,) int64; name: for titles; key: tells one set of images from another."""

    name: str
    inputs: Tensor
    labels: Tensor
    key: str

    @property
    def classes(self) -> int:
        """10, or 2 where no other labels than 0 and 1 are there."""
        return 2 if int(self.labels.max()) < 2 else CLASSES

    @property
    def outputs(self) -> int:
        """Of a network: one for targets of -1 and +1, one per class for ten classes."""
        return 1 if self.classes == 2 else CLASSES

    @property
    def targets(self) -> Tensor:
        """Two classes: (B, 1), airplane or digit 0 -1, automobile or digit 1 +1; ten classes: the labels (B,)."""
        if self.classes > 2:
            return self.labels
        return (2.0 * self.labels - 1).unsqueeze(-1)


def default() -> str:
    """What --data means where it is not given: the environment variable, else the digits."""
    return os.environ.get(ENVIRONMENT) or DIGITS


def load(source: str, *, two_classes: bool = False) -> Images:
    """The images of `digits`, of a .bin file, or of a folder cifar-10-batches-bin; InputError in one line.

    two_classes: the first hundred of each of the classes 0 and 1, in the order of the file.
    """
    name, pixels, labels = _digits() if source == DIGITS else _cifar(Path(source))
    if two_classes:
        kept = torch.cat([(labels == c).nonzero()[:PER_CLASS, 0] for c in (0, 1)]).sort().values
        pixels, labels = pixels[kept], labels[kept]
        if len(labels.unique()) < 2:
            raise InputError(f"{source}: holds no images of the classes 0 and 1, airplane and automobile")
    key = f"{zlib.crc32(pixels.contiguous().numpy().tobytes()):08x}"
    count = f"{len(labels)} images of {len(labels.unique())} classes"
    return Images(f"{name}, {count}", _standardized(pixels), labels, key)


def _standardized(pixels: Tensor) -> Tensor:
    """(B, d) -> (B, d) float32; an image of one grey becomes zeros."""
    x = pixels.float()
    x = x - x.mean(1, keepdim=True)
    return x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)


def _digits() -> tuple[str, Tensor, Tensor]:
    try:
        images, labels = training_data.digits().train
    except ImportError as error:
        raise InputError(str(error)) from None
    return "digits 8 x 8", images.flatten(1), labels


def _cifar(path: Path) -> tuple[str, Tensor, Tensor]:
    if path.is_dir():
        missing = [file for file in FOLDER if not (path / file).is_file()]
        if missing:
            raise InputError(
                f"{path}: a folder without {missing[0]}: not cifar-10-batches-bin, CIFAR-10's binary version"
            )
        records = np.concatenate([_records(path / file, BATCH) for file in FOLDER])
    else:
        records = _records(path)
    bytes_ = torch.from_numpy(records)
    return "CIFAR-10", bytes_[:, 1:], bytes_[:, 0].long()


def _records(file: Path, count: int | None = None) -> np.ndarray:
    """(k, 3073) uint8 of one file; InputError where its size or its labels are not CIFAR-10's."""
    try:
        size = file.stat().st_size
        if not size or size % RECORD or (count is not None and size != count * RECORD):
            wanted = f"{count} records" if count else "a whole number of records"
            raise InputError(f"{file}: not CIFAR-10: {size} bytes are not {wanted} of {RECORD} bytes (truncated?)")
        records = np.fromfile(file, dtype=np.uint8).reshape(-1, RECORD)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None
    if records[:, 0].max() >= CLASSES:
        at = int((records[:, 0] >= CLASSES).argmax())
        raise InputError(f"{file}: not CIFAR-10: record {at} has the label {records[at, 0]}, above {CLASSES - 1}")
    return records
