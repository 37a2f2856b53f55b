"""The small algebra of one block Krylov step, one program per matrix, one launch.

    W = Q'Q W + R'X            orthonormalize.py
    T_K = T with Y'Y as its last diagonal block (K = columns + b);   its leading pairs (theta_p, z_p), p <= rank
    rho_p = ||A'A Q z_p - theta_p Q z_p|| / theta_1 = ||(R z_p[last block], T z_p - theta_p z_p)|| / theta_1
    error = max_p 0.5 rho_p^2 / ((theta_p - theta_(rank+1)) / theta_1 + rho_p)

The pairs come from repeated squaring: M = T^(2^20) / trace is theta_1's projector up to eigenvalues closer than 2^-20,
and a component at relative distance d leaves d exp(-2^20 d) <= 4e-7 in the residual, whatever the spectrum. Squaring is
in float32 (noise of the same size); the vector is polished by power steps with T in float64, theta is its float64
Rayleigh quotient, hence a lower bound, and what is left of its own residual is counted in rho. The next pair is that of
T - theta z z'.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contracts import INFO_COLUMNS
from .orthonormalize import EPS, orthonormalize, orthonormalize_long
from .ragged import on, table

POWER_STEPS = tl.constexpr(8)
INFO_FIELDS = tl.constexpr(INFO_COLUMNS)


@triton.jit
def _projected(P, t, s, columns, K, b, order, ORDER: tl.constexpr):
    """P (ORDER, ORDER) := T_K, zero beyond: what T holds, with (S + S') / 2 as its last diagonal block."""
    c = tl.arange(0, ORDER)[None, :]
    for start in range(0, ORDER, 16):
        r = start + tl.arange(0, 16)[:, None]
        inside = (r < K) & (c < K)
        last = inside & (r >= columns) & (c >= columns)
        old = tl.load(t + r * order + c, mask=inside & ((r < columns) | (c < columns)), other=0.0)
        upper = tl.load(s + (r - columns) * b + c - columns, mask=last, other=0.0)
        lower = tl.load(s + (c - columns) * b + r - columns, mask=last, other=0.0)
        tl.store(P + r * ORDER + c, old + 0.5 * (upper + lower))
    tl.debug_barrier()


@triton.jit
def _times(P, z, across, ORDER: tl.constexpr):
    """P z (1, ORDER) for a symmetric P; `across` is z, which goes to memory to be read along the rows of P."""
    c = tl.arange(0, ORDER)[None, :]
    tl.debug_barrier()
    tl.store(z + c, across)
    tl.debug_barrier()
    product = tl.zeros((1, ORDER), tl.float64)
    for start in range(0, ORDER, 16):
        r = start + tl.arange(0, 16)[:, None]
        product += tl.sum(tl.load(P + r * ORDER + c) * tl.load(z + r), axis=0, keep_dims=True)
    return product


@triton.jit
def _pair(P, z, M, ORDER: tl.constexpr, SLICE: tl.constexpr, SQUARINGS: tl.constexpr, PRECISION: tl.constexpr):
    """Leading pair of the symmetric (ORDER, ORDER) float64 matrix P: theta and ||P z - theta z||^2, z in memory;
    P becomes P - theta z z'. M: float32 scratch for two such matrices."""
    c = tl.arange(0, ORDER)[None, :]
    d = tl.arange(0, ORDER)
    trace = tl.sum(tl.load(P + d * (ORDER + 1)), axis=0)
    inverse = 1.0 / tl.where(trace > 0, trace, 1.0)
    for start in range(0, ORDER, 16):
        at = (start + tl.arange(0, 16)[:, None]) * ORDER + c
        tl.store(M + at, (tl.load(P + at) * inverse).to(tl.float32))
    source = M
    target = M + ORDER * ORDER
    factor = 1.0
    for _ in range(SQUARINGS):  # target = (factor source)^2; factor brings the trace back to 1
        tl.debug_barrier()
        part = 0.0
        for start in range(0, ORDER, SLICE):
            r = start + tl.arange(0, SLICE)[:, None]
            product = tl.zeros((SLICE, ORDER), tl.float32)
            for middle in range(0, ORDER, 16):
                left = tl.load(source + r * ORDER + middle + tl.arange(0, 16)[None, :])
                right = tl.load(source + (middle + tl.arange(0, 16)[:, None]) * ORDER + c)
                product = tl.dot(left, right, product, input_precision=PRECISION, out_dtype=tl.float32)
            product = product * (factor * factor)
            part += tl.sum(tl.sum(tl.where(r == c, product, 0.0), axis=1), axis=0)
            tl.store(target + r * ORDER + c, product)
        factor = 1.0 / tl.where(part > 0, part, 1.0)
        source, target = target, source
    tl.debug_barrier()
    diagonal = tl.load(source + d * (ORDER + 1))  # z_i^2: the row with the largest lies along z
    which = tl.min(tl.where(diagonal == tl.max(diagonal, axis=0), d, ORDER - 1), axis=0)
    across = tl.load(source + which * ORDER + c).to(tl.float64)
    theta = tl.sum(tl.sum(across, axis=1), axis=0) * 0.0
    inner = theta
    for _ in range(POWER_STEPS + 1):
        square = tl.sum(tl.sum(across * across, axis=1), axis=0)
        across = across * (1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)))
        product = _times(P, z, across, ORDER)
        theta = tl.sum(tl.sum(across * product, axis=1), axis=0)
        rest = product - theta * across
        inner = tl.sum(tl.sum(rest * rest, axis=1), axis=0)
        across = product
    tl.debug_barrier()
    for start in range(0, ORDER, 16):
        r = start + tl.arange(0, 16)[:, None]
        at = P + r * ORDER + c
        tl.store(at, tl.load(at) - theta * tl.load(z + r) * tl.load(z + c))
    tl.debug_barrier()
    return theta, inner


