"""Contrastive training of images and captions with open_clip's model, pyvit's kernels and its streaming loss.

    python examples/open_clip_train.py                               # drawn scenes, two minutes on a CPU
    python examples/open_clip_train.py --train-data captions.csv --model ViT-B-32

A CSV file has columns filepath (relative to the file) and title. ``search_photos.py`` searches with the trained model.
Lines that use pyvit are marked.
"""

import argparse
import copy
import csv
import json
import math
import time
from pathlib import Path

import open_clip
import sample_data
import torch
from PIL import Image
from safetensors.torch import save_file
from speed import compare
from torch.utils.data import DataLoader, Dataset

import pyvit  # pyvit
from pyvit.ops import info_nce  # pyvit

#: A small model for drawn scenes, as open_clip describes models.
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}


class CsvDataset(Dataset):
    def __init__(self, path, transforms, tokenize):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"filepath", "title"} <= rows[0].keys():
            raise SystemExit(f"open_clip_train: {path} must have columns filepath and title, and at least one row")
        self.images = [Path(path).parent / row["filepath"] for row in rows]
        self.captions = tokenize([row["title"] for row in rows])
        self.transforms = transforms

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transforms(Image.open(self.images[i])), self.captions[i]


def train_one_epoch(model, dataloader, loss, epoch, optimizer, scheduler, args):
    model.train()
    seen, began = 0, time.time()
    for i, (images, texts) in enumerate(dataloader):
        images, texts = images.to(args.device), texts.to(args.device)
        scheduler(epoch * len(dataloader) + i)
        optimizer.zero_grad()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "amp_bf16"):
            total_loss = loss(*model(images, texts))  # features (B, D) of images and texts, and the scale
        total_loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        seen += len(images)
        if i % args.log_every_n_steps == 0 or i == len(dataloader) - 1:
            print(
                f"Train Epoch: {epoch} [{seen:>5d}/{len(dataloader.dataset)}] Loss: {total_loss.item():.4f} "
                f"LR: {optimizer.param_groups[0]['lr']:.6f} Logit Scale: {model.logit_scale.exp().item():.2f} "
                f"{seen / (time.time() - began):.0f}/s",
                flush=True,
            )


@torch.inference_mode()
def evaluate(model, dataloader, args):
    """The share of captions whose image comes first, among the images of a batch."""
    model.eval()
    right = total = 0
    for images, texts in dataloader:
        a, b, _ = model(images.to(args.device), texts.to(args.device))
        right += ((b @ a.T).argmax(1) == torch.arange(len(a), device=a.device)).sum().item()
        total += len(a)
    return right / total


def cosine_lr(optimizer, base_lr, warmup, steps):
    def adjust(step):
        decay = 0.5 * (1 + math.cos(math.pi * max(step - warmup, 0) / max(steps - warmup, 1)))
        for group in optimizer.param_groups:
            group["lr"] = base_lr * min((step + 1) / warmup, decay)

    return adjust


def main():
    parser = argparse.ArgumentParser(description="Train an open_clip model with pyvit's kernels")
    parser.add_argument("--train-data", help="CSV file of images and captions (default: drawn scenes)")
    parser.add_argument("--val-data", help="CSV file of held-out ones")
    parser.add_argument("--model", help="name of an open_clip model (default: a small one, for drawn scenes)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wd", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "amp_bf16"))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--log-every-n-steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--logs", default="runs/open_clip", help="folder of the trained model")
    args = parser.parse_args()
    torch.manual_seed(0)
    train_data, val_data = args.train_data, args.val_data
    if train_data is None:
        scenes = sample_data.scenes()
        train_data, val_data = scenes / "train.csv", scenes / "val.csv"
    if not Path(train_data).is_file():
        parser.error(f"--train-data must be a CSV file, got {train_data}")
    config = open_clip.get_model_config(args.model) if args.model else SMALL
    if config is None:
        parser.error(f"--model must be a model of open_clip, got {args.model}")

    out = Path(args.logs)
    out.mkdir(parents=True, exist_ok=True)
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}, indent=2))
    name = f"local-dir:{out}"  # by this name open_clip finds the model, now and after training
    model, preprocess_train, preprocess_val = open_clip.create_model_and_transforms(
        name, load_weights=False, aug_cfg={"scale": (0.9, 1.0)}, device=args.device
    )
    print(pyvit.accelerate(model))  # pyvit: same weights, its kernels
    loss = info_nce  # pyvit: in place of open_clip.ClipLoss(); never stores the matrix of similarities

    tokenize = open_clip.get_tokenizer(name)
    dataset = CsvDataset(train_data, preprocess_train, tokenize)
    dataloader = DataLoader(dataset, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    no_decay = [p for n, p in model.named_parameters() if p.ndim < 2 or "ln" in n]
    decay = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "ln" in n)]
    groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": args.wd}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    scheduler = cosine_lr(optimizer, args.lr, args.warmup, args.epochs * len(dataloader))
    for epoch in range(args.epochs):
        train_one_epoch(model, dataloader, loss, epoch, optimizer, scheduler, args)
        if val_data:
            held_out = DataLoader(CsvDataset(val_data, preprocess_val, tokenize), args.batch_size)
            print(f"Eval Epoch: {epoch} text_to_image_R@1: {evaluate(model, held_out, args):.4f}", flush=True)
    save_file(model.state_dict(), out / "open_clip_model.safetensors")
    print(f"wrote {out}")

    # pyvit: the same model without its kernels, and open_clip's loss, for comparison
    original, original_loss = copy.deepcopy(model), open_clip.ClipLoss()
    pyvit.restore(original)
    images, texts = (x.to(args.device) for x in next(iter(dataloader)))
    compare(
        f"a training step of {len(images)} pairs",
        lambda: original_loss(*original(images, texts)).backward(),
        lambda: loss(*model(images, texts)).backward(),
    )


if __name__ == "__main__":
    main()
