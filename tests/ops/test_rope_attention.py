"""rope_attention under the numerics rule: outputs, log-sum-exp and all gradients, and its errors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import pyvit
from pyvit.ops import flash_attention, rope_attention
from pyvit.testing import NumericsError, Served, check_op, compare, served
from tests.ops.test_rotate import rope_of

on_every = pytest.mark.parametrize("on", served("rope_attention", "grad", "bias"), ids=str)
with_lse = functools.partial(rope_attention, return_lse=True)
NORMS = (None, "layer", "rms")


def inputs(
    on: Served,
    shape: tuple[int, ...],
    d: int,
    *,
    dv: int | None = None,
    kv: tuple[int, ...] | None = None,
    norm: str | None = None,
    rotated: int | None = None,
    prefix: int = 0,
    lead: tuple[int, ...] = (),
    interleaved: bool = False,
) -> dict[str, Tensor]:
    """q, k, v of ``shape`` (B, H, N) or (T, H), sines and cosines of random angles, and the norm's parameters."""
    kv = kv or shape
    n = shape[0] if len(shape) == 2 else shape[2]
    tensors = {"q": on.randn(*shape, d), "k": on.randn(*kv, d), "v": on.randn(*kv, dv or d)}
    angles = 3 * torch.randn(*lead, n - prefix, (rotated or d) // 2, device=on.device)
    tensors["rope"] = rope_of(angles, interleaved)
    if norm is not None:
        kinds = ("weight", "bias") if norm == "layer" else ("weight",)
        offset = {"weight": 1.0, "bias": 0.0}
        tensors |= {f"{x}_{kind}": offset[kind] + torch.randn(d, device=on.device) / 4 for x in "qk" for kind in kinds}
    return tensors


def check(on: Served, tensors: dict[str, Tensor], call: Any = with_lse, **options: Any) -> None:
    """By the rule; the gradient of the angles is a sum over batch entries and heads."""
    q, k, broadcast = tensors["q"], tensors["k"], options.pop("broadcast", {})
    if "rope" in tensors:
        heads = q.shape[1] if q.shape[1] == k.shape[1] else 1
        lead = (q.shape[0], heads) if q.dim() == 4 else (heads,)
        broadcast = {**broadcast, "rope": (*lead, *tensors["rope"].shape[-3:])}
    options = {"name": "rope_attention", "backend": on.backend, "dtype": on.dtype, **options}
    check_op(call, tensors, broadcast=broadcast, **options)


SHAPES = [((2, 3, n), 64) for n in (1, 2, 15, 16, 17, 49, 65)] + [((1, 2, 197), 64), ((1, 1, 257), 80)]
SHAPES += [((1, 2, 33), d) for d in (2, 4, 6, 8, 16, 32, 40, 72, 80, 88, 96, 128)] + [((1, 1, 19), 256)]


@pytest.mark.isa
@on_every
@pytest.mark.parametrize(("shape", "d"), SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_shapes(on: Served, shape: tuple[int, ...], d: int, interleaved: bool, norm: str | None) -> None:
    if norm == "layer" and d == 2:
        pytest.skip("two channels minus their mean are opposite numbers, whose gradients cancel")
    tensors = inputs(on, shape, d, norm=norm, interleaved=interleaved)
    check(on, tensors, interleaved=interleaved, qk_norm=norm)


@pytest.mark.slow
@on_every
@pytest.mark.parametrize("shape", [(1, 2, 577), (1, 1, 1370), (1, 1, 2100)], ids=str)
def test_long(on: Served, shape: tuple[int, ...]) -> None:
    """Several pieces of a head, and several blocks of keys."""
    tensors = inputs(on, shape, 64, norm="layer", prefix=1)
    check(on, tensors, qk_norm="layer", num_prefix_tokens=1)


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "rotated"), [(64, 32), (80, 40), (88, 66), (16, 2), (48, 44)])
@pytest.mark.parametrize("norm", [None, "rms"])
def test_some_channels_and_prefix(on: Served, interleaved: bool, d: int, rotated: int, norm: str | None) -> None:
    tensors = inputs(on, (2, 2, 37), d, norm=norm, rotated=rotated, prefix=5, interleaved=interleaved)
    options = {"interleaved": interleaved, "num_prefix_tokens": 5, "qk_norm": norm}
    check(on, tensors, **options)