@triton.jit(do_not_specialize=[
    "table", "Q", "V", "T", "info", "W", "S", "scale", "Z", "M", "b", "columns", "order", "rank", "tol", "min_reads",
])  # fmt: skip
def step_kernel(
    table, Q, V, T, info, W, S, scale, Z, M, b, columns, order, rank, tol, min_reads,
    ORDER: tl.constexpr, B: tl.constexpr, SLICE: tl.constexpr, SQUARINGS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one matrix. `order`: rows of T and of Q; ORDER: the power of two that holds K = columns + b."""
    j = tl.program_id(0).to(tl.int64)
    row = info + j * INFO_FIELDS
    if tl.load(row + 5) == 0:
        n = tl.load(table + 2 * j).to(tl.int32)
        offset = tl.load(table + 2 * j + 1)
        q = Q + offset * order
        v = V + offset * b
        w = W + offset * b
        t = T + j * order * order
        s = S + j * b * b
        K = columns + b
        d = tl.arange(0, ORDER)
        diagonal = tl.load(t + d * (order + 1), mask=d < columns, other=0.0)
        diagonal += tl.load(s + (d - columns) * (b + 1), mask=(d >= columns) & (d < K), other=0.0)
        floor = tl.max(diagonal, axis=0) * (8 * EPS)
        if n <= 512:
            R = orthonormalize(q, w, v, n, K, b, floor, B, 32 // B, 512)
        elif n <= 16384 // B:
            R = orthonormalize(q, w, v, n, K, b, floor, B, 1, 16384 // B)
        else:
            R = orthonormalize_long(q, w, v, n, K, b, floor, B, 4, 4096 // B)

        last = tl.arange(0, B)[None, None, :]
        P = Z + j * (ORDER + 1) * ORDER  # scratch: T without the pairs found, and the last pair's vector
        z = P + ORDER * ORDER
        _projected(P, t, s, columns, K, b, order, ORDER)
        p16 = tl.arange(0, 16)
        thetas = tl.zeros((16,), tl.float64)
        squares = tl.zeros((16,), tl.float64)
        pairs = tl.minimum(rank, K)
        for p in range(0, pairs + 1):
            if p < K:
                theta, inner = _pair(P, z, M + j * 2 * ORDER * ORDER, ORDER, SLICE, SQUARINGS, PRECISION)
                end = tl.load(z + columns + last, mask=last < b, other=0.0)
                outer = tl.sum(R * end, axis=2, keep_dims=True)  # (1, B, 1)
                outer = tl.sum(tl.sum(tl.sum(outer * outer, axis=2), axis=1), axis=0)
                thetas = tl.where(p16 == p, theta, thetas)
                squares = tl.where(p16 == p, inner + outer, squares)

        theta = tl.maximum(tl.sum(tl.where(p16 == 0, thetas, 0.0), axis=0), 0.0)
        safe = tl.where(theta > 0, theta, 1.0)
        below = tl.sum(tl.where(p16 == pairs, thetas, 0.0), axis=0)
        gap = tl.maximum((thetas - below) / safe, 0.0)
        residual = tl.sqrt(squares) / safe
        near = gap + residual
        error = tl.where(residual > 0, 0.5 * residual * residual / tl.where(near > 0, near, 1.0), 0.0)
        error = tl.max(tl.where(p16 < pairs, error, 0.0), axis=0)
        rho = tl.sum(tl.where(p16 == 0, residual, 0.0), axis=0)
        x = tl.arange(0, B)[None, :, None]
        y = tl.arange(0, B)[None, None, :]
        fresh = tl.max(tl.max(tl.max(tl.where(x == y, R, 0.0), axis=2), axis=1), axis=0)
        corner = 0.5 * (
            tl.load(s + x * b + y, mask=(x < b) & (y < b), other=0.0)
            + tl.load(s + y * b + x, mask=(x < b) & (y < b), other=0.0)
        )
        diagonal = tl.where(d < columns, diagonal, 0.0)
        trace = tl.sum(diagonal, axis=0) + tl.sum(tl.sum(tl.sum(tl.where(x == y, corner, 0.0), axis=2), axis=1), axis=0)
        hidden = tl.load(row + 8) - trace > 0.5 * theta
        enough = K >= b * (min_reads + hidden.to(tl.int32))
        done = (theta <= 0) | (enough & (10 * error <= tol) & (tol > 0)) | (K >= n) | (fresh <= 0)
        tl.store(row, tl.sqrt(theta * (1 + rho * rho)) / tl.load(scale + j).to(tl.float64))
        tl.store(row + 1, theta)
        tl.store(row + 2, rho)
        tl.store(row + 3, error)
        tl.store(row + 5, done.to(tl.float64))
        tl.store(row + 11, trace)
        tl.store(row + 12, K.to(tl.float64))
        block = (x < b) & (y < b)
        tl.store(t + (columns + x) * order + columns + y, corner, mask=block)
        tl.store(t + (K + x) * order + columns + y, R, mask=block)
        tl.store(t + (columns + y) * order + K + x, R, mask=block)


# Configurations: 8 warps, so that four columns of W at n = 4096 are 64 of the 255 registers of a thread. T goes through
# memory in slices of 16 rows, products are of 32 x 16 by 16 x ORDER; with 32 for 16, ORDER 128 spills (Triton 3.6).
# One compilation per power of two above K and per 4 or 8 columns, the latter with rows half as long in registers.
ORDERS = (32, 64, 128)
SQUARINGS = 20
RANK_LIMIT = 15  # with the next one, 16 Ritz values
BLOCK_LIMIT = 8
HIP = torch.version.hip is not None


def step_options(hip: bool = HIP) -> dict[str, object]:
    """How `step_kernel` is compiled. Float32 products: three TF32 ones on NVIDIA's tensor cores; AMD's take float32."""
    return {
        "SLICE": 32,
        "SQUARINGS": SQUARINGS,
        "PRECISION": "ieee" if hip else "tf32x3",
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _describe(n: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    entries: list[int] = []
    offset = 0
    for size in n:
        entries += (size, offset)
        offset += size
    return entries, (offset,)


def rayleigh_ritz_(
    n: Sequence[int],
    Q: Tensor,
    V: Tensor,
    T: Tensor,
    info: Tensor,
    W: Tensor,
    S: Tensor,
    scale: Tensor,
    b: int,
    columns: int,
    rank: int,
    tol: float,
    min_reads: int,
) -> None:
    """One step of block Krylov after its read, in one launch; see contracts.py. No host sync."""
    K = columns + b
    order = next((power for power in ORDERS if power >= K), 0)
    if not order:
        raise NotImplementedError(f"the Triton rayleigh_ritz_ holds up to {ORDERS[-1]} basis columns, not {K}")
    if rank > RANK_LIMIT:
        raise NotImplementedError(f"the Triton rayleigh_ritz_ follows up to {RANK_LIMIT} Ritz values, not {rank}")
    if not len(n):
        return
    sizes = tuple(n)
    described = table(("rayleigh_ritz_", sizes), V.device, lambda: _describe(sizes))
    Z = V.new_empty(len(n) * (order + 1) * order, dtype=torch.float64)
    M = V.new_empty(len(n) * 2 * order * order)
    with on(V.device):
        step_kernel[(len(n),)](
            described.tensor, Q, V, T, info, W, S, scale, Z, M, b, columns, T.shape[1], rank, tol, min_reads,
            ORDER=order, B=4 if b <= 4 else 8, **step_options(),
        )  # fmt: skip


def supports(dtype: torch.dtype, b: int) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel accumulates in float32, not for {str(dtype).removeprefix('torch.')}"
    if not 1 <= b <= BLOCK_LIMIT:
        return f"the Triton kernel holds blocks of 1 to {BLOCK_LIMIT} columns in registers, not {b}"
    return None
