"""The benchmarks' cases as data: shapes of vision transformers, and their targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: quick: takes seconds, shows that everything runs; default: ``make bench``; full: every case.
LEVELS = ("quick", "default", "full")
#: Modes of whole models.
MODEL_MODES = ("inference", "train")


@dataclass(frozen=True)
class Target:
    """A target for ``ours``; every part is optional.

    ``ratio``: speedup over the fastest of ``against``; ``ceiling``: per cent of the machine's multiply-add rate;
    ``memory``: peak memory relative to the first of ``against``; ``extra_us``: microseconds a call may take more than
    the fastest of ``against``; ``roofline``: per cent of what memory bandwidth and arithmetic allow; ``each``: pairs of
    a provider and the speedup over it.
    """

    ratio: float | None = None
    against: tuple[str, ...] = ()
    ceiling: float | None = None
    memory: float | None = None
    extra_us: float | None = None
    roofline: float | None = None
    each: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        parts = []
        if self.ratio is not None:
            parts.append(f"{self.ratio:g}x")
        if self.ceiling is not None:
            parts.append(f"{self.ceiling:g} %")
        if self.memory is not None:
            parts.append(f"{self.memory:g}x memory")
        if self.extra_us is not None:
            parts.append(f"+{self.extra_us:g} us")
        if self.roofline is not None:
            parts.append(f"{self.roofline:g} % of roofline")
        parts += [f"{times:g}x {name}" for name, times in self.each]
        return ", ".join(parts)


@dataclass(frozen=True)
class Case:
    """All providers of ``op`` for one ``shape``.

    ``mode``: "forward", "forward+backward"; for models "inference", "train" (forward, backward, AdamW).
    """

    op: str
    label: str
    dtype: str
    mode: str
    shape: Mapping[str, Any]
    target: Target | None = None
    level: str = "full"
    sources: tuple[str, ...] = ("photos",)
    against: tuple[str, ...] = field(default=())

    @property
    def id(self) -> str:
        return f"{self.op} {self.label} {self.dtype} {self.mode}"

    @property
    def baseline(self) -> tuple[str, ...]:
        """The providers whose fastest has 1.0 in the ratio column."""
        return self.against or (
            self.target.against if self.target and self.target.against else BASELINES.get(self.op, ("sdpa", "naive"))
        )

    def at(self, level: str) -> bool:
        """Whether a run at ``level`` includes this case."""
        return LEVELS.index(self.level) <= LEVELS.index(level)


BASELINES = {
    "flash_attention": ("sdpa", "naive"),
    "rope_attention": ("apart",),
    "decomposed_attention": ("SDPA with the bias",),
    "window_attention": ("timm path",),
    "patch_embed": ("conv2d",),
    "linear": ("F.linear",),
    "gated_mlp": ("naive",),
    "layer_norm": ("F.layer_norm",),
    "rms_norm": ("F.rms_norm",),
}
_FORWARD, _BACKWARD = "forward", "forward+backward"


def _attention(
    batch: int,
    heads: int,
    length: int,
    dim: int,
    dtype: str,
    mode: str,
    target: Target | None = None,
    level: str = "full",
    **kw: Any,
) -> Case:
    options = {name: kw.pop(name) for name in ("bias", "causal") if name in kw}
    label = f"{batch}x{heads}x{length}x{dim}" + "".join(f" {name}" for name in options)
    return Case(
        "flash_attention",
        label,
        dtype,
        mode,
        dict(batch=batch, heads=heads, length=length, dim=dim, **options),
        target,
        level,
        **kw,
    )


def attention() -> list[Case]:
    """Shapes of ViT-B and ViT-L at 224, 384 and 512 pixels, of Swin as batches of short sequences, of CLIP's text
    tower, and with ViT-H's head dimension."""
    best = ("sdpa", "naive")
    forward = {
        "fp32": {197: (2.7, 75), 577: (2.6, 82), 1025: (2.4, 87)},
        "bf16": {197: (2.1, 75), 577: (4.5, 80), 1025: (4.5, 83)},
    }
    both = {"fp32": {197: 6.0, 1025: 2.2}, "bf16": {197: 1.5, 1025: 3.0}}
    sources = {197: ("photos", "random")}
    found = []
    for dtype, targets in forward.items():
        for n, (times, percent) in targets.items():
            heads = 16 if n == 577 else 12
            target = Target(times, best, percent)
            found.append(
                _attention(8, heads, n, 64, dtype, _FORWARD, target, "default", sources=sources.get(n, ("photos",)))
            )
    for dtype, targets in both.items():
        for n, times in targets.items():
            found.append(_attention(8 if n == 197 else 4, 12, n, 64, dtype, _BACKWARD, Target(times, best), "default"))
    for dtype in ("fp32", "bf16"):
        found.append(_attention(1024, 3, 49, 32, dtype, _FORWARD, sources=("random",)))
        for n, heads, dim in ((197, 12, 64), (1025, 12, 64)):
            found.append(_attention(1, heads, n, dim, dtype, _FORWARD))
        found.append(_attention(1, 12, 4096, 64, dtype, _FORWARD))
        found.append(_attention(8, 16, 257, 80, dtype, _FORWARD))
        found.append(
            _attention(8, 12, 197, 64, dtype, _FORWARD, level="default" if dtype == "fp32" else "full", bias=True)
        )
        found.append(_attention(8, 12, 197, 64, dtype, _BACKWARD, bias=True))
        found.append(_attention(8, 8, 77, 64, dtype, _FORWARD, causal=True, sources=("random",)))
        found.append(
            Case(
                "flash_attention_varlen",
                "2x197 + 8x37, 6 heads",
                dtype,
                _FORWARD,
                {"lengths": (197,) * 2 + (37,) * 8, "heads": 6, "dim": 64},
            )
        )
    found += _rope_attention() + _decomposed_attention()
    overhead = Target(against=("sdpa",), extra_us=10.0)
    small = {"batch": 1, "heads": 1, "length": 1, "dim": 8}
    found.append(
        Case("flash_attention", "call overhead 1x1x1x8", "fp32", _FORWARD, small, overhead, "default", ("random",))
    )
    found.append(_attention(2, 2, 65, 32, "fp32", _FORWARD, level="quick"))
    return found


