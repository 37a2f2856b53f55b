"""SpectralOptimizer and Muon under the generic tests of torch's own optimizers, over torch.testing's database."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optims
from torch.testing._internal.common_utils import TestCase

from spectral_kernels.optim import Muon, SpectralOptimizer
from tests.optim.harness import DATABASE, GLOBAL_FLAGS, MuonAndAdamW, closure_of, kwargs_of, plain, problem


class TestOptimizers(TestCase):
    every = optims(DATABASE, dtypes=[torch.float32])

    def _equal_states(self, a: dict[str, Any], b: dict[str, Any]) -> None:
        self.assertEqual(a["param_groups"], b["param_groups"])
        self.assertEqual([x[:2] for x in plain(a)], [x[:2] for x in plain(b)])
        for (*_, x), (*_, y) in zip(plain(a), plain(b), strict=True):
            self.assertEqual(x, y, rtol=0, atol=0)

    @every
    def test_inputs_hold_no_global_flags(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            self.assertFalse(set(GLOBAL_FLAGS) & set(given.kwargs))

    @optims(DATABASE, dtypes=[torch.float32, torch.float64])
    def test_errors(self, device, dtype, optim_info):
        given = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
        self.assertGreater(len(given), 16)
        for case in given:
            params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
            if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                if issubclass(case.error_type, Warning):
                    with self.assertWarnsRegex(case.error_type, case.error_regex):
                        optim_info.optim_cls(params, **kwargs)
                else:
                    with self.assertRaisesRegex(case.error_type, case.error_regex):
                        optim_info.optim_cls(params, **kwargs)
            else:
                opt = optim_info.optim_cls(params, **kwargs)
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    opt.step()

    @every
    def test_forward_goes_the_right_direction(self, device, dtype, optim_info):
        for strided in (False, True):
            for given in optim_info.optim_inputs_func(device=device):
                kwargs = kwargs_of(given)
                weight, bias, x = problem(optim_info, device, dtype, strided)
                opt = optim_info.optim_cls([weight, bias], **{"lr": 0.02, **kwargs})
                closure = closure_of(opt, weight, bias, x)
                first = float(closure().detach())
                for _ in range(8):
                    self.assertIsInstance(opt.step(closure), Tensor)
                last = float(closure().detach())
                if kwargs.get("maximize"):
                    self.assertGreater(last, first, given.desc)
                else:
                    self.assertLess(last, first, given.desc)

    @every
    def test_state_dict_round_trip(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, x = problem(optim_info, device, dtype)
            opt = optim_info.optim_cls([weight, bias], **kwargs_of(given))
            closure = closure_of(opt, weight, bias, x)
            for _ in range(4):
                opt.step(closure)
            twin_weight, twin_bias = (p.detach().clone().requires_grad_() for p in (weight, bias))
            twin = optim_info.optim_cls([twin_weight, twin_bias], **kwargs_of(given))
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
            before = copy.deepcopy(loaded)
            twin.load_state_dict(loaded)
            self._equal_states(loaded, before)
            twin_closure = closure_of(twin, twin_weight, twin_bias, x)
            for _ in range(3):
                opt.step(closure)
                twin.step(twin_closure)
                self.assertEqual((weight, bias), (twin_weight, twin_bias), rtol=0, atol=0)
            self._equal_states(opt.state_dict(), twin.state_dict())
            self._equal_states(loaded, before)

    @every
    def test_older_state_dicts_load(self, device, dtype, optim_info):
        weight, bias, x = problem(optim_info, device, dtype)
        opt = optim_info.optim_cls([weight, bias])
        opt.step(closure_of(opt, weight, bias, x))
        old = opt.state_dict()
        for group in old["param_groups"]:
            for key in ("kind", "transposed", "groups", "num_heads", "split_sizes", "nonfinite", "retract", "maximize"):
                group.pop(key, None)
        new = optim_info.optim_cls([weight, bias])
        new.load_state_dict(old)
        self.assertEqual(new.param_groups[0]["nonfinite"], "skip")
        before = weight.detach().clone()
        new.step(closure_of(new, weight, bias, x))
        self.assertNotEqual(weight, before)

    @every
    def test_deepcopy(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, x = problem(optim_info, device, dtype)
            opt = optim_info.optim_cls([weight, bias], **kwargs_of(given))
            opt.step(closure_of(opt, weight, bias, x))
            new = copy.deepcopy(opt)
            names = {name for name in vars(opt) if not name.startswith("_")}
            self.assertEqual(names, {name for name in vars(new) if not name.startswith("_")})
            self._equal_states(opt.state_dict(), new.state_dict())
            mine, other = opt.param_groups[0]["params"], new.param_groups[0]["params"]
            for p, q in zip(mine, other, strict=True):
                self.assertNotEqual(p.data_ptr(), q.data_ptr())
                q.grad = p.grad.clone()
            opt.step()
            new.step()
            self.assertEqual(mine, other, rtol=0, atol=0)

    @every
    def test_the_rate_of_a_group_counts(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device)[::3]:
            weight, bias, x = problem(optim_info, device, dtype)
            rest = {k: v for k, v in kwargs_of(given).items() if k not in ("lr", "weight_decay")}
            opt = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 1e-28}], lr=0.01, **rest)
            before = weight.detach().clone(), bias.detach().clone()
            closure = closure_of(opt, weight, bias, x)
            for _ in range(3):
                opt.step(closure)
            self.assertNotEqual(weight, before[0])
            self.assertEqual(bias, before[1], rtol=0, atol=0)

    @every
    def test_tensor_rates(self, device, dtype, optim_info):
        for shape in ((), (1,), (1, 1)):
            start = problem(optim_info, device, dtype)
            results = []
            for lr in (0.05, torch.full(shape, 0.05, dtype=torch.float64)):
                weight, bias = (p.detach().clone().requires_grad_() for p in start[:2])
                opt = optim_info.optim_cls([weight, bias], lr=lr, weight_decay=0.1)
                closure = closure_of(opt, weight, bias, start[2])
                for _ in range(5):
                    opt.step(closure)
                results.append((weight, bias))
            self.assertEqual(*results, rtol=0, atol=0)
            self.assertEqual(float(lr), 0.05)

    @optims(DATABASE, dtypes=[torch.float64])
    def test_one_list_equals_a_loop(self, device, dtype, optim_info):
        """The only path is a list of all parameters; one optimizer per parameter is the loop."""
        for given in optim_info.optim_inputs_func(device=device)[::2]:
            shapes = ((6, 4), (6,), (6, 4), (), (2, 5, 3), (4, 2, 3, 3))
            shapes = tuple(s for s in shapes if len(s) > 1 or optim_info.optim_cls is not Muon)
            params = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
            copies = [p.detach().clone().requires_grad_() for p in params]
            together = optim_info.optim_cls(params, **kwargs_of(given))
            apart = [optim_info.optim_cls([p], **kwargs_of(given)) for p in copies]
            for step in range(5):
                for i, (p, q) in enumerate(zip(params, copies, strict=True)):
                    p.grad = None if (step, i) == (3, 1) else torch.randn_like(p)
                    q.grad = None if p.grad is None else p.grad.clone()
                together.step()
                for opt in apart:
                    opt.step()
            self.assertEqual(params, copies, rtol=1e-9, atol=1e-12)
            for p, q, opt in zip(params, copies, apart, strict=True):
                self.assertEqual(together.state[p].keys(), opt.state[q].keys())
                for key in {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"} & together.state[p].keys():
                    self.assertEqual(together.state[p][key], opt.state[q][key])

    @every
    def test_complex_is_refused_and_changes_nothing(self, device, dtype, optim_info):
        real, odd = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, dtype=torch.complex64, requires_grad=True)
        opt = optim_info.optim_cls([real, odd])
        real.grad, odd.grad = torch.randn_like(real), torch.randn_like(odd)
        before = real.detach().clone()
        with self.assertRaisesRegex(RuntimeError, "does not support complex"):
            opt.step()
        self.assertEqual(real, before, rtol=0, atol=0)
        self.assertEqual(len(opt.state), 0)

    @every
    def test_nothing_happens_without_gradients(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, _ = problem(optim_info, device, dtype)
            opt = optim_info.optim_cls([weight, bias], **kwargs_of(given))
            before = weight.detach().clone(), bias.detach().clone()
            opt.step()
            self.assertEqual(opt.step(lambda: torch.tensor(3.0)), torch.tensor(3.0))
            self.assertEqual((weight, bias), before, rtol=0, atol=0)
            self.assertEqual(len(opt.state), 0)

    @every
    def test_zero_gradients_move_nothing(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, _ = problem(optim_info, device, dtype)
            opt = optim_info.optim_cls([weight, bias], **{**kwargs_of(given), "weight_decay": 0.0})
            before = weight.detach().clone(), bias.detach().clone()
            for _ in range(3):
                weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
                opt.step(lambda: torch.tensor(3.0))
            self.assertEqual((weight, bias), before, rtol=0, atol=0)

    @every
    def test_hooks_fire_in_order(self, device, dtype, optim_info):
        weight = nn.Parameter(torch.ones((2, 1) if optim_info.optim_cls is Muon else 2, device=device, dtype=dtype))
        opt = optim_info.optim_cls([weight])
        seen: list[str] = []
        handles = [
            opt.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before")),
            opt.register_step_post_hook(lambda opt, args, kwargs: seen.append("after")),
            opt.register_state_dict_pre_hook(lambda opt: seen.append("save")),
            opt.register_state_dict_post_hook(lambda opt, state: seen.append("saved")),
            opt.register_load_state_dict_pre_hook(lambda opt, state: seen.append("load")),
            opt.register_load_state_dict_post_hook(lambda opt: seen.append("loaded")),
        ]
        opt.step(lambda: seen.append("closure"))
        opt.load_state_dict(opt.state_dict())
        self.assertEqual(seen, ["before", "closure", "after", "save", "saved", "load", "loaded"])
        for handle in handles:
            handle.remove()
        opt.step()
        self.assertEqual(len(seen), 7)

    @every
    def test_a_hook_may_replace_the_state_dict(self, device, dtype, optim_info):
        weight, bias, x = problem(optim_info, device, dtype)
        opt = optim_info.optim_cls([weight, bias])
        opt.step(closure_of(opt, weight, bias, x))
        saved = opt.state_dict()
        new = optim_info.optim_cls([weight, bias])
        new.register_load_state_dict_pre_hook(lambda opt, state: saved)
        new.load_state_dict({"state": {}, "param_groups": saved["param_groups"]})
        self._equal_states(new.state_dict(), saved)

    @optims(DATABASE, dtypes=[torch.bfloat16])
    def test_a_bfloat16_buffer_is_the_momentum(self, device, dtype, optim_info):
        """torch's Muon divides its buffer in place here."""
        weight = torch.randn(6, 4, device=device, dtype=dtype, requires_grad=True)
        opt = optim_info.optim_cls([weight], momentum=0.5, nesterov=False)
        wanted, gain = torch.zeros(6, 4), 1.0 if optim_info.optim_cls is SpectralOptimizer else 0.5
        for _ in range(3):
            weight.grad = torch.randn_like(weight)
            wanted = (0.5 * wanted + gain * weight.grad.float()).to(dtype).float()
            opt.step()
        self.assertEqual(opt.state[weight]["momentum_buffer"].dtype, dtype)
        self.assertEqual(opt.state[weight]["momentum_buffer"].float(), wanted, rtol=2**-8, atol=0)

    @every
    def test_schedulers_lower_the_loss(self, device, dtype, optim_info):
        for build in (
            lambda opt: [StepLR(opt, gamma=0.9, step_size=3)],
            lambda opt: [ReduceLROnPlateau(opt, patience=1, factor=0.5)],
            lambda opt: [StepLR(opt, gamma=0.9, step_size=3), ReduceLROnPlateau(opt, patience=1, factor=0.5)],
        ):
            for lr in (0.05, torch.tensor(0.05)):
                weight, bias, x = problem(optim_info, device, dtype)
                opt = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=lr)
                schedulers, closure = build(opt), closure_of(opt, weight, bias, x)
                first = float(closure().detach())
                for _ in range(7):
                    loss = opt.step(closure)
                    for scheduler in schedulers:
                        scheduler.step(*([float(loss.detach())] if isinstance(scheduler, ReduceLROnPlateau) else []))
                self.assertLess(float(closure().detach()), first)

    @every
    def test_weight_decay_is_per_group(self, device, dtype, optim_info):
        weight, bias, _ = problem(optim_info, device, dtype)
        opt = optim_info.optim_cls(
            [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}], lr=0.1
        )
        before = weight.detach().clone(), bias.detach().clone()
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        opt.step()
        self.assertEqual(weight, before[0] * 0.95)
        self.assertEqual(bias, before[1], rtol=0, atol=0)

    @every
    def test_state_dicts_are_deterministic_and_hold_tensors(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device)[::3]:
            found = []
            for _ in range(2):
                torch.manual_seed(1)
                weight, bias, x = problem(optim_info, device, dtype)
                opt = optim_info.optim_cls([weight, bias], **kwargs_of(given))
                closure = closure_of(opt, weight, bias, x)
                for _ in range(3):
                    opt.step(closure)
                found.append(opt.state_dict())
            self._equal_states(*found)
            self.assertTrue(all(isinstance(value, Tensor) for *_, value in plain(found[0])))
            file = io.BytesIO()
            torch.save(found[0], file)
            file.seek(0)
            self._equal_states(torch.load(file, weights_only=True), found[0])

    @every
    def test_named_parameters(self, device, dtype, optim_info):
        weight, bias, x = problem(optim_info, device, dtype)
        named = [("w", weight), ("b", bias)]
        for first, second in ((named, [weight, bias]), ([weight, bias], named), (named, named)):
            opt = optim_info.optim_cls(first)
            opt.step(closure_of(opt, weight, bias, x))
            new = optim_info.optim_cls(second)
            new.load_state_dict(opt.state_dict())
            self.assertEqual([name for group in new.param_groups for name in group["param_names"]], ["w", "b"])
            for p in (weight, bias):
                self.assertEqual(dict(opt.state[p]), dict(new.state[p]), rtol=0, atol=0)

    @every
    def test_state_after_a_step_and_printing(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            weight, bias, x = problem(optim_info, device, dtype)
            opt = optim_info.optim_cls([weight, bias], **kwargs_of(given))
            self.assertEqual(len(opt.state), 0)
            opt.step(closure_of(opt, weight, bias, x))
            kept = [{"momentum_buffer"}] * 2
            if optim_info.optim_cls is SpectralOptimizer:
                kept = [{"momentum_buffer", "step", "tracker"}] * 2
                if given.kwargs.get("direction") not in ("frobenius", "orthogonalize"):
                    kept[0] = kept[0] | {"block"}
            elif optim_info.optim_cls is MuonAndAdamW:
                kept[1] = {"step", "exp_avg", "exp_avg_sq"}
            for p, keys in zip((weight, bias), kept, strict=True):
                state = opt.state[p]
                self.assertEqual(set(state), keys)
                self.assertEqual(float(state.get("step", 1.0)), 1.0)
                self.assertGreater(float(state.get("momentum_buffer", state.get("exp_avg")).norm()), 0.0)
            self.assertIn(optim_info.optim_cls.__name__, repr(opt))
            self.assertIn("weight_decay", repr(opt))

    @every
    def test_parameters_in_a_generator_and_in_empty_groups(self, device, dtype, optim_info):
        weight, bias, x = problem(optim_info, device, dtype)
        opt = optim_info.optim_cls(iter([weight, bias]))
        opt.add_param_group({"params": []})
        before = weight.detach().clone()
        opt.step(closure_of(opt, weight, bias, x))
        self.assertNotEqual(weight, before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.zero_grad()
        self.assertIsNone(weight.grad)


instantiate_device_type_tests(TestOptimizers, globals(), only_for=("cpu",))
