"""`explain`: which kernel would serve a call, and why the others would not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .kernels import registry
from .ops import clip
from .ops.arguments import check_int, ragged
from .ops.estimate import BLOCK, tracked

USES = {  # words behind a public function
    "spectral_norm": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "spectral_norm_": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "singular_triplet": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "spectral_bounds": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "stable_rank": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "leading_subspace": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "spectral_clip": ("gram_matvec", "rayleigh_ritz_", "block_krylov"),
    "spectral_step_": (
        *("tracked_step_", "momentum_gram_matvec_", "gram_matvec", "rayleigh_ritz_", "next_block_", "apply_update_"),
        *("momentum_norms_", "clipped_step_", "clip_"),
    ),
}


class Explanation(NamedTuple):
    """What `explain` found; `str()` is for reading."""

    function: str
    matrices: int
    blocks: list[int]  # length of a block's rows per stack: the tracked side
    choices: list[registry.Choice]  # per word: backend chosen, (backend, reason) of those that declined
    columns: int = BLOCK  # of a block
    methods: tuple[str, ...] = ()  # what method="auto" takes, by shorter side, where there is a choice

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.matrices} matrices, blocks of {self.columns} x {sorted(set(self.blocks))}"]
        lines += [f"  {line}" for line in self.methods]
        for choice in self.choices:
            lines.append(f"  {choice.word}: served by {choice.backend}")
            lines += [f"    {backend} declined: {reason}" for backend, reason in choice.declined]
        return "\n".join(lines)


def explain(name: str, A: Tensor | Sequence[Tensor], columns: int = BLOCK) -> Explanation:
    """Which backend would serve `name(A)` now, word by word, and the reason of every backend that declined.

    name: a public function, e.g. "spectral_norm". A: a tensor (..., m, n) or a list, as the function takes it.
    columns: width of the blocks; a step that clips at rank s asks for s + min(s, 16).
    """
    if name not in USES:
        raise ValueError(f"explain knows {', '.join(sorted(USES))}, not {name!r}")
    check_int("columns", columns, 1)
    batch: Any = ragged(A)
    if not batch.stacks:
        return Explanation(name, 0, [], [])
    first = batch.stacks[0]
    choices = [registry.choose(word, first.device.type, first.dtype, columns) for word in USES[name]]
    sides = sorted({min(a.shape[1:]) for a in batch.stacks})
    methods = tuple(map(clip.method_of, sides)) if name == "spectral_clip" else ()
    return Explanation(
        name, sum(a.shape[0] for a in batch.stacks), [tracked(a) for a in batch.stacks], choices, columns, methods
    )
