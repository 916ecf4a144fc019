"""``torch.set_default_dtype`` and ``set_default_device`` do not change the operators' results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import pyvit
from pyvit import losses, memory
from pyvit.data.scenes import scenes
from pyvit.data.spoken_words import words
from pyvit.data.synthetic import synthetic
from pyvit.models.audio import LogMel
from pyvit.models.dino import block_masks
from pyvit.models.flops import count
from pyvit.nn import PatchEmbed, RotaryEmbedding, WindowAttentionV2
from pyvit.ops import matmul, prepacked
from tests.ops.operator_cases import CASES, Case


@pytest.fixture(params=["float64", "float16", "bfloat16", "meta"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function that changes a default; caches that depend on it are cleared first."""
    monkeypatch.setattr(matmul, "_chosen", {})
    for known in (
        matmul.forward_candidates,
        matmul.grad_input_candidates,
        matmul.grad_weight_candidates,
        prepacked.forms,
    ):
        known.cache_clear()
    memory._kept.__dict__.clear()

    def change() -> None:
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def results(case: Case) -> list[Tensor]:
    leaves = case.leaves()
    out = case.op(*leaves)
    with torch.no_grad():
        again = case.op(*case.tensors)
    return [out.detach(), again, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("case", [pytest.param(make, id=name) for name, make in CASES.items()])
def test_operators(case: Callable[[], Case], other: Callable[[], None]) -> None:
    case = case()
    other()
    found = results(case)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for ours, exact in zip(found, results(case), strict=True):
        assert torch.equal(ours, exact)


def _triplet() -> Callable[..., Tensor]:
    loss = losses.TripletLoss()
    return lambda a, b: loss(a, b, a.flip(0))


def _dino(centering: str) -> Callable[..., Tensor]:
    loss = losses.DINOLoss(8, centering=centering).eval()
    return lambda a, b: loss(torch.stack((a, b)), torch.stack((b, a)).detach(), 0.04)


def _ibot() -> Callable[..., Tensor]:
    loss, weights = losses.IBOTLoss(8).eval(), torch.full((6,), 1 / 6, dtype=torch.float32)
    return lambda a, b: loss(a, b.detach(), weights, 0.04)


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "CLIPLoss": losses.CLIPLoss,
    "SigLIPLoss": losses.SigLIPLoss,
    "NTXentLoss": losses.NTXentLoss,
    "TripletLoss": _triplet,
    "KoLeoLoss": lambda: lambda a, _: losses.KoLeoLoss()(a),
    "DINOLoss": lambda: _dino("centering"),
    "DINOLoss, sinkhorn_knopp": lambda: _dino("sinkhorn_knopp"),
    "IBOTLoss": _ibot,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses(loss: Callable[[], Callable[..., Tensor]], other: Callable[[], None]) -> None:
    """Created before the default dtype changes, and on the device of their inputs."""
    a, b = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    made = loss()
    wanted = torch.autograd.grad(made(a, b), (a, b), allow_unused=True)
    other()
    for chosen in (made, loss() if torch.get_default_device().type == "cpu" else made):
        for ours, exact in zip(torch.autograd.grad(chosen(a, b), (a, b), allow_unused=True), wanted, strict=True):
            if exact is not None:  # numbers that are learned have the default dtype's digits
                tolerance = 0.02 if chosen is not made else 0.0
                torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    "vit, uint8": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "mean": (0.5,) * 3, "std": (0.25,) * 3}),
    "vit, rope": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "pos_embed": "rope"}),
    "vit, sincos": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "pos_embed": "sincos"}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (1, 1, 1, 1), "drop_path_rate": 0.0}),
}


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    out = model(images)
    return [
        out.detach(),
        *torch.autograd.grad(out.float().square().sum(), [p for p in model.parameters() if p.requires_grad]),
    ]


