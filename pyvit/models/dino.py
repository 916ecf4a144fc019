"""Self-distillation: DINO, iBOT and DINOv2 as settings of one model.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021); Zhou et al., "iBOT" (2022); Oquab et
al., "DINOv2" (2023).
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pyvit.models.registry import register, settings_of
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.nn import DropPath, Linear
from pyvit.torch_private import lerp_all


class DINOHead(nn.Module):
    """Features (..., D) to scores (..., prototypes): an MLP, L2 normalisation, and cosine similarities with the
    prototypes (DINO, section 3.1).

    :meth:`features` and :attr:`prototypes` are the factors of the scores, for losses that do not store the scores.

    Args:
        dim, prototypes, hidden, bottleneck, layers: widths and depth of the MLP, and the number of prototypes.
        batch_norm: batch norm in the hidden layers (the paper's ``use_bn_in_head``).
        norm_last_layer: keep the prototypes at length 1. The paper does not for its smaller models.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        steps: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            norm = [nn.BatchNorm1d(fan_in)] if batch_norm else []
            steps += [*([*norm, nn.GELU()] if i else []), Linear(fan_in, fan_out)]
        self.mlp = nn.Sequential(*steps)
        for module in self.mlp:
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        length.data.fill_(1.0)
        length.requires_grad_(not norm_last_layer)

    def features(self, x: Tensor) -> Tensor:
        """Normalised features (..., bottleneck)."""
        rows = self.mlp(x.flatten(0, -2))  # batch norms take rows
        return F.normalize(rows, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12).view(
            *x.shape[:-1], rows.shape[-1]
        )

    @property
    def prototypes(self) -> Tensor:
        """Vectors (prototypes, bottleneck), of length 1 with ``norm_last_layer``."""
        return self.last_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x), self.prototypes)


class Views(NamedTuple):
    """Inputs of the self-distillation losses; features are normalised outputs of the heads' bottleneck.

    student (S, B, C) and teacher (T, B, C): class tokens of all crops and of the global crops; global crops come first.
    student_patches and teacher_patches (M, C) and weights (M,): the masked patches, each weighted by 1 / (masked
    patches of its crop) / (T * B); None without masks. class_tokens (T, B, D): the student's class tokens of global
    crops before the head, for KoLeo; teacher_tokens (T, B, D): the teacher's. Backbones without a class token use their
    pooled features.
    """

    student: Tensor
    teacher: Tensor
    student_patches: Tensor | None
    teacher_patches: Tensor | None
    weights: Tensor | None
    class_tokens: Tensor
    teacher_tokens: Tensor


