"""Search a folder of images by words, with an open_clip model that has not seen them.

    python examples/open_clip_train.py && python examples/search_photos.py "a red circle"          # drawn scenes
    python examples/search_photos.py "a dog on a beach" --data DIR --model ViT-B-32 --pretrained laion2b_s34b_b79k

The features of the images are kept in ``--index``, so that further searches read only new images. Lines that use pyvit
are marked.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import open_clip
import sample_data
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from speed import compare

import pyvit  # pyvit

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def load_index(path, name):
    """{path of an image: its features} as far as they are known for this model."""
    if not Path(path).is_file():
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        known = json.loads(metadata["paths"]) if metadata["model"] == name else []
        return dict(zip(known, file.get_tensor("features"), strict=True)) if known else {}


@torch.inference_mode()
def index_images(model, preprocess, paths, batch_size, device):
    """(path, features) of every image that can be read, normalised."""
    batch = []
    for i, path in enumerate(paths):
        try:
            batch.append((path, preprocess(Image.open(path))))
        except OSError as error:
            print(f"left out {path}: {error}")
        if batch and (len(batch) == batch_size or i == len(paths) - 1):
            images = torch.stack([image for _, image in batch]).to(device)
            yield from zip([p for p, _ in batch], model.encode_image(images, normalize=True).cpu(), strict=True)
            print(f"\rindexed {i + 1} of {len(paths)} images", end="\n" if i == len(paths) - 1 else "", flush=True)
            batch = []


def main():
    parser = argparse.ArgumentParser(description="Search images by words with open_clip and pyvit's kernels")
    parser.add_argument("query", nargs="+", help="what to look for; several queries in quotes")
    parser.add_argument("--data", help="folder of images (default: held-out drawn scenes)")
    parser.add_argument("--model", default="local-dir:runs/open_clip", help="name of an open_clip model")
    parser.add_argument("--pretrained", help="name of its weights, which open_clip downloads, or a file")
    parser.add_argument("--index", default="runs/index.safetensors")
    parser.add_argument("--top", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model.startswith("local-dir:") and not Path(args.model[10:]).is_dir():
        parser.error(f"there is no model in {args.model[10:]}: run open_clip_train.py first, or give --model")
    if not args.model.startswith(("local-dir:", "hf-hub:")) and not args.pretrained:
        parser.error(f"--model {args.model} needs --pretrained: random weights find nothing")
    root = Path(args.data) if args.data else sample_data.scenes() / "val"
    paths = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in ENDINGS)
    if not paths:
        parser.error(f"--data must be a folder with images ({', '.join(sorted(ENDINGS))}), got {root}")

    model, _, preprocess = open_clip.create_model_and_transforms(args.model, args.pretrained, device=device)
    tokenize = open_clip.get_tokenizer(args.model)
    model.eval()
    original = copy.deepcopy(model)
    print(pyvit.accelerate(model))  # pyvit: same weights, its kernels
    if device == "cpu":
        pyvit.pack_weights(model)  # pyvit: linear layers with prepacked weights

    name = f"{args.model} {args.pretrained}"
    known = load_index(args.index, name)
    known |= dict(index_images(model, preprocess, [p for p in paths if p not in known], args.batch_size, device))
    known = {path: known[path] for path in paths if path in known}
    if not known:
        raise SystemExit("search_photos: no image could be read")
    features = torch.stack(list(known.values()))
    Path(args.index).parent.mkdir(parents=True, exist_ok=True)
    save_file({"features": features}, args.index, metadata={"paths": json.dumps(list(known)), "model": name})

    with torch.inference_mode():
        began = time.perf_counter()
        scores = model.encode_text(tokenize(args.query).to(device), normalize=True).cpu() @ features.T
        best = scores.topk(min(args.top, len(known)))
        print(f"searched {len(known)} images in {1e3 * (time.perf_counter() - began):.0f} ms")
    for query, values, places in zip(args.query, best.values, best.indices, strict=True):
        print(f"{query}:")
        for value, i in zip(values, places, strict=True):
            print(f"  {value:.3f}  {list(known)[i]}")

    images = torch.stack([preprocess(Image.open(path)) for path in list(known)[: args.batch_size]]).to(device)
    with torch.inference_mode():
        steps = (lambda: original.encode_image(images)), (lambda: model.encode_image(images))
        compare(f"indexing {len(images)} images", *steps)


if __name__ == "__main__":
    main()
