"""pyvit.quantize and pyvit.dequantize on pyvit's models."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import pyvit
from pyvit import library
from pyvit.models import create_model
from pyvit.nn import Block, QuantizedLinear
from pyvit.quantization import layers
from tests.ops.test_linear_int8 import ISAS

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 10}
MODELS = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "registers and LayerScale": ("vit_small_patch14_reg4_dinov2", TINY | {"num_classes": 0}),
    "SwiGLU": ("vit_tiny_patch16_224", TINY | {"activation": "swiglu"}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4)}),
    "swin v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4)},
    ),
}


def build(name: str = "vit", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model whose parameters are all drawn, LayerScale and heads included, and images for it."""
    registered, settings = MODELS[name]
    model = create_model(registered, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif not p.any():
                p.normal_(std=0.1)
    size = settings["img_size"]
    return model.to(dtype), torch.randn(3, 3, size, size).to(dtype)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.float(), b.float(), dim=-1).min())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_quantize_and_back(name: str, dtype: torch.dtype) -> None:
    """Of every family: close outputs, dense features too, a report of every linear layer, and the original back."""
    model, images = build(name, dtype)
    wanted, features = model(images), model.forward_features(images)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    report = pyvit.quantize(model, images)
    assert [layer.name for layer in report.layers] == linears
    found = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert found == {layer.name for layer in report.quantized}
    assert {n.rpartition(".")[2] for n in found} == {"qkv", "proj", "fc1", "fc2"}
    assert all(0 < layer.error < 0.03 for layer in report.quantized)
    assert {layer.note for layer in report.left} <= {"not in a residual branch that pyvit computes"}
    out = model(images)
    assert out.dtype == dtype
    assert not torch.equal(out, wanted)
    assert report.error == pytest.approx(float((out - wanted).float().norm() / wanted.float().norm()), rel=1e-3)
    assert report.error < 0.05
    assert cosine(out, wanted) > 0.998
    assert report.dense[0] > 0.999
    assert report.dense[1] > 0.998
    assert "tokens' features" in str(report)
    assert cosine(model.forward_features(images), features) > 0.998
    assert all(text in str(report) for text in (linears[0], "output: relative error", "1 calibration batch"))
    assert pyvit.dequantize(model) == len(found)
    assert torch.equal(model(images), wanted)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_fused_branches_are_the_layers_one_by_one(name: str) -> None:
    """A branch in one call of the library has the bits of its layers called one after another, residual included."""
    model, images = build(name)
    pyvit.quantize(model)
    wanted, calls = model(images), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_hook(count)
    found = model(images)
    assert calls == 8 if name == "vit" else 16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-3)  # layer norm outside rounds ties another way


def test_state_dicts() -> None:
    """Through safetensors into another quantized model; a quarter of the weights' bytes."""
    model, images = build()
    size = len(save(model.state_dict()))
    pyvit.quantize(model)
    wanted, saved = model(images), save(model.state_dict())
    state = load(saved)
    assert state["blocks.0.attn.qkv.weight"].dtype == torch.int8
    assert state["blocks.0.attn.qkv.weight_scale"].shape == (192,)
    assert len(saved) < 0.45 * size  # the embedding and the head of so small a model are much of it
    other, _ = build()
    pyvit.quantize(other)
    assert not torch.equal(other(images), wanted)
    other.load_state_dict(state)
    assert torch.equal(other(images), wanted)
    # The originals of `other` are no longer what its int8 weights stand for.
    pyvit.dequantize(other)
    layer = other.blocks[0].attn.qkv
    assert torch.equal(
        layer.weight, state["blocks.0.attn.qkv.weight"] * state["blocks.0.attn.qkv.weight_scale"][:, None]
    )
    assert cosine(other(images), wanted) > 0.999


