"""A transformer block, attention and MLP with norms and residuals: pyvit's, and the same in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import pyvit
from benchmarks import baselines, inputs
from benchmarks.cases import Case
from benchmarks.specs import Provider, Spec, Tensors, compiled
from benchmarks.workload import OURS
from pyvit.models.swin import SwinBlock


def _random(module: nn.Module) -> nn.Module:
    """Norms, biases and tables take random values too, so that mixed-up parameters are noticed."""
    rng = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in module.parameters():
            wide = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=rng) * wide)
    return module.eval()


def _spec(case: Case, x: Tensor, plain: dict[str, nn.Module], ours: nn.Module, flops: float) -> Spec:
    """``plain``: the naive block and that with SDPA. Weights are tensors of the case, so that a backward has their
    gradients; in inference ours are packed, as a model's."""
    state = {key: value.detach().to(x.device, x.dtype) for key, value in _random(plain["naive"]).named_parameters()}
    modules = {name: copy.deepcopy(module).eval().to(x.device, x.dtype) for name, module in plain.items()}
    modules[OURS] = ours.eval().to(x.device, x.dtype)
    for module in modules.values():
        module.load_state_dict(state)
    exact = copy.deepcopy(modules["naive"]).double()

    def call(module: nn.Module) -> Callable[..., Tensor]:
        if case.mode == "forward":
            return lambda x, **weights: module(x)
        return lambda x, **weights: functional_call(module, weights, (x,))

    def definition(x: Tensor, **weights: Tensor) -> Tensor:
        module = exact if x.dtype == torch.float64 else modules["naive"]
        return functional_call(module, weights, (x,))

    if case.mode == "forward":
        pyvit.pack_weights(modules[OURS])
    providers = [
        Provider(OURS, call(modules[OURS])),
        Provider("naive", call(modules["naive"])),
        Provider("sdpa", call(modules["sdpa"])),
        Provider("compile", compiled(call(modules["sdpa"]))),
    ]
    tensors: Tensors = {"x": x, **state}
    return Spec(tensors, definition, providers, tuple(tensors), flops, 2.0, x.numel())


def _vit_block(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, n, c, heads = (case.shape[key] for key in ("batch", "length", "width", "heads"))
    x = inputs.projected_qkv(source, b, n, c)[..., :c].contiguous().to(device, dtype)
    plain: dict[str, nn.Module] = {
        name: baselines.Block(c, heads, attend) for name, attend in baselines.ATTENTION.items()
    }
    flops = 24.0 * b * n * c * c + 4.0 * b * n * n * c
    return _spec(case, x, plain, pyvit.nn.Block(c, heads), flops)


def _swin_block(case: Case, source: str, dtype: torch.dtype, device: str) -> Spec:
    b, side, c, heads, window, shift = (
        case.shape[key] for key in ("batch", "side", "width", "heads", "window", "shift")
    )
    x = inputs.window_qkv(source, b, side, c)[..., :c].contiguous().to(device, dtype)
    plain: dict[str, nn.Module] = {
        name: baselines.SwinBlock(c, heads, side, window, shift, attend) for name, attend in baselines.ATTENTION.items()
    }
    attention = pyvit.nn.WindowAttention(c, heads, window, shift)
    ours = SwinBlock(c, attention, 4.0, 0.0, 0.0, False, 1e-5)
    flops = 24.0 * b * side * side * c * c + 4.0 * b * side * side * window * window * c
    return _spec(case, x, plain, ours, flops)


SPECS: dict[str, Callable[[Case, str, torch.dtype, str], Spec]] = {"vit_block": _vit_block, "swin_block": _swin_block}
