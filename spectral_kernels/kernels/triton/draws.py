"""The draws of random.py in kernels: number `at` of a draw is a function of its key and of `at` alone."""

import triton
import triton.language as tl

from .. import random

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
C1 = tl.constexpr(0xBF58476D1CE4E5B9)
C2 = tl.constexpr(0x94D049BB133111EB)


def signed_base(seed: int, m: int, n: int) -> int:
    """`random.base` as an int64 of a table."""
    base = random.base(seed, m, n)
    return base - (1 << 64) if base >> 63 else base


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * C1
    z = (z ^ (z >> 27)) * C2
    return z ^ (z >> 31)


@triton.jit
def draw_key(base, step):
    """The key of a block's random rows: those of random.py at 2 + step; both arguments are int64 tensors."""
    return _mix((base + step + 2).to(tl.uint64))


@triton.jit
def normal(key, at):
    """Number `at` of a draw: random.py. Angles are reduced to an eighth of a turn; the series err by 2e-9 there."""
    z = _mix((at >> 1).to(tl.uint64) * GOLDEN + key)
    radius = tl.sqrt(-2.0 * tl.log(((z >> 32).to(tl.float64) + 0.5) * 2.0**-32)).to(tl.float32)
    a = z.to(tl.uint32).to(tl.int64)
    quarter = (a + (1 << 29)) >> 30
    x = (((a - (quarter << 30)).to(tl.float64) + 0.5) * (6.283185307179586 * 2.0**-32)).to(tl.float32)
    s = x * x
    sine = x * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 - s * (1 / 3628800)))))
    quarter = (quarter + 3 * (at & 1)) & 3  # an odd number is the sine: the cosine of a quarter turn less
    value = tl.where((quarter & 1) == 0, cosine, sine)
    return radius * tl.where((quarter == 1) | (quarter == 2), -value, value)
