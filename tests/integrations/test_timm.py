"""timm's models accelerated."""

import pytest
import torch

import pyvit
from pyvit.integrations import timm as integration
from pyvit.ops import matmul, prepacked
from tests.integrations.checks import check_accelerated, counts
from tests.models.parity import randomise, relative_error
from tests.peers import peer

timm = peer("timm")

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 7}
SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 7}


def make(name, **config):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **config))


def on(*size):
    images = torch.randn(2, 3, *size)
    return lambda m: m(images.to(next(m.parameters()).dtype))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "init_values": 0.1, "qkv_bias": False}, {"act_layer": "quick_gelu"}], ids=str
)
def test_vit(options, fused):
    model = make("vit_tiny_patch16_224", **VIT, **options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    check_accelerated(model, on(32, 32), {"Conv2d": 1, "Block": 2, "Attention": 2, "Mlp": 2})


GATED = {
    "SwiGLUPacked": {"mlp_layer": "SwiGLUPacked", "act_layer": torch.nn.SiLU, "mlp_ratio": 4},
    "GluMlp": {"mlp_layer": "GluMlp", "init_values": 0.1},
    "SwiGLU": {"mlp_layer": "SwiGLU", "norm_layer": "rmsnorm", "act_layer": torch.nn.SiLU},
    "sub-norm": {"mlp_layer": "SwiGLU", "scale_mlp_norm": True, "act_layer": torch.nn.SiLU},
}


def make_gated(case):
    options = dict(GATED[case])
    options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    return make("vit_tiny_patch16_224", **VIT, **options)


@pytest.mark.parametrize("case", GATED)
def test_gated_mlps_and_rms_norm(case, monkeypatch):
    rows = {"SwiGLU": {"SwiGLU": 2, "RmsNorm": 5}, "sub-norm": {"SwiGLU": 2}}.get(case, {"GluMlp": 2})
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(pyvit.ops, "gated_mlp", counted(pyvit.ops.gated_mlp, calls))
        check_accelerated(make_gated(case), on(32, 32), {"Conv2d": 1, "Block": 2, "Attention": 2, **rows})
    assert calls


@pytest.mark.parametrize("case", GATED)
def test_fused_branches_of_gated_mlps(case, monkeypatch):
    """With packed weights a block is two calls, and hooks are respected."""
    monkeypatch.setattr(matmul, "_policy", "pyvit")
    monkeypatch.setattr(matmul, "_chosen", {})
    model, images = make_gated(case).eval(), on(32, 32)
    with torch.no_grad():
        expected = images(model)
        pyvit.accelerate(model)
        pyvit.pack_weights(model)
        assert relative_error(images(model), expected) < 1e-4
        calls = []
        with monkeypatch.context() as patch:
            for module, branch in ((integration, "attention_branch"), (prepacked, "gated_branch")):
                patch.setattr(module, branch, counted(getattr(module, branch), calls))
            images(model)
        assert calls == ["attention_branch", "gated_branch"] * 2
        first = model.blocks[0]
        for part in ("norm2", "mlp", "mlp.act", "mlp.fc2", "mlp.drop1", "mlp.norm"):
            seen = []
            handle = first.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append("here"))
            assert relative_error(images(model), expected) < 1e-4
            handle.remove()
            assert seen, part
        first.mlp.fc2 = torch.nn.Sequential(first.mlp.fc2)
        assert relative_error(images(model), expected) < 1e-4
        pyvit.restore(model)
        assert not any("forward" in vars(m) for m in model.modules())
        assert relative_error(images(model), expected) < 1e-6


