"""accelerate on torch's own modules, and on unknown modules."""

import pytest
import torch
from torch import nn

import pyvit
from tests.integrations.checks import counts
from tests.models.parity import relative_error


class OddAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return self.qkv(x)[..., :8]


def test_unknown_modules_are_left_and_reported():
    model = nn.Sequential(OddAttention(), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected = model(x)
    report = pyvit.accelerate(model)
    assert report.replaced == []
    assert [(row.path, row.note) for row in report.left] == [("0", "not a class that pyvit knows")]
    assert "OddAttention" in str(report)
    assert torch.equal(model(x), expected)
    with pytest.raises(pyvit.integrations.AccelerateError, match="OddAttention"):
        pyvit.accelerate(model, strict=True)


def test_a_model_without_anything_known():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    report = pyvit.accelerate(model)
    assert report.replaced == []
    assert report.left == []
    assert "nothing in torch.nn.modules.container.Sequential" in str(report)
    with pytest.raises(pyvit.integrations.AccelerateError, match="nothing in"):
        pyvit.accelerate(model, strict=True)


def test_pyvits_own_models_have_nothing_to_replace():
    report = pyvit.accelerate(pyvit.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    assert report.replaced == []
    assert report.left == []


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        pyvit.accelerate({})


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head"])
@pytest.mark.parametrize("cross", [False, True])
def test_multihead(batch_first, mask, cross):
    model = nn.MultiheadAttention(24, 3, batch_first=batch_first).eval()
    nn.init.normal_(model.in_proj_bias)
    x = torch.randn(2, 5, 24, requires_grad=True)
    y = torch.randn(2, 7, 24) if cross else x
    keys = y.shape[1]
    attn_mask = {
        None: None,
        "bool": torch.rand(5, keys) < 0.3,
        "float": torch.randn(5, keys),
        "per head": torch.randn(6, 5, keys),
    }[mask]
    if mask == "bool":
        attn_mask[:, 0] = False

    def call():
        q = x if batch_first else x.transpose(0, 1)
        k = q if not cross else y if batch_first else y.transpose(0, 1)
        out, weights = model(q, k, k, need_weights=False, attn_mask=attn_mask)
        assert weights is None
        return out, torch.autograd.grad(out.square().sum(), [x, *model.parameters()])

    expected, gradients = call()
    assert counts(pyvit.accelerate(model)) == {"MultiheadAttention": 1}
    found, ours = call()
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < 1e-5
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(ours, gradients, strict=True))


def test_multihead_runs_as_before_where_pyvit_cannot_serve():
    model = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    x, padding = torch.randn(2, 5, 24), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    calls = ({}, {"need_weights": False, "key_padding_mask": padding}, {"average_attn_weights": False})
    expected = [model(x, x, x, **options) for options in calls]
    pyvit.accelerate(model)
    for options, (out, weights) in zip(calls, expected, strict=True):
        found = model(x, x, x, **options)
        assert torch.equal(found[0], out)
        assert weights is None if found[1] is None else torch.equal(found[1], weights)


def test_multihead_with_options_is_left():
    for options in ({"kdim": 16, "vdim": 16}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        report = pyvit.accelerate(nn.MultiheadAttention(24, 3, **options))
        assert report.replaced == []
        assert len(report.left) == 1


def test_a_forward_that_something_else_replaced_is_kept():
    model = nn.MultiheadAttention(24, 3)
    model.forward = mine = lambda *_: None
    report = pyvit.accelerate(model)
    assert [row.note for row in report.left] == ["its forward is already replaced on this instance, by something else"]
    pyvit.restore(model)
    assert model.forward is mine
