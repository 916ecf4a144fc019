"""The table of what is served in timm and transformers: a sample of it, and how it deals with models that break."""

import io

import pytest
import torch

from pyvit.integrations import coverage
from pyvit.integrations.coverage_models import Case
from tests.peers import peer

peer("timm"), peer("transformers")

SAMPLE = {
    ("timm", "test_vit"): "full",
    ("timm", "test_vit_relpos"): "full",
    ("timm", "vit_small_patch16_dinov3"): "full",
    ("timm", "levit_128s"): "none",
    ("timm", "shvit_s1"): "none",
    ("timm", "coat_lite_tiny"): "other",
    ("transformers", "vit.ViTModel"): "full",
    ("transformers", "dinov3_vit.DINOv3ViTModel"): "full",
    ("transformers", "yolos.YolosModel"): "full",
    ("transformers", "resnet.ResNetModel"): "no attention",
}


@pytest.mark.parametrize(("library", "name"), SAMPLE)
def test_sample(library, name):
    record = coverage.examine(Case(library, "family", name))
    assert record["verdict"] == SAMPLE[library, name], coverage.summary(record)


def test_a_wrong_result_is_seen(monkeypatch):
    from pyvit.integrations import timm as integration

    attention = integration.attention_branch
    monkeypatch.setattr(integration, "attention_branch", lambda *args: None)
    packed = integration.flash_attention_qkvpacked
    monkeypatch.setattr(integration, "flash_attention_qkvpacked", lambda *args, **kw: packed(*args, **kw) * 1.0001)
    record = coverage.examine(Case("timm", "family", "test_vit"))
    assert attention is not None
    assert record["verdict"] == "differs", record


def test_a_model_that_breaks_has_a_record(monkeypatch, tmp_path):
    def breaks(case):
        raise ValueError("no such size")

    monkeypatch.setattr(coverage, "build", breaks)
    record = coverage.examine(Case("timm", "family", "test_vit"))
    assert record["verdict"] == "not run"
    assert "no such size" in record["reason"]


def test_only_missing_models_are_examined(monkeypatch, tmp_path):
    asked = []

    class Child:
        def __call__(self, case):
            asked.append(case.name)
            return {**case._asdict(), "verdict": "not run", "reason": "no result"}

        def close(self):
            pass

    monkeypatch.setattr(coverage, "Child", Child)
    monkeypatch.setattr(coverage, "_RECORDS", tmp_path)
    found = [Case("timm", "A", "one"), Case("timm", "B", "two", ("two", "three"))]
    coverage.run(found[:1], io.StringIO())
    coverage.run(found, io.StringIO())
    assert asked == ["one", "two"]
    text = coverage.page({"timm": found})
    assert "| 3 |" in text  # names
    assert "B: `two` (2)" in text


def test_rounding_is_told_from_error():
    exact = [torch.tensor([1.0, 2.0])], {"w": torch.tensor([3.0])}
    near = [torch.tensor([1.0, 2.0 + 2e-7])], {"w": torch.tensor([3.0])}
    far = [torch.tensor([1.0, 2.0 + 2e-4])], {"w": torch.tensor([3.0])}
    assert coverage._errors(near, exact, exact)["passed"]
    assert not coverage._errors(far, exact, exact)["passed"]
    assert not coverage._errors((near[0], {}), exact, exact)["passed"]
