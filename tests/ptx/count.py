"""Instructions per score that kernels issue, with former and current tiles: ``python -m tests.ptx.count``.

A warp's instructions times 32, divided by its scores (patch embedding: by the pixels that enter its product). Calls are
small, so edges weigh more than in a model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from pyvit.triton_kernels import flash_attention, patch_embed, tiles, window_attention

from tests.ptx.launch import PARTS, running

F32, BF16 = torch.float32, torch.bfloat16
Run = Callable[[], object]


def _attention(n: int, d: int, dtype: torch.dtype) -> tuple[Run, int]:
    q, k, v = torch.randn(1, n, 3, 1, d).to(dtype).permute(2, 0, 3, 1, 4)
    rest = (q, k, v, None, False, d**-0.5, 0.0, None)

    def run() -> None:
        out, lse = flash_attention.flash_attention(*rest)
        flash_attention.flash_attention_backward(out, None, out, lse, False, *rest)

    return run, n * n


def _window(size: int, side: int, dtype: torch.dtype) -> tuple[Run, int]:
    qkv, table = torch.randn(1, size, size, 96).to(dtype), torch.randn((2 * side - 1) ** 2, 1)
    rest = (qkv, (side, side), (side // 2, side // 2), 1, table, None, None, 32**-0.5, 0.0, None)

    def run() -> None:
        out, lse = window_attention.window_attention(*rest)
        window_attention.window_attention_backward(out, out, lse, *rest)

    return run, size * size * side * side


def _patches(width: int) -> tuple[Run, int]:
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    weight, mean, std = torch.randn(width, 3, 16, 16).to(BF16), torch.full((3,), 0.45), torch.full((3,), 0.22)
    rest = (images, weight, None, (16, 16), None, None, None, mean, std)

    def run() -> None:
        out = patch_embed.patch_embed(*rest)
        patch_embed.patch_embed_backward(out, False, True, *rest)

    return run, images.numel()


#: Kernel, call, and its former tiles (None: the kernel is new).
CALLS = (
    ("backward_short", "197 tokens of 64, bf16", lambda: _attention(197, 64, BF16), None),
    ("backward_short", "257 tokens of 64, bf16", lambda: _attention(257, 64, BF16), None),
    ("forward_long", "769 tokens of 64, bf16", lambda: _attention(769, 64, BF16), tiles.Config(128, 64, 16, 1, 4, 3)),
    ("patch_forward", "128 channels, bytes", lambda: _patches(128), tiles.Config(128, 128, 64, 1, 8, 2)),
    ("patch_weight_gradient", "128 channels, bytes", lambda: _patches(128), tiles.Config(128, 64, 64, 1, 8, 2)),
    ("window_forward", "window 7, bf16", lambda: _window(28, 7, BF16), tiles.Config(64, 64, 32, 8, 4, 2)),
    ("window_backward", "window 7, bf16", lambda: _window(28, 7, BF16), tiles.Config(64, 64, 32, 4, 8, 1)),
    ("window_backward_keys", "window 7, fp32", lambda: _window(28, 7, F32), tiles.Config(32, 32, 32, 4, 8, 1)),
    ("window_forward", "window 12, bf16", lambda: _window(24, 12, BF16), tiles.Config(64, 64, 32, 8, 4, 2)),
    ("window_backward_queries", "window 12, bf16", lambda: _window(24, 12, BF16), tiles.Config(64, 64, 16, 4, 8, 1)),
    ("window_forward_long", "window 16, bf16", lambda: _window(32, 16, BF16), tiles.Config(64, 64, 16, 1, 4, 2)),
    ("window_backward_keys", "window 16, bf16", lambda: _window(32, 16, BF16), tiles.Config(64, 32, 32, 8, 4, 1)),
    ("window_backward_bias", "window 12, fp32", lambda: _window(24, 12, F32), tiles.Config(32, 32, 32, 8, 4, 1)),
    ("window_backward_bias", "window 16, fp32", lambda: _window(32, 16, F32), tiles.Config(64, 64, 32, 8, 8, 1)),
    ("backward_dkdv", "257 tokens of 80, bf16", lambda: _attention(257, 80, BF16), tiles.Config(64, 32, 32, 1, 8, 2)),
    ("backward_dkdv", "257 tokens of 128, bf16", lambda: _attention(257, 128, BF16), tiles.Config(64, 32, 32, 1, 8, 2)),
    ("forward_short", "141 tokens of 80, bf16", lambda: _attention(141, 80, BF16), tiles.Config(64, 64, 32, 2, 8, 2)),
    ("forward_short", "141 tokens of 128, bf16", lambda: _attention(141, 128, BF16), tiles.Config(64, 64, 32, 2, 8, 2)),
    ("forward_short", "141 tokens of 64, fp32", lambda: _attention(141, 64, F32), tiles.Config(32, 64, 32, 2, 4, 2)),
)


def per_score(part: str, kernel: str, run: Run, scores: int, config: tiles.Config | None) -> float:
    """Instructions that ``kernel`` issues per score of ``run``, with ``config`` or the current tiles."""
    tiles.force(kernel, config)
    try:
        with running(part) as launches:
            run()
    finally:
        tiles.force(kernel, None)
    return 32 * sum(launches.issued[kernel].values()) / scores


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.count", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS, default="sm_90")
    part = parser.parse_args().part
    print("| kernel | call | before | now |\n|---|---|---:|---:|")
    for kernel, call, make, before in CALLS:
        run, scores = make()
        former = "-" if before is None else f"{per_score(part, kernel, run, scores, before):.0f}"
        counts = (former, f"{per_score(part, kernel, run, scores, None):.0f}")
        print("| " + " | ".join((kernel, call, *counts)) + " |", flush=True)


if __name__ == "__main__":
    main()