#: Models of EvaAttention and AttentionRope: a name, options, and the MLP's class.
ROTARY = {
    "EVA-02": ("eva02_tiny_patch14_224", {}, "GluMlp"),
    "EVA-02 base": ("eva02_base_patch14_224", {}, "SwiGLU"),
    "EVA": ("eva_giant_patch14_224", {}, "Mlp"),
    "DINOv3": ("vit_small_patch16_dinov3", {}, "Mlp"),
    "DINOv3 qk_norm": ("vit_small_plus_patch16_dinov3_qkvb", {"qk_norm": True, "init_values": 0.3}, "SwiGLU"),
    "rope": ("vit_base_patch16_rope_224", {}, "Mlp"),
    "rope mixed": ("vit_base_patch16_rope_mixed_224", {}, "Mlp"),
    "rope norms": (
        "vit_base_patch16_rope_224",
        {"qk_norm": True, "scale_attn_inner": True, "qkv_fused": False, "gated_attn": True},
        "Mlp",
    ),
    "rope groups": (
        "vit_base_patch16_rope_224",
        {"qk_norm": True, "qkv_fused": False, "num_kv_heads": 1, "norm_layer": "RmsNorm"},
        "Mlp",
    ),
}


def make_rotary(case, **more):
    name, options, mlp = ROTARY[case]
    options = {**VIT, **options, **more}
    if isinstance(options.get("norm_layer"), str):
        options["norm_layer"] = getattr(timm.layers, options["norm_layer"])
    gated = options.pop("gated_attn", False)
    model = make(name, **options)
    for block in model.blocks if gated else ():  # which no model of timm's has yet
        block.attn.gate = torch.nn.Linear(48, 48)
    return model, mlp


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ROTARY)
def test_rotary(case, fused, monkeypatch):
    model, mlp = make_rotary(case)
    for block in model.blocks:
        block.attn.fused_attn = fused
    attention = type(model.blocks[0].attn).__name__
    norms = sum(type(m) is timm.layers.RmsNorm for m in model.modules())
    replaced = {"Conv2d": 1, "EvaBlock": 2, attention: 2, mlp: 2} | ({"RmsNorm": norms} if norms else {})
    calls, kernel = [], integration.rope_attention
    monkeypatch.setattr(integration, "rope_attention", lambda *a, **k: calls.append(k) or kernel(*a, **k))
    check_accelerated(model, on(32, 32), replaced)
    assert bool(calls) == (case != "EVA")
    assert all(("qk_norm" in each) == ("norm" in case or "groups" in case) for each in calls)


@pytest.mark.parametrize("case", ROTARY)
def test_fused_branches_of_rotary_blocks(case, monkeypatch):
    """With packed weights the norm, the layer scale and the sum are within the linear layers; hooks are respected."""
    monkeypatch.setattr(matmul, "_policy", "pyvit")
    monkeypatch.setattr(matmul, "_chosen", {})
    model, images = make_rotary(case)[0].eval(), on(32, 32)
    first = model.blocks[0]
    with torch.no_grad():
        expected = images(model)
        pyvit.accelerate(model)
        pyvit.pack_weights(model)
        branches, branch = [], integration._rotary_branch
        with monkeypatch.context() as patch:
            patch.setattr(integration, "_rotary_branch", lambda *a: branches.append(len(a) == 6) or branch(*a))
            assert relative_error(images(model), expected) < 1e-4
        assert branches == [first.attn.gate is None] * 2
        for part in ("norm1", "attn", "attn.proj", "attn.proj_drop", "drop_path1", "norm2", "mlp", "mlp.act"):
            seen = []
            handle = first.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append("here"))
            assert relative_error(images(model), expected) < 1e-4
            handle.remove()
            assert seen, part
        first.mlp.fc2 = torch.nn.Sequential(first.mlp.fc2)
        first.attn.proj = torch.nn.Sequential(first.attn.proj)
        assert relative_error(images(model), expected) < 1e-4
        pyvit.restore(model)
        assert not any("forward" in vars(m) for m in model.modules())
        assert relative_error(images(model), expected) < 1e-6


def test_layer_scale_of_rotary_blocks():
    """Random images at the scale of both branches, so that each factor shows."""
    model, images = make_rotary("DINOv3 qk_norm")[0].eval(), on(32, 32)
    with torch.no_grad():
        before = images(model)
        pyvit.accelerate(model)
        pyvit.pack_weights(model)
        for gamma in (model.blocks[0].gamma_1, model.blocks[1].gamma_2):
            gamma.mul_(-2.0)
            found = images(model)
            pyvit.restore(model)
            assert relative_error(found, images(model)) < 1e-4
            assert relative_error(found, before) > 1e-3
            pyvit.accelerate(model)


