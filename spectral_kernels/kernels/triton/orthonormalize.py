"""The next block of one matrix, by one program: W (b, n) = C Q + R'X with Q, X orthonormal together.

W <- W - (W Q') Q, twice, a few rows of Q at a time; then row by row against the rows before, twice
once more, both, where a row kept less than a quarter of its length: what is left of it may lie in the basis
a row with at most 8 eps max(theta, longest row of W) left becomes a zero row, zero in R
"""

import triton
import triton.language as tl

EPS = tl.constexpr(2.0**-23)
COLLINEAR = tl.constexpr(1 / 16)  # the square of that quarter


@triton.jit
def _composed(r, R, B: tl.constexpr):
    """r R, of (1, B, B): the coefficients after one more round."""
    total = tl.zeros((1, B, B), tl.float64)
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    for k in range(B):
        left = tl.sum(tl.where(j == k, r, 0.0), axis=2, keep_dims=True)  # (1, B, 1)
        total += left * tl.sum(tl.where(i == k, R, 0.0), axis=1, keep_dims=True)
    return total


@triton.jit
def _least(R, floor, B: tl.constexpr):
    """(1, B, 1): how long a row that was already scaled by 1 / R_cc must stay."""
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    scale = tl.sum(tl.where(i == j, R, 0.0), axis=2, keep_dims=True)
    return floor / tl.where(scale > 0, scale, 1.0)


@triton.jit
def _within(X, least, B: tl.constexpr):
    """Gram-Schmidt of the rows of X (1, B, COLS), in place, each twice against those before: X, R (1, B, B) with
    X before = R'X after, and whether a row lost most of itself: what is left of that may lie in the basis."""
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    R = tl.zeros((1, B, B), tl.float64)
    again = 0
    for c in range(B):
        w = tl.sum(tl.where(i == c, X, 0.0), axis=1, keep_dims=True)  # (1, 1, COLS)
        before = tl.sum(tl.sum(tl.sum(w * w, axis=2), axis=1), axis=0)
        for _ in range(2):
            h = tl.where(i < c, tl.sum(w * X, axis=2, keep_dims=True), 0.0)  # (1, B, 1)
            w -= tl.sum(h * X, axis=1, keep_dims=True)
            R += tl.where(j == c, h.to(tl.float64), 0.0)
        square = w.to(tl.float64)
        square = tl.sum(tl.sum(tl.sum(square * square, axis=2), axis=1), axis=0)
        norm = tl.sqrt(square)
        kept = norm > tl.sum(tl.sum(tl.sum(tl.where(i == c, least, 0.0), axis=2), axis=1), axis=0)
        inverse = tl.where(kept, 1.0 / tl.where(kept, norm, 1.0), 0.0).to(tl.float32)
        X = tl.where(i == c, tl.where(kept, w * inverse, 0.0), X)
        R += tl.where((i == c) & (j == c), tl.where(kept, norm, 0.0), 0.0)
        again = tl.maximum(again, (kept & (square < before * COLLINEAR)).to(tl.int32))
    return X, R, again


