"""SimCLR. Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (2020)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyvit.models.registry import create_model, register
from pyvit.nn import Linear


class SimCLR(nn.Module):
    """An encoder f and a projection head g (section 2.1): two views of each image to z1, z2 (B, out_dim), the arguments
    of NT-Xent.

    Args:
        encoder: a registered model (ViT, Swin or ResNet) or a module, images to features (B, D). Its head is removed.
        hidden_dim: of the head, by default D. out_dim: 128 in the paper. batch_norm: in the hidden layer.
        settings: overrides for a named encoder.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        hidden_dim: int | None = None,
        out_dim: int = 128,
        batch_norm: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(encoder, str):
            encoder = create_model(encoder, **{**settings, "num_classes": 0})
        elif settings:
            raise TypeError(f"SimCLR: settings go with a named encoder, got {', '.join(settings)}")
        self.encoder = encoder
        width: Any = getattr(encoder, "num_features", None) or encoder.embed_dim
        width = width[-1] if isinstance(width, list) else width
        hidden = hidden_dim or width
        norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.projection = nn.Sequential(
            Linear(width, hidden, bias=not batch_norm), norm, nn.ReLU(), Linear(hidden, out_dim)
        )

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.projection(self.encoder(first)), self.projection(self.encoder(second))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {f"encoder.{name}" for name in getattr(self.encoder, "no_weight_decay", set)()}

    def encoder_of(self) -> nn.Module:
        """The network that is used after training, without the projection head (section 4.2)."""
        return self.encoder

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        return self.encoder.example_inputs(batch) * 2  # type: ignore[operator]


for _encoder in (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "resnet50",
):
    register(f"simclr_{_encoder}", SimCLR, encoder=_encoder)