@on_every
@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 1), (1, 1)], ids=str)
def test_angles_per_head_and_batch_entry(on: Served, lead: tuple[int, ...]) -> None:
    tensors = inputs(on, (2, 3, 41), 32, norm="layer", prefix=1, lead=lead)
    check(on, tensors, num_prefix_tokens=1, qk_norm="layer")


@on_every
@pytest.mark.parametrize("norm", NORMS)
def test_grouped_queries_bias_and_causal(on: Served, norm: str | None) -> None:
    tensors = inputs(on, (2, 6, 45), 32, kv=(2, 2, 45), dv=24, norm=norm)
    tensors["bias"] = torch.randn(1, 6, 45, 45, device=on.device)
    options = {"enable_gqa": True, "is_causal": True, "scale": 0.3, "qk_norm": norm}
    check(on, tensors, broadcast={"bias": (2, 6, 45, 45)}, **options)


@on_every
@pytest.mark.parametrize("norm", NORMS[1:])
def test_norm_alone_of_other_keys(on: Served, norm: str) -> None:
    tensors = inputs(on, (2, 2, 30), 48, kv=(2, 2, 51), norm=norm)
    del tensors["rope"]
    check(on, tensors, qk_norm=norm, eps=1e-3)


@on_every
def test_norm_without_parameters(on: Served) -> None:
    for norm in NORMS[1:]:
        tensors = inputs(on, (1, 2, 30), 48)
        check(on, tensors, qk_norm=norm)
        del tensors["rope"]
        check(on, tensors, qk_norm=norm)


@on_every
def test_nothing_to_do_is_flash_attention(on: Served) -> None:
    tensors = {name: on.randn(2, 2, 30, 32) for name in "qkv"}
    assert torch.equal(rope_attention(**tensors, backend=on.backend), flash_attention(**tensors, backend=on.backend))


@on_every
@pytest.mark.parametrize("store", ["transposed", "permuted", "sliced", "stepped", "shifted"])
def test_strides(on: Served, store: str) -> None:
    tensors = inputs(on, (2, 3, 21), 40, norm="layer", prefix=1, lead=(3,))
    options = {"num_prefix_tokens": 1, "qk_norm": "layer"}
    check(on, tensors, store=store, store_grad=store, **options)


@on_every
def test_views_of_one_projection(on: Served) -> None:
    """Parts of a packed (B, N, 3, H, D): no copy, and the result of copies."""
    packed = on.randn(2, 50, 3, 4, 64)
    parts = dict(zip("qkv", packed.transpose(1, 3).unbind(2), strict=True))
    rope = rope_of(torch.randn(50, 32, device=on.device), False)
    found = rope_attention(**parts, rope=rope, backend=on.backend)
    want = rope_attention(**{name: t.contiguous() for name, t in parts.items()}, rope=rope, backend=on.backend)
    if on.backend == "reference":  # PyTorch's matrix products sum in another order
        torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-3)
    else:
        assert torch.equal(found, want)
    assert found.transpose(1, 2).is_contiguous(), "heads merge without a copy"
    assert not pyvit.explain(rope_attention, **parts, rope=rope, backend=on.backend).notes


MIXES = [[5], [1, 50, 17, 97], [3, 0, 9], [49] * 6, [0, 0], []]


@pytest.mark.isa
@on_every
@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_packed_sequences(on: Served, lengths: list[int], interleaved: bool, norm: str | None) -> None:
    lead = (2,) if interleaved else ()
    tensors = inputs(on, (sum(lengths), 2), 40, norm=norm, interleaved=interleaved, lead=lead)
    cu = torch.tensor([0, *lengths], device=on.device).cumsum(0)
    call = functools.partial(with_lse, cu_seqlens=cu, max_seqlen=max([1, *lengths]))
    options = {"interleaved": interleaved, "qk_norm": norm, "is_causal": interleaved}
    check(on, tensors, call, **options)


@pytest.mark.isa
@on_every
def test_gradients_are_the_same_for_one_and_two_threads(on: Served, threads: Any) -> None:
    """Of a head in several pieces, of which two threads take different ones."""
    tensors = inputs(on, (1, 1, 600), 16, norm="layer", prefix=2)
    results = []
    for n in (1, 2):
        threads(n)
        leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
        out = rope_attention(
            **dict(zip(tensors, leaves, strict=True)), num_prefix_tokens=2, qk_norm="layer", backend=on.backend
        )
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    if on.backend != "reference":
        assert all(map(torch.equal, *results))