class SelfDistillation(nn.Module):
    """A student and a teacher, the moving average of the student. The student learns the teacher's outputs across crops
    and for masked patches.

    The teacher has no stochastic depth and no dropout in any mode. Its batch norms, if any, follow ``train()`` and
    ``eval()``, so they use batch statistics in training, as in the paper's code.

    Args:
        backbone: images to features (B, D): a ViT, or another network without a head.
        prototypes, head_hidden, bottleneck, head_layers, head_batch_norm, norm_last_layer: of the heads, see
            :class:`DINOHead`.
        masks: iBOT's objective: the student predicts masked patches (needs a ViT with ``mask_token=True``).
        separate_heads: a separate head for patches (DINOv2). patch_prototypes, patch_bottleneck: of that head, by
            default those of the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        prototypes: int = 65536,
        head_hidden: int = 2048,
        bottleneck: int = 256,
        head_layers: int = 3,
        masks: bool = False,
        separate_heads: bool = False,
        patch_prototypes: int | None = None,
        head_batch_norm: bool = False,
        norm_last_layer: bool = True,
        patch_bottleneck: int | None = None,
    ) -> None:
        super().__init__()
        if masks and getattr(backbone, "mask_token", None) is None:
            raise ValueError("SelfDistillation: masks=True needs a backbone made with mask_token=True")
        if separate_heads and not masks:
            raise ValueError("SelfDistillation: separate_heads is for masks=True")
        self.masks = masks
        head: dict[str, Any] = {"hidden": head_hidden, "bottleneck": bottleneck, "layers": head_layers}
        head |= {"batch_norm": head_batch_norm, "norm_last_layer": norm_last_layer}
        parts = nn.ModuleDict({"backbone": backbone, "head": DINOHead(feature_width(backbone), prototypes, **head)})
        if separate_heads:
            head["bottleneck"] = patch_bottleneck or bottleneck
            parts["patch_head"] = DINOHead(backbone.embed_dim, patch_prototypes or prototypes, **head)
        self.student = parts
        self.teacher = copy.deepcopy(parts).requires_grad_(False)
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.p = 0.0

    def head_of(self, side: str, patches: bool = False) -> DINOHead:
        """The head of "student" or "teacher" for class tokens or for patches; the losses need its
        :attr:`DINOHead.prototypes`."""
        parts = getattr(self, side)
        return parts["patch_head"] if patches and "patch_head" in parts else parts["head"]

    def train(self, mode: bool = True) -> SelfDistillation:
        super().train(mode)
        self.teacher.eval()
        for module in self.teacher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student (0.996 to 1 in DINO, 0.994 to 1 in DINOv2)."""
        teacher, student = list(self.teacher.parameters()), [p.detach() for p in self.student.parameters()]
        lerp_all(teacher, student, 1.0 - momentum)

    def forward(
        self, global_crops: Sequence[Tensor], local_crops: Sequence[Tensor] = (), masks: Sequence[Tensor] | None = None
    ) -> Views:
        """Global crops T x (B, C, H, W), local crops (B, C, h, w) each, masks T x (B, N) bool of the masked patches of
        the global crops.

        A ViT student processes all crops in one pass of packed sequences.
        """
        if (masks is not None) != self.masks:
            raise ValueError(
                f"SelfDistillation: masks must be {'given' if self.masks else 'None'}, as the model was made with "
                f"masks={self.masks}"
            )
        hidden = None if masks is None else torch.cat([m.flatten(1) for m in masks])  # (T * B, N)
        crops = [torch.cat(list(c)) for c in (global_crops, local_crops) if len(c)]
        b, count = global_crops[0].shape[0], len(global_crops)
        found, patches = embed_all(self.student["backbone"], crops, hidden)
        features = torch.cat(found).unflatten(0, (-1, b))  # (S, B, D)
        student = self.head_of("student").features(features)
        with torch.no_grad():
            seen, targets = embed_all(self.teacher["backbone"], crops[:1])
            teacher_tokens = seen[0].unflatten(0, (-1, b))  # (T, B, D)
            teacher = self.head_of("teacher").features(teacher_tokens)
        student_patches = teacher_patches = weights = None
        if hidden is not None and patches is not None and targets is not None:
            student_patches = self.head_of("student", True).features(patches[hidden])
            with torch.no_grad():
                teacher_patches = self.head_of("teacher", True).features(targets[hidden])
            masked = hidden.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
            weights = (masked / masked.sum(1, keepdim=True).clamp_min(1) / hidden.shape[0])[hidden]
        return Views(student, teacher, student_patches, teacher_patches, weights, features[:count], teacher_tokens)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {f"student.backbone.{name}" for name in getattr(self.student["backbone"], "no_weight_decay", set)()}

    def encoder_of(self) -> nn.Module:
        """The network that is used after training: the teacher's backbone, which is better than the student's (DINO,
        section 5.2)."""
        return self.teacher["backbone"]

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Arguments of a forward pass with two global crops."""
        crop = self.student["backbone"].example_inputs(batch)[0]
        patches = math.prod(self.student["backbone"].grid)
        return (
            [crop, crop],
            [],
            [torch.zeros(batch, patches, dtype=torch.bool, device=crop.device)] * 2 if self.masks else None,
        )


def feature_width(backbone: nn.Module) -> int:
    """D of a network's features (B, D)."""
    if isinstance(backbone, VisionTransformer):
        if backbone.global_pool == "":
            raise ValueError("SelfDistillation: backbone must pool its tokens, got global_pool=''")
        return backbone.embed_dim * (2 if backbone.global_pool == "token_avg" else 1)
    width = getattr(backbone, "num_features", None) or getattr(backbone, "embed_dim", None)
    width = width[-1] if isinstance(width, (list, tuple)) else width
    if not isinstance(width, int):
        raise ValueError(
            f"SelfDistillation: backbone must have num_features or embed_dim, {type(backbone).__name__} has neither"
        )
    return width


