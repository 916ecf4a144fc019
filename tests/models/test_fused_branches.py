"""Residual branches with prepacked weights: each is one call of the library, and whatever changes a block or observes
its parts is respected."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as globally
from torch.utils.flop_counter import FlopCounterMode

import pyvit
from pyvit import library
from pyvit.models import create_model
from pyvit.models.swin import SwinBlock
from pyvit.nn import (
    Attention,
    Block,
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    SwiGLU,
    WindowAttention,
    attention,
    window_attention,
)
from pyvit.ops import matmul, prepacked

pytestmark = pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights go through pyvit's own product."""
    monkeypatch.setattr(matmul, "_policy", "pyvit")
    monkeypatch.setattr(matmul, "_chosen", {})


class Calls:
    """Counts the calls of the library that compute a branch, or a layer of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module, name in (
            (attention, "attention_branch"),
            (window_attention, "window_attention_branch"),
            (prepacked, "linear_branch"),
            (prepacked, "gated_branch"),
        ):
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, branch: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def counted(*args: object) -> Tensor | None:
            found = branch(*args)
            self.count += found is not None
            return found

        return counted

    def of(self, call: Callable[[], object]) -> int:
        before = self.count
        call()
        return self.count - before


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def block(**options: object) -> Block:
    torch.manual_seed(0)
    made = Block(32, 2, **options).eval()  # type: ignore[arg-type]
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    pyvit.pack_weights(made)
    return made


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def by_parts(block: nn.Module, x: Tensor, **options: object) -> Tensor:
    """The block with nothing packed: copies hold no packed weights."""
    return copy.deepcopy(block)(x, **options)


BLOCKS = {
    "plain": {},
    "LayerScale": {"init_values": 0.3},
    "SwiGLU": {"activation": "swiglu"},
    "RMSNorm, SwiGLU": {"norm_layer": RMSNorm, "mlp_layer": functools.partial(SwiGLU, split=True), "init_values": 0.3},
    "norm within": {"mlp_layer": functools.partial(SwiGLU, norm_layer=functools.partial(LayerNorm, eps=1e-6))},
    "RMSNorm": {"norm_layer": RMSNorm},
    "relu, no bias": {"activation": "relu", "qkv_bias": False},
    "drops nothing": {"proj_drop": 0.5, "attn_drop": 0.5, "drop_path": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_one_call_per_branch(options: dict, dtype: torch.dtype, calls: Calls) -> None:
    made, x = block(**options).to(dtype), X.to(dtype)
    wanted = made(x)
    torch.testing.assert_close(wanted, by_parts(made, x), rtol=0.02, atol=0.02)
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            assert torch.equal(made(x), wanted)
            assert torch.equal(made(x.transpose(1, 2).contiguous().transpose(1, 2)), wanted)  # strides
            assert torch.equal(made(x[:1].expand(2, 5, 32))[1], wanted[0])
            assert calls.of(lambda: made(x)) == 2


def test_the_bits_of_the_layers_one_by_one() -> None:
    """The operators that a branch is made of, each called by itself."""
    made = block(init_values=0.3)
    qkv = made.attn.qkv(made.norm1(X)).unflatten(-1, (3, 2, 16))
    out = pyvit.ops.flash_attention_qkvpacked(qkv).flatten(2)
    scales = {"scale": made.ls1.gamma, "residual": X}
    x = pyvit.ops.linear(out, made.attn.proj.weight, made.attn.proj.bias, **scales)
    hidden = made.mlp.fc1(made.norm2(x))
    scales = {"scale": made.ls2.gamma, "residual": x}
    assert torch.equal(made(X), pyvit.ops.linear(hidden, made.mlp.fc2.weight, made.mlp.fc2.bias, **scales))


def test_causal_and_other_sizes(calls: Calls) -> None:
    made = block()
    for x in (X, X[:1], X[:, :3], X[:0], torch.randn(3, 70, 32)):
        for causal in (False, True):
            first, second = made(x, is_causal=causal), made(x, is_causal=causal)
            assert torch.equal(first, second)
            torch.testing.assert_close(first, by_parts(made, x, is_causal=causal), rtol=1e-5, atol=1e-5)
            assert calls.of(lambda x=x, causal=causal: made(x, is_causal=causal)) == 2
    mask = torch.zeros(5, 5)
    mask[:, 2] = -10.0
    torch.testing.assert_close(made(X, attn_mask=mask), by_parts(made, X, attn_mask=mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize(("shift", "size"), [(0, 8), (2, 8), (2, 7)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_windows(shift: int, size: int, qkv_bias: bool, mask_padding: bool, calls: Calls) -> None:
    torch.manual_seed(0)
    attn = WindowAttention(32, 2, 4, shift, qkv_bias, mask_padding=mask_padding)
    made = SwinBlock(32, attn, 4.0, 0.0, 0.1, False, 1e-5).eval()
    x = torch.randn(2, size, size, 32)
    wanted = made(x)
    pyvit.pack_weights(made)
    torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)
    assert calls.of(lambda: made(x)) == 2
    made.attn.relative_position_bias_table.add_(torch.randn(49, 2))
    if qkv_bias:
        made.attn.qkv.bias.add_(1.0)  # what padding holds
    torch.testing.assert_close(made(x), by_parts(made, x), rtol=1e-4, atol=1e-4)
    assert calls.of(lambda: made(x)) == 2


def test_models_take_one_call_per_branch(calls: Calls) -> None:
    for name, merging in (("vit_tiny_patch16_224", 0), ("swin_tiny_patch4_window7_224", 3)):
        model = create_model(name, img_size=64).eval()
        pyvit.pack_weights(model)
        images = torch.randn(model.example_inputs(2)[0].shape)
        assert calls.of(lambda model=model, images=images: model.forward_features(images)) == 2 * 12 + merging


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace. is deprecated:DeprecationWarning"
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_jit_trace(name: str) -> None:
    """With packed weights, of which a recorded graph knows nothing, and after runs like the recorded one."""
    model = create_model(name, img_size=64).eval()
    images = torch.randn(model.example_inputs(2)[0].shape)
    pyvit.pack_weights(model)
    model(images)
    traced = torch.jit.trace(model, images, check_trace=False)
    images = images + torch.randn_like(images)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-4)


def _set(path: str, name: str, value: object) -> Callable[[Block], None]:
    return lambda b: setattr(b.get_submodule(path), name, value)


def _twice(self: nn.Module, x: Tensor, *_: object, **__: object) -> Tensor:
    return 2 * x


class Adapter(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x.sum(-1, keepdim=True)


def _wrap(path: str) -> Callable[[Block], None]:
    parent, _, name = path.rpartition(".")
    return lambda b: setattr(b.get_submodule(parent), name, Adapter(b.get_submodule(path)))


def _swap_data(path: str) -> Callable[[Block], None]:
    def change(b: Block) -> None:
        b.get_parameter(path).data = torch.randn_like(b.get_parameter(path))

    return change


def _load(b: Block) -> None:
    b.load_state_dict({k: torch.randn_like(v) for k, v in b.state_dict().items()})


CHANGES: dict[str, Callable[[Block], object]] = {
    "weight in place": lambda b: b.attn.qkv.weight.mul_(2.0),
    "second layer in place": lambda b: b.mlp.fc2.weight.mul_(2.0),
    "bias in place": lambda b: b.attn.proj.bias.add_(1.0),
    "norm in place": lambda b: b.norm2.weight.mul_(2.0),
    "LayerScale in place": lambda b: b.ls1.gamma.mul_(2.0),
    "weight's data": _swap_data("mlp.fc1.weight"),
    "bias's data": _swap_data("mlp.fc1.bias"),
    "state dict": _load,
    "parameter": _set("attn.qkv", "weight", nn.Parameter(torch.randn(96, 32))),
    "bias": _set("attn.proj", "bias", nn.Parameter(torch.randn(32))),
    "no bias": _set("attn.proj", "bias", None),
    "layer": _set("mlp", "fc1", Linear(32, 128, activation="gelu")),
    "activation": _set("mlp.fc1", "activation", "relu"),
    "eps": _set("norm1", "eps", 1.0),
    "heads": lambda b: vars(b.attn).update(num_heads=4, head_dim=8),
    "head norm": _set("attn", "q_norm", nn.LayerNorm(16)),
    "no LayerScale": _set("", "ls2", nn.Identity()),
    "adapter on a layer": _wrap("attn.proj"),
    "adapter on a branch": _set("", "mlp", nn.Sequential(nn.Linear(32, 32))),
    "forward of a layer": lambda b: setattr(b.mlp.fc2, "forward", lambda x: x[..., :32]),
    "forward of a part": lambda b: setattr(b.norm1, "forward", lambda x: 2 * x),
    "weights unpacked": pyvit.unpack_weights,
    "weights packed again": pyvit.pack_weights,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change: Callable[[Block], object]) -> None:
    made = block(init_values=0.5)
    before = made(X)
    assert torch.equal(made(X), before)
    change(made)
    wanted = by_parts(made, X)
    kept = change in (pyvit.unpack_weights, pyvit.pack_weights)
    assert torch.allclose(wanted, before, rtol=1e-5, atol=1e-5) == kept
    for _ in range(3):
        torch.testing.assert_close(made(X), wanted, rtol=1e-5, atol=1e-5)


def test_a_class_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    made = block()
    made(X)
    made(X)
    monkeypatch.setattr(Attention, "forward", _twice)
    torch.testing.assert_close(made(X), by_parts(made, X), rtol=1e-5, atol=1e-5)
    made.__class__ = type("Other", (Block,), {"forward": _twice})
    assert torch.equal(made(X), 2 * X)


PARTS = [
    "",
    "norm1",
    "attn",
    "attn.qkv",
    "attn.norm",
    "attn.proj",
    "attn.proj_drop",
    "mlp",
    "mlp.fc1",
    "mlp.drop",
    "ls2",
]


@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called(part: str, calls: Calls) -> None:
    made = block(init_values=0.5)
    wanted = made(X)
    made(X)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        seen: list[str] = []
        handle = getattr(made.get_submodule(part), register)(lambda *_, seen=seen: seen.append("here"))
        for _ in range(2):
            seen.clear()
            torch.testing.assert_close(made(X), wanted, rtol=1e-5, atol=1e-5)
            assert seen, register
        handle.remove()
    assert torch.equal(made(X), wanted)
    assert calls.of(lambda: made(X)) == 2  # as before the hooks


def test_hooks_of_a_new_dictionary_are_called() -> None:
    """As code that removes every hook leaves modules."""
    made = block()
    made(X)
    made(X)
    seen: list[str] = []
    for part in made.modules():
        part._forward_hooks = OrderedDict()
    made(X)
    made.attn.proj.register_forward_hook(lambda *_: seen.append("here"))
    made(X)
    assert seen


def test_hooks_on_every_module_are_called() -> None:
    made = block()
    made(X)
    made(X)
    seen: list[nn.Module] = []
    handle = globally.register_module_forward_hook(lambda module, *_: seen.append(module))
    made(X)
    handle.remove()
    assert made.attn in seen


@pytest.mark.parametrize("packs", [True, False])
def test_hooks_on_every_module_see_every_part(packs: bool) -> None:
    """Of layers that would be bypassed, too, whether weights are packed or not."""
    made = block(init_values=0.5)
    if not packs:
        pyvit.unpack_weights(made)
    wanted = made(X)
    made(X)
    seen: list[nn.Module] = []
    for register in (globally.register_module_forward_pre_hook, globally.register_module_forward_hook):
        seen.clear()
        handle = register(lambda module, *_: seen.append(module))
        found = made(X)
        handle.remove()
        assert {
            made.attn,
            made.attn.qkv,
            made.attn.proj,
            made.mlp,
            made.mlp.fc1,
            made.mlp.fc2,
            made.norm1,
            made.ls1,
        } <= {*seen}
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["forward", "__call__"])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Identity, Linear, LayerNorm, Attention, Mlp])
def test_a_class_patched_later(kind: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has the method from a parent, too."""
    made = block()
    made(X)
    made(X)
    calls: list[nn.Module] = []
    before = getattr(kind, name)
    monkeypatch.setattr(
        kind, name, lambda self, *args, **kw: calls.append(self) or before(self, *args, **kw), raising=False
    )
    found = made(X)
    assert len(calls) == sum(type(m) is kind for m in made.modules()) + (
        kind is nn.Dropout
    )  # the MLP calls its own twice
    monkeypatch.undo()
    torch.testing.assert_close(found, made(X), rtol=1e-5, atol=1e-5)


