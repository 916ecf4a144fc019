"""``python -m benchmarks.int8``: int8 layers beside those in bfloat16, and in per cent of the machine's rate of 8-bit
multiply-adds.

Everything of one line runs in one interleaved measurement. Whole models: ``python -m benchmarks models --dtype int8``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyvit
from benchmarks import ceiling, measure
from pyvit.nn import LayerNorm, Mlp, QuantizedLinear
from pyvit.nn.linear import Linear, apply

#: Name -> width, rows at batch 1.
LAYERS = {"ViT-B": (768, 197), "ViT-S": (384, 197), "Swin-T, stage 1": (96, 3136), "Swin-T, stage 3": (384, 196)}
Forward = Callable[[Tensor], Tensor]


class Layers(nn.Module):
    """The linear layers of a block, as it calls them: qkv after a layer norm, proj and the MLP with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.qkv, self.proj, self.mlp = Linear(width, 3 * width), Linear(width, width), Mlp(width, 4 * width)

    def calls(self) -> dict[str, tuple[Forward, int]]:
        """Name -> the call, and its multiply-adds per row."""
        norm, area = (self.norm.weight, self.norm.bias, self.norm.eps), self.qkv.in_features**2
        return {
            "qkv": (lambda x: apply(self.qkv, x, norm=norm), 3 * area),
            "proj": (lambda x: apply(self.proj, x, residual=x), area),
            "mlp": (lambda x: self.mlp(x, norm=norm, residual=x), 8 * area),
        }


def quantized(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, child, QuantizedLinear(layer, child))
    return model


def layers(batches: tuple[int, ...], seconds: float, peak: float) -> None:
    print("| layers | batch | layer | bf16 ms | int8 ms | int8 against bf16 | int8 GF/s | of the ceiling |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (width, tokens) in LAYERS.items():
        plain, int8 = (Layers(width).eval().bfloat16() for _ in range(2))
        pyvit.pack_weights(plain)
        quantized(int8)
        for batch in batches:
            x = torch.randn(batch * tokens, width).bfloat16()
            fast = int8.calls()
            for layer, (call, work) in plain.calls().items():
                runs = {"bf16": functools.partial(call, x), "int8": functools.partial(fast[layer][0], x)}
                times = measure.interleave(runs, seconds=seconds)
                rate = 2e-6 * work * len(x) / times["int8"].median
                print(
                    f"| {name} | {batch} | {layer} | {times['bf16'].median:.3f} | {times['int8'].median:.3f} | "
                    f"{measure.ratio(times['bf16'], times['int8']):.2f}x | {rate:.0f} | {100 * rate / peak:.1f} % |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    top = ceiling.measure(torch.get_num_threads(), 0.5)
    print(f"{torch.ops.pyvit.int8_isa()}; {top}\n", flush=True)
    with torch.no_grad():
        layers(tuple(args.batches), args.seconds, top.gflops["int8"])


if __name__ == "__main__":
    main()
