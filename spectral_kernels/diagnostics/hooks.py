"""`watch`: what a step did to the features of any torch model, layer by layer, from hooks on modules by name."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.contracts import acc_dtype
from . import measures
from .linear import apply, is_image, linear_modules, norms, operator_norm, rows_of, target_of, views
from .tables import Table, check_names, shown

NAN = math.nan
KEPT = ("weight", "bias")


@dataclass
class LayerTerms:
    """One module: h' its input, h its output, d the change from the first pass to the last; NaN where not known.

    Features are rows: one per position of a Linear's input, one per input of a convolution. A norm of slices is their
    sum over kernel positions, of an embedding its longest row; "bound" ratios lie in [0, 1] up to rounding.
    """

    name: str
    size: float = NAN  # RMS entry of h
    change: float = NAN  # mean ||dh|| / ||h||
    weight_norm: float = NAN  # ||W||_2
    weight_ratio: float = NAN  # the same over sqrt(m / n)
    update_norm: float = NAN  # ||dW||_2
    update_ratio: float = NAN  # the same over sqrt(m / n)
    update_stable_rank: float = NAN
    weight_alignment: float = NAN  # mean ||W h'|| / (||W||_2 ||h'||)
    alignment: float = NAN  # mean ||dW h'|| / (||dW||_2 ||h'||): Eq. 25, and how far dW h' fills its bound
    update_term: float = NAN  # RMS entry of dW h'
    input_term: float = NAN  # of W dh'
    both_term: float = NAN  # of dW dh'
    input_bound: float = NAN  # mean ||W dh'|| / (||W||_2 ||dh'||)
    both_bound: float = NAN  # mean ||dW dh'|| / (||dW||_2 ||dh'||)
    sum_ratio: float = NAN  # mean ||dh|| / (||dW h'|| + ||W dh'|| + ||dW dh'|| + ||db||): 0 where the terms cancel
    inner: float = NAN  # <dW, grad W>, the loss's change to first order: Eq. 19
    gradient_norm: float = NAN  # ||grad W||_2
    gradient_ratio: float = NAN  # the same over sqrt(n / m): Eq. 20
    contributions: float = NAN  # Assumption 3 for the rows of the first pass


class Terms(Table[LayerTerms]):
    """What `Watch.rows` found, in the order of the calls."""

    COLUMNS = {
        "layer": "name", ">rms h": "size", ">|dh|/|h|": "change", ">|W| ratio": "weight_ratio",
        ">|dW| ratio": "update_ratio", ">srank dW": "update_stable_rank", ">align": "alignment",
        ">dW h'": "update_term", ">W dh'": "input_term", ">dW dh'": "both_term", ">sum": "sum_ratio",
        "><dW,G>": "inner", ">|G| ratio": "gradient_ratio",
    }  # fmt: skip

    def _cells(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        values = ([getattr(row, key) for key in self.COLUMNS.values()] for row in self.rows)
        return list(self.COLUMNS), [[str(name), *map(shown, rest)] for name, *rest in values]


@dataclass
class _Calls:
    """What one pass of the model showed of one module; a module called several times has several of each."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)  # call -> gradient of the loss w.r.t. its output
    weight: Tensor | None = None
    bias: Tensor | None = None


