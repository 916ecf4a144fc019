"""DINO in one file (Caron et al., 2021): a plain training loop with pyvit's kernels and its streaming loss.

    python examples/dino_train.py                                    # handwritten digits, minutes on a CPU
    python examples/dino_train.py --data-path DIR --arch vit_small_patch16_224 --crop-sizes 224 96 --out-dim 65536

DIR has folders of images. Names follow the paper's repository. Lines that use pyvit are marked.
"""

import argparse
import copy
import math
import os
import time

import numpy as np
import sample_data
import timm
import torch
import torch.nn.functional as F
from speed import compare
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import pyvit  # pyvit
from pyvit.losses import DINOLoss  # pyvit


class DataAugmentationDINO:
    """Two global crops and several local ones."""

    def __init__(self, sizes, boundary, local_crops_number, photographs):
        end = [T.RandomHorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.2, 0.1)] if photographs else []
        end += [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
        self.global_crop = T.Compose([T.RandomResizedCrop(sizes[0], scale=(boundary, 1.0)), *end])
        self.local_crop = T.Compose([T.RandomResizedCrop(sizes[1], scale=(boundary / 2, boundary)), *end])
        self.local_crops_number = local_crops_number

    def __call__(self, image):
        crops = [self.global_crop(image) for _ in range(2)]
        return crops + [self.local_crop(image) for _ in range(self.local_crops_number)]


class DINOHead(nn.Module):
    """Features (B, in_dim) to normalised ones (B, bottleneck_dim), whose products with the last layer's weight are the
    scores. Batch norm keeps small networks from collapsing."""

    def __init__(self, in_dim, out_dim, hidden_dim, bottleneck_dim=64):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        self.last_layer = weight_norm(nn.Linear(bottleneck_dim, out_dim, bias=False))
        self.last_layer.parametrizations.weight.original0.data.fill_(1)
        self.last_layer.parametrizations.weight.original0.requires_grad = False

    def forward(self, x):
        return F.normalize(self.mlp(x), dim=-1)


class MultiCropWrapper(nn.Module):
    """A backbone and a head; one pass for each size of crops. -> features (crops, B, bottleneck)"""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops):
        groups = [crops[:2], crops[2:]] if len(crops) > 2 else [crops]
        outputs = torch.cat([self.backbone(torch.cat(group)) for group in groups])
        return self.head(outputs).unflatten(0, (len(crops), -1))


class OriginalDINOLoss(nn.Module):
    """The repository's loss, on scores (crops, B, out_dim), to compare with."""

    def __init__(self, out_dim):
        super().__init__()
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student, teacher, teacher_temp):
        teacher = F.softmax((teacher - self.center) / teacher_temp, dim=-1).detach()
        pairs = [
            -(q * F.log_softmax(v / 0.1, dim=-1)).sum(-1).mean()
            for i, q in enumerate(teacher) for j, v in enumerate(student) if i != j
        ]  # fmt: skip
        return sum(pairs) / len(pairs)


@torch.no_grad()
def knn_accuracy(backbone, dataset, device):
    """Share of up to 2000 images whose nearest neighbour, by features, is of the same class."""
    at = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:2000].tolist()
    loader = DataLoader(Subset(dataset, at), 256)
    features = torch.cat([F.normalize(backbone(images.to(device)), dim=-1) for images, _ in loader])
    labels = torch.tensor([dataset.targets[i] for i in at], device=device)
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
    return (labels[nearest] == labels).float().mean().item()


