"""Spectral normalization of layers: a drop-in for torch.nn.utils.parametrizations.spectral_norm, and whole models at once.

An update is one read of the weight, `gram_matvec`, for a block of four directions: the current vector, two companions and
one that takes up fresh randomness. docs/parametrization.md says what that buys over one blind power step.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import scaling
from .kernels import random, registry
from .kernels.composites import safe_scale
from .kernels.contracts import INFO, NAMESPACE, STATS, acc_dtype
from .ops import arguments
from .ops.estimate import BLOCK, MIN_READS, MOST_READS, estimate
from .ops.norm import AccuracyWarning

FRESH = 0.1  # share of new randomness in the last companion, per update; docs/parametrization.md has the choice
KRYLOV_READS = 8  # up to so many reads the whole Krylov space is kept, 4 (m + n) numbers a read; beyond, the estimator runs
INITIAL_TOL = 1e-3  # accuracy at construction where no tol is given

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


# ------------------------------------------------------------------------------------------------------------------------
# the tracker: a ragged list of matrices, one update


class _Run(NamedTuple):
    """Consecutive matrices of one shape, tracked side n <= m: they are served as one batch."""

    count: int
    m: int
    n: int


@torch.library.custom_op(f"{NAMESPACE}::track_", mutates_args=("short", "long", "blocks"))
def _track_(
    A: list[Tensor], short: list[Tensor], long: list[Tensor], blocks: list[Tensor], reads: int, tol: float, seed: int
) -> Tensor:
    """One update of the singular vectors of every matrix; opaque to torch.compile.

    A (m_i, n_i) with n_i <= m_i, equal shapes adjacent, one dtype and device; short (n_i,) right and long (m_i,) left
    vectors; blocks (4, n_i): a random direction, rotated by one entry an update, and three companions.
    -> (N,) acc: sigma = long' A short of the new vectors, NaN or inf for such a matrix, whose vectors stay.
    """
    with torch.no_grad():
        return _track(A, short, long, blocks, reads, tol, seed)


@_track_.register_fake
def _(A: Any, short: Any, long: Any, blocks: Any, reads: int, tol: float, seed: int) -> Tensor:
    return A[0].new_empty((len(A),), dtype=acc_dtype(A[0].dtype))


def _track(
    A: Sequence[Tensor],
    short: Sequence[Tensor],
    long: Sequence[Tensor],
    blocks: Sequence[Tensor],
    reads: int,
    tol: float,
    seed: int,
) -> Tensor:
    acc = acc_dtype(A[0].dtype)
    runs = _runs(A)
    stacks = [a.detach()[None] for a in A]
    words = registry.words(A[0].device.type, A[0].dtype, BLOCK)
    V = _start(short, blocks, runs, acc)
    if tol > 0 or reads > KRYLOV_READS:
        V = _converge(stacks, [_mostly_fresh(x) for x in V], runs, reads, tol, seed)
        reads = 1

    # block Krylov space of `reads` reads: rows W = (A'A) V and Y = A V, both kept
    scale = torch.ones(len(A), dtype=acc, device=A[0].device)
    W: list[Tensor] = []
    Y: list[Tensor] = []
    basis: list[Tensor] = []
    for read in range(reads):
        if reads > 1:
            V = [_orthonormal(x, q) for x, q in zip(V, basis or [x[:, :0] for x in V], strict=True)]
            basis = _extend(basis, V)
        w, _, found, y = words.gram_matvec(stacks, _flat(V), scale, None, BLOCK, read == 0, True)
        if read == 0:
            stats = found
            wanted = safe_scale(stats[:, STATS["amax"]], acc)
            if bool((wanted != 1).any()):  # outside the safe window: read again at the right power of two
                scale = wanted.to(acc)
                w, _, _, y = words.gram_matvec(stacks, _flat(V), scale, None, BLOCK, False, True)
        V = _cut(w, runs, 2)
        W, Y = _extend(W, V), _extend(Y, _cut(y, runs, 1))

    nan, inf = stats[:, STATS["nan"]] > 0, stats[:, STATS["inf"]] > 0
    power, Z = _half_step(torch.cat([_gram(y) for y in Y]), torch.cat([_gram(w) for w in W]), nan | inf)
    live = power[:, 0] > 0
    _write_back(short, long, blocks, W, Y, Z, power, live, runs)
    sigma = power[:, 0].sqrt() / scale.double()
    return torch.where(nan, torch.nan, torch.where(inf, torch.inf, sigma)).to(acc)


def _runs(A: Sequence[Tensor]) -> list[_Run]:
    out: list[_Run] = []
    for a in A:
        if out and tuple(a.shape) == out[-1][1:]:
            out[-1] = out[-1]._replace(count=out[-1].count + 1)
        else:
            out.append(_Run(1, *a.shape))
    return out


def _flat(V: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in V])


def _cut(flat: Tensor, runs: Sequence[_Run], side: int) -> list[Tensor]:
    """One (count, BLOCK, size) view per run."""
    sizes = [run.count * BLOCK * run[side] for run in runs]
    return [
        part.view(run.count, BLOCK, run[side]) for part, run in zip(flat.split(sizes), runs, strict=True)
    ]


def _extend(rows: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, 1) for pair in zip(rows, more, strict=True)] if rows else more


def _gram(X: Tensor) -> Tensor:
    X = X.double()
    return X @ X.mT


def _start(short: Sequence[Tensor], blocks: Sequence[Tensor], runs: Sequence[_Run], acc: torch.dtype) -> list[Tensor]:
    """(count, BLOCK, n) per run: the current vector, two companions, the last one with fresh randomness."""
    out, first = [], 0
    for run in runs:
        mine = slice(first, first + run.count)
        first += run.count
        V = torch.stack(list(blocks[mine])).to(acc)
        V[:, 3] += FRESH * V[:, 0]
        V[:, 0] = torch.stack(list(short[mine])).to(acc)
        out.append(V)
    return out


def _mostly_fresh(V: Tensor) -> Tensor:
    """The rows that a run with a stop rule starts from: the current vector and the last companion, the others random."""
    return V


def _converge(
    stacks: Sequence[Tensor], V: list[Tensor], runs: Sequence[_Run], reads: int, tol: float, seed: int
) -> list[Tensor]:
    """The leading Ritz vectors after as many reads as `tol` needs (0: after reads - 1), one (count, BLOCK, n) per run."""
    rows = [x for v in V for x in v.split(1)]
    result = estimate(
        stacks,
        tol=tol,
        steps=None if tol > 0 else reads - 1,
        V0=rows,
        vectors=BLOCK,
        seed=seed,
        min_reads=MIN_READS,
    )
    if tol > 0 and not bool(result.info[:, INFO["done"]].all()):
        open_ = int((result.info[:, INFO["done"]] == 0).sum())
        warnings.warn(
            f"spectral_norm: {MOST_READS} reads did not prove tol={tol:g} for {open_} of {len(stacks)} weights; the next "
            "update goes on from there",
            AccuracyWarning,
            stacklevel=2,
        )
    return _cut(result.X, runs, 2)


def _orthonormal(X: Tensor, Q: Tensor) -> Tensor:
    """X (k, b, n) -> orthonormal rows of what X adds to the rows of Q (k, K, n); zero rows where it adds nothing."""
    length = torch.linalg.vector_norm(X, dim=2, keepdim=True)
    X = X / torch.where(length > 0, length, 1)
    for _ in range(2):
        X = X - (X @ Q.mT) @ Q
        values, vectors = torch.linalg.eigh(torch.nan_to_num(_gram(X), posinf=0.0, neginf=0.0))
        kept = values > 64 * torch.finfo(X.dtype).eps ** 2
        X = (vectors * torch.where(kept, values, 1).rsqrt()[:, None] * kept[:, None]).mT.to(X.dtype) @ X
    return X


def _half_step(S: Tensor, M: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """Stationary values of ||W'z||^2 / ||Y'z||^2, descending (N, b), and their vectors z as columns (N, K, b).

    S = Y Y', M = W W'. The largest is the best lower bound of sigma^2 that the reads support; zeros for bad matrices.
    z' S z = 1, so that Y'z is a unit vector and W'z has length sqrt(value).
    """
    gone = (bad | ~torch.isfinite(S).all(2).all(1) | ~torch.isfinite(M).all(2).all(1))[:, None, None]
    S, M = S.masked_fill(gone, 0.0), M.masked_fill(gone, 0.0)
    values, vectors = torch.linalg.eigh(S)
    # Y is known to fp32 rounding: what lies below it relative to the largest is noise, and would win the quotient
    kept = (values > 8 * torch.finfo(torch.float32).eps * values[:, -1:]) & (values > 0)
    T = vectors * (torch.where(kept, values, 1).rsqrt() * kept)[:, None]
    power, Z = torch.linalg.eigh(T.mT @ M @ T)
    return power[:, -BLOCK:].flip(1).clamp(min=0), (T @ Z)[:, :, -BLOCK:].flip(2)


def _write_back(
    short: Sequence[Tensor],
    long: Sequence[Tensor],
    blocks: Sequence[Tensor],
    W: Sequence[Tensor],
    Y: Sequence[Tensor],
    Z: Tensor,
    power: Tensor,
    live: Tensor,
    runs: Sequence[_Run],
) -> None:
    """short <- W'z / |W'z|, long <- Y'z, companions <- the next three, and the random direction rotated; where live."""
    length = power.sqrt()
    Z = Z * torch.where(length > 0, 1 / length.clamp(min=torch.finfo(torch.float64).tiny), 0)[:, None]
    first = 0
    for run, w, y in zip(runs, W, Y, strict=True):
        mine = slice(first, first + run.count)
        first += run.count
        x = Z[mine].mT.to(w.dtype) @ w  # (count, BLOCK, n)
        other = ((Z[mine, :, :1] * length[mine, :1, None]).mT.to(y.dtype) @ y)[:, 0]  # (count, m)
        old = torch.stack(list(blocks[mine]))
        alive = live[mine, None]
        x = torch.where(alive[..., None], x, torch.cat((torch.stack(list(short[mine]))[:, None], old[:, 1:]), 1))
        other = torch.where(alive, other, torch.stack(list(long[mine])))
        block = torch.cat((old[:, :1].roll(1, 2), x[:, 1:]), 1)
        torch._foreach_copy_(list(short[mine]), list(x[:, 0].unbind()))
        torch._foreach_copy_(list(long[mine]), list(other.unbind()))
        torch._foreach_copy_(list(blocks[mine]), list(block.unbind()))