def embed_all(
    backbone: nn.Module, crops: list[Tensor], hidden: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Features (B_i, D) of batches of crops and, for a ViT, the patch tokens of the first batch; ``hidden``: masked
    patches of the first batch."""
    if not isinstance(backbone, VisionTransformer):
        return [backbone(c) for c in crops], None
    if len(crops) == 1:
        tokens = [backbone.forward_features(crops[0], masks=hidden)]
    else:
        tokens = backbone.forward_packed(crops, [hidden, *[None] * (len(crops) - 1)])
    return [backbone.forward_head(t, pre_logits=True) for t in tokens], tokens[0][:, backbone.num_prefix_tokens :]


def block_masks(
    count: int,
    grid: Sequence[int],
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
    generator: torch.Generator | None = None,
    spread: bool = False,
) -> Tensor:
    """Block-wise random masks of BEiT, iBOT and DINOv2 (count, rows * columns), bool.

    Rectangles with aspect ratios of 0.3 to 3.3 are added until a random share in ``ratio`` is masked, or until none of
    10 random rectangles fits into what is left, as in the papers' code; so less may be masked, never more. A mask is
    empty with probability 1 - ``probability``.

    ``spread``, for DINOv2: at most int(count * probability) masks are not empty, with shares equally spaced over
    ``ratio``, in random order. The smallest rectangle then has 4 patches; iBOT's has a third of the sides of the grid.
    """
    if not 0.0 <= ratio[0] <= ratio[1] < 1.0:
        raise ValueError(f"block_masks: ratio must be (low, high) with 0 <= low <= high < 1, got {ratio}")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"block_masks: probability must be in [0, 1], got {probability}")
    draw = random.Random(int(torch.randint(2**62, (), generator=generator, device="cpu")))
    if spread:
        masked = int(count * probability)
        step = (ratio[1] - ratio[0]) / max(masked, 1)
        shares = [draw.uniform(ratio[0] + i * step, ratio[0] + (i + 1) * step) for i in range(masked)]
        shares += [0.0] * (count - masked)
        draw.shuffle(shares)
    else:
        shares = [draw.uniform(*ratio) if draw.random() < probability else 0.0 for _ in range(count)]
    rows, columns = grid
    if spread:  # the cap on a rectangle only matters for shares above one half
        least, most = 4, rows // 2 * columns
        return torch.stack([_block_mask(int(share * rows * columns), grid, least, most, draw) for share in shares])
    least = (min(rows, columns) // 3) ** 2
    return torch.stack([_block_mask(share * rows * columns, grid, least, rows * columns, draw) for share in shares])


def _block_mask(wanted: float, grid: Sequence[int], least: int, most: int, draw: random.Random) -> Tensor:
    """(rows * columns,), bool: rectangles of ``least`` to ``most`` patches, up to ``wanted`` masked patches."""
    import numpy as np  # training alone needs it

    rows, columns = grid
    mask = np.zeros((rows, columns), dtype=bool)
    tries = 10
    while tries and (left := min(wanted - int(mask.sum()), most)) > 0:
        tries -= 1
        area, aspect = draw.uniform(least, left), math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= rows or w >= columns:
            continue
        y, x = draw.randint(0, rows - h), draw.randint(0, columns - w)
        if 0 < h * w - int(mask[y : y + h, x : x + w].sum()) <= left:
            mask[y : y + h, x : x + w] = True
            tries = 10
    return torch.from_numpy(mask.reshape(-1))


HEAD = (
    "prototypes", "head_hidden", "bottleneck", "head_layers", "masks", "separate_heads", "patch_prototypes",
    "head_batch_norm", "norm_last_layer", "patch_bottleneck",
)  # fmt: skip


def distilled(backbone: str | None = None, **settings: Any) -> SelfDistillation:
    """A :class:`SelfDistillation` from settings of its heads and of its ViT; ``backbone`` names a registered ViT to
    start from."""
    head = {k: settings.pop(k) for k in HEAD if k in settings}
    base = settings_of(backbone)[1] if backbone else {}
    vit = VisionTransformer(**{**base, "num_classes": 0, "mask_token": head.get("masks", False), **settings})
    return SelfDistillation(vit, **head)


_DINO = {"interpolate_antialias": False, "interpolate_offset": 0.1}
_V2 = {
    **_DINO,
    "masks": True,
    "separate_heads": True,
    "prototypes": 131072,
    "init_values": 1e-5,
    "drop_path_uniform": True,
    "drop_path_form": "batch",
    "bottleneck": 384,
    "patch_bottleneck": 256,
    "norm_last_layer": False,
}
for _size, _patches in (("tiny", (16,)), ("small", (16, 8)), ("base", (16, 8)), ("large", (16,))):
    for _patch in _patches:
        register(
            f"dino_vit_{_size}_patch{_patch}_224",
            distilled,
            patch_size=_patch,
            drop_path_rate=0.1,
            norm_last_layer=_size not in ("tiny", "small"),
            **_DINO,
            **SIZES[_size],
        )
    register(
        f"ibot_vit_{_size}_patch16_224",
        distilled,
        masks=True,
        prototypes=8192,
        drop_path_rate=0.1,
        norm_last_layer=_size not in ("tiny", "small"),
        **_DINO,
        **SIZES[_size],
    )
register(
    "dinov2_vit_large_patch14_224",
    distilled,
    patch_size=14,
    drop_path_rate=0.4,
    **_V2,
    **SIZES["large"],
)
register(
    "dinov2_vit_giant_patch14_224",
    distilled,
    patch_size=14,
    drop_path_rate=0.4,
    activation="swiglu",
    **_V2,
    **SIZES["giant"],
)