def test_copies_and_pickles() -> None:
    model, images = build()
    pyvit.quantize(model)
    wanted = model(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(images), wanted)
        assert other.blocks[0].attn.qkv.packed is not model.blocks[0].attn.qkv.packed
        pyvit.dequantize(other)
        assert not any(isinstance(m, QuantizedLinear) for m in other.modules())
    with torch.inference_mode():
        other = copy.deepcopy(model)
        assert torch.equal(other(images), wanted)
        pyvit.quantize(build()[0])
    assert not any(m.weight.is_inference() for m in other.modules() if isinstance(m, QuantizedLinear))


def test_casts_keep_the_scales() -> None:
    model, images = build()
    pyvit.quantize(model)
    wanted, scale = model(images), model.blocks[0].mlp.fc1.weight_scale.clone()
    model.bfloat16()
    assert torch.equal(model.blocks[0].mlp.fc1.weight_scale, scale)
    assert cosine(model(images.bfloat16()), wanted) > 0.999
    pyvit.dequantize(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert cosine(model(images.bfloat16()), wanted) > 0.998


def test_autocast() -> None:
    model, images = build()
    wanted = model(images)
    pyvit.quantize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images)
    assert cosine(found, wanted) > 0.998


def test_not_reversible() -> None:
    model, images = build()
    pyvit.quantize(model, reversible=False)
    wanted = model(images)
    assert not any(m.original for m in model.modules() if isinstance(m, QuantizedLinear))
    pyvit.dequantize(model)
    found = model(images)
    assert cosine(found, wanted) > 0.999


def test_training_is_refused() -> None:
    model, images = build()
    pyvit.quantize(model)
    with torch.enable_grad():
        with pytest.raises(RuntimeError, match=r"QuantizedLinear blocks.0.attn.qkv: int8 weights are for inference"):
            model.train()(images)
        out = model.eval()(images)
        assert torch.equal(out, model(images))
        with pytest.raises(RuntimeError, match=r"QuantizedLinear blocks.1.mlp.fc.: int8 weights have no gradient"):
            out.sum().backward()
    with torch.no_grad():
        model.train()(images)  # a frozen tower of a model that is trained


def test_what_is_kept() -> None:
    model, images = build()
    report = pyvit.quantize(model, keep=("blocks.0.*", "*.mlp.fc2"))
    assert [layer.name for layer in report.quantized] == ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert {layer.name: layer.note for layer in report.left}["blocks.0.attn.qkv"] == "keep='blocks.0.*'"
    assert model(images).isfinite().all()  # mixed: fc1 is quantized, fc2 is not
    again = pyvit.quantize(model)
    assert {layer.note for layer in again.left} >= {"is quantized already"}
    assert len(again.quantized) == 5
    assert pyvit.dequantize(model) == 8


def test_tolerance_puts_layers_back() -> None:
    model, images = build()
    wanted = model(images)
    loose = pyvit.quantize(model, images)
    pyvit.dequantize(model)
    tolerance = 0.7 * loose.error
    report = pyvit.quantize(model, images, tolerance=tolerance)
    back = [layer for layer in report.left if "tolerance" in layer.note]
    assert report.error <= tolerance
    assert back
    assert report.quantized
    assert float((model(images) - wanted).norm() / wanted.norm()) == pytest.approx(report.error, rel=1e-3)
    pyvit.dequantize(model)
    assert torch.equal(model(images), wanted)


def sensitive() -> tuple[nn.Module, Tensor]:
    """A model whose first attention is sharp, so that rounding its input turns some tokens to others."""
    model, images = build()
    model.blocks[0].attn.qkv.weight[:128] *= 150
    return model, images


