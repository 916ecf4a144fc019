"""``pyvit export``: each file, loaded again, gives what the model gives."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import pyvit
from pyvit.cli import application
from pyvit.models import export
from pyvit.models.export import export_model
from pyvit.train import Config, train

SWIN = {"depths": (1,), "num_heads": (2,)}


def model(name="vit_pico_patch8_32", **settings):
    torch.manual_seed(0)
    found = pyvit.create_model(name, num_classes=5, **settings).eval()
    for p in found.parameters():  # heads begin at zero
        torch.nn.init.normal_(p, std=0.1)
    return found


def outputs(found, images):
    with torch.no_grad():
        return found(images)


def test_a_program_for_any_batch(tmp_path):
    source, path = model(depth=1), tmp_path / "m.pt2"
    images = torch.randn(2, 3, 32, 32)
    assert export_model(source, images, path, metadata={"classes": ["a"]}) < 1e-5
    extra = {export.EXTRA: ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[export.EXTRA]) == {"classes": ["a"]}
    assert {"pyvit.flash_attention.default", "pyvit.patch_embed.default"} <= {
        str(n.target) for n in program.graph.nodes
    }
    for batch in (1, 5):
        x = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program.module()(x), outputs(source, x), rtol=1e-4, atol=1e-5)
    export_model(source, images, path, batch=3)
    fixed = torch.export.load(path).module()
    assert fixed(torch.randn(3, 3, 32, 32)).shape == (3, 5)
    with pytest.raises(Exception, match="images"):
        fixed(torch.randn(2, 3, 32, 32))


def test_onnx(tmp_path):
    """Any batch, with the operators in ONNX's own."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    for name, settings in (
        ("vit_pico_patch8_32", {"depth": 1}),
        ("swin_pico_patch4_window4_32", SWIN),
    ):
        source, path = model(name, **settings), tmp_path / f"{name}.onnx"
        assert export_model(source, torch.randn(2, 3, 32, 32), path, "onnx", metadata={"size": [32, 32]}) < 1e-4
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert json.loads(session.get_modelmeta().custom_metadata_map["pyvit"]) == {"size": [32, 32]}
        images = torch.randn(5, 3, 32, 32)
        (found,) = session.run(["scores"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), outputs(source, images), rtol=1e-4, atol=1e-4)


def test_the_graph_for_onnx_has_no_operators_of_pyvit():
    """What the ONNX exporter is given, which needs no ONNX to look at."""
    images = torch.randn(2, 3, 32, 32)
    for name, settings in (("vit_pico_patch8_32", {"depth": 1}), ("swin_pico_patch4_window4_32", SWIN)):
        source = model(name, **settings)
        with torch.no_grad(), pyvit.use_backend("reference"):
            program = torch.export.export(source, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        assert not [n for n in program.graph.nodes if "pyvit" in str(n.target)]
        torch.testing.assert_close(program.module()(images), outputs(source, images), rtol=1e-4, atol=1e-5)


def test_a_file_that_differs_is_removed(tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    real = export._torch_export
    monkeypatch.setitem(export._WRITE, "torch-export", lambda *given: real(*given) + 0.1)
    with pytest.raises(ValueError, match="gave other results than the model"):
        export_model(model(depth=1), torch.randn(2, 3, 32, 32), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("format", "name", "error", "message"),
    [
        ("onnx", "m.pt2", ValueError, r"a file of onnx must end in \.onnx, got m\.pt2"),
        ("tflite", "m.pt2", ValueError, "format must be one of torch-export, aotinductor, onnx"),
        ("aotinductor", "m.pt2", RuntimeError, "needs a C\\+\\+ compiler, and CXX names nowhere, which does not exist"),
    ],
)
def test_what_cannot_be_exported_is_said_before_work_begins(tmp_path, monkeypatch, format, name, error, message):
    monkeypatch.setenv("CXX", "nowhere")
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))
    with pytest.raises(error, match=message):
        export_model(model(depth=1), torch.randn(1, 3, 32, 32), tmp_path / name, format)


def test_the_command(tmp_path):
    """A run's file, and beside it what its images need."""
    run = tmp_path / "run"
    train(Config(data="digits", model="vit_pico_patch8_32", set=["depth=1"], steps=1, batch_size=8, out=str(run)))
    words = ["export", str(run), "-o", str(tmp_path / "m.pt2"), "--batch", "4"]
    done = CliRunner().invoke(application(), words, catch_exceptions=False)
    assert "relative difference to the model" in done.output
    beside = json.loads((tmp_path / "m.pt2.json").read_text())
    assert beside["classes"][:2] == ["zero", "one"]
    assert beside["size"] == [32, 32]
    assert len(beside["mean"]) == len(beside["std"]) == 3
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.zeros(4, 3, 32, 32)).shape == (4, 10)
