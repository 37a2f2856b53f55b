"""`explain`: which kernel would serve a call, and why the others would not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .kernels import contracts_products, registry
from .ops import clip, newton_schulz
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
        *("momentum_norms_", "clipped_step_", "clip_", "multiply_update_", "newton_schulz"),
    ),
    "orthogonalize": ("gram", "square_add", "multiply_add", "newton_schulz"),
}


class Explanation(NamedTuple):
    """What `explain` found; `str()` is for reading."""

    function: str
    matrices: int
    blocks: list[int]  # length of a block's rows per stack: the tracked side; empty where there are no blocks
    choices: list[registry.Choice]  # per word: backend chosen, (backend, reason) of those that declined
    columns: int = BLOCK  # of a block
    methods: tuple[str, ...] = ()  # what method="auto" takes, by size, where there is a choice; dtype of products

    def __str__(self) -> str:
        blocks = f", blocks of {self.columns} x {sorted(set(self.blocks))}" if self.blocks else ""
        lines = [f"{self.function}: {self.matrices} matrices{blocks}", *(f"  {line}" for line in self.methods)]
        for choice in self.choices:
            lines.append(f"  {choice.word}: served by {choice.backend}")
            lines += [f"    {backend} declined: {reason}" for backend, reason in choice.declined]
        return "\n".join(lines)


def explain(name: str, A: Tensor | Sequence[Tensor], columns: int = BLOCK) -> Explanation:
    """Which backend would serve `name(A)` now, word by word, and the reason of every backend that declined.

    name: a public function, e.g. "spectral_norm". A: a tensor (..., m, n) or a list, as the function takes it.
    columns: width of the blocks; a step that clips at rank s asks for s + min(s, 16). Words of orthogonalizations are
    served by the dtype of their products, which is said beside them: that of A, but float32 for half A on CPUs, and
    bfloat16 for a step over float32 A on GPUs.
    """
    if name not in USES:
        raise ValueError(f"explain knows {', '.join(sorted(USES))}, not {name!r}")
    check_int("columns", columns, 1)
    batch: Any = ragged(A)
    if not batch.stacks:
        return Explanation(name, 0, [], [])
    first = batch.stacks[0]
    made = newton_schulz.recipe("polar_express", fast=name == "spectral_step_")
    products = newton_schulz.products_dtype(made, first.dtype, first.device.type)
    choices = [
        registry.choose(word, first.device.type, products, 1)
        if word in contracts_products.WORDS
        else registry.choose(word, first.device.type, first.dtype, columns)
        for word in USES[name]
    ]
    methods: tuple[str, ...] = ()
    if name == "spectral_clip":
        methods = tuple(map(clip.method_of, sorted({min(a.shape[1:]) for a in batch.stacks})))
    elif name == "spectral_step_":
        methods = (f"direction orthogonalize: products in {_short(products)}",)
    elif name == "orthogonalize":
        methods = (f"products in {_short(products)}, divided by the Schatten-4 norm first", *_ways(made, batch.stacks))
    blocks = [] if name == "orthogonalize" else [tracked(a) for a in batch.stacks]
    return Explanation(name, sum(a.shape[0] for a in batch.stacks), blocks, choices, columns, methods)


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _ways(made: newton_schulz.Recipe, stacks: Sequence[Tensor]) -> Iterator[str]:
    """The method of every shape for the default schedule."""
    for shape in sorted({tuple(a.shape[1:]) for a in stacks}):
        x = next(a for a in stacks if tuple(a.shape[1:]) == shape)
        gram, restarts, _ = newton_schulz.way(made, newton_schulz.short_first(x))
        after = f", a new Gram matrix after steps {', '.join(map(str, restarts))}" if restarts else ""
        yield f"{shape[0]} x {shape[1]}: method {'gram' if gram else 'standard'}{after}"
