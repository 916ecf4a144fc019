"""Self-distillation and SimCLR models: their outputs for the losses, and that they can be trained."""

import pytest
import torch
import torch.nn.functional as F

import pyvit
from pyvit.losses import DINOLoss, IBOTLoss, KoLeoLoss, NTXentLoss
from pyvit.models.dino import DINOHead, block_masks

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = {"prototypes": 24, "head_hidden": 32, "bottleneck": 16}


def test_head_scores_are_features_times_prototypes():
    head = DINOHead(12, prototypes=7, hidden=16, bottleneck=5)
    x = torch.randn(3, 12)
    assert torch.allclose(head(x), head.features(x) @ head.prototypes.T, atol=1e-6)
    assert torch.allclose(head.prototypes.norm(dim=1), torch.ones(7))
    assert torch.allclose(head.features(x).norm(dim=1), torch.ones(3))
    trained = [n for n, p in head.named_parameters() if p.requires_grad]
    assert not any("original0" in n for n in trained)  # the length of a prototype stays 1
    assert any("original1" in n for n in trained)


def test_views_equal_separate_passes():
    model = pyvit.create_model("dino_vit_tiny_patch16_224", **VIT, **HEAD).eval()
    big, small = [torch.randn(3, 3, 32, 32) for _ in range(2)], [torch.randn(3, 3, 16, 16) for _ in range(4)]
    views = model(big, small)
    backbone, head = model.student["backbone"], model.head_of("student")
    for crop, found in zip([*big, *small], views.student, strict=True):
        assert torch.allclose(head.features(backbone.forward_features(crop)[:, 0]), found, atol=1e-5)
    assert views.teacher.shape == (2, 3, 16)
    assert torch.allclose(views.teacher, views.student[:2], atol=1e-5)  # a teacher starts as its student
    assert not views.teacher.requires_grad


def test_teacher_is_a_moving_average():
    model = pyvit.create_model("dino_vit_tiny_patch16_224", **VIT, **HEAD)
    before = [p.clone() for p in model.teacher.parameters()]
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(torch.randn_like(p))
    model.update_teacher(0.9)
    for old, student, teacher in zip(before, model.student.parameters(), model.teacher.parameters(), strict=True):
        assert torch.allclose(teacher, 0.9 * old + 0.1 * student, atol=1e-6)


def test_dinov2_trains_end_to_end():
    torch.manual_seed(0)
    settings = {
        **VIT,
        **HEAD,
        "masks": True,
        "separate_heads": True,
        "init_values": 1e-2,
        "drop_path_rate": 0.3,
        "drop_path_form": "batch",
    }
    model = pyvit.create_model("dinov2_vit_large_patch14_224", **settings)
    dino, ibot, koleo = DINOLoss(24), IBOTLoss(24, centering="sinkhorn_knopp"), KoLeoLoss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    big, small = [torch.randn(4, 3, 32, 32) for _ in range(2)], [torch.randn(4, 3, 16, 16) for _ in range(2)]
    masks = [torch.rand(4, 16) < 0.4 for _ in range(2)]
    losses = []
    for _ in range(4):
        views = model(big, small, masks)
        class_heads = {
            "student_prototypes": model.head_of("student").prototypes,
            "teacher_prototypes": model.head_of("teacher").prototypes,
        }
        patch_heads = {f"{side}_prototypes": model.head_of(side, True).prototypes for side in ("student", "teacher")}
        loss = dino(views.student, views.teacher, 0.04, **class_heads)
        loss = loss + ibot(views.student_patches, views.teacher_patches, views.weights, 0.04, **patch_heads)
        loss = loss + 0.1 * sum(koleo(c) for c in views.class_tokens)
        optimizer.zero_grad()
        loss.backward()
        unused = [n for n, p in model.student.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused
        optimizer.step()
        model.update_teacher(0.99)
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]


