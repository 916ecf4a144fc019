"""Zero-shot classification by class names (Radford et al., 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvit.data import Data, Images
from pyvit.eval.features import check_finite, labels_of, over, right

#: The 80 prompts of CLIP's evaluation on ImageNet (section 3.1.4).
TEMPLATES = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

#: Prompts in the form of the built-in data sets' captions.
OF_DATA = {
    "digits": ("a handwritten {}", "the digit {}", "a photo of the number {}", "{}"),
    "emoji": ("{}",),
    "icons": ("{}",),
}


@torch.no_grad()
def text_classifier(
    model: nn.Module, tokenizer: Callable[..., Tensor], classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """(classes, D): for each class the normalised mean of its prompts' embeddings."""
    if not templates or any("{}" not in t for t in templates):
        raise ValueError(f"zero-shot: templates must each contain {{}}, got {list(templates)}")
    device = next(model.parameters()).device
    names = [c.replace("_", " ") for c in classes]
    prompts = tokenizer([t.replace("{}", name) for name in names for t in templates]).to(device)
    each = torch.cat([model.encode_text(part) for part in prompts.split(256)])  # type: ignore[operator]
    return F.normalize(each.view(len(classes), len(templates), -1).mean(1), dim=-1)


def zero_shot_logits(
    model: nn.Module, images: Images, classifier: Tensor, normalize: Callable[[Tensor], Tensor], group: Any = None
) -> Tensor:
    """Logits (N, classes) of every readable image: similarity times the model's scale, plus its bias if it has one
    (SigLIP)."""
    scale, bias = model.scale(), getattr(model, "logit_bias", None)  # type: ignore[operator]

    def compute(batch: dict[str, Any]) -> Tensor:
        similar = scale * model.encode_image(normalize(batch["image"])).float() @ classifier.t()  # type: ignore[operator]
        return similar if bias is None else similar + bias

    return over(images, compute, device=classifier.device, group=group)


def probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """Class probabilities: a softmax (CLIP), or independent sigmoids that need not add up to 1 (SigLIP)."""
    return logits.softmax(1) if getattr(model, "logit_bias", None) is None else logits.sigmoid()


def zero_shot(model: nn.Module, images: Images, classifier: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Class probabilities (N, classes) of every image with the model's temperature: see :func:`probabilities`."""
    return probabilities(model, zero_shot_logits(model, images, classifier, normalize))


def zero_shot_accuracy_of(recipe: Any, data: Data, templates: Sequence[str] | None = None) -> dict[str, float]:
    """{"zero_shot": accuracy} of a CLIP or SigLIP recipe on held-out images, from the class names."""
    model = recipe.exported()
    classifier = text_classifier(
        model, recipe.tokenizer, data.classes or (), templates or OF_DATA.get(data.name, TEMPLATES)
    )
    logits = zero_shot_logits(model, data.test, classifier, recipe.normalize, recipe.group)
    check_finite("zero-shot", logits)
    return {"zero_shot": 100 * right(logits, labels_of(data.test))}