@on_every
def test_a_missing_rotation_is_noticed(on: Served) -> None:
    """The rule fails where the kernel rotates other pairs."""
    tensors = inputs(on, (1, 2, 33), 32)

    def wrong(*, backend: str, **kw: Any) -> Any:
        return rope_attention(**kw, interleaved=backend != "reference", backend=backend)

    if on.backend != "reference":
        with pytest.raises(NumericsError):
            check_op(
                wrong, tensors, backend=on.backend, dtype=on.dtype, naive=lambda **kw: wrong(backend="reference", **kw)
            )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_parts(norm: str | None, packed: bool, dtype: torch.dtype) -> None:
    """The backend "torch"."""
    on = Served("torch", "cpu", dtype)
    tensors = inputs(on, (45, 2) if packed else (2, 2, 45), 32, norm=norm)
    call = with_lse
    if packed:
        call = functools.partial(with_lse, cu_seqlens=torch.tensor([0, 15, 45]), max_seqlen=30)
    options = {} if packed else {"is_causal": True}
    check(on, tensors, call, qk_norm=norm, **options)
    if not packed:
        report = pyvit.explain(rope_attention, **tensors, qk_norm=norm, backend="torch")
        assert any("then flash_attention" in note for note in report.notes)


def test_learned_frequencies() -> None:
    """Angles per head from learned frequencies ("mixed" of Heo et al.) get the gradient of the formula."""
    torch.manual_seed(1)
    positions = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij"), -1).flatten(0, 1)
    frequencies = torch.randn(3, 2, 8, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, 3, 30, 16, dtype=torch.float64).unbind(0)

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = frequencies.to(dtype).requires_grad_()
        angles = torch.einsum("nx,hxc->hnc", positions.to(dtype), leaf)
        given = (t.to(dtype) for t in (q, k, v))
        out = rope_attention(*given, rope_of(angles, True), interleaved=True, backend=backend)
        return torch.autograd.grad(out.square().sum(), leaf)[0]

    backend = pyvit.explain(rope_attention, *(t.float() for t in (q, k, v))).chosen
    compare(
        "frequencies",
        gradient(torch.float32, backend),
        gradient(torch.float32, "reference"),
        gradient(torch.float64, "reference"),
        3,
    )


