"""CLIP, SigLIP, SigLIP 2 and MetaCLIP 2.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); Zhai et al., "Sigmoid
Loss for Language Image Pre-Training" (2023); Tschannen et al., "SigLIP 2" (2025); Chuang et al., "MetaCLIP 2" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyvit.models.metadata import WithMetadata
from pyvit.models.registry import register
from pyvit.models.resnet import CLIPResNet
from pyvit.models.vit import VisionTransformer
from pyvit.nn import Block, LayerNorm, Linear


class TextTransformer(WithMetadata):
    """Token ids (B, L) to embeddings (B, embed_dim); L up to ``context_length``.

    Args:
        pool: "eot", the end token (CLIP), or "last" (SigLIP). causal: causal attention (CLIP).
        eot: id of the end token. The first one in each row is pooled, or the last token of a row without one. None: the
            token with the largest id, which is the end token of OpenAI's vocabulary.
        proj_bias: bias of the output projection.
    """

    def __init__(
        self,
        embed_dim: int = 512,
        vocab_size: int = 49408,
        context_length: int = 77,
        width: int = 512,
        num_heads: int = 8,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        activation: str = "quick_gelu",
        pool: str = "eot",
        causal: bool = True,
        proj_bias: bool = False,
        eps: float = 1e-5,
        eot: int | None = None,
    ) -> None:
        super().__init__()
        if eot is not None and not 0 <= eot < vocab_size:
            raise ValueError(f"TextTransformer: eot must be an id below vocab_size = {vocab_size}, got {eot}")
        if pool not in ("eot", "last"):
            raise ValueError(f"TextTransformer: pool must be 'eot' or 'last', got {pool!r}")
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.pool = pool
        self.eot = eot
        self.causal = causal
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        make = {"mlp_ratio": mlp_ratio, "activation": activation, "eps": eps}
        self.blocks = nn.Sequential(*(Block(width, num_heads, **make) for _ in range(depth)))  # type: ignore[arg-type]
        self.ln_final = LayerNorm(width, eps)
        self.proj = Linear(width, embed_dim, bias=proj_bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        init_tower(self.blocks, width)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        if proj_bias:
            nn.init.zeros_(self.proj.bias)

    def forward_features(self, text: Tensor) -> Tensor:
        """Ids (B, L) to the features of their tokens (B, L, width)."""
        if text.dim() != 2 or text.shape[1] > self.context_length:
            raise ValueError(
                f"TextTransformer: text must be (B, L) with L up to {self.context_length}, got {tuple(text.shape)}"
            )
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, is_causal=self.causal)
            else:
                x = block(x, is_causal=self.causal)
        return self.ln_final(x)

    def forward(self, text: Tensor) -> Tensor:
        x = self.forward_features(text)
        x = x[:, -1] if self.pool == "last" else x[torch.arange(x.shape[0], device=x.device), self.end_of(text)]
        return self.proj(x)

    def end_of(self, text: Tensor) -> Tensor:
        """Position of the end token in each row of ids (B, L), (B,). With causal attention, only this token sees the
        whole text and no padding."""
        if self.eot is None:
            return text.argmax(-1)
        ends = text == self.eot
        ends[:, -1] = True  # rows without an end token
        return ends.int().argmax(-1)  # the first end token


class TextCBOW(WithMetadata):
    """Mean of the token embeddings, projected: ids (B, L) to (B, embed_dim). Tokens ``pad`` are ignored. Mentioned in
    figure 3 of CLIP."""

    def __init__(self, embed_dim: int = 512, vocab_size: int = 49408, width: int = 512, pad: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.pad = vocab_size, pad
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.proj = Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        words = (text != self.pad).unsqueeze(-1)
        total = (self.token_embedding(text) * words).sum(1)
        return self.proj(total / words.sum(1).clamp_min(1))


def init_tower(blocks: nn.Sequential, width: int) -> None:
    """CLIP's initialisation: residual projections are scaled down with depth (section 2.4 and its code)."""
    shrink = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attn.proj.weight, std=shrink)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=shrink)
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.zeros_(linear.bias)


