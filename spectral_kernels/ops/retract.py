"""Weights set back to a spectral norm after a step, their norms followed by blocks of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import scaling
from ..kernels.contracts import INFO
from .estimate import BLOCK, estimate, tracked
from .layout import Layout

COLD_READS = 16
WARM_READS = 3


def retract_(weights: Sequence[tuple[Tensor, dict[str, Any], Layout, str | float]], seed: int = 0) -> None:
    """Set every matrix of every weight to ||W||_2 = its target, in place, without a host synchronization.

    weights: (weight, state, layout, target), target a number or a rule of shapes (a kernel position of a convolution
    gets its share). state["weight_block"] is kept between calls: 16 reads without it, 3 with it, beside as many
    random directions. Zero matrices and those with non-finite entries stay.
    """
    lists: dict[tuple[Any, ...], list[tuple[int, list[Tensor]]]] = {}
    copies = []
    for i, (weight, state, layout, _) in enumerate(weights):
        key = (weight.dtype, weight.device, "weight_block" in state)
        own = weight.detach()
        whole = layout.dense(own)
        if whole is not own:
            copies.append((own, whole))
        lists.setdefault(key, []).append((i, layout.stacks(whole)))
    with torch.no_grad():
        for (*_, warm), members in lists.items():
            _retract_list(weights, members, warm, seed)
        for strided, dense in copies:
            strided.copy_(dense)


def _retract_list(
    weights: Sequence[tuple[Tensor, dict[str, Any], Layout, str | float]],
    members: Sequence[tuple[int, list[Tensor]]],
    warm: bool,
    seed: int,
) -> None:
    stacks = [s for _, views in members for s in views]
    sizes = [s.shape[0] * BLOCK * tracked(s) for s in stacks]
    start = None
    if warm:
        flat = torch.cat([weights[i][1]["weight_block"].reshape(-1) for i, _ in members])
        start = [part.view(s.shape[0], BLOCK, tracked(s)) for part, s in zip(flat.split(sizes), stacks, strict=True)]
    found = estimate(stacks, steps=WARM_READS if warm else COLD_READS, V0=start, vectors=BLOCK, seed=seed)
    norm = found.info[:, INFO["sigma"]]
    usable = torch.isfinite(norm) & (norm > 0)
    wanted, first = [], 0
    for i, views in members:
        _, _, layout, target = weights[i]
        for s, goal in zip(views, _targets(weights[i][0], layout, target), strict=True):
            wanted.append(torch.full((s.shape[0],), goal, dtype=torch.float64, device=norm.device))
    factor = torch.where(usable, torch.cat(wanted) / torch.where(usable, norm, 1), 1)
    for s in stacks:
        s.mul_(factor[first : first + s.shape[0], None, None].to(found.X.dtype))
        first += s.shape[0]
    offset = 0
    blocks = found.X.split(sizes)
    for i, views in members:
        mine = blocks[offset : offset + len(views)]
        offset += len(views)
        state = weights[i][1]
        if warm:  # in place: a captured step reads what its replays wrote
            state["weight_block"].copy_(torch.cat(mine))
        else:
            state["weight_block"] = torch.cat(mine)


def _targets(weight: Tensor, layout: Layout, target: str | float) -> list[float]:
    if isinstance(target, str):
        return layout.factors(weight.shape, target)
    return [scaling.target(target, m, n) for _, m, n in layout.sides(weight.shape)]
