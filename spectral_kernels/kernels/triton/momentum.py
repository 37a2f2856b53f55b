"""M <- beta M + alpha G and a read of M or its look-ahead, in one pass: the kernels of reads.py with a momentum stage.

Blocks of GROUP < b <= BLOCK_LIMIT columns are read by several programs, of which none may store M before all have read
it: there a pass of step.py goes first. In wide_read.py one program holds the whole block again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contracts import NORMS, STATS
from . import wide_read
from .one_read import BLOCK_LIMIT, GROUP, Momentum, by_columns, form_of
from .places import ANY_FLOAT
from .ragged import table
from .step import momentum_norms_


def _places(M: Sequence[Tensor], G: Sequence[Tensor]) -> tuple[list[int], tuple[int, ...]]:
    """Address, ld and step of every gradient, rows along those of M in memory; its FORM."""
    entries: list[int] = []
    forms: list[int] = []
    for m, g in zip(M, G, strict=True):
        length, ld, step = m.shape[2], g.stride(1), g.stride(2)
        if by_columns(m):
            length, ld, step = m.shape[1], step, ld
        for i in range(m.shape[0]):
            address = g.data_ptr() + i * g.stride(0) * g.element_size()
            entries += (address, ld, step)
            forms.append(form_of(address, length, ld, step))
    return entries, tuple(forms)


def momentum_gram_matvec_(
    M: Sequence[Tensor],
    G: Sequence[Tensor],
    V: Tensor,
    scale: Tensor,
    skip: Tensor | None,
    beta: float,
    alpha: float,
    nesterov: bool,
    update: bool,
    propagate: bool,
    b: int,
    with_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M <- beta M + alpha G, then gram_matvec of M or of the look-ahead; see contracts.py. No host sync."""
    norms = None
    if update and GROUP < b <= BLOCK_LIMIT:
        norms = momentum_norms_(M, G, scale, skip, beta, alpha, nesterov, True, propagate)
        update = False
    mode = 8 + update + 2 * nesterov + 4 * propagate if update or nesterov else 0
    layouts = tuple((m.shape, by_columns(m)) for m in M)
    key = ("gradients", layouts, tuple((g.data_ptr(), g.dtype, g.stride()) for g in G))
    places = table(key, V.device, lambda: _places(M, G))
    element = ANY_FLOAT[G[0].dtype] if G else None
    momentum = Momentum(mode, beta, alpha, element, places.tensor, places.sizes)
    W, S, stats, Y = wide_read.read(M, V, scale, skip, b, True, with_y, momentum)
    if norms is not None:  # what came in before anything counted as zero
        stats[:, STATS["nan"] :] = norms[:, NORMS["nan"] : NORMS["inf"] + 1]
    return W, S, stats, Y


def supports(dtype: torch.dtype, b: int) -> str | None:
    return wide_read.supports(dtype, b)
