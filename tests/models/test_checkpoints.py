"""load_checkpoint: every layout, both ways, with recorded key lists for the libraries that need not be installed."""

import argparse

import pytest
import torch

import pyvit
from pyvit.models.checkpoints import CheckpointError, from_native, load_checkpoint, recognise, to_native
from pyvit.models.infer import model_from_checkpoint

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {
    "img_size": 64,
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 8),
    "window_size": 2,
    "num_classes": 5,
}
CLIP = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "width": 32,
    "depth": 2,
    "num_heads": 2,
    "vocab_size": 20,
    "context_length": 8,
}
CLIP |= {"text_width": 24, "text_depth": 1, "text_heads": 2}
SIGLIP = {
    "img_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "vocab_size": 20,
    "context_length": 8,
}


def vit(**more):
    return pyvit.create_model("vit_tiny_patch16_224", **{**VIT, **more})


def swin(version=1, **more):
    return pyvit.create_model("swin_tiny_patch4_window7_224", **{**SWIN, "version": version, **more})


def dinov2(**more):
    return vit(num_classes=0, mask_token=True, init_values=0.1, **more)


MODELS = {
    "transformers ViT": vit,
    "transformers<5 ViT": vit,
    "transformers DINOv2": dinov2,
    "transformers<5 DINOv2": lambda: dinov2(activation="swiglu", reg_tokens=4),
    "transformers Swin": swin,
    "transformers<5 Swin": swin,
    "transformers SwinV2": lambda: swin(2),
    "transformers CLIP": lambda: pyvit.create_model("clip_vit_base_patch32_224", **CLIP),
    "transformers SigLIP": lambda: pyvit.create_model("siglip_vit_base_patch16_224", **SIGLIP),
    "OpenAI CLIP": lambda: pyvit.create_model("clip_vit_base_patch32_224", **CLIP),
    "open_clip": lambda: pyvit.create_model("clip_vit_base_patch32_224", **CLIP),
    "torchvision ViT": vit,
    "torchvision<0.12 ViT": vit,
    "torchvision Swin": swin,
    "torchvision SwinV2": lambda: swin(2),
    "Microsoft Swin": swin,
    "facebookresearch DINOv2": lambda: dinov2(reg_tokens=4),
    "timm": vit,
}


@pytest.mark.parametrize("layout", MODELS)
def test_round_trip(layout):
    source, target = MODELS[layout](), MODELS[layout]()
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn_like(p))
    foreign = from_native(source.state_dict(), layout)
    assert recognise(foreign).name == layout
    report = load_checkpoint(target, foreign)
    assert not report.missing
    assert not report.unexpected
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


