"""Self-distillation: DINO, iBOT and DINOv2 as switches of one model.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021); Zhou et al., "iBOT" (2022); Oquab et al., "DINOv2"
(2023).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pyvit.models.registry import register, settings_of
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.nn import DropPath, Linear


class DINOHead(nn.Module):
    """Features (..., D) to scores (..., prototypes): an MLP, a unit vector, its cosine with every prototype (DINO, section 3.1).

    :meth:`features` and :attr:`prototypes` give the two factors apart, for losses that never hold the scores.
    """

    def __init__(self, dim: int, prototypes: int = 65536, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        steps: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            steps += [*([nn.GELU()] if i else []), Linear(fan_in, fan_out)]
        self.mlp = nn.Sequential(*steps)
        for module in self.mlp:
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        length.data.fill_(1.0)  # prototypes are directions
        length.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        """Unit vectors (..., bottleneck)."""
        return F.normalize(self.mlp(x), dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    @property
    def prototypes(self) -> Tensor:
        """Unit vectors (prototypes, bottleneck)."""
        return self.last_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x), self.prototypes)


class Views(NamedTuple):
    """What the losses of self-distillation compare; features are unit vectors of the heads' bottleneck.

    student (S, B, C) and teacher (T, B, C): class tokens of every crop and of the global crops, which come first in both.
    student_patches and teacher_patches (M, C), weights (M,): the masked patches, each counting 1 / (masked patches of its image) / images;
    None without masks. class_tokens (T, B, D): the student's class tokens of global crops before the head, for KoLeo.
    """

    student: Tensor
    teacher: Tensor
    student_patches: Tensor | None
    teacher_patches: Tensor | None
    weights: Tensor | None
    class_tokens: Tensor


class SelfDistillation(nn.Module):
    """A student that must agree with its own moving average across crops, and about masked patches.

    Args:
        backbone: a ViT with a class token and no head.
        prototypes, head_hidden, bottleneck, head_layers: of the heads.
        masks: iBOT's objective: the student fills in masked patches (needs a backbone with ``mask_token=True``).
        separate_heads: DINOv2: patches have a head of their own. patch_prototypes: its prototypes, default ``prototypes``.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        prototypes: int = 65536,
        head_hidden: int = 2048,
        bottleneck: int = 256,
        head_layers: int = 3,
        masks: bool = False,
        separate_heads: bool = False,
        patch_prototypes: int | None = None,
    ) -> None:
        super().__init__()
        if backbone.cls_token is None:
            raise ValueError("SelfDistillation: backbone must have a class token")
        if masks and backbone.mask_token is None:
            raise ValueError("SelfDistillation: masks=True needs a backbone made with mask_token=True")
        if separate_heads and not masks:
            raise ValueError("SelfDistillation: separate_heads is for masks=True")
        self.masks = masks
        head = {"hidden": head_hidden, "bottleneck": bottleneck, "layers": head_layers}
        parts = nn.ModuleDict({"backbone": backbone, "head": DINOHead(backbone.embed_dim, prototypes, **head)})
        if separate_heads:
            parts["patch_head"] = DINOHead(backbone.embed_dim, patch_prototypes or prototypes, **head)
        self.student = parts
        self.teacher = copy.deepcopy(parts).requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.p = 0.0

    def head_of(self, side: str, patches: bool = False) -> DINOHead:
        """The head of "student" or "teacher" for class tokens or for patches; :attr:`DINOHead.prototypes` goes to the losses."""
        parts = getattr(self, side)
        return parts["patch_head"] if patches and "patch_head" in parts else parts["head"]

    def train(self, mode: bool = True) -> SelfDistillation:
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student (0.996 to 1 in DINO, 0.994 to 1 in DINOv2)."""
        teacher, student = list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()]
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)

    def forward(self, global_crops: Sequence[Tensor], local_crops: Sequence[Tensor] = (), masks: Sequence[Tensor] | None = None) -> Views:
        """global_crops T x (B, C, H, W), local_crops (B, C, h, w) each, masks T x (B, N) bool of the global crops' hidden patches.

        The student sees all crops in one packed pass.
        """
        if (masks is not None) != self.masks:
            raise ValueError(
                f"SelfDistillation: masks must be {'given' if self.masks else 'None'}, as the model was made with masks={self.masks}"
            )
        backbone, prefix = self.student["backbone"], self.student["backbone"].num_prefix_tokens
        hidden = None if masks is None else torch.cat([m.flatten(1) for m in masks])  # (T * B, N)
        crops = [torch.cat(list(c)) for c in (global_crops, local_crops) if len(c)]
        tokens = backbone.forward_packed(crops, [hidden, None][: len(crops)])
        b = global_crops[0].shape[0]
        class_tokens = torch.cat([t[:, 0] for t in tokens]).unflatten(0, (-1, b))  # (S, B, D)
        student = self.head_of("student").features(class_tokens)
        with torch.no_grad():
            seen = self.teacher["backbone"].forward_features(crops[0])
            teacher = self.head_of("teacher").features(seen[:, 0].unflatten(0, (-1, b)))
        student_patches = teacher_patches = weights = None
        if hidden is not None:
            student_patches = self.head_of("student", True).features(tokens[0][:, prefix:][hidden])
            with torch.no_grad():
                teacher_patches = self.head_of("teacher", True).features(seen[:, prefix:][hidden])
            weights = (hidden / hidden.sum(1, keepdim=True).clamp_min(1) / hidden.shape[0])[hidden]
        return Views(student, teacher, student_patches, teacher_patches, weights, class_tokens[: len(global_crops)])

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone, besides biases and norms."""
        return {f"student.backbone.{name}" for name in self.student["backbone"].no_weight_decay()}

    def encoder_of(self) -> VisionTransformer:
        """The network that is used after training: the teacher's backbone, better than the student's throughout (DINO, section 5.2)."""
        return self.teacher["backbone"]

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Arguments of a forward pass with two global crops."""
        crop = self.student["backbone"].example_inputs(batch)[0]
        patches = math.prod(self.student["backbone"].grid)
        return [crop, crop], [], [torch.zeros(batch, patches, dtype=torch.bool, device=crop.device)] * 2 if self.masks else None


def block_masks(
    count: int,
    grid: Sequence[int],
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Masks (count, rows * columns), bool, as iBOT draws them: rectangles of aspect 0.3 to 3.3.

    They are added until the share drawn from ``ratio`` is hidden. A mask is empty with probability 1 - ``probability``.
    """
    rows, columns = grid
    draw = lambda low, high: low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))  # noqa: E731
    masks = torch.zeros(count, rows, columns, dtype=torch.bool, device="cpu")
    for mask in masks:
        if draw(0, 1) >= probability:
            continue
        wanted = round(draw(*ratio) * rows * columns)
        for _ in range(10 * rows * columns):
            left = wanted - int(mask.sum())
            if left <= 0:
                break
            area, aspect = draw(1, max(left, 1)), math.exp(draw(math.log(0.3), math.log(1 / 0.3)))
            h, w = min(max(round(math.sqrt(area * aspect)), 1), rows), min(max(round(math.sqrt(area / aspect)), 1), columns)
            y, x = int(draw(0, rows - h + 1)), int(draw(0, columns - w + 1))
            if h * w - int(mask[y : y + h, x : x + w].sum()) <= left:
                mask[y : y + h, x : x + w] = True
    return masks.flatten(1)


