"""The data of the small training runs: text that comes with Python, and scikit-learn's digits."""

from __future__ import annotations

import importlib.util
import zlib
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Sources of the standard library, 305 KB together, byte for byte the same in CPython 3.11.2, 3.11.7 and 3.12.1; a later
# release may change a line, so results carry `text_crc()`.
SOURCES = ("pickletools", "difflib", "xml.dom.minidom", "optparse")
VOCABULARY = "\n" + "".join(chr(c) for c in range(32, 127))  # whatever the text holds: models have the same shapes
HELD_OUT = 10  # the last tenth of every source, and every tenth image, is for validation


class Split(NamedTuple):
    """Training and validation part: characters (t,) int64; or images (k, 8, 8) float32 and labels (k,) int64."""

    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]


@lru_cache(maxsize=1)
def sources() -> tuple[str, ...]:
    """The texts, tabs and characters outside ASCII as spaces; RuntimeError where an installation has no sources."""
    texts = []
    for name in SOURCES:
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec else None
        text = loader.get_source(name) if loader and hasattr(loader, "get_source") else None
        if not text:
            raise RuntimeError(f"no source of the standard library's {name} here, which is training text")
        texts.append("".join(c if c in VOCABULARY else " " for c in text))
    return tuple(texts)


def text_crc() -> str:
    """Eight hex digits that tell one text from another."""
    return f"{zlib.crc32(''.join(sources()).encode()):08x}"


@lru_cache(maxsize=1)
def characters() -> Split:
    """The text as positions in VOCABULARY."""
    index = {c: i for i, c in enumerate(VOCABULARY)}
    train: list[int] = []
    held: list[int] = []
    for text in sources():
        codes = [index[c] for c in text]
        cut = len(codes) - len(codes) // HELD_OUT
        train += codes[:cut]
        held += codes[cut:]
    return Split((torch.tensor(train),), (torch.tensor(held),))


@lru_cache(maxsize=1)
def digits() -> Split:
    """1,797 images of handwritten digits, 8 x 8, mean 0 and variance 1 over all pixels; needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'spectral-kernels[paper]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float()
    labels = torch.from_numpy(found.target).long()
    images = (images - images.mean()) / images.std()
    held = torch.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
    return Split((images[~held], labels[~held]), (images[held], labels[held]))
