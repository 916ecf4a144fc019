"""Train an object detector: torchvision's FCOS on a Swin backbone that runs on pyvit's kernels.

    python examples/detection_train.py                               # drawn shapes, two minutes on a CPU
    python examples/detection_train.py --data-path DIR --size tiny --min-size 800 --weights swin_t.pth

DIR has folders ``train`` and ``val`` of images and COCO's annotations in ``train.json`` and ``val.json``. Images of any
size are served, also where windows do not divide the map. Lines that use pyvit are marked.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import sample_data
import torch
from PIL import Image
from speed import compare
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.transforms.functional import to_tensor

import pyvit  # pyvit

#: Swin-T, and a small network for drawn shapes.
SIZES = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": [7, 7]},
    "pico": {"embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": [7, 7]},
}


class SwinFPN(nn.Module):
    """Images (B, 3, H, W) to {"0": (B, out_channels, H/4, W/4), "1": ... H/8, ...}, as torchvision's detectors ask."""

    def __init__(self, size, out_channels):
        super().__init__()
        config = SIZES[size]
        self.body = SwinTransformer(patch_size=[4, 4], num_classes=1, **config)
        self.body.norm, self.body.head = nn.Identity(), nn.Identity()
        widths = [config["embed_dim"] << i for i in range(len(config["depths"]))]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.fpn = FeaturePyramidNetwork(widths, out_channels)
        self.out_channels = out_channels

    def forward(self, images):
        maps, x = {}, images
        for i, layer in enumerate(self.body.features):  # patches, stage, merging, stage, ...
            x = layer(x)  # (B, H, W, C)
            if i % 2 == 1:
                maps[str(i // 2)] = self.norms[i // 2](x).permute(0, 3, 1, 2)
        return self.fpn(maps)


class CocoBoxes(Dataset):
    """Images (3, H, W) in [0, 1] with boxes (n, 4), corners in pixels, and labels (n,)."""

    def __init__(self, root, split):
        with open(root / f"{split}.json") as file:
            coco = json.load(file)
        self.folder, self.images = root / split, coco["images"]
        self.categories = [c["id"] for c in coco["categories"]]
        self.boxes = {image["id"]: [] for image in self.images}
        for a in coco["annotations"]:
            self.boxes[a["image_id"]].append((*a["bbox"], self.categories.index(a["category_id"])))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = to_tensor(Image.open(self.folder / self.images[i]["file_name"]).convert("RGB"))
        rows = torch.tensor(self.boxes[self.images[i]["id"]], dtype=torch.float32).reshape(-1, 5)
        boxes = torch.cat((rows[:, :2], rows[:, :2] + rows[:, 2:4]), 1)
        return image, {"boxes": boxes, "labels": rows[:, 4].long()}


def collate(batch):
    return tuple(map(list, zip(*batch, strict=True)))


def move(images, targets, device):
    return [i.to(device) for i in images], [{k: v.to(device) for k, v in t.items()} for t in targets]


@torch.inference_mode()
def evaluate(model, loader, device):
    """The share of objects that a detection with the right label covers (IoU >= 0.5), among an image's ten best."""
    model.eval()
    found = total = 0
    for images, targets in loader:
        images, targets = move(images, targets, device)
        for out, target in zip(model(images), targets, strict=True):
            best = out["scores"].argsort(descending=True)[:10]
            hit = box_iou(target["boxes"], out["boxes"][best]) >= 0.5
            hit &= target["labels"][:, None] == out["labels"][best][None]
            found, total = found + hit.any(1).sum().item(), total + len(hit)
    return found / max(total, 1)


def main():
    parser = argparse.ArgumentParser(description="Train a detector with pyvit's kernels")
    parser.add_argument("--data-path", help="folder of images with COCO's annotations (default: drawn shapes)")
    parser.add_argument("--size", default="pico", choices=SIZES, help="of the backbone")
    parser.add_argument("--weights", help="file of the backbone's weights, such as torchvision's swin_t")
    parser.add_argument("--min-size", type=int, default=128, help="images' shorter side")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("-b", "--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--output", default="runs/detector.pth")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    root = Path(args.data_path) if args.data_path else sample_data.shapes()
    if not (root / "train.json").is_file() or not (root / "val.json").is_file():
        parser.error(f"--data-path must have train.json and val.json, got {root}")

    train, val = CocoBoxes(root, "train"), CocoBoxes(root, "val")
    backbone = SwinFPN(args.size, out_channels=64 if args.size == "pico" else 256)
    if args.weights:
        print(backbone.body.load_state_dict(torch.load(args.weights, weights_only=True), strict=False))
    levels = len(backbone.norms)
    anchors = AnchorGenerator(tuple((4 << (i + 1),) for i in range(levels)), ((1.0,),) * levels)
    model = FCOS(
        backbone, len(train.categories), anchor_generator=anchors, min_size=args.min_size, max_size=2 * args.min_size
    ).to(device)
    print(pyvit.accelerate(model))  # pyvit: same weights, its kernels

    options = {"batch_size": args.batch_size, "num_workers": args.workers, "collate_fn": collate}
    train_loader, val_loader = DataLoader(train, shuffle=True, drop_last=True, **options), DataLoader(val, **options)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(train_loader))
    for epoch in range(args.epochs):
        model.train()
        total, began = 0.0, time.perf_counter()
        for images, targets in train_loader:
            losses = model(*move(images, targets, device))
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.item()
        recall, seconds = evaluate(model, val_loader, device), time.perf_counter() - began
        print(f"Epoch: [{epoch}]  loss: {total / len(train_loader):.4f}  recall: {recall:.3f}  {seconds:.0f} s")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.output)

    original = copy.deepcopy(model)
    pyvit.restore(original)  # pyvit: the same model without its kernels, for comparison
    batch = move(*next(iter(train_loader)), device)
    for m in (original, model):
        m.train()
    steps = [lambda m=m: sum(m(*batch).values()).backward() for m in (original, model)]
    compare(f"a training step of {len(batch[0])} images", *steps)


if __name__ == "__main__":
    main()