class Doubled(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "drop", [nn.Identity(), nn.Dropout(0.5).eval(), Doubled(), nn.Dropout1d(0.3).eval(), nn.AlphaDropout(0.5).train()]
)
def test_what_stands_in_a_dropouts_place_runs(drop: nn.Module) -> None:
    made = block()
    made.attn.proj_drop = made.mlp.drop = drop
    for _ in range(3):
        torch.manual_seed(0)
        found = made(X)
        torch.manual_seed(0)
        x = X + drop(made.attn.proj(made.attn.norm(_attended(made, made.norm1(X)))))
        y = F.gelu(F.linear(made.norm2(x), made.mlp.fc1.weight, made.mlp.fc1.bias))
        torch.testing.assert_close(found, x + drop(made.mlp.fc2(drop(y))), rtol=1e-5, atol=1e-5)


def _attended(made: nn.Module, x: Tensor) -> Tensor:
    q, k, v = made.attn.qkv(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_dropout_gradients_autocast_and_backends(calls: Calls) -> None:
    made = block(proj_drop=0.5, drop_path=0.5)
    wanted = made(X)
    made(X)
    made.train()
    assert not torch.equal(made(X), made(X))
    made.eval()
    assert torch.equal(made(X), wanted)
    with torch.enable_grad():
        made(X).sum().backward()
    assert made.attn.qkv.weight.grad.abs().sum() > 0
    calls.count = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(X), wanted, rtol=0.1, atol=0.1)
    with pyvit.use_backend("reference"):
        torch.testing.assert_close(made(X), wanted, rtol=1e-5, atol=1e-5)
    with FlopCounterMode(display=False) as flops:
        made(X)
    assert flops.get_total_flops() > 0
    assert calls.count == 0


