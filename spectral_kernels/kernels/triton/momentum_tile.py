"""One tile of a matrix as a read sees it: its entries, or the momentum M <- beta M + alpha G and its look-ahead."""

import triton
import triton.language as tl

# FORM: 0 step 1 and everything in multiples of 4 entries, so that loads are wide; 1 step 1; 2 any step
# MOMENTUM: 0 none; 8 + 1 M is updated + 2 look-ahead + 4 what is not finite propagates. `places`: address, ld and step
# of every gradient


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def moved(m, g, beta, alpha, ELEMENT: tl.constexpr, UPDATE: tl.constexpr, AHEAD: tl.constexpr, PROPAGATE: tl.constexpr):
    """(x to read, m to store, 1 for NaN + 2 for inf) of a tile; m and g in float32.

    beta x + (alpha g) is one fma and one product however this is compiled: a second read sees the same x."""
    usable = g
    if not PROPAGATE:
        usable = tl.where(finite(g), g, 0.0)
    step = alpha * usable
    raw = m
    stored = m.to(ELEMENT)
    if UPDATE:
        m = tl.fma(m, tl.zeros_like(m) + beta, step)
        raw = tl.where(finite(g), m, g)
        if not PROPAGATE:
            m = tl.where(finite(m), m, 0.0)
        stored = m.to(ELEMENT)
        m = stored.to(tl.float32)
        raw = tl.where(finite(m), raw, m)  # a half-precision one may overflow by rounding
        if not PROPAGATE:
            m = tl.where(finite(m), m, 0.0)
            stored = m.to(ELEMENT)
    x = m
    if AHEAD:
        x = tl.fma(m, tl.zeros_like(m) + beta, step)
        raw = tl.where(finite(x), raw, x)
        if not PROPAGATE:
            x = tl.where(finite(x), x, 0.0)
    return x, stored, (raw != raw).to(tl.int32) + 2 * (tl.abs(raw) == float("inf")).to(tl.int32)


@triton.jit
def gradient(places, j, GRADIENT: tl.constexpr, FORM: tl.constexpr, MOMENTUM: tl.constexpr):
    """(address, ld, step) of G; without it what no one looks at."""
    if MOMENTUM == 0:
        return places, j, j
    else:
        base = tl.load(places + 3 * j).to(tl.pointer_type(GRADIENT))
        ld = tl.load(places + 3 * j + 1)
        if FORM == 0:
            base = tl.multiple_of(base, 16)
            ld = tl.multiple_of(ld, 4)
        return base, ld, tl.load(places + 3 * j + 2)


@triton.jit
def load(
    here, c, step, there, g_step, keep, flags, beta, alpha,
    ELEMENT: tl.constexpr, FORM: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Entries c of rows that begin at `here`, zeros where not `keep`, or X in their place; and the flags so far."""
    if FORM == 2:
        here += c.to(tl.int64) * step
    else:
        here += c
    x = tl.load(here, mask=keep, other=0.0).to(tl.float32)
    if MOMENTUM != 0:
        if FORM == 2:
            there += c.to(tl.int64) * g_step
        else:
            there += c
        g = tl.load(there, mask=keep, other=0.0).to(tl.float32)
        UPDATE: tl.constexpr = MOMENTUM % 2 == 1
        AHEAD: tl.constexpr = MOMENTUM // 2 % 2 == 1
        PROPAGATE: tl.constexpr = MOMENTUM // 4 % 2 == 1
        x, stored, code = moved(x, g, beta, alpha, ELEMENT, UPDATE, AHEAD, PROPAGATE)
        if UPDATE:
            tl.store(here, stored, mask=keep)
        flags = flags | code
    return x, flags