def test_the_worst_token_is_bounded() -> None:
    """Layers are put back for one token, though the mean is within its tolerance: first those that turn it."""
    model, images = sensitive()
    wanted, before = model(images), model.forward_features(images)
    free = pyvit.quantize(model, images, least_cosine=None)
    assert cosine(model.forward_features(images), before) == pytest.approx(free.dense[1], abs=1e-6)
    pyvit.dequantize(model)
    limit = 1 - (1 - min(free.dense[1], free.cosine)) / 3
    assert free.dense[0] > limit
    report = pyvit.quantize(model, images, tolerance=2 * free.error, least_cosine=limit)
    assert cosine(model.forward_features(images), before) >= limit - 1e-6
    assert min(report.dense[1], report.cosine) >= limit
    back = {layer.name: layer.note for layer in report.left if "to meet" in layer.note}
    assert f"cosines of {limit:g}" in back["blocks.0.attn.qkv"]
    assert len(back) < 6
    pyvit.dequantize(model)
    assert torch.equal(model(images), wanted)


def test_the_median_is_bounded_by_half_of_the_loss() -> None:
    model, images = build()
    for block in model.blocks:
        block.mlp.fc2.weight.mul_(100)
    free = pyvit.quantize(model, images, least_cosine=None)
    pyvit.dequantize(model)
    limit = 1 - 1.5 * (1 - min(free.dense[1], free.cosine))
    half = (1 + limit) / 2
    assert free.dense[0] > half
    assert len(pyvit.quantize(model, images, least_cosine=limit).quantized) == 8
    pyvit.dequantize(model)
    limit = 1 - 1.5 * (1 - free.dense[0])
    report = pyvit.quantize(model, images, least_cosine=limit)
    assert report.dense[0] >= (1 + limit) / 2
    assert report.dense[1] >= limit


def test_tokens_of_texts_are_measured() -> None:
    """Not only the one token that becomes the text's embedding."""
    model = create_model("clip_pico_patch8_64").eval().text
    text = torch.randint(1, 200, (4, model.context_length))
    wanted = model.forward_features(text)
    report = pyvit.quantize(model, text)
    assert cosine(model.forward_features(text), wanted) == pytest.approx(report.dense[1], abs=1e-6)
    assert "forward_features" not in vars(model)


def test_one_image_is_enough_to_calibrate_on() -> None:
    model, images = build()
    wanted = model.forward_features(images[:1])
    report = pyvit.quantize(model, images[:1])
    assert 0 < report.error < 0.05
    assert cosine(model.forward_features(images[:1]), wanted) == pytest.approx(report.dense[1], abs=1e-6)
    assert report.dense[1] >= 0.998


def test_heads_of_zeros_say_nothing() -> None:
    model, images = build()
    model.head.weight.zero_()
    model.head.bias.zero_()
    report = pyvit.quantize(model, images)
    assert math.isnan(report.cosine)
    assert report.error == 0
    assert len(report.quantized) == 8


