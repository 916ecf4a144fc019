"""Checkpoint layouts as data: the parameter names of each library, and pyvit's names, which are timm's.

A :class:`Rule` works in both directions, for loading and for ``pyvit convert``. In a key, ``{i}`` and ``{j}`` are block
numbers, ``{p}`` is ``weight`` or ``bias``, ``{r}`` any rest, and ``@`` the prefix of the base model, which a checkpoint
may lack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Op(NamedTuple):
    """Conversion of foreign tensors to native ones and back."""

    to_native: Callable[..., tuple[Tensor, ...]]
    to_foreign: Callable[..., tuple[Tensor, ...]]


#: any number of tensors, unchanged
SAME = Op(lambda *xs: xs, lambda *xs: xs)
TRANSPOSE = Op(lambda x: (x.T.contiguous(),), lambda x: (x.T.contiguous(),))
ROW_TO_TOKEN = Op(lambda x: (x.reshape(1, 1, -1),), lambda x: (x.flatten(),))
TABLE_TO_TOKENS = Op(lambda x: (x[None],), lambda x: (x[0],))
TOKEN_TO_ROW = Op(lambda x: (x.reshape(1, -1),), lambda x: (x.reshape(1, 1, -1),))
SCALAR = Op(lambda x: (x.reshape(()),), lambda x: (x.reshape(1),))
#: torchvision's Swin V2 has a key bias of zeros, unlike the others
QKV_BIAS_TO_QV = Op(lambda b: b.chunk(3)[::2], lambda q, v: (torch.cat((q, torch.zeros_like(q), v)),))


def _patch_convolution(x: Tensor) -> tuple[Tensor, ...]:
    channels = 3 if x.shape[1] % 3 == 0 else 1
    side = math.isqrt(x.shape[1] // channels)
    return (x.reshape(-1, side, side, channels).permute(0, 3, 1, 2).contiguous(),)


#: a linear layer on patches of pixels (row, column, channel) as a convolution
PATCHES = Op(_patch_convolution, lambda x: (x.permute(0, 2, 3, 1).flatten(1),))
#: positions on a square map (1, n, n, D) as tokens
SQUARE_MAP = Op(lambda x: (x.flatten(1, 2),), lambda x: (x.unflatten(1, (math.isqrt(x.shape[1]),) * 2),))

#: torch.nn.MultiheadAttention's in_proj as a query projection and a key-value projection
QUERY_AND_KV = Op(lambda x: (x[: len(x) // 3], x[len(x) // 3 :]), lambda q, kv: (torch.cat((q, kv)),))


def cat(parts: int) -> Op:
    """Several matrices concatenated into one."""
    return Op(lambda *xs: (torch.cat(xs),), lambda x: tuple(t.contiguous() for t in x.chunk(parts)))


@dataclass(frozen=True)
class Rule:
    native: tuple[str, ...]
    foreign: tuple[str, ...]
    op: Op = SAME
    swiglu: bool | None = None  # only for models with (without) a gated MLP, if both have the same native names


def rule(native: str, foreign: str, op: Op | None = None, swiglu: bool | None = None) -> Rule:
    """A rule from space-separated keys on both sides. Several foreign keys for one native key are concatenated unless
    ``op`` says otherwise."""
    natives, foreigns = tuple(native.split()), tuple(foreign.split())
    return Rule(natives, foreigns, op or (SAME if len(foreigns) == 1 else cat(len(foreigns))), swiglu)


@dataclass(frozen=True)
class Format:
    """The layout of one library.

    marks: keys (templates) that every checkpoint of this layout has; the first format whose marks are all present is
    chosen. bases: prefixes that ``@`` may stand for; the first one is written. drop: keys that are not parameters
    (buffers), as regular expressions. written: bases that are written instead for models that have all of some native
    keys.

    stages: templates of a block, numbered by stage {i} and block {j} in the layout, and by block {i} alone in the
    rules.

    dims: keys (templates) whose tensors must have so many dimensions, where keys alone do not tell layouts apart.

    extra: parameters of pre-training heads, which are skipped with a note if the model does not have them.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    bases: tuple[str, ...] = ("",)
    drop: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    written: tuple[tuple[tuple[str, ...], str], ...] = ()
    dims: tuple[tuple[str, int], ...] = ()
    stages: tuple[str, str] | None = None


def number_blocks(state: Mapping[str, Tensor], layout: Format) -> dict[str, Tensor]:
    """``state`` with its blocks numbered without stages, if the layout has :attr:`Format.stages`."""
    if layout.stages is None:
        return dict(state)
    found = pattern(layout.stages[0] + "{r}", layout.bases)
    matches = {key: match for key in state if (match := found.fullmatch(key))}
    order = sorted({(int(match["i"]), int(match["j"])) for match in matches.values()})
    number = {place: i for i, place in enumerate(order)}

    def renamed(key: str) -> str:
        if key not in matches:
            return key
        match = matches[key]
        block = layout.stages[1].format(i=number[int(match["i"]), int(match["j"])])  # type: ignore[index]
        return block.replace("@", match.groupdict().get("base") or "") + match["r"]

    return {renamed(key): value for key, value in state.items()}


