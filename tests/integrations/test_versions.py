"""Unknown versions of the libraries: classes of known names with other attributes, signatures or code; and
``strict``."""

import sys
import types

import pytest
import torch
from torch import nn

import pyvit
from tests.models.parity import relative_error
from tests.peers import peer

INIT = """
class Attention(nn.Module):
    def __init__(self, dim=24, num_heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, (dim // num_heads) ** -0.5
        self.fused_attn = True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = self.k_norm = nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.5), nn.Dropout(0.0)
        {more}

    def forward(self, {arguments}):
        qkv = self.qkv({x}).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p={drop})
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))) {after}
"""
PARTS = {
    "more": "pass",
    "arguments": "x, attn_mask=None",
    "x": "x",
    "drop": "self.attn_drop.p if self.training else 0.0",
    "after": "",
}

VERSIONS = {
    "as known": ({}, None),
    "takes less": ({"arguments": "x"}, None),
    "takes more": ({"arguments": "x, attn_mask=None, is_causal=False, window=None"}, None),
    "another order": ({"arguments": "x, is_causal=False, attn_mask=None"}, "its forward takes"),
    "more inputs": ({"arguments": "q_x, k_x=None, v_x=None, attn_mask=None", "x": "q_x"}, "its forward takes"),
    "another default": ({"arguments": "x, attn_mask=None, is_causal=True"}, "its forward takes"),
    "a required argument": ({"arguments": "x, attn_mask=None, is_causal=False, *, shape"}, "which pyvit does not know"),
    "without an attribute": ({"more": "del self.q_norm; self.q_norms = self.k_norm"}, "has no q_norm"),
    "another part": ({"more": "self.lepe = nn.Linear(24, 24)", "after": "+ self.lepe(x)"}, "has lepe"),
    "another weight": ({"more": "self.temperature = nn.Parameter(torch.ones(1))"}, "has temperature"),
    "a flag": ({"more": "self.twice = True", "after": "* (1 + self.twice)"}, "has twice"),
    "drops in evaluation": ({"drop": "self.attn_drop.p"}, "drops attention weights in evaluation too"),
}


def made_up(monkeypatch, name, source):
    module = types.ModuleType(name)
    exec("import torch\nfrom torch import nn\nimport torch.nn.functional as F\n" + source, vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_of_timm(version, monkeypatch):
    changed, reason = VERSIONS[version]
    source = INIT.replace("self.q_norm(q)", "q") if "without" in version else INIT
    torch.manual_seed(0)
    model = made_up(monkeypatch, "timm.layers.attention", source.format(**PARTS | changed)).Attention().eval()
    x = torch.randn(2, 5, 24)
    options = {"shape": (5,)} if "required" in version else {}
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(x, **options)
        report = pyvit.accelerate(model)
        torch.manual_seed(1)
        assert relative_error(model(x, **options), expected) < 1e-5
        if version == "takes more":
            assert torch.equal(model(x, window=3), expected)  # an argument that pyvit does not know: the original
            assert torch.equal(model(x, None, False, 3), expected)
    if reason is None:
        assert [row.path for row in report.replaced] == [""]
        assert not report.left
    else:
        assert len(report.left) == 1
        assert reason in report.left[0].note
        with pytest.raises(pyvit.integrations.AccelerateError, match=reason.replace("(", r"\(")):
            pyvit.accelerate(model, strict=True)


def test_a_later_open_clip(monkeypatch):
    source = """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.scale, self.use_fsdpa, self.logit_scale, self.head_scale = 2, 0.5, True, None, None
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.randn(48, 16)), nn.Parameter(torch.randn(48))
        self.ln_q, self.ln_k, self.ln_inner = nn.Identity(), nn.Identity(), nn.Identity()
        self.attn_drop, self.out_proj, self.out_drop = nn.Dropout(0), nn.Linear(16, 16), nn.Dropout(0)

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        k_x = x if k_x is None else k_x
        return F.scaled_dot_product_attention(x, k_x, k_x)
"""
    model = made_up(monkeypatch, "open_clip.transformer", source).Attention().eval()
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    expected = model(x, k_x=y, v_x=y)
    report = pyvit.accelerate(model)
    assert torch.equal(model(x, k_x=y, v_x=y), expected)
    assert [row.note.partition(" takes")[0] for row in report.left] == ["its forward"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224", "talking heads"),
        ("convit_tiny", "a gated sum of two attentions"),
        ("coat_lite_tiny", "linear attention"),
        ("levit_128s", "small heads"),
    ],
)
def test_strict_raises_where_attention_is_left(name, reason):
    model = peer("timm").create_model(name).eval()
    with pytest.raises(pyvit.integrations.AccelerateError, match=reason):
        pyvit.accelerate(model, strict=True)


class ResidualAttentionBlock(nn.Module):
    """As in the first CLIP: a block whose attention is a module that is replaced."""

    def __init__(self):
        super().__init__()
        self.attn, self.ln_1 = nn.MultiheadAttention(16, 2), nn.LayerNorm(16)

    def attention(self, x):
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x):
        return x + self.attention(self.ln_1(x))


class Weighs(nn.Module):
    """Attention under another name."""

    def __init__(self, how):
        super().__init__()
        self.qkv, self.how, self.normal = nn.Linear(16, 48), how, nn.Softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "module":
            return self.normal(q @ k.mT) @ v
        return torch.bmm(torch.softmax(torch.einsum("bnd,bmd->bnm", q, k), -1), v)


class Scores(nn.Module):
    """A softmax without attention."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x).softmax(-1)


def test_strict_passes_where_all_attention_is_replaced():
    assert not pyvit.accelerate(nn.Sequential(ResidualAttentionBlock(), Scores()), strict=True).left
    for name in ("crossvit_9_240", "twins_svt_small"):
        assert not pyvit.accelerate(peer("timm").create_model(name), strict=True).left


@pytest.mark.parametrize("how", ["module", "function"])
def test_attention_by_another_name_is_found(how):
    report = pyvit.accelerate(nn.Sequential(nn.LayerNorm(16), Weighs(how)))
    assert [(row.path, row.note) for row in report.left] == [("1", "not a class that pyvit knows")]
