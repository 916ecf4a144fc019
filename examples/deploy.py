"""Compile a timm model into one file with AOTInductor, and run it without the model's Python code.

    python examples/deploy.py compile --model vit_small_patch16_224 --out runs/deploy
    python examples/deploy.py run runs/deploy photograph.jpg ...

The folder holds the model (model.pt2) and pyvit's compiled operators (libpyvit_ops.so). ``run`` imports torch alone,
and ``deploy.cpp`` does the same in C++. Lines that use pyvit are marked.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch


def compile_model(args):
    """Writes ``args.out``: the model, the operators it calls, and how images are prepared."""
    import timm
    from speed import compare

    import pyvit  # pyvit

    torch.manual_seed(0)
    model = timm.create_model(
        args.model, pretrained=args.pretrained, checkpoint_path=args.checkpoint, **args.model_kwargs
    ).eval()
    data = timm.data.resolve_model_data_config(model, args.model_kwargs)
    images = torch.randn(args.batch_size, *data["input_size"])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    def package(name):
        """The model as a graph of operators, for 1 to 64 images, compiled; its path."""
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        return torch._inductor.aoti_compile_and_package(program, package_path=str(out / name))

    with torch.no_grad():
        expected = model(images)
        without = package("without.pt2") if args.compare else None
        print(pyvit.accelerate(model))  # pyvit: torch.export sees its operators in place of the model's own code
        path = package("model.pt2")
        shutil.copy(pyvit.library.PATH, out)  # pyvit: the operators, a library without Python
        compiled = torch._inductor.aoti_load_package(path)
        print(f"wrote {path}; largest difference to the model: {(compiled(images) - expected).abs().max():.1e}")
        if args.compare:
            original = torch._inductor.aoti_load_package(without)
            compare(f"inference of {len(images)} images", lambda: original(images), lambda: compiled(images))
    settings = {"size": data["input_size"][1:], "mean": data["mean"], "std": data["std"]}
    (out / "images.json").write_text(json.dumps(settings))


def run(args):
    """Prints the five likeliest classes of each image."""
    folder = Path(args.folder)
    if not (folder / "model.pt2").is_file():
        raise SystemExit(f"deploy: {folder} has no model.pt2; write it with 'deploy.py compile --out {folder}'")
    import numpy as np
    from PIL import Image

    torch.ops.load_library(str(folder / "libpyvit_ops.so"))  # pyvit: its operators, before the model that calls them
    model = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    settings = json.loads((folder / "images.json").read_text())
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    batch = []
    for path in args.images:
        pixels = Image.open(path).convert("RGB").resize(settings["size"][::-1], Image.Resampling.BICUBIC)
        batch.append((torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / std)
    best = model(torch.stack(batch)).softmax(1).topk(5)
    for path, values, classes in zip(args.images, best.values.tolist(), best.indices.tolist(), strict=True):
        print(path, ", ".join(f"class {c}: {100 * p:.1f} %" for p, c in zip(values, classes, strict=True)))


def keyword(text):
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    compiling = commands.add_parser("compile", help="write a folder with a compiled model")
    compiling.add_argument("--model", default="vit_small_patch16_224", help="name of a timm model")
    compiling.add_argument("--model-kwargs", nargs="*", type=keyword, default=[], metavar="KEY=VALUE")
    compiling.add_argument("--pretrained", action="store_true", help="download timm's weights")
    compiling.add_argument("--checkpoint", default="", help="file of weights (default: random ones)")
    compiling.add_argument("--batch-size", type=int, default=8, help="of the comparison")
    compiling.add_argument("--no-compare", dest="compare", action="store_false", help="do not compile without pyvit")
    compiling.add_argument("--out", default="runs/deploy")
    compiling.set_defaults(function=compile_model)
    running = commands.add_parser("run", help="classify images with a compiled model")
    running.add_argument("folder")
    running.add_argument("images", nargs="+")
    running.set_defaults(function=run)
    args = parser.parse_args()
    if "model_kwargs" in args:
        args.model_kwargs = dict(args.model_kwargs)
    args.function(args)


if __name__ == "__main__":
    main()
