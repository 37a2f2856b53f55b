"""Spectral normalization of layers: a drop-in for torch's parametrization, and whole models at once.

An update is one read of the weight, `gram_matvec`, for a block of four directions: the current vector, two companions
and one that takes up fresh randomness. docs/parametrization.md says what that buys over one blind power step.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import scaling
from .kernels import random, registry
from .kernels.composites import SAFE_EXPONENT, safe_scale
from .kernels.contracts import INFO, NAMESPACE, STATS, acc_dtype
from .ops import arguments
from .ops.estimate import BASIS_COLUMNS, BLOCK, MIN_READS, MOST_READS, oriented, warm_blocks
from .ops.norm import AccuracyWarning
from .ops.triplet import must_be_opaque

FRESH = 0.3  # share of new randomness in the last companion, per update; docs/parametrization.md has the choice
KRYLOV_READS = 8  # up to so many reads keep the Krylov space, 4 (m + n) numbers each; more go to block_krylov
INITIAL_TOL = 1e-3  # accuracy at construction where no tol is given

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


# ----------------------------------------------------------------------------------------------------------------------
# the tracker: a ragged list of matrices, one update


class _Run(NamedTuple):
    """Consecutive matrices of one shape, n the tracked side: they are served as one batch."""

    k: int
    m: int
    n: int


@torch.library.custom_op(f"{NAMESPACE}::track_", mutates_args=("right", "left", "blocks"))
def _track_(
    A: list[Tensor], right: list[Tensor], left: list[Tensor], blocks: list[Tensor], reads: int, tol: float, seed: int
) -> Tensor:
    """One update of the singular vectors of every matrix; opaque to torch.compile.

    A (m_i, n_i), equal shapes adjacent, one dtype and device; right (n_i,) and left (m_i,) singular vectors; blocks
    (4, n_i): a random direction, rotated by one entry an update, and three companions of the right vector.
    -> (N,) acc: sigma = left' A right of the new vectors, NaN or inf for such a matrix, whose vectors stay.
    """
    with torch.no_grad():
        return _track(A, right, left, blocks, reads, tol, seed)


@_track_.register_fake
def _(A: Any, right: Any, left: Any, blocks: Any, reads: int, tol: float, seed: int) -> Tensor:
    return A[0].new_empty((len(A),), dtype=acc_dtype(A[0].dtype))


def _track(
    A: Sequence[Tensor],
    right: list[Tensor],
    left: list[Tensor],
    blocks: list[Tensor],
    reads: int,
    tol: float,
    seed: int,
) -> Tensor:
    acc = acc_dtype(A[0].dtype)
    runs = _runs(A)
    stacks = [a[None] for a in A]
    words = registry.words(A[0].device.type, A[0].dtype, BLOCK)
    V = _start(right, blocks, runs, acc)
    if tol > 0 or reads > KRYLOV_READS:
        V = _converge(words, stacks, V, blocks, runs, reads, tol, seed)
        reads = 1

    # block Krylov space of `reads` reads: rows W = (A'A) V and Y = A V, both kept
    scale = torch.ones(len(A), dtype=acc, device=A[0].device)
    W: list[Tensor] = []
    Y: list[Tensor] = []
    basis: list[Tensor] = []
    S, stats, rows = scale, scale, []  # set by the first read
    for read in range(reads):
        if reads > 1:
            V = [_orthonormal(x, q) for x, q in zip(V, basis or [x[:, :0] for x in V], strict=True)]
            basis = _extend(basis, V)
        w, S, found, y = words.gram_matvec(stacks, _flat(V), scale, None, BLOCK, read == 0, True)
        if read == 0:
            stats, rows = found, found.tolist()
            limit = 2.0 ** SAFE_EXPONENT[acc]
            if any(not 1 / limit <= row[STATS["amax"]] <= limit for row in rows):  # zeros too, for which the scale is 1
                scale = safe_scale(stats[:, STATS["amax"]], acc).to(acc)
                w, S, _, y = words.gram_matvec(stacks, _flat(V), scale, None, BLOCK, False, True)
        V = _cut(w, runs, 2)
        W, Y = _extend(W, V), _extend(Y, _cut(y, runs, 1))

    if reads > 1:
        S = torch.cat([_gram(y) for y in Y])
    M = torch.cat([_gram(w) for w in W]) if len(W) > 1 else _gram(W[0])
    bad = None
    if any(row[STATS["nan"]] or row[STATS["inf"]] for row in rows):
        nan, inf = stats[:, STATS["nan"]] > 0, stats[:, STATS["inf"]] > 0
        bad = torch.where(nan, torch.nan, torch.where(inf, torch.inf, 0.0))
    power, Z = _half_step(S, M, None if bad is None else bad != 0, acc)
    _write_back(right, left, blocks, W, Y, Z, power, runs)
    sigma = power[:, 0].sqrt() / scale
    return (sigma if bad is None else sigma + bad).to(acc)


def _runs(A: Sequence[Tensor]) -> list[_Run]:
    out: list[_Run] = []
    for a in A:
        m, n = a.shape
        if out and out[-1].m == m and out[-1].n == n:
            out[-1] = _Run(out[-1].k + 1, m, n)
        else:
            out.append(_Run(1, m, n))
    return out


def _flat(V: Sequence[Tensor]) -> Tensor:
    return V[0].reshape(-1) if len(V) == 1 else torch.cat([x.reshape(-1) for x in V])


def _cut(flat: Tensor, runs: Sequence[_Run], side: int) -> list[Tensor]:
    """One (k, BLOCK, size) view per run."""
    if len(runs) == 1:
        return [flat.view(runs[0].k, BLOCK, runs[0][side])]
    parts = flat.split([run.k * BLOCK * run[side] for run in runs])
    return [part.view(run.k, BLOCK, run[side]) for part, run in zip(parts, runs, strict=True)]


def _extend(rows: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, 1) for pair in zip(rows, more, strict=True)] if rows else more


def _gram(X: Tensor) -> Tensor:
    X = X.double()
    return X @ X.mT


def _start(right: list[Tensor], blocks: list[Tensor], runs: Sequence[_Run], acc: torch.dtype) -> list[Tensor]:
    """(k, BLOCK, n) per run: the current vector and its three companions."""
    out, first = [], 0
    for run in runs:
        mine = slice(first, first + run.k)
        first += run.k
        V = torch.stack(blocks[mine]).to(acc)
        V[:, 0] = torch.stack(right[mine])
        out.append(V)
    return out


def _converge(
    words: Any,
    stacks: Sequence[Tensor],
    V: list[Tensor],
    blocks: list[Tensor],
    runs: Sequence[_Run],
    reads: int,
    tol: float,
    seed: int,
) -> list[Tensor]:
    """The leading Ritz vectors after as many reads as `tol` needs (0: after reads - 1), one (k, BLOCK, n) per run.

    A stop rule trusts its start, so two of the four rows are random: one of `blocks`, and one that `warm_blocks` draws.
    """
    rows = []
    for one, block in zip([x for run in V for x in run.split(1)], blocks, strict=True):
        g = block[:1].to(one.dtype)
        rows.append(torch.stack((one[:, 0], one[:, 3], g.roll(g.shape[1] // 2, 1), g), 1))
    start = warm_blocks(rows, stacks, seed)
    budget = MOST_READS if tol > 0 else reads - 1
    info, X, _ = words.block_krylov(stacks, start, BLOCK, budget, BASIS_COLUMNS, 1, tol, MIN_READS, seed, BLOCK, False)
    unfinished = int((info[:, INFO["done"]] == 0).sum()) if tol > 0 else 0
    if unfinished:
        warnings.warn(
            f"spectral_norm: {budget} reads did not prove tol={tol:g} for {unfinished} of {len(stacks)} weights; "
            "the next update goes on from there",
            AccuracyWarning,
            stacklevel=2,
        )
    return _cut(X, runs, 2)


def _orthonormal(X: Tensor, Q: Tensor) -> Tensor:
    """X (k, b, n) -> orthonormal rows of what X adds to the rows of Q (k, K, n); zero rows where it adds nothing."""
    length = torch.linalg.vector_norm(X, dim=2, keepdim=True)
    X = X / torch.where(length > 0, length, 1)
    for _ in range(2):
        X = X - (X @ Q.mT) @ Q
        values, vectors = torch.linalg.eigh(torch.nan_to_num(_gram(X), posinf=0.0, neginf=0.0))
        kept = values > 64 * torch.finfo(X.dtype).eps ** 2
        X = (vectors * torch.where(kept, values.rsqrt(), 0)[:, None]).mT.to(X.dtype) @ X
    return X


def _half_step(S: Tensor, M: Tensor, bad: Tensor | None, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stationary values of ||W'z||^2 / ||Y'z||^2, descending (N, b), and their vectors z as columns (N, K, b).

    S = Y Y', M = W W'. The largest is the best lower bound of sigma^2 that the reads support; zeros for bad matrices.
    z' S z = 1, so that Y'z is a unit vector and W'z has length sqrt(value).
    """
    if bad is not None:
        S, M = (torch.where(bad[:, None, None], 0.0, X) for X in (S, M))
    values, vectors = torch.linalg.eigh(S)
    # Y is known to rounding: what lies below it relative to the largest is noise, and would win the quotient
    kept = values > (8 * torch.finfo(acc).eps * values[:, -1:]).clamp(min=torch.finfo(torch.float64).tiny)
    T = vectors * torch.where(kept, values.rsqrt(), 0)[:, None]
    power, Z = torch.linalg.eigh(T.mT @ M @ T)
    return power[:, -BLOCK:].flip(1).clamp(min=0), (T @ Z)[:, :, -BLOCK:].flip(2)


