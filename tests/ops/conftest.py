"""A valid call of every operator, for the tests of their common properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pyvit import BackendError, ops
from pyvit.testing import Served, served

pytest.register_assert_rewrite("tests.ops.pairwise_losses")


@pytest.fixture
def far(on: Served) -> str:
    """The layout "far", with rows far apart, if the device has memory for three such tensors (on a CPU the memory is
    hardly touched)."""
    try:
        _ = [torch.empty(2**31 + 4096, dtype=on.dtype, device=on.device) for _ in range(3)]
    except RuntimeError:
        pytest.skip(f"no room for three tensors of 2**31 elements of {on.dtype} on {on.device}")
    return "far"


class Example(NamedTuple):
    """``op(**tensors, **options, backend=on.backend)``; ``low`` are the positional arguments of the same call of
    torch.ops.pyvit, backend last."""

    op: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    low: tuple[Any, ...]

    def __call__(self, on: Served, tensors: dict[str, Tensor] | None = None) -> list[Tensor]:
        out = self.op(**(tensors or self.tensors), **self.options, backend=on.backend)
        return [out] if isinstance(out, Tensor) else list(out)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in self.tensors.items()}


def attention(on: Served) -> Example:
    t = {
        "q": on.randn(2, 4, 18, 32),
        "k": on.randn(2, 2, 25, 32),
        "v": on.randn(2, 2, 25, 24),
        "bias": torch.randn(2, 1, 18, 25, device=on.device),
    }
    options = {"enable_gqa": True, "return_lse": True, "scale": 0.2}
    return Example(ops.flash_attention, t, options, (*t.values(), False, 0.2, 0.0, None, on.backend))


def causal(on: Served) -> Example:
    t = {name: on.randn(1, 2, 40, 64) for name in "qkv"}
    return Example(ops.flash_attention, t, {"is_causal": True}, (*t.values(), None, True, 0.125, 0.0, None, on.backend))


def varlen(on: Served) -> Example:
    t = {
        "q": on.randn(30, 4, 32),
        "k": on.randn(36, 4, 32),
        "v": on.randn(36, 4, 24),
        "bias": torch.randn(1, 4, 1, 20, device=on.device),
    }
    cu_q, cu_k = torch.tensor([0, 11, 30], device=on.device), torch.tensor([0, 20, 36], device=on.device)
    options = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": 19,
        "max_seqlen_k": 20,
        "return_lse": True,
        "scale": 0.2,
    }
    low = (t["q"], t["k"], t["v"], cu_q, cu_k, 19, 20, t["bias"], False, 0.2, on.backend)
    return Example(ops.flash_attention_varlen, t, options, low)


def rope(on: Served) -> Example:
    # v first: forward-mode tests differentiate the first tensor along ones, which a layer norm does not see.
    t = {name: on.randn(2, 3, 21, 32) for name in "vqk"}
    t["rope"] = torch.randn(3, 19, 2, 28, device=on.device)
    t |= {f"{x}_{kind}": torch.randn(32, device=on.device) for x in "qk" for kind in ("weight", "bias")}
    options = {"num_prefix_tokens": 2, "qk_norm": "layer", "eps": 1e-5, "return_lse": True, "scale": 0.2}
    parameters = (t["q_weight"], t["q_bias"], t["k_weight"], t["k_bias"])
    low = (t["q"], t["k"], t["v"], t["rope"][None], *parameters, None, 0, None, "layer", 1e-5, 2, False, False, 0.2)
    return Example(ops.rope_attention, t, options, (*low, on.backend))


def packed_rope(on: Served) -> Example:
    t = {"q": on.randn(30, 4, 24), "k": on.randn(30, 2, 24), "v": on.randn(30, 2, 24)}
    t["rope"] = torch.randn(30, 2, 24, device=on.device)
    t |= {f"{x}_weight": torch.randn(24, device=on.device) for x in "qk"}
    cu = torch.tensor([0, 11, 30], device=on.device)
    options = {"interleaved": True, "qk_norm": "rms", "eps": 1e-5, "cu_seqlens": cu, "max_seqlen": 19, "scale": 0.2}
    parameters = (t["q_weight"], None, t["k_weight"], None)
    low = (t["q"], t["k"], t["v"], t["rope"][None, None], *parameters, cu, 19, None, "rms", 1e-5, 0, True, False, 0.2)
    return Example(ops.rope_attention, t, {**options, "enable_gqa": True}, (*low, on.backend))


def decomposed(on: Served) -> Example:
    t = {"q": on.randn(2, 3, 18, 32), "k": on.randn(2, 3, 20, 32), "v": on.randn(2, 3, 20, 24)}
    t |= {"rel_h": torch.randn(2, 3, 18, 4, device=on.device), "rel_w": torch.randn(2, 3, 18, 5, device=on.device)}
    options = {"return_lse": True, "scale": 0.2}
    return Example(ops.decomposed_attention, t, options, (*t.values(), 0.2, on.backend))


def attention_map(on: Served) -> Example:
    t = {"q": on.randn(2, 4, 18, 32), "k": on.randn(2, 2, 25, 32), "bias": torch.randn(2, 1, 18, 25, device=on.device)}
    rows = torch.tensor([[0, 4], [17, 4]], device=on.device)
    return Example(
        ops.attention_map, t, {"rows": rows, "scale": 0.2}, (t["q"], t["k"], rows, t["bias"], 0.2, on.backend)
    )


def window(on: Served) -> Example:
    t = {"qkv": on.randn(2, 9, 11, 96), "bias_table": torch.randn(49, 2, device=on.device), "pad_qkv": on.randn(96)}
    options = {"window_size": (4, 4), "shift_size": (2, 1), "num_heads": 2}
    low = (t["qkv"], [4, 4], [2, 1], 2, t["bias_table"], None, t["pad_qkv"], 0.25, 0.0, None, on.backend)
    return Example(ops.window_attention, t, options, low)


def cosine_window(on: Served) -> Example:
    t = {"qkv": on.randn(2, 8, 6, 144), "bias_table": torch.randn(25, 3, device=on.device)}
    t["logit_scale"] = torch.tensor([1.0, 2.3, 5.0], device=on.device)
    options = {"window_size": 3, "num_heads": 3}
    low = (t["qkv"], [3, 3], [0, 0], 3, t["bias_table"], t["logit_scale"], None, 0.25, 0.0, None, on.backend)
    return Example(ops.window_attention, t, options, low)


def patch(on: Served) -> Example:
    t = {"images": on.randn(3, 3, 12, 20), "weight": on.randn(40, 3, 4, 4, scale=0.1), "bias": on.randn(40)}
    t |= {"pos_embed": on.randn(15, 40), "prefix": on.randn(2, 40)}
    keep = torch.stack([torch.randperm(15)[:5] for _ in range(3)]).to(on.device)
    mean, std = torch.tensor([0.4, 0.5, 0.6], device=on.device), torch.tensor([0.2, 0.3, 0.2], device=on.device)
    low = (t["images"], t["weight"], t["bias"], [4, 4], t["pos_embed"], t["prefix"], keep, mean, std, on.backend)
    return Example(ops.patch_embed, t, {"keep": keep, "mean": mean, "std": std}, low)


def bytes_patch(on: Served) -> Example:
    t = {
        "images": torch.randint(256, (2, 1, 16, 13), dtype=torch.uint8, device=on.device),
        "weight": on.randn(24, 1, 5, 5, scale=0.1),
    }
    return Example(ops.patch_embed, t, {"stride": 3}, (t["images"], t["weight"], None, [3, 3], *[None] * 5, on.backend))


EXAMPLES = {
    "flash_attention": attention,
    "flash_attention-causal": causal,
    "flash_attention_varlen": varlen,
    "attention_map": attention_map,
    "decomposed_attention": decomposed,
    "rope_attention": rope,
    "rope_attention-packed": packed_rope,
}
EXAMPLES |= {
    "window_attention": window,
    "window_attention-cosine": cosine_window,
    "patch_embed": patch,
    "patch_embed-bytes": bytes_patch,
}


@pytest.fixture
def example(name: str, on: Served, seeded: int) -> Example:
    """The call ``name`` (a key of EXAMPLES) for the backend, device and dtype ``on``."""
    return EXAMPLES[name](on)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``example`` runs for every operator on every kernel in float32, or on the naive form if
    there is no kernel. If it is marked ``every_dtype``, it also runs in the other dtypes; if ``gpu``, only on GPUs."""
    if "example" not in metafunc.fixturenames:
        return
    cases = []
    for name in EXAMPLES:
        every = served(name.partition("-")[0])
        kernels = [on for on in every if on.backend != "reference"] or every
        if metafunc.definition.get_closest_marker("gpu"):
            kernels = [on for on in kernels if on.device == "cuda"]
        if not metafunc.definition.get_closest_marker("every_dtype"):
            kernels = [on for on in kernels if on.dtype == torch.float32]
        cases += [(name, on) for on in kernels]
    metafunc.parametrize(("name", "on"), cases, ids=[f"{name}-{on}" for name, on in cases])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Skip head dimensions that a GPU backend does not support; test_errors.py tests the error."""
    try:
        return (yield)
    except BackendError as error:
        if "head dimension" in str(error) and pyfuncitem.get_closest_marker("gpu"):
            pytest.skip(str(error))
        raise