# Keys with shapes of one block (and of everything outside the blocks) as the libraries write them.
RECORDED = {
    "torchvision ViT": (
        vit,
        {
            "class_token": (1, 1, 32),
            "conv_proj.weight": (32, 3, 8, 8),
            "conv_proj.bias": (32,),
            "encoder.pos_embedding": (1, 17, 32),
            "encoder.layers.encoder_layer_{i}.ln_1.weight": (32,),
            "encoder.layers.encoder_layer_{i}.ln_1.bias": (32,),
            "encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight": (96, 32),
            "encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias": (96,),
            "encoder.layers.encoder_layer_{i}.self_attention.out_proj.weight": (32, 32),
            "encoder.layers.encoder_layer_{i}.self_attention.out_proj.bias": (32,),
            "encoder.layers.encoder_layer_{i}.ln_2.weight": (32,),
            "encoder.layers.encoder_layer_{i}.ln_2.bias": (32,),
            "encoder.layers.encoder_layer_{i}.mlp.0.weight": (128, 32),
            "encoder.layers.encoder_layer_{i}.mlp.0.bias": (128,),
            "encoder.layers.encoder_layer_{i}.mlp.3.weight": (32, 128),
            "encoder.layers.encoder_layer_{i}.mlp.3.bias": (32,),
            "encoder.ln.weight": (32,),
            "encoder.ln.bias": (32,),
            "heads.head.weight": (5, 32),
            "heads.head.bias": (5,),
        },
    ),
    "transformers<5 ViT": (
        vit,
        {
            "vit.embeddings.cls_token": (1, 1, 32),
            "vit.embeddings.position_embeddings": (1, 17, 32),
            "vit.embeddings.patch_embeddings.projection.weight": (32, 3, 8, 8),
            "vit.embeddings.patch_embeddings.projection.bias": (32,),
            **{
                f"vit.encoder.layer.{{i}}.attention.attention.{n}.{p}": (32, 32) if p == "weight" else (32,)
                for n in ("query", "key", "value")
                for p in ("weight", "bias")
            },
            "vit.encoder.layer.{i}.attention.output.dense.weight": (32, 32),
            "vit.encoder.layer.{i}.attention.output.dense.bias": (32,),
            "vit.encoder.layer.{i}.intermediate.dense.weight": (128, 32),
            "vit.encoder.layer.{i}.intermediate.dense.bias": (128,),
            "vit.encoder.layer.{i}.output.dense.weight": (32, 128),
            "vit.encoder.layer.{i}.output.dense.bias": (32,),
            "vit.encoder.layer.{i}.layernorm_before.weight": (32,),
            "vit.encoder.layer.{i}.layernorm_before.bias": (32,),
            "vit.encoder.layer.{i}.layernorm_after.weight": (32,),
            "vit.encoder.layer.{i}.layernorm_after.bias": (32,),
            "vit.layernorm.weight": (32,),
            "vit.layernorm.bias": (32,),
            "classifier.weight": (5, 32),
            "classifier.bias": (5,),
        },
    ),
    "OpenAI CLIP": (
        MODELS["OpenAI CLIP"],
        {
            "positional_embedding": (8, 24),
            "text_projection": (24, 16),
            "logit_scale": (),
            "input_resolution": (),
            "context_length": (),
            "vocab_size": (),
            "visual.class_embedding": (32,),
            "visual.positional_embedding": (17, 32),
            "visual.proj": (32, 16),
            "visual.conv1.weight": (32, 3, 8, 8),
            "visual.ln_pre.weight": (32,),
            "visual.ln_pre.bias": (32,),
            "visual.ln_post.weight": (32,),
            "visual.ln_post.bias": (32,),
            "token_embedding.weight": (20, 24),
            "ln_final.weight": (24,),
            "ln_final.bias": (24,),
            **{
                f"{tower}.resblocks.{block}.{key}": shape
                for tower, w, block in (("visual.transformer", 32, "{i}"), ("transformer", 24, "0"))
                for key, shape in {
                    "attn.in_proj_weight": (3 * w, w),
                    "attn.in_proj_bias": (3 * w,),
                    "attn.out_proj.weight": (w, w),
                    "attn.out_proj.bias": (w,),
                    "ln_1.weight": (w,),
                    "ln_1.bias": (w,),
                    "mlp.c_fc.weight": (4 * w, w),
                    "mlp.c_fc.bias": (4 * w,),
                    "mlp.c_proj.weight": (w, 4 * w),
                    "mlp.c_proj.bias": (w,),
                    "ln_2.weight": (w,),
                    "ln_2.bias": (w,),
                }.items()
            },
        },
    ),
}


@pytest.mark.parametrize("layout", RECORDED)
def test_recorded_keys(layout):
    make, keys = RECORDED[layout]
    state = {
        k.replace("{i}", str(i)): torch.randn(shape) for k, shape in keys.items() for i in range(2 if "{i}" in k else 1)
    }
    model = make()
    report = load_checkpoint(model, state)
    assert report.format == layout
    assert not report.missing
    assert len(report.loaded) == len(model.state_dict())


def test_torchvision_swin_keys():
    state = from_native(swin().state_dict(), "torchvision Swin")
    assert {
        "features.0.0.weight",
        "features.0.2.bias",
        "features.1.0.attn.qkv.weight",
        "features.2.reduction.weight",
    } <= set(state)
    assert {
        "features.5.1.mlp.3.bias",
        "features.6.norm.weight",
        "features.7.0.attn.relative_position_bias_table",
        "head.weight",
    } <= set(state)
    state["features.1.0.attn.relative_position_index"] = torch.zeros(16, dtype=torch.long)
    report = load_checkpoint(swin(), state)
    assert report.unused == ["features.1.0.attn.relative_position_index"]


def test_microsoft_swin_keys():
    state = from_native(swin().state_dict(), "Microsoft Swin")
    assert "layers.0.downsample.reduction.weight" in state
    assert "layers.3.downsample.reduction.weight" not in state
    assert "head.weight" in state
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    assert len(load_checkpoint(swin(), {"model": state, "epoch": 3}).unused) == 2


def test_chunked_dinov2_in_wrappers(tmp_path):
    model = dinov2(reg_tokens=4)
    state = from_native(model.state_dict(), "facebookresearch DINOv2")
    chunked = {("blocks." + k.split(".")[1] + k[6:] if k.startswith("blocks") else k): v for k, v in state.items()}
    path = tmp_path / "checkpoint.pth"
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in chunked.items()} | heads}, path)
    report = load_checkpoint(dinov2(reg_tokens=4), path)
    assert report.unused == ["dino_head.mlp.0.weight"]
    assert not report.missing