class CLIP(nn.Module):
    """An image tower, a text tower and a temperature (figure 3): images and texts to unit vectors, whose dot products
    are similarities.

    Args:
        visual: images to (B, embed_dim). text: ids to (B, embed_dim).
        init_scale: initial logarithm of the scale, ln(1/0.07) in CLIP and ln 10 in SigLIP. init_bias: SigLIP's bias;
            None for CLIP.
    """

    def __init__(
        self, visual: nn.Module, text: nn.Module, init_scale: float = math.log(1 / 0.07), init_bias: float | None = None
    ) -> None:
        super().__init__()
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(init_scale))
        self.logit_bias = None if init_bias is None else nn.Parameter(torch.tensor(init_bias))

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """(B, C, H, W) to (B, embed_dim), normalised unless ``normalize`` is False."""
        x = self.visual(images)
        return F.normalize(x, dim=-1) if normalize else x

    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Ids (B, L) to (B, embed_dim), normalised unless ``normalize`` is False."""
        x = self.text(text)
        return F.normalize(x, dim=-1) if normalize else x

    def scale(self) -> Tensor:
        """The factor on similarities. CLIP's training keeps ``logit_scale`` below ln 100 (section 2.5); SigLIP's is not
        bounded."""
        return self.logit_scale.exp()

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Normalised image and text embeddings (B, embed_dim), scale () and bias () or None: the arguments of the
        contrastive losses."""
        return self.encode_image(images), self.encode_text(text), self.scale(), self.logit_bias

    def logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Scaled similarities (images, texts)."""
        image, words, scale, bias = self(images, text)
        similar = scale * image @ words.T
        return similar if bias is None else similar + bias

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of both towers in the backward pass."""
        for tower in (self.visual, self.text):
            tower.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        inner = {f"visual.{name}" for name in getattr(self.visual, "no_weight_decay", set)()}
        return inner | {"logit_scale", "logit_bias", "text.positional_embedding"}

    def example_inputs(self, batch: int = 1) -> tuple[Tensor, ...]:
        """Arguments of a forward pass."""
        length = getattr(self.text, "context_length", 8)
        return (
            *self.visual.example_inputs(batch),
            torch.zeros(batch, length, dtype=torch.long, device=self.logit_scale.device),
        )  # type: ignore[operator]