@pytest.mark.parametrize(("name", "settings"), MODELS.values(), ids=MODELS)
def test_models_run(name: str, settings: dict[str, object], other: Callable[[], None]) -> None:
    """A model that was created before, including inference with packed weights."""
    model = pyvit.create_model(name, num_classes=0, **settings)
    images = torch.randn(2, 3, settings["img_size"], settings["img_size"])
    other()
    found = gradients(model, images)
    pyvit.pack_weights(model.eval())
    with torch.no_grad():
        inferred = [model(images) for _ in range(3)]
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for ours, exact in zip(found, gradients(model.train(), images), strict=True):
        assert torch.equal(ours, exact)
    for out in inferred:
        torch.testing.assert_close(out, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "settings"), MODELS.values(), ids=MODELS)
def test_models_are_made_in_another_dtype(name: str, settings: dict[str, object], dtype: torch.dtype) -> None:
    """Parameters have the default dtype, as in torch's layers; values are those of a float32 model that was cast."""
    wanted = pyvit.create_model(name, num_classes=0, **settings).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        model = pyvit.create_model(name, num_classes=0, **settings)
        assert {p.dtype for p in model.parameters()} == {dtype}
        model.load_state_dict(wanted.state_dict())
        images = torch.randn(2, 3, settings["img_size"], settings["img_size"])
        found = gradients(model, images)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, exact in zip(found, gradients(wanted, images), strict=True):
        assert ours.dtype == exact.dtype
        torch.testing.assert_close(ours, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_masked_autoencoders_are_made_in_another_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = pyvit.create_model(
            "mae_vit_base_patch16_224",
            img_size=32,
            embed_dim=32,
            depth=1,
            num_heads=2,
            decoder_embed_dim=32,
            decoder_depth=1,
        )
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model(torch.rand(2, 3, 32, 32))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "settings"), MODELS.values(), ids=MODELS)
def test_models_without_memory_are_filled(name: str, settings: dict[str, object]) -> None:
    """Models created on the meta device, after ``to_empty`` and a state dict: constants that are not in the state dict
    are set too."""
    wanted = pyvit.create_model(name, num_classes=0, **settings).eval()
    with torch.device("meta"):
        model = pyvit.create_model(name, num_classes=0, **settings).eval()
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    model.to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict())
    for key, buffer in wanted.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    images = torch.randn(2, 3, settings["img_size"], settings["img_size"])
    with torch.no_grad():
        assert torch.equal(model(images), wanted(images))


@pytest.mark.parametrize("make", [
    lambda: LogMel(16),
    lambda: RotaryEmbedding(8),
    lambda: WindowAttentionV2(8, 2, 4),
    lambda: PatchEmbed(mean=(0.1,) * 3, std=(0.2,) * 3),
])  # fmt: skip
def test_constants_are_filled_in_the_dtype_asked_for(make: Callable[[], nn.Module]) -> None:
    wanted = make()
    with torch.device("meta"):
        made = make()
    made.to(torch.bfloat16).to_empty(device="cpu")
    for key, buffer in wanted.named_buffers():
        assert torch.equal(made.get_buffer(key), buffer.bfloat16()), key


def test_costs_are_counted(other: Callable[[], None]) -> None:
    wanted = count("vit_tiny_patch16_224", depth=1)
    other()
    assert count("vit_tiny_patch16_224", depth=1) == wanted


DATA: dict[str, Callable[[], list[Tensor]]] = {
    "scenes": lambda: [scenes(32, 4).train.fetch([0, 1])["image"]],
    "synthetic": lambda: [synthetic(8, 4).train.fetch([0, 1])["image"]],
    "words": lambda: [words(16, 2, voice="tones").train.fetch([0, 1])["image"]],
    "masks": lambda: [block_masks(4, (7, 7), generator=torch.Generator().manual_seed(0))],
}


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_data_are_the_same(make: Callable[[], list[Tensor]], other: Callable[[], None]) -> None:
    wanted = make()
    other()
    for ours, exact in zip(make(), wanted, strict=True):
        assert torch.equal(ours, exact)
