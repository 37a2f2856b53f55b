"""Spectral normalization of layers: a drop-in for torch's parametrization, and whole models at once.

ops/track.py has the update, one read of the weight, and docs/parametrization.md what it buys over a blind power step.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import scaling
from .kernels import random
from .kernels.contracts import acc_dtype
from .ops import arguments
from .ops.estimate import BLOCK, oriented
from .ops.norm import AccuracyWarning
from .ops.track import track, track_
from .ops.triplet import must_be_opaque

INITIAL_TOL = 1e-3  # accuracy at construction where no tol is given

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


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
        sigma = track_(ordered, right, left, blocks, reads, tol, layers[0].seed)
    else:
        with torch.no_grad():
            sigma = track(ordered, right, left, blocks, reads, tol, layers[0].seed)
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