def number_stages(state: Mapping[str, Tensor], layout: Format, base: str) -> dict[str, Tensor]:
    """The inverse of :func:`number_blocks`: the first block of a stage is one with a ``proj`` beside its attention."""
    if layout.stages is None:
        return dict(state)
    staged, flat = (template.replace("@", base) for template in layout.stages)
    found = pattern(flat + "{r}")
    matches = {key: match for key in state if (match := found.fullmatch(key))}
    place, stage, block = dict[int, tuple[int, int]](), 0, 0
    for i in sorted({int(match["i"]) for match in matches.values()}):
        if flat.format(i=i) + "proj.weight" in state:
            stage, block = stage + 1, 0
        place[i] = stage, block
        block += 1

    def renamed(key: str) -> str:
        if key not in matches:
            return key
        i, j = place[int(matches[key]["i"])]
        return staged.format(i=i, j=j) + matches[key]["r"]

    return {renamed(key): value for key, value in state.items()}


def pattern(template: str, bases: tuple[str, ...] = ("",)) -> re.Pattern[str]:
    """Regular expression for a key template."""
    text = (
        re.escape(template)
        .replace(r"\{i\}", r"(?P<i>\d+)")
        .replace(r"\{j\}", r"(?P<j>\d+)")
        .replace(r"\{p\}", "(?P<p>weight|bias)")
    )
    text = text.replace(r"\{r\}", "(?P<r>.+)")
    return re.compile(
        text.replace("@", "(?P<base>" + "|".join(map(re.escape, sorted(bases, key=len, reverse=True))) + ")")
    )


def block(
    native: str, foreign: str, *, norm1: str, qkv: str, proj: str, norm2: str, fc1: str, fc2: str, joint: bool = False
) -> list[Rule]:
    """Rules for a transformer block; ``qkv`` names three projections, or with ``joint`` one."""
    pairs = {"norm1": norm1, "attn.proj": proj, "norm2": norm2, "mlp.fc1": fc1, "mlp.fc2": fc2}
    rules = [
        rule(f"{native}{a}.{{p}}", f"{foreign}{b}.{{p}}", swiglu=False if "mlp" in a else None)
        for a, b in pairs.items()
    ]
    if joint:  # torch.nn.MultiheadAttention: in_proj_weight, in_proj_bias
        return [*rules, *(rule(f"{native}attn.qkv.{p}", f"{foreign}{qkv}_{p}") for p in ("weight", "bias"))]
    return [*rules, rule(f"{native}attn.qkv.{{p}}", " ".join(f"{foreign}{part}.{{p}}" for part in qkv.split()))]


def _hf_block(native: str, foreign: str, new: bool) -> list[Rule]:
    names = (
        {
            "qkv": "attention.q_proj attention.k_proj attention.v_proj",
            "proj": "attention.o_proj",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        }
        if new
        else {
            "qkv": "attention.attention.query attention.attention.key attention.attention.value",
            "proj": "attention.output.dense",
            "fc1": "intermediate.dense",
            "fc2": "output.dense",
        }
    )
    return block(native, foreign, norm1="layernorm_before", norm2="layernorm_after", **names)


def _hf_vit(new: bool) -> Format:
    """transformers' ViT, DeiT, ViTMAE and AST, in the layout of version 5 (``new``) or of earlier versions."""
    layer = "layers.{i}." if new else "encoder.layer.{i}."
    return Format(
        "transformers ViT" if new else "transformers<5 ViT",
        (f"@{layer}layernorm_before.weight", "@embeddings.patch_embeddings.projection.weight"),
        (
            rule("cls_token", "@embeddings.cls_token"),
            rule("dist_token", "@embeddings.distillation_token"),
            rule("pos_embed", "@embeddings.position_embeddings"),
            rule("patch_embed.proj.{p}", "@embeddings.patch_embeddings.projection.{p}"),
            *_hf_block("blocks.{i}.", "@" + layer, new),
            rule("norm.{p}", "@layernorm.{p}"),
            rule("head.{p} head_dist.{p}", "cls_classifier.{p} distillation_classifier.{p}", SAME),
            rule("fc_norm.{p} head.{p}", "classifier.layernorm.{p} classifier.dense.{p}", SAME),
            rule("head.{p}", "classifier.{p}"),
            rule("mask_token", "decoder.mask_token"),
            rule("decoder_pos_embed", "decoder.decoder_pos_embed"),
            *(rule(f"decoder_{part}.{{p}}", f"decoder.decoder_{part}.{{p}}") for part in ("embed", "norm", "pred")),
            *_hf_block("decoder_blocks.{i}.", "decoder.decoder_layers.{i}.", new),
            *(
                [] if new else _hf_block("decoder_blocks.{i}.", "decoder.decoder_encoder.layer.{i}.", False)
            ),  # as version 5 saves them
        ),
        ("vit.", "deit.", "audio_spectrogram_transformer.", ""),
        extra=(r"(vit\.)?pooler\..*", r"decoder\..*"),
        written=((("dist_token", "fc_norm.weight"), "audio_spectrogram_transformer."), (("dist_token",), "deit.")),
    )


