"""pyvit.quantization.save and load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyvit
from pyvit import integrations, library, quantization
from pyvit.nn import QuantizedLinear
from tests.integrations import test_quantize as others
from tests.test_quantization import MODELS, build, with_outliers

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_meta(name: str) -> nn.Module:
    registered, settings = MODELS[name]
    with torch.device("meta"):
        return pyvit.create_model(registered, **settings).eval()


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, meta: bool, tmp_path: Path) -> None:
    """Into a model that has other weights, or none: the same bits."""
    model, images = build(name)
    pyvit.quantize(model, keep="*.0.*fc1")
    wanted = model(images)
    quantization.save(model, tmp_path / "model.safetensors")
    other = on_meta(name) if meta else build(name)[0]
    assert quantization.load(other, tmp_path / "model.safetensors") is other
    assert not other.training
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert torch.equal(other(images), wanted)
    assert [n for n, m in other.named_modules() if isinstance(m, QuantizedLinear)] == [
        n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)
    ]
    assert torch.equal(quantization.load(other, tmp_path / "model.safetensors")(images), wanted)  # quantized by now
    pyvit.dequantize(other)
    assert torch.cosine_similarity(other(images), wanted, -1).min() > 0.998


@pytest.mark.parametrize("name", ["timm Swin", "ViT", "CLIP", "torchvision ViT", "open_clip"])
def test_models_of_other_libraries(name: str, tmp_path: Path) -> None:
    model, call = others.build(name)
    pyvit.quantize(model)
    wanted = call(model)
    quantization.save(model, tmp_path / "model.safetensors")
    other = others.randomise(others.build(name)[0], seed=9)
    quantization.load(other, tmp_path / "model.safetensors")
    assert torch.equal(call(other), wanted)
    pyvit.dequantize(other)
    assert not integrations.is_accelerated(other)
    assert torch.cosine_similarity(call(other), wanted, -1).min() > 0.998


def test_scaled_channels(tmp_path: Path) -> None:
    model, images = with_outliers()
    pyvit.quantize(model, images)
    assert any(m.smoothing is not None for m in model.modules() if isinstance(m, QuantizedLinear))
    quantization.save(model, tmp_path / "model.safetensors")
    assert torch.equal(quantization.load(on_meta("vit"), tmp_path / "model.safetensors")(images), model(images))


def test_a_quarter_of_the_size(tmp_path: Path) -> None:
    model = pyvit.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    pyvit.quantize(model)
    quantization.save(model, tmp_path / "int8.safetensors")
    sizes = [(tmp_path / f"{kind}.safetensors").stat().st_size for kind in ("int8", "float")]
    assert sizes[0] < 0.3 * sizes[1]


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.block = nn.Linear(32, 32), nn.Linear(32, 32), pyvit.nn.Block(32, 2)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.block(self.a(x)))

    model, x = Twice().eval(), torch.randn(2, 5, 32)
    pyvit.quantize(model)
    quantization.save(model, tmp_path / "model.safetensors")
    assert not {"a.weight", "b.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    with torch.device("meta"):
        empty = Twice()
    for other in (Twice(), empty):
        assert torch.equal(quantization.load(other, tmp_path / "model.safetensors")(x), model(x))


def test_errors_name_what_does_not_fit_and_leave_the_model(tmp_path: Path) -> None:
    model, images = build()
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="save: the model has no quantized layer"):
        quantization.save(model, path)
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match="holds no quantized layer"):
        quantization.load(model, path)
    pyvit.quantize(model)
    quantization.save(model, path)
    state = load_file(path)
    other, _ = build()
    wanted = other(images)
    scale = "blocks.0.mlp.fc1.weight_scale"
    broken = {
        r"blocks.7.attn.qkv is quantized in the file": {
            **state,
            "blocks.7.attn.qkv.weight_scale": state[scale].clone(),
        },
        r"norm.weight are not in the file": {k: v for k, v in state.items() if k != "norm.weight"},
        r"extra are not in the model": {**state, "extra": torch.zeros(3)},
        r"blocks.0.mlp.fc1.weight have other": {**state, "blocks.0.mlp.fc1.weight": torch.zeros(3, 4).to(torch.int8)},
        r"blocks.0.mlp.fc1.weight are not int8": {
            **state,
            "blocks.0.mlp.fc1.weight": state["blocks.0.mlp.fc1.weight"].float(),
        },
    }
    for message, tensors in broken.items():
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            quantization.load(other, path)
        assert not any(isinstance(m, QuantizedLinear) for m in other.modules())
        assert torch.equal(other(images), wanted)


def test_buffers_on_meta_that_nothing_fills(tmp_path: Path) -> None:
    model, _ = others.build("timm Swin")
    pyvit.quantize(model)
    quantization.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = others.models.peers.peer("timm").create_model(
            "swin_tiny_patch4_window7_224", num_classes=7, **others.SWIN
        )
    with pytest.raises(ValueError, match="is on the meta device and not in the file"):
        quantization.load(empty, tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_damaged_files_are_named(share: float, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = pyvit.create_model("vit_pico_patch8_32").eval()
    pyvit.quantize(model)
    quantization.save(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"load: .*model\.safetensors is not a safetensors file, or is cut short"):
        quantization.load(pyvit.create_model("vit_pico_patch8_32"), path)
