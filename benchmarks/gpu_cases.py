"""Cases, targets and providers of ``make gpu``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyvit
from benchmarks import baselines
from benchmarks.cases import LEVELS, Case, Target
from benchmarks.specs import Provider, Spec, compiled
from benchmarks.workload import OURS
from pyvit.dispatch.capabilities import absent
from pyvit.ops.reference import relative_position_index

PINNED = {
    "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
_RIVALS = ("sdpa cuDNN", "sdpa flash", "sdpa efficient")
#: window: (side of the map, width, heads, batch), head dimension 32 as in every Swin.
_WINDOWS = {7: (56, 96, 3, 128), 8: (64, 96, 3, 128), 12: (96, 128, 4, 32), 16: (64, 96, 3, 128), 24: (96, 128, 4, 32)}
#: tokens: batch, for 12 heads of 64; every input is larger than the L2 cache.
_TOKENS = {197: 256, 257: 192, 577: 64, 1025: 32}


def ops() -> list[Case]:
    """Attention, windows and patch embedding in bfloat16: forward, backward and both.

    The cases of ``level`` "default" run first: every kind of target once, attention's at every length.
    """
    found = []
    for n, batch in _TOKENS.items():
        shape = {"batch": batch, "heads": 12, "length": n, "dim": 64}
        label = f"{batch}x12x{n}x64"
        found.append(
            Case(
                "flash_attention",
                label,
                "bf16",
                "forward+backward",
                shape,
                Target(1.2, _RIVALS),
                "default",
                ("random",),
            )
        )
        found.append(Case("flash_attention", label, "bf16", "forward", shape, sources=("random",), against=_RIVALS))
    each = (("compile", 2.0), ("timm path", 5.0))
    for window, (side, width, heads, batch) in _WINDOWS.items():
        shape = {
            "batch": batch,
            "side": side,
            "width": width,
            "heads": heads,
            "window": window,
            "shift": window // 2,
            "version": 1,
        }
        label = f"{batch}x{side}x{side}x{width} window {window} shift {window // 2}"
        for mode, percent in (("forward", 60), ("backward", 40)):
            target = Target(against=("timm path",), roofline=percent, each=each)
            level = "default" if window == 7 else "full"
            found.append(Case("window_attention", label, "bf16", mode, shape, target, level, ("random",)))
    shape = {"batch": 256, "size": 224, "patch": 16, "width": 768}
    target = Target(against=("conv2d",), roofline=80)
    found.append(Case("patch_embed", "256x224 patch 16", "bf16", "forward", shape, target, "default", ("random",)))
    found.append(
        Case("patch_embed", "256x224 patch 16 uint8", "bf16", "forward", dict(shape, uint8=True), sources=("random",))
    )
    found.append(
        Case("patch_embed", "256x224 patch 16 keep 25 %", "bf16", "forward", dict(shape, keep=49), sources=("random",))
    )
    return found


def losses() -> list[Case]:
    """The pairwise losses in bfloat16, forward and backward, against the naive form that stores the logits."""
    target, mode = Target(1 / 0.7, ("naive",), memory=0.05), "forward+backward"
    pairs = {"batch": 16384, "dim": 512}
    crops = {"crops": 10, "views": 2, "batch": 64, "dim": 256, "prototypes": 65536}
    return [
        Case(
            "info_nce", "batch 32768 d 512", "bf16", mode, {"batch": 32768, "dim": 512}, target, "default", ("random",)
        ),
        Case("nt_xent", "batch 8192 d 128", "bf16", mode, {"batch": 8192, "dim": 128}, sources=("random",)),
        Case("sigmoid_contrastive", "batch 16384 d 512", "bf16", mode, pairs, sources=("random",)),
        Case(
            "distillation_cross_entropy",
            "10 + 2 crops of 64, 65536 prototypes",
            "bf16",
            mode,
            crops,
            sources=("random",),
        ),
    ]


def models() -> list[Case]:
    """Throughput of Swin-B, training memory of Swin-T, and ViT-B."""
    compiled, eager = ("timm + compile", "naive + compile", "compile"), ("eager SDPA", "eager naive")
    big, swin = {"batch": 128, "size": 224}, "swin_tiny_patch4_window7_224"
    memory = Target(memory=0.7, against=("timm", "eager naive"))
    faster = Target(1.5, compiled)
    small = {"batch": 64, "size": 224}
    base = "swin_base_patch4_window7_224"
    return [
        Case(base, "batch 128", "bf16", "inference", big, faster, "default", ("random",), eager),
        Case(swin, "batch 64", "bf16", "train", small, memory, "default", ("random",), eager),
        Case("vit_base_patch16_224", "batch 128", "bf16", "inference", big, sources=("random",), against=eager),
    ]


def ordered(found: list[Case]) -> list[Case]:
    """Cases in order of priority for a run with a time limit: "default" ones first, then those with targets."""
    return sorted(found, key=lambda case: (LEVELS.index(case.level), case.target is None))


def tiny() -> list[Case]:
    """Cases of the same kinds, small enough for the interpreter and the tests."""
    attention = {"batch": 2, "heads": 2, "length": 33, "dim": 32}
    window = {"batch": 1, "side": 14, "width": 64, "heads": 2, "window": 7, "shift": 3, "version": 1}
    patch = {"batch": 2, "size": 32, "patch": 16, "width": 32}
    against, each = ("timm path",), (("timm path", 5.0),)
    pairs, mode = {"batch": 40, "dim": 32}, "forward+backward"
    crops = {"crops": 3, "views": 2, "batch": 5, "dim": 16, "prototypes": 70}
    return [
        Case(
            "flash_attention", "tiny", "fp32", "forward+backward", attention, Target(1.2, _RIVALS), sources=("random",)
        ),
        Case(
            "window_attention",
            "tiny",
            "fp32",
            "forward",
            window,
            Target(against=against, roofline=60, each=each),
            sources=("random",),
        ),
        Case(
            "window_attention",
            "tiny",
            "fp32",
            "backward",
            window,
            Target(against=against, roofline=40, each=each),
            sources=("random",),
        ),
        Case(
            "patch_embed",
            "tiny",
            "fp32",
            "forward",
            patch,
            Target(against=("conv2d",), roofline=80),
            sources=("random",),
        ),
        Case("info_nce", "tiny", "bf16", mode, pairs, Target(1 / 0.7, ("naive",), memory=0.05), sources=("random",)),
        Case("nt_xent", "tiny", "bf16", mode, pairs, sources=("random",)),
        Case("sigmoid_contrastive", "tiny", "bf16", mode, pairs, sources=("random",)),
        Case("distillation_cross_entropy", "tiny", "bf16", mode, crops, sources=("random",)),
    ]


def _pinned(backend: SDPBackend, causal: bool) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)

    return run


def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(lambda q, k, v, bias=None: flex_attention(q, k, v))


def _flex_windows(case: Case, spec: Spec) -> Callable[..., Any]:
    """Window attention with FlexAttention: bias and shift mask as a score modification, with roll and partition."""
    from torch.nn.attention.flex_attention import flex_attention

    side, heads, window, shift = (case.shape[key] for key in ("side", "heads", "window", "shift"))
    device = spec.tensors["qkv"].device
    index = relative_position_index((window, window)).to(device)
    mask = baselines.shift_mask(side, side, window, shift).to(device)
    count, n = mask.shape[0], window * window

    def run(qkv: Tensor, x: Tensor, bias_table: Tensor) -> tuple[Tensor, Tensor]:
        def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias_table[index[i, j], h] + mask[b % count, i, j]

        windows = baselines.partition(x.roll((-shift, -shift), (1, 2)), window)
        q, k, v = qkv.view(-1, n, 3, heads, qkv.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
        out = flex_attention(q, k, v, score_mod=biased).transpose(1, 2).reshape(-1, n, qkv.shape[-1] // 3)
        return baselines.reverse(out, window, side, side).roll((shift, shift), (1, 2)), windows

    return compiled(run)


def on_backend(backend: str, ours: Provider) -> Provider:
    """Ours with a given backend."""

    def run(**tensors: Tensor) -> Any:
        with pyvit.use_backend(backend):
            return ours.fn(**tensors)

    return replace(ours, name=f"{OURS} {backend}", fn=run)


def extra(case: Case, spec: Spec) -> Sequence[Provider]:
    """Each of our GPU backends, each SDPA backend, and FlexAttention."""
    if case.op not in ("flash_attention", "window_attention", "patch_embed"):
        return []
    ours = next(p for p in spec.providers if p.name == OURS)
    device = next(iter(spec.tensors.values())).device.type
    found = [on_backend(backend, ours) for backend in ("cuda", "triton") if absent(case.op, backend, device) is None]
    if case.op == "flash_attention":
        found += [Provider(name, _pinned(backend, case.shape.get("causal", False))) for name, backend in PINNED.items()]
        found.append(Provider("flex", _flex_attention()))
    if case.op == "window_attention" and case.shape["version"] == 1 and case.shape["shift"]:
        path = next(p for p in spec.providers if p.name == "timm path")
        found.append(Provider("flex", _flex_windows(case, spec), path.prepare))
    return found
