"""`orthogonalize` inside the Muon of other packages: as the function they take, or hooked into one optimizer.

`NewtonSchulz` is what microsoft/dion takes as `newton_schulz_func`. `use_in` makes one optimizer of a known host call
it in place of the host's own iteration. No host is imported here: an optimizer brings its package along.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import scaling
from .ops.arguments import check_choice, check_matrix
from .ops.orthogonalize import orthogonalize

_MISSING = object()
_MARK = "_spectral_kernels_handle"  # the attribute of an optimizer that holds its handle


class NewtonSchulz:
    """U S V' -> U f(S) V' as a callable with fixed options, which counts what it has orthogonalized.

    The options are those of `orthogonalize`. Called with X, (..., m, n) or a list of such, it returns X's shape and
    dtype; X is unchanged and never shares memory with the result. epsilon is accepted because hosts pass it (dion as a
    0-D tensor) and has no effect: normalization needs none. Other arguments of hosts are taken and ignored as well.
    calls, matrices: how often it was called and how many matrices that were, counted on the host; a script that asserts
    them cannot train without orthogonalization unnoticed. Can be pickled and copied; a copy keeps the counts.
    Raises RuntimeError while torch.compile traces it with fullgraph=True; other compiled code runs it uncompiled.
    """

    def __init__(
        self,
        schedule: Any = "polar_express",
        *,
        steps: int | None = None,
        method: str = "auto",
        normalizer: str = "auto",
        compute_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.options: dict[str, Any] = {
            "schedule": schedule,
            "steps": steps,
            "method": method,
            "normalizer": normalizer,
            "compute_dtype": compute_dtype,
            "seed": seed,
        }
        # wrong ones are refused here, not at the first step
        orthogonalize(torch.ones(1, 1, device="cpu"), **self.options)
        self.calls = 0
        self.matrices = 0

    def __call__(self, X: Any, epsilon: Any = None, **_: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError("NewtonSchulz counts its calls and is not compiled: leave it outside of fullgraph=True")
        result = orthogonalize(X, **self.options)
        self.calls += 1
        self.matrices += sum(math.prod(x.shape[:-2]) for x in ([X] if isinstance(X, Tensor) else X))
        return result

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"NewtonSchulz({options}): {self.matrices} matrices in {self.calls} calls"


class Handle:
    """What `use_in` returns: the counts, and the way back. As a context manager it removes itself at the end.

    newton_schulz: the callable in use; calls, matrices: its counts. host: the known host that was recognized.
    """

    def __init__(self, optimizer: Optimizer, newton_schulz: NewtonSchulz, host: Host) -> None:
        self.newton_schulz = newton_schulz
        self.host = host.name
        self.active = True
        self._optimizer = optimizer
        self._before: list[tuple[Any, str, Any, Any]] = []  # (owner, attribute, before, ours)
        for owner, name, value in host.places(optimizer, self):
            self._before.append((owner, name, vars(owner).get(name, _MISSING), value))
        for owner, name, _, value in self._before:
            setattr(owner, name, value)
        setattr(optimizer, _MARK, self)

    @property
    def calls(self) -> int:
        return self.newton_schulz.calls

    @property
    def matrices(self) -> int:
        return self.newton_schulz.matrices

    def remove(self) -> None:
        """The optimizer calls its own iteration again; a second call does nothing.

        What others (learning rate schedulers) have since put around `step` stays; ours then passes everything on.
        """
        if not self.active:
            return
        self.active = False
        for owner, name, before, ours in self._before:
            if vars(owner).get(name) is not ours:
                continue
            if before is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        delattr(self._optimizer, _MARK)

    def each(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Orthogonalize a list of matrices of any shapes, in one call per dtype and device."""
        kinds: dict[Any, list[int]] = {}
        for i, matrix in enumerate(matrices):
            check_matrix(matrix, f"the update of parameter {i}")
            kinds.setdefault((matrix.dtype, matrix.device), []).append(i)
        results: dict[int, Tensor] = {}
        for members in kinds.values():
            results.update(zip(members, self.newton_schulz([matrices[i] for i in members]), strict=True))
        return [results[i] for i in range(len(matrices))]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Handle({self.host}, {'active' if self.active else 'removed'}, {self.newton_schulz!r})"