def _write_back(
    right: list[Tensor],
    left: list[Tensor],
    blocks: list[Tensor],
    W: Sequence[Tensor],
    Y: Sequence[Tensor],
    Z: Tensor,
    power: Tensor,
    runs: Sequence[_Run],
) -> None:
    """right <- W'z / |W'z|, left <- Y'z, companions <- the next three, and the random direction rotated.

    Zero and non-finite matrices keep what they had; companions that the reads did not find are random.
    """
    live = power[:, 0] > 0
    all_live = all(live.tolist())
    unit = Z * torch.where(power > 0, power.rsqrt(), 0)[:, None]
    first = 0
    for run, w, y in zip(runs, W, Y, strict=True):
        mine = slice(first, first + run.k)
        first += run.k
        x = unit[mine].mT.to(w.dtype) @ w  # (k, BLOCK, n)
        other = (Z[mine, :, :1].mT.to(y.dtype) @ y)[:, 0]  # (k, m)
        block = torch.stack(blocks[mine]).to(w.dtype)
        before = torch.stack(right[mine]).to(w.dtype)
        # eigenvectors come with either sign: keep the direction, for averages of state_dicts
        sign = torch.where((x[:, 0] * before).sum(1) < 0, -1.0, 1.0)[:, None]
        x[:, 0] *= sign
        other *= sign
        if not all_live:
            keep = ~live[mine, None]
            x = torch.where(keep[..., None], torch.cat((before[:, None], block[:, 1:]), 1), x)
            other = torch.where(keep, torch.stack(left[mine]), other)
        torch._foreach_copy_(right[mine], x[:, 0].unbind())
        torch._foreach_copy_(left[mine], other.unbind())
        g = block[:, 0]
        x[:, 0] = g.roll(1, 1)
        if all_live:
            x[:, 3].add_(g, alpha=FRESH)
        torch._foreach_copy_(blocks[mine], x.unbind())


