"""``python -m benchmarks.token_merging [RUN ...]``: what merging tokens costs in accuracy, and what it saves.

RUN: folders of finished classification runs of ``pyvit train``, whose test images are classified with several numbers
of merged tokens. Without one, the time of ViTs with random weights alone. Times of all numbers are taken by turns.
``--write`` puts the tables into docs/guides/token-merging.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

import pyvit
from benchmarks import docs
from benchmarks.int8_accuracy import trained
from benchmarks.measure import interleave, ratio

PAGE = docs.ROOT / "docs" / "guides" / "token-merging.md"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch16_384")


def forms(model: nn.Module, rates: Sequence[int]) -> dict[int, nn.Module]:
    """Copies of the model that merge ``rates`` tokens in each block; 0: the model itself, unmerged."""
    found = {}
    for r in rates:
        found[r] = copy.deepcopy(model).eval()
        if r:
            pyvit.accelerate(found[r], token_merging=r)
    return found


def speed(models: dict[int, nn.Module], images: torch.Tensor, seconds: float) -> dict[int, float]:
    """Speed-up over the first, in inference with bfloat16 autocast."""

    def call(model: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                return model(images)

        return run

    times = interleave({str(r): call(model) for r, model in models.items()}, seconds=seconds)
    first = next(iter(times.values()))
    return {r: ratio(first, times[str(r)]) for r in models}


def accuracy(folder: str, rates: Sequence[int], seconds: float) -> list[str]:
    """Lines of the table of a trained model."""
    subject = trained(folder)
    models = forms(subject.model, rates)
    quick = speed(models, subject.given[:64], seconds)
    lines = []
    for r, model in models.items():
        with torch.inference_mode():
            logits = torch.cat([model(part) for part in subject.given.split(500)])
        right = 100 * float((logits.argmax(-1) == subject.labels).float().mean())
        lines.append(f"| {subject.name} | {r} | {tokens(model, r)} | {right:.2f} | {quick[r]:.2f}x |")
    return lines


def tokens(model: nn.Module, r: int) -> int:
    """Tokens after the last block."""
    n = model.num_prefix_tokens + model.grid[0] * model.grid[1]  # type: ignore[index, operator]
    for _ in model.blocks:  # type: ignore[union-attr]
        n -= min(r, (n - model.num_prefix_tokens) // 2)  # type: ignore[operator]
    return int(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--rates", type=int, nargs="+", default=(0, 1, 2, 4, 8), help="tokens to merge per block, of RUN"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="for the times of one model")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(docs.ROOT)}")
    args = parser.parse_args()
    found = [line for run in args.runs for line in accuracy(run, args.rates, args.seconds)]
    trained_table = ["| model and data | r | tokens at the end | accuracy, % | speed |", "|---" * 5 + "|", *found]
    times = ["| model | r | tokens at the end | speed |", "|---" * 4 + "|"]
    for name in MODELS:
        model = pyvit.create_model(name)
        models = forms(model, (0, 8, 13, 16) if name.endswith("224") else (0, 16, 23, 36))
        quick = speed(models, torch.randn(4, 3, *model.img_size), args.seconds)
        times += [f"| {name} | {r} | {tokens(model, r)} | {quick[r]:.2f}x |" for r in models]
    print("\n".join([*(trained_table if found else ()), "", *times]))
    if args.write:
        text = docs.with_part(PAGE.read_text(), "times", "\n".join(times) + "\n")
        if found:
            text = docs.with_part(text, "accuracy", "\n".join(trained_table) + "\n")
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
