"""Token merging: against the paper's procedure token by token, and what it must leave alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import pyvit
from pyvit.models.vit import VisionTransformer
from pyvit.nn import TokenMerging
from pyvit.nn.token_merging import match, merge, unmerge
from tests.peers import peer


def merge_by_hand(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """One image, x (N, C): the paper's steps with lists of the patches that each token stands for."""
    n = len(x)
    metric = metric.detach()
    unit = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = [i for i in range(n) if i % 2 == 0], [i for i in range(n) if i % 2]
    edges = []
    for i in even:
        if i >= prefix:
            j = max((j for j in odd if j >= prefix), key=lambda j: float(unit[i] @ unit[j]))
            edges.append((float(unit[i] @ unit[j]), i, j))
    edges = sorted(edges, reverse=True)[:r]
    groups = {j: [j] for j in range(n)}
    for _, i, j in edges:
        groups[j].append(i)
        del groups[i]
    rows = [groups[j] for j in sorted(groups)]
    total = torch.stack([size[g].sum() for g in rows])
    return torch.stack([(x[g] * size[g, None]).sum(0) for g in rows]) / total[:, None], total


@pytest.mark.parametrize(("n", "prefix", "r"), [(17, 1, 5), (17, 1, 8), (16, 0, 8), (18, 2, 3), (21, 5, 8), (3, 1, 1)])
def test_merges_the_most_similar_pairs(n: int, prefix: int, r: int) -> None:
    x = torch.randn(3, n, 7, dtype=torch.float64)
    size = torch.randint(1, 5, (3, n)).double()
    metric = torch.randn(3, n, 4, dtype=torch.float64)
    got, total = merge(x, size, match(metric, r, prefix), r)
    for i in range(3):
        want, sizes = merge_by_hand(x[i], size[i], metric[i], r, prefix)
        torch.testing.assert_close(got[i], want)
        torch.testing.assert_close(total[i], sizes)
    torch.testing.assert_close(got[:, :prefix], x[:, :prefix])  # never merged, and in place


