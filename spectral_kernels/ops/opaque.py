"""What the opaque ops of stacks of matrices share: their gradients, and torch.vmap over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def gradients(ctx: Any, grads: list[Tensor | None], backward: Callable[..., list[Tensor]], *options: Any) -> list[Any]:
    """backward(stacks, their gradients, *options) for the saved stacks that want one; None for the others."""
    stacks = list(ctx.saved_tensors)
    wanted = [i for i, (a, h) in enumerate(zip(stacks, grads, strict=True)) if h is not None and a.requires_grad]
    found: list[Any] = [None] * len(stacks)
    if wanted:
        pulled = backward([stacks[i] for i in wanted], [grads[i] for i in wanted], *options)
        for i, g in zip(wanted, pulled, strict=True):
            found[i] = g
    return found


def refusal(name: str) -> Callable[..., Any]:
    """The backward of a backward."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: its gradient is not differentiable again (double backward)")

    return refuse


def mapped_first(info: Any, in_dims: Any, stacks: list[Tensor], name: str) -> list[Tensor]:
    """Stacks of a vmapped call with the mapped dimension first, (B, k, m, n)."""
    if len(stacks) != 1:
        raise NotImplementedError(f"torch.vmap over {name} takes a tensor, not a list: pass the list directly")
    A, dim = stacks[0], in_dims[0]
    return [A.unsqueeze(0).expand(info.batch_size, *A.shape) if dim is None else A.movedim(dim, 0)]