def test_masked_patches_are_weighted_per_image():
    settings = {**VIT, **HEAD, "masks": True}
    model = pyvit.create_model("ibot_vit_tiny_patch16_224", **settings)
    masks = [torch.zeros(2, 16, dtype=torch.bool) for _ in range(2)]
    masks[0][0, :3] = True
    masks[1][1, 5] = True
    views = model([torch.randn(2, 3, 32, 32) for _ in range(2)], masks=masks)
    assert torch.allclose(views.weights, torch.tensor([1 / 12, 1 / 12, 1 / 12, 1 / 4]))
    with pytest.raises(ValueError, match="masks must be given"):
        model([torch.randn(2, 3, 32, 32)])


def test_block_masks_hide_the_share_asked_for():
    generator = torch.Generator().manual_seed(0)
    masks = block_masks(64, (14, 14), (0.1, 0.5), 0.5, generator)
    share = masks.float().mean(1)
    hidden = share[share > 0]
    assert 20 <= len(hidden) <= 44
    assert hidden.max() <= 0.5
    full = block_masks(8, (6, 9), (0.4, 0.4), 1.0, generator).sum(1)
    assert ((full > 0.3 * 54) & (full <= 0.4 * 54)).all()


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
def test_simclr_trains(encoder):
    torch.manual_seed(0)
    small = {
        "vit_tiny_patch16_224": VIT,
        "swin_tiny_patch4_window7_224": {
            "img_size": 32,
            "embed_dim": 16,
            "depths": (1, 1),
            "num_heads": (2, 4),
            "window_size": 4,
        },
        "resnet18": {"small": True, "width": 8},
    }[encoder]
    model = pyvit.models.simclr.SimCLR(encoder, out_dim=16, **small)
    loss_of, optimizer = NTXentLoss(0.5), torch.optim.AdamW(model.parameters(), 3e-3)
    images = torch.randn(8, 3, 32, 32)
    losses = []
    for _ in range(6):
        loss = loss_of(*model(images + 0.1 * torch.randn_like(images), images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert F.normalize(model(images, images)[0], dim=-1).shape == (8, 16)


@pytest.mark.parametrize("text", ["transformer", "cbow"])
@pytest.mark.parametrize("tower", ["clip_vit_base_patch32_224", "clip_resnet50_224"])
def test_clip_towers(tower, text):
    settings = {
        "img_size": 64,
        "embed_dim": 16,
        "vocab_size": 30,
        "context_length": 8,
        "text_width": 16,
        "text_depth": 1,
        "text_heads": 2,
    }
    settings |= (
        {"layers": (1, 1, 1, 1), "width": 8, "num_heads": 4}
        if "resnet" in tower
        else {"width": 32, "depth": 1, "num_heads": 2}
    )
    model = pyvit.create_model(tower, **settings, text=text)
    images, words = torch.randn(3, 3, 64, 64), torch.randint(1, 30, (2, 8))
    logits = model.logits(images, words)
    assert logits.shape == (3, 2)
    logits.sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert torch.allclose(model.encode_image(images).norm(dim=1), torch.ones(3), atol=1e-5)


def test_registered_heads_are_those_of_the_papers_code():
    """DINOv2's vitl14.yaml; DINO's prototypes keep their length except for small models."""
    v2 = pyvit.create_model("dinov2_vit_large_patch14_224", **VIT, prototypes=24, head_hidden=16)
    widths = [v2.head_of("student", patches).prototypes.shape[1] for patches in (False, True)]
    assert widths == [384, 256]
    assert v2.student["backbone"].interpolation == {"antialias": False, "offset": 0.1}
    lengths = {"dinov2_vit_large_patch14_224": v2}
    for name in ("dino_vit_small_patch16_224", "dino_vit_base_patch16_224", "ibot_vit_large_patch16_224"):
        lengths[name] = pyvit.create_model(name, **VIT, **HEAD)
    trained = [
        m.head_of("student").last_layer.parametrizations.weight.original0.requires_grad for m in lengths.values()
    ]
    assert trained == [True, True, False, False]
