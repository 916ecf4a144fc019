"""Whole models with the same weights: pyvit's, plain PyTorch, and all peers that support the case."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import pyvit
from benchmarks import baselines, inputs, peer_models, peers
from benchmarks.cases import BACKBONES, Case
from benchmarks.gate import Gate, Verdict, worst
from benchmarks.workload import OURS, Contender, Workload, raised, uses_pyvit

Forward = Callable[[Tensor], Tensor]


@functools.cache
def weights(name: str) -> dict[str, Tensor]:
    """Random weights with timm's names. LayerNorm's parameters and the biases are random too, so that mixed-up
    parameters are noticed."""
    torch.manual_seed(0)
    state = baselines.create(name).state_dict()
    for key, value in state.items():
        if value.dim() == 1 or key == "cls_token":
            value.add_(torch.randn_like(value) * 0.05)
        elif "table" in key or key == "pos_embed":
            value.copy_(torch.randn_like(value) * 0.2)
    return state


@functools.cache
def flops(name: str, batch: int, train: bool) -> float:
    """Flops of the matrix products, forward or forward and backward, counted on the naive model, or on timm's."""
    size = BACKBONES.get(name)
    model = _plain(name, "naive") if size is None else _backbones().timm_model(name)
    with FlopCounterMode(display=False) as counter:
        out = model(torch.zeros(1, 3, size or 224, size or 224))
        if train:
            out.sum().backward()
    return float(batch * counter.get_total_flops())


def parameters(name: str) -> int:
    state = weights(name) if name not in BACKBONES else _backbones().weights(name)
    return sum(value.numel() for value in state.values())


def traffic(name: str, batch: int, size: int, dtype: str, train: bool) -> float:
    """The bytes that must be moved if every activation stays in a cache: the images, and the weights once; in a
    training step the weights three times (forward, backward, AdamW), gradients written and read, and the weights and
    both moments, all in float32, read or written by AdamW."""
    images = 3.0 * batch * size * size
    count = parameters(name)
    if train:
        return 4 * (10 * count + images)
    return {"fp32": 4, "bf16": 2, "int8": 1}[dtype] * (count + images)


def _backbones() -> ModuleType:
    from benchmarks import backbones  # which imports this module

    return backbones


def _plain(name: str, attention: str) -> nn.Module:
    model = baselines.create(name, attention=attention)
    model.load_state_dict(weights(name))
    return model


def _peer(library: str, name: str) -> nn.Module:
    return peer_models.MODELS[library](name, weights(name))


def _accelerated(name: str) -> nn.Module:
    model = _peer("timm", name)
    pyvit.accelerate(model, strict=True)
    return model


def _ours(name: str) -> nn.Module:
    model = pyvit.create_model(
        name, drop_path_rate=0.0
    )  # without stochastic depth, so that every contender computes every block
    model.load_state_dict(weights(name))
    return model


#: Modules by provider; the rest (ONNX Runtime, OpenVINO) only infer.
MODULES: dict[str, Callable[[str], nn.Module]] = {
    OURS: _ours,
    "eager SDPA": lambda name: _plain(name, "sdpa"),
    "eager naive": lambda name: _plain(name, "naive"),
    "compile": lambda name: _plain(name, "sdpa"),
    "naive + compile": lambda name: _plain(name, "naive"),
    "ours + compile": _ours,
    "compile, max-autotune": lambda name: _plain(name, "sdpa"),
    **{library: functools.partial(_peer, library) for library in peer_models.MODELS},
    "timm + compile": functools.partial(_peer, "timm"),
    "timm + accelerate": _accelerated,
}
_NEEDS = {
    "ours + compile": ("compile",),
    "compile, max-autotune": ("max-autotune",),
    "naive + compile": ("compile",),
    "timm + compile": ("compile", "timm"),
    "timm + accelerate": ("accelerate", "timm"),
}
_CPU_ONLY = ("onnxruntime", "openvino")


def _images(case: Case, source: str, device: str) -> Tensor:
    return inputs.normalised(inputs.pixels(source, case.shape["batch"], case.shape["size"])).to(device)


