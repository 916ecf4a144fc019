"""Public reports of wrong numbers, crashes and confusing failures in other libraries, put to pyvit.

Each test makes the situation of one report. ``python -m tests.test_public_reports`` writes the table of
docs/reliability.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyvit
from pyvit import ops
from pyvit.models.clip import TextTransformer
from pyvit.nn import DropPath, resample_positions

PAGE = Path(__file__).resolve().parents[1] / "docs/reliability.md"
_HERE = "tests/test_public_reports.py::"
_MARKERS = re.compile(r"(?<=<!-- reports -->\n).*(?=<!-- /reports -->)", re.DOTALL)


class Report(NamedTuple):
    """``where``: repository and number, ``seen``: what went wrong there, ``here``: what pyvit does. ``test``: its file
    and name."""

    where: str
    seen: str
    here: str
    test: str

    @property
    def link(self) -> str:
        repository, _, number = self.where.partition("#")
        return f"[{self.where}](https://github.com/{repository}/issues/{number})"


REPORTS: list[Report] = []


def report(where: str, seen: str, here: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def of(test: Callable[[], None]) -> Callable[[], None]:
        REPORTS.append(Report(where, seen, here, f"tests/test_public_reports.py::{test.__name__}"))
        return test

    return of


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v that require gradients."""
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention in float64 by its definition."""
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v.double()


# Attention
@report("pytorch/pytorch#103963", "rows without a key in a boolean mask are NaN", "zeros, and no gradient")
def test_rows_without_keys() -> None:
    q, k, v = heads(1, 1, 8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :4] = True
    out = ops.flash_attention(q, k, v, bias=mask)
    out.sum().backward()
    assert (out[:, :, 4:] == 0).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert (q.grad[:, :, 4:] == 0).all()


@report("pytorch/pytorch#101967", "NaN in a key that a mask keeps out changes the output", "the output does not change")
def test_nan_in_a_masked_key() -> None:
    q, k, v = (t.detach() for t in heads(2, 2, 5, 16))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[:, 1] = False
    expected = ops.flash_attention(q, k, v, bias=mask)
    k[:, :, 1] = torch.nan
    assert torch.equal(ops.flash_attention(q, k, v, bias=mask), expected)


@report("pytorch/pytorch#141128", "NaN queries give zeros on CPUs", "NaN, in the rows of those queries alone")
def test_nan_in_a_query() -> None:
    q, k, v = (t.detach() for t in heads(2, 2, 40, 16))
    q[:, :, 7] = torch.nan
    out = ops.flash_attention(q, k, v)
    assert out[:, :, 7].isnan().all()
    assert out[:, :, [*range(7), *range(8, 40)]].isfinite().all()


@report("pytorch/pytorch#127055", "a band of long sequences is NaN where the first block of keys is masked", "exact")
def test_a_band() -> None:
    n = 2300
    q, k, v = (t.detach() for t in heads(1, 1, n, 8))
    band = torch.full((n, n), -torch.inf).tril(-10) + torch.full((n, n), -torch.inf).triu(1)
    torch.testing.assert_close(ops.flash_attention(q, k, v, bias=band), exact(q, k, v, band).float())


@report("pytorch/pytorch#187506", "wrong results where the innermost dimension is not contiguous", "exact")
def test_channels_that_are_apart() -> None:
    q, k, v = (torch.randn(2, 2, 16, 33).transpose(2, 3) for _ in range(3))
    torch.testing.assert_close(ops.flash_attention(q, k, v), exact(q, k, v).float())


@report("pytorch/pytorch#116333", "strides of dimensions of size 1 are taken for strides", "exact")
def test_strides_of_single_elements() -> None:
    q, k, v = (torch.randn(n).as_strided((1, 1, n, 1), (77, 5, 1, 13)) for n in (3, 2, 2))
    torch.testing.assert_close(ops.flash_attention(q, k, v), exact(q, k, v).float())


@report(
    "pytorch/pytorch#103082",
    "what a causal mask means for fewer queries than keys",
    "query i sees keys 0 to i, as in PyTorch",
)
def test_causal_alignment() -> None:
    for nq, nk in ((3, 7), (7, 3)):
        q, k, v = torch.randn(1, 2, nq, 8), torch.randn(1, 2, nk, 8), torch.randn(1, 2, nk, 8)
        out = ops.flash_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@report("pytorch/pytorch#138340", "merging the heads of the output needs a copy", "none is needed")
def test_heads_merge() -> None:
    q, k, v = torch.randn(2, 9, 3, 4, 16).transpose(1, 3).unbind(2)
    assert ops.flash_attention(q, k, v).transpose(1, 2).is_contiguous()


@report("Dao-AILab/flash-attention#334", "the gradient of a query with one key is NaN", "0")
def test_one_key() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        q, k, v = (t.detach().mul_(3).requires_grad_() for t in heads(1, 1, 1, 16, dtype=dtype))
        ops.flash_attention(q, k, v).sum().backward()
        assert q.grad.abs().max() <= 2 * torch.finfo(dtype).eps * (k.abs().max() * v.abs().sum())
        assert all(t.grad.isfinite().all() for t in (k, v))


@report(
    "Dao-AILab/flash-attention#443",
    "NaN gradients of causal packed sequences with one key each",
    "those of each sequence alone",
)
def test_causal_sequences_of_one_key() -> None:
    cu_q, cu_k = torch.tensor([0, 76, 110, 256]), torch.tensor([0, 1, 2, 3])
    q = torch.randn(256, 1, 32, requires_grad=True)
    k, v = (torch.randn(3, 1, 32, requires_grad=True) for _ in range(2))
    out = ops.flash_attention_varlen(q, k, v, cu_q, cu_k, 146, 1, is_causal=True)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(out[:76], v[0].expand(76, 1, 32))


@report(
    "Dao-AILab/flash-attention#1537",
    "an error for empty sequences where the longest has one token",
    "those of one token attend",
)
def test_empty_sequences() -> None:
    lengths = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 3, 0, 5])
    cu_q, cu_k = (torch.cat((n.new_zeros(1), n.cumsum(0))) for n in lengths)
    q, k, v = torch.randn(2, 9, 64), torch.randn(8, 3, 64), torch.randn(8, 3, 64)
    out = ops.flash_attention_varlen(q, k, v, cu_q, cu_k, 1, 5, is_causal=True)
    torch.testing.assert_close(out[0], v[0].repeat_interleave(3, 0))
    torch.testing.assert_close(out[1], v[3].repeat_interleave(3, 0))


@report("Dao-AILab/flash-attention#1713", "what happens to keys of a sequence without queries", "gradients of 0")
def test_keys_without_queries() -> None:
    cu_q, cu_k = torch.tensor([0, 5, 5, 9]), torch.tensor([0, 4, 8, 12])
    q = torch.randn(9, 2, 16, requires_grad=True)
    k, v = (torch.randn(12, 2, 16, requires_grad=True) for _ in range(2))
    ops.flash_attention_varlen(q, k, v, cu_q, cu_k, 5, 4).sum().backward()
    assert (k.grad[4:8] == 0).all()
    assert (v.grad[4:8] == 0).all()
    assert (v.grad[:4] != 0).any()


@report("pytorch/pytorch#188933", "tokens beyond the last cumulative length get NaN gradients, silently", "ValueError")
def test_tokens_beyond_the_sequences() -> None:
    q = torch.randn(12, 2, 16, requires_grad=True)
    with pytest.raises(ValueError, match="cu_seqlens_q must be ascending from 0 to 12"):
        ops.flash_attention_varlen(q, q, q, torch.tensor([0, 4, 10]), torch.tensor([0, 4, 10]), 6, 6)


@report(
    "Dao-AILab/flash-attention#355",
    "wrong gradients for a gradient of the output that is not contiguous",
    "the same bits",
)
def test_gradients_that_are_apart() -> None:
    q, k, v = heads(2, 3, 20, 16)
    out = ops.flash_attention(q, k, v)
    grad = torch.randn(16, 20, 3, 2).permute(3, 2, 1, 0)
    assert grad.stride(-1) != 1
    found = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(out, (q, k, v), grad.contiguous())))


@report("Dao-AILab/flash-attention#818", "gradients go wrong where queries and keys differ in layout", "the same bits")
def test_layouts_that_differ() -> None:
    q, k, v = (t.detach() for t in heads(2, 4, 33, 16))
    apart = [q.transpose(1, 2).contiguous().transpose(1, 2), k, v.transpose(2, 3).contiguous().transpose(2, 3)]
    results = []
    for given in ([q, k, v], apart):
        leaves = [t.detach().requires_grad_() for t in given]
        results.append(torch.autograd.grad(ops.flash_attention(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *results))


# Norms
@report(
    "pytorch/pytorch#51102", "layer norm of rows with a large mean is wrong", "as near to float64 as the mean allows"
)
def test_norm_of_a_large_mean() -> None:
    x = torch.randn(50, 4) + 2000
    found = ops.layer_norm(x)
    torch.testing.assert_close(found, F.layer_norm(x.double(), (4,)).float(), rtol=2e-3, atol=2e-3)


@report("microsoft/onnxruntime#28463", "layer norm of large numbers that are close together is NaN", "exact")
def test_norm_of_large_numbers() -> None:
    for start in (40000.0, 80000.0):
        x = start + torch.arange(4.0)[None]
        torch.testing.assert_close(ops.layer_norm(x), F.layer_norm(x.double(), (4,)).float(), rtol=1e-5, atol=1e-5)
    assert (ops.layer_norm(torch.full((2, 256), 1234.0)) == 0).all()


@report(
    "pytorch/pytorch#178123",
    "layer norm of numbers about 1e30 is 0: their variance overflows",
    "the same, as the variance is infinite in float32",
)
def test_norm_of_huge_numbers() -> None:
    x = torch.randn(3, 40) * 1e30
    assert (ops.layer_norm(x) == 0).all()


@report("pytorch/pytorch#109188", "layer norm in bfloat16 differs between devices", "the rounded result of float64")
def test_norm_in_bfloat16() -> None:
    x = torch.randn(20, 12).bfloat16()
    wanted = F.layer_norm(x.double(), (12,), eps=0.0).bfloat16()
    found = ops.layer_norm(x, eps=0.0)
    assert ((found.double() - wanted.double()).abs() <= wanted.double().abs() * 2**-7 + 1e-6).all()


# Positions and windows
@report(
    "huggingface/pytorch-image-models#2737",
    "positions of another grid of as many tokens are kept as they are",
    "resampled",
)
def test_positions_of_another_grid() -> None:
    pos = torch.randn(16, 6)
    found = resample_positions(pos, (2, 8), (4, 4), antialias=False)
    image = pos.view(1, 2, 8, 6).permute(0, 3, 1, 2)
    wanted = F.interpolate(image, size=(4, 4), mode="bicubic").permute(0, 2, 3, 1).reshape(16, 6)
    torch.testing.assert_close(found, wanted)


@report(
    "huggingface/pytorch-image-models#2317",
    "a model built for rectangles fails on images of another size",
    "positions are resampled",
)
def test_images_of_another_size() -> None:
    model = pyvit.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1, num_classes=3).eval()
    with torch.no_grad():
        model.pos_embed.normal_()
        assert model(torch.randn(1, 3, 80, 48)).shape == (1, 3)
        wanted = resample_positions(model.pos_embed[0, 1:], (2, 4), (4, 2))
        x = torch.zeros(1, 3, 64, 32)
        tokens = model.patch_embed.proj.bias + wanted
        seen: list[Tensor] = []
        model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(x)
    torch.testing.assert_close(seen[0][0, 1:], tokens, rtol=1e-4, atol=1e-4)


@report("facebookresearch/dinov2#378", "resampled positions miss the grid by one for some image sizes", "every grid")
def test_every_grid() -> None:
    pos = torch.randn(37 * 37, 2)
    for n in (38, 39, 43, 60, 61, 78, 85, 86, 115, 122, 123):
        for offset in (0.0, 0.1):
            assert resample_positions(pos, (37, 37), (n, n), antialias=False, offset=offset).shape == (n * n, 2)


@report(
    "huggingface/pytorch-image-models#2438",
    "padding after the shift lets tokens of opposite edges attend to each other",
    "they do not",
)
def test_padding_and_shift() -> None:
    qkv = torch.randn(1, 3, 3, 24, requires_grad=True)
    out = ops.window_attention(qkv, 2, 1, num_heads=2)
    (grad,) = torch.autograd.grad(out[0, 0, 0].sum(), qkv)
    assert (grad[0, 0, 0] != 0).any()
    grad[0, 0, 0] = 0
    assert (grad == 0).all()


@report("pytorch/vision#6222", "windows larger than the map", "the whole map attends, without a shift")
def test_windows_larger_than_the_map() -> None:
    qkv = torch.randn(2, 4, 5, 24)
    torch.testing.assert_close(
        ops.window_attention(qkv, 7, 3, num_heads=2), ops.window_attention(qkv, 7, 0, num_heads=2)
    )
    q, k, v = qkv.view(2, 20, 3, 2, 4).transpose(1, 3).unbind(2)
    wanted = exact(q, k, v).transpose(1, 2).reshape(2, 4, 5, 8).float()
    torch.testing.assert_close(ops.window_attention(qkv, 7, 3, num_heads=2), wanted)


@report("facebookresearch/mae#108", "images that are not square cannot be cut into patches", "any grid")
def test_masked_autoencoder_of_rectangles() -> None:
    settings = {
        "depth": 1,
        "decoder_depth": 1,
        "embed_dim": 48,
        "num_heads": 3,
        "decoder_embed_dim": 32,
        "decoder_num_heads": 2,
    }
    model = pyvit.create_model("mae_vit_base_patch16_224", img_size=(32, 64), **settings)
    loss = model(torch.randn(2, 3, 32, 64))
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    assert loss.isfinite()


@report(
    "huggingface/pytorch-image-models#2118",
    "stochastic depth: per sample, and why it divides",
    "drops samples, and keeps the mean",
)
def test_stochastic_depth() -> None:
    torch.manual_seed(0)
    out = DropPath(0.25).train()(torch.ones(4000, 3))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (out == out[:, :1]).all()
    assert abs(float(out.mean()) - 1) < 0.05


# Losses
@report("facebookresearch/dinov2#143", "KoLeo is infinite for images that are alike", "finite, and so is its gradient")
def test_koleo_of_equal_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = F.normalize(torch.randn(6, 16), dim=1).to(dtype)
        x[3:] = x[:3]
        x.requires_grad_()
        loss = ops.koleo(x)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()


@report(
    "google-research/big_vision#115",
    "SigLIP's loss averaged over pairs is too small by the batch",
    "summed over pairs, averaged over images",
)
def test_sigmoid_loss_scale() -> None:
    a, b = (F.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    signs = 2 * torch.eye(5) - 1
    wanted = -F.logsigmoid(signs * (10.0 * a @ b.t() - 10.0)).sum() / 5
    torch.testing.assert_close(ops.sigmoid_contrastive(a, b, 10.0, -10.0), wanted)


# Texts
@report(
    "mlfoundations/open_clip#1151", "a text without an end token is pooled at its first", "at its last, which sees all"
)
def test_a_text_without_an_end_token() -> None:
    tower = _text_tower(eot=40)
    texts = torch.tensor([[1, 2, 40, 0, 0], [1, 2, 3, 4, 5]])
    assert tower.end_of(texts).tolist() == [2, 4]


@report("huggingface/transformers#24650", "tokens that are added after the end token are taken for it", "they are not")
def test_tokens_added_after_the_end_token() -> None:
    tower = _text_tower(eot=40)
    assert tower.end_of(torch.tensor([[1, 45, 49, 40, 0]])).tolist() == [3]


def _text_tower(eot: int) -> TextTransformer:
    return TextTransformer(embed_dim=8, context_length=5, vocab_size=50, width=16, num_heads=2, depth=1, eot=eot)


# Situations that other tests make.
REPORTS += [
    Report(
        "mlfoundations/open_clip#616",
        "gathering with gradients scales them by the number of ranks",
        "the gradient of the sum over ranks of the whole batch's loss, as documented",
        "tests/losses/test_distributed.py::test_ranks_equal_one",
    ),
    Report(
        "lightly-ai/lightly#1177",
        "partners of other ranks are taken where the batch is not gathered",
        "one rank equals many",
        "tests/losses/test_distributed.py::test_ranks_equal_one",
    ),
    Report(
        "huggingface/transformers#30978",
        "attention maps are None where SDPA runs",
        "an accelerated model returns them where they are asked for",
        "tests/integrations/test_transformers.py::test_probabilities_are_returned_when_asked_for",
    ),
]


@pytest.mark.parametrize("each", REPORTS, ids=lambda r: r.where)
def test_each_report_has_its_test(each: Report) -> None:
    file, _, name = each.test.partition("::")
    assert f"def {name}(" in (PAGE.parents[1] / file).read_text()


def table() -> str:
    lines = ["| report | what went wrong there | here | test |", "|---|---|---|---|"]
    lines += [f"| {r.link} | {r.seen} | {r.here} | `{r.test.removeprefix(_HERE)}` |" for r in REPORTS]
    return "\n".join(lines) + "\n"


def test_the_page_lists_them() -> None:
    found = _MARKERS.search(PAGE.read_text())
    assert found is not None
    assert found[0] == table()


if __name__ == "__main__":
    PAGE.write_text(_MARKERS.sub(lambda _: table(), PAGE.read_text()))
