"""pyvit.nn.Attention with norms of q and k and rotary positions: in one operator, or layer by layer where something
watches the layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyvit.nn import Attention, LayerNorm, Packing, RMSNorm, RotaryEmbedding
from pyvit.nn import attention as module

NORMS: list[type[nn.Module]] = [nn.LayerNorm, LayerNorm, nn.RMSNorm, RMSNorm]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of rope_attention."""
    found: list[dict[str, Any]] = []
    operator = module.rope_attention

    def recorded(*tensors: Tensor, **options: Any) -> Any:
        found.append(options)
        return operator(*tensors, **options)

    monkeypatch.setattr(module, "rope_attention", recorded)
    return found


def _attention(norm: type[nn.Module] | None, **options: Any) -> Attention:
    attn = Attention(64, 2, True, qk_norm=norm is not None, norm_layer=norm or nn.LayerNorm, **options)
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(torch.randn_like(p) / 4)
    return attn


def _by_layers(attn: Attention) -> Attention:
    """A copy whose q_norm is called, since a hook observes it."""
    other = copy.deepcopy(attn)
    other.q_norm.register_forward_hook(lambda *_: None)
    return other


def _gradients(attn: Attention, x: Tensor, **options: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = attn(x, **options)
    out.square().sum().backward()
    assert x.grad is not None
    return [out, x.grad, *(p.grad for p in attn.parameters() if p.grad is not None)]


@pytest.mark.parametrize("norm", [*NORMS, None])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_same_as_by_layers(
    norm: type[nn.Module] | None, interleaved: bool, packed: bool, calls: list[dict[str, Any]]
) -> None:
    attn = _attention(norm, rope_interleaved=interleaved).eval()
    embedding = RotaryEmbedding(32).eval()
    if packed:
        options = {"packing": Packing.of((13, 7)), "rope": torch.cat((embedding((3, 4), 1), embedding((2, 3), 1)))}
        x = torch.randn(20, 64)
    else:
        options, x = {"rope": embedding((3, 4), 1)}, torch.randn(2, 13, 64)
    for p in attn.parameters():
        p.grad = None
    other = _by_layers(attn)
    found = _gradients(attn, x, **options)
    assert len(calls) == 1
    if norm is None:  # an identity that is observed keeps the norms by layers too
        assert "qk_norm" not in calls[0]
    want = _gradients(other, x, **options)
    assert len(calls) == 1
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.mark.parametrize("norm", NORMS)
def test_norms_alone(norm: type[nn.Module], calls: list[dict[str, Any]]) -> None:
    attn, x = _attention(norm), torch.randn(2, 9, 64)
    mask = torch.rand(9, 9) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(attn(x, mask), _by_layers(attn)(x, mask), rtol=1e-4, atol=1e-5)
    assert [c["qk_norm"] for c in calls] == ["layer" if "Layer" in norm.__name__ else "rms"]


def test_other_norms_are_called(calls: list[dict[str, Any]]) -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(2, 9, 64)
    _attention(Doubled)(x)
    attn = _attention(nn.LayerNorm)
    attn.k_norm.eps = 1e-3
    attn(x)
    attn = _attention(nn.LayerNorm)
    attn.q_norm = nn.Identity()
    attn(x)
    attn = _attention(nn.LayerNorm, attn_drop=0.1)
    attn(x)
    assert not calls
    attn.eval()(x)
    assert len(calls) == 1


@pytest.mark.parametrize("norm", NORMS)
def test_autocast_and_bfloat16(norm: type[nn.Module], calls: list[dict[str, Any]]) -> None:
    attn, x, rope = _attention(norm).eval(), torch.randn(2, 13, 64), RotaryEmbedding(32).eval()((3, 4), 1)
    want = attn(x, rope=rope)
    with torch.autocast("cpu", torch.bfloat16):
        found = attn(x, rope=rope)
        other = _by_layers(attn)(x, rope=rope)
    assert found.dtype == torch.bfloat16
    error = (found.float() - want).norm()
    assert error < 0.03 * want.norm()
    assert error < 1.5 * (other.float() - want).norm()
    half = attn.bfloat16()(x.bfloat16(), rope=rope)
    assert (half.float() - want).norm() < 0.03 * want.norm()
    assert len(calls) == 3


def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    attn, x, rope = _attention(LayerNorm), torch.randn(2, 13, 64), RotaryEmbedding(32).eval()((3, 4), 1)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, rope=rope), attn(x, rope=rope))


def test_angles_per_head(calls: list[dict[str, Any]]) -> None:
    attn, x = _attention(None), torch.randn(2, 13, 64)
    rope = torch.stack([RotaryEmbedding(32, base).eval()((3, 4), 1) for base in (10.0, 100.0)])
    torch.testing.assert_close(attn(x, rope=rope), _by_layers(attn)(x, rope=rope), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1
