"""Retrieval of images by text and of texts by image, and localisation of phrases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data, Images
from pyvit.eval.features import check_finite, over


def recall(similarities: Tensor, right: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Percentage of queries (rows) with a correct answer among their k best: similarities (Q, N), right (Q, N) bool.

    Ties count as wrong: a wrong answer as similar as the best correct one comes before it. With fewer than k answers, k
    is left out. Raises ValueError for similarities that are not finite.
    """
    if not similarities.numel() or similarities.shape != right.shape:
        raise ValueError(
            f"recall: similarities and right must be (Q, N), got {tuple(similarities.shape)} and {tuple(right.shape)}"
        )
    check_finite("recall", similarities)
    best = similarities.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    before = ((similarities >= best) & ~right).sum(1)
    before = before.where(right.any(1), similarities.shape[1])  # a query without a correct answer
    return {k: 100 * (before < k).float().mean().item() for k in ks if k <= similarities.shape[1]}


@torch.no_grad()
def embed_pairs(
    model: nn.Module,
    images: Images,
    tokenizer: Callable[..., Tensor],
    normalize: Callable[[Tensor], Tensor],
    group: Any = None,
) -> tuple[Tensor, Tensor, list[str]]:
    """Image embeddings (N, D), text embeddings (N, D) and captions of the readable images."""
    if images.captions is None:
        raise ValueError("retrieval: data must have captions")
    device = next(model.parameters()).device

    def both(batch: dict[str, Any]) -> Tensor:
        pictures = model.encode_image(normalize(batch["image"]))  # type: ignore[operator]
        return torch.stack([pictures, model.encode_text(tokenizer(batch["caption"]).to(device))], 1)  # type: ignore[operator]

    pairs = over(images, both, device=device, group=group)
    return pairs[:, 0], pairs[:, 1], [images.captions[i] for i in images.readable()]


def recall_of(recipe: Any, data: Data, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Recall@k in both directions on held-out pairs, or {} if few captions are distinct.

    Each image is one answer. All of its captions are correct for it, as are equal captions of other images.
    """
    check_towers("retrieval", recipe)
    images, texts, captions = embed_pairs(
        recipe.exported(), data.test, recipe.tokenizer, recipe.normalize, recipe.group
    )
    if len(set(captions)) < len(captions) / 4:
        return {}
    shown = [i if data.test.groups is None else data.test.groups[i] for i in data.test.readable()]
    image, first = _numbered(shown)
    text, said = _numbered(captions)
    images, texts = images[first], texts[said]
    right = torch.zeros(len(texts), len(images), dtype=torch.bool)
    right[text, image] = True
    both = {
        "text_to_image": recall(texts @ images.t(), right, ks),
        "image_to_text": recall(images @ texts.t(), right.t(), ks),
    }
    return {f"{name}@{k}": value for name, found in both.items() for k, value in found.items()}


def _numbered(values: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """For each value the number of its group of equal values, and for each group the position of its first value."""
    first: dict[Any, int] = {}
    for i, value in enumerate(values):
        first.setdefault(value, i)
    number = {kind: n for n, kind in enumerate(first)}
    return torch.tensor([number[value] for value in values], device="cpu"), torch.tensor(
        list(first.values()), device="cpu"
    )


def check_towers(what: str, recipe: Any) -> None:
    if not hasattr(recipe, "tokenizer"):
        raise ValueError(f"{what}: the run must be of the recipe clip or siglip, it is of {recipe.config.recipe}")


def has_parts(model: nn.Module) -> bool:
    """Whether :func:`part_map` supports the image tower: a ViT with a class token."""
    visual = model.visual
    return bool(getattr(visual, "num_prefix_tokens", 0)) and getattr(visual, "attn_pool", None) is None


@torch.no_grad()
def part_map(model: nn.Module, images: Tensor, text: Tensor) -> Tensor:
    """Similarity of each patch to a text: images (B, C, H, W) normalised, text ids (B, L) -> (B, rows, columns).

    A patch's feature is the output of the class token if it attended only to that patch in the last block. The patches'
    own outputs are not trained; using values instead is from Zhou et al., "Extract Free Dense Labels from CLIP" (2022).
    """
    visual = model.visual
    if not has_parts(model):
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


def quadrant_accuracy(recipe: Any, data: Data, limit: int = 200) -> float:
    """How often the quadrant that is most similar to a phrase contains its object, in per cent (chance: 25). For drawn
    scenes."""
    model, parts = recipe.exported(), data.extra.get("parts", [])[:limit]
    if not parts:
        raise ValueError(f"parts: data must be drawn scenes, which say where things are, {data.name} does not")
    device = next(model.parameters()).device
    queries = [(i, phrase, quarter) for i, objects in enumerate(parts) for phrase, quarter in objects]
    images = recipe.normalize(data.test.fetch([i for i, _, _ in queries])["image"].to(device))
    maps = part_map(model, images, recipe.tokenizer([p for _, p, _ in queries]).to(device))
    best = F.adaptive_max_pool2d(maps[:, None], 2).flatten(1).argmax(1).cpu()
    return 100 * (best == torch.tensor([q for _, _, q in queries], device="cpu")).float().mean().item()
