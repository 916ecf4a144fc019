"""Layer-wise learning rates, freezing, new heads, checkpointing, stochastic depth, inspection."""

import pytest
import torch

import pyvit
from pyvit.models.finetune import freeze, param_groups
from pyvit.nn import DropPath, Packing

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}


def _vit(**more):
    model = pyvit.create_model("vit_tiny_patch16_224", **{**VIT, **more})
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_layer_decay(name):
    model = _vit() if name == "vit" else pyvit.create_model("swin_tiny_patch4_window7_224", **SWIN)
    groups = param_groups(model, 1e-3, 0.05, 0.5)
    found = {id(p): g for g in groups for p in g["params"]}
    assert len(found) == sum(1 for p in model.parameters() if p.requires_grad)
    head = model.head.weight if name == "vit" else model.head.fc.weight
    assert found[id(head)]["lr"] == 1e-3
    assert found[id(head)]["weight_decay"] == 0.05
    assert found[id(model.patch_embed.proj.weight)]["lr"] == pytest.approx(1e-3 * 0.5**4)
    norm = (model.blocks[1] if name == "vit" else model.layers[1].blocks[0]).norm1.weight
    assert found[id(norm)]["lr"] == pytest.approx(1e-3 * 0.5**2)
    assert found[id(norm)]["weight_decay"] == 0.0
    if name == "vit":
        assert found[id(model.pos_embed)]["weight_decay"] == 0.0


def test_freeze():
    model = _vit()
    freeze(model, 2)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith(("blocks.2", "norm", "head")) for n in trained)
    freeze(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match="layers must be in"):
        freeze(model, 9)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_reset_classifier(name):
    model = pyvit.create_model(name, **(VIT if "vit" in name else SWIN)).eval()
    images = torch.randn(2, 3, *([16, 16] if "vit" in name else [32, 32]))
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), features)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_grad_checkpointing_changes_nothing(name):
    model = pyvit.create_model(name, **(VIT if "vit" in name else SWIN), drop_path_rate=0.0)
    images, grads = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.forward_features(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("pos_embed", ["learn", "rope", "sincos", "none"])
def test_packed_equals_separate(pos_embed):
    model = _vit(pos_embed=pos_embed, reg_tokens=2, qk_norm=True, init_values=0.1).eval()
    batches = [torch.randn(2, 3, 16, 16), torch.randn(1, 3, 8, 24), torch.randn(3, 3, 4, 4)]
    for found, images in zip(model.forward_packed(batches), batches, strict=True):
        assert torch.allclose(found, model.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("form", ["sample", "batch"])
def test_drop_path_keeps_the_mean(form):
    torch.manual_seed(0)
    drop, x = DropPath(0.25, form).train(), torch.ones(8, 3)
    total = torch.stack([drop.residual(x, lambda y, _: 2 * y) for _ in range(400)]).mean()
    assert total == pytest.approx(3.0, abs=0.15)
    packing = Packing.of([2, 1, 4])
    y = drop.residual(torch.ones(7, 3), lambda t, _: t, packing)
    for part in y.split([2, 1, 4]):
        assert (part == part[0, 0]).all()
    assert torch.equal(drop.eval().residual(x, lambda t, _: t), 2 * x)


def test_attention_map_equals_softmax():
    model = _vit(reg_tokens=1).eval()
    images, seen = torch.randn(2, 3, 16, 16), []
    model.blocks[1].norm1.register_forward_hook(lambda *args: seen.append(args[2]))
    model(images)
    q, k, _ = model.blocks[1].attn.project(seen[0])
    expected = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 16**-0.5, -1)
    assert torch.allclose(model.attention_map(images, block=1, rows=[0, 3]), expected[:, :, [0, 3]], atol=1e-6)


def test_intermediate_layers():
    model = _vit(reg_tokens=1).eval()
    images = torch.randn(2, 3, 16, 24)
    maps = model.get_intermediate_layers(images, [0, -1], reshape=True, return_prefix_tokens=True)
    assert [p.shape for pair in maps for p in pair] == [(2, 32, 4, 6), (2, 2, 32)] * 2
    last = model.forward_features(images)
    assert torch.allclose(maps[1][0].flatten(2).transpose(1, 2), last[:, 2:])


def test_uint8_images_are_normalised_inside():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    inside, outside = _vit(mean=mean, std=std).eval(), _vit().eval()
    outside.load_state_dict(inside.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    images = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(inside(pixels), outside(images), atol=1e-4)


def test_mask_padding_ignores_what_lies_outside():
    model = pyvit.create_model("swin_tiny_patch4_window7_224", **SWIN, mask_padding=True).eval()
    padded = pyvit.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    padded.load_state_dict(model.state_dict())
    whole, odd = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 20, 28)
    assert torch.allclose(model(whole), padded(whole))
    assert not torch.allclose(model(odd), padded(odd))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="global_pool"):
        _vit(global_pool="max")
    with pytest.raises(ValueError, match="class_token"):
        _vit(class_token=False)
    with pytest.raises(ValueError, match="num_heads"):
        _vit(num_heads=5)
    with pytest.raises(ValueError, match="masks needs mask_token"):
        _vit().forward_features(torch.randn(1, 3, 16, 16), masks=torch.ones(1, 16, dtype=torch.bool))