class _Sigma(torch.autograd.Function):
    """u' M v, whose value the update has found: the gradient is u v', and no read is spent on the value."""

    @staticmethod
    def forward(ctx: Any, M: Tensor, u: Tensor, v: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = M.dtype
        ctx.save_for_backward(u, v)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, v = ctx.saved_tensors
        return torch.outer(grad * u, v).to(ctx.dtype), None, None, None


# ----------------------------------------------------------------------------------------------------------------------
# the parametrization


class SpectralNorm(nn.Module):
    """weight -> target * weight / sigma(weight); see `spectral_norm`, which registers it."""

    _u: Tensor
    _v: Tensor
    _block: Tensor

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
                raise ValueError(f"target={target!r} needs 2 or more dimensions, not shape {tuple(weight.shape)}")
            self.target = float(target)
            return
        M = self.matrix(weight.detach())
        self.target = scaling.target(target, *M.shape) if M.numel() else 1.0
        stack = M[None]
        self.columns = oriented(stack) is stack  # the tracked side, for good: columns (_v), or rows (_u)
        acc, n = acc_dtype(weight.dtype), M.shape[1 if self.columns else 0]
        u, v, block = (torch.zeros(size, dtype=acc, device=M.device) for size in (M.shape[:1], M.shape[1:], (BLOCK, n)))
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)
        # not in the state_dict, which stays torch's own: after loading, the loaded vectors lead and these accompany
        self.register_buffer("_block", block, persistent=False)
        if not weight.is_meta:
            self._initialize(M)

    def _initialize(self, M: Tensor) -> None:
        """Random unit vectors from (seed, shape), then an update to the stated accuracy: right from the start."""
        for step, x in ((2, self._u), (3, self._v), (4, self._block)):  # 0 and 1 are the estimator's draws
            key = random.key(self.seed, M.shape[0], M.shape[1], step)
            draw = random.normals(key, x.numel(), M.device).view(x.shape)
            x.copy_(draw / torch.linalg.vector_norm(draw, dim=-1, keepdim=True).clamp(min=1e-300))
        with warnings.catch_warnings():
            if self.tol is None:
                warnings.simplefilter("ignore", AccuracyWarning)
            _update([self], [M], self.n_power_iterations, min(self.tol or INITIAL_TOL, INITIAL_TOL))

    def matrix(self, weight: Tensor) -> Tensor:
        """(h, w): `dim` in front, the rest flattened, as torch's parametrization sees a weight."""
        if self.dim:
            weight = weight.movedim(self.dim, 0)
        return weight if weight.ndim == 2 else weight.flatten(1)

    def forward(self, weight: Tensor) -> Tensor:
        if not weight.is_meta and torch.is_autocast_enabled(weight.device.type):  # products would be in half precision
            with torch.autocast(weight.device.type, enabled=False):
                return self._normalized(weight)
        return self._normalized(weight)

    def _normalized(self, weight: Tensor) -> Tensor:
        acc = acc_dtype(weight.dtype)
        if weight.ndim == 1:
            sigma = torch.linalg.vector_norm(weight.to(acc))
        elif self.training and not _transformed(weight):
            M = self.matrix(weight)
            sigma = self.given
            if sigma is None:
                sigma = _update([self], [M], self.n_power_iterations, self.tol or 0.0)[0]
            # clones: the next update writes into the buffers, this forward's backward still needs the vectors
            sigma = _Sigma.apply(M, self._u.to(acc, copy=True), self._v.to(acc, copy=True), sigma)
        else:
            u, v = self._u.to(acc, copy=True), self._v.to(acc, copy=True)
            length = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v)  # 1, but for buffers cast to half
            sigma = u @ (self.matrix(weight).to(acc) @ v) / length.clamp(min=torch.finfo(acc).tiny)
        divisor = sigma / self.target if self.target != 1 else sigma
        divisor = divisor + (divisor == 0)  # a zero weight stays zero
        return weight / divisor if weight.dtype == acc else (weight.to(acc) / divisor).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        reads = f"tol={self.tol:g}" if self.tol is not None else f"n_power_iterations={self.n_power_iterations}"
        return f"target={self.target:g}, dim={self.dim}, {reads}"