def _hf_dinov2(new: bool) -> Format:
    layer = "@encoder.layer.{i}."
    old = "attention.attention."
    names = "attention.q_proj attention.k_proj attention.v_proj" if new else f"{old}query {old}key {old}value"
    glu = (
        (f"{layer}mlp.gate_proj.{{p}} {layer}mlp.up_proj.{{p}}", "down_proj")
        if new
        else (f"{layer}mlp.weights_in.{{p}}", "weights_out")
    )
    proj = "attention.o_proj" if new else "attention.output.dense"
    return Format(
        "transformers DINOv2" if new else "transformers<5 DINOv2",
        (f"{layer}layer_scale1.lambda1", f"{layer}{proj}.weight"),
        (
            rule("cls_token", "@embeddings.cls_token"),
            rule("mask_token", "@embeddings.mask_token"),
            rule("reg_token", "@embeddings.register_tokens"),
            rule("pos_embed", "@embeddings.position_embeddings"),
            rule("patch_embed.proj.{p}", "@embeddings.patch_embeddings.projection.{p}"),
            *block(
                "blocks.{i}.", layer, norm1="norm1", qkv=names, proj=proj, norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2"
            ),
            rule("blocks.{i}.mlp.fc1.{p}", glu[0], swiglu=True),
            rule("blocks.{i}.mlp.fc2.{p}", f"{layer}mlp.{glu[1]}.{{p}}", swiglu=True),
            rule("blocks.{i}.ls1.gamma", f"{layer}layer_scale1.lambda1"),
            rule("blocks.{i}.ls2.gamma", f"{layer}layer_scale2.lambda1"),
            rule("norm.{p}", "@layernorm.{p}"),
            rule("head.{p}", "classifier.{p}"),
        ),
        ("dinov2.", "dinov2_with_registers.", ""),
        written=((("reg_token",), "dinov2_with_registers."),),
    )


#: transformers' DINOv3; "model." is the prefix of the blocks alone, in state dicts of version 5
DINOV3 = Format(
    "transformers DINOv3",
    ("@layer.{i}.layer_scale1.lambda1", "@layer.{i}.attention.o_proj.weight", "embeddings.register_tokens"),
    (
        rule("cls_token", "embeddings.cls_token"),
        rule("mask_token", "embeddings.mask_token", TOKEN_TO_ROW),
        rule("reg_token", "embeddings.register_tokens"),
        rule("patch_embed.proj.{p}", "embeddings.patch_embeddings.{p}"),
        *(
            rule(f"blocks.{{i}}.{ours}", f"@layer.{{i}}.{theirs}")
            for ours, theirs in {
                "norm1.{p}": "norm1.{p}",
                "norm2.{p}": "norm2.{p}",
                "attn.proj.{p}": "attention.o_proj.{p}",
                "attn.qkv.q_bias": "attention.q_proj.bias",
                "attn.qkv.v_bias": "attention.v_proj.bias",
                "ls1.gamma": "layer_scale1.lambda1",
                "ls2.gamma": "layer_scale2.lambda1",
                "mlp.fc2.{p}": "mlp.down_proj.{p}",
            }.items()
        ),
        rule("blocks.{i}.attn.qkv.weight", " ".join(f"@layer.{{i}}.attention.{n}_proj.weight" for n in "qkv")),
        rule("blocks.{i}.mlp.fc1.{p}", "@layer.{i}.mlp.gate_proj.{p} @layer.{i}.mlp.up_proj.{p}", swiglu=True),
        rule("blocks.{i}.mlp.fc1.{p}", "@layer.{i}.mlp.up_proj.{p}", swiglu=False),
        rule("norm.{p}", "norm.{p}"),
    ),
    ("", "model."),
)


