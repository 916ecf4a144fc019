"""Other attention kernels on request (``--peers sdpa,flex,flash-attn,xformers,natten``), or why one cannot run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases
from benchmarks.cases import Case
from benchmarks.specs import DRAWS, Provider, Spec

#: SDPA's backends that PyTorch has for GPUs only.
_GPU_ONLY = ("sdpa cuDNN", "sdpa efficient")


def _absent(package: str, device: str, case: Case) -> str:
    """Why a library of CUDA kernels for half precision cannot serve a case of attention; empty if it can."""
    if device != "cuda":
        return f"{package} has kernels for GPUs only"
    if (why := gpu_cases.missing(package.replace("-", "_"))) is not None:
        return why
    if case.shape.get("dropout"):
        return "dropout is not compared"
    return ""


def _heads_last(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``call`` takes and returns (B, N, H, D)."""

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return call(*(t.transpose(1, 2) for t in (q, k, v)), bias).transpose(1, 2)

    return run


def flash_attn(case: Case, device: str) -> Provider | str:
    why = _absent("flash-attn", device, case)
    if not why and case.dtype not in ("bf16", "fp16"):
        why = f"flash-attn has no {case.dtype}"
    if not why and case.shape.get("bias"):
        why = "flash-attn has no bias"
    if why:
        return why
    library: Any = importlib.import_module("flash_attn")
    causal = case.shape.get("causal", False)
    call = lambda q, k, v, bias: library.flash_attn_func(q, k, v, causal=causal)  # noqa: E731
    return Provider("", _heads_last(call), version=gpu_cases.version("flash-attn"))


def xformers(case: Case, device: str) -> Provider | str:
    why = _absent("xformers", device, case)
    if not why and case.shape.get("kv_heads"):
        why = "grouped key heads are another call"
    if why:
        return why
    library: Any = importlib.import_module("xformers.ops")
    batch, heads = case.shape["batch"], case.shape["heads"]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask = library.LowerTriangularMask() if case.shape.get("causal") else bias
        if isinstance(mask, Tensor):
            mask = mask.expand(batch, heads, -1, -1)
        return library.memory_efficient_attention(q, k, v, attn_bias=mask)

    return Provider("", _heads_last(call), version=gpu_cases.version("xformers"))


def natten(case: Case, device: str) -> Provider | str:
    """Its attention among all tokens (natten >= 0.20); its neighborhoods are no windows of Swin."""
    why = _absent("natten", device, case)
    if not why and case.shape.get("bias"):
        why = "natten has no bias"
    if why:
        return why
    library: Any = importlib.import_module("natten")
    if not hasattr(library, "attention"):
        return f"{gpu_cases.version('natten')} has no attention among all tokens"
    causal = case.shape.get("causal", False)
    call = lambda q, k, v, bias: library.attention(q, k, v, is_causal=causal)  # noqa: E731
    return Provider("", _heads_last(call), version=gpu_cases.version("natten"))


def sdpa(case: Case, device: str) -> list[Provider]:
    """Every backend of SDPA alone."""
    found = []
    for provider in gpu_cases.pinned(case):
        if device == "cpu" and provider.name in _GPU_ONLY:
            provider = replace(provider, missing="PyTorch has it for GPUs only")
        elif device == "cpu" and provider.name == "sdpa flash" and case.shape.get("dropout"):
            provider = replace(provider, missing="has no dropout on CPUs")
        found.append(provider)
    return found


def extra(asked: Sequence[str], case: Case, spec: Spec) -> Sequence[Provider]:
    """The providers of ``asked`` for a case of attention or shifted windows."""
    device = next(iter(spec.tensors.values())).device.type
    found: list[Provider] = []
    made: dict[str, Provider | str] = {}
    if case.op == "flash_attention":
        found += sdpa(case, device) if "sdpa" in asked else []
        makers: dict[str, Callable[[], Provider | str]] = {
            "flex": lambda: _flex(case, device),
            "flash-attn": lambda: flash_attn(case, device),
            "xformers": lambda: xformers(case, device),
            "natten": lambda: natten(case, device),
        }
        made = {name: make() for name, make in makers.items() if name in asked}
    elif case.op == "window_attention" and case.shape["version"] == 1 and case.shape["shift"]:
        if "flex" in asked:
            path = next(p for p in spec.providers if p.name == "timm path")
            reason = _no_flex(case, device)
            made["flex"] = reason or Provider("", gpu_cases._flex_windows(case, spec), path.prepare)
        if "natten" in asked:
            made["natten"] = "its neighborhoods move with each query: another computation than shifted windows"
    for name, provider in made.items():
        if isinstance(provider, str):
            found.append(Provider(name, spec.naive, missing=provider))
        else:
            unchecked = DRAWS if case.shape.get("dropout") else ""
            found.append(replace(provider, name=name, unchecked=unchecked))
    return found


def _no_flex(case: Case, device: str) -> str:
    if device == "cpu" and case.mode != "forward":
        return "FlexAttention has no backward on CPUs"
    if device == "cpu" and not torch.cpu._is_avx2_supported():
        return "FlexAttention needs AVX2 on CPUs"
    return ""


def _flex(case: Case, device: str) -> Provider | str:
    return _no_flex(case, device) or gpu_cases._flex(case, None)
