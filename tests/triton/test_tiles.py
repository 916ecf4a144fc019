"""Tile tables, tuning files and the cost model, without a GPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pyvit.dispatch import cost_model

tiles = pytest.importorskip("pyvit.triton_kernels.tiles")
tune = pytest.importorskip("pyvit.triton_kernels.tools.tune")


@pytest.mark.parametrize("n", range(1, 600, 7))
def test_parts_cover_without_much_waste(n: int) -> None:
    found = tiles.parts(n)
    assert n <= sum(found) <= max(16, 1.34 * n, n + 15)
    assert all(p >= 16 and p & (p - 1) == 0 for p in found)


def test_every_kernel_has_an_entry_for_every_call() -> None:
    for kernel in {e.kernel for e in tiles.TABLE}:
        for arch in (*tiles.SHARED_LIMIT, "interpreter"):
            assert isinstance(tiles.choose(kernel, arch, 4, 256, 1 << 20), tiles.Config)
    assert {e.kernel for e in tiles.TABLE} == set(tune.SPACE)


def test_tuning_file_comes_first_and_a_broken_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PYVIT_TILES", str(path))
    tiles.tuned.cache_clear()
    won = tiles.Config(block_m=32, warps=2)
    assert tiles.save((tiles.Entry("forward_short", won, ("sm_90",), 2, 64, 197, "measured"),)) == path
    assert tiles.choose("forward_short", "sm_90", 2, 64, 197) == won
    assert tiles.choose("forward_short", "sm_80", 2, 64, 197) != won
    assert tiles.choose("forward_short", "sm_90", 2, 64, 257) != won
    path.write_text('[{"kernel": 1}]')
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()
    with pytest.raises(ValueError, match=r"tiles\.json: not a tuning file"):
        tiles.choose("forward_short", "sm_90", 2, 64, 197)
    path.unlink()
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()


def test_candidates_are_ordered_by_padding() -> None:
    now = tiles.choose("forward_long", "sm_90", 2, 64, 576)
    found = list(tune.candidates("forward_long", now, 576))
    assert now not in found
    assert len(found) == len(set(found))
    assert all(576 % c.block_m == 0 and 576 % c.block_n == 0 for c in found[:5])
    covered = [-(-300 // c.block_m) * c.block_m for c in tune.candidates("forward_long", now, 300)]
    assert covered[0] < covered[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_tuning_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="needs a GPU"):
        tune.tune()


def test_cost_of_known_calls() -> None:
    window = cost_model.window_attention(64, 56, 56, (7, 7), 3, 32, torch.bfloat16)
    assert window.flops == 4 * 64 * 64 * 3 * 49 * 49 * 32
    assert window.bytes == pytest.approx(4 * 64 * 56 * 56 * 96 * 2, rel=0.05)
    assert window.bound("H200") == "memory"
    long = cost_model.attention(16, 16, 4096, 4096, 64, torch.bfloat16)
    assert long.bound("H200") == "compute"
    assert long.floor("NVIDIA H200") == pytest.approx(long.flops / 989e12)
    causal = cost_model.attention(1, 1, 4, 4, 8, torch.bfloat16, causal=True)
    assert causal.flops == 4 * 10 * 8
    assert (
        cost_model.attention(1, 1, 64, 64, 64, torch.float32, backward=True).flops
        == 2.5 * cost_model.attention(1, 1, 64, 64, 64, torch.float32).flops
    )
    assert cost_model.patch_embed(8, 3, (16, 16), 49, 768, torch.bfloat16).flops == 2 * 8 * 49 * 768 * 768
    with pytest.raises(KeyError, match="no rates for 'T4'"):
        cost_model.gpu_named("T4")


class _Clock:
    """Time that passes only while a candidate is timed."""

    def __init__(self) -> None:
        self.now, self.timed = 0.0, 0

    def time_of(self, _run: object) -> float:
        self.now, self.timed = self.now + 1.0, self.timed + 1
        config = tiles.choose("attention_map", "interpreter", 4, 64, 9)
        return 1.0 if (config.block_n, config.warps) == (32, 2) else 5.0


@pytest.mark.parametrize("budget", [4.0, 1000.0])
def test_tuning_stays_within_its_budget_and_keeps_the_winner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, budget: float
) -> None:
    clock, call = _Clock(), ("attention_map", "interpreter", 4, 64, 9)

    def run() -> tuple[torch.Tensor, ...]:
        tiles.choose(*call)
        return (torch.ones(3),)

    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PYVIT_TILES", str(path))
    monkeypatch.setattr(tune, "prepare", lambda *_: run)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock.now)
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()
    try:
        tiles.choose(*call)
        assert not path.exists()  # looking a tile up searches and writes nothing
        (entry,) = tune.tune(
            ["attention map N=197 d=64"], budget=budget, report=lambda _: None, time_of=clock.time_of, device="cpu"
        )
        every = 1 + len(list(tune.candidates("attention_map", tiles.TABLE[0].config, 9)))
        if budget < every:
            assert clock.timed <= budget + 1
        else:
            assert (entry.config.block_n, entry.config.warps) == (32, 2)
            assert tiles.choose(*call) == entry.config
            timed = clock.timed
            tiles.choose(*call)
            assert clock.timed == timed
        assert path.exists()
        assert "before" in entry.measured
    finally:
        tiles.tuned.cache_clear()
        tiles._look_up.cache_clear()


def test_tuning_leaves_out_wrong_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call = ("attention_map", "interpreter", 4, 64, 9)
    now = tiles.choose(*call)

    def run() -> tuple[torch.Tensor, ...]:
        return (torch.ones(3) if tiles.choose(*call) == now else torch.zeros(3),)

    monkeypatch.setenv("PYVIT_TILES", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(tune, "prepare", lambda *_: run)
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()
    said: list[str] = []
    try:
        assert tune.tune(["attention map N=197 d=64"], report=said.append, time_of=lambda _: 1.0, device="cpu") == ()
    finally:
        tiles.tuned.cache_clear()
        tiles._look_up.cache_clear()
    assert any("wrong results" in line for line in said)


def test_compiling_ahead_keeps_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """In separate processes: candidates that raise or take too long are left out. Divisions stand for compilations."""
    monkeypatch.setattr(tune, "_compile", divmod)
    assert tune.compile_ahead([(2,), (0,), (3,)], 60.0, 2, 7) == {(2,), (3,)}
    monkeypatch.setattr(tune, "_compile", time.sleep)
    assert tune.compile_ahead([()], 0.0, 1, 0.5) == set()


def test_architectures_of_a_family_share_tiles() -> None:
    """Tensor memory on sm_100 and sm_103; mma.sync with 99 KB of shared memory on sm_86, sm_89 and sm_120."""
    calls = {
        (e.kernel, e.itemsize, e.head_dim, e.length) for e in tiles.TABLE if not e.measured.startswith("attention")
    }
    for first, *others in (("sm_100", "sm_103", "sm_110"), ("sm_86", "sm_89", "sm_120"), ("gfx1100", "gfx1201")):
        for kernel, *call in calls:
            assert len({tiles.choose(kernel, arch, *call) for arch in (first, *others)}) == 1, (kernel, call)
    assert tiles.choose("pair_gradient", "sm_103", 2, 512, 4096).group == 2
    assert tiles.choose("pair_gradient", "sm_90", 2, 512, 4096).group == 4
    assert tiles.family("sm_90") != tiles.family("sm_100") != tiles.family("sm_120")
    assert set(tiles._LITTLE) == {"sm_75", "sm_86", "sm_89", "sm_120", "sm_121"}
