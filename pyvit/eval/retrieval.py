"""Finding images by text, texts by image, and parts of images by phrases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data, Images
from pyvit.eval.features import over


def recall(similarities: Tensor, right: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Percentage of queries (rows) with a right answer among their k best: similarities (Q, N), right (Q, N) bool."""
    order = similarities.argsort(1, descending=True)
    hits = right.gather(1, order)
    return {k: 100 * hits[:, :k].any(1).float().mean().item() for k in ks if k <= similarities.shape[1]}


@torch.no_grad()
def embed_pairs(
    model: nn.Module, images: Images, tokenizer: Callable[..., Tensor], normalize: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, list[str]]:
    """Image embeddings (N, D), text embeddings (N, D) and the captions."""
    device = next(model.parameters()).device
    captions: list[str] = []

    def both(batch: dict[str, Any]) -> Tensor:
        captions.extend(batch["caption"])
        pictures = model.encode_image(normalize(batch["image"]))  # type: ignore[operator]
        return torch.stack([pictures, model.encode_text(tokenizer(batch["caption"]).to(device))], 1)  # type: ignore[operator]

    pairs = over(images, both, device=device)
    return pairs[:, 0], pairs[:, 1], captions


def recall_of(recipe: Any, data: Data, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Recall@k both ways on held-out pairs, or {} where few captions are distinct. Equal captions are all right answers."""
    images, texts, captions = embed_pairs(recipe.exported(), data.test, recipe.tokenizer, recipe.normalize)
    if len(set(captions)) < len(captions) / 4:
        return {}
    names = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([names[c] for c in captions])
    right = ids[:, None] == ids[None, :]
    both = {"text_to_image": recall(texts @ images.t(), right, ks), "image_to_text": recall(images @ texts.t(), right, ks)}
    return {f"{name}@{k}": value for name, found in both.items() for k, value in found.items()}


@torch.no_grad()
def part_map(model: nn.Module, images: Tensor, text: Tensor) -> Tensor:
    """Similarity of each patch to a text: images (B, C, H, W) normalised, text ids (B, L) -> (B, rows, columns).

    A patch's feature is what the class token would carry into the space of texts if, in the last block, it saw that patch alone. The
    patches' own outputs are trained for nothing and say little; values in place of them: Zhou et al., "Extract Free Dense Labels from CLIP"
    (2022).
    """
    visual = model.visual
    if not hasattr(visual, "num_prefix_tokens") or getattr(visual, "attn_pool", None) is not None:
        raise ValueError("parts: the image tower must be a ViT with a class token, whose patches share its projection")
    entering: list[Tensor] = []
    last = visual.blocks[-1]  # type: ignore[index]
    hook = last.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    try:
        visual.forward_features(images)  # type: ignore[operator]
    finally:
        hook.remove()
    x = entering[0]
    qkv, width = last.attn.qkv, x.shape[-1]
    bias = None if qkv.bias is None else qkv.bias[2 * width :]
    values = F.linear(last.norm1(x)[:, visual.num_prefix_tokens :], qkv.weight[2 * width :], bias)
    carried = x[:, :1] + last.ls1(last.attn.proj(values))
    carried = carried + last.ls2(last.mlp(last.norm2(carried)))
    tokens = visual.head(visual.norm(carried))  # type: ignore[operator]
    words = model.encode_text(text)  # type: ignore[operator]
    similar = (F.normalize(tokens, dim=-1) @ words[:, :, None])[..., 0]
    return similar.unflatten(1, visual.patch_embed.grid(images.shape[2:]))  # type: ignore[union-attr,operator]


def quarter_accuracy(recipe: Any, data: Data, limit: int = 200) -> float:
    """Of drawn scenes: how often the quarter that fits a phrase best is the one its object is in, in per cent (chance: 25)."""
    model, parts = recipe.exported(), data.extra["parts"][:limit]
    device = next(model.parameters()).device
    queries = [(i, phrase, quarter) for i, objects in enumerate(parts) for phrase, quarter in objects]
    images = recipe.normalize(data.test.fetch([i for i, _, _ in queries])["image"].to(device))
    maps = part_map(model, images, recipe.tokenizer([p for _, p, _ in queries]).to(device))
    best = F.adaptive_max_pool2d(maps[:, None], 2).flatten(1).argmax(1).cpu()
    return 100 * (best == torch.tensor([q for _, _, q in queries])).float().mean().item()