class Watch:
    """Hooks on modules by name, from the first pass of the model to the last; see `watch`."""

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        modules = dict(model.named_modules())
        self._linear = linear_modules(model)
        chosen = list(self._linear) if names is None else check_names(names, list(modules), "module")
        if not chosen:
            raise ValueError("there is nothing to watch: the model has no linear, convolution or embedding modules")
        self._modules = {name: modules[name] for name in chosen}
        self._inside = False
        self.reset()
        mine = weakref.ref(self)

        def begin(module: nn.Module, args: Any) -> None:
            watch = mine()
            if watch is not None and module is model_of():
                watch._begin()

        def end(module: nn.Module, args: Any, output: Any) -> None:
            watch = mine()
            if watch is not None and module is model_of():
                watch._inside = False

        def called(name: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                watch = mine()
                if watch is not None and watch._inside and watch._modules[name] is module:  # not a deep copy's
                    watch._called(name, [*args, *kwargs.values()], output)

            return hook

        model_of = weakref.ref(model)
        handles: list[Any] = [model.register_forward_pre_hook(begin, prepend=True)]
        handles += [m.register_forward_hook(called(name), with_kwargs=True) for name, m in self._modules.items()]
        handles.append(model.register_forward_hook(end, always_call=True))  # after that of the model as a layer

        def remove() -> None:
            for handle in handles:
                handle.remove()

        self._remove = weakref.finalize(self, remove)
        self._remove.atexit = False

    def close(self) -> None:
        """Take the hooks off; so does the end of a `with` block, or of the watch's life. What was seen stays."""
        self._remove()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def reset(self) -> None:
        """Forget what was seen: the next pass is the first one."""
        self._passes = 0
        self._before: dict[str, _Calls] = {}
        self._after: dict[str, _Calls] = {}

    def _begin(self) -> None:
        self._inside = True
        self._passes += 1
        if self._passes > 1:
            self._after = {}

    @torch._disable_dynamo
    def _called(self, name: str, given: Sequence[Any], output: Any) -> None:
        x, y = first_tensor(given), first_tensor(output)
        if x is None or y is None:
            return
        calls = (self._before if self._passes == 1 else self._after).setdefault(name, _Calls())
        calls.inputs.append(x.detach().clone())  # a later operation in place would change them
        calls.outputs.append(y.detach().clone())
        if calls.weight is None and name in self._linear:
            held = self._modules[name]._parameters
            calls.weight, calls.bias = (None if p is None else p.detach().clone() for p in map(held.get, KEPT))
        if self._passes == 1 and y.requires_grad:
            i = len(calls.outputs) - 1
            y.register_hook(lambda g: calls.gradients.__setitem__(i, _added(calls.gradients.get(i), g)))

    @torch.no_grad()
    def rows(self) -> Terms:
        """Every watched module that was called. ValueError where the last pass had another batch than the first."""
        if not self._before:
            raise RuntimeError("no watched module was called yet: run a forward pass of the watched model first")
        kind = next(iter(self._before.values())).outputs[0].device.type
        with torch.autocast(kind, enabled=False):
            return Terms([self._row(name, calls) for name, calls in self._before.items()])

    def _row(self, name: str, old: _Calls) -> LayerTerms:
        row, new = LayerTerms(name), self._after.get(name)
        image = is_image(self._modules[name])
        if new is not None and [y.shape for y in new.outputs] != [y.shape for y in old.outputs]:
            raise ValueError(f"{name!r}: the last pass must be of the same batch as the first, not of another shape")
        h = _rows(old.outputs, image)
        row.size = float(h.square().mean().sqrt())
        change = None if new is None else _rows(new.outputs, image) - h
        if change is not None:
            row.change = float(measures.mean_ratio(measures.length(change), measures.length(h)))
        if old.weight is not None:
            self._weight_terms(row, old, new, change)
        return row

    def _weight_terms(self, row: LayerTerms, old: _Calls, new: _Calls | None, change: Tensor | None) -> None:
        module, role = self._linear[row.name]
        image, embedded = is_image(module), role.kind == "embedding"
        assert old.weight is not None
        W = old.weight.to(acc_dtype(old.weight.dtype))
        x = [a if embedded else a.to(W.dtype) for a in old.inputs]
        G = _gradient(module, W, x, old.gradients)
        dW = None if new is None or new.weight is None else new.weight.to(W.dtype) - W
        present = [A for A in (W, dW, G) if A is not None]
        found = iter(norms(present, [role] * len(present)))
        sizes = {key: next(found) for key, A in (("W", W), ("dW", dW), ("G", G)) if A is not None}
        bounds = {key: operator_norm(s, role) for key, s in sizes.items()}

        def image_of(A: Tensor, inputs: Sequence[Tensor]) -> Tensor:
            return _rows([apply(module, A, a) for a in inputs], image)

        length = None if embedded else measures.length(_rows(x, image))  # a one-hot input has length 1
        ones = torch.ones((), dtype=W.dtype, device=W.device)
        row.weight_norm = float(bounds["W"])
        row.weight_ratio = float(sizes["W"].amax()) / target_of(role, update=False)
        row.weight_alignment = _filled(image_of(W, x), bounds["W"], ones if length is None else length)
        if G is not None:
            row.gradient_norm = float(bounds["G"])
            dual = 1 / (role.groups * target_of(role, update=True) * role.positions)  # of slices, each: <dW, G> = 1
            row.gradient_ratio = float(sizes["G"].amax()) / dual
            if not image and not embedded:
                grads = [old.gradients[i].to(W.dtype) for i in range(len(x))]
                row.contributions = float(measures.contributions(_rows(grads, image), _rows(x, image)))
        if dW is None or change is None or new is None:
            return
        row.update_norm = float(bounds["dW"])
        row.update_ratio = float(sizes["dW"].amax()) / target_of(role, update=True)
        row.update_stable_rank = max(float(measures.stable_rank(v).amax()) for v in views(dW, role))
        first = image_of(dW, x)
        row.alignment = _filled(first, bounds["dW"], ones if length is None else length)
        total, row.update_term = measures.length(first), _rms(first)
        if not embedded:
            dx = [b.to(W.dtype) - a for a, b in zip(x, new.inputs, strict=True)]
            moved = measures.length(_rows(dx, image))
            second, third = image_of(W, dx), image_of(dW, dx)
            row.input_term, row.both_term = _rms(second), _rms(third)
            row.input_bound = _filled(second, bounds["W"], moved)
            row.both_bound = _filled(third, bounds["dW"], moved)
            total = total + measures.length(second) + measures.length(third)
        if old.bias is not None and new.bias is not None:
            db = (new.bias.to(W.dtype) - old.bias.to(W.dtype)).view(
                -1, *[1] * (old.outputs[0].ndim - 2 if image else 0)
            )
            total = total + measures.length(_rows([db.expand(y.shape) for y in old.outputs], image))
        row.sum_ratio = float(measures.mean_ratio(measures.length(change), total))
        if G is not None:
            row.inner = float((dW.double() * G.double()).sum())


def watch(model: nn.Module, names: Iterable[str] | None = None) -> Watch:
    """Watch modules through a training step: the terms of dh = dW h' + W dh' + dW dh', and their bounds, per layer.

        with watch(model, ["0", "2"]) as w:
            loss(model(x), y).backward()    # first pass: h', h, W, and the gradients of outputs
            optimizer.step()
            model(x)                        # last pass, of the same batch
        print(w.rows())

    names: as in model.named_modules(); None: every linear, convolution and embedding module. A module without such a
    weight shows its features alone. Of several passes after the first one the last counts; `reset()` begins anew.
    Terms [paper, Eqs. 3-5, 9-10], alignment [Eqs. 23-25], <dW, grad W> [Eq. 19], ||grad W||_2 against sqrt(n / m)
    [Eq. 20]; sizes of slices and embeddings: see scaling. grad W is this module's share, of the first pass alone.
    Inputs and outputs of both passes are kept until `reset()`. Dropout would add to dh: switch it off. Calls outside
    the model's own forward, as in a recomputed checkpoint, are not seen. Training stays as it is, bit for bit.
    Raises ValueError for an unknown name, with the near ones.
    """
    return Watch(model, names)


@torch.no_grad()
def final_layer_alignment(model: nn.Module, *inputs: Any, name: str | None = None) -> float:
    """Mean over inputs of ||W h'|| / (||W||_2 ||h'||) for the last layer: Theta(1 / sqrt(n)) at initialization, and
    Theta(1) once features were learned. [paper, Fig. 2 C]

    inputs: what the model takes. The last linear or convolution module that the forward pass calls, or that of `name`.
    The pass runs in eval mode; every module's mode is restored.
    """
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    with watch(model, None if name is None else [name]) as seen:
        try:
            model.eval()
            model(*inputs)
        finally:
            for module, mode in modes.items():
                module.training = mode
    last = [n for n in seen._before if n in seen._linear and seen._linear[n][1].kind != "embedding"]
    if not last:
        raise ValueError(
            f"{'the model' if name is None else repr(name)} has no linear or convolution module to look at"
        )
    return seen._row(last[-1], seen._before[last[-1]]).weight_alignment


def first_tensor(x: Any) -> Tensor | None:
    if isinstance(x, Tensor):
        return x
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def _added(old: Tensor | None, g: Tensor) -> Tensor:
    return g.detach().clone() if old is None else old + g.detach()


def _gradient(module: nn.Module, W: Tensor, x: Sequence[Tensor], gradients: dict[int, Tensor]) -> Tensor | None:
    """grad W from the recorded inputs and output gradients; None without a backward pass."""
    if len(gradients) < len(x):
        return None
    with torch.enable_grad():
        A = W.clone().requires_grad_()
        ys = [apply(module, A, a) for a in x]
        return torch.autograd.grad(ys, A, [gradients[i].to(y.dtype) for i, y in enumerate(ys)])[0]


def _rows(parts: Sequence[Tensor], image: bool) -> Tensor:
    return torch.cat([rows_of(part, image) for part in parts])


def _filled(term: Tensor, norm: Tensor, length: Tensor) -> float:
    """Mean of ||term|| / (norm length): how much of its bound a term fills."""
    return float(measures.mean_ratio(measures.length(term) / norm, length.expand(term.shape[0])))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
