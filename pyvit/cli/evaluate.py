"""The subcommands of ``pyvit eval``. Each loads a finished run, prints its results, and writes PNG files into the run's
folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyvit.eval import contact_sheet, retrieval, visualize, zero_shot
from pyvit.eval import knn as knn_module
from pyvit.eval import linear as linear_module
from pyvit.eval.features import LastBlocks, check_finite, features, labels_of, right
from pyvit.train import curves
from pyvit.train.log import say
from pyvit.train.runs import load_run


def _open(run: str, data: str | None) -> tuple[Any, Any]:
    """Load the run and its images, and print a summary."""
    recipe, chosen = load_run(run, data)
    say(chosen.summary())
    return recipe, chosen


def _features(recipe: Any, data: Any, blocks: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    encoder = LastBlocks(recipe.encoder(), blocks) if blocks else recipe.encoder()
    found = [features(encoder, part, recipe.normalize) for part in (data.train.sample(), data.test)]
    _say_damage(data)
    return found


def _say_damage(data: Any) -> None:
    for name, part in (("training", data.train.sample()), ("held-out", data.test)):
        if part.bad:
            print(f"note: {len(part.bad)} of {len(part)} {name} images cannot be read and are left out")


def knn(run: str, data: str | None = None, temperature: float = 0.07) -> dict[str, float]:
    """Weighted k-nearest neighbours on frozen features, for k = 10, 20, 100 and 200; 1 and 5 with fewer than 10
    images."""
    recipe, chosen = _open(run, data)
    train, test = _features(recipe, chosen)
    ks = [k for k in (10, 20, 100, 200) if k <= len(train[0])] or [k for k in (1, 5) if k <= len(train[0])]
    found = {f"k={k}": knn_module.knn_accuracy(train, test, k, temperature) for k in ks}
    print(f"{run}: k-NN accuracy " + ", ".join(f"{v:.2f} % ({k})" for k, v in found.items()))
    return found


def linear(run: str, data: str | None = None, epochs: int = 50, blocks: int = 0) -> dict[str, float]:
    """Linear probe on frozen features, over several learning rates.

    With blocks, on the class token and the mean of the patches after each of that many last blocks, as DINO's and
    DINOv2's; otherwise on the input of the head.
    """
    recipe, chosen = _open(run, data)
    train, test = _features(recipe, chosen, blocks)
    found = linear_module.linear_probe(train, test, epochs=epochs)
    print(f"{run}: linear accuracy {found['linear']:.2f} % (rate {found['rate']:g})")
    return found


def zero_shot_command(
    run: str, data: str | None = None, template: list[str] | None = None, out: str | None = None, count: int = 8
) -> float:
    """Zero-shot accuracy by class names, and a sheet of class probabilities per image."""
    recipe, chosen = _open(run, data)
    retrieval.check_towers("zero-shot", recipe)
    if not chosen.classes:
        raise ValueError("zero-shot: data must have classes")
    model, templates = recipe.exported(), template or list(zero_shot.OF_DATA.get(chosen.name, zero_shot.TEMPLATES))
    classifier = zero_shot.text_classifier(model, recipe.tokenizer, chosen.classes, templates)
    logits = zero_shot.zero_shot_logits(model, chosen.test, classifier, recipe.normalize)
    check_finite("zero-shot", logits)
    accuracy = 100 * right(logits, labels_of(chosen.test))
    place = {at: row for row, at in enumerate(chosen.test.readable())}
    batch = chosen.test.fetch([chosen.test.readable()[i] for i in visualize.choose(count, len(logits))])
    ranked = []
    for i in batch["index"].tolist():
        best = zero_shot.probabilities(model, logits[place[i]][None])[0].topk(min(5, len(chosen.classes)))
        ranked.append([(chosen.classes[int(c)], float(p)) for p, c in zip(best.values, best.indices, strict=True)])
    truth = [chosen.classes[int(label)] for label in batch["label"]]
    images = contact_sheet.enlarge(batch["image"] / 255, 128)
    path = contact_sheet.save_guesses(
        _path(run, out, "zero_shot"), images, truth, ranked, f"zero-shot: {accuracy:.1f} % right"
    )
    _say_damage(chosen)
    print(f"{run}: zero-shot accuracy {accuracy:.2f} % from {len(templates)} prompts per class; wrote {path}")
    return accuracy


def retrieval_command(run: str, data: str | None = None, out: str | None = None, count: int = 6) -> dict[str, float]:
    """Recall@k of images by caption and captions by image. For drawn scenes also localisation of phrases, with a sheet
    of maps."""
    recipe, chosen = _open(run, data)
    found = retrieval.recall_of(recipe, chosen, (1, 5, 10))
    _say_damage(chosen)
    print(
        f"{run}: recall "
        + (", ".join(f"{k} {v:.1f} %" for k, v in found.items()) or "not measured: too few captions are distinct")
    )
    known = retrieval.has_parts(recipe.exported())
    if "parts" in chosen.extra and known:
        found["parts"] = retrieval.quadrant_accuracy(recipe, chosen)
        print(f"{run}: quadrant accuracy of phrases {found['parts']:.1f} % (chance: 25 %)")
    batch = _some(chosen, count)
    parts = chosen.extra.get("parts")
    phrases = [parts[i][0][0] for i in batch["index"].tolist()] if parts else batch["caption"]
    if not known:
        print("no sheet of phrases: the image tower is not a ViT with a class token")
        return found
    maps = retrieval.part_map(recipe.exported(), recipe.normalize(batch["image"]), recipe.tokenizer(phrases))
    picture = contact_sheet.enlarge(batch["image"] / 255, 128)
    warm = contact_sheet.enlarge(contact_sheet.heat(maps), 128, smooth=True)
    columns = [("image", picture), ("similarity of patches", warm), ("both", 0.5 * picture + 0.5 * warm)]
    print(f"wrote {contact_sheet.save_sheet(_path(run, out, 'parts'), columns, phrases, 'where the text is')}")
    return found


def curves_command(runs: list[str], out: str | None = None) -> Path:
    """Curves of one or more runs, finished or not, in one PNG: loss, learning rate, evaluations and whatever else they
    logged. Written to the first run's folder; of several runs to curves_compared.png there."""
    names = ["/".join(Path(run).parts[-2:]) for run in runs]
    names = names if len(set(names)) == len(names) else runs
    path = _path(runs[0], out, "curves" if len(runs) == 1 else "curves_compared")
    found = curves.draw(path, {name: curves.read(Path(run)) for name, run in zip(names, runs, strict=True)})
    if found is None:
        raise ValueError(f"run: no step is logged yet in {', '.join(runs)}")
    return _said(found)


