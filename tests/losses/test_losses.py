"""The loss modules against the formulas of their papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pyvit.losses import (
    CLIPLoss,
    DINOLoss,
    IBOTLoss,
    KoLeoLoss,
    NTXentLoss,
    SigLIPLoss,
    TripletLoss,
    masked_pixel_loss,
    patchify,
    unpatchify,
)
from pyvit.ops import reference_losses


def test_clip():
    a, b = torch.randn(10, 4), torch.randn(10, 4)
    loss = CLIPLoss()
    logits = F.normalize(a) @ F.normalize(b).t() / 0.07
    want = (F.cross_entropy(logits, torch.arange(10)) + F.cross_entropy(logits.t(), torch.arange(10))) / 2
    torch.testing.assert_close(loss(a, b), want)
    loss.logit_scale.data.fill_(10.0)  # clamped at ln 100
    logits = logits * 0.07 * 100
    want = (F.cross_entropy(logits, torch.arange(10)) + F.cross_entropy(logits.t(), torch.arange(10))) / 2
    torch.testing.assert_close(loss(a, b), want)


def test_siglip():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    logits = F.normalize(a) @ F.normalize(b).t() * 10 - 10
    labels = 2 * torch.eye(6) - 1
    torch.testing.assert_close(SigLIPLoss()(a, b), -F.logsigmoid(labels * logits).sum() / 6)


def test_nt_xent_by_loops():
    z1, z2 = torch.randn(5, 3), torch.randn(5, 3)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    total = 0.0
    for i in range(10):
        scores = [float(z[i] @ z[k]) / 0.5 for k in range(10)]
        total += math.log(sum(math.exp(s) for k, s in enumerate(scores) if k != i)) - scores[(i + 5) % 10]
    assert float(NTXentLoss(0.5)(z1, z2)) == pytest.approx(total / 10, rel=1e-5)


def test_triplet_is_torchs():
    a, p, n = torch.randn(3, 20, 8)
    oracle = torch.nn.TripletMarginWithDistanceLoss(
        distance_function=lambda x, y: -F.cosine_similarity(x, y), margin=0.3
    )
    torch.testing.assert_close(TripletLoss(0.3)(a, p, n), oracle(a, p, n))


def test_dino_by_loops_and_center():
    """Two global and three local crops. The centre is the running mean of the teacher's scores, and is used before it
    is updated."""
    loss = DINOLoss(prototypes=12, momentum=0.9)
    loss.center.copy_(torch.randn(12))
    start = loss.center.clone()
    student, teacher = torch.randn(5, 7, 12), torch.randn(2, 7, 12)
    terms = [
        -(((teacher[t] - start) / 0.04).softmax(-1) * (student[s] / 0.1).log_softmax(-1)).sum(-1).mean()
        for t in range(2)
        for s in range(5)
        if s != t
    ]
    torch.testing.assert_close(loss(student, teacher, 0.04), torch.stack(terms).mean())
    torch.testing.assert_close(loss.center, start * 0.9 + teacher.mean((0, 1)) * 0.1)
    loss.eval()
    before = loss.center.clone()
    loss(student, teacher, 0.04)
    assert torch.equal(loss.center, before)


def test_dino_with_prototypes_is_dino_of_scores():
    student, teacher, weights = (
        torch.randn(4, 6, 5, requires_grad=True),
        torch.randn(2, 6, 5),
        torch.randn(30, 5, requires_grad=True),
    )
    for centering in ("centering", "sinkhorn_knopp"):
        fused, plain = DINOLoss(30, centering=centering), DINOLoss(30, centering=centering)
        x = fused(student, teacher, 0.07, student_prototypes=weights, teacher_prototypes=weights)
        y = plain(student @ weights.t(), teacher @ weights.detach().t(), 0.07)
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(
            torch.autograd.grad(x, (student, weights)), torch.autograd.grad(y, (student, weights))
        )
        torch.testing.assert_close(fused.center, plain.center)


def test_sinkhorn_teacher_is_the_assignment():
    student, teacher = torch.randn(2, 9, 14), torch.randn(2, 9, 14)
    q = reference_losses.sinkhorn_knopp(teacher.flatten(0, 1), 0.07, 3).view(2, 9, 14)
    terms = [-(q[t] * (student[1 - t] / 0.1).log_softmax(-1)).sum(-1).mean() for t in range(2)]
    got = DINOLoss(14, centering="sinkhorn_knopp")(student, teacher, 0.07)
    torch.testing.assert_close(got, torch.stack(terms).mean())


def test_ibot():
    student, teacher, weights = torch.randn(11, 8), torch.randn(11, 8), torch.rand(11)
    per_token = -((teacher / 0.05).softmax(-1) * (student / 0.1).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(IBOTLoss(8)(student, teacher, weights, 0.05), (per_token * weights).sum())
    nothing = IBOTLoss(8)(student[:0].requires_grad_(), teacher[:0], weights[:0], 0.05)
    assert nothing.item() == 0.0


def test_koleo_by_loops():
    x = torch.randn(6, 4)
    z = F.normalize(x, dim=1)
    want = sum(-math.log(min(float((z[i] - z[j]).norm()) for j in range(6) if j != i)) for i in range(6)) / 6
    assert float(KoLeoLoss()(x)) == pytest.approx(want, rel=1e-4)


def test_masked_pixels():
    images, predicted = torch.randn(2, 3, 8, 12), torch.randn(2, 6, 48)
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]])
    total = 0.0
    for b in range(2):
        for n in range(6):
            y, x = n // 3 * 4, n % 3 * 4
            pixels = images[b, :, y : y + 4, x : x + 4].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            total += float(mask[b, n]) * float((predicted[b, n] - target).square().mean())
    assert float(masked_pixel_loss(predicted, images, mask, 4)) == pytest.approx(total / 5, rel=1e-5)
    assert torch.equal(unpatchify(patchify(images, 4), 4, (2, 3)), images)
    with pytest.raises(ValueError, match="divide by 5"):
        patchify(images, 5)


def test_bad_settings():
    with pytest.raises(ValueError, match="centering must be"):
        DINOLoss(8, centering="none")
    with pytest.raises(ValueError, match="temperature must be positive"):
        NTXentLoss(0.0)
    with pytest.raises(ValueError, match="student must have at least 2 crops"):
        DINOLoss(8)(torch.randn(1, 2, 8), torch.randn(1, 2, 8), 0.1)


def test_a_scale_above_its_bound_is_clamped():
    """The parameter is clamped and keeps its gradient, as in the paper's training; SigLIP's is not bounded."""
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    loss = CLIPLoss(max_scale=50.0)
    loss.logit_scale.data.fill_(5.0)
    loss(a, b).backward()
    torch.testing.assert_close(loss.logit_scale.detach(), torch.tensor(math.log(50.0)))
    assert loss.logit_scale.grad.abs() > 0
    wide, logits = SigLIPLoss(), F.normalize(a) @ F.normalize(b).t() * 118.2 - 10
    wide.logit_scale.data.fill_(math.log(118.2))
    torch.testing.assert_close(wide(a, b), -F.logsigmoid((2 * torch.eye(6) - 1) * logits).sum() / 6)


@pytest.mark.parametrize("loss", [CLIPLoss(), SigLIPLoss(), NTXentLoss()], ids=lambda loss: type(loss).__name__)
def test_a_pair_alone_has_no_negatives(loss):
    with pytest.raises(
        ValueError,
        match=rf"{type(loss).__name__}: the batch must have at least 2 pairs over all ranks.*got 1 .*drop_last",
    ):
        loss(torch.randn(1, 4), torch.randn(1, 4))


def test_triplet_shapes():
    for shapes in ([(0, 4)] * 3, [(3, 4), (3, 4), (2, 4)], [(4,)] * 3):
        with pytest.raises(ValueError, match="TripletLoss: anchor, positive and negative must be of one shape"):
            TripletLoss()(*(torch.randn(shape) for shape in shapes))


def test_ibot_is_the_formula_of_the_papers_code():
    """Weights 1 / (masked patches of the image), summed over patches, averaged over all images of the batch, in
    float64."""
    torch.manual_seed(0)
    mask = torch.rand(6, 9) < torch.tensor([0.0, 0.5, 0.0, 0.9, 0.2, 0.0])[:, None]
    student, teacher = torch.randn(6, 9, 5, dtype=torch.float64), torch.randn(6, 9, 5, dtype=torch.float64)
    total = 0.0
    for image in range(6):
        for patch in range(9):
            if mask[image, patch]:
                target, scores = (teacher[image, patch] / 0.07).softmax(0), (student[image, patch] / 0.1).log_softmax(0)
                total -= float((target * scores).sum()) / int(mask[image].sum()) / 6
    weights = (mask / mask.sum(1, keepdim=True).clamp_min(1) / 6)[mask]
    got = IBOTLoss(5)(student[mask].float(), teacher[mask].float(), weights, 0.07)
    assert float(got) == pytest.approx(total, rel=1e-5)


def test_a_deferred_centre_waits():
    loss, first, second = DINOLoss(6), torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    loss.deferred = True
    for teacher in (first, second):
        loss(torch.randn(2, 3, 6), teacher, 0.1)
        assert not loss.center.any()
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.1 * torch.stack([first, second]).mean((0, 1, 2)))
    loss(torch.randn(2, 3, 6), first, 0.1)
    before = loss.center.clone()
    loss.update_center(keep=False)
    loss.update_center()
    assert torch.equal(loss.center, before)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_scales_and_momenta_have_ranges(bad):
    for make in (
        lambda: NTXentLoss(bad),
        lambda: CLIPLoss(init_scale=bad),
        lambda: CLIPLoss(max_scale=bad),
        lambda: SigLIPLoss(init_scale=bad),
        lambda: DINOLoss(8, student_temp=bad),
        lambda: IBOTLoss(8, student_temp=bad),
        lambda: DINOLoss(8)(torch.randn(2, 2, 8), torch.randn(2, 2, 8), bad),
    ):
        with pytest.raises(ValueError, match="must be positive and finite"):
            make()
    for make in (lambda: DINOLoss(8, momentum=bad or 2.0), lambda: TripletLoss(bad or -0.1), lambda: DINOLoss(1)):
        with pytest.raises(ValueError, match="must be"):
            make()
