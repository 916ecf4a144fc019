"""Leaving out any one barrier of any kernel must show: as a wrong result, or as a fault that the emulation reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _attention(emulator: Any, seed: int) -> list[torch.Tensor]:
    """Several key tiles, grouped heads, a bias that broadcasts over queries."""
    q, grad = torch.randn(1, 2, 70, 32).bfloat16(), torch.randn(1, 2, 70, 32).bfloat16()
    k, v = torch.randn(1, 1, 150, 32).bfloat16(), torch.randn(1, 1, 150, 32).bfloat16()
    options = (torch.randn(1, 2, 1, 150), False, 0.2, 0.0, None, "cuda")
    out, lse = emulator.op("flash_attention", q, k, v, *options, seed=seed)
    return [out, lse, *emulator.op("flash_attention_backward", grad, None, out, lse, True, q, k, v, *options, seed=seed + 1)]


def _windows(emulator: Any, seed: int) -> list[torch.Tensor]:
    """Several windows per block, cosine attention, a bias table, padding."""
    qkv, grad = torch.randn(2, 14, 12, 96).bfloat16(), torch.randn(2, 14, 12, 32).bfloat16()
    options = ([7, 7], [3, 3], 1, torch.randn(169, 1), torch.randn(1), torch.randn(96), 1.0, 0.0, None, "cuda")
    out, lse = emulator.op("window_attention", qkv, *options, seed=seed)
    return [out, lse, *emulator.op("window_attention_backward", grad, out, lse, qkv, *options, seed=seed + 1)]


def _patches(emulator: Any, seed: int) -> list[torch.Tensor]:
    images, weight = torch.randn(2, 3, 16, 16).bfloat16(), torch.randn(40, 3, 8, 8).bfloat16()
    options = (None, [8, 8], None, None, None, None, None, "cuda")
    out = emulator.op("patch_embed", images, weight, *options, seed=seed)
    return [out, *emulator.op("patch_embed_backward", out, True, True, images, weight, *options, seed=seed + 1)]


def _outcome(case: Callable[..., list[torch.Tensor]], emulator: Any, seed: int) -> list[torch.Tensor] | str:
    torch.manual_seed(0)
    try:
        return case(emulator, seed)
    except RuntimeError as error:
        return str(error)


def _same(a: list[torch.Tensor] | str, b: list[torch.Tensor] | str) -> bool:
    return (
        isinstance(a, list)
        and isinstance(b, list)
        and all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))
    )


def test_every_barrier_is_needed(emulator):
    met: set[str] = set()
    needed: set[str] = set()
    try:
        for case in (_attention, _windows, _patches):
            emulator.skip_barrier("")
            emulator.call("pyvit_emulation_forget_sites")
            right = _outcome(case, emulator, 1)
            sites = set(emulator.call("pyvit_emulation_sites")[0].split())
            assert isinstance(right, list)
            assert _same(right, _outcome(case, emulator, 100)), "the order of threads changes the result"
            met |= sites
            for site in sites - needed:
                emulator.skip_barrier(site)
                if not all(_same(right, _outcome(case, emulator, seed)) for seed in range(200, 212, 2)):
                    needed.add(site)
    finally:
        emulator.skip_barrier("")
    assert len(met) >= 12
    assert met == needed, f"leaving these out changed nothing in six orders of threads: {met - needed}"