def test_gated_mlps_are_written_under_their_own_names():
    state = dinov2(activation="swiglu").state_dict()
    assert "encoder.layer.0.mlp.weights_in.weight" in {
        k.removeprefix("dinov2.") for k in from_native(state, "transformers<5 DINOv2")
    }
    assert "dinov2.encoder.layer.1.mlp.gate_proj.bias" in from_native(state, "transformers DINOv2")
    written = from_native(state, "facebookresearch DINOv2")
    assert "blocks.0.mlp.w12.weight" in written
    assert not load_checkpoint(dinov2(activation="swiglu"), written).missing


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = vit(), vit()
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint(other, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_positions_and_windows_are_resampled():
    report = load_checkpoint(vit(img_size=48), vit().state_dict())
    assert report.adapted == ["pos_embed 4x4 -> 6x6"]
    report = load_checkpoint(swin(window_size=4), swin().state_dict())
    assert len(report.adapted) == 4  # the last stage's map is one window of 2 in both
    assert "3x3 -> 7x7" in report.adapted[0]


def test_class_position_moves_into_the_token():
    source, target = vit(), vit(no_embed_class=True)
    load_checkpoint(target, source.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(source.eval().forward_features(images), target.eval().forward_features(images), atol=1e-6)


def test_what_does_not_fit_is_reported_and_nothing_is_loaded():
    state = vit().state_dict()
    state["surprise"] = torch.zeros(3)
    del state["norm.bias"]
    model = vit(num_classes=9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, state)
    report = caught.value.report
    assert report.missing == ["norm.bias"]
    assert report.unexpected == ["surprise"]
    assert report.mismatched == ["head.weight (5, 32) for (9, 32)", "head.bias (5,) for (9,)"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    report = load_checkpoint(model, state, strict=False)
    assert "norm.bias" in str(report)
    assert torch.equal(model.cls_token, state["cls_token"])
    del state["surprise"]
    load_checkpoint(model, state, allow=(r"head\..*", r"norm\.bias"))


def test_mae_encoder_loads_into_a_vit():
    mae = pyvit.create_model(
        "mae_vit_base_patch16_224",
        **{**VIT, "num_classes": 0},
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    report = load_checkpoint(vit(num_classes=0), {"model": mae.state_dict()})
    assert all(k.startswith(("decoder", "mask_token")) for k in report.unused)
    assert not report.missing


def test_create_model_with_checkpoint():
    state = vit().state_dict()
    model = pyvit.create_model("vit_tiny_patch16_224", **VIT, checkpoint=state)
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    with pytest.warns(UserWarning, match=r"mismatched.*head\.weight"):
        model = pyvit.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 9}, checkpoint=state)
    assert not model.head.weight.any()
    settings = {k: v for k, v in VIT.items() if k != "num_classes"}
    with pytest.raises(CheckpointError):
        pyvit.create_model("vit_tiny_patch16_224", **settings, checkpoint=state)


def test_unknown_key_of_a_layout_is_reported():
    state = from_native(vit().state_dict(), "torchvision ViT")
    state["encoder.layers.encoder_layer_0.extra"] = torch.zeros(1)
    _, unknown, _ = to_native(state, recognise(state))
    assert unknown == ["encoder.layers.encoder_layer_0.extra"]


def test_empty_source_is_refused():
    with pytest.raises(ValueError, match="no tensors in source"):
        load_checkpoint(vit(), {"epoch": 3})
    with pytest.raises(ValueError, match="format must be one of"):
        load_checkpoint(vit(), vit().state_dict(), name="keras")


@pytest.mark.parametrize("layout", [k for k in MODELS if "V2" not in k])
def test_settings_are_inferred_from_shapes(layout):
    source = MODELS[layout]().eval()
    heads = {"num_heads": [1, 2, 4, 8] if "Swin" in layout else 2}
    if "CLIP" in layout or layout == "open_clip":
        heads["text_heads"] = 2
    model, report = model_from_checkpoint(from_native(source.state_dict(), layout), **heads)
    assert not report.missing
    assert not report.adapted
    inputs = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in source.example_inputs(2))
    for a, b in zip(flat(source(*inputs)), flat(model.eval()(*inputs)), strict=True):
        assert torch.equal(a, b)


def test_a_bag_of_words_is_inferred():
    source = pyvit.create_model("clip_vit_base_patch32_224", **CLIP, text="cbow").eval()
    model, report = model_from_checkpoint(source.state_dict(), num_heads=2)
    assert not report.missing
    images, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 20, (2, 5))
    for a, b in zip(flat(source(images, ids)), flat(model.eval()(images, ids)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [None, (3, 3)])
def test_swin_v2s_windows_are_inferred_from_buffers(trained):
    sizes = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "num_classes": 5,
    }
    source = pyvit.create_model("swinv2_tiny_window8_256", **sizes, pretrained_window_sizes=trained).eval()
    state = source.state_dict()
    with pytest.raises(ValueError, match="give window_size"):
        model_from_checkpoint(state)
    for name, module in source.named_modules():
        if hasattr(module, "coords"):  # as Microsoft's and torchvision's checkpoints hold it
            wh, ww = module.window_size
            state[name + ".relative_coords_table"] = module.coords.view(1, 2 * wh - 1, 2 * ww - 1, 2)
    model, report = model_from_checkpoint(state)
    assert not report.missing
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.eval()(images), source(images), atol=1e-6)