class _Sigma(torch.autograd.Function):
    """u' M v, whose value the update has found: the gradient is u v', and no read is spent on the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(M: Tensor, u: Tensor, v: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        M, u, v, _ = inputs
        ctx.dtype = M.dtype
        ctx.save_for_backward(u, v)
        ctx.save_for_forward(u, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, v = ctx.saved_tensors
        return torch.outer(grad * u, v).to(ctx.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, M: Tensor, *_: Any) -> Tensor:
        u, v = ctx.saved_tensors
        return u @ (M.to(u.dtype) @ v)


# ------------------------------------------------------------------------------------------------------------------------
# the parametrization


class SpectralNorm(nn.Module):
    """weight -> target * weight / sigma(weight); see `spectral_norm`, which registers it."""

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        *,
        target: float | str = 1.0,
        tol: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(weight, n_power_iterations, dim, eps, target, tol)
        self.n_power_iterations = n_power_iterations
        self.dim = dim % weight.ndim
        self.eps = float(eps)
        self.tol = tol
        self.seed = arguments.check_seed(seed)
        self.together = False  # an update by the root's forward serves this layer
        self.given: Tensor | None = None  # sigma from that update, while the root's forward runs
        if weight.ndim == 1:
            if isinstance(target, str):
                raise ValueError(f"target={target!r} needs a weight of 2 or more dimensions, not shape {tuple(weight.shape)}")
            self.target = float(target)
            return
        M = self.matrix(weight.detach())
        self.target = scaling.target(target, *M.shape) if M.numel() else 1.0
        acc, n = acc_dtype(weight.dtype), min(M.shape)
        u, v, block = (torch.zeros(size, dtype=acc, device=M.device) for size in (M.shape[:1], M.shape[1:], (BLOCK, n)))
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        # not in the state_dict, which stays torch's own: after loading, the loaded vectors lead and these accompany
        self.register_buffer("_block", block, persistent=False)
        if not weight.is_meta:
            self._initialize(M)

    def _initialize(self, M: Tensor) -> None:
        """Random unit vectors from (seed, shape), then an update to the stated accuracy: the norm is right from the start."""
        for step, x in ((2, self._u), (3, self._v), (4, self._block)):
            draw = random.normals(random.key(self.seed, *M.shape, step), x.numel(), M.device).view(x.shape)
            x.copy_(draw / torch.linalg.vector_norm(draw, dim=-1, keepdim=True).clamp(min=1e-300))
        with warnings.catch_warnings():
            if self.tol is None:
                warnings.simplefilter("ignore", AccuracyWarning)
            _update([self], [M], self.n_power_iterations, min(self.tol or INITIAL_TOL, INITIAL_TOL))

    def matrix(self, weight: Tensor) -> Tensor:
        """(h, w): `dim` in front, the rest flattened, as torch's parametrization sees a weight."""
        return weight.movedim(self.dim, 0).flatten(1)

    def forward(self, weight: Tensor) -> Tensor:
        acc = acc_dtype(weight.dtype)
        with torch.autocast(weight.device.type, enabled=False):
            if weight.ndim == 1:
                sigma = torch.linalg.vector_norm(weight.to(acc))
            elif self.training:
                M = self.matrix(weight)
                value = self.given
                if value is None:
                    value = _update([self], [M], self.n_power_iterations, self.tol or 0.0)[0]
                # clones: the next update writes into the buffers, this forward's backward still needs the vectors
                sigma = _Sigma.apply(M, self._u.to(acc, copy=True), self._v.to(acc, copy=True), value)
            else:
                sigma = _unit(self._u.to(acc)) @ (self.matrix(weight).to(acc) @ _unit(self._v.to(acc)))
            divisor = torch.where(sigma == 0, torch.ones_like(sigma), sigma / self.target)  # a zero weight stays zero
            return (weight.to(acc) / divisor).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        reads = f"tol={self.tol:g}" if self.tol is not None else f"n_power_iterations={self.n_power_iterations}"
        return f"target={self.target:g}, dim={self.dim}, {reads}"


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x)
    return x / torch.where(length > 0, length, torch.ones_like(length))


