"""transformers with ``attn_implementation="pyvit"`` and "pyvit_flash", against its own "sdpa"."""

import copy

import pytest
import torch
from torch import nn

import pyvit
from pyvit.testing import GRADIENT_FACTOR, compare
from tests.integrations.checks import check_rule, counts, results
from tests.integrations.transformers_models import DENSE, MODELS, PACKED, draw
from tests.models.parity import relative_error
from tests.peers import peer

transformers = peer("transformers")

import pyvit.integrations.transformers  # noqa: E402
from pyvit.integrations import flash_attn, transformers_attention  # noqa: E402


def set_attention(model, name):
    """``set_attn_implementation``, on vision towers without their language model too."""
    model.set_attn_implementation(name)
    assert all(
        m.config._attn_implementation == name
        for m in model.modules()
        if "Attention" in type(m).__name__ and hasattr(m, "config")
    )
    return model


@pytest.fixture
def calls(monkeypatch):
    """Names of pyvit's functions, as often as they are called."""
    seen = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (seen.append(name), function(*args, **kwargs))[1])

    count(transformers_attention, "scaled_dot_product_attention")
    count(flash_attn, "flash_attention")
    count(flash_attn, "flash_attention_varlen")
    return seen


@pytest.mark.parametrize("implementation", ["pyvit", "pyvit_flash"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, implementation, calls):
    model, call = MODELS[name]()
    exact, theirs = results(copy.deepcopy(model).double(), call), results(copy.deepcopy(model), call)
    assert not calls
    ours = results(set_attention(model, implementation), call)
    if implementation == "pyvit" or name in DENSE:
        assert set(calls) == {"scaled_dot_product_attention"}
    else:
        flash = {"flash_attention_varlen"} if name in PACKED else {"flash_attention"}
        assert set(calls) == (flash | {"flash_attention_varlen"} if name == "CLIP" else flash)  # padded text
    check_rule(name, ours, theirs, exact)


class Layer(nn.Module):
    """What an attention function sees of a layer."""

    def __init__(self, is_causal=False, groups=1):
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups
        self.config = transformers.ViTConfig(attn_implementation="pyvit_flash")


CALLS = {
    "plain": {},
    "bool mask": {"mask": lambda: torch.rand(2, 1, 9, 13) > 0.3},
    "float mask of each head": {"mask": lambda: torch.randn(1, 4, 9, 13)},
    "masked rows": {"mask": lambda: (torch.arange(9) > 2)[None, None, :, None].expand(2, 1, 9, 13)},
    "scale": {"scaling": 0.3},
    "causal by the layer": {"layer": {"is_causal": True}, "nk": 9},
    "causal over a static cache": {"is_causal": True},
    "not causal against the layer": {"layer": {"is_causal": True}, "is_causal": False},
    "one query is not causal": {"layer": {"is_causal": True}, "nq": 1},
    "a mask contains causality": {"layer": {"is_causal": True}, "mask": lambda: torch.rand(2, 1, 9, 13) > 0.3},
    "position bias": {"position_bias": lambda: torch.randn(1, 4, 9, 13)},
    "position bias and a bool mask": {
        "position_bias": lambda: torch.randn(1, 4, 9, 13),
        "mask": lambda: torch.rand(2, 1, 9, 13) > 0.3,
    },
    "position bias and a float mask": {
        "position_bias": lambda: torch.randn(1, 4, 9, 13),
        "mask": lambda: torch.randn(2, 1, 9, 13),
    },
    "position bias, causal": {"position_bias": lambda: torch.randn(1, 4, 9, 13), "is_causal": True},
    "grouped heads": {"layer": {"groups": 2}},
    "grouped heads and a mask": {"layer": {"groups": 2}, "mask": lambda: torch.rand(2, 1, 9, 13) > 0.3},
    "80 channels": {"d": 80},
    "88 channels, 40 of values": {"d": 88, "dv": 40},
    "one set of queries for all": {"queries": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_semantics_of_sdpa(name, dtype):
    options = dict(CALLS[name])
    layer = Layer(**options.pop("layer", {}))
    nq, nk, d = options.pop("nq", 9), options.pop("nk", 13), options.pop("d", 16)
    kv_heads = 4 // layer.num_key_value_groups
    shapes = ((options.pop("queries", 2), 4, nq, d), (2, kv_heads, nk, d), (2, kv_heads, nk, options.pop("dv", d)))
    tensors = {n: torch.randn(s, dtype=dtype) for n, s in zip(("query", "key", "value"), shapes, strict=True)}
    for argument in ("mask", "position_bias"):
        if argument in options:
            made = options.pop(argument)()
            tensors["attention_mask" if argument == "mask" else argument] = (
                made if made.dtype == torch.bool else made.to(dtype)
            )

    def run(function, wide=None):
        leaves = {n: (t if wide is None or t.dtype == torch.bool else t.to(wide)).detach() for n, t in tensors.items()}
        for t in leaves.values():
            t.requires_grad_(t.is_floating_point())
        out, weights = function(layer, **{"attention_mask": None, **leaves}, **options)
        assert weights is None
        grads = [t for t in leaves.values() if t.requires_grad]
        return out.detach(), torch.autograd.grad((out * draw(*out.shape).to(out)).sum(), grads)

    sdpa = transformers.AttentionInterface()["sdpa"]
    exact, theirs, ours = run(sdpa, torch.float64), run(sdpa), run(transformers.AttentionInterface()["pyvit"])
    assert ours[0].is_contiguous()
    compare(name, ours[0], theirs[0], exact[0])
    compare(name, ours[1], theirs[1], exact[1], GRADIENT_FACTOR)


@pytest.mark.parametrize("lengths", [(13, 13), (1, 13), (4, 13)], ids=str)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_semantics_of_flash_attention(lengths, padding, causal):
    """Causality is aligned to the last query and key; with padding on the left, as generation has it."""
    (nq, nk), flash = lengths, transformers.AttentionInterface()["pyvit_flash"]
    q, k, v = torch.randn(3, 4, nq, 16), torch.randn(3, 2, nk, 16), torch.randn(3, 2, nk, 24)
    kept = torch.arange(nk) >= torch.tensor([[0], [5], [9]]) if padding else torch.ones(3, nk, dtype=torch.bool)
    allowed = kept[:, None, None] & (
        torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq) if causal else kept.new_ones(nq, nk)
    )
    out, _ = flash(Layer(groups=2), q, k, v, kept if padding else None, scaling=0.2, is_causal=causal)
    expected, _ = transformers.AttentionInterface()["sdpa"](Layer(groups=2), q, k, v, allowed, scaling=0.2)
    rows = kept[:, nk - nq :]  # (B, Nq): outputs at padding are zeros in one and means in the other
    assert relative_error(out[rows], expected[rows]) < 1e-5


def test_packed_sequences_by_lengths_and_by_positions(calls):
    q, k, v = (torch.randn(1, 2, 11, 16) for _ in range(3))
    cu = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    sdpa = transformers.AttentionInterface()["sdpa"]
    parts = zip(*(t.split(cu.diff().tolist(), 2) for t in (q, k, v)), strict=True)
    expected = torch.cat([sdpa(Layer(), *part, None)[0] for part in parts], 1)
    positions = torch.cat([torch.arange(n) for n in cu.diff().tolist()])[None]
    for name, given in (("pyvit_flash", lengths), ("pyvit", lengths), ("pyvit_flash", {"position_ids": positions})):
        out, _ = transformers.AttentionInterface()[name](Layer(), q, k, v, None, **given)
        assert relative_error(out, expected) < 1e-5
    assert calls == ["flash_attention_varlen"] * 3


@pytest.mark.parametrize("option", ["softcap", "s_aux", "sliding_window", "dropout"])
def test_nothing_is_ignored(option):
    q = torch.randn(2, 2, 9, 16)
    options = {option: {"softcap": 30.0, "s_aux": torch.zeros(2), "sliding_window": 4, "dropout": 0.5}[option]}
    functions = transformers.AttentionInterface()
    padding = torch.arange(9) < torch.tensor([[9], [5]])
    with pytest.raises(ValueError, match=f"does not support {option}"):
        functions["pyvit_flash"](Layer(), q, q, q, padding, **options)
    if option in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"pyvit does not support {option}"):
            functions["pyvit"](Layer(), q, q, q, None, **options)
    if option == "sliding_window":
        with pytest.raises(ValueError, match="does not support sliding_window"):
            functions["pyvit_flash"](Layer(), q, q, q, None, **options)


def test_dropout():
    model, call = MODELS["ViT"]()
    model = set_attention(model, "pyvit")
    for m in model.modules():
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.5
    assert torch.equal(call(model), call(model))
    model.train()
    assert not torch.equal(call(model), call(model))


@pytest.mark.parametrize("implementation", ["pyvit", "pyvit_flash"])
def test_saved_and_loaded(implementation, tmp_path):
    model, call = MODELS["ViT"]()
    expected = call(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    made = transformers.AutoModel.from_config(model.config, attn_implementation=implementation)
    for each in (loaded, made):
        assert each.config._attn_implementation == implementation
        each.load_state_dict(model.state_dict())
        assert relative_error(call(each.eval()), expected) < 1e-5
    loaded.save_pretrained(tmp_path / "again")
    assert "pyvit" not in (tmp_path / "again" / "config.json").read_text()


def test_registering_again_changes_nothing():
    utils = transformers.modeling_flash_attention_utils
    before = utils._lazy_imports, dict(transformers.AttentionInterface._global_mapping)
    transformers_attention.register()
    assert before == (utils._lazy_imports, dict(transformers.AttentionInterface._global_mapping))
    with pytest.raises(ValueError, match="another_flash"):  # transformers' own error for a name that it does not know
        utils.lazy_import_flash_attention("another_flash")


def test_attention_weights_as_with_sdpa():
    model, _ = MODELS["ViT"]()
    for name in ("sdpa", "pyvit"):
        model.set_attn_implementation(name)
        with pytest.raises(ValueError, match="eager"):
            model.config.output_attentions = True


@pytest.mark.parametrize(("name", "implementation"), [("ViT", "pyvit"), ("RADIO, packed", "pyvit_flash")])
def test_compiles(name, implementation):
    model, call = MODELS[name]()
    expected = call(set_attention(model, implementation))
    # transformers itself reads the lengths of packed images from a tensor.
    found = call(torch.compile(model, fullgraph=name == "ViT", backend="aot_eager"))
    assert relative_error(found, expected) < 1e-4
    found.square().sum().backward()


@pytest.mark.parametrize("name", ["ViT", "Swin", "CLIP"])
def test_accelerate_after_it(name):
    model, call = MODELS[name]()
    replaced = counts(pyvit.accelerate(copy.deepcopy(model), strict=True))
    with torch.no_grad():
        expected = call(set_attention(model, "pyvit"))
        report = pyvit.accelerate(model, strict=True)
        assert counts(report) == replaced
        assert relative_error(call(model), expected) < 1e-4
        set_attention(model, "pyvit_flash")
        assert relative_error(call(model), expected) < 1e-4
        report = pyvit.accelerate(model, strict=True)
        notes = {row.note for row in report.left}
        assert notes == (
            set()
            if name == "Swin"
            else {"'pyvit_flash' attends by pyvit already; set_attn_implementation('pyvit') first"}
        )
        assert relative_error(call(model), expected) < 1e-4