def _transformed(weight: Tensor) -> bool:
    """Inside torch.func: buffers cannot be written there, the vectors serve as they are."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(weight)


def _update(layers: Sequence[SpectralNorm], matrices: Sequence[Tensor], reads: int, tol: float) -> Tensor:
    """(N,) sigma of every layer, in their order, after one update of all; matrices (h, w) of one dtype and device."""
    A = [M.detach() if layer.columns else M.detach().mT for M, layer in zip(matrices, layers, strict=True)]
    order = sorted(range(len(A)), key=lambda i: A[i].shape)
    right = [layers[i]._v if layers[i].columns else layers[i]._u for i in order]
    left = [layers[i]._u if layers[i].columns else layers[i]._v for i in order]
    blocks = [layers[i]._block for i in order]
    ordered = [A[i] for i in order]
    if must_be_opaque(ordered) or ordered[0].is_meta:
        sigma = _track_(ordered, right, left, blocks, reads, tol, layers[0].seed)
    else:
        with torch.no_grad():
            sigma = _track(ordered, right, left, blocks, reads, tol, layers[0].seed)
    if len(order) == 1:
        return sigma
    back = [0] * len(order)
    for place, i in enumerate(order):
        back[i] = place
    return sigma[back]


def _check(weight: Any, n_power_iterations: Any, dim: Any, eps: Any, target: Any, tol: Any) -> None:
    arguments.check_matrix(weight[None] if isinstance(weight, Tensor) and weight.ndim == 1 else weight, "weight")
    if not isinstance(dim, numbers.Integral):
        raise TypeError(f"dim must be an integer, not {type(dim).__name__}")
    if not -weight.ndim <= dim < weight.ndim:
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


# ----------------------------------------------------------------------------------------------------------------------
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
    """Reparametrize module.name as target * W / ||W||_2: torch's parametrization, with a norm of stated accuracy.

    The first five arguments are torch.nn.utils.parametrizations.spectral_norm's, and so are the buffers (`_u`, `_v`),
    the state_dict, and the matrix that is seen: `dim` in front, the rest flattened (default 0; 1 for transposed
    convolutions). A vector is divided by its Euclidean norm. n_power_iterations: reads of W per forward in training
    mode. tol: instead, as many reads as this relative accuracy of the norm needs. target: a positive number, or a rule
    of the matrix's shape ("rms_to_rms" = sqrt(rows / columns), "original", "match_rms_adamw", "none"). eps is accepted
    and has no effect: a zero weight stays zero without it. In eval mode nothing is updated: sigma = u' W v.
    A NaN in W makes the layer's weight NaN, an inf makes its own entry NaN and the finite ones 0; the vectors stay as
    they were. Raises TypeError or ValueError for bad arguments, IndexError for dim. Source: Miyato et al. 2018.
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
    """`spectral_norm` for the weight of every Linear and convolution; a training forward updates all in one launch.

    where(name, module): which of them (default: all). The update runs before model.forward, once, so that a layer used
    twice has one weight; a layer called outside model.forward updates itself. Survives deepcopy and state_dict.
    Raises ValueError where nothing is chosen, or something that is parametrized already. Returns model.
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
            raise ValueError(f"spectral_norm_model: {name!r} is parametrized already; leave it out with where=")
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
            weight: Any = inner.original
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
