"""Shapes of real models: (copies, fan_out, fan_in) of every matrix that an optimizer would see."""

from __future__ import annotations

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int, int], ...]

# Radford et al. 2019, 124M: 12 blocks, width 768, fused QKV, tied head
GPT2_SMALL: Shapes = (
    (1, 50257, 768),
    (1, 1024, 768),
    (12, 2304, 768),
    (12, 768, 768),
    (12, 3072, 768),
    (12, 768, 3072),
)

# Llama 3.2 1B: 16 blocks, width 2048, 8 key/value heads of 64, MLP 8192, tied head
LLAMA_1B: Shapes = (
    (1, 128256, 2048),
    (32, 2048, 2048),
    (32, 512, 2048),
    (32, 8192, 2048),
    (16, 2048, 8192),
)

# all-MiniLM-L6-v2: 6 blocks, width 384
MINILM: Shapes = (
    (1, 30522, 384),
    (1, 512, 384),
    (25, 384, 384),
    (6, 1536, 384),
    (6, 384, 1536),
)

MODELS: dict[str, Shapes] = {"gpt2-small": GPT2_SMALL, "llama-1b": LLAMA_1B, "minilm": MINILM}


def elements(shapes: Shapes) -> int:
    return sum(k * m * n for k, m, n in shapes)


def sample(
    shapes: Shapes, *, spikes: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """One stack (k, m, n) per entry: Gaussian entries of variance 1/n (flat spectra, the hardest for an estimator).

    spikes: that many decaying directions on top, as training leaves them: 3, 3/2, 3/3 ... times the bulk's edge.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    stacks = []
    for k, m, n in shapes:
        A = torch.randn(k, m, n, generator=g, dtype=torch.float32, device=device) / n**0.5
        if spikes:
            rank = min(spikes, m, n)
            top = 3 * (1 + (m / n) ** 0.5) / torch.arange(1, rank + 1, dtype=torch.float32, device=device)
            u = torch.randn(k, m, rank, generator=g, dtype=torch.float32, device=device) / m**0.5
            v = torch.randn(k, rank, n, generator=g, dtype=torch.float32, device=device) / n**0.5
            A += (u * top) @ v
        stacks.append(A.to(dtype))
    return stacks
