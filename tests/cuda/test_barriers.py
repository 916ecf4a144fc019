"""Leaving out any barrier of any kernel gives a wrong result or an error of the emulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


def _attention(emulator: Any, seed: int, mask: float = 0.0) -> list[torch.Tensor]:
    """Several tiles of keys, grouped heads, a bias that broadcasts over queries."""
    q, grad = torch.randn(1, 2, 70, 32).bfloat16(), torch.randn(1, 2, 70, 32).bfloat16()
    k, v = torch.randn(1, 1, 150, 32).bfloat16(), torch.randn(1, 1, 150, 32).bfloat16()
    options = (torch.randn(1, 2, 1, 150) + mask, False, 0.2, 0.0, None, "cuda")
    out, lse = emulator.op("flash_attention", q, k, v, *options, seed=seed)
    return [
        out,
        lse,
        *emulator.op("flash_attention_backward", grad, None, out, lse, True, q, k, v, *options, seed=seed + 1),
    ]


def _masked_attention(emulator: Any, seed: int) -> list[torch.Tensor]:
    """Large log-sum-exps, for which the backward recomputes row sums."""
    return _attention(emulator, seed, -1e4)


def _windows(
    emulator: Any, seed: int, dtype: torch.dtype = torch.bfloat16, side: int = 7, size: tuple[int, int] = (14, 12)
) -> list[torch.Tensor]:
    """Several windows per block, cosine attention, a bias table, padding."""
    qkv, grad = torch.randn(2, *size, 96).to(dtype), torch.randn(2, *size, 32).to(dtype)
    table = torch.randn((2 * side - 1) ** 2, 1)
    options = ([side, side], [3, 3], 1, table, torch.randn(1), torch.randn(96), 1.0, 0.0, None, "cuda")
    out, lse = emulator.op("window_attention", qkv, *options, seed=seed)
    return [out, lse, *emulator.op("window_attention_backward", grad, out, lse, qkv, *options, seed=seed + 1)]


def _wide_windows(emulator: Any, seed: int) -> list[torch.Tensor]:
    """Elements of four bytes: shared memory holds one window at a time."""
    return _windows(emulator, seed, torch.float32)


def _large_windows(emulator: Any, seed: int) -> list[torch.Tensor]:
    """Too large for one block to compute all gradients in one pass."""
    return _windows(emulator, seed, side=13, size=(13, 40))


def _largest_windows(emulator: Any, seed: int) -> list[torch.Tensor]:
    """Too large to sum the table's gradient in the pass over queries: it has a separate pass."""
    return _windows(emulator, seed, side=18, size=(18, 18))


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


def _sites(path: Path) -> list[int]:
    return [number for number, line in enumerate(path.read_text().splitlines(), 1) if "PYVIT_BARRIER();" in line]


def test_every_barrier_is_needed(emulator):
    met: set[str] = set()
    needed: set[str] = set()
    try:
        for case in (
            _attention,
            _masked_attention,
            _windows,
            _wide_windows,
            _large_windows,
            _largest_windows,
            _patches,
        ):
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
    written = {f"{path.name}:{line}" for path in CUDA.glob("*.cu*") for line in _sites(path)}
    assert met == written, "a barrier that no case meets is not shown to be needed"
    assert met == needed, f"leaving these out changed nothing in six orders of threads: {met - needed}"