def _update(layers: Sequence[SpectralNorm], matrices: Sequence[Tensor], reads: int, tol: float) -> Tensor:
    """(N,) sigma of every layer, in their order, after one update of all vectors; matrices (h, w) of one dtype and device."""
    tall = [M.detach() if M.shape[1] <= M.shape[0] else M.detach().mT for M in matrices]
    order = sorted(range(len(tall)), key=lambda i: (tall[i].shape[1], tall[i].shape[0]))
    flipped = [matrices[i].shape[1] > matrices[i].shape[0] for i in order]
    u, v = [layers[i]._u for i in order], [layers[i]._v for i in order]
    short = [b if not f else a for a, b, f in zip(u, v, flipped, strict=True)]
    long = [a if not f else b for a, b, f in zip(u, v, flipped, strict=True)]
    blocks = [layers[i]._block for i in order]
    sigma = _track_([tall[i] for i in order], short, long, blocks, reads, tol, layers[0].seed)
    back = [0] * len(order)
    for place, i in enumerate(order):
        back[i] = place
    return sigma[back] if len(back) > 1 else sigma


def _check(weight: Any, n_power_iterations: Any, dim: Any, eps: Any, target: Any, tol: Any) -> None:
    arguments.check_matrix(weight[None] if isinstance(weight, Tensor) and weight.ndim == 1 else weight, "weight")
    if not -weight.ndim <= arguments.check_int("dim", dim, -math.inf) < weight.ndim:  # type: ignore[arg-type]
        raise IndexError(f"dim must lie in [{-weight.ndim}, {weight.ndim - 1}], not {dim}")
    arguments.check_int("n_power_iterations", n_power_iterations, 1)
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"eps must be a number, not {type(eps).__name__}")
    if tol is not None:
        arguments.check_tol(tol, weight.dtype)
    if not isinstance(target, str):
        arguments.check_number("target", target, 0.0, above=True)
    elif target not in scaling.RULES:
        raise ValueError(f"target must be a number or one of {', '.join(scaling.RULES)}, not {target!r}")