def flat(out):
    return [t for t in out if t is not None] if isinstance(out, tuple) else [out]


def test_dinov2_and_mae_are_inferred():
    mae = pyvit.create_model("mae_vit_base_patch16_224", **{**VIT, "num_classes": 0})
    for source in (dinov2(activation="swiglu", reg_tokens=4, mlp_ratio=3.0), mae):
        model, report = model_from_checkpoint(source.state_dict(), num_heads=2)
        assert type(model) is type(source)
        assert not report.missing


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="not a ViT, Swin or CLIP"):
        model_from_checkpoint({"layer1.0.conv1.weight": torch.zeros(3, 3, 1, 1)})


def test_training_scripts_checkpoints(tmp_path):
    """As DINO saves them: both networks, wrapped, beside arguments and the optimizer; the teacher is the one to
    load."""
    student, teacher = vit(num_classes=0), vit(num_classes=0)
    head = {"head.mlp.0.weight": torch.zeros(3, 3), "head.last_layer.weight_g": torch.zeros(3, 1)}
    saved = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()}
        | {f"module.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()} | head,
        "optimizer": {"state": {0: {"step": 3}}},
        "args": argparse.Namespace(lr=1.0),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    model = vit(num_classes=0)
    assert load_checkpoint(model, tmp_path / "checkpoint.pth").unused == list(head)
    assert torch.equal(model.pos_embed, teacher.pos_embed)
    assert not torch.equal(model.pos_embed, student.pos_embed)


def test_own_checkpoints_of_nested_models():
    """ "encoder.", "teacher." and "backbone." are wrappers' prefixes for a ViT and names of its own for the models
    around it."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for name, more in {
        "dino_vit_tiny_patch16_224": {"prototypes": 16, "head_hidden": 16, "bottleneck": 8},
        "simclr_vit_small_patch16_224": {},
    }.items():
        source, target = (pyvit.create_model(name, **small, **more) for _ in range(2))
        load_checkpoint(target, source.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
        )
        backbone = vit(num_classes=0, depth=1)
        load_checkpoint(backbone, source.state_dict())
        wanted = source.teacher.backbone if name.startswith("dino") else source.encoder
        assert torch.equal(backbone.pos_embed, wanted.pos_embed)


def test_a_tensor_beside_the_wrapped_weights():
    model = vit()
    assert not load_checkpoint(model, {"model": vit().state_dict(), "scale": torch.tensor(3.0)}).unexpected


def test_torchscript_archive(tmp_path):
    source, target = (torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2))
    torch.jit.script(source).save(tmp_path / "archive.pt")
    load_checkpoint(target, tmp_path / "archive.pt")
    assert torch.equal(source[0].weight, target[0].weight)


@pytest.mark.parametrize("name", ["junk.pth", "junk.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither pickle nor header")
    with pytest.raises(ValueError, match=rf"{name} is no (file of torch.save|safetensors file)"):
        load_checkpoint(vit(), tmp_path / name)


def test_a_whole_module_is_refused_with_its_name(tmp_path):
    torch.save(vit(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"holds objects besides tensors and plain values.*VisionTransformer"):
        load_checkpoint(vit(), tmp_path / "model.pth")


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        load_checkpoint(3, vit().state_dict())
    with pytest.raises(CheckpointError, match=r"cls_token torch.int32 for torch.float32"):
        load_checkpoint(vit(), {k: v.int() for k, v in vit().state_dict().items()})
    twice = vit().state_dict()
    with pytest.raises(ValueError, match=r"with and without the prefix 'module.': module.cls_token"):
        load_checkpoint(vit(), {**twice, "module.cls_token": twice["cls_token"]})


@pytest.mark.parametrize(("settings", "mark"), [({"dist_token": True}, "deit."), ({}, "vit.")])
def test_bases_are_written_by_what_the_model_has(settings, mark):
    assert any(k.startswith(mark) for k in from_native(vit(num_classes=0, **settings).state_dict(), "transformers ViT"))
    written = from_native(dinov2(reg_tokens=4).state_dict(), "transformers DINOv2")
    assert any(k.startswith("dinov2_with_registers.") for k in written)
