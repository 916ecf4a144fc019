"""Attention kernels of other libraries: the row of one that cannot run says why."""

from __future__ import annotations

import functools

import pytest

from benchmarks import attention_peers, providers
from benchmarks.cases import Case
from benchmarks.workload import ATTENTION_PEERS, Workload

SHAPE = {"batch": 2, "heads": 2, "length": 50, "dim": 16}


def build(case: Case, *asked: str) -> Workload:
    return providers.build(case, "random", (), extra=functools.partial(attention_peers.extra, asked))


def test_each_sdpa_backend_is_right_or_says_why_not() -> None:
    work = build(Case("flash_attention", "s", "fp32", "forward", SHAPE), "sdpa")
    assert {"sdpa flash", "sdpa math"} <= set(work.contenders)
    for name in ("sdpa flash", "sdpa math"):
        verdict = work.contenders[name].verdict()
        assert verdict.error <= 4 * verdict.allowed
    for name in ("sdpa cuDNN", "sdpa efficient"):
        assert work.unavailable[name] == "PyTorch has it for GPUs only"


def test_libraries_for_gpus_say_so() -> None:
    work = build(Case("flash_attention", "s", "bf16", "forward", SHAPE), *ATTENTION_PEERS)
    for name in ("flash-attn", "xformers", "natten"):
        assert "GPUs only" in work.unavailable[name]
    training = build(Case("flash_attention", "s", "fp32", "forward+backward", SHAPE), "flex")
    assert training.unavailable == {"flex": "FlexAttention has no backward on CPUs"}


def test_only_what_was_asked_for_is_added() -> None:
    plain = build(Case("flash_attention", "s", "fp32", "forward", SHAPE))
    assert not plain.unavailable
    assert set(plain.contenders) == {"ours", "naive", "sdpa"}
    linear = Case("linear", "s", "fp32", "forward", {"m": 3, "k": 4, "n": 5, "activation": None})
    assert not build(linear, *ATTENTION_PEERS).unavailable


def test_natten_is_no_window_attention() -> None:
    window = {"batch": 1, "side": 14, "width": 32, "heads": 2, "window": 7, "shift": 3, "version": 1}
    work = build(Case("window_attention", "w", "fp32", "forward", window), "natten")
    assert "another computation" in work.unavailable["natten"]


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_flex_attention_agrees(bias: bool) -> None:
    work = build(Case("flash_attention", "s", "fp32", "forward", {**SHAPE, "bias": bias}), "flex")
    verdict = work.contenders["flex"].verdict()
    assert verdict.error <= 4 * verdict.allowed