def test_copies_pickles_and_casts_start_anew() -> None:
    made = block()
    made(X)
    made(X)
    other = copy.deepcopy(made)
    other.attn.proj.bias.add_(1.0)
    assert not torch.allclose(other(X), made(X))
    again = pickle.loads(pickle.dumps(made))
    torch.testing.assert_close(again(X), made(X), rtol=1e-5, atol=1e-5)
    made.to(torch.bfloat16)
    assert made(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises((TypeError, RuntimeError)):
        made(X)


def test_functional_call_and_stacked_parameters() -> None:
    made = block()
    made(X)
    made(X)
    other = {k: torch.randn_like(v) for k, v in made.state_dict().items()}
    wanted = block()
    wanted.load_state_dict(other)
    torch.testing.assert_close(torch.func.functional_call(made, other, (X,)), by_parts(wanted, X), rtol=1e-4, atol=1e-4)
    found = torch.func.vmap(made)(X[:, None])
    torch.testing.assert_close(found[:, 0], made(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [Attention(32, 2), Mlp(32, 64), WindowAttention(32, 2, 4)], ids=lambda m: str(type(m))
)
def test_inputs_of_another_width_are_told_as_without_packed_weights(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer).eval()
    x = torch.randn(1, 4, 4, 31) if isinstance(layer, WindowAttention) else torch.randn(1, 4, 31)
    for pack in (False, True):
        assert not pack or pyvit.pack_weights(layer) == 2
        with pytest.raises(ValueError, match=r"x must be of shape \(\.\.\., 32\)"):
            layer(x)


def test_the_cpu_backend_by_name_takes_packed_weights(calls: Calls) -> None:
    made = block()
    wanted = made(X)
    with pyvit.use_backend("cpu"):
        assert torch.equal(made(X), wanted)
        assert calls.of(lambda: made(X)) == 2
    fc1 = made.mlp.fc1
    assert calls.of(lambda: pyvit.ops.linear(X, fc1.weight, fc1.bias, backend="cpu")) == 1
    assert calls.of(lambda: pyvit.ops.linear(X, fc1.weight, fc1.bias, backend="reference")) == 0


@pytest.mark.parametrize("kind", [LayerNorm, pyvit.nn.RMSNorm])
def test_norms_are_of_the_last_dimension(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="dim must be the size of the last dimension"):
        kind((4, 8), elementwise_affine=False)
    assert kind((8,))(torch.randn(2, 8)).shape == (2, 8)


def test_nothing_is_kept_alive() -> None:
    made = block()
    made(X)
    words = weakref.ref(prepacked.find(made.mlp.fc1.weight).words)
    pyvit.unpack_weights(made)
    assert words() is None
    pyvit.pack_weights(made)
    made(X)
    weight, words = weakref.ref(made.mlp.fc1.weight), weakref.ref(prepacked.find(made.mlp.fc1.weight).words)
    del made
    gc.collect()
    assert weight() is None
    assert words() is None


def test_a_part_that_drops_in_batches() -> None:
    made = block(drop_path=0.5, drop_path_form="batch")
    wanted = made(X)
    made.train()
    assert not torch.equal(made(X), wanted)


def test_attention_by_sdpa_agrees() -> None:
    """Against torch's own operators, written out."""
    made = block(init_values=0.5)
    made(X)
    x = X
    q, k, v = made.attn.qkv(made.norm1(x)).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
    x = x + made.ls1.gamma * made.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = x + made.ls2.gamma * made.mlp.fc2(F.gelu(F.linear(made.norm2(x), made.mlp.fc1.weight, made.mlp.fc1.bias)))
    torch.testing.assert_close(made(X), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_what_stands_in_the_place_of_stochastic_depth_runs(training):
    """nn.Identity, a module of the user's, and a hook on a DropPath that drops nothing."""
    block, x = pyvit.nn.Block(32, 2).train(training), torch.randn(2, 5, 32)
    expected = block(x)
    block.drop_path1 = nn.Identity()
    torch.testing.assert_close(block(x), expected)
    block.drop_path2 = nn.Threshold(1e9, 0.0)  # lets nothing through
    plain = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), plain)
    seen = []
    block = pyvit.nn.Block(32, 2).train(training)
    block.drop_path1.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen == [1]