class Host(NamedTuple):
    """A package whose optimizers are known: the class they derive from, and where they call their iteration."""

    name: str
    module: str  # that holds the class below
    base: str
    places: Callable[[Any, Handle], list[tuple[Any, str, Any]]]  # (owner, attribute, what it becomes)


def use_in(optimizer: Optimizer, newton_schulz: NewtonSchulz | None = None, **options: Any) -> Handle:
    """Let one optimizer of another package orthogonalize with ours; momentum, scale and decay stay the host's.

    optimizer: torch.optim.Muon, pytorch_optimizer.Muon, heavyball.Muon (or another of its optimizers that
    orthogonalizes updates), gram_newton_schulz.Muon, or one of dion's. newton_schulz: what it calls from now on, by
    default NewtonSchulz(**options); pass one, without options, to count several optimizers together. The host's own
    coefficients, steps and eps have no effect while the handle is in place. Other optimizers, of the same class too,
    keep calling their own iteration, and so does a copy of this one; the state_dict stays what it was.
    Raises ValueError for other optimizers, for one that has a handle already, and for one whose step is compiled as a
    whole (heavyball's compile_step=True, pytorch_optimizer's compiled foreach).
    """
    if newton_schulz is None:
        newton_schulz = NewtonSchulz(**options)
    elif options:
        raise ValueError(f"options ({', '.join(options)}) are for a new NewtonSchulz: give them or newton_schulz")
    elif not isinstance(newton_schulz, NewtonSchulz):
        raise TypeError(f"newton_schulz must be a NewtonSchulz, not {type(newton_schulz).__name__}")
    if hasattr(optimizer, _MARK):
        raise ValueError(f"this optimizer has a handle already: {getattr(optimizer, _MARK)!r}; remove() it first")
    for host in HOSTS:
        base = getattr(sys.modules.get(host.module), host.base, None)  # a host that was not imported made no optimizer
        if base is not None and isinstance(optimizer, base):
            return Handle(optimizer, newton_schulz, host)
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    raise ValueError(f"optimizer must be one of {', '.join(host.name for host in HOSTS)}, not {kind}")


# torch.optim.Muon calls a function of its module, which all its optimizers share. The function is exchanged while a
# hooked optimizer steps, for a dispatcher that looks at what the calling thread is doing: other threads, and the
# closure of the step, get torch's own.
_TORCH, _FUNCTION = "torch.optim._muon", "_zeropower_via_newtonschulz"
_lock = threading.Lock()
_stepping = 0  # hooked steps under way, in all threads
_torchs_own: Any = None
_here = threading.local()  # .ours: what this thread's innermost step calls; None: torch's own


