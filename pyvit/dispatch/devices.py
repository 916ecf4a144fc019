"""What decides whether kernels run on a device: GPUs as data, and the CPU's instruction set. Tests and the compile
check take GPUs that are not there from :data:`PARTS`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from pyvit import library
from pyvit.triton_kernels.tiles import SHARED_LIMIT


@dataclass(frozen=True)
class Device:
    """A GPU.

    ``arch`` is the compiler's name for it ("sm_90", "gfx942"). ``capability`` is NVIDIA's compute capability, None on
    other makes. ``shared`` is the shared memory in bytes that a block may ask for, ``wave`` the threads of a warp
    (wavefront), ``processors`` its streaming multiprocessors (compute units).
    """

    name: str
    arch: str
    capability: tuple[int, int] | None
    shared: int
    wave: int
    processors: int


def _nvidia(name: str, major: int, minor: int, processors: int) -> Device:
    arch = f"sm_{major}{minor}"
    return Device(name, arch, (major, minor), SHARED_LIMIT[arch], 32, processors)


#: One GPU of each architecture that kernels are checked for.
PARTS = {
    part.arch: part
    for part in (
        _nvidia("T4", 7, 5, 40),
        _nvidia("A100-80GB", 8, 0, 108),
        _nvidia("GeForce RTX 3090", 8, 6, 82),
        _nvidia("GeForce RTX 4090", 8, 9, 128),
        _nvidia("H100-SXM", 9, 0, 132),
        _nvidia("B200", 10, 0, 148),
        _nvidia("B300", 10, 3, 148),
        _nvidia("GeForce RTX 5090", 12, 0, 170),
        Device("Instinct MI300X", "gfx942", None, SHARED_LIMIT["gfx942"], 64, 304),
        Device("Radeon RX 7900 XTX", "gfx1100", None, SHARED_LIMIT["gfx1100"], 32, 96),
        Device("Radeon RX 9070 XT", "gfx1201", None, SHARED_LIMIT["gfx1201"], 32, 64),
    )
}

#: The least compute capability of which Triton's products use the tensor cores.
_TRITON_CAPABILITY = (8, 0)
#: AMD's families with matrix instructions: CDNA 2 and 3, RDNA 3 and 4.
_TRITON_AMD = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def describe(index: int) -> Device:
    """The description of GPU ``index`` of this machine. Initialises CUDA."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch, capability = properties.gcnArchName.split(":")[0], None
        shared = SHARED_LIMIT.get(arch, SHARED_LIMIT["gfx942"])
    else:
        capability = (properties.major, properties.minor)
        arch = f"sm_{properties.major}{properties.minor}"
        shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(properties.name, arch, capability, shared, properties.warp_size, properties.multi_processor_count)


@functools.cache
def present() -> tuple[Device, ...]:
    """The GPUs that torch sees, each kind once, the current one first. Initialises CUDA if there are any."""
    if not torch.cuda.is_available():
        return ()
    current = torch.cuda.current_device()
    order = [current, *(i for i in range(torch.cuda.device_count()) if i != current)]
    return tuple(dict.fromkeys(map(describe, order)))


def refusal(backend: str, device: Device, dtype: torch.dtype) -> str | None:
    """Why the kernels of ``backend`` do not run on ``device`` in ``dtype``, None where they do."""
    if backend == "cuda":
        if device.capability is None:
            return f"CUDA kernels run on NVIDIA GPUs, got {device.name} ({device.arch})"
        return library.runs_on(library.cuda_archs(), device.capability)
    if backend == "triton":
        if device.capability is not None and device.capability < _TRITON_CAPABILITY:
            wanted, got = (".".join(map(str, c)) for c in (_TRITON_CAPABILITY, device.capability))
            return f"needs compute capability {wanted} or higher, got {got} ({device.name})"
        if device.capability is None and not device.arch.startswith(_TRITON_AMD):
            return f"needs matrix instructions ({', '.join(_TRITON_AMD)}), got {device.arch} ({device.name})"
        if device.capability is None and device.wave == 32 and dtype == torch.float32:
            return f"{device.name} ({device.arch}) has no matrix instructions for float32"
    return None


def refused(backend: str, dtype: torch.dtype) -> str | None:
    """:func:`refusal` by the first of this machine's GPUs that cannot run ``backend``: which one a call is for is not
    known while it is traced, so a backend serves all GPUs of a process or none."""
    return next((why for device in present() if (why := refusal(backend, device, dtype)) is not None), None)


#: The compiler runs it while tracing, instead of tracing it.
refused._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def cpu_isa(dtype: torch.dtype) -> str:
    """The instruction set of the CPU kernels ("portable", "avx2", ...; ``PYVIT_CPU_ISA`` pins it), or "amx" where
    PyTorch has matrix registers for products of ``dtype``."""
    amx = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}.get(dtype)
    if amx is not None and getattr(torch.cpu, amx, bool)():
        return "amx"
    return str(torch.ops.pyvit.cpu_isa()) if library.problem() is None else "portable"
