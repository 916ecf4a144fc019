"""Tile tables, tuning files, digests of kernels and the cost model, without a GPU."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pyvit.dispatch import cost_model
from pyvit.dispatch.capabilities import CAPABILITIES

tiles = pytest.importorskip("pyvit.triton_kernels.tiles")
tune = pytest.importorskip("pyvit.triton_kernels.tools.tune")
digests = pytest.importorskip("pyvit.triton_kernels.digests")


def _entry(config: object, **changed: object) -> object:
    """A measured entry of the kernel and the Triton at hand."""
    entry = tiles.Entry(
        "forward_short",
        config,
        ("sm_90",),
        2,
        64,
        197,
        "measured",
        digests.kernel("forward_short"),
        tiles.triton_version(),
    )
    return dataclasses.replace(entry, **changed)


@pytest.fixture
def tuning_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("PYVIT_TILES", str(path))
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()
    yield path
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()


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


def test_tuning_file_comes_first_and_a_broken_one_is_named(tuning_file: Path) -> None:
    won = tiles.Config(block_m=32, warps=2)
    assert tiles.save((_entry(won),)) == tuning_file
    assert tiles.choose("forward_short", "sm_90", 2, 64, 197) == won
    assert tiles.choose("forward_short", "sm_80", 2, 64, 197) != won
    assert tiles.choose("forward_short", "sm_90", 2, 64, 257) != won
    tuning_file.write_text('[{"kernel": 1}]')
    tiles.tuned.cache_clear()
    tiles._look_up.cache_clear()
    with pytest.raises(ValueError, match=r"tiles\.json: not a tuning file"):
        tiles.choose("forward_short", "sm_90", 2, 64, 197)


def test_tuning_of_another_version_is_ignored_with_one_warning(tuning_file: Path) -> None:
    """Entries of a kernel that has changed, of another Triton, and of a kernel that is gone."""
    won = tiles.Config(block_m=32, warps=2)
    entries = (
        _entry(won, length=197),
        _entry(won, length=257, digest="0" * 16),
        _entry(won, length=288, triton="1.0"),
        _entry(won, length=64, digest=""),
        _entry(won, kernel="forward_gone"),
    )
    tiles.save(entries)
    with pytest.warns(UserWarning, match="4 of 5 entries are ignored") as caught:
        assert [e.length for e in tiles.tuned()] == [197]
    (told,) = [str(w.message) for w in caught]
    for part in ("the kernel has changed", "measured with Triton 1.0", "forward_gone: there is no such kernel"):
        assert part in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.choose("forward_short", "sm_90", 2, 64, 197) == won
        assert tiles.choose("forward_short", "sm_90", 2, 64, 257) != won


def _digests_of(files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """kernel("one"), kernel("two") and operator("op") of a package with these files."""
    for stem, text in files.items():
        (folder / f"{stem}.py").write_text(text)
    monkeypatch.setattr(digests, "_FOLDER", folder)
    cached = (digests.kernel, digests.operator, digests._module)
    for function in cached:
        function.cache_clear()
    found = digests.kernel("one"), digests.kernel("two"), digests.operator("op")
    for function in cached:
        function.cache_clear()
    return found


PACKAGE = {
    "common": "SIZE = 3\ndef helper(x):\n    return x + SIZE\ndef other(x):\n    return x\n",
    "kernels": "from pyvit.triton_kernels.common import helper, other\n"
    "def one(x):\n    return helper(x)\ndef two(x):\n    return other(x)\n",
    "op": "from pyvit.triton_kernels import kernels\nfrom pyvit.triton_kernels.tiles import choose\n"
    "def op(x):\n    return kernels.one(x, choose('one'))\n",
    "tiles": "TABLE = (Entry('one', 16), Entry('two', 32))\ndef choose(name):\n    return TABLE[name]\n",
}


@pytest.mark.parametrize(
    ("stem", "old", "new", "changed"),
    [
        ("common", "SIZE = 3", "# why\nSIZE = 3\n\n", (False, False, False)),
        ("common", "def helper(x):\n", "def helper(x):\n    'says what it does'\n", (False, False, False)),
        ("common", "SIZE = 3", "SIZE = 4", (True, False, True)),
        ("common", "return x\n", "return -x\n", (False, True, False)),
        ("kernels", "return helper(x)", "return helper(-x)", (True, False, True)),
        ("op", "kernels.one(x,", "kernels.one(-x,", (False, False, True)),
        ("tiles", "Entry('one', 16)", "Entry('one', 64)", (False, False, True)),
        ("tiles", "Entry('two', 32)", "Entry('two', 64)", (False, False, False)),
        ("tiles", "return TABLE[name]", "return TABLE.get(name)", (False, False, False)),
    ],
)
def test_a_digest_changes_with_what_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, old: str, new: str, changed: tuple[bool, ...]
) -> None:
    assert old in PACKAGE[stem]
    before = _digests_of(PACKAGE, tmp_path, monkeypatch)
    after = _digests_of(PACKAGE | {stem: PACKAGE[stem].replace(old, new)}, tmp_path, monkeypatch)
    assert tuple(a != b for a, b in zip(before, after, strict=True)) == changed


def test_every_kernel_has_its_digest() -> None:
    """Kernels of the table, and operators that have Triton kernels; the same without Triton as with it."""
    kernels = sorted({e.kernel for e in tiles.TABLE})
    operators = sorted(op for op, found in CAPABILITIES.items() if "triton" in found)
    found = {name: digests.kernel(name) for name in kernels} | {op: digests.operator(op) for op in operators}
    assert len({found[name] for name in kernels}) == len(kernels)
    code = (
        "import importlib.util, sys; sys.modules['triton'] = None\n"
        f"spec = importlib.util.spec_from_file_location('digests', {digests.__file__!r})\n"
        "d = importlib.util.module_from_spec(spec); spec.loader.exec_module(d)\n"
        f"print({{**{{n: d.kernel(n) for n in {kernels}}}, **{{n: d.operator(n) for n in {operators}}}}})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(said) == found


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
    assert cost_model.attention(16, 16, 4096, 4096, 64, torch.bfloat16).bound("H200") == "exponentials"
    assert cost_model.attention(16, 16, 4096, 4096, 64, torch.bfloat16).bound("B300") == "issue"
    long = cost_model.attention(16, 16, 4096, 4096, 128, torch.bfloat16)
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
    monkeypatch: pytest.MonkeyPatch, tuning_file: Path, budget: float
) -> None:
    clock, call = _Clock(), ("attention_map", "interpreter", 4, 64, 9)

    def run() -> tuple[torch.Tensor, ...]:
        tiles.choose(*call)
        return (torch.ones(3),)

    monkeypatch.setattr(tune, "prepare", lambda *_: run)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock.now)
    tiles.choose(*call)
    assert not tuning_file.exists()  # looking a tile up searches and writes nothing
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
    assert tuning_file.exists()
    assert "before" in entry.measured
    assert entry.stale() is None


def test_tuning_is_saved_after_every_kernel_and_resumed(monkeypatch: pytest.MonkeyPatch, tuning_file: Path) -> None:
    """A run that is ended in its second kernel leaves the first one's entry; ``resume`` searches only the others."""
    calls = [(kernel, "interpreter", 4, 64, 9) for kernel in ("attention_map", "forward_short", "bias_grad")]
    searched: list[str] = []

    def run() -> tuple[torch.Tensor, ...]:
        for call in calls:
            tiles.choose(*call)
        return (torch.ones(3),)

    def ended_in_the_second(_: object) -> float:
        if {e.kernel for e in tiles.tuned()} == {"attention_map"}:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(tune, "prepare", lambda *_: run)
    case = ["attention map N=197 d=64"]
    with pytest.raises(KeyboardInterrupt):
        tune.tune(case, report=lambda _: None, time_of=ended_in_the_second, device="cpu")
    assert [e.kernel for e in tiles.tuned()] == ["attention_map"]
    monkeypatch.setattr(tune, "_search", _recording(tune._search, searched))
    found = tune.tune(case, report=lambda _: None, time_of=lambda _: 1.0, device="cpu", resume=True)
    assert searched == ["forward_short", "bias_grad"]
    assert {e.kernel for e in found} == {e.kernel for e in tiles.tuned()} == {call[0] for call in calls}


def _recording(search: Callable[..., object], searched: list[str]) -> Callable[..., object]:
    def wrapped(case: str, run: object, wanted: object, call: tuple[str, ...], *rest: object) -> object:
        searched.append(call[0])
        return search(case, run, wanted, call, *rest)

    return wrapped


def test_tuning_leaves_out_wrong_results(monkeypatch: pytest.MonkeyPatch, tuning_file: Path) -> None:
    call = ("attention_map", "interpreter", 4, 64, 9)
    now = tiles.choose(*call)

    def run() -> tuple[torch.Tensor, ...]:
        return (torch.ones(3) if tiles.choose(*call) == now else torch.zeros(3),)

    monkeypatch.setattr(tune, "prepare", lambda *_: run)
    said: list[str] = []
    assert tune.tune(["attention map N=197 d=64"], report=said.append, time_of=lambda _: 1.0, device="cpu") == ()
    assert not tuning_file.exists()
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