def _timm_eva(name: str, *marks: str, split_qkv: bool = False, split_glu: bool = True) -> Format:
    """timm's class ``Eva``: LayerScale has other names, q and v have biases of their own, and in some models the
    projections are separate layers (``split_qkv``, ``split_glu``)."""
    attn, fc1 = "blocks.{i}.attn.", "blocks.{i}.mlp.fc1"
    rules = [rule(f"blocks.{{i}}.ls{n}.gamma", f"blocks.{{i}}.gamma_{n}") for n in (1, 2)]
    if split_qkv:
        rules.append(rule(attn + "qkv.weight", " ".join(f"{attn}{n}_proj.weight" for n in "qkv")))
    bias = "{n}_proj.bias" if split_qkv else "{n}_bias"
    rules += [rule(f"{attn}qkv.{n}_bias", attn + bias.replace("{n}", n)) for n in "qv"]
    if split_glu:
        rules.append(rule(fc1 + ".{p}", f"{fc1}_g.{{p}} {fc1}_x.{{p}}", swiglu=True))
    return Format(name, marks, (*rules, rule("{r}", "{r}")), extra=("mask_token",))


def _shifted_merges(foreign: str, stages: int = 4) -> list[Rule]:
    """Patch merging at the end of stage s - 1 (Microsoft, transformers) is at the start of stage s in pyvit."""
    return [
        rule(f"layers.{s}.downsample.{part}", foreign.format(s=s - 1) + part)
        for s in range(1, stages)
        for part in ("reduction.weight", "norm.{p}")
    ]


def _hf_swin(version: int, new: bool = False) -> Format:
    layer, ours = "@encoder.layers.{i}.blocks.{j}.", "layers.{i}.blocks.{j}."
    table = "attention.relative_position_bias." if new else "attention.self."
    at = layer + "attention.self."
    names = {"qkv": "attention.self.query attention.self.key attention.self.value", "proj": "attention.output.dense"}
    names |= {"fc1": "intermediate.dense", "fc2": "output.dense"}
    common = (
        rule("patch_embed.proj.{p}", "@embeddings.patch_embeddings.projection.{p}"),
        rule("patch_embed.norm.{p}", "@embeddings.norm.{p}"),
        *_shifted_merges("@encoder.layers.{s}.downsample."),
        rule("norm.{p}", "@layernorm.{p}"),
        rule("head.fc.{p}", "classifier.{p}"),
    )
    if version == 1:
        mark = layer + table + "relative_position_bias_table"
        norms = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        blocks = _hf_block(ours, layer, True) if new else block(ours, layer, **norms, **names)
        blocks.append(rule(ours + "attn.relative_position_bias_table", mark))
        title = "transformers Swin" if new else "transformers<5 Swin"
        return Format(
            title, (mark,), (*common, *blocks), ("swin.", ""), (r".*relative_position_index",), (r".*mask_token",)
        )
    blocks = [
        r
        for r in block(ours, layer, norm1="layernorm_before", norm2="layernorm_after", **names)
        if not r.native[0].endswith("attn.qkv.{p}")
    ]
    blocks += [
        rule(ours + "attn.qkv.weight", f"{at}query.weight {at}key.weight {at}value.weight"),
        rule(ours + "attn.q_bias", at + "query.bias"),
        rule(ours + "attn.v_bias", at + "value.bias"),
        rule(ours + "attn.logit_scale", at + "logit_scale"),
        *(rule(f"{ours}attn.cpb_mlp.{n}", f"{at}continuous_position_bias_mlp.{n}") for n in ("0.{p}", "2.weight")),
    ]
    drop = (r".*relative_position_index", r".*relative_coords_table")
    return Format(
        "transformers SwinV2", (at + "logit_scale",), (*common, *blocks), ("swinv2.", ""), drop, (r".*mask_token",)
    )


