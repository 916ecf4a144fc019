"""torch's private names: this torch has them, and the fallbacks give the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyvit import library, torch_private

ROOT = Path(__file__).parents[1]

_CHECKS = """
import torch, pyvit
from pyvit import ops, torch_private
from pyvit.testing import check_op
from torch.utils.flop_counter import FlopCounterMode

assert torch_private.below_autograd is not getattr(torch._C, "_AutoDispatchBelowAutograd")
q, k, v = (torch.randn(2, 3, 17, 16) for _ in range(3))
cpu = {"backend": "cpu"}
check_op(ops.flash_attention, {"q": q, "k": k, "v": v, "bias": torch.randn(17, 17)}, return_lse=True, **cpu)
map_ = {"qkv": torch.randn(1, 8, 8, 48), "bias_table": torch.randn(49, 2)}
check_op(ops.window_attention, map_, window_size=4, shift_size=2, num_heads=2, **cpu)
x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((5, 24), (8, 24), (8,)))
check_op(ops.linear, {"x": x.detach(), "weight": w.detach(), "bias": b.detach()}, activation="gelu", **cpu)
out = ops.flash_attention(*(t.requires_grad_() for t in (q, k, v)))
(g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
g.square().sum().backward()
naive = torch.nn.functional.scaled_dot_product_attention
f = lambda op: torch.func.vmap(lambda q, k, v: op(q[None], k[None], v[None])[0])(q.detach(), k.detach(), v.detach())
torch.testing.assert_close(f(ops.flash_attention), f(naive), rtol=1e-4, atol=1e-5)
h = lambda op: torch.func.grad(lambda q: op(q, k.detach(), v.detach()).square().sum())(q.detach())
torch.testing.assert_close(h(ops.flash_attention), h(naive), rtol=1e-4, atol=1e-5)
y = ops.layer_norm(x, torch.ones(24), None, 1e-5)
rows = torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)[0]
assert rows.shape == (3, 5, 24) and rows.isfinite().all()
with torch.autocast("cpu", torch.bfloat16):
    assert ops.flash_attention(q, k, v).dtype == torch.bfloat16
    assert torch.ops.pyvit.flash_attention(q, k, v, None, False, 0.25, 0.0, None, "auto")[0].dtype == torch.bfloat16
with FlopCounterMode(display=False) as counter:
    ops.flash_attention(q.detach(), k.detach(), v.detach())
assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 17 * 17 * 16
model = pyvit.create_model("vit_pico_patch4_32").eval()
pyvit.pack_weights(model)
with torch.no_grad():
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(images), model(images))
    compiled = torch.compile(lambda *t: ops.flash_attention(*t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), naive(q, k, v), rtol=1e-4, atol=1e-5)
print("the same")
"""


def test_this_torch_has_them_all() -> None:
    assert torch_private.missing() == []


@pytest.mark.skipif(library.problem() is not None, reason="needs the compiled library")
def test_without_any_the_results_are_the_same() -> None:
    env = {**os.environ, "PYVIT_TORCH_PRIVATE": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip().endswith("the same"), done.stderr[-3000:]


@pytest.mark.parametrize("batched", [False, True])
def test_is_batched(batched: bool) -> None:
    seen = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch_private.is_batched(grad))
            return grad

    x = torch.randn(3, requires_grad=True)
    torch.autograd.grad(Ask.apply(x), x, torch.randn(2, 3) if batched else torch.randn(3), is_grads_batched=batched)
    assert seen == [batched]
