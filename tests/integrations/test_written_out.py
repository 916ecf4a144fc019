"""Attention that a module's own code writes out: computed as one where it is attention, as it is written elsewhere."""

import copy

import pytest
import torch
from torch import nn

import pyvit
from pyvit.integrations import written_out
from tests.integrations.checks import check_rule, results
from tests.models.parity import randomise, relative_error

HEADS, TOKENS, WIDTH = 3, 10, 96


class Attention(nn.Module):
    """As in a repository that nobody knows. ``how``: what its subclass does with the scores."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))
        self.logit_scale = nn.Parameter(torch.zeros(HEADS, 1, 1))
        self.mix = nn.Conv2d(HEADS, HEADS, 1)
        self.drop = nn.Dropout(0.1)
        self.softmax = nn.Softmax(dim=-1)
        self.scale = 0.3

    def heads(self, x):
        return self.qkv(x).reshape(len(x), TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4).unbind(0)

    def out(self, x):
        return self.proj(x.transpose(1, 2).reshape(-1, TOKENS, WIDTH))


class Scaled(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(self.drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)) @ v)


class Biased(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        attn = torch.matmul(q * self.scale, k.transpose(-1, -2)) + self.bias.unsqueeze(0)
        return self.out(torch.matmul(self.drop(self.softmax(attn)), v))


class Cosine(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        attn = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-2, -1)
        attn = nn.functional.softmax(attn * self.logit_scale.exp() + self.bias, dim=-1, dtype=torch.float32).to(x.dtype)
        return self.out(attn @ v)


class Maps(Attention):
    """Channels first."""

    def forward(self, x):
        q, k, v = (t.transpose(-2, -1) for t in self.heads(x))
        attn = ((q.transpose(-2, -1) @ k) / 2.0).softmax(-1)
        return self.out((v @ attn.transpose(-2, -1)).transpose(-2, -1))


class Windows(Attention):
    """A mask for each window, as in Swin's own file."""

    def forward(self, x):
        q, k, v = self.heads(x)
        attn = (q * self.scale) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        mask = torch.zeros(2, TOKENS, TOKENS, dtype=x.dtype)
        mask[1, :, :3] = -100.0
        attn = attn.view(len(x) // 2, 2, HEADS, TOKENS, TOKENS) + mask.unsqueeze(1).unsqueeze(0)
        attn = self.softmax(attn.view(-1, HEADS, TOKENS, TOKENS))
        return self.out(self.drop(attn) @ v)


class Batched(Attention):
    """Heads in the batch."""

    def forward(self, x):
        q, k, v = (t.flatten(0, 1) for t in self.heads(x))
        return self.out(torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).unflatten(0, (-1, HEADS)))