@pytest.mark.parametrize("case", ["EVA-02", "DINOv3", "rope norms", "rope groups"])
def test_calls_of_rotary_attention(case, monkeypatch):
    """Masks, causal calls, every shape of a rope; what rope_attention does not compute runs the class's own code."""
    model = make_rotary(case)[0].blocks[0].attn
    tokens, prefix, d = 9, model.num_prefix_tokens, model.head_dim
    x = torch.randn(2, tokens, 48)

    def rope(*batch):
        angles = torch.randn(*batch, tokens - prefix, d)
        return torch.cat((angles.sin(), angles.cos()), -1)

    mask = torch.randn(tokens, tokens)
    served = [
        {},
        {"rope": rope()},
        {"rope": rope(1)},
        {"rope": rope(2, 1), "attn_mask": mask},
        {"rope": rope().bfloat16(), "attn_mask": mask.relu().bool()},
        {"rope": rope(), "is_causal": True},
    ]
    if "groups" not in case:
        served += [{"rope": rope(3)}, {"rope": rope(2, 3)}]
    own = [{"rope": rope()[..., :1, :]}, {"rope": rope().double()}]
    calls = [*served, *own]
    expected = [model(x, **options) for options in calls]
    assert relative_error(expected[1], expected[0]) > 1e-3
    pyvit.accelerate(model)
    ran, code = [], integration.in_its_own_code
    monkeypatch.setattr(integration, "in_its_own_code", lambda *a: ran.append(a) or code(*a))
    for i, (options, out) in enumerate(zip(calls, expected, strict=True)):
        assert relative_error(model(x, **options), out) < 1e-5, options
        assert bool(ran) == (i >= len(served)), options
    assert len(ran) == len(own)
    with pytest.raises(RuntimeError):
        model(x, rope()[..., :-1, :])
    model.fused_attn, both = False, {"attn_mask": mask, "is_causal": True}  # which torch's attention refuses
    found = model(x, **both)
    pyvit.restore(model)
    assert relative_error(found, model(x, **both)) < 1e-5


@pytest.mark.parametrize("case", ["EVA-02 base", "DINOv3", "rope norms"])
def test_hooks_and_dropout_of_rotary_attention(case):
    model = make_rotary(case, attn_drop_rate=0.4)[0].blocks[0].attn
    rope = torch.cat((torch.randn(16, 16).sin(), torch.randn(16, 16).cos()), -1)
    x = torch.randn(2, 16 + model.num_prefix_tokens, 48)
    expected = model(x, rope)
    pyvit.accelerate(model)
    names = [
        name for name in ("qkv", "q_proj", "q_norm", "norm", "gate", "proj_drop") if getattr(model, name) is not None
    ]
    packed = getattr(model, "q_bias", None) is not None  # whose forward does not call qkv
    for name in names:
        seen = []
        handle = getattr(model, name).register_forward_hook(lambda *_, seen=seen: seen.append("here"))
        assert relative_error(model(x, rope), expected) < 1e-5
        handle.remove()
        assert len(seen) == (name != "qkv" or not packed), name
    changed = model.q_norm
    model.q_norm = torch.nn.Tanh()
    found = model(x, rope)
    pyvit.restore(model)
    assert relative_error(found, model(x, rope)) < 1e-5
    assert relative_error(found, expected) > 1e-3
    model.q_norm = changed
    pyvit.accelerate(model)
    model.train()
    assert not torch.equal(model(x, rope), model(x, rope))
    model.fused_attn, shapes = False, []  # as people do to look at the probabilities
    model.attn_drop.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    model.eval()(x, rope)
    assert shapes == [(2, 3, x.shape[1], x.shape[1])]