def _dispatch(grad: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    ours = getattr(_here, "ours", None)
    return _torchs_own(grad, *arguments, **keywords) if ours is None else ours(grad)


@contextmanager
def _calling(ours: Any) -> Iterator[None]:
    """Steps of torch.optim.Muon in this thread call `ours`; None: torch's own."""
    global _stepping, _torchs_own
    module = sys.modules[_TORCH]
    with _lock:
        if _stepping == 0:
            _torchs_own = getattr(module, _FUNCTION)
            setattr(module, _FUNCTION, _dispatch)
        _stepping += 1
    before, _here.ours = getattr(_here, "ours", None), ours
    try:
        yield
    finally:
        _here.ours = before
        with _lock:
            _stepping -= 1
            if _stepping == 0 and getattr(module, _FUNCTION) is _dispatch:
                setattr(module, _FUNCTION, _torchs_own)


def _in_torch(optimizer: Any, handle: Handle) -> list[tuple[Any, str, Any]]:
    if not hasattr(sys.modules[_TORCH], _FUNCTION):
        raise ValueError(f"this torch, {torch.__version__}, has no {_TORCH}.{_FUNCTION}: use sk.optim.Muon")
    inner = optimizer.step

    @wraps(inner)  # with what schedulers note on it
    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if not handle.active:
            return inner(closure)
        if torch.compiler.is_compiling():
            raise RuntimeError("a torch.optim.Muon with a handle cannot be compiled with fullgraph=True")

        with _calling(handle.newton_schulz):
            return inner(closure if closure is None else _calling(None)(closure))

    # A bound method, as learning rate schedulers expect of `step`
    return [(optimizer, "step", MethodType(step, optimizer))]


def _in_pytorch_optimizer(optimizer: Any, handle: Handle) -> list[tuple[Any, str, Any]]:
    if "_step_foreach" in vars(optimizer):
        raise ValueError("the foreach step of this pytorch_optimizer.Muon is compiled and cannot be hooked")
    if not hasattr(optimizer, "_orthogonalize"):
        raise ValueError("this version of pytorch_optimizer has no Muon._orthogonalize to hook; 4.1 has")

    def each(group: Any, updates: Sequence[Tensor]) -> list[Tensor]:
        return handle.each([update.reshape(update.shape[0], -1) for update in updates])

    return [(optimizer, "_orthogonalize", each)]


class _HeavyballStage:
    """heavyball's orthogonalize_update for a whole list at once: flattened from the second dimension, scaled."""

    def __init__(self, before: Any, handle: Handle) -> None:
        self.before = before
        self.handle = handle

    def __call__(
        self, state: Any, group: Any, update: Any, grad: Any, param: Any, scale_mode: str = "scale"
    ) -> list[Tensor]:
        if not self.handle.active:
            return self.before(state, group, update, grad, param, scale_mode=scale_mode)
        check_choice("scale_mode", scale_mode, ("scale", "none"))
        self.before(state, group, (), (), ())  # an empty list: the host notes only that this stage has run
        results = list(update)
        chosen = [i for i, one in enumerate(update) if one.ndim >= 2]
        for i, U in zip(chosen, self.handle.each([update[i].flatten(1) for i in chosen]), strict=True):
            scale = scaling.original(*U.shape) if scale_mode == "scale" else 1.0
            results[i] = U.mul_(scale).reshape(update[i].shape)
        return results

    def __deepcopy__(self, memo: Any) -> _HeavyballStage:
        return self  # the host copies its stages when their list is assigned: those copies are this one too


def _in_heavyball(optimizer: Any, handle: Handle) -> list[tuple[Any, str, Any]]:
    if getattr(optimizer, "compile_step", False):
        raise ValueError("a heavyball optimizer with compile_step=True cannot be hooked: its step is one graph")
    chain = sys.modules["heavyball.chainable"]
    own = chain.orthogonalize_update.get_fn()
    stages = list(chain._walk_fns(optimizer.fns))
    found = [(outer, "fn", stage) for outer in stages for stage in stages if outer.fn is stage and stage.fn is own]
    if not found:
        raise ValueError(f"this heavyball optimizer, {type(optimizer).__name__}, has no stage orthogonalize_update")
    return [(outer, name, _HeavyballStage(stage, handle)) for outer, name, stage in found]


def _in_attribute(name: str) -> Callable[[Any, Handle], list[tuple[Any, str, Any]]]:
    """Hosts that keep the callable in an attribute of the optimizer."""

    def places(optimizer: Any, handle: Handle) -> list[tuple[Any, str, Any]]:
        if not hasattr(optimizer, name):
            raise ValueError(f"this version of {type(optimizer).__qualname__} keeps no callable in {name}")
        return [(optimizer, name, handle.newton_schulz)]

    return places


HOSTS = (
    Host("torch.optim.Muon", _TORCH, "Muon", _in_torch),
    Host("pytorch_optimizer.Muon", "pytorch_optimizer.optimizer.muon.muon", "Muon", _in_pytorch_optimizer),
    Host("heavyball.Muon", "heavyball.chainable", "ChainOpt", _in_heavyball),
    Host("gram_newton_schulz.Muon", "gram_newton_schulz.muon.muon", "Muon", _in_attribute("newton_schulz")),
    Host("dion.Muon", "dion.muon", "Muon", _in_attribute("_newton_schulz_func")),
    Host("dion.Dion2", "dion.megabatch_base", "DistributedOrthoBase", _in_attribute("_newton_schulz_func")),
)
