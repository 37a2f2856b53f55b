"""Which kernel serves which word. A backend is a table that fills the vocabulary; a kernel declines in words.

`words(device_type, dtype, b)` resolves the vocabulary once for a call: the first backend, in the order of the
device, whose `supports` returns None. `force` and SPECTRAL_KERNELS_BACKEND insist on one backend and raise its own
reason where it declines.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

from . import (
    composites,
    composites_products,
    composites_step,
    contracts_products,
    reference,
    reference_clip,
    reference_products,
    reference_step,
)

WORDS = (
    "gram_matvec",
    "rayleigh_ritz_",
    "block_krylov",
    "momentum_gram_matvec_",
    "momentum_norms_",
    "apply_update_",
    "next_block_",
    "tracked_step_",
    "clip_",
    "clipped_step_",
    *contracts_products.WORDS,
)
# word -> (its default over the other words, the word that reads the matrices)
COMPOSITES: dict[str, tuple[Callable[..., Any], str]] = {
    "block_krylov": (composites.block_krylov, "gram_matvec"),
    "tracked_step_": (composites_step.tracked_step_, "momentum_gram_matvec_"),
    "clipped_step_": (composites_step.clipped_step_, "momentum_gram_matvec_"),
    "newton_schulz": (composites_products.newton_schulz, "gram"),
}
SHORT_CUTS = ("krylov_norm",)  # a backend that serves block_krylov itself may add one
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT = "SPECTRAL_KERNELS_BACKEND"

# The environment is read once: a look-up on every call would cost as much as a small norm.
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "spectral_kernels_backend", default=os.environ.get(ENVIRONMENT) or None
)


class BackendUnavailable(RuntimeError):
    """A backend was insisted on and cannot serve; the message holds its own reason."""


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of one word."""

    word: str
    backend: str
    fn: Callable[..., Any] | None
    supports: Callable[[str, str, torch.dtype, int], str | None]
    column_limit: int | None = None  # rayleigh_ritz_, next_block_: most basis columns and ranks served, None: any
    rank_limit: int | None = None


@dataclass(frozen=True)
class Choice:
    """How a word is served: the backend chosen, and why the ones before it in the order were not."""

    word: str
    backend: str
    fn: Callable[..., Any]
    declined: tuple[tuple[str, str], ...] = field(default=())


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, Kernel]]:
    """word -> backend -> Kernel, for every backend that knows the word."""
    rows: dict[str, dict[str, Kernel]] = {word: {} for word in (*WORDS, *SHORT_CUTS)}
    modules = (
        ("cpu", importlib.import_module(".cpu", __package__)),
        ("cpu", importlib.import_module(".cpu_products", __package__)),
        ("triton", importlib.import_module(".triton", __package__)),
        ("reference", reference),
        ("reference", reference_step),
        ("reference", reference_clip),
        ("reference", reference_products),
    )
    for backend, module in modules:
        for word in (*WORDS, *SHORT_CUTS):
            fn = getattr(module, word, None)
            if fn is not None and fn.__module__.startswith(module.__name__):
                limits = (getattr(module, name, None) for name in ("column_limit", "rank_limit"))
                rows[word][backend] = Kernel(word, backend, fn, module.supports, *limits)
    return rows


def forced() -> str | None:
    """The backend insisted on, if any."""
    name = _forced.get()
    if name is not None:
        _check_backend(name)
    return name


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")


@contextlib.contextmanager
def force(backend: str) -> Iterator[None]:
    """Insist on one backend inside the block: `with force("reference"): ...`. Raises where it cannot serve."""
    _check_backend(backend)
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(word: str, device_type: str, dtype: torch.dtype, b: int) -> Choice:
    return _choose(word, device_type, dtype, b, forced())


@lru_cache(maxsize=1024)
def _choose(word: str, device_type: str, dtype: torch.dtype, b: int, insist: str | None) -> Choice:
    order = (insist,) if insist else ORDER.get(device_type, ("reference",))
    rows = table()[word]
    declined: list[tuple[str, str]] = []
    for backend in order:
        kernel = rows.get(backend)
        if kernel is None or kernel.fn is None:
            reason: str | None = f"has no {word} kernel"
        else:
            reason = kernel.supports(word, device_type, dtype, b)
        if reason is None:
            assert kernel is not None and kernel.fn is not None
            return Choice(word, backend, kernel.fn, tuple(declined))
        declined.append((backend, reason))
    if word in COMPOSITES:  # its default runs over whatever serves the other words
        default, reader = COMPOSITES[word]
        words = Words(device_type, dtype, b, insist)
        return Choice(word, words.choice(reader).backend, partial(default, words), tuple(declined))
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in declined)
    raise BackendUnavailable(f"no backend serves {word} for {dtype} on {device_type}: {reasons}")


class Words:
    """The vocabulary for one device type, dtype and block width: `words.gram_matvec(...)`."""

    def __init__(self, device_type: str, dtype: torch.dtype, b: int, insist: str | None = None) -> None:
        self._args = (device_type, dtype, b, insist)

    def choice(self, word: str) -> Choice:
        return _choose(word, *self._args)

    def rayleigh_ritz_for(self, columns: int, rank: int) -> Callable[..., Any]:
        """rayleigh_ritz_ of the first backend that serves a basis of so many columns and this rank."""
        return self._within("rayleigh_ritz_", columns, rank)

    def next_block_for(self, rows: int) -> Callable[..., Any]:
        """next_block_ of the first backend that serves a basis of so many rows, the next block included."""
        return self._within("next_block_", rows)

    def _within(self, word: str, columns: int, rank: int = 0) -> Callable[..., Any]:
        """The chosen kernel, or the reference beyond its limits."""
        chosen, rows = self.choice(word), table()[word]
        kernel = rows[chosen.backend]
        limits = ((kernel.column_limit, columns), (kernel.rank_limit, rank))
        if any(limit is not None and wanted > limit for limit, wanted in limits):
            return rows["reference"].fn  # type: ignore[return-value]
        return chosen.fn

    def __getattr__(self, word: str) -> Callable[..., Any]:
        if word not in WORDS:
            raise AttributeError(word)
        fn = self.choice(word).fn
        setattr(self, word, fn)
        return fn


@lru_cache(maxsize=1024)
def _words(device_type: str, dtype: torch.dtype, b: int, insist: str | None) -> Words:
    return Words(device_type, dtype, b, insist)


def words(device_type: str, dtype: torch.dtype, b: int) -> Words:
    return _words(device_type, dtype, b, forced())


@lru_cache(maxsize=1024)
def _short_cut(word: str, of: str, device_type: str, dtype: torch.dtype, b: int, insist: str | None) -> Any:
    choice = _choose(of, device_type, dtype, b, insist)
    own = table()[of].get(choice.backend)
    row = table()[word].get(choice.backend)
    return row.fn if row is not None and own is not None and own.fn is choice.fn else None


def short_cut(word: str, of: str, device_type: str, dtype: torch.dtype, b: int) -> Callable[..., Any] | None:
    """The short cut `word` of the backend that serves the composite `of`, or None."""
    return _short_cut(word, of, device_type, dtype, b, forced())
