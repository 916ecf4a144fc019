"""Which backends run on which GPU, by the GPU's description; the GPUs are not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyvit
from pyvit import ops
from pyvit.dispatch import Call, devices, reasons
from pyvit.dispatch.capabilities import MISSING
from pyvit.dispatch.devices import PARTS, Device

ATTENTION = Call("flash_attention", "cuda", torch.bfloat16, ("bias",), (64,))
BUILT = ["8.0", "9.0", "10.0", "12.0+PTX"]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(*gpus: Device, built: list[str] = BUILT) -> None:
        monkeypatch.setitem(MISSING, ("cuda", "cuda"), None)
        monkeypatch.setitem(MISSING, ("triton", "cuda"), None)
        monkeypatch.setattr(sys.modules["pyvit.dispatch.select"], "_choices", {})
        monkeypatch.setattr(pyvit.library, "cuda_archs", lambda: built)
        monkeypatch.setattr(devices, "present", lambda: gpus)

    return use


@pytest.mark.parametrize(
    ("arch", "cuda", "triton"),
    [
        ("sm_75", "no code for compute capability 7.5", "needs compute capability 8.0 or higher, got 7.5 (T4)"),
        ("sm_80", None, None),
        ("sm_86", None, None),
        ("sm_89", None, None),
        ("sm_90", None, None),
        ("sm_100", None, None),
        ("sm_103", None, None),
        ("sm_120", None, None),
        ("gfx942", "run on NVIDIA GPUs, got Instinct MI300X (gfx942)", None),
        ("gfx1100", "run on NVIDIA GPUs, got Radeon RX 7900 XTX (gfx1100)", None),
        ("gfx1201", "run on NVIDIA GPUs, got Radeon RX 9070 XT (gfx1201)", None),
    ],
)
def test_every_part(on: Callable[..., None], arch: str, cuda: str | None, triton: str | None) -> None:
    on(PARTS[arch])
    for backend, wanted in (("cuda", cuda), ("triton", triton)):
        found = reasons(ATTENTION, backend)
        assert len(found) == (wanted is not None)
        assert wanted is None or wanted in found[0]
    with FakeTensorMode():
        q = torch.empty(2, 4, 197, 64, device="cuda", dtype=torch.bfloat16)
        table = torch.empty(13 * 13, 4, device="cuda")
        qkv = torch.empty(2, 14, 14, 3 * 128, device="cuda", dtype=torch.bfloat16)
        assert pyvit.explain(ops.flash_attention, q, q, q).chosen == "torch"
        report = pyvit.explain(ops.window_attention, qkv, 7, num_heads=4, bias_table=table)
    assert report.chosen == ("reference" if cuda and triton else report.chosen)
    assert all(report.chosen != backend for backend, why in (("cuda", cuda), ("triton", triton)) if why)
    assert cuda is None or cuda in str(report)


def test_a_build_for_one_part_serves_that_part(on: Callable[..., None]) -> None:
    """The former default build had no PTX, and code for 9.0a and 10.0a alone."""
    for arch, served in (("sm_80", True), ("sm_89", True), ("sm_90", True), ("sm_103", False), ("sm_120", False)):
        on(PARTS[arch], built=["8.0", "9.0a", "10.0a"])
        assert (reasons(ATTENTION, "cuda") == []) is served
    on(PARTS["sm_103"], built=["8.0", "9.0a", "10.0a"])
    with pytest.raises(pyvit.BackendError, match=r"built for 8\.0;9\.0a;10\.0a: no code for compute capability 10\.3"):
        pyvit.dispatch.select(ATTENTION, "cuda")


def test_all_gpus_of_a_machine_decide(on: Callable[..., None]) -> None:
    """A call is traced without a device index, so what one GPU cannot run is not chosen."""
    on(PARTS["sm_90"], PARTS["sm_75"])
    assert "7.5" in reasons(ATTENTION, "triton")[0]
    on(PARTS["sm_90"], PARTS["sm_86"])
    assert reasons(ATTENTION, "triton") == []


def test_float32_on_rdna(on: Callable[..., None]) -> None:
    on(PARTS["gfx1100"])
    assert reasons(ATTENTION._replace(dtype=torch.float32), "triton") == [
        "Radeon RX 7900 XTX (gfx1100) has no matrix instructions for float32"
    ]
    on(PARTS["gfx942"])
    assert reasons(ATTENTION._replace(dtype=torch.float32), "triton") == []


def test_an_amd_gpu_without_matrix_instructions(on: Callable[..., None]) -> None:
    on(replace(PARTS["gfx942"], name="Radeon VII", arch="gfx906"))
    assert "needs matrix instructions" in reasons(ATTENTION, "triton")[0]


def test_windows_that_shared_memory_does_not_hold(on: Callable[..., None]) -> None:
    """A window of 48 x 48 tokens fits into a block of an H100 and not of an RTX 4090, where Triton serves it."""
    window = Call("window_attention", "cuda", torch.bfloat16, (), (64,), (1, 96, 96, 48, 48, 2, 64))
    on(PARTS["sm_90"])
    assert reasons(window, "cuda") == []
    on(PARTS["sm_89"])
    assert reasons(window, "cuda") == [
        "windows of 48 x 48 tokens need more than the 99 KiB of shared memory of GeForce RTX 4090"
    ]
    assert pyvit.dispatch.select(window) == "triton"
    assert reasons(window._replace(sizes=(1, 96, 96, 24, 24, 2, 64)), "cuda") == []


def test_without_gpus_nothing_is_refused(on: Callable[..., None]) -> None:
    on()
    assert reasons(ATTENTION, "cuda") == reasons(ATTENTION, "triton") == []


def test_tile_loops_need_no_machine_code(on: Callable[..., None]) -> None:
    """The losses' backend "cuda" is made of PyTorch's products."""
    on(PARTS["sm_75"])
    assert reasons(Call("info_nce", "cuda", torch.float16, ("grad",)), "cuda") == []


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_descriptions(monkeypatch: pytest.MonkeyPatch, hip: str | None) -> None:
    """From torch's properties: the current GPU first, each kind once."""

    class Properties:
        def __init__(self, index: int) -> None:
            self.name, self.major, self.minor = ("H", 9, 0) if index else ("A", 8, 6)
            self.gcnArchName = "gfx942:sramecc+:xnack-" if index else "gfx1100"
            self.shared_memory_per_block = 48 << 10
            self.shared_memory_per_block_optin = 227 << 10 if index else 99 << 10
            self.warp_size, self.multi_processor_count = 32, 10

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties(i % 2))
    found = devices.present.__wrapped__()
    assert [d.arch for d in found] == (["gfx942", "gfx1100"] if hip else ["sm_90", "sm_86"])
    assert [d.shared >> 10 for d in found] == ([64, 64] if hip else [227, 99])
    assert [d.capability for d in found] == ([None, None] if hip else [(9, 0), (8, 6)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.present.__wrapped__() == ()
