"""Train a timm model: timm's training script in short, with pyvit's kernels in its model.

    python examples/timm_train.py                                    # handwritten digits, a minute on a CPU
    python examples/timm_train.py --data-dir DIR --model swin_tiny_patch4_window7_224 --img-size 224 --model-kwargs

DIR has folders ``train`` and ``val`` with a folder of images for each class. Lines that use pyvit are marked.
"""

import argparse
import copy
import logging
import time
from pathlib import Path

import sample_data
import timm
import torch
from speed import compare
from timm import utils
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import pyvit  # pyvit

_logger = logging.getLogger("train")

parser = argparse.ArgumentParser(description="Train a timm model with pyvit's kernels")
parser.add_argument("--data-dir", metavar="DIR", help="data set with train and val folders (default: digits)")
parser.add_argument("--model", default="vit_tiny_patch16_224", help="name of a timm model")
parser.add_argument("--model-kwargs", nargs="*", action=utils.ParseKwargs, metavar="KEY=VALUE",
                    default={"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
                    help="arguments of the model; the default is small, for digits")  # fmt: skip
parser.add_argument("--initial-checkpoint", default="", metavar="FILE", help="weights to start from")
parser.add_argument("--img-size", type=int, default=32)
parser.add_argument("-b", "--batch-size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--warmup-epochs", type=int, default=1)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--hflip", type=float, default=0.0, help="probability of a horizontal flip (not for digits)")
parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
parser.add_argument("-j", "--workers", type=int, default=0)
parser.add_argument("--log-interval", type=int, default=10)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--output", default="runs/timm", help="folder of the checkpoint")


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    utils.random_seed(args.seed)
    root = Path(args.data_dir) if args.data_dir else sample_data.digits()
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        parser.error(f"--data-dir must have folders train and val, got {root}")

    datasets = {split: create_dataset("", root=root, split=split) for split in ("train", "val")}
    num_classes = len(datasets["train"].reader.class_to_idx)
    model = timm.create_model(
        args.model, num_classes=num_classes, img_size=args.img_size, checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )  # fmt: skip
    model.to(args.device)
    report = pyvit.accelerate(model)  # pyvit: same weights, its kernels; restore(model) undoes it
    _logger.info(report)

    loader = {
        split: create_loader(
            dataset, (3, args.img_size, args.img_size), args.batch_size, is_training=split == "train",
            scale=(0.7, 1.0), hflip=args.hflip, num_workers=args.workers, use_prefetcher=False,
            persistent_workers=args.workers > 0,
        )
        for split, dataset in datasets.items()
    }  # fmt: skip
    optimizer = create_optimizer_v2(model, args.opt, args.lr, args.weight_decay)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, "cosine", args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=1e-6, step_on_epochs=False,
        updates_per_epoch=len(loader["train"]),
    )  # fmt: skip
    loss_fn = LabelSmoothingCrossEntropy(args.smoothing)
    for epoch in range(num_epochs):
        train_one_epoch(epoch, model, loader["train"], optimizer, scheduler, loss_fn, args)
        accuracy = validate(model, loader["val"], args)
        _logger.info(f"Epoch {epoch}: accuracy {accuracy:.2f} %")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    torch.save({"arch": args.model, "state_dict": model.state_dict()}, output / "last.pth.tar")

    # pyvit: the same model without its kernels, for comparison
    original = copy.deepcopy(model)
    pyvit.restore(original)
    batch = next(iter(loader["train"]))
    steps = [lambda m=m: train_step(m, *batch, loss_fn, args).backward() for m in (original, model)]
    compare(f"a training step of {len(batch[0])} images", *steps)


def train_step(model, input, target, loss_fn, args):
    input, target = input.to(args.device), target.to(args.device)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
        return loss_fn(model(input), target)


def train_one_epoch(epoch, model, loader, optimizer, scheduler, loss_fn, args):
    losses_m, begin = utils.AverageMeter(), time.time()
    model.train()
    for i, (input, target) in enumerate(loader):
        loss = train_step(model, input, target, loss_fn, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(epoch * len(loader) + i + 1)
        losses_m.update(loss.item(), input.size(0))
        if i % args.log_interval == 0 or i == len(loader) - 1:
            rate = losses_m.count / (time.time() - begin)
            _logger.info(
                f"Train: {epoch} [{i:>4d}/{len(loader)}]  Loss: {losses_m.val:.3f} ({losses_m.avg:.3f})  "
                f"LR: {optimizer.param_groups[0]['lr']:.2e}  {rate:.0f}/s"
            )


@torch.inference_mode()
def validate(model, loader, args):
    top1_m = utils.AverageMeter()
    model.eval()
    for input, target in loader:
        output = model(input.to(args.device))
        top1_m.update(utils.accuracy(output, target.to(args.device))[0].item(), input.size(0))
    return top1_m.avg


if __name__ == "__main__":
    main()