class TalkingHeads(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(self.mix(q @ k.transpose(-2, -1)).softmax(dim=-1) @ v)


class InPlace(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        attn = q @ k.transpose(-2, -1)
        attn += self.bias
        attn = attn.softmax(dim=-1).clone()
        attn[..., 0] = attn[..., 0] * 0.5
        return self.out(attn @ v)


class WritesToItsQueries(Attention):
    def forward(self, x):
        q, k, v = (t.clone() for t in self.heads(x))
        attn = q @ k.transpose(-2, -1)
        with torch.no_grad():
            v.mul_(2.0)
        return self.out(attn.softmax(dim=-1) @ v)


class OtherDimension(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out((q @ k.transpose(-2, -1)).softmax(dim=-2) @ v)


class ScaledAfterTheBias(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(((q @ k.transpose(-2, -1) + self.bias) * self.scale).softmax(dim=-1) @ v)


class Linear(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.out(q.softmax(dim=-1) @ (k.softmax(dim=-2).transpose(-2, -1) @ v))


class Looks(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        attn = q @ k.transpose(-2, -1)
        if attn.shape[-1] != TOKENS or attn.max() > 1e9 or len(attn) != len(x) or not bool((attn == attn).all()):
            return x
        return self.out((attn - attn.amax(-1, keepdim=True)).softmax(-1) @ v)


class Returns(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        attn = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.out(attn @ v), attn


class Keeps(Attention):
    def forward(self, x):
        q, k, v = self.heads(x)
        self.seen = (q @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.out(self.seen @ v)


ONE = [Scaled, Biased, Cosine, Maps, Windows, Batched]
OTHER = [TalkingHeads, InPlace, WritesToItsQueries, OtherDimension, ScaledAfterTheBias, Linear, Looks, Returns]


def call(module):
    x = torch.randn(4, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    out = module(x.to(module.bias.dtype))
    return out if isinstance(out, torch.Tensor) else torch.cat([out[0].flatten(), out[1].flatten()])


def calls_of_ours(monkeypatch):
    calls, ours = [], written_out.flash_attention
    monkeypatch.setattr(written_out, "flash_attention", lambda *args, **kw: calls.append(args) or ours(*args, **kw))
    return calls


@pytest.mark.parametrize("kind", [*ONE, *OTHER], ids=lambda kind: kind.__name__)
def test_outputs_and_gradients(kind, monkeypatch):
    module = randomise(kind())
    theirs, exact = results(copy.deepcopy(module), call), results(copy.deepcopy(module).double(), call)
    calls = calls_of_ours(monkeypatch)
    report = pyvit.accelerate(module)
    assert not report.left, report
    for _ in range(2):  # a module of which nothing is computed as one runs its own forward from then on
        check_rule(kind.__name__, results(module, call), theirs, exact)
    if kind in ONE:
        assert len(calls) == 2
    elif kind not in (WritesToItsQueries, Returns):
        assert not calls


def test_a_module_that_keeps_its_weights_is_left():
    report = pyvit.accelerate(nn.Sequential(Keeps()))
    assert [row.note for row in report.left] == ["not a class that pyvit knows"]


def test_narrow_heads_are_computed_as_written(monkeypatch):
    class Narrow(Scaled):
        def heads(self, x):
            return [t[..., :16] for t in super().heads(x)]

        def out(self, x):
            return x.transpose(1, 2).flatten(2)

    module = randomise(Narrow())
    expected, calls = call(module), calls_of_ours(monkeypatch)
    pyvit.accelerate(module)
    assert torch.equal(call(module), expected)
    assert not calls


def test_a_value_asked_for_within_the_forward(monkeypatch):
    class Asks(Scaled):
        def forward(self, x):
            q, k, v = self.heads(x)
            attn = q @ k.transpose(-2, -1)
            assert attn.requires_grad and attn.mT.shape == attn.shape and type(attn.data) is torch.Tensor
            return self.out(attn.softmax(-1) @ v)

    module = randomise(Asks())
    expected, calls = call(module), calls_of_ours(monkeypatch)
    pyvit.accelerate(module)
    for _ in range(2):
        assert relative_error(call(module), expected) < 1e-6
    assert not calls


def test_a_recorded_tensor_given_to_a_module_that_records(monkeypatch):
    class Inner(nn.Module):
        def forward(self, attn, v):
            again = (v @ v.transpose(-2, -1)).softmax(-1)
            return (attn + 1.0).amax(-1, keepdim=True) * (again @ v)

    class Outer(Scaled):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            q, k, v = self.heads(x)
            return self.out(self.inner(q @ k.transpose(-2, -1), v) + (q @ v.transpose(-2, -1)).softmax(-1) @ v)

    module = randomise(Outer())
    expected, calls = call(module), calls_of_ours(monkeypatch)
    pyvit.accelerate(module)
    assert relative_error(call(module), expected) < 1e-6
    assert len(calls) == 2


def test_hooks_see_the_weights(monkeypatch):
    module, seen = randomise(Scaled()), []
    expected, calls = call(module), calls_of_ours(monkeypatch)
    pyvit.accelerate(module)
    handle = module.drop.register_forward_hook(lambda m, args, out: seen.append(out.sum(-1)))
    assert relative_error(call(module), expected) < 1e-6
    assert not calls
    assert torch.allclose(seen[0], torch.ones_like(seen[0]))
    handle.remove()
    call(module)
    assert calls


def test_dropout_is_drawn():
    module = randomise(Scaled()).train()
    pyvit.accelerate(module)
    assert not torch.equal(call(module), call(module))
    module.eval()
    assert torch.equal(call(module), call(module))


def test_autocast_and_16_bits():
    module = randomise(Biased())
    expected = call(module)
    exact = call(copy.deepcopy(module).bfloat16())
    pyvit.accelerate(module)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(module)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < 0.05
    short = call(module.bfloat16())
    assert short.dtype == exact.dtype
    assert relative_error(short.float(), expected) < 0.05
