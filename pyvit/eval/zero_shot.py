"""Classifiers made of words (Radford et al., 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data, Images
from pyvit.eval.features import labels_of, over

TEMPLATES = ("a photo of a {}", "a picture of the {}", "{}")

#: Prompts that read like a built-in set's captions.
OF_DATA = {"digits": ("a handwritten {}", "the digit {}", "a photo of the number {}", "{}")}


@torch.no_grad()
def text_classifier(model: nn.Module, tokenizer: Callable[..., Tensor], classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(classes, D): for each class the mean direction of its prompts, of length 1."""
    if not templates or any("{}" not in t for t in templates):
        raise ValueError(f"zero-shot: templates must each contain {{}}, got {list(templates)}")
    device = next(model.parameters()).device
    prompts = tokenizer([t.format(c) for c in classes for t in templates]).to(device)
    each = torch.cat([model.encode_text(part) for part in prompts.split(256)])  # type: ignore[operator]
    return F.normalize(each.view(len(classes), len(templates), -1).mean(1), dim=-1)


def zero_shot(model: nn.Module, images: Images, classifier: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Class probabilities (N, classes) of every image, at the model's own temperature."""
    scale = model.scale()  # type: ignore[operator]
    return over(images, lambda b: (scale * model.encode_image(normalize(b["image"])) @ classifier.t()).softmax(1), device=classifier.device)  # type: ignore[operator]


def zero_shot_accuracy_of(recipe: Any, data: Data, templates: Sequence[str] | None = None) -> dict[str, float]:
    """{"zero_shot": accuracy} of a two-tower recipe on held-out images, from the names of the classes."""
    model = recipe.exported()
    classifier = text_classifier(model, recipe.tokenizer, data.classes or (), templates or OF_DATA.get(data.name, TEMPLATES))
    probabilities = zero_shot(model, data.test, classifier, recipe.normalize)
    return {"zero_shot": 100 * (probabilities.argmax(1) == labels_of(data.test)).float().mean().item()}