class Drawn(nn.Module):
    """Draws which tokens it keeps, as a masked autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[:, torch.randperm(x.shape[1])])


def test_models_that_draw_are_measured_on_the_same_draw() -> None:
    model, state = Drawn().eval(), torch.get_rng_state()
    report = pyvit.quantize(model, torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0)))
    assert 0 < report.error < 0.05
    assert len(report.quantized) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_calibrations() -> None:
    model, images = build()
    for calibration in (images, [images, images], [(images, torch.zeros(3))], [{"images": images}], {"images": images}):
        report = pyvit.quantize(model, calibration)
        assert report.error > 0
        assert "calibration batch" in report.source
        pyvit.dequantize(model)
    assert pyvit.quantize(model).source == "random inputs"
    block = Block(32, 2).eval()
    report = pyvit.quantize(block)
    assert report.source == "random rows"
    assert math.isnan(report.error)
    assert all(0 < layer.error < 0.03 for layer in report.quantized)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_errors_name_the_layer_and_leave_the_model(where: str) -> None:
    model, images = build()
    wanted = model(images)
    bad = getattr(model.blocks[1].mlp.fc1, where)
    before = bad.clone()
    bad.view(-1)[3] = float("nan")
    with pytest.raises(ValueError, match=r"quantize: blocks.1.mlp.fc1: weight and bias must be finite"):
        pyvit.quantize(model)
    bad.copy_(before)
    with pytest.raises(ValueError, match=r"keep: no linear layer is called 'blocks.7.\*'"):
        pyvit.quantize(model, keep="blocks.7.*")
    with pytest.raises(ValueError, match="calibration does not fit the model: in patch_embed: "):
        pyvit.quantize(model, torch.randn(2, 4, 32, 32))
    with pytest.raises(ValueError, match="calibration does not fit the model: "):
        pyvit.quantize(model, torch.randn(2, 3, 4, 4))
    with pytest.raises(TypeError, match="calibration must be a tensor, a dictionary"):
        pyvit.quantize(model, [3])
    with pytest.raises(ValueError, match="at least one batch"):
        pyvit.quantize(model, [])
    with pytest.raises(ValueError, match="tolerance must be positive"):
        pyvit.quantize(model, tolerance=0.0)
    for least in (1.0, -1.5, float("nan")):
        with pytest.raises(ValueError, match="least_cosine must be in"):
            pyvit.quantize(model, least_cosine=least)
    for dtype in (torch.float64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=rf"blocks.0.attn.qkv: weight must be .*, got {dtype}"):
            pyvit.quantize(copy.deepcopy(model).to(dtype))
    block = Block(32, 2)
    with pytest.raises(ValueError, match="tolerance needs calibration"):
        pyvit.quantize(block, tolerance=0.1)
    for each in (model, block):
        assert not any(isinstance(m, QuantizedLinear) for m in each.modules())
    assert torch.equal(model(images), wanted)


def test_state_dicts_of_models_that_are_not_quantized_are_refused() -> None:
    """Both ways: float weights are not cut to integers, and integers are not taken for weights."""
    model, images = build()
    state = model.state_dict()
    pyvit.quantize(model, keep="blocks.0.*")
    wanted = model(images)
    with pytest.raises(
        RuntimeError, match=r"blocks.1.mlp.fc1: weight is int8 here and torch.float32 in the state dict"
    ):
        model.load_state_dict(state, strict=False)
    half, _ = build()
    with pytest.raises(RuntimeError, match=r"blocks.1.attn.qkv: weight is int8 in the state dict"):
        half.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(images), wanted)


def test_zero_channels_and_zero_layers() -> None:
    model, images = build()
    model.blocks[0].mlp.fc1.weight[5] = 0
    model.blocks[1].attn.proj.weight.zero_()
    wanted = model(images)
    report = pyvit.quantize(model, images)
    assert {layer.name: layer.error for layer in report.layers}["blocks.1.attn.proj"] < 1e-6
    assert cosine(model(images), wanted) > 0.998


def with_outliers() -> tuple[nn.Module, Tensor]:
    """A model with channels much larger than the others, as trained transformers have them."""
    model, images = build()
    for block in model.blocks:
        for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[[7, 30]] *= 40
            layer.weight[:, [7, 30]] /= 20
        block.mlp.fc2.weight[11] *= 10
    return model, images


def test_outliers_are_moved_into_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are divided by powers of two where that helps: in the layer norm of fused branches, and before the layer
    where it is called alone."""
    model, images = with_outliers()
    wanted = model(images)
    with monkeypatch.context() as without:
        without.setattr(layers, "HELPS", 0.0)
        plain = pyvit.quantize(model, images)
    pyvit.dequantize(model)
    report = pyvit.quantize(model, images)
    scaled = {layer.name.rpartition(".")[2] for layer in report.quantized if "scaled" in layer.note}
    assert scaled == {"qkv", "fc1"}
    assert report.error < 0.6 * plain.error
    assert report.dense[1] > 0.998
    layer = model.blocks[0].mlp.fc1
    assert torch.equal(layer.smoothing.log2(), layer.smoothing.log2().round())
    found = model(images)
    handle = layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(images), found, rtol=2e-2, atol=5e-3)
    handle.remove()
    smoothing = layer.smoothing.clone()
    assert torch.equal(model.bfloat16().blocks[0].mlp.fc1.smoothing, smoothing)
    assert pyvit.dequantize(model.float()) == 8
    torch.testing.assert_close(model(images), wanted, rtol=2e-2, atol=2e-2)  # its parameters were bfloat16 for a while


