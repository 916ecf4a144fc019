"""Train a Swin transformer with Lightning: a LightningModule whose network runs on pyvit's kernels.

    python examples/lightning_train.py                               # handwritten digits, a minute on a CPU
    python examples/lightning_train.py --data DIR --size tiny --image-size 224 --epochs 30

DIR has folders ``train`` and ``val`` with a folder of images for each class. Lines that use pyvit are marked.
"""

import argparse
import copy
from pathlib import Path

import lightning as L
import sample_data
import torch
import torch.nn.functional as F
from speed import compare
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.models.swin_transformer import SwinTransformer

import pyvit  # pyvit

#: Swin-T, and a small network for small images.
SIZES = {
    "tiny": {"patch_size": [4, 4], "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24],
             "window_size": [7, 7]},
    "pico": {"patch_size": [4, 4], "embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]},
}  # fmt: skip


class Classifier(L.LightningModule):
    def __init__(self, size: str, num_classes: int, lr: float = 1e-3, weight_decay: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        self.network = SwinTransformer(**SIZES[size], num_classes=num_classes)
        self.report = pyvit.accelerate(self.network)  # pyvit: same weights and checkpoints, its kernels

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, weight_decay=self.hparams.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Images(L.LightningDataModule):
    def __init__(self, root: Path, image_size: int, batch_size: int, workers: int):
        super().__init__()
        end = [T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)]
        crop = T.RandomResizedCrop(image_size, scale=(0.7, 1.0))
        self.train = ImageFolder(root / "train", T.Compose([crop, *end]))
        self.val = ImageFolder(root / "val", T.Compose([T.Resize((image_size, image_size)), *end]))
        self.options = {"batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0}

    def train_dataloader(self):
        return DataLoader(self.train, shuffle=True, drop_last=True, **self.options)

    def val_dataloader(self):
        return DataLoader(self.val, **self.options)


def main():
    parser = argparse.ArgumentParser(description="Train a Swin transformer with Lightning and pyvit's kernels")
    parser.add_argument("--data", help="folder with train and val (default: digits)")
    parser.add_argument("--size", default="pico", choices=SIZES)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precision", default="32-true", help="of Lightning's trainer, such as bf16-mixed")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", default="runs/lightning")
    args = parser.parse_args()
    L.seed_everything(0)

    root = Path(args.data) if args.data else sample_data.digits()
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        parser.error(f"--data must have folders train and val, got {root}")
    data = Images(root, args.image_size, args.batch_size, args.workers)
    model = Classifier(args.size, len(data.train.classes), args.lr)
    print(model.report)
    trainer = L.Trainer(
        max_epochs=args.epochs, precision=args.precision, default_root_dir=args.out, log_every_n_steps=5
    )
    trainer.fit(model, data)
    result = trainer.validate(model, data, verbose=False)[0]
    print(", ".join(f"{name} {value:.4f}" for name, value in result.items()))

    original = copy.deepcopy(model.network)
    pyvit.restore(original)  # pyvit: the same network without its kernels, for comparison
    images, labels = next(iter(data.train_dataloader()))
    steps = [lambda m=m: F.cross_entropy(m(images), labels).backward() for m in (original, model.network)]
    compare(f"a training step of {len(images)} images", *steps)


if __name__ == "__main__":
    main()