def _hf_clip(siglip: bool, naflex: bool = False) -> Format:
    """transformers' CLIP and SigLIP; ``naflex``: the patch embedding is a linear layer."""
    names = {
        "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "proj": "self_attn.out_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    towers = [
        r
        for ours, theirs in (("visual", "vision_model"), ("text", "text_model"))
        for r in block(
            f"{ours}.blocks.{{i}}.",
            f"{theirs}.encoder.layers.{{i}}.",
            norm1="layer_norm1",
            norm2="layer_norm2",
            **names,
        )
    ]
    head, patches = "vision_model.head.", "vision_model.embeddings.patch_embedding."
    name = "transformers SigLIP 2 NaFlex" if naflex else "transformers SigLIP" if siglip else "transformers CLIP"
    return Format(
        name,
        (head + "probe",) if siglip else ("vision_model.pre_layrnorm.weight",),
        (
            *towers,
            rule("visual.cls_token", "vision_model.embeddings.class_embedding", ROW_TO_TOKEN),
            *([rule("visual.patch_embed.proj.weight", patches + "weight", PATCHES)] if naflex else []),
            rule("visual.patch_embed.proj.{p}", patches + "{p}"),
            rule("visual.pos_embed", "vision_model.embeddings.position_embedding.weight", TABLE_TO_TOKENS),
            rule("visual.norm_pre.{p}", "vision_model.pre_layrnorm.{p}"),
            rule("visual.norm.{p}", "vision_model.post_layernorm.{p}"),
            rule("visual.head.weight", "visual_projection.weight"),
            rule("visual.attn_pool.latent", head + "probe"),
            *(
                rule(f"visual.attn_pool.q.{p} visual.attn_pool.kv.{p}", f"{head}attention.in_proj_{p}", QUERY_AND_KV)
                for p in ("weight", "bias")
            ),
            rule("visual.attn_pool.proj.{p}", head + "attention.out_proj.{p}"),
            rule("visual.attn_pool.norm.{p}", head + "layernorm.{p}"),
            *(rule(f"visual.attn_pool.mlp.fc{n}.{{p}}", f"{head}mlp.fc{n}.{{p}}") for n in (1, 2)),
            rule("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
            rule("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
            rule("text.ln_final.{p}", "text_model.final_layer_norm.{p}"),
            rule("text.proj.weight", "text_projection.weight")
            if not siglip
            else rule("text.proj.{p}", "text_model.head.{p}"),
            rule("logit_scale", "logit_scale", SCALAR if siglip else SAME),
            *([rule("logit_bias", "logit_bias", SCALAR)] if siglip else []),
        ),
        drop=(r".*position_ids",),
        dims=((patches + "weight", 2),) if naflex else (),
    )


_CLIP_BUFFERS = (r"input_resolution|context_length|vocab_size", r".*attn_mask")


def _openai_clip(text: str, name: str) -> Format:
    """OpenAI's CLIP and open_clip; ``text`` is the prefix of the text tower."""
    names = {
        "norm1": "ln_1",
        "qkv": "attn.in_proj",
        "proj": "attn.out_proj",
        "norm2": "ln_2",
        "fc1": "mlp.c_fc",
        "fc2": "mlp.c_proj",
    }
    return Format(
        name,
        (
            "visual.transformer.resblocks.{i}.attn.in_proj_weight",
            f"{text}transformer.resblocks.{{i}}.attn.in_proj_weight",
        ),
        (
            *block("visual.blocks.{i}.", "visual.transformer.resblocks.{i}.", joint=True, **names),
            rule("visual.cls_token", "visual.class_embedding", ROW_TO_TOKEN),
            rule("visual.patch_embed.proj.weight", "visual.conv1.weight"),
            rule("visual.pos_embed", "visual.positional_embedding", TABLE_TO_TOKENS),
            rule("visual.norm_pre.{p}", "visual.ln_pre.{p}"),
            rule("visual.norm.{p}", "visual.ln_post.{p}"),
            rule("visual.head.weight", "visual.proj", TRANSPOSE),
            *block("text.blocks.{i}.", text + "transformer.resblocks.{i}.", joint=True, **names),
            rule("text.token_embedding.weight", text + "token_embedding.weight"),
            rule("text.positional_embedding", text + "positional_embedding"),
            rule("text.ln_final.{p}", text + "ln_final.{p}"),
            rule("text.proj.weight", text + "text_projection", TRANSPOSE),
            rule("logit_scale", "logit_scale"),
            rule("logit_bias", "logit_bias"),
        ),
        drop=_CLIP_BUFFERS,
    )


def _open_clip_timm() -> Format:
    """open_clip with an image tower of timm's: SigLIP and SigLIP 2."""
    text = [r for r in _openai_clip("text.", "").rules if not r.native[0].startswith(("visual.", "text.proj.weight"))]
    return Format(
        "open_clip with timm's tower",
        ("visual.trunk.patch_embed.proj.weight", "text.transformer.resblocks.{i}.attn.in_proj_weight"),
        (
            rule("visual.{r}", "visual.trunk.{r}"),
            *text,
            rule("text.proj.{p}", "text.text_projection.{p}"),
        ),
        drop=_CLIP_BUFFERS,
    )


def _openai_clip_resnet() -> Format:
    """OpenAI's CLIP with a ResNet image tower, whose names are pyvit's; the text tower as above."""
    text = tuple(r for r in _openai_clip("", "").rules if not r.native[0].startswith("visual."))
    marks = ("visual.attnpool.positional_embedding", "transformer.resblocks.{i}.attn.in_proj_weight")
    return Format("OpenAI CLIP ResNet", marks, (rule("visual.{r}", "visual.{r}"), *text), drop=_CLIP_BUFFERS)


def _torchvision_vit(fc1: str, fc2: str, name: str) -> Format:
    layer = "encoder.layers.encoder_layer_{i}."
    names = {
        "norm1": "ln_1",
        "qkv": "self_attention.in_proj",
        "proj": "self_attention.out_proj",
        "norm2": "ln_2",
        "fc1": fc1,
        "fc2": fc2,
    }
    return Format(
        name,
        (layer + "self_attention.in_proj_weight", f"{layer}{fc1}.weight"),
        (
            rule("cls_token", "class_token"),
            rule("pos_embed", "encoder.pos_embedding"),
            rule("patch_embed.proj.{p}", "conv_proj.{p}"),
            *block("blocks.{i}.", layer, joint=True, **names),
            rule("norm.{p}", "encoder.ln.{p}"),
            rule("head.{p}", "heads.head.{p}"),
        ),
    )


def _torchvision_swin(version: int) -> Format:
    rules = [
        rule("patch_embed.proj.{p}", "features.0.0.{p}"),
        rule("patch_embed.norm.{p}", "features.0.2.{p}"),
        rule("norm.{p}", "norm.{p}"),
        rule("head.fc.{p}", "head.{p}"),
    ]
    for s in range(4):
        ours, theirs = f"layers.{s}.blocks.{{j}}.", f"features.{2 * s + 1}.{{j}}."
        pairs = {"norm1": "norm1", "attn.proj": "attn.proj", "norm2": "norm2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
        rules += [rule(f"{ours}{a}.{{p}}", f"{theirs}{b}.{{p}}") for a, b in pairs.items()]
        if version == 1:
            same = ("qkv.{p}", "relative_position_bias_table")
        else:
            same = ("qkv.weight", "logit_scale", "cpb_mlp.0.{p}", "cpb_mlp.2.weight")
            rules.append(rule(f"{ours}attn.q_bias {ours}attn.v_bias", f"{theirs}attn.qkv.bias", QKV_BIAS_TO_QV))
        rules += [rule(f"{ours}attn.{k}", f"{theirs}attn.{k}") for k in same]
        if s:
            rules += [
                rule(f"layers.{s}.downsample.{k}", f"features.{2 * s}.{k}") for k in ("reduction.weight", "norm.{p}")
            ]
    mark = "features.1.{j}.attn." + ("relative_position_bias_table" if version == 1 else "logit_scale")
    drop = (r".*relative_position_index", r".*relative_coords_table")
    return Format(f"torchvision Swin{'V2' if version == 2 else ''}", (mark,), tuple(rules), drop=drop)


_VITDET_LAYER = "@encoder.layer.{i}."
VITDET = Format(
    "transformers ViTDet",
    (_VITDET_LAYER + "attention.qkv.weight", "@embeddings.projection.weight"),
    (
        rule("pos_embed", "@embeddings.position_embeddings"),
        rule("patch_embed.proj.{p}", "@embeddings.projection.{p}"),
        *(
            rule(f"blocks.{{i}}.attn.{k}", f"{_VITDET_LAYER}attention.{k}")
            for k in ("qkv.{p}", "proj.{p}", "rel_pos_h", "rel_pos_w")
        ),
        *(
            rule(f"blocks.{{i}}.{k}.{{p}}", f"{_VITDET_LAYER}{k}.{{p}}")
            for k in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
        ),
    ),
    ("vitdet.", ""),
)


def _sam(
    name: str, at: str, layer: str, patch: str, norms: str, neck: tuple[str, ...], extra: tuple[str, ...]
) -> Format:
    """SAM's image encoder at ``at``; the other parts of the model are left out."""
    block = f"{at}{layer}.{{i}}."
    pairs = {f"mlp.fc{n}": f"mlp.lin{n}" for n in (1, 2)} | {f"norm{n}": f"{norms}{n}" for n in (1, 2)}
    return Format(
        name,
        (block + "attn.rel_pos_h", f"{at}{patch}.weight"),
        (
            rule("pos_embed", at + "pos_embed"),
            rule("patch_embed.proj.{p}", f"{at}{patch}.{{p}}"),
            *(rule(f"blocks.{{i}}.{a}.{{p}}", f"{block}{b}.{{p}}") for a, b in pairs.items()),
            *(
                rule(f"blocks.{{i}}.attn.{k}", f"{block}attn.{k}")
                for k in ("qkv.{p}", "proj.{p}", "rel_pos_h", "rel_pos_w")
            ),
            *(rule(f"neck.{n}.{{p}}", f"{at}neck.{part}.{{p}}") for n, part in enumerate(neck)),
        ),
        extra=extra,
    )


_SAM2_NAMES = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.proj_in", "mlp.fc2": "mlp.proj_out",
    "patch_embed": "projection",
}  # fmt: skip


def _sam2(name: str, trunk: str, neck: str, names: Mapping[str, str], bases: tuple[str, ...], *extra: str) -> Format:
    """SAM 2's image encoder; the other parts of the model are left out. ``names``: ours to theirs."""
    return Format(
        name,
        (f"{trunk}blocks.{{i}}.{names['mlp.fc1']}.weight", f"{neck}.weight"),
        (
            *(rule(f"trunk.{k}", trunk + k) for k in ("pos_embed", "pos_embed_window")),
            rule("trunk.patch_embed.proj.{p}", f"{trunk}patch_embed.{names['patch_embed']}.{{p}}"),
            *(
                rule(f"trunk.blocks.{{i}}.{k}.{{p}}", f"{trunk}blocks.{{i}}.{names.get(k, k)}.{{p}}")
                for k in ("norm1", "norm2", "attn.qkv", "attn.proj", "proj", "mlp.fc1", "mlp.fc2")
            ),
            rule("neck.convs.{i}.{p}", neck.replace("{j}", "{i}") + ".{p}"),
        ),
        bases,
        extra=extra,
    )


_MICROSOFT_BLOCK = (
    "norm1.{p}", "norm2.{p}", "attn.proj.{p}", "attn.qkv.{p}", "attn.q_bias", "attn.v_bias",
    "attn.relative_position_bias_table", "attn.logit_scale", "attn.cpb_mlp.0.{p}", "attn.cpb_mlp.2.weight",
    "mlp.fc1.{p}", "mlp.fc2.{p}",
)  # fmt: skip

MICROSOFT_SWIN = Format(
    "Microsoft Swin",
    ("layers.0.downsample.reduction.weight", "layers.0.blocks.{j}.attn.qkv.weight"),
    (
        *(rule(f"patch_embed.{part}.{{p}}", f"patch_embed.{part}.{{p}}") for part in ("proj", "norm")),
        *(rule(f"layers.{{i}}.blocks.{{j}}.{k}", f"layers.{{i}}.blocks.{{j}}.{k}") for k in _MICROSOFT_BLOCK),
        *_shifted_merges("layers.{s}.downsample."),
        rule("norm.{p}", "norm.{p}"),
        rule("head.fc.{p}", "head.{p}"),
    ),
    drop=(r".*attn_mask", r".*relative_position_index", r".*relative_coords_table"),
)

_TIMM_BLOCK = (
    "norm1.{p}", "norm2.{p}", "attn.qkv.{p}", "attn.proj.{p}", "attn.q_norm.{p}", "attn.k_norm.{p}", "ls1.gamma",
    "ls2.gamma", "mlp.fc1.{p}", "mlp.fc2.{p}",
)  # fmt: skip

DINOV2 = Format(
    "facebookresearch DINOv2",
    ("blocks.{i}.ls1.gamma", "mask_token", "patch_embed.proj.weight"),
    (
        *(rule(k, k) for k in ("cls_token", "pos_embed", "mask_token", "patch_embed.proj.{p}", "norm.{p}", "head.{p}")),
        rule("reg_token", "register_tokens"),
        rule("reg_token", "reg_token"),  # timm's, whose keys are otherwise the same
        *(rule(f"blocks.{{i}}.{k}", f"blocks.{{i}}.{k}", swiglu=False if "mlp" in k else None) for k in _TIMM_BLOCK),
        rule("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.w12.{p}", swiglu=True),
        rule("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.w3.{p}", swiglu=True),
    ),
    extra=(r"(dino_head|ibot_head)\..*", r"mask_token"),
)

_HIERA_BLOCK = "@encoder.layers.{i}."
HIERA = Format(
    "transformers Hiera",
    ("@encoder.stages.{i}.layers.{j}.layernorm_before.weight", "@embeddings.patch_embeddings.projection.weight"),
    (
        rule("pos_embed", "@embeddings.position_embeddings"),
        rule("patch_embed.proj.{p}", "@embeddings.patch_embeddings.projection.{p}"),
        *(
            rule(f"blocks.{{i}}.{ours}.{{p}}", f"{_HIERA_BLOCK}{theirs}.{{p}}")
            for ours, theirs in {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                **{k: k for k in ("attn.qkv", "attn.proj", "proj", "mlp.fc1", "mlp.fc2")},
            }.items()
        ),
        rule("head.norm.{p}", "@pooler.layernorm.{p}"),
        rule("head.fc.{p}", "classifier.{p}"),
    ),
    ("hiera.", ""),
    stages=("@encoder.stages.{i}.layers.{j}.", _HIERA_BLOCK),
)

_AIMV2_LAYER = "encoder.layers.{i}."
AIMV2 = Format(
    "transformers AIMv2",
    (_AIMV2_LAYER + "ffn.gate_proj.weight", "embeddings.rms_norm.weight"),
    (
        rule("pos_embed", "embeddings.position_embedding.weight", TABLE_TO_TOKENS),
        rule("patch_embed.proj.{p}", "embeddings.patch_embed.{p}"),
        rule("patch_embed.norm.weight", "embeddings.rms_norm.weight"),
        rule("blocks.{i}.norm1.weight", _AIMV2_LAYER + "rms_norm1.weight"),
        rule("blocks.{i}.norm2.weight", _AIMV2_LAYER + "rms_norm2.weight"),
        rule("blocks.{i}.attn.qkv.weight", " ".join(f"{_AIMV2_LAYER}attention.{n}_proj.weight" for n in "qkv")),
        rule("blocks.{i}.attn.proj.weight", _AIMV2_LAYER + "attention.out_proj.weight"),
        rule("blocks.{i}.mlp.fc1.weight", f"{_AIMV2_LAYER}ffn.gate_proj.weight {_AIMV2_LAYER}ffn.up_proj.weight"),
        rule("blocks.{i}.mlp.fc2.weight", _AIMV2_LAYER + "ffn.down_proj.weight"),
        rule("norm.weight", "rms_norm.weight"),
    ),
)
TIMM_AIMV2 = Format(
    "timm AIMv2",
    ("patch_embed.norm.weight", "blocks.{i}.mlp.fc1_g.weight"),
    (
        rule("blocks.{i}.mlp.fc1.weight", "blocks.{i}.mlp.fc1_g.weight blocks.{i}.mlp.fc1_x.weight"),
        rule("{r}", "{r}"),
    ),
)

TIMM_NAFLEX = Format(
    "timm NaFlex",
    ("embeds.pos_embed", "embeds.proj.weight"),
    (
        rule("patch_embed.proj.weight", "embeds.proj.weight", PATCHES),
        rule("patch_embed.proj.bias", "embeds.proj.bias"),
        rule("pos_embed", "embeds.pos_embed", SQUARE_MAP),
        rule("{r}", "{r}"),
    ),
)

#: pyvit's own layout, which is timm's; DINO and MAE of facebookresearch share it.
NATIVE = Format(
    "timm",
    (),
    (),
    drop=(r".*attn_mask", r".*relative_position_index", r".*relative_coords_table"),
    extra=(r"decoder_.*", r"mask_token", r"(patch_)?head\.(mlp|last_layer)\..*", r"projection\..*"),
)

#: In the order they are tried.
FORMATS: tuple[Format, ...] = (
    *(_hf_swin(1, new) for new in (True, False)),
    _hf_swin(2),
    *(_hf_dinov2(new) for new in (True, False)),
    *(_hf_vit(new) for new in (True, False)),
    _hf_clip(True, naflex=True),
    *(_hf_clip(siglip) for siglip in (True, False)),
    _openai_clip_resnet(),
    _open_clip_timm(),
    _openai_clip("", "OpenAI CLIP"),
    _openai_clip("text.", "open_clip"),
    _torchvision_vit("mlp.0", "mlp.3", "torchvision ViT"),
    _torchvision_vit("mlp.linear_1", "mlp.linear_2", "torchvision<0.12 ViT"),
    *(_torchvision_swin(version) for version in (1, 2)),
    VITDET,
    MICROSOFT_SWIN,
    _sam(
        "transformers SAM",
        "vision_encoder.",
        "layers",
        "patch_embed.projection",
        "layer_norm",
        ("conv1", "layer_norm1", "conv2", "layer_norm2"),
        (r"(prompt_encoder|mask_decoder|shared_image_embedding)\..*",),
    ),
    _sam(
        "facebookresearch SAM",
        "image_encoder.",
        "blocks",
        "patch_embed.proj",
        "norm",
        ("0", "1", "2", "3"),
        (r"(prompt_encoder|mask_decoder)\..*", r"pixel_(mean|std)"),
    ),
    _sam2(
        "transformers SAM 2",
        "@backbone.",
        "@neck.convs.{j}",
        _SAM2_NAMES,
        ("vision_encoder.", ""),
        r"(?!vision_encoder\.|backbone\.|neck\.).*",
    ),
    _sam2("transformers SAM 2 encoder", "", "neck.convs.{j}", _SAM2_NAMES, ("",)),
    _sam2(
        "facebookresearch SAM 2",
        "image_encoder.trunk.",
        "image_encoder.neck.convs.{j}.conv",
        {"mlp.fc1": "mlp.layers.0", "mlp.fc2": "mlp.layers.1", "patch_embed": "proj"},
        ("",),
        r"(?!image_encoder\.).*",
    ),
    HIERA,
    AIMV2,
    TIMM_AIMV2,
    TIMM_NAFLEX,
    DINOV3,
    _timm_eva("timm DINOv3", "blocks.{i}.gamma_1", "reg_token"),
    DINOV2,
    _timm_eva("timm EVA-02", "blocks.{i}.attn.q_proj.weight", "blocks.{i}.norm1.weight", split_qkv=True),
    _timm_eva("timm EVA", "blocks.{i}.attn.q_bias", "blocks.{i}.norm1.weight", split_glu=False),
    _timm_eva("timm PE", "blocks.{i}.gamma_1", "norm_pre.weight", split_glu=False),
    NATIVE,
)
