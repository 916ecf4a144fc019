"""Representative calls of every kernel, for the compile report and the tuner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyvit.triton_kernels import attention_map, flash_attention, pairwise_losses, patch_embed, window_attention
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]


class _Maker:
    """Inputs of one dtype on one device, ``batch`` images or sequences; on "meta" they have no values."""

    def __init__(self, dtype: torch.dtype, device: str, batch: int) -> None:
        self.dtype, self.device, self.batch = dtype, device, batch

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def integers(self, values: Tensor) -> Tensor:
        return values.to(self.device)


def attention(make: _Maker, n: int, d: int, bias: bool = False, causal: bool = False, dropout: float = 0.0) -> Run:
    """Forward and backward of a batch of images, 12 heads."""
    q, k, v = make(make.batch, n, 3, 12, d).permute(2, 0, 3, 1, 4)
    seed = make.integers(torch.tensor([1])) if dropout else None
    rest = (make(1, 12, n, n, dtype=torch.float32) if bias else None, causal, d**-0.5, dropout, seed)

    def run() -> tuple[Tensor, ...]:
        out, lse = flash_attention.flash_attention(q, k, v, *rest)
        return out, *flash_attention.flash_attention_backward(out, None, out, lse, bias, q, k, v, *rest)

    return run


def varlen(make: _Maker, longest: int, d: int) -> Run:
    """Forward and backward of packed sequences, from half of the longest length to the longest."""
    lengths = torch.linspace(longest // 2, longest, make.batch).int()
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    q, k, v = make(int(ends[-1]), 3, 12, d).permute(1, 0, 2, 3)
    cu = make.integers(ends)
    rest = (cu, cu, longest, longest, None, False, d**-0.5)

    def run() -> tuple[Tensor, ...]:
        out, lse = flash_attention.flash_attention_varlen(q, k, v, *rest)
        return out, *flash_attention.flash_attention_varlen_backward(out, None, out, lse, False, q, k, v, *rest)

    return run


def window(make: _Maker, size: int, side: int, heads: int, cosine: bool = False, pad: bool = False) -> Run:
    """Forward and backward of a Swin block's attention, 32 channels per head."""
    qkv, table = make(make.batch, size, size, 96 * heads), make((2 * side - 1) ** 2, heads, dtype=torch.float32)
    logit = make(heads, dtype=torch.float32) if cosine else None
    rest = (
        (side, side),
        (side // 2, side // 2),
        heads,
        table,
        logit,
        make(96 * heads) if pad else None,
        32**-0.5,
        0.0,
        None,
    )

    def run() -> tuple[Tensor, ...]:
        out, lse = window_attention.window_attention(qkv, *rest)
        return out, *window_attention.window_attention_backward(out, out, lse, qkv, *rest)

    return run


def patches(make: _Maker, kept: int = 0, as_bytes: bool = False) -> Run:
    """Forward and backward of ViT-B/16 on images of 224 x 224."""
    images = make(make.batch, 3, 224, 224)
    mean = std = None
    if as_bytes:
        images = make.integers(torch.randint(0, 256, images.shape, dtype=torch.uint8))
        mean, std = make(3, dtype=torch.float32), make.integers(torch.full((3,), 0.25))
    keep = make.integers(torch.rand(make.batch, 196).argsort(1)[:, :kept]) if kept else None
    rest = (make(768, 3, 16, 16), make(768), (16, 16), make(196, 768), make(1, 768), keep, mean, std)

    def run() -> tuple[Tensor, ...]:
        out = patch_embed.patch_embed(images, *rest)
        return out, *patch_embed.patch_embed_backward(out, not as_bytes, True, images, *rest)

    return run


def maps(make: _Maker, n: int) -> Run:
    """The class token's attention, ViT-B."""
    q, k = make(make.batch, n, 2, 12, 64).permute(2, 0, 3, 1, 4)
    rows = make.integers(torch.zeros(make.batch, 1, dtype=torch.int64))
    return lambda: (attention_map.attention_map(q, k, rows, None, 0.125),)


def pairs(make: _Maker, loss: str, n: int, d: int) -> Run:
    """Forward and backward of a contrastive loss of ``n`` pairs of embeddings."""
    a, b = (torch.nn.functional.normalize(make(n, d), dim=1) for _ in range(2))
    numbers = [
        make.integers(torch.tensor(v))
        for v in {"info_nce": [20.0], "nt_xent": [0.1], "sigmoid_contrastive": [10.0, -10.0]}[loss]
    ]
    grad = make.integers(torch.tensor(1.0))

    def run() -> tuple[Tensor, ...]:
        found = getattr(pairwise_losses, loss)(a, b, *numbers)
        out, *lse = (found,) if isinstance(found, Tensor) else found
        return out, *getattr(pairwise_losses, f"{loss}_backward")(grad, *lse, a, b, *numbers)

    return run


def distillation(make: _Maker, n: int, prototypes: int) -> Run:
    """Forward and backward of DINO's loss: 10 crops against 2 of ``n`` images, 256 features."""
    student, teacher = make(10, n, 256), make(2, n, 256)
    ws, wt = make(prototypes, 256), make(prototypes, 256)
    weights = make.integers(torch.full((10, 2, n), 1 / (20 * n)))
    args = (student, teacher, ws, wt, make(prototypes, dtype=torch.float32), weights, 1.0, 0.4)
    grad = make.integers(torch.tensor(1.0))

    def run() -> tuple[Tensor, ...]:
        loss, lse_s, lse_t = pairwise_losses.distillation_cross_entropy(*args)
        return loss, *pairwise_losses.distillation_cross_entropy_backward(grad, lse_s, lse_t, *args)

    return run


CASES: dict[str, Callable[[_Maker], Run]] = {
    "attention N=50 d=64": lambda m: attention(m, 50, 64),
    "attention N=197 d=64": lambda m: attention(m, 197, 64),
    "attention N=197 d=64 bias": lambda m: attention(m, 197, 64, bias=True),
    "attention N=257 d=64": lambda m: attention(m, 257, 64),
    "attention N=257 d=72": lambda m: attention(m, 257, 72),
    "attention N=257 d=80": lambda m: attention(m, 257, 80),
    "attention N=257 d=88": lambda m: attention(m, 257, 88),
    "attention N=577 d=64": lambda m: attention(m, 577, 64),
    "attention N=577 d=96 dropout": lambda m: attention(m, 577, 96, dropout=0.1),
    "attention N=1025 d=64": lambda m: attention(m, 1025, 64),
    "attention N=1025 d=64 causal": lambda m: attention(m, 1025, 64, causal=True),
    "attention N=1025 d=128": lambda m: attention(m, 1025, 128),
    "varlen N<=197 d=64": lambda m: varlen(m, 197, 64),
    "varlen N<=1025 d=64": lambda m: varlen(m, 1025, 64),
    "attention map N=197 d=64": lambda m: maps(m, 197),
    "window 4": lambda m: window(m, 56, 4, 3),
    "window 7": lambda m: window(m, 56, 7, 3),
    "window 7 padded": lambda m: window(m, 50, 7, 3, pad=True),
    "window 8 cosine": lambda m: window(m, 64, 8, 3, cosine=True),
    "window 12": lambda m: window(m, 96, 12, 4),
    "window 16 cosine": lambda m: window(m, 64, 16, 3, cosine=True),
    "window 24 cosine": lambda m: window(m, 96, 24, 4, cosine=True),
    "patches 16": patches,
    "patches 16 uint8": lambda m: patches(m, as_bytes=True),
    "patches 16 keep 49": lambda m: patches(m, kept=49),
    "info_nce 4096 d=512": lambda m: pairs(m, "info_nce", 4096, 512),
    "nt_xent 2048 d=128": lambda m: pairs(m, "nt_xent", 2048, 128),
    "sigmoid_contrastive 4096 d=768": lambda m: pairs(m, "sigmoid_contrastive", 4096, 768),
    "distillation 64 K=65536": lambda m: distillation(m, 64, 65536),
}


def prepare(case: str, dtype: torch.dtype, device: str, batch: int = 64) -> Run:
    """The call ``case`` of :data:`CASES` with its inputs, for ``batch`` images or sequences (the losses have sizes of
    their own). Each run is one forward and one backward."""
    return CASES[case](_Maker(dtype, device, batch))
