"""The reference implementation, against loops over tokens, PyTorch's own operators and published test vectors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyvit.ops import (
    attention_map,
    flash_attention,
    flash_attention_varlen,
    linear,
    patch_embed,
    reference,
    window_attention,
)

F64 = torch.float64
close = torch.testing.assert_close


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_attention_against_pytorch(kind: str, is_causal: bool) -> None:
    q, k, v = _rand(2, 3, 9, 8), _rand(2, 3, 13, 8), _rand(2, 3, 13, 5)
    bias = {"none": None, "float": _rand(2, 1, 9, 13), "bool": torch.rand(9, 13) > 0.4}[kind]
    if kind == "bool":
        bias[:, 0] = True
    out, lse = flash_attention(q, k, v, bias=bias, is_causal=is_causal, scale=0.4, return_lse=True, backend="reference")
    mask = bias if not is_causal else torch.ones(9, 13, dtype=torch.bool).tril()
    if is_causal and bias is not None:
        mask = bias & mask if kind == "bool" else bias.masked_fill(~mask, -math.inf)
    close(out, F.scaled_dot_product_attention(q, k, v, mask, scale=0.4))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.4
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    close(lse, scores.logsumexp(-1))


def test_grouped_queries_share_consecutive_heads() -> None:
    q, k, v = _rand(2, 6, 5, 8), _rand(2, 2, 7, 8), _rand(2, 2, 7, 8)
    out = flash_attention(q, k, v, enable_gqa=True, backend="reference")
    for head in range(6):
        close(out[:, head], F.scaled_dot_product_attention(q[:, head], k[:, head // 3], v[:, head // 3]))
    close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_varlen_and_map_against_dense() -> None:
    q, k, v = _rand(11, 2, 8), _rand(15, 2, 8), _rand(15, 2, 6)
    cq, ck = torch.tensor([0, 4, 11]), torch.tensor([0, 9, 15])
    out = flash_attention_varlen(q, k, v, cq, ck, 7, 9, backend="reference")
    for lo, hi, klo, khi in ((0, 4, 0, 9), (4, 11, 9, 15)):
        dense = [t[None].transpose(1, 2) for t in (q[lo:hi], k[klo:khi], v[klo:khi])]
        close(out[lo:hi], F.scaled_dot_product_attention(*dense)[0].transpose(0, 1))
    full = (q.transpose(0, 1)[None] @ k.transpose(0, 1)[None].mT / math.sqrt(8)).softmax(-1)
    close(
        attention_map(q.transpose(0, 1)[None], k.transpose(0, 1)[None], [10, 2], backend="reference"),
        full[:, :, [10, 2]],
    )


def _window_by_hand(
    qkv: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    heads: int,
    table: Tensor,
    logit_scale: Tensor | None,
    pad: Tensor | None,
) -> Tensor:
    """One query at a time: which tokens share its window and its region (Liu et al.)."""
    b, h, w, c3 = qkv.shape
    c, d = c3 // 3, c3 // 3 // heads
    size = tuple(-(-n // s) * s for n, s in zip((h, w), window, strict=True))
    shift = tuple(s if n > m else 0 for s, n, m in zip(shift, size, window, strict=True))

    def place(at: int, axis: int) -> tuple[int, int, int]:
        """Window, offset in the window, and region of a coordinate of the padded map."""
        rolled = (at - shift[axis]) % size[axis]
        return rolled // window[axis], rolled % window[axis], int(at < shift[axis])

    out = torch.zeros(b, h, w, c, dtype=F64)
    tokens = list(itertools.product(range(size[0]), range(size[1])))
    for image, head, (y, x) in itertools.product(range(b), range(heads), tokens):
        if y >= h or x >= w:
            continue
        (wy, oy, sy), (wx, ox, sx) = place(y, 0), place(x, 1)
        query = qkv[image, y, x, head * d : (head + 1) * d]
        scores, values = [], []
        for ky, kx in tokens:
            (vy, py, ty), (vx, px, tx) = place(ky, 0), place(kx, 1)
            real = ky < h and kx < w
            if (wy, wx, sy, sx) != (vy, vx, ty, tx) or (not real and pad is None):
                continue
            token = qkv[image, ky, kx] if real else pad
            key, value = token[c + head * d : c + (head + 1) * d], token[2 * c + head * d : 2 * c + (head + 1) * d]
            if logit_scale is None:
                score = query @ key / math.sqrt(d)
            else:
                score = query @ key / (query.norm() * key.norm()) * min(math.exp(float(logit_scale[head])), 100.0)
            scores.append(
                score + table[(oy - py + window[0] - 1) * (2 * window[1] - 1) + ox - px + window[1] - 1, head]
            )
            values.append(value)
        out[image, y, x, head * d : (head + 1) * d] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((4, 6), (2, 3), (1, 2)), ((5, 7), (3, 3), (1, 1)), ((2, 9), (3, 4), (2, 1)), ((1, 1), (2, 2), (1, 1))],
    ids=str,
)
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_window_attention_by_hand(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], v2: bool, padded: bool
) -> None:
    heads, d = 2, 3
    qkv, table = _rand(1, *size, 3 * heads * d), _rand((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    logit_scale = torch.tensor([1.5, 6.0], dtype=F64) if v2 else None
    pad = _rand(3 * heads * d) if padded else None
    options = {"bias_table": table, "logit_scale": logit_scale, "pad_qkv": pad}
    out = window_attention(qkv, window, shift, num_heads=heads, **options, backend="reference")
    close(out, _window_by_hand(qkv, window, shift, heads, table, logit_scale, pad))


def test_swin_mask_of_the_paper() -> None:
    """Equal to attention with the additive mask that Swin implementations build from nine regions."""
    h = w = 12
    window, shift = 4, 2
    region = torch.zeros(h, w)
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, (ys, xs) in enumerate(itertools.product(edges, edges)):
        region[ys, xs] = i
    ids = region.view(3, window, 3, window).permute(0, 2, 1, 3).reshape(9, -1)
    assert torch.equal(
        reference.window_mask((h, w), (window, window), (shift, shift), True), ids[:, :, None] == ids[:, None]
    )


@pytest.mark.parametrize("stride", [None, 3])
def test_patch_embed_by_hand(stride: int | None) -> None:
    images, weight, bias = torch.randint(256, (2, 3, 10, 15), dtype=torch.uint8), _rand(6, 3, 5, 5), _rand(6)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    pixels = (images.to(F64) / 255 - mean[:, None, None]) / std[:, None, None]
    columns = F.unfold(pixels, 5, stride=stride or 5).mT
    pos, prefix = _rand(columns.shape[1], 6), _rand(2, 6)
    tokens = columns @ weight.flatten(1).T + bias + pos
    keep = torch.stack([torch.randperm(columns.shape[1])[:3] for _ in range(2)])
    wanted = torch.stack([torch.cat([prefix, tokens[i][keep[i]]]) for i in range(2)])
    out = patch_embed(
        images,
        weight,
        bias,
        stride=stride,
        pos_embed=pos,
        prefix=prefix,
        keep=keep,
        mean=mean,
        std=std,
        backend="reference",
    )
    close(out, wanted)


def test_linear_activations() -> None:
    x, weight, bias = _rand(2, 5, 7), _rand(4, 7), _rand(4)
    y = x @ weight.T + bias
    tanh = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    exact = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    wanted = {
        None: y,
        "gelu": exact,
        "gelu_tanh": tanh,
        "quick_gelu": y / (1 + torch.exp(-1.702 * y)),
        "silu": y / (1 + torch.exp(-y)),
        "relu": y.clamp(0),
    }
    for activation, value in wanted.items():
        close(linear(x, weight, bias, activation=activation), value)
    close(linear(x[0, 0], weight), weight @ x[0, 0])


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 in Python's integers, from the paper's description."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def test_philox() -> None:
    """The known answers of Random123, and the tensor form against the integer form."""
    assert _philox((0,) * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _philox((2**32 - 1,) * 4, (2**32 - 1,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert _philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    seed = torch.randint(2**62, (1,))
    key = (int(seed) & (2**32 - 1), int(seed) >> 32)
    at = torch.randint(2**32, (3, 50))
    assert reference.philox(seed, *at).tolist() == [_philox((*map(int, c), 0), key)[0] for c in at.T]
