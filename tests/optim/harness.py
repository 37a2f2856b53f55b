"""The optimizers that torch's generic tests run over, as torch.testing's database has them, and a small problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from spectral_kernels.optim import Muon, SpectralOptimizer

GLOBAL_FLAGS = ("foreach", "fused", "differentiable")


class MuonAndAdamW(Muon):
    """Muon with vectors in groups for AdamW, which the harness's lists of a weight and a bias do not say."""

    def __init__(self, params: Any, **options: Any) -> None:
        if params is not None and not isinstance(params, Tensor):
            params = list(params)
            groups = params if params and isinstance(params[0], dict) else [{"params": [p]} for p in params]
            lists = [[g["params"]] if isinstance(g["params"], Tensor) else list(g["params"]) for g in groups]
            vectors = [bool(x) and (x[0][1] if isinstance(x[0], tuple) else x[0]).ndim < 2 for x in lists]
            if groups is params:
                pairs = zip(groups, vectors, strict=True)
                params = [{**g, "algorithm": "adamw"} if vector else g for g, vector in pairs]
            elif any(vectors):
                apart = [[x for (x,), vector in zip(lists, vectors, strict=True) if vector is v] for v in (False, True)]
                params = [{"params": apart[1], "algorithm": "adamw"}]
                params = [{"params": apart[0]}, *params] if apart[0] else params
        super().__init__(params, **options)


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    given: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.02)},
        "no momentum, decay": {"momentum": 0.0, "weight_decay": 0.1},
        "nesterov": {"momentum": 0.8, "nesterov": True},
        "frobenius": {"direction": "frobenius", "rule": "original"},
        "clip": {"direction": "clip", "rank": 3, "weight_decay": 0.1},
        "threshold": {"direction": "clip", "threshold": 0.1, "nesterov": True},
        "orthogonalize": {"direction": "orthogonalize", "schedule": "cubic5"},
        "maximize": {"maximize": True, "lr": 0.02, "weight_decay": 0.1},
        "upper": {"safety": "upper", "block": 8, "nonfinite": "strict"},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in given.items()]


def muon_inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """torch's for its own Muon, and what this one has beside them."""
    given: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "decay": {"weight_decay": 0.2},
        "momentum": {"momentum": 0.8, "nesterov": False},
        "steps": {"ns_steps": 6},
        "coefficients": {"ns_coefficients": (3.4, -4.7, 2.0)},
        "schedule": {"schedule": "polar_express", "normalizer": "schatten4", "method": "gram"},
        "maximize": {"maximize": True, "lr": 0.02, "weight_decay": 0.1},
        "heavy ball": {"momentum_kind": "heavy_ball", "nonfinite": "strict", "adjust_lr_fn": "rms_to_rms"},
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in given.items()]


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    return errors_of(
        device,
        dtype,
        [
            ({"lr": -0.5}, "Invalid learning rate: -0.5"),
            ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), not 1.0"),
            ({"momentum": -0.1}, "momentum must lie in"),
            ({"weight_decay": -1}, "Invalid weight_decay: -1"),
            ({"direction": "up"}, "direction must be one of 'normalize', 'clip'"),
            ({"direction": "clip"}, "one of rank and threshold"),
            ({"rule": "mup"}, "rule must be one of"),
            ({"block": 1}, "block must be in"),
            ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ],
    )


def muon_error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    return errors_of(
        device,
        dtype,
        [
            ({"lr": -0.5}, "Learning rate should be >= 0 but is: -0.5"),
            ({"momentum": -0.1}, "momentum should be >= 0 but is: -0.1"),
            ({"weight_decay": -1}, "weight decay should be >= 0 but is: -1"),
            ({"adjust_lr_fn": "arbitrary"}, "Adjust learning rate function arbitrary is not supported"),
            ({"momentum_kind": "sum"}, "momentum_kind must be one of"),
            ({"schedule": "newton"}, "schedule must be one of"),
            ({"method": "qr"}, "method must be one of"),
            ({"nonfinite": "ignore"}, "nonfinite must be one of"),
            ({"num_heads": 3}, "do not divide"),
        ],
    )


def errors_of(device: Any, dtype: Any, refused: list[tuple[dict[str, Any], str]]) -> list[ErrorOptimizerInput]:
    found = get_error_inputs_for_all_optims(device, dtype)
    if torch.device(device).type != "cpu":
        return found
    one = nn.Parameter(torch.randn(1, 1, device=device, dtype=dtype))
    complex_ = nn.Parameter(torch.rand(2, 3, device=device, dtype=torch.complex64))
    complex_.grad = torch.rand_like(complex_)
    sparse = nn.Parameter(torch.rand(4, 3, device=device, dtype=dtype))
    sparse.grad = torch.rand(4, 3, device=device, dtype=dtype).to_sparse()
    construction, step = OptimizerErrorEnum.CONSTRUCTION_ERROR, OptimizerErrorEnum.STEP_ERROR
    cases: list[tuple[Any, ...]] = [(one, kwargs, construction, ValueError, message) for kwargs, message in refused]
    cases += [
        (one, {"nesterov_momentum": True}, construction, TypeError, "nesterov_momentum"),
        (complex_, {}, step, RuntimeError, "does not support complex parameters"),
        (sparse, {}, step, RuntimeError, "does not support sparse gradients"),
    ]
    for params, kwargs, where, error, message in cases:
        found.append(
            ErrorOptimizerInput(
                OptimizerInput(params=[params], kwargs=kwargs, desc=str(kwargs)),
                error_on=where,
                error_type=error,
                error_regex=message,
            )  # fmt: skip
        )
    return found


DATABASE = [
    OptimizerInfo(
        cls,
        optim_inputs_func=given,
        optim_error_inputs_func=errors,
        supported_impls=(),
        not_og_supported_flags=(),
        supports_complex=False,
    )
    for cls, given, errors in (
        (SpectralOptimizer, inputs, error_inputs),
        (Muon, muon_inputs, muon_error_inputs),
        (MuonAndAdamW, muon_inputs, muon_error_inputs),
    )
]


def problem(
    info: OptimizerInfo, device: Any, dtype: torch.dtype, strided: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (10, 5), bias (10,), for Muon (10, 1), input (5,); with `strided`, views into larger tensors."""
    shapes = (10, 5), (10, 1) if info.optim_cls is Muon else (10,)
    if strided:
        weight, bias = (torch.randn(*shape, 2, device=device, dtype=dtype)[..., 0] for shape in shapes)
        assert not weight.is_contiguous() and not bias.is_contiguous()
    else:
        weight, bias = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    return weight.requires_grad_(), bias.requires_grad_(), torch.randn(5, device=device, dtype=dtype)


def closure_of(opt: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Any:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = (weight.mv(x) + bias.reshape(-1)).pow(2).sum()
        loss.backward()
        return loss

    return closure


def kwargs_of(info: OptimizerInput) -> dict[str, Any]:
    kwargs = dict(info.kwargs)
    if isinstance(kwargs.get("lr"), Tensor):
        kwargs["lr"] = kwargs["lr"].clone()
    return kwargs


def plain(state_dict: dict[str, Any]) -> list[tuple[int, str, Any]]:
    return [(i, key, value) for i, state in state_dict["state"].items() for key, value in state.items()]