# ------------------------------------------------------------------------------------------------------------------------
# what a user calls


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    target: float | str = 1.0,
    tol: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Reparametrize module.name as target * W / ||W||_2; torch.nn.utils.parametrizations.spectral_norm's arguments first.

    W is seen as a matrix with `dim` in front and the rest flattened (default 0, and 1 for transposed convolutions); a vector
    is divided by its Euclidean norm. n_power_iterations: reads of W per training forward. tol: instead, as many reads as
    this relative accuracy of the norm needs. target: a positive number, or a rule of the matrix's shape ("rms_to_rms",
    "original", "match_rms_adamw"). eps is accepted and has no effect: a zero weight stays zero without it. Same buffers
    (`_u`, `_v`) and state_dict as torch's. In eval mode nothing is updated: sigma = u' W v.
    A weight with a NaN makes the layer's weight NaN, one with an inf makes those entries NaN; the vectors stay as they were.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"Module '{module}' has no parameter or buffer with name '{name}'")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    layer = SpectralNorm(weight, n_power_iterations, dim, eps, target=target, tol=tol, seed=seed)
    parametrize.register_parametrization(module, name, layer)
    return module


def spectral_norm_model(
    model: nn.Module,
    n_power_iterations: int = 1,
    *,
    target: float | str = 1.0,
    tol: float | None = None,
    seed: int = 0,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """`spectral_norm` for the weight of every Linear and convolution; a training forward updates them all in one launch.

    where(name, module): which of them (default: all). The update runs before model.forward, once, so that a layer used
    twice has one weight; a layer called outside model.forward updates itself. Survives deepcopy and state_dict.
    """
    chosen = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and (where is None or where(name, module))
    ]
    if not chosen:
        raise ValueError("spectral_norm_model: no Linear or convolution to parametrize (where= may have left none)")
    for name, module in chosen:
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"spectral_norm_model: the weight of {name!r} is parametrized already; leave it out with where=")
    for _, module in chosen:
        spectral_norm(module, "weight", n_power_iterations, target=target, tol=tol, seed=seed)
        module.parametrizations.weight[0].together = True  # type: ignore[union-attr,index]
    # plain functions of the module they are called with: nothing to copy, pickle or replicate
    model.register_forward_pre_hook(_update_together)
    model.register_forward_hook(_forget, always_call=True)
    return model


def _together(root: nn.Module) -> list[tuple[SpectralNorm, nn.Module]]:
    return [
        (inner[0], inner)  # type: ignore[index]
        for inner in root.modules()
        if isinstance(inner, parametrize.ParametrizationList)
        and isinstance(inner[0], SpectralNorm)
        and inner[0].together
    ]


def _update_together(root: nn.Module, args: Any) -> None:
    """Forward pre-hook: one update per (device, dtype, accuracy) for all layers in training mode."""
    groups: dict[Any, list[tuple[SpectralNorm, Tensor]]] = {}
    for layer, inner in _together(root):
        if layer.training and layer.given is None:
            weight = inner.original
            key = (weight.device, weight.dtype, layer.n_power_iterations, layer.tol)
            groups.setdefault(key, []).append((layer, layer.matrix(weight)))
    for (_, _, reads, tol), group in groups.items():
        layers, matrices = [list(x) for x in zip(*group, strict=True)]
        for layer, sigma in zip(layers, _update(layers, matrices, reads, tol or 0.0).unbind(), strict=True):
            layer.given = sigma


def _forget(root: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: what the update found holds for this forward alone."""
    for layer, _ in _together(root):
        layer.given = None