def clip_vit(
    embed_dim: int = 512,
    img_size: int | Sequence[int] = 224,
    patch_size: int = 32,
    width: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    vocab_size: int = 49408,
    context_length: int = 77,
    text_width: int = 512,
    text_depth: int = 12,
    text_heads: int = 8,
    text_mlp_ratio: float | None = None,
    text: str = "transformer",
    activation: str = "quick_gelu",
    eot: int | None = None,
    pad: int = 0,
    **visual: Any,
) -> CLIP:
    """CLIP with a ViT image tower (section 2.4). ``text``: "transformer" or "cbow". ``text_mlp_ratio``: None for
    ``mlp_ratio``. ``visual``: other settings of the ViT.

    ``eot`` and ``pad``: ids of the tokenizer's end and padding tokens, see :class:`TextTransformer` and
    :class:`TextCBOW`.
    """
    settings = {
        "pre_norm": True,
        "patch_bias": False,
        "norm_eps": 1e-5,
        "activation": activation,
        "num_classes": 0,
        **visual,
    }
    make = {"embed_dim": width, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    tower = VisionTransformer(img_size=img_size, patch_size=patch_size, **make, **settings)
    init_tower(tower.blocks, width)
    for parameter in (tower.cls_token, tower.pos_embed):
        nn.init.normal_(parameter, std=width**-0.5)
    tower.head = Linear(width, embed_dim, bias=False)  # a projection without bias
    nn.init.normal_(tower.head.weight, std=width**-0.5)
    transformer = {
        "num_heads": text_heads,
        "depth": text_depth,
        "mlp_ratio": mlp_ratio if text_mlp_ratio is None else text_mlp_ratio,
        "activation": activation,
        "eot": eot,
    }
    return CLIP(tower, text_tower(text, embed_dim, vocab_size, context_length, text_width, pad, **transformer))


def text_tower(
    kind: str, embed_dim: int, vocab_size: int, context_length: int, width: int, pad: int, **transformer: Any
) -> nn.Module:
    """The text encoder ``kind``: "transformer" or "cbow"."""
    if kind == "cbow":
        return TextCBOW(embed_dim, vocab_size, width, pad)
    if kind != "transformer":
        raise ValueError(f"clip: text must be 'transformer' or 'cbow', got {kind!r}")
    return TextTransformer(embed_dim, vocab_size, context_length, width, **transformer)


def siglip_vit(
    img_size: int | Sequence[int] = 224,
    patch_size: int = 16,
    width: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    vocab_size: int = 32000,
    context_length: int = 64,
    text_width: int | None = None,
    text_depth: int | None = None,
    text_heads: int | None = None,
    text_mlp_ratio: float | None = None,
    tower: type[VisionTransformer] = VisionTransformer,
    **visual: Any,
) -> CLIP:
    """SigLIP: no class token, attention pooling, a bidirectional text encoder, and a logit bias (section 3.2).

    The text encoder has the sizes of the image encoder unless ``text_width``, ``text_depth``, ``text_heads`` or
    ``text_mlp_ratio`` says otherwise. ``tower``: class of the image encoder.
    """
    settings = {"class_token": False, "global_pool": "map", "num_classes": 0, "activation": "gelu_tanh", **visual}
    make = {"depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    visual_tower = tower(img_size=img_size, patch_size=patch_size, embed_dim=width, **make, **settings)
    words = TextTransformer(
        width,
        vocab_size,
        context_length,
        text_width or width,
        text_heads or num_heads,
        text_depth or depth,
        mlp_ratio if text_mlp_ratio is None else text_mlp_ratio,
        activation="gelu_tanh",
        pool="last",
        causal=False,
        proj_bias=True,
        eps=1e-6,
    )
    model = CLIP(visual_tower, words, init_scale=math.log(10.0), init_bias=-10.0)
    init_siglip(model)
    return model


def init_siglip(model: CLIP) -> None:
    """SigLIP's initialisation (big_vision): Xavier's for attention and MLPs, positions and token embeddings of unit
    norm, LeCun's for the patch embedding and the text projection."""
    visual, text = model.visual, model.text
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fused = name.endswith((".qkv", ".kv"))  # each matrix by itself
            for weight in module.weight.split(module.in_features) if fused else (module.weight,):
                nn.init.xavier_uniform_(weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)
    for weight in (text.token_embedding.weight, text.positional_embedding, visual.pos_embed):
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    if visual.attn_pool is not None:
        nn.init.xavier_uniform_(visual.attn_pool.latent[0])
    for layer in (visual.patch_embed.proj, text.proj):
        deviation = layer.weight[0].numel() ** -0.5
        # A normal distribution that is cut at twice its deviation has 0.88 of it.
        nn.init.trunc_normal_(layer.weight, std=deviation / 0.87962566, a=-2.2737 * deviation, b=2.2737 * deviation)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def clip_resnet(
    layers: Sequence[int] = (3, 4, 6, 3),
    embed_dim: int = 1024,
    img_size: int | Sequence[int] = 224,
    width: int = 64,
    num_heads: int = 32,
    vocab_size: int = 49408,
    context_length: int = 77,
    text_width: int = 512,
    text_depth: int = 12,
    text_heads: int = 8,
    mlp_ratio: float = 4.0,
    text: str = "transformer",
    eot: int | None = None,
    pad: int = 0,
) -> CLIP:
    """CLIP with a ResNet image tower and attention pooling (section 2.4)."""
    tower = CLIPResNet(layers, embed_dim, num_heads, img_size, width)
    transformer = {
        "num_heads": text_heads,
        "depth": text_depth,
        "mlp_ratio": mlp_ratio,
        "activation": "quick_gelu",
        "eot": eot,
    }
    return CLIP(tower, text_tower(text, embed_dim, vocab_size, context_length, text_width, pad, **transformer))


register("clip_resnet50_224", clip_resnet)
register("clip_resnet101_224", clip_resnet, layers=(3, 4, 23, 3), embed_dim=512)
register("clip_vit_base_patch32_224", clip_vit)
register("clip_vit_base_patch16_224", clip_vit, patch_size=16)
_LARGE = {
    "embed_dim": 768,
    "patch_size": 14,
    "width": 1024,
    "depth": 24,
    "num_heads": 16,
    "text_width": 768,
    "text_heads": 12,
}
register("clip_vit_large_patch14_224", clip_vit, **_LARGE)
register("clip_vit_large_patch14_336", clip_vit, **_LARGE, img_size=336)
for _image in (224, 256, 384, 512):
    register(f"siglip_vit_base_patch16_{_image}", siglip_vit, img_size=_image)
for _image in (256, 384):
    register(f"siglip_vit_large_patch16_{_image}", siglip_vit, img_size=_image, width=1024, depth=24, num_heads=16)
SO400M = {"width": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 4304.5 / 1152, "patch_size": 14}
register(
    "siglip_so400m_patch14_378", siglip_vit, **SO400M, img_size=378
)  # 27 x 27 patches, as of the 384-pixel checkpoints

# SigLIP 2, the released configurations: SigLIP with another vocabulary (Gemma's). The text
# encoder of the largest model is that of so400m.
_SIGLIP2 = {"vocab_size": 256000}
_TEXT_SO400M = {f"text_{k}": SO400M[k] for k in ("width", "depth", "mlp_ratio")} | {"text_heads": 16}
_SIGLIP2_SIZES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "vit_base_patch32": ((256,), {"patch_size": 32}),
    "vit_base_patch16": ((224, 256, 384, 512), {}),
    "vit_large_patch16": ((256, 384, 512), {"width": 1024, "depth": 24, "num_heads": 16}),
    "so400m_patch14": ((224, 378), SO400M),
    "so400m_patch16": ((256, 384, 512), {**SO400M, "patch_size": 16}),
    "vit_giantopt_patch16": ((256, 384), {"width": 1536, "depth": 40, "num_heads": 16, **_TEXT_SO400M}),
}
for _name, (_images, _settings) in _SIGLIP2_SIZES.items():
    for _image in _images:
        register(f"siglip2_{_name}_{_image}", siglip_vit, **_SIGLIP2, **_settings, img_size=_image)

# MetaCLIP 2: CLIP with the vocabulary of XLM-V, whose end token is 2. The smallest was trained with quick_gelu.
_METACLIP2 = {"patch_size": 14, "vocab_size": 901629, "eot": 2}
_HUGE = {"embed_dim": 1024, "width": 1280, "depth": 32, "num_heads": 16}
_HUGE |= {"text_width": 1024, "text_depth": 24, "text_heads": 16}
_GIGANTIC = {"embed_dim": 1280, "width": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 8192.5 / 1664}
_GIGANTIC |= {"text_width": 1280, "text_depth": 32, "text_heads": 20, "text_mlp_ratio": 4.0}
register("metaclip2_vit_huge_patch14_quickgelu_224", clip_vit, **_METACLIP2, **_HUGE)
register("metaclip2_vit_huge_patch14_378", clip_vit, **_METACLIP2, **_HUGE, img_size=378, activation="gelu")
for _image in (224, 378):
    register(
        f"metaclip2_vit_gigantic_patch14_{_image}",
        clip_vit,
        **_METACLIP2,
        **_GIGANTIC,
        img_size=_image,
        activation="gelu",
    )