def z(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


DENSE = {"q": z(2, 4, 12, 8), "k": z(2, 4, 12, 8), "v": z(2, 4, 12, 8), "rope": z(12, 2, 8)}
PACKED = {"q": z(9, 4, 8), "k": z(9, 4, 8), "v": z(9, 4, 8), "rope": z(9, 2, 8)}
PACKED |= {"cu_seqlens": torch.tensor([0, 4, 9]), "max_seqlen": 5}
ERRORS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], list[str]]] = [
    (DENSE, {"rope": z(11, 2, 8)}, ValueError, ["rope must", "(2, 4, 12, 2, R)", "12 tokens", "(1, 1, 11, 2, 8)"]),
    (DENSE, {"num_prefix_tokens": 1}, ValueError, ["rope must", "(2, 4, 11, 2, R)", "1 are not rotated"]),
    (DENSE, {"num_prefix_tokens": 13, "rope": z(0, 2, 8)}, ValueError, ["num_prefix_tokens", "12", "13"]),
    (DENSE, {"num_prefix_tokens": -1}, ValueError, ["num_prefix_tokens", "at least 0", "-1"]),
    (DENSE, {"rope": z(12, 2, 7)}, ValueError, ["rope must", "even number of channels", "7"]),
    (DENSE, {"rope": z(12, 2, 10)}, ValueError, ["rope must", "at most the 8", "10"]),
    (DENSE, {"rope": z(12, 2, 0)}, ValueError, ["rope must", "even number", "0"]),
    (DENSE, {"rope": z(12, 3, 8)}, ValueError, ["rope must", "(1, 1, 12, 3, 8)"]),
    (DENSE, {"rope": z(3, 12, 2, 8)}, ValueError, ["rope must", "(1, 3, 12, 2, 8)"]),
    (DENSE, {"rope": z(12, 8)}, ValueError, ["rope must", "(12, 8)"]),
    (DENSE, {"rope": z(12, 2, 8, dtype=torch.float64)}, TypeError, ["rope must be float32", "float64"]),
    (DENSE, {"rope": [0.0]}, TypeError, ["rope must be a Tensor", "list"]),
    (DENSE, {"rope": None, "num_prefix_tokens": 1}, ValueError, ["num_prefix_tokens", "0 without rope", "1"]),
    (DENSE, {"rope": None, "interleaved": True}, ValueError, ["interleaved", "False without rope"]),
    (DENSE, {"interleaved": 1}, TypeError, ["interleaved must be a bool", "int"]),
    (DENSE, {"qk_norm": "batch"}, ValueError, ["qk_norm", "layer, rms", "batch"]),
    (DENSE, {"eps": 1e-5}, ValueError, ["eps must be None without qk_norm"]),
    (DENSE, {"q_weight": z(8)}, ValueError, ["q_weight", "None unless qk_norm is given"]),
    (DENSE, {"qk_norm": "rms", "k_bias": z(8)}, ValueError, ["k_bias", "None unless qk_norm is 'layer'"]),
    (DENSE, {"qk_norm": "rms", "k_weight": z(32)}, ValueError, ["k_weight", "(8,)", "(32)"]),
    (DENSE, {"qk_norm": "layer", "q_bias": z(4, 8)}, ValueError, ["q_bias", "(8,)", "(4, 8)"]),
    (DENSE, {"qk_norm": "layer", "q_weight": z(8, dtype=torch.float16)}, TypeError, ["q_weight", "float16"]),
    (DENSE, {"k": z(2, 4, 13, 8), "v": z(2, 4, 13, 8)}, ValueError, ["k must", "(2, Hkv, 12, 8)", "(2, 4, 13, 8)"]),
    (DENSE, {"k": z(2, 2, 12, 8), "v": z(2, 2, 12, 8)}, ValueError, ["enable_gqa"]),
    (DENSE, {"v": z(2, 4, 11, 8)}, ValueError, ["v must", "(2, 4, 12, Dv)"]),
    (DENSE, {"cu_seqlens": torch.tensor([0, 12])}, ValueError, ["cu_seqlens and max_seqlen", "together"]),
    (DENSE, {"max_seqlen": 3}, ValueError, ["cu_seqlens and max_seqlen", "together"]),
    (PACKED, {"num_prefix_tokens": 1}, ValueError, ["num_prefix_tokens", "sines 0 and cosines 1"]),
    (PACKED, {"rope": z(5, 2, 8)}, ValueError, ["rope must", "(4, 9, 2, R)", "9 tokens", "5"]),
    (PACKED, {"rope": z(2, 1, 9, 2, 8)}, ValueError, ["rope must", "(2, 1, 9, 2, 8)"]),
    (PACKED, {"max_seqlen": 4}, ValueError, ["max_seqlen", "longest sequence, 5", "4"]),
    (PACKED, {"cu_seqlens": torch.tensor([0, 4, 8])}, ValueError, ["cu_seqlens", "ascending from 0 to 9"]),
    (PACKED, {"k": z(8, 4, 8), "v": z(8, 4, 8)}, ValueError, ["k must", "(9, Hkv, 8)"]),
    (PACKED, {"q": z(2, 4, 12, 8)}, ValueError, ["q must", "(T, H, D)"]),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changed", "kind", "parts"), ERRORS, ids=range(len(ERRORS)))
def test_errors(base: dict[str, Any], changed: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    for call in (rope_attention, functools.partial(pyvit.explain, rope_attention)):
        with pytest.raises(kind) as error:
            call(**{**base, **changed})
        assert str(error.value).startswith("rope_attention: ")
        assert all(part in str(error.value) for part in parts), str(error.value)
    rope_attention(**base)


def test_angles_per_head_need_as_many_key_heads() -> None:
    tensors = {"q": z(2, 4, 12, 8), "k": z(2, 2, 12, 8), "v": z(2, 2, 12, 8), "rope": z(4, 12, 2, 8)}
    with pytest.raises(ValueError, match="rope must be the same for all heads"):
        rope_attention(**tensors, enable_gqa=True)