def test_rotary_attention_of_unknown_versions():
    """It runs its own code, with pyvit's attention."""
    model, images = make_rotary("DINOv3")[0], on(32, 32)
    for block in model.blocks:
        block.attn.register_buffer("temperature", torch.ones(()))
    expected = images(model)
    report = pyvit.accelerate(model)
    notes = [row.note for row in report.replaced if row.kind.endswith("EvaAttention")]
    assert notes == ["flash_attention, in its own code"] * 2
    assert relative_error(images(model), expected) < 1e-4


def test_rotary_attention_of_fewer_patches():
    """Patch dropout gives each image angles of its own."""
    model = make_rotary("DINOv3", patch_drop_rate=0.5)[0].train()
    images = on(32, 32)

    def call(m):
        torch.manual_seed(4)
        return images(m)

    expected = call(model)
    pyvit.accelerate(model)
    assert relative_error(call(model), expected) < 1e-4


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("size", [(64, 64), (32, 64)], ids=str)
def test_swin(name, size):
    blocks = (
        {"SwinTransformerV2Block": 4} if "v2" in name else {"SwinTransformerBlock": 8, "PatchMerging": 1}
    )  # of V1 the attention and the block
    check_accelerated(make(name, **SWIN, img_size=size), on(*size), {"Conv2d": 1, **blocks, "Mlp": 4})


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("always", [True, False])
def test_swin_on_maps_that_do_not_divide(name, always):
    model = make(name, **SWIN, img_size=(56, 72), always_partition=always, strict_img_size=False)
    images = on(56, 72)
    expected = images(model)
    pyvit.accelerate(model, strict=True)
    assert relative_error(images(model), expected) < 1e-4


MODELS = {
    "vit_tiny_patch16_224": VIT | {"init_values": 0.1, "drop_path_rate": 0.3},
    "swin_tiny_patch4_window7_224": SWIN | {"img_size": 64},
}


def counted(branch, calls):
    def call(*args, **options):
        found = branch(*args, **options)
        calls.extend([] if found is None else [branch.__name__])
        return found

    return call


@pytest.mark.parametrize("name", MODELS)
def test_fused_branches_with_packed_weights(name, monkeypatch):
    """With packed weights each residual branch is one call, and hooks and changed modules are respected."""
    monkeypatch.setattr(matmul, "_policy", "pyvit")
    monkeypatch.setattr(matmul, "_chosen", {})
    model = make(name, **MODELS[name]).eval()
    images = on(*model.patch_embed.img_size)
    first = next(m for m in model.modules() if m is not model and type(m).__name__.endswith("Block"))
    with torch.no_grad():
        expected = images(model)
        pyvit.accelerate(model)
        pyvit.pack_weights(model)
        for _ in range(2):
            assert relative_error(images(model), expected) < 1e-4
        calls = []
        with monkeypatch.context() as patch:
            for module, branch in (
                (integration, "attention_branch"),
                (integration, "window_attention_branch"),
                (prepacked, "linear_branch"),
            ):
                patch.setattr(module, branch, counted(getattr(module, branch), calls))
            images(model)
        assert len(calls) >= 2 * sum(type(m).__name__.endswith("Block") for m in model.modules())
        for part in ("norm1", "attn", "attn.qkv", "attn.proj_drop", "drop_path1", "norm2", "mlp", "mlp.act", "mlp.fc2"):
            seen = []
            handle = first.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append("here"))
            assert relative_error(images(model), expected) < 1e-4
            handle.remove()
            assert seen, part
        first.mlp.fc2 = torch.nn.Sequential(first.mlp.fc2)
        first.attn.proj = torch.nn.Sequential(first.attn.proj)
        assert relative_error(images(model), expected) < 1e-4
    model.train()  # stochastic depth
    if "vit" in name:
        assert not torch.equal(images(model), images(model))