HEAD = ("prototypes", "head_hidden", "bottleneck", "head_layers", "masks", "separate_heads", "patch_prototypes")


def distilled(backbone: str | None = None, **settings: Any) -> SelfDistillation:
    """A :class:`SelfDistillation` from settings of the head and of its ViT; ``backbone`` names a registered ViT to start from."""
    head = {k: settings.pop(k) for k in HEAD if k in settings}
    base = settings_of(backbone)[1] if backbone else {}
    vit = VisionTransformer(**{**base, "num_classes": 0, "mask_token": head.get("masks", False), **settings})
    return SelfDistillation(vit, **head)


_DINO = {"interpolate_antialias": False, "interpolate_offset": 0.1}
_V2 = {
    "masks": True,
    "separate_heads": True,
    "prototypes": 131072,
    "init_values": 1e-5,
    "drop_path_uniform": True,
    "drop_path_form": "batch",
}
for _size, _patches in (("tiny", (16,)), ("small", (16, 8)), ("base", (16, 8)), ("large", (16,))):
    for _patch in _patches:
        register(f"dino_vit_{_size}_patch{_patch}_224", distilled, patch_size=_patch, drop_path_rate=0.1, **_DINO, **SIZES[_size])
    register(f"ibot_vit_{_size}_patch16_224", distilled, masks=True, prototypes=8192, drop_path_rate=0.1, **_DINO, **SIZES[_size])
register(
    "dinov2_vit_large_patch14_224", distilled, patch_size=14, drop_path_rate=0.4, head_hidden=2048, bottleneck=384, **_V2, **SIZES["large"]
)
register(
    "dinov2_vit_giant_patch14_224",
    distilled,
    patch_size=14,
    drop_path_rate=0.4,
    bottleneck=384,
    activation="swiglu",
    **_V2,
    **SIZES["giant"],
)