@triton.jit
def orthonormalize(q, w, v, n, K, b, floor, B: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """X and R of a block whose rows fit in registers; X goes to rows [K, K + b) of Q and to V."""
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    c = tl.arange(0, COLS)[None, None, :]
    keep = (i < b) & (c < n)
    X = tl.load(w + i * n + c, mask=keep, other=0.0)
    longest = tl.max(tl.max(tl.sum(X * X, axis=2), axis=1), axis=0)
    floor = tl.maximum(floor, tl.sqrt(longest.to(tl.float64)) * (8 * EPS))
    R = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    again = 1
    for _ in range(2):
        if again != 0:
            for _sweep in range(2):
                for start in range(0, K, ROWS):
                    k = start + tl.arange(0, ROWS)[:, None, None]
                    rows = tl.load(q + k.to(tl.int64) * n + c, mask=(k < K) & (c < n), other=0.0)  # (ROWS, 1, COLS)
                    h = tl.sum(rows * X, axis=2, keep_dims=True)  # (ROWS, B, 1)
                    X -= tl.sum(rows * h, axis=0, keep_dims=True)
            X, r, again = _within(X, _least(R, floor, B), B)
            R = _composed(r, R, B)
    tl.store(q + K.to(tl.int64) * n + i * n + c, X, mask=keep)
    tl.store(v + i * n + c, X, mask=keep)
    return R


@triton.jit
def _within_long(x, n, b, least, B: tl.constexpr, COLS: tl.constexpr):
    """`_within` for rows in memory; barriers where threads read others' stores."""
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    R = tl.zeros((1, B, B), tl.float64)
    again = 0
    for row in range(0, b):
        before = tl.zeros((1, 1, 1), tl.float64)
        square = tl.zeros((1, 1, 1), tl.float64)
        for _ in range(2):
            h = tl.zeros((1, B, 1), tl.float32)
            for first in range(0, n, COLS):
                c = first + tl.arange(0, COLS)[None, None, :]
                X = tl.load(x + i * n + c, mask=(i <= row) & (c < n), other=0.0)
                h += tl.sum(tl.sum(tl.where(i == row, X, 0.0), axis=1, keep_dims=True) * X, axis=2, keep_dims=True)
            before = tl.maximum(before, tl.sum(tl.where(i == row, h, 0.0), axis=1, keep_dims=True).to(tl.float64))
            h = tl.where(i < row, h, 0.0)
            R += tl.where(j == row, h.to(tl.float64), 0.0)
            tl.debug_barrier()
            square = tl.zeros((1, 1, 1), tl.float64)
            for first in range(0, n, COLS):
                c = first + tl.arange(0, COLS)[None, None, :]
                X = tl.load(x + i * n + c, mask=(i <= row) & (c < n), other=0.0)
                X = tl.where(i == row, X, 0.0) - tl.where(i == row, tl.sum(h * X, axis=1, keep_dims=True), 0.0)
                tl.store(x + i * n + c, X, mask=(i == row) & (c < n))
                X = tl.sum(X, axis=1, keep_dims=True).to(tl.float64)
                square += tl.sum(X * X, axis=2, keep_dims=True)
            tl.debug_barrier()
        norm = tl.sqrt(square)
        kept = norm > tl.sum(tl.where(i == row, least, 0.0), axis=1, keep_dims=True)  # (1, 1, 1)
        inverse = tl.where(kept, 1.0 / tl.where(kept, norm, 1.0), 0.0).to(tl.float32)
        R += tl.where((i == row) & (j == row), tl.where(kept, norm, 0.0), 0.0)
        lost = (kept & (square < before * COLLINEAR)).to(tl.int32)
        again = tl.maximum(again, tl.max(tl.max(tl.max(lost, axis=2), axis=1), axis=0))
        for first in range(0, n, COLS):
            c = first + tl.arange(0, COLS)[None, None, :]
            X = tl.load(x + row * n + c, mask=c < n, other=0.0)
            tl.store(x + row * n + c, tl.where(kept, X * inverse, 0.0), mask=c < n)
        tl.debug_barrier()
    return R, again


@triton.jit
def orthonormalize_long(q, w, v, n, K, b, floor, B: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`orthonormalize` for longer rows, in place in rows [K, K + b) of Q."""
    i = tl.arange(0, B)[None, :, None]
    j = tl.arange(0, B)[None, None, :]
    x = q + K.to(tl.int64) * n
    longest = tl.zeros((1, B), tl.float32)
    for first in range(0, n, COLS):
        c = first + tl.arange(0, COLS)[None, None, :]
        X = tl.load(w + i * n + c, mask=(i < b) & (c < n), other=0.0)
        longest += tl.sum(X * X, axis=2)
        tl.store(x + i * n + c, X, mask=(i < b) & (c < n))
    tl.debug_barrier()
    floor = tl.maximum(floor, tl.sqrt(tl.max(tl.max(longest, axis=1), axis=0).to(tl.float64)) * (8 * EPS))
    R = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    again = 1
    for _ in range(2):
        if again != 0:
            for _sweep in range(2):
                for start in range(0, K, ROWS):
                    k = start + tl.arange(0, ROWS)[:, None, None]
                    h = tl.zeros((ROWS, B, 1), tl.float32)
                    for first in range(0, n, COLS):
                        c = first + tl.arange(0, COLS)[None, None, :]
                        rows = tl.load(q + k.to(tl.int64) * n + c, mask=(k < K) & (c < n), other=0.0)
                        X = tl.load(x + i * n + c, mask=(i < b) & (c < n), other=0.0)
                        h += tl.sum(rows * X, axis=2, keep_dims=True)
                    tl.debug_barrier()
                    for first in range(0, n, COLS):
                        c = first + tl.arange(0, COLS)[None, None, :]
                        rows = tl.load(q + k.to(tl.int64) * n + c, mask=(k < K) & (c < n), other=0.0)
                        X = tl.load(x + i * n + c, mask=(i < b) & (c < n), other=0.0)
                        X -= tl.sum(rows * h, axis=0, keep_dims=True)
                        tl.store(x + i * n + c, X, mask=(i < b) & (c < n))
                    tl.debug_barrier()
            r, again = _within_long(x, n, b, _least(R, floor, B), B, COLS)
            R = _composed(r, R, B)
    for first in range(0, n, COLS):
        c = first + tl.arange(0, COLS)[None, None, :]
        keep = (i < b) & (c < n)
        tl.store(v + i * n + c, tl.load(x + i * n + c, mask=keep, other=0.0), mask=keep)
    return R