def test_masks_and_hooks_of_attention():
    model = make("vit_tiny_patch16_224", **VIT).blocks[0].attn
    x, seen = torch.randn(2, 6, 48), []
    calls = ({"attn_mask": torch.randn(6, 6)}, {"attn_mask": torch.ones(6, 6).tril().bool()}, {"is_causal": True})
    expected = [model(x, **options) for options in calls]
    pyvit.accelerate(model)
    for options, out in zip(calls, expected, strict=True):
        assert relative_error(model(x, **options), out) < 1e-5
    assert relative_error(expected[1], expected[2]) < 1e-5
    model.fused_attn = False  # as people do to look at the probabilities
    model.attn_drop.register_forward_hook(lambda *call: seen.append(call[2].shape))
    model(x)
    assert seen == [(2, 3, 6, 6)]


def test_what_is_left_has_a_reason():
    report = pyvit.accelerate(timm.create_model("cait_xxs24_224", depth=1))
    assert [row.note for row in report.left] == ["talking heads: a linear layer between the scores of its heads"]
    assert counts(report) == {"Conv2d": 1, "ClassAttn": 2, "Mlp": 3}


SMALL = {
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32, "use_rel_pos_bias": True},
    "vit_relpos_small_patch16_224": {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32},
    "vit_base_patch16_siglip_224": {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32},
    "twins_svt_small": {
        "img_size": 64,
        "embed_dims": (16, 32, 32, 32),
        "num_heads": (2, 4, 4, 4),
        "depths": (2, 2, 2, 2),
    },
    "pvt_v2_b0": {},
    "nest_tiny": {},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 2, 2, 2)},
}


@pytest.mark.parametrize("name", SMALL)
def test_classes_that_call_torchs_attention(name, monkeypatch):
    """Classes whose forward calls F.scaled_dot_product_attention, with unchanged outputs and gradients."""
    from pyvit.integrations import functional

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **SMALL[name])
    randomise(model) if name != "hiera_tiny_224" else model.eval()
    size = SMALL[name].get("img_size", model.default_cfg["input_size"][-1])
    images = torch.randn(1, 3, size, size)

    def results():
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = results()
    report = pyvit.accelerate(model)
    assert any(forward.function is functional.in_its_own_code for forward in report.found)
    assert all("Channel" in row.kind for row in report.left), report
    calls, attention = [], functional.flash_attention
    monkeypatch.setattr(functional, "flash_attention", lambda *a, **k: calls.append(a) or attention(*a, **k))
    found = results()
    assert calls
    assert relative_error(found[0], expected[0]) < 1e-4
    assert relative_error(found[1], expected[1]) < 1e-3


@pytest.mark.parametrize("options", [{}, {"use_rel_pos": False, "use_rope": True}, {"qkv_bias": False}], ids=str)
def test_sam(options):
    """A map of 5 x 3 patches in windows of 2, one global block, and positions of another size."""
    settings = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": (80, 48), "window_size": 2, "num_classes": 7}
    model = randomise(timm.create_model("samvit_base_patch16_224", **settings, global_attn_indexes=(1,), **options))
    images = torch.randn(2, 3, 80, 48)
    call = lambda m: m(images.to(m.patch_embed.proj.weight.dtype))  # noqa: E731
    by = "decomposed_attention" if options.get("use_rel_pos", True) else "flash_attention, in its own code"
    check_accelerated(model, call, {"Attention": 2, "Conv2d": 1, "Mlp": 2})
    report = pyvit.accelerate(model)
    assert [row.note for row in report.replaced if row.kind.endswith("Attention")] == [by] * 2
    if by != "decomposed_attention":
        return
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    model.train()  # dropout runs timm's code
    torch.manual_seed(3)
    dropped = call(model)
    pyvit.restore(model)
    torch.manual_seed(3)
    torch.testing.assert_close(dropped, call(model))


def test_a_class_token_that_attends():
    cross = randomise(timm.models.crossvit.CrossAttention(24, 3))
    x = torch.randn(2, 5, 24)
    check_accelerated(cross, lambda m: m(x.to(m.proj.weight.dtype)), {"CrossAttention": 1})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_compiles_without_a_break(name):
    model, images = make(name, **VIT), on(32, 32)
    expected = images(model)
    pyvit.accelerate(model)
    assert relative_error(images(torch.compile(model, fullgraph=True)), expected) < 1e-4
