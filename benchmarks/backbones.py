"""Newer backbones that pyvit and timm have under the same names: timm's model with random weights, and pyvit's with the
same. timm's in float64 is the reference, so that without timm nothing is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pyvit
from benchmarks import inputs, peers
from benchmarks.cases import Case
from benchmarks.gate import Gate, Verdict, worst
from benchmarks.models import compiled, flops, no_grad, traffic
from benchmarks.workload import OURS, Contender, Workload, raised, uses_pyvit

#: timm's settings and ours, where they are not both the defaults: timm pools DINOv3, and has an epsilon in SAM's norms,
#: other than the original's code, which pyvit follows; SAM's images have 1024 pixels.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_small_patch16_dinov3": ({"global_pool": "token"}, {}),
    "vit_base_patch16_dinov3": ({"global_pool": "token"}, {}),
    "samvit_base_patch16": (
        {"img_size": 512, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)},
        {"img_size": 512},
    ),
}
_DEFAULT: tuple[dict[str, Any], dict[str, Any]] = ({}, {})


@functools.cache
def weights(name: str) -> dict[str, Tensor]:
    """timm's weights, with those that start as zero, one or next to zero made random, so that mixed-up parameters are
    noticed."""
    torch.manual_seed(0)
    state = peers.import_timm().create_model(name, **SETTINGS.get(name, _DEFAULT)[0]).state_dict()
    for value in state.values():
        if value.is_floating_point() and value.numel() > 1 and (value.dim() == 1 or value.std() < 1e-3):
            value.add_(torch.randn_like(value) * 0.05)
    return state


def timm_model(name: str) -> nn.Module:
    model = peers.import_timm().create_model(name, **SETTINGS.get(name, _DEFAULT)[0])
    model.load_state_dict(weights(name))
    return _Features(model).eval() if name.startswith("samvit") else model.eval()


class _Features(nn.Module):
    """A map of features, where timm's model averages it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[operator, no-any-return]


def _accelerated(name: str) -> nn.Module:
    model = timm_model(name)
    pyvit.accelerate(model)
    return model


def _ours(name: str) -> nn.Module:
    model = pyvit.create_model(name, **SETTINGS.get(name, _DEFAULT)[1])
    pyvit.load_checkpoint(model, weights(name), allow=("mask_token",))
    return model.eval()


#: Modules by provider, and the peers that must be asked for.
MODULES: dict[str, tuple[Callable[[str], nn.Module], tuple[str, ...]]] = {
    OURS: (_ours, ()),
    "timm": (timm_model, ()),
    "ours + compile": (_ours, ("compile",)),
    "timm + compile": (timm_model, ("compile",)),
    "timm + accelerate": (_accelerated, ("accelerate",)),
}


def build(case: Case, source: str, asked: Sequence[str], device: str) -> Workload:
    """The workload of a case of :data:`benchmarks.cases.BACKBONES`."""
    wanted = [name for name, (_, needed) in MODULES.items() if set(needed) <= set(asked)]
    why = peers.absent("timm")
    if why is not None:
        return Workload(case, source, 0.0, 0.0, unavailable=dict.fromkeys(wanted, f"timm is the reference: {why}"))
    dtype = inputs.DTYPES[case.dtype]
    batch, size = case.shape["batch"], case.shape["size"]
    images = inputs.normalised(inputs.pixels(source, batch, size)).to(device, dtype)
    moved = traffic(case.op, batch, size, case.dtype, False)
    work = Workload(case, source, flops(case.op, batch, False), moved)

    naive = {kind: no_grad(timm_model(case.op).to(device, kind)) for kind in (torch.float64, dtype)}
    gate: list[Gate] = []

    def verdict(name: str, forward: Callable[[Tensor], Tensor]) -> Verdict:
        if not gate:
            gate.append(Gate({"images": images}, lambda images: naive[images.dtype](images), items=(0,)))
        return worst(gate[0](name, lambda images: forward(images)))

    for name in wanted:
        try:
            model = MODULES[name][0](case.op).to(device, dtype)
            if uses_pyvit(name):
                pyvit.pack_weights(model)
            forward = no_grad(compiled(name, model))
        except Exception as error:
            if name == OURS:
                raise
            work.unavailable[name] = raised(error)
            continue
        work.contenders[name] = Contender(
            lambda f=forward: f(images), lambda n=name, f=forward: verdict(n, f), peers.version(name)
        )
    return work