def _decomposed_attention() -> list[Case]:
    """SAM's encoder: windows of 14 x 14, and the whole map of 64 x 64. Against the bias as a tensor, as transformers
    and segment-anything have it, and as further channels."""
    against = ("SDPA with the bias", "as channels")
    found = []
    for dtype in ("fp32", "bf16"):
        for batch, side in ((25, 14), (1, 32), (1, 64)):
            shape = {"batch": batch, "heads": 12, "side": side, "dim": 64}
            for mode in (_FORWARD, _BACKWARD):
                level = "default" if side == 14 and mode == _FORWARD else "full"
                label = f"{batch}x12x{side}x{side}x64"
                found.append(Case("decomposed_attention", label, dtype, mode, shape, None, level, against=against))
    small = {"batch": 2, "heads": 2, "side": 7, "dim": 32}
    found.append(Case("decomposed_attention", "2x2x7x7x32", "fp32", _FORWARD, small, level="quick", against=against))
    return found


def _rope_attention() -> list[Case]:
    """Attention with rotary positions, as DINOv3, and after norms of queries and keys: against rotation and attention
    apart, and attention alone."""
    apart = ("apart",)
    both = Target(1.25, apart, each=(("attention alone", 0.92),))
    found = []
    for dtype in ("fp32", "bf16"):
        for n, heads in ((197, 12), (577, 16), (1370, 16)):
            for norm in (None, "layer"):
                shape = {"batch": 8 if n == 197 else 2, "heads": heads, "length": n, "dim": 64, "norm": norm}
                label = f"{shape['batch']}x{heads}x{n}x64" + (f" {norm} norm" if norm else "")
                modes = (_FORWARD, _BACKWARD) if n == 197 else (_FORWARD,)
                level = "default" if n == 197 and norm is None else "full"
                found += [
                    Case("rope_attention", label, dtype, mode, shape, both, level, against=apart) for mode in modes
                ]
    small = {"batch": 2, "heads": 2, "length": 65, "dim": 32, "norm": "rms"}
    found.append(Case("rope_attention", "2x2x65x32 rms norm", "fp32", _FORWARD, small, level="quick", against=apart))
    return found


#: side of the feature map, channels, heads of Swin-T's first three stages at 224 pixels.
SWIN_STAGES = ((56, 96, 3), (28, 192, 6), (14, 384, 12))


