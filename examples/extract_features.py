"""Extract features of a folder of images with a timm model: one file of vectors, and the nearest images of each.

    python examples/extract_features.py                              # scikit-learn's two photographs, in pieces
    python examples/extract_features.py --data DIR --model vit_small_patch14_dinov2 --pretrained --amp

Writes ``--output``, a .safetensors file with "features" (N, D) and the paths in its metadata. Lines that use pyvit are
marked.
"""

import argparse
import copy
import json
from pathlib import Path

import sample_data
import timm
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from safetensors.torch import save_file
from speed import compare
from torch.utils.data import DataLoader, Dataset

import pyvit  # pyvit

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class Folder(Dataset):
    """(image, number) of every image below a folder; None in place of an image that cannot be read."""

    def __init__(self, root, transform):
        self.paths = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in ENDINGS)
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return self.transform(Image.open(self.paths[i]).convert("RGB")), i
        except (OSError, UnidentifiedImageError) as error:
            print(f"left out {self.paths[i]}: {error}")
            return None, i


def collate(items):
    items = [item for item in items if item[0] is not None]
    return torch.stack([image for image, _ in items]) if items else None, [i for _, i in items]


@torch.inference_mode()
def extract(model, loader, device, dtype):
    found, kept = [], []
    for images, numbers in loader:
        if images is not None:
            found.append(model(images.to(device, dtype)).float().cpu())
            kept += numbers
        print(f"\r{len(kept)} of {len(loader.dataset)} images", end="", flush=True)
    print()
    return torch.cat(found) if found else None, kept


def main():
    parser = argparse.ArgumentParser(description="Extract features with a timm model and pyvit's kernels")
    parser.add_argument("--data", help="folder of images (default: pieces of two photographs)")
    parser.add_argument("--model", default="vit_small_patch16_224", help="name of a timm model")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--checkpoint", default="", help="file of weights (default: random ones)")
    parser.add_argument("--img-size", type=int, help="default: the model's")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--amp", action="store_true", help="weights and images in bfloat16")
    parser.add_argument("--output", default="runs/features.safetensors")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    size = {} if args.img_size is None else {"img_size": args.img_size}
    model = timm.create_model(
        args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, num_classes=0, **size
    )
    dtype = torch.bfloat16 if args.amp else torch.float32
    model = model.to(device, dtype).eval()
    original = copy.deepcopy(model)
    print(pyvit.accelerate(model))  # pyvit: same weights, its kernels
    if device == "cpu":
        pyvit.pack_weights(model)  # pyvit: each residual branch becomes one call

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, vars(args)))
    dataset = Folder(args.data or sample_data.photographs(), transform)
    if not len(dataset):
        parser.error(f"--data must be a folder with images ({', '.join(sorted(ENDINGS))}), got {args.data}")
    loader = DataLoader(dataset, args.batch_size, num_workers=args.workers, collate_fn=collate)
    features, kept = extract(model, loader, device, dtype)
    if features is None:
        raise SystemExit("extract_features: no image could be read")
    paths = [str(dataset.paths[i]) for i in kept]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": features}, args.output, metadata={"paths": json.dumps(paths)})
    print(f"wrote {tuple(features.shape)} to {args.output}")

    centred = F.normalize(features - features.mean(0), dim=-1)
    similar = (centred @ centred.T).fill_diagonal_(-1.0)
    for i, path in enumerate(paths[:20]):
        if len(paths) > 1:
            print(f"{Path(path).name} is nearest to {Path(paths[int(similar[i].argmax())]).name}")

    images = next(images for images, _ in loader if images is not None).to(device, dtype)
    with torch.inference_mode():
        compare(f"inference of {len(images)} images", lambda: original(images), lambda: model(images))


if __name__ == "__main__":
    main()