def cosine(start, end, step, steps):
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def main():
    parser = argparse.ArgumentParser(description="DINO with pyvit's kernels")
    parser.add_argument("--data-path", help="folder of images, in folders (default: digits)")
    parser.add_argument("--arch", help="a ViT of timm (default: a small one, for digits)")
    parser.add_argument("--crop-sizes", type=int, nargs=2, default=(32, 24), help="of global and local crops")
    parser.add_argument("--local-crops-number", type=int, default=0, help="8 in the paper; none for digits")
    parser.add_argument("--out-dim", type=int, default=512)
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--momentum-teacher", type=float, default=0.97)
    parser.add_argument("--teacher-temp", type=float, default=0.04)
    parser.add_argument("--global-crops-scale", type=float, default=0.6, help="least share of an image in global crops")
    parser.add_argument("--freeze-last-layer", type=int, default=1, help="epochs")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", default="runs/dino.pth", help="file of the teacher's backbone")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    root = args.data_path or sample_data.digits() / "train"
    if not os.path.isdir(root):
        parser.error(f"--data-path must be a folder, got {root}")

    small = {} if args.arch else {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    make = {"num_classes": 0, "global_pool": "avg", "img_size": args.crop_sizes[0], "dynamic_img_size": True, **small}
    backbone = timm.create_model(args.arch or "vit_tiny_patch16_224", drop_path_rate=0.1, **make)
    student = MultiCropWrapper(backbone, DINOHead(backbone.num_features, args.out_dim, args.hidden_dim)).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.backbone.eval()  # no stochastic depth
    print(pyvit.accelerate(student.backbone))  # pyvit: same weights, its kernels
    pyvit.accelerate(teacher.backbone)  # pyvit
    dino_loss = DINOLoss(args.out_dim).to(device)  # pyvit: never stores the scores (crops, B, out_dim)

    photographs = args.data_path is not None
    crops = args.crop_sizes, args.global_crops_scale, args.local_crops_number
    dataset = ImageFolder(root, DataAugmentationDINO(*crops, photographs))
    plain = T.Compose([T.Resize(args.crop_sizes[:1] * 2), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
    whole = ImageFolder(root, plain)
    print(f"k-NN before training: {knn_accuracy(teacher.backbone, whole, device):.3f}", flush=True)
    loader = DataLoader(dataset, args.batch_size, True, num_workers=args.workers, drop_last=True)
    regularized = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": regularized}, {"params": others, "weight_decay": 0.0}], lr=args.lr)

    def loss_of(crops):
        with torch.no_grad():
            targets = teacher(crops[:2])
        weights = {  # pyvit: features and prototypes in place of their products
            "student_prototypes": student.head.last_layer.weight, "teacher_prototypes": teacher.head.last_layer.weight,
        }  # fmt: skip
        return dino_loss(student(crops), targets, args.teacher_temp, **weights)

    steps = args.epochs * len(loader)
    for epoch in range(args.epochs):
        losses, began = [], time.perf_counter()
        for it, (crops, _) in enumerate(loader, epoch * len(loader)):
            warmup = min(1.0, (it + 1) / (0.1 * steps))
            for group in optimizer.param_groups:
                group["lr"] = warmup * cosine(args.lr, 1e-6, it, steps)
            loss = loss_of([crop.to(device) for crop in crops])
            if not math.isfinite(loss.item()):
                raise SystemExit(f"dino_train: the loss is {loss.item()}, stopping")
            optimizer.zero_grad()
            loss.backward()
            if epoch < args.freeze_last_layer:
                student.head.last_layer.zero_grad()
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            momentum = cosine(args.momentum_teacher, 1.0, it, steps)
            with torch.no_grad():
                for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
                    k.mul_(momentum).add_(q, alpha=1 - momentum)
            losses.append(loss.item())
        seconds, knn = time.perf_counter() - began, knn_accuracy(teacher.backbone, whole, device)
        line = f"Epoch: [{epoch}/{args.epochs}]  loss: {np.mean(losses):.4f}  k-NN: {knn:.3f}  {seconds:.0f} s"
        print(line, flush=True)
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    torch.save(teacher.backbone.state_dict(), args.output)

    # pyvit: the original models and loss, for comparison
    plain_student, plain_teacher, plain_loss = copy.deepcopy((student, teacher, OriginalDINOLoss(args.out_dim)))
    pyvit.restore(plain_student)
    pyvit.restore(plain_teacher)
    plain_loss.to(device).center.copy_(dino_loss.center)
    crops = [crop.to(device) for crop in next(iter(loader))[0]]

    def original():
        with torch.no_grad():
            targets = plain_teacher(crops[:2]) @ plain_teacher.head.last_layer.weight.T
        scores = plain_student(crops) @ plain_student.head.last_layer.weight.T
        return plain_loss(scores, targets, args.teacher_temp)

    losses = []
    for step in (original, lambda: loss_of(crops)):
        torch.manual_seed(0)  # of stochastic depth
        losses.append(step().item())
    print(f"loss of a batch: {losses[0]:.4f} without pyvit, {losses[1]:.4f} with")
    steps = (lambda: original().backward()), (lambda: loss_of(crops).backward())
    compare(f"a training step of {args.batch_size} images", *steps)


if __name__ == "__main__":
    main()
