"""ViT with a distillation token. Touvron et al., "Training data-efficient image transformers" (2021), section 4."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.models.registry import register
from pyvit.models.vit import SIZES, VisionTransformer
from pyvit.nn import Linear


class DistilledVisionTransformer(VisionTransformer):
    """A ViT with a distillation token, whose head ``head_dist`` learns from a teacher.

    In training the forward pass returns both logits (class, distillation), in evaluation their mean.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"dist_token": True, **settings})

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.head_dist = nn.Identity()
        if num_classes:
            self.head_dist = Linear(self.embed_dim, num_classes).to(self.patch_embed.proj.weight)
            nn.init.zeros_(self.head_dist.weight)
            nn.init.zeros_(self.head_dist.bias)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Features (B, P + N, D) to logits (B, num_classes), or to a pair of logits in training."""
        if pre_logits:
            return (x[:, 0] + x[:, 1]) / 2
        of_class, of_teacher = self.head(self.head_drop(x[:, 0])), self.head_dist(self.head_drop(x[:, 1]))
        return (of_class, of_teacher) if self.training else (of_class + of_teacher) / 2


for _size in ("tiny", "small", "base"):
    register(f"deit_{_size}_patch16_224", VisionTransformer, **SIZES[_size])
    register(f"deit_{_size}_distilled_patch16_224", DistilledVisionTransformer, **SIZES[_size])
register("deit_base_patch16_384", VisionTransformer, img_size=384, **SIZES["base"])
register("deit_base_distilled_patch16_384", DistilledVisionTransformer, img_size=384, **SIZES["base"])
