"""pyvit.quantize on models of timm, transformers, torchvision and open_clip."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import pyvit
from pyvit import integrations, library
from pyvit.integrations import timm as timm_rules
from pyvit.integrations.multihead import MultiheadAttention
from pyvit.nn import QuantizedLinear
from tests import peers
from tests.integrations import models
from tests.integrations import transformers_models as hf
from tests.models.parity import randomise

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")

Call = Callable[[nn.Module], Tensor]
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32}


def timm(name: str, **config: object) -> tuple[nn.Module, Call]:
    return models.timm(name, **config), models.on(32, 32)


def mae() -> tuple[nn.Module, Call]:
    pixels, noise = hf.draw(2, 3, 32, 32), torch.rand(2, 16, generator=torch.Generator().manual_seed(5))
    model = hf.build("ViTMAE", {**hf.TINY, **hf.IMAGE, "mask_ratio": 0.5})
    return model, lambda m: m(pixels.to(hf.dtype_of(m)), noise=noise)[0]


def torchvision_swin(version: str) -> tuple[nn.Module, Call]:
    swin = peers.torchvision().models.swin_transformer
    kinds = {"V2": {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}}
    sizes = ([4, 4], 32, [2, 2], [2, 4], [4, 4])
    model = swin.SwinTransformer(*sizes, stochastic_depth_prob=0.0, num_classes=7, **kinds.get(version, {}))
    return randomise(model).eval(), models.on(32, 32)


def open_clip() -> tuple[nn.Module, Call]:
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    model = randomise(peers.peer("open_clip").CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)).eval()
    images, words = torch.randn(2, 3, 32, 32), torch.randint(1, 49, (2, 10))

    def call(m: nn.Module) -> Tensor:
        images_of, m.attn_mask = models.like(m, images), models.like(m, m.attn_mask)
        return torch.cat((m.encode_image(images_of), m.encode_text(words)))

    return model, call


#: Name -> the model and a call, how many layers are quantized, and the names of those that are left.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Call]], int, set[str]]] = {
    "timm ViT": (lambda: timm("vit_tiny_patch16_224", **VIT), 8, {"head"}),
    "timm DeiT": (lambda: timm("deit_tiny_distilled_patch16_224", **VIT), 8, {"head", "head_dist"}),
    "timm DINOv2": (lambda: timm("vit_small_patch14_reg4_dinov2", **VIT), 8, {"head"}),
    "timm DINOv3": (lambda: timm("vit_small_patch16_dinov3", **VIT), 8, {"head"}),
    "timm EVA-02": (lambda: timm("eva02_tiny_patch14_224", **VIT), 8, {"head"}),
    "timm EVA-02 base": (lambda: timm("eva02_base_patch14_224", **VIT), 14, {"head"}),
    "timm Swin": (lambda: timm("swin_tiny_patch4_window7_224", **SWIN), 16, {"reduction", "fc"}),
    "timm Swin V2": (lambda: timm("swinv2_tiny_window8_256", **SWIN), 16, {"0", "2", "reduction", "fc"}),
    "ViT": (lambda: hf.images("ViT", {**hf.TINY, **hf.IMAGE}), 12, {"dense"}),
    "DeiT": (lambda: hf.images("DeiT", {**hf.TINY, **hf.IMAGE}), 12, {"dense"}),
    "DINOv2": (lambda: hf.images("Dinov2WithRegisters", {**hf.TINY, **hf.IMAGE, "mlp_ratio": 2}), 12, set()),
    "DINOv3": (lambda: hf.images("DINOv3ViT", {**hf.TINY, **hf.IMAGE}), 12, set()),
    "Swin": (lambda: hf.images("Swin", hf.SWIN, (29, 43)), 24, {"reduction"}),
    "Swin V2": (lambda: hf.images("Swinv2", hf.SWIN), 24, {"0", "2", "reduction"}),
    "CLIP": (lambda: hf.image_and_text("CLIP"), 24, {"visual_projection", "text_projection"}),
    "SigLIP": (lambda: hf.image_and_text("Siglip"), 28, {"head"}),
    "MAE": (mae, 12, set()),
    "AST": (hf.spectrogram, 12, set()),
    "torchvision ViT": (models.MODELS["torchvision vit"], 4, {"head"}),
    "torchvision Swin": (lambda: torchvision_swin("V1"), 16, {"reduction", "head"}),
    "torchvision Swin V2": (lambda: torchvision_swin("V2"), 16, {"0", "2", "reduction", "head"}),
    "open_clip": (open_clip, 16, set()),
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(name: str) -> tuple[nn.Module, Call]:
    torch.manual_seed(1)
    model, call = MODELS[name][0]()
    return model.eval(), call


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float(), b.float(), dim=-1).min())


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("name", MODELS)
def test_quantize_and_back(name: str) -> None:
    """Close outputs in float32 and bfloat16, a report of every linear layer, and the original's bits at the end."""
    (model, call), (_, count, left) = build(name), MODELS[name]
    wanted, linears = call(model), sum(isinstance(m, nn.Linear) for m in model.modules())
    report = pyvit.quantize(model)
    found = quantized(model)
    assert [layer.name for layer in report.quantized] == found
    assert len(found) == count, report
    assert {layer.name.rpartition(".")[2] for layer in report.left} == left, report
    attentions = sum(isinstance(m, MultiheadAttention) for m in model.modules())  # whose in_proj was no layer
    assert len(report.layers) == linears + attentions
    assert all(0 < layer.error < 0.05 for layer in report.quantized), report
    out = call(model)
    assert not torch.equal(out, wanted)
    assert float((out - wanted).norm() / wanted.norm()) < 0.05
    assert cosine(out, wanted) > 0.998
    assert cosine(call(copy.deepcopy(model).bfloat16()), wanted) > 0.995
    assert pyvit.dequantize(model) == count
    assert not integrations.is_accelerated(model)
    assert torch.equal(call(model), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_called_or_fused(name: str) -> None:
    """Nothing runs on the float weights: with hooks, each int8 layer is called once, with the same result."""
    model, call = build(name)
    pyvit.quantize(model, reversible=False)
    wanted, seen = call(model), set()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(lambda *_, path=path: seen.add(path))
    found = call(model)
    assert seen >= set(quantized(model)) - {"head.attention.in_proj"}
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin"])
def test_timm_branches_are_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual branch with int8 weights is one call of the library."""
    model, call = build(name)
    pyvit.quantize(model)
    calls = []
    branch = "quantized_window_attention" if "Swin" in name else "quantized_attention"
    given = getattr(timm_rules, branch)

    def counted(*args: object) -> Tensor | None:
        out = given(*args)
        calls.append(out is not None and args[-1] is not None)  # with a residual
        return out

    monkeypatch.setattr(timm_rules, branch, counted)
    call(model)
    assert calls == [True] * len([m for m in model.modules() if type(m).__name__.endswith("Block")])


def test_timm_rotary_blocks_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 layers of a rotary block take the residual sums; a call that needs the float weights says so."""
    model, call = build("timm DINOv3")
    pyvit.quantize(model)
    calls, given = [], timm_rules._rotary_branch

    def counted(*args: object) -> Tensor:
        calls.append(len(args) == 6)  # with a residual
        return given(*args)

    monkeypatch.setattr(timm_rules, "_rotary_branch", counted)
    call(model)
    assert calls == [True] * 2
    model, _ = build("timm EVA-02")
    pyvit.quantize(model)
    tokens, rope = torch.randn(2, 17, 48), torch.ones(16, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dequantize"):
        model.blocks[0].attn(tokens, rope)


def test_a_model_that_is_accelerated_stays_so() -> None:
    model, call = build("timm ViT")
    pyvit.accelerate(model)
    wanted = call(model)
    pyvit.quantize(model)
    pyvit.dequantize(model)
    assert integrations.is_accelerated(model)
    assert torch.equal(call(model), wanted)
    pyvit.quantize(model)
    found = call(model)
    replaced = [row.path for row in pyvit.accelerate(copy.deepcopy(build("timm ViT")[0])).replaced]
    report = pyvit.accelerate(model)  # again, with int8 weights
    assert [row.path for row in report.replaced] == replaced
    assert not report.left
    assert torch.equal(call(model), found)


def test_errors_leave_the_model() -> None:
    for name in ("open_clip", "timm Swin V2"):
        model, call = build(name)
        wanted, keys = call(model), list(model.state_dict())
        layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-4]
        layer.weight[0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"quantize: .*: weight and bias must be finite"):
            pyvit.quantize(model)
        layer.weight[0, 0] = 0
        assert list(model.state_dict()) == keys
        assert not integrations.is_accelerated(model)
        assert call(model).shape == wanted.shape


def test_kept_layers_and_tolerance() -> None:
    """A torch attention none of whose layers is quantized is put back; one of them is enough to keep ours."""
    model, call = build("torchvision ViT")
    wanted = call(model)
    report = pyvit.quantize(model, keep="*self_attention*")
    assert len(report.quantized) == 2
    assert any(type(m) is nn.MultiheadAttention for m in model.modules())
    pyvit.dequantize(model)
    images = torch.randn(2, 3, 16, 16)
    error = pyvit.quantize(model, images).error
    pyvit.dequantize(model)
    report = pyvit.quantize(model, images, tolerance=error / 2)
    assert report.error <= error / 2
    assert cosine(call(model), wanted) > 0.998
    pyvit.dequantize(model)
    assert torch.equal(call(model), wanted)


def test_what_runs_other_code_is_left_with_its_reason() -> None:
    model, call = build("timm ViT")

    class Mine(type(model.blocks[0].attn)):
        def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
            return super().forward(x, *args, **kwargs) * 2

    model.blocks[0].attn.__class__ = Mine
    wanted = call(model)
    report = pyvit.quantize(model)
    reasons = {layer.name: layer.note for layer in report.left}
    assert reasons["blocks.0.attn.qkv"].startswith("pyvit.accelerate leaves blocks.0.attn: ")
    assert "blocks.1.attn.qkv" in quantized(model)
    assert cosine(call(model), wanted) > 0.998


@pytest.mark.parametrize("name", ["timm Swin V2", "torchvision Swin"])
def test_originals_that_read_int8_weights_are_refused(name: str) -> None:
    """Not torch's message about dtypes, where the library's own forward multiplies the weight itself."""
    model, call = build(name)
    pyvit.quantize(model)
    wanted = call(model)
    with pytest.raises(RuntimeError, match=r"original forward, which reads the weights of .* int8"):
        pyvit.restore(model)
    assert torch.equal(call(model), wanted)
    for module in model.modules():
        if type(module).__name__ == "ShiftedWindowAttention":
            module.train()
            module.attention_dropout = 1.0
        elif type(module).__name__ == "WindowAttention":
            module.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"original forward, which reads the weights of .* int8"):
        call(model)


