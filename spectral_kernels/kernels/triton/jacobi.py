"""Eigenvalues and vectors of small symmetric matrices by Jacobi rotations, one program a matrix.

A round turns players / 2 disjoint pairs of columns at once; players - 1 rounds pair every two columns (a round-robin
tournament). All of it is in float64, through memory: a round reads one copy of the matrix and writes the other.
"""

import triton
import triton.language as tl

SWEEPS = tl.constexpr(12)  # at most; four or five do


@triton.jit
def _partner(i, turn, players):
    """Who meets player i in this round: numbers that sum to `turn` modulo players - 1; the last takes who is left."""
    last = players - 1
    p = (turn - i + last) % last
    p = tl.where(p == i, last, p)
    p = tl.where(i == last, (turn * (players // 2)) % last, p)
    return tl.where(i < players, p, i)


@triton.jit
def _rotation(P, i, p, players, ld):
    """New column i = cos (column i) + sin (column p): what makes entry (i, p) zero. Both of a pair see the same."""
    a = tl.where(i < players, i, 0)  # lanes beyond the players look at what is there
    z = tl.where(i < players, p, 0)
    apart = tl.load(P + z * (ld + 1)) - tl.load(P + a * (ld + 1))
    between = 2 * tl.load(P + tl.minimum(a, z) * ld + tl.maximum(a, z))
    length = tl.abs(apart) + tl.sqrt(apart * apart + between * between)
    turns = (p != i) & (between != 0) & (length > 0)  # the square of a tiny `between` may be 0
    t = between / tl.where(turns, length, 1.0)
    t = tl.where((apart > 0) | ((apart == 0) & (i < p)), t, -t)
    cos = tl.rsqrt(1.0 + t * t)
    return tl.where(turns, cos, 1.0), tl.where(turns, -t * cos, 0.0)


@triton.jit
def _round(P, Z, new_P, new_Z, turn, players, ld, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """One round: new_P = J' P J, new_Z = Z J. The rotations, roots and quotients in float64, cost the most: once a
    column, and for the rows of a tile that holds all of them not again."""
    c = tl.arange(0, ORDER)[None, :]
    pc = _partner(c, turn, players)
    cos_c, sin_c = _rotation(P, c, pc, players, ld)
    for start in range(0, players, SLICE):
        r = start + tl.arange(0, SLICE)[:, None]
        if SLICE == ORDER:
            pr, cos_r, sin_r = tl.trans(pc), tl.trans(cos_c), tl.trans(sin_c)
        else:
            pr = _partner(r, turn, players)
            cos_r, sin_r = _rotation(P, r, pr, players, ld)
        keep = (r < players) & (c < players)
        own = cos_c * tl.load(P + r * ld + c, mask=keep, other=0.0)
        own += sin_c * tl.load(P + r * ld + pc, mask=keep, other=0.0)
        other = cos_c * tl.load(P + pr * ld + c, mask=keep, other=0.0)
        other += sin_c * tl.load(P + pr * ld + pc, mask=keep, other=0.0)
        turned = tl.where((c == pr) & (c != r), 0.0, cos_r * own + sin_r * other)
        tl.store(new_P + r * ld + c, turned, mask=keep)
        vectors = cos_c * tl.load(Z + r * ld + c, mask=keep, other=0.0)
        vectors += sin_c * tl.load(Z + r * ld + pc, mask=keep, other=0.0)
        tl.store(new_Z + r * ld + c, vectors, mask=keep)
    tl.debug_barrier()


@triton.jit
def _rest(P, players, ld, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """Sums of squares off the diagonal and of all of P."""
    c = tl.arange(0, ORDER)[None, :]
    off = tl.zeros((SLICE, ORDER), tl.float64)
    whole = tl.zeros((SLICE, ORDER), tl.float64)
    for start in range(0, players, SLICE):
        r = start + tl.arange(0, SLICE)[:, None]
        x = tl.load(P + r * ld + c, mask=(r < players) & (c < players), other=0.0)
        whole += x * x
        off += tl.where(r == c, 0.0, x * x)
    return tl.sum(tl.sum(off, axis=1), axis=0), tl.sum(tl.sum(whole, axis=1), axis=0)


@triton.jit
def jacobi(P, Z, new_P, new_Z, players, ld, REST: tl.constexpr, ORDER: tl.constexpr, SLICE: tl.constexpr):
    """Turn the symmetric P, and Z with it, until the squares off the diagonal are REST of all: where both are then.

    Rows are `ld` apart; players, even, covers what of P is not zero; new_P and new_Z: as much scratch. A SLICE of rows
    of ORDER >= players columns at a time goes through registers.
    """
    off, whole = _rest(P, players, ld, ORDER, SLICE)
    for _ in range(SWEEPS):
        if off > whole * REST:
            for turn in range(0, players - 1):
                _round(P, Z, new_P, new_Z, turn, players, ld, ORDER, SLICE)
                P, new_P = new_P, P
                Z, new_Z = new_Z, Z
            off, whole = _rest(P, players, ld, ORDER, SLICE)
    return P, Z
