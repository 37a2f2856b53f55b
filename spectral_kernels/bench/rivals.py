"""Rivals, each tuned beforehand to be as fast as it can be at the accuracy asked for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tuned(NamedTuple):
    """A rival ready to be timed and the setting found for it; call None: it does not reach the accuracy, and why."""

    call: Callable[[], Any] | None
    setting: str


def exact(A: Tensor) -> Tensor:
    """(...) float64: the largest singular value from the smaller Gram matrix, good to about 1e-15 relatively."""
    x = A.double()
    gram = x.mT @ x if x.shape[-1] <= x.shape[-2] else x @ x.mT
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()


def power_iteration(A: Tensor, v: Tensor, iterations: int) -> Tensor:
    """Plain power iteration, two products an iteration; the last one's ||A'A v|| / ||A v|| is the value."""
    AT = A.mT
    w = v
    y = v
    for _ in range(iterations):
        y = A @ (w / torch.linalg.vector_norm(w))
        w = AT @ y
    return torch.linalg.vector_norm(w) / torch.linalg.vector_norm(y)


def tuned_power(A: Tensor, truth: float, tol: float, *, most: int = 3000, seed: int = 0) -> Tuned:
    """The smallest number of iterations that reaches `tol` from a random start: no stop rule has to be paid for."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(A.shape[1], generator=g, dtype=torch.float32).to(A)
    w = v
    for iterations in range(1, most + 1):
        y = A @ (w / torch.linalg.vector_norm(w))
        w = A.mT @ y
        value = float(torch.linalg.vector_norm(w) / torch.linalg.vector_norm(y))
        if abs(value - truth) <= tol * truth:
            return Tuned(partial(power_iteration, A, v, iterations), f"{iterations} iterations")
    return Tuned(None, f"not within {tol:g} after {most} iterations")


def tuned_svds(A: Tensor, truth: float, tol: float, *, patience: float = 5.0) -> Tuned:
    """scipy's svds(k=1) with the solver and tolerance that reach `tol` soonest; `patience` seconds per setting."""
    try:
        from scipy.sparse.linalg import svds
    except ImportError:
        return Tuned(None, "scipy is not installed")
    x = A.numpy()
    best: tuple[float, Callable[[], Any], str] | None = None
    seen = []

    def caller(solver: str, inner: float) -> Callable[[], Any]:
        return lambda: float(svds(x, k=1, solver=solver, tol=inner, return_singular_vectors=False, rng=0)[0])

    for solver in ("arpack", "lobpcg", "propack"):
        for inner in (1e-1, 1e-2, 1e-3, 0.0):  # loosest first: the first that reaches tol is the solver's fastest
            call = caller(solver, inner)
            start = time.perf_counter()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    value = call()
            except Exception as failure:  # a solver that breaks down is a fact about the rival
                seen.append(f"{solver} tol={inner:g}: {type(failure).__name__}")
                continue
            took = time.perf_counter() - start
            if abs(value - truth) <= tol * truth:
                if best is None or took < best[0]:
                    best = (took, call, f"{solver}, tol={inner:g}")
                break
            seen.append(f"{solver} tol={inner:g}: error {abs(value - truth) / truth:.1e}")
            if took > patience:
                break
    if best is None:
        return Tuned(None, "; ".join(seen))
    return Tuned(quiet(best[1]), best[2])


def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with warnings off: svds complains of dense inputs and loose tolerances, which were asked for."""

    def silent() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return silent


def two_matmuls(A: Tensor, V: Tensor) -> dict[str, Callable[[], Tensor]]:
    """W = A'(A V) as two products, in the four layouts a user could write; each returns W as (b, n). V: (b, n)."""
    tall = V.mT.contiguous()  # (n, b)
    flat = V.contiguous()
    AT = A.mT
    return {
        "A.T @ (A @ V)": lambda: (AT @ (A @ tall)).mT,
        "(V.T @ A.T) @ A": lambda: (flat @ AT) @ A,
        "A.T @ (A @ V.T)": lambda: (AT @ (A @ flat.mT)).mT,
        "((A @ V).T @ A)": lambda: (A @ tall).mT @ A,
    }


def orthonormalize(W: Tensor) -> Tensor:
    """Columns of W (k, n, b) made orthonormal by Gram-Schmidt; no host synchronization, so that it can be captured."""
    columns: list[Tensor] = []
    for c in range(W.shape[2]):
        w = W[:, :, c]
        if columns:
            Q = torch.stack(columns, 2)  # (k, n, c)
            w = w - (Q @ (Q.mT @ w.unsqueeze(2))).squeeze(2)
        columns.append(w / torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp(min=1e-30))
    return torch.stack(columns, 2)


def top_eigenvalue(S: Tensor, squarings: int = 12) -> Tensor:
    """(k,) largest eigenvalue of small positive matrices (k, b, b) by repeated squaring: launches only, no LAPACK."""
    P = S / S.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)[:, None, None]
    for _ in range(squarings):
        P = P @ P
        P = P / P.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)[:, None, None]
    return (S * P).sum((1, 2))  # trace(S P), P = x x' in the limit


class SubspaceLoop:
    """Block subspace iteration over stacks of equal shapes, two `bmm` a step. Capturable in a CUDA graph.

    b columns, rescaled at every step, orthonormal at every fourth and at the end; Rayleigh-Ritz on the last product.
    """

    def __init__(self, stacks: Sequence[Tensor], b: int = 4, seed: int = 0) -> None:
        self.stacks = [a if a.shape[2] <= a.shape[1] else a.mT for a in stacks]
        self.starts = []
        for a in self.stacks:
            g = torch.Generator(device=a.device).manual_seed(seed)
            v = torch.randn(a.shape[0], a.shape[2], b, generator=g, dtype=torch.float32, device=a.device)
            self.starts.append(orthonormalize(v).to(a.dtype))

    def __call__(self, steps: int) -> Tensor:
        """(N,) float32 values after `steps` steps."""
        values = []
        for a, V in zip(self.stacks, self.starts, strict=True):
            for step in range(steps):
                W = torch.bmm(a.mT, torch.bmm(a, V)).float()
                last = step == steps - 1
                if last or step % 4 == 3:
                    W = orthonormalize(W)
                else:
                    W = W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp(min=1e-30)
                V = W.to(a.dtype)
            Y = torch.bmm(a, V).float()
            values.append(top_eigenvalue(Y.mT @ Y).clamp(min=0).sqrt())
        return torch.cat(values)


def fewest_steps(run: Callable[[int], Tensor], truth: Tensor, tol: float, most: int = 256) -> int | None:
    """The smallest number of steps with every error within `tol`: doubling, then bisection. None: not within `most`."""

    def reaches(steps: int) -> bool:
        error = (run(steps).double() - truth).abs() / truth
        return bool((error <= tol).all())

    high = 1
    while not reaches(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high // 2  # known to fail, or 0
    while high - low > 1:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle
    return high