def _windows(
    batch: int,
    stage: tuple[int, int, int],
    dtype: str,
    mode: str,
    target: Target | None,
    level: str = "full",
    **kw: Any,
) -> Case:
    side, width, heads = stage
    shape = {
        "batch": batch,
        "side": side,
        "width": width,
        "heads": heads,
        "window": kw.get("window", 7),
        "shift": kw.get("shift", 3),
        "version": kw.get("version", 1),
    }
    label = f"{batch}x{side}x{side}x{width} window {shape['window']} shift {shape['shift']}" + (
        " V2" if shape["version"] == 2 else ""
    )
    return Case("window_attention", label, dtype, mode, shape, target, level)


def windows() -> list[Case]:
    """Attention of Swin-T's stages without projections; also windows of 8 and 12, and Swin V2."""
    timm = ("timm path",)
    found = []
    for stage, times in zip(SWIN_STAGES, (12.0, 8.0, 8.0), strict=True):
        for dtype, forward, both in (("fp32", times, 8.0), ("bf16", 6.0, 4.0)):
            first = stage == SWIN_STAGES[0]
            found.append(_windows(8, stage, dtype, _FORWARD, Target(forward, timm), "default"))
            found.append(_windows(8, stage, dtype, _BACKWARD, Target(both, timm), "default" if first else "full"))
    for window, stage in ((8, (64, 96, 3)), (12, (96, 128, 4))):
        for version in (1, 2):
            for dtype in ("fp32", "bf16"):
                found.append(
                    _windows(4, stage, dtype, _FORWARD, None, window=window, shift=window // 2, version=version)
                )
    found.append(_windows(8, SWIN_STAGES[0], "fp32", _FORWARD, None, shift=0))
    found.append(_windows(1, (14, 64, 2), "fp32", _FORWARD, None, "quick"))
    return found


def patches() -> list[Case]:
    """ViT-B/16 on 16 images of 224 pixels: float, uint8, and a quarter of the patches as in MAE."""
    shape = {"batch": 16, "size": 224, "patch": 16, "width": 768}
    found = []
    for dtype, times in (("fp32", 2.0), ("bf16", 1.4)):
        keep = Target(3.5, ("conv2d",)) if dtype == "fp32" else None
        found.append(
            Case("patch_embed", "16x224 patch 16", dtype, _FORWARD, shape, Target(times, ("conv2d",)), "default")
        )
        found.append(
            Case("patch_embed", "16x224 patch 16 keep 25 %", dtype, _FORWARD, dict(shape, keep=49), keep, "default")
        )
        level = "default" if dtype == "fp32" else "full"
        uint8 = Target(1.0, ("ours, float pixels",))
        found.append(
            Case("patch_embed", "16x224 patch 16 uint8", dtype, _FORWARD, dict(shape, uint8=True), uint8, level)
        )
        found.append(Case("patch_embed", "16x224 patch 16", dtype, _BACKWARD, shape))
    found.append(
        Case(
            "patch_embed",
            "2x64 patch 16",
            "fp32",
            _FORWARD,
            {"batch": 2, "size": 64, "patch": 16, "width": 64},
            level="quick",
        )
    )
    return found


def linears() -> list[Case]:
    """Projections of ViT-B and Swin-T, rows x in x out, with and without activation."""
    found = []
    for m, k, n, activation in (
        (1576, 768, 3072, "gelu"),
        (1576, 3072, 768, None),
        (1576, 768, 2304, None),
        (25088, 96, 384, "gelu"),
    ):
        for dtype in ("fp32", "bf16"):
            level = "default" if (k, n) == (768, 3072) else "full"
            label = f"{m}x{k}x{n}" + (f" {activation}" if activation else "")
            found.append(
                Case(
                    "linear",
                    label,
                    dtype,
                    _FORWARD,
                    {"m": m, "k": k, "n": n, "activation": activation},
                    None,
                    level,
                    ("random",),
                )
            )
    found.append(
        Case(
            "linear",
            "64x32x96 gelu",
            "fp32",
            _FORWARD,
            {"m": 64, "k": 32, "n": 96, "activation": "gelu"},
            None,
            "quick",
            ("random",),
        )
    )
    return found


def gated_mlps() -> list[Case]:
    """SwiGLU of DINOv2-g (one weight for gate and values) and of EVA-02-B (two, and a layer norm within), batch 8."""
    shapes = {
        "DINOv2-g": {"rows": 2056, "width": 1536, "hidden": 4096, "split": False, "norm": False},
        "EVA-02-B": {"rows": 2056, "width": 768, "hidden": 2048, "split": True, "norm": True},
        "small": {"rows": 40, "width": 32, "hidden": 48, "split": True, "norm": True},
    }
    found = []
    for name, shape in shapes.items():
        for dtype in ("fp32", "bf16"):
            for mode in (_FORWARD, _BACKWARD):
                level = "quick" if name == "small" else "default" if name == "EVA-02-B" else "full"
                found.append(Case("gated_mlp", name, dtype, mode, shape, None, level, ("random",)))
    return found


def norms() -> list[Case]:
    """Swin-T's first stage and ViT-B, batch 8."""
    found = []
    for rows, width in ((25088, 96), (1576, 768)):
        for dtype in ("fp32", "bf16"):
            shape, sources = {"rows": rows, "width": width}, ("random",)
            level = "default" if dtype == "bf16" else "full"
            found += [
                Case(op, f"{rows}x{width}", dtype, mode, shape, None, level if op == "layer_norm" else "full", sources)
                for op in ("layer_norm", "rms_norm")
                for mode in (_FORWARD, _BACKWARD)
            ]
    found.append(Case("layer_norm", "20x96", "fp32", _FORWARD, {"rows": 20, "width": 96}, None, "quick", ("random",)))
    return found


def losses() -> list[Case]:
    """The losses that do not store logits, forward and backward: CLIP's for small to large batches, SimCLR's, SigLIP's,
    DINO's."""
    target, found = Target(1 / 0.7, ("naive",), memory=0.05), []

    def add(op: str, label: str, dtype: str, shape: dict[str, int], level: str, target: Target | None = None) -> None:
        found.append(Case(op, label, dtype, _BACKWARD, shape, target, level, ("random",), ("naive",)))

    for dtype in ("fp32", "bf16"):
        for n in (1024, 4096, 8192):
            add("info_nce", f"batch {n} d 512", dtype, {"batch": n, "dim": 512}, "default" if n == 4096 else "full")
        level = "default" if dtype == "fp32" else "full"
        add("nt_xent", "batch 2048 d 128", dtype, {"batch": 2048, "dim": 128}, level)
        add("sigmoid_contrastive", "batch 4096 d 512", dtype, {"batch": 4096, "dim": 512}, level)
        crops = {"crops": 4, "views": 2, "batch": 64, "dim": 256, "prototypes": 32768}
        add("distillation_cross_entropy", "4 + 2 crops of 64, 32768 prototypes", dtype, crops, level)
    for n in (16384, 32768):  # the naive form needs 5 and 20 GiB
        add("info_nce", f"batch {n} d 512", "fp32", {"batch": n, "dim": 512}, "full", target)
    add("info_nce", "batch 256 d 64", "fp32", {"batch": 256, "dim": 64}, "quick")
    return found


def models() -> list[Case]:
    """Whole models on photographs: inference, and training steps with AdamW (bf16 under autocast)."""
    eager = ("eager SDPA", "eager naive")
    found = []
    for name in ("vit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        for dtype in ("fp32", "bf16"):
            target = Target(1.05, ("openvino",))
            found.append(
                Case(name, "batch 8", dtype, "inference", {"batch": 8, "size": 224}, target, "default", against=eager)
            )
            found.append(
                Case(name, "batch 1", dtype, "inference", {"batch": 1, "size": 224}, None, "full", against=eager)
            )
    for name in ("vit_small_patch16_224", "swin_base_patch4_window7_224"):
        for dtype in ("fp32", "bf16"):
            found.append(
                Case(name, "batch 8", dtype, "inference", {"batch": 8, "size": 224}, None, "full", against=eager)
            )
    found += _int8_models() + _backbones()
    for name in ("vit_small_patch16_224", "swin_tiny_patch4_window7_224"):
        for dtype, times in (("fp32", 2.2), ("bf16", 1.5)):
            target = Target(times, ("timm",))
            level = "default" if dtype == "bf16" else "full"
            found.append(Case(name, "batch 8", dtype, "train", {"batch": 8, "size": 224}, target, level, against=eager))
    found.append(
        Case(
            "vit_tiny_patch16_224",
            "batch 1",
            "fp32",
            "inference",
            {"batch": 1, "size": 224},
            None,
            "quick",
            against=eager,
        )
    )
    return found


#: Newer backbones, which timm has under the same names, and the size of their images.
BACKBONES = {
    "vit_small_patch16_dinov3": 256,
    "vit_base_patch16_dinov3": 256,
    "vit_small_patch14_reg4_dinov2": 518,
    "eva02_small_patch14_224": 224,
    "vit_base_patch16_siglip_224": 224,
    "vit_pe_core_small_patch16_384": 384,
    "hiera_small_224": 224,
    "samvit_base_patch16": 512,
}


def _backbones() -> list[Case]:
    """Inference against timm's code: rotary embeddings, SwiGLU, registers, attention pooling, mask units, decomposed
    relative positions."""
    return [
        Case(
            name, f"batch {batch}", dtype, "inference", {"batch": batch, "size": size}, None, "full", against=("timm",)
        )
        for name, size in BACKBONES.items()
        for batch in (1 if name.startswith("samvit") else 8,)
        for dtype in ("fp32", "bf16")
    ]


def _int8_models() -> list[Case]:
    """Inference with int8 weights, beside ours in bf16."""
    own, found = ("ours bf16", "ours fp32"), []
    for name, batch, times, level in (
        ("vit_base_patch16_224", 8, 1.1, "default"),
        ("vit_base_patch16_224", 1, 1.25, "full"),
        ("vit_small_patch16_224", 8, 1.1, "full"),
        ("vit_small_patch16_224", 1, 1.25, "full"),
        ("swin_tiny_patch4_window7_224", 8, 1.25, "default"),
        ("swin_base_patch4_window7_224", 8, 1.25, "full"),
        ("vit_tiny_patch16_224", 1, None, "quick"),
    ):
        target = None if times is None else Target(each=(("ours bf16", 1.6), ("openvino", times)))
        shape = {"batch": batch, "size": 224}
        found.append(Case(name, f"batch {batch}", "int8", "inference", shape, target, level, against=own))
    return found


def blocks() -> list[Case]:
    """A block of ViT-B and of Swin-T's first and third stage, with weights' gradients in the backward."""
    vit = {"batch": 8, "length": 197, "width": 768, "heads": 12}
    found = []
    for dtype in ("fp32", "bf16"):
        for mode in (_FORWARD, _BACKWARD):
            found.append(Case("vit_block", "8x197x768", dtype, mode, vit, None, "default"))
            for side, width, heads in (SWIN_STAGES[0], SWIN_STAGES[2]):
                shape = {"batch": 8, "side": side, "width": width, "heads": heads, "window": 7, "shift": 3}
                level = "default" if side == SWIN_STAGES[0][0] else "full"
                found.append(Case("swin_block", f"8x{side}x{side}x{width} shift 3", dtype, mode, shape, None, level))
    quick = {"batch": 2, "length": 50, "width": 64, "heads": 2}
    found.append(Case("vit_block", "2x50x64", "fp32", _FORWARD, quick, None, "quick"))
    return found


def memory() -> list[Case]:
    """Cases of other groups in which peak memory matters most: losses, training steps, long attention's gradients."""
    return losses() + training() + [case for case in attention() if case.mode == _BACKWARD]


def inference() -> list[Case]:
    return [case for case in models() if case.mode != "train"]


def training() -> list[Case]:
    return [case for case in models() if case.mode == "train"]


SUITES: dict[str, Callable[[], list[Case]]] = {
    "ops": lambda: attention() + windows() + patches() + linears() + gated_mlps() + norms(),
    "blocks": blocks,
    "models": inference,
    "losses": losses,
    "training": training,
    "memory": memory,
}


def select(suites: tuple[str, ...], level: str, pattern: str = "", dtype: str = "") -> list[Case]:
    """The cases of ``suites``, each once, at ``level`` whose id contains ``pattern``; a pattern selects from the cases
    of all levels. ``dtype``: only cases of that dtype."""
    quick = level == "quick"
    found = [case for suite in suites for case in SUITES[suite]() if dtype in ("", case.dtype)]
    found = list({case.id: case for case in found}.values())  # groups may share cases
    if pattern:
        return [case for case in found if pattern in case.id]
    return [case for case in found if (case.level == "quick" if quick else case.at(level) and case.level != "quick")]


def spread(chosen: Sequence[Case]) -> list[Case]:
    """The first case of every operator and model, then the second of each, and so on, so that a run that ends early
    covers all."""
    seen: Counter[str] = Counter()
    ranks = []
    for case in chosen:
        ranks.append(seen[case.op])
        seen[case.op] += 1
    return [case for _, case in sorted(zip(ranks, chosen, strict=True), key=lambda pair: pair[0])]