def attention(run: str, data: str | None = None, mass: float = 0.6, out: str | None = None, count: int = 8) -> Path:
    """Sheet of the class token's attention in the last block, per head, and the cells with most of it."""
    recipe, images, normalised = _pictures(run, data, count)
    with torch.no_grad():
        columns = visualize.attention_columns(_tower(recipe), images, normalised, mass)
    return _said(contact_sheet.save_sheet(_path(run, out, "attention"), columns, title="attention of the class token"))


def reconstruct(
    run: str, data: str | None = None, mask_ratio: float = 0.75, out: str | None = None, count: int = 8, seed: int = 0
) -> Path:
    """Sheet of an MAE's reconstructions."""
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask-ratio: must be in (0, 1), got {mask_ratio}")
    recipe, images, _ = _pictures(run, data, count)
    torch.manual_seed(seed)
    columns = visualize.reconstruction_columns(recipe, images, mask_ratio)
    return _said(
        contact_sheet.save_sheet(_path(run, out, "reconstruct"), columns, title=f"{100 * mask_ratio:.0f} % masked")
    )


def patches(run: str, data: str | None = None, out: str | None = None, count: int = 8) -> Path:
    """Sheet of patch features: their first three principal components as colours."""
    recipe, images, normalised = _pictures(run, data, count)
    colors = visualize.pca_colors(visualize.patch_features(_tower(recipe), normalised))
    columns = [
        ("image", contact_sheet.enlarge(images, 128)),
        ("principal components", contact_sheet.enlarge(colors, 128)),
    ]
    return _said(contact_sheet.save_sheet(_path(run, out, "patches"), columns, title="patch features"))


def _tower(recipe: Any) -> Any:
    model = recipe.encoder()
    return getattr(model, "visual", model)


def _some(data: Any, count: int) -> dict[str, Any]:
    """``count`` readable held-out images at equal distances."""
    known = data.test.readable()
    batch = data.test.fetch([known[i] for i in visualize.choose(count, len(known))])
    if not len(batch["image"]):
        raise ValueError(f"data: none of {count} held-out images of {data.name} can be read")
    return batch


def _pictures(run: str, data: str | None, count: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    recipe, chosen = load_run(run, data)
    images = _some(chosen, count)["image"] / 255
    return recipe, images, recipe.normalize(images)


def _path(run: str, out: str | None, name: str) -> Path:
    return Path(out) if out else Path(run) / f"{name}.png"


def _said(path: Path) -> Path:
    print(f"wrote {path}")
    return path


COMMANDS: dict[str, Callable[..., Any]] = {
    "knn": knn,
    "linear": linear,
    "zero-shot": zero_shot_command,
    "retrieval": retrieval_command,
    "curves": curves_command,
    "attention": attention,
    "reconstruct": reconstruct,
    "patches": patches,
}