def _wanted(case: Case, asked: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Providers to build, and the reason for those that were requested but cannot be used."""
    found, unavailable = [], {}
    for name in (*MODULES, *(_CPU_ONLY if device == "cpu" else ())):
        packages = _NEEDS.get(name, (name,))
        if name in (OURS, "eager SDPA", "eager naive"):
            if name == OURS and not hasattr(pyvit, "create_model"):
                unavailable[OURS] = "this pyvit has no create_model"
            else:
                found.append(name)
        elif all(package in asked for package in packages):
            reason = next((why for package in packages if (why := peers.absent(package))), None)
            if reason is None and name in _CPU_ONLY and case.mode == "train":
                reason = "cannot train"
            if reason is None and name == "onnxruntime" and case.dtype != "fp32":
                reason = f"its CPU provider has no {case.dtype} kernels for this model"
            if reason is None:
                found.append(name)
            else:
                unavailable[name] = reason
    return found, unavailable


def compiled(name: str, model: nn.Module) -> nn.Module:
    """The model as its provider runs it. Inductor tunes products on CPUs only where weights are frozen, which is for
    inference."""
    if name.endswith("max-autotune"):
        return torch.compile(model, dynamic=False, options={"max_autotune": True, "freezing": not model.training})
    return torch.compile(model, dynamic=False) if name.endswith("compile") else model


def no_grad(model: Callable[[Tensor], Tensor]) -> Forward:
    def forward(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)

    return forward


def _inference(case: Case, name: str, images: Tensor) -> Forward:
    threads, dtype = torch.get_num_threads(), inputs.DTYPES[case.dtype]
    if name == "onnxruntime":
        return peers.onnxruntime_call(_plain(case.op, "sdpa").eval(), images, threads)
    if name == "openvino":
        call = peers.openvino_call(_plain(case.op, "sdpa").eval(), images.float(), case.dtype, threads)
        return lambda x: call(x.float()).to(x.dtype)
    model = MODULES[name](case.op).eval().to(images.device, dtype)
    if uses_pyvit(name):  # OpenVINO and ONNX Runtime also prepack weights
        pyvit.pack_weights(model)
    return no_grad(compiled(name, model))


def _build_inference(case: Case, source: str, work: Workload, names: Sequence[str], device: str) -> None:
    dtype = inputs.DTYPES[case.dtype]
    images = _images(case, source, device).to(dtype)
    naive = {kind: _plain(case.op, "naive").to(device, kind).eval() for kind in (torch.float64, dtype)}

    def reference(images: Tensor) -> Tensor:
        with torch.no_grad():
            return naive[images.dtype](images)

    gate: list[Gate] = []

    def verdict(name: str, forward: Forward) -> Verdict:
        if not gate:
            gate.append(Gate({"images": images}, reference, items=(0,)))
        return worst(gate[0](name, lambda images: forward(images)))

    for name in names:
        try:
            forward = _inference(case, name, images)
        except Exception as error:
            if name == OURS:
                raise
            work.unavailable[name] = raised(error)
            continue
        given = images.float() if name == "openvino" else images
        work.contenders[name] = Contender(
            lambda f=forward, x=given: f(x), lambda n=name, f=forward: verdict(n, f), peers.version(name)
        )


def _build_train(case: Case, source: str, work: Workload, names: Sequence[str], device: str) -> None:
    images = _images(case, source, device)
    labels = torch.arange(images.shape[0], device=device) * 97 % 1000
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=case.dtype == "bf16")
    few = images[:2]
    parameters = dict(weights(case.op).items())
    naive = {torch.float64: _plain(case.op, "naive").double(), torch.float32: _plain(case.op, "naive")}

    def logits_of(
        model: nn.Module, tensors: dict[str, Tensor], low: bool
    ) -> Tensor:  # the rounding of the loss, a single number, is random
        x = tensors.pop("images")
        with torch.autocast(device, torch.bfloat16, enabled=low):
            return functional_call(model, tensors, (x,)).to(x.dtype)

    def reference(**tensors: Tensor) -> Tensor:
        kind = tensors["images"].dtype
        return logits_of(naive[kind], tensors, case.dtype == "bf16" and kind != torch.float64)

    gate: list[Gate] = []

    def verdict(name: str, model: nn.Module) -> Verdict:
        if not gate:
            gate.append(Gate({"images": few, **parameters}, reference, list(parameters)))
        if name in ("transformers", "torchvision", "open_clip"):  # parameters of other names: compare only the logits
            forward = Gate(
                {"images": few},
                lambda images: reference(images=images, **{k: v.to(images.dtype) for k, v in parameters.items()}),
            )
            return worst(forward(name, lambda images: logits_of(model, {"images": images}, case.dtype == "bf16")))
        return worst(gate[0](name, lambda **tensors: logits_of(model, tensors, case.dtype == "bf16")))

    for name in names:
        model = MODULES[name](case.op).train().to(device)
        trained = copy.deepcopy(model)
        run = compiled(name, trained)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, fused=True)

        def step(model: Any = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

        held = 4 * sum(p.nbytes for p in trained.parameters()) / 2**20  # weights, gradients and AdamW's two moments
        work.contenders[name] = Contender(step, lambda n=name, m=model: verdict(n, m), peers.version(name), held)


def build(case: Case, source: str, asked: Sequence[str], device: str = "cpu") -> Workload:
    """The workload of a model's case with the peers of ``asked``."""
    if case.dtype == "int8":
        from benchmarks import models_int8

        return models_int8.build(case, source, asked)
    if case.op in BACKBONES:
        return _backbones().build(case, source, asked, device)
    names, unavailable = _wanted(case, asked, device)
    train = case.mode == "train"
    batch, size = case.shape["batch"], case.shape["size"]
    moved = traffic(case.op, batch, size, case.dtype, train)
    work = Workload(case, source, flops(case.op, batch, train), moved, unavailable=unavailable)
    (_build_train if train else _build_inference)(case, source, work, names, device)
    return work