def test_training_is_refused() -> None:
    model, call = build("ViT")
    pyvit.quantize(model)
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match=r"layers.0.attention.q_proj: int8 weights are for inf"),
    ):
        call(model.train())


@pytest.mark.parametrize("name", ["timm Swin", "ViT", "torchvision ViT", "open_clip"])
def test_copies_pickles_and_state_dicts(name: str) -> None:
    model, call = build(name)
    before = call(model)
    pyvit.quantize(model)
    wanted = call(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(call(other), wanted)
        pyvit.dequantize(other)
        assert not integrations.is_accelerated(other)
        assert torch.equal(call(other), before)
    other = randomise(copy.deepcopy(build(name)[0]), seed=7)
    pyvit.quantize(other, reversible=False)
    assert not torch.equal(call(other), wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(call(other), wanted)
    assert pyvit.dequantize(other) == len(quantized(model))
    assert not any(isinstance(m, MultiheadAttention) for m in other.modules())
    assert cosine(call(other), wanted) > 0.998


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_torch_attention(batch_first: bool, weights: bool) -> None:
    """Masks, other keys than queries, unbatched inputs and probabilities, as torch's module."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)

        def forward(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
            return self.attention(*args, need_weights=weights, **kwargs)

    model = randomise(Holder()).eval()
    x, y = torch.randn(5, 9, 32), torch.randn(5, 9, 32)
    n, b = (9, 5) if batch_first else (5, 9)
    padding = torch.arange(n) >= torch.randint(2, n + 1, (b, 1))
    bools, floats = torch.ones(n, n).triu(1).bool(), torch.full((n, n), -torch.inf).triu(1)
    calls: list[tuple[tuple[Tensor, ...], dict[str, object]]] = [
        ((x, x, x), {}),
        ((x, y, y), {}),
        ((x, y, x), {}),
        ((x[0], x[0], x[0]), {}),
        ((x, x, x), {"attn_mask": bools, "is_causal": True}),
        ((x, x, x), {"attn_mask": floats}),
        ((x, x, x), {"attn_mask": torch.randn(b * 4, n, n)}),
        ((x, x, x), {"key_padding_mask": padding}),
        ((x, x, x), {"key_padding_mask": padding, "attn_mask": bools}),
        ((x, x, x), {"key_padding_mask": torch.zeros(b, n).masked_fill(padding, -torch.inf), "attn_mask": floats}),
        ((x, x, x), {"average_attn_weights": False} if weights else {}),
    ]
    wanted = [model(*args, **options) for args, options in calls]
    pyvit.quantize(model)
    assert type(model.attention) is MultiheadAttention
    for (args, options), (out, probabilities) in zip(calls, wanted, strict=True):
        found, given = model(*args, **options)
        assert found.shape == out.shape
        assert float((found - out).norm() / out.norm()) < 0.03
        assert (given is None) == (probabilities is None)
        if given is not None:
            assert given.shape == probabilities.shape
            assert float((given - probabilities).norm() / probabilities.norm()) < 0.05
    with pytest.raises(RuntimeError, match="is_causal needs attn_mask"):
        model(x, x, x, is_causal=True)
    pyvit.dequantize(model)
    for (args, options), (out, _) in zip(calls, wanted, strict=True):
        assert torch.equal(model(*args, **options)[0], out)


def test_torch_encoder_layers_are_left() -> None:
    """They read the weights of their attention."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    wanted = layer(x)
    report = pyvit.quantize(layer)
    assert "TransformerEncoderLayer reads" in {row.name: row.note for row in report.left}["self_attn.out_proj"]
    assert torch.equal(layer(x), wanted)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def test_in_another_process() -> None:
    """As a DataLoader's worker gets a model that its data set or collate function holds."""
    model, _ = build("torchvision ViT")
    pyvit.quantize(model)
    images = torch.randn(2, 3, 16, 16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(_logits, (model, images)), _logits(model, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["timm ViT", "timm Swin", "timm Swin V2", "ViT", "torchvision ViT", "torchvision Swin", "open_clip"]
)
def test_compile_and_export(name: str) -> None:
    model, call = build(name)
    pyvit.quantize(model)
    wanted = call(model)
    torch._dynamo.reset()
    if name == "open_clip":
        images = torch.randn(2, 3, 32, 32)
        compiled = torch.compile(model.visual, fullgraph=True)
        torch.testing.assert_close(compiled(images), model.visual(images), rtol=1e-2, atol=5e-3)
        return
    found = call(torch.compile(model, fullgraph=True))
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    exported = torch.export.export(model, (torch.randn(2, 3, *((16, 16) if name == "torchvision ViT" else (32, 32))),))
    saved = io.BytesIO()
    torch.export.save(exported, saved)
    saved.seek(0)
    out = call(torch.export.load(saved).module())
    assert float((out - wanted).norm() / wanted.norm()) < 0.02