def test_factors_in_state_dicts() -> None:
    """Whatever factors the model has that loads."""
    (one, images), (other, _) = with_outliers(), build()
    for model in (one, other):
        pyvit.quantize(model)
    wanted, state = one(images), copy.deepcopy(one.state_dict())
    others = other(images), copy.deepcopy(other.state_dict())
    assert "blocks.0.mlp.fc1.smoothing" in state
    other.load_state_dict(state)
    assert torch.equal(other(images), wanted)
    other.load_state_dict(others[1])
    assert torch.equal(other(images), others[0])
    other.load_state_dict(state)
    pyvit.dequantize(other)
    assert cosine(other(images), wanted) > 0.999


def test_flop_counters() -> None:
    """int8 multiply-adds count as those of the model before."""
    from torch.utils.flop_counter import FlopCounterMode

    model, images = build()
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(images)
        counts.append(counter.get_total_flops())
        pyvit.quantize(model)
    assert counts[0] == counts[1] > 0


SEEN = "from tests.test_quantization import report_of_instruction_set as report; report({path!r})"


def report_of_instruction_set(path: str) -> None:
    """What a model of each kind gives, and whether its int8 layers give the same bits, in a file."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in ("vit", "swin"):
            model, images = build(name)
            pyvit.quantize(model, images, least_cosine=None)
            found[name] = model(images)
            for path_of, module in model.named_modules():
                if isinstance(module, QuantizedLinear):
                    rows = torch.randn(70, module.in_features, generator=torch.Generator().manual_seed(1))
                    found[f"{name} {path_of}"] = module(rows)
    torch.save(found | {"isa": torch.ops.pyvit.int8_isa()}, path)


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get("PYVIT_CPU_ISA")), reason="an instruction set is forced already")
def test_whole_models_on_every_instruction_set(tmp_path: Path) -> None:
    """Weights, scales and every int8 layer have the same bits. Attention between them has not: sums and exponentials
    depend on the width of a vector, and an input next to a tie is then rounded to the other side."""
    report_of_instruction_set(str(tmp_path / "here"))
    wanted = torch.load(tmp_path / "here")
    seen = {wanted.pop("isa")}
    for isa in ISAS:
        path = tmp_path / isa
        environment = {**os.environ, "PYVIT_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", SEEN.format(path=str(path))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if isa in seen or "not supported by this processor" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found = torch.load(path)
        seen.add(found.pop("isa"))
        for name, out in found.items():
            if " " in name:
                assert torch.equal(out, wanted[name]), f"{isa}: {name}"
            else:
                error = float((out - wanted[name]).norm() / wanted[name].norm())
                assert error < 2e-3, f"{isa}: {name}: {error:.1e}"
    assert len(seen) > 1


@pytest.mark.slow
def test_aotinductor_package(tmp_path: Path) -> None:
    """Compiled ahead of time, written and read again: a minute of a C++ compiler, so of one model."""
    model, images = build()
    pyvit.quantize(model)
    wanted = model(images)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (images,)), package_path=path)
    found = torch._inductor.aoti_load_package(path)(images)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_compile_and_export(name: str) -> None:
    model, images = build(name)
    pyvit.quantize(model)
    wanted = model(images)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), wanted, rtol=1e-2, atol=2e-3)
    saved = io.BytesIO()
    torch.export.save(torch.export.export(model, (images,)), saved)
    saved.seek(0)
    torch.testing.assert_close(torch.export.load(saved).module()(images), wanted, rtol=1e-2, atol=2e-3)