def test_equal_tokens_are_merged_exactly() -> None:
    """Patches that are copies of others lead to the same output with half the tokens: a token of size 2 attends, and is
    attended to, as two."""
    model = pyvit.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, global_pool="avg").eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.zeros_(model.pos_embed)
    patch = torch.randn(2, 3, 4, 2, 16, 16)  # 4 rows of 2 pairs of equal patches
    images = patch.repeat_interleave(2, 3).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 64)
    want = model(images)
    pyvit.accelerate(model, token_merging=(8,) + (0,) * 11)
    torch.testing.assert_close(model(images), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("library", ["pyvit", "timm"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_nothing_to_merge_changes_nothing(library: str, pool: str) -> None:
    model = build(library, global_pool=pool)
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    pyvit.accelerate(model, token_merging=0)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def build(library: str, **options: object) -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, **options}
    if library == "timm":
        model = peer("timm").models.vision_transformer.VisionTransformer(**sizes)
    else:
        model = VisionTransformer(**sizes)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize("library", ["pyvit", "timm"])
def test_fewer_tokens_in_each_block(library: str) -> None:
    model = build(library)
    pyvit.accelerate(model, token_merging=(4, 0, 20))
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    x = torch.randn(2, 3, 32, 32)
    dense = model.forward_features(x)
    assert seen == [13, 13, 7]  # 17 - 4, - 0, and half of 12 patches
    assert dense.shape == (2, 17, 32)
    assert len(dense[0].unique(dim=0)) == 7


@pytest.mark.parametrize("library", ["pyvit", "timm"])
def test_gradients(library: str) -> None:
    """Of all parameters, against the same merging in plain float64 formulas."""
    model = build(library, global_pool="avg")
    twin = copy.deepcopy(model).double()
    pyvit.accelerate(model, token_merging=4)
    x = torch.randn(2, 3, 32, 32)
    model(x).square().sum().backward()
    plainly(twin, x.double(), 4).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            error = (p.grad - q.grad).norm() / q.grad.norm()
            assert error < 1e-4, f"{name}: {error}"


def plainly(model: torch.nn.Module, x: Tensor, r: int) -> Tensor:
    """Logits of a model with average pooling, by scaled_dot_product_attention and :func:`merge_by_hand`."""
    x = model._pos_embed(model.patch_embed(x)) if hasattr(model, "_pos_embed") else model.embed(x)
    size = x.new_ones(x.shape[:2])
    for block in model.blocks:
        a = block.attn
        q, k, v = a.qkv(block.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).transpose(1, 3).unbind(2)
        bias = size.log()[:, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.expand(-1, a.num_heads, x.shape[1], -1))
        x = x + a.proj(out.transpose(1, 2).flatten(2))
        fewer = [
            merge_by_hand(*parts, min(r, (x.shape[1] - 1) // 2), 1) for parts in zip(x, size, k.mean(1), strict=True)
        ]
        x, size = (torch.stack(parts) for parts in zip(*fewer, strict=True))
        x = x + block.mlp(block.norm2(x))
    share = size[:, 1:, None] / size[:, 1:, None].sum(1, keepdim=True)
    return model.head(model.fc_norm((model.norm(x)[:, 1:] * share).sum(1)))


def test_the_module_alone() -> None:
    model = build("pyvit")
    x = model.embed(torch.randn(2, 3, 32, 32))
    tokens, rows = TokenMerging(2, prefix=1)(model.blocks, x)
    assert tokens.shape == (2, 11, 32)
    assert rows.shape == (2, 17)
    torch.testing.assert_close(unmerge(tokens, rows)[:, 0], tokens[:, 0])
    assert rows.unique().tolist() == list(range(11))


def test_report_restore_copies() -> None:
    model = build("timm")
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    report = pyvit.accelerate(model, token_merging=4)
    assert any(row.note == "token merging, r = 4" for row in report.replaced)
    assert any(row.note == "token merging, r = 4" for row in report.refresh().replaced)
    merged = model(x)
    assert (merged - want).abs().max() > 1e-4
    torch.testing.assert_close(copy.deepcopy(model)(x), merged)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), merged)
    pyvit.accelerate(model)  # without merging
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    pyvit.restore(model)
    assert torch.equal(model(x), want)


def test_compiled() -> None:
    model = build("pyvit")
    pyvit.accelerate(model, token_merging=4)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        want = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)


def test_autocast() -> None:
    model = build("pyvit")
    pyvit.accelerate(model, token_merging=2)
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert (out - model(x)).norm() / out.norm() < 0.05


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "r must be an int"),
        (1.5, "r must be an int"),
        ("4", "r must be an int"),
        ((1, 2), "each of 3 blocks, got 2"),
    ],
)
def test_bad_numbers(r: object, message: str) -> None:
    model = build("pyvit")
    with pytest.raises(ValueError, match=message):
        pyvit.accelerate(model, token_merging=r)


def test_models_that_cannot_merge() -> None:
    with pytest.raises(ValueError, match="needs a VisionTransformer"):
        pyvit.accelerate(torch.nn.Linear(3, 3), token_merging=2)
    with pytest.raises(ValueError, match="rotary positions"):
        pyvit.accelerate(build("pyvit", pos_embed="rope"), token_merging=2)
    timm = peer("timm").models.vision_transformer
    with pytest.raises(ValueError, match="ResPostBlock"):
        pyvit.accelerate(build("timm", block_fn=timm.ResPostBlock), token_merging=2)
    model = build("timm")
    pyvit.accelerate(model, token_merging=2)
    with pytest.raises(ValueError, match="attn_mask must be None"):
        model(torch.randn(1, 3, 32, 32), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("library", ["pyvit", "timm"])
@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn"])
def test_hooks_are_called(library: str, path: str) -> None:
    """Of layers that merging does not call: the original runs, and the report says so."""
    model = build(library)
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    report, seen = pyvit.accelerate(model, token_merging=4), []
    merged = model(x)
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert seen == [(2, 17, 32)]
    assert any("a hook watches its " + path in row.note for row in report.refresh().left)
    handle.remove()
    assert torch.equal(model(x), merged)
