"""Ahead-of-time compilation of a recorded launch, for a GPU that need not be present, and inspection of the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from pyvit.triton_kernels.common import Launch
from pyvit.triton_kernels.tiles import family
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Architectures that the kernels are compiled for.
PARTS = (
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "gfx942",
    "gfx1100",
    "gfx1201",
)
#: Columns of tensor memory of a Blackwell processor. A kernel that needs more is compiled to a trap and cannot be
#: launched.
TENSOR_MEMORY_LIMIT = 512

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: By :func:`pyvit.triton_kernels.tiles.family`.
_TENSOR_CORE = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\b(?:wgmma\.mma|mma\.sync)",
    "tcgen05": r"\b(?:tcgen05\.mma|mma\.sync)",
    "mfma": r"\bv_mfma_",
    "wmma": r"\bv_wmma_",
}
_STORE = {"sm": r"\bst\.global", "gf": r"\b(?:global|buffer)_store"}
_ATOMIC = re.compile(
    r"^\s*(?:@%\w+\s+)?(?:atom\.|red\.(?:global|shared|relaxed|async)|global_atomic|flat_atomic|buffer_atomic|ds_add|ds_max)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Report:
    """Resources of a compiled launch: registers and spilled bytes per thread, bytes of shared memory, columns of tensor
    memory, and static counts of instructions."""

    kernel: str
    arch: str
    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    tensor_core: int
    warpgroup: int
    stores: int
    atomics: int
    dot_types: frozenset[str]


def target(arch: str) -> GPUTarget:
    """The compiler's target for "sm_80", ..., "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)  # threads of a wave


def _specialise(
    value: Any, path: tuple[int, ...], attrs: dict[tuple[int, ...], Any], constants: dict[Any, Any], key: Any
) -> Any:
    """The compiler's type of an argument, specialised as in a call with that value."""
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), attrs, constants, (*path, i)) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1):
        constants[key] = value
        return "constexpr"
    if isinstance(value, Tensor):
        if value.device.type == "meta" or value.data_ptr() % 16 == 0:
            attrs[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attrs[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def build(launch: Launch, arch: str) -> Any:
    """The compiled kernel (Triton's object, with ``asm`` and ``metadata``)."""
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    constants: dict[Any, Any] = {}
    for at, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(at,)] = "constexpr", value
        else:
            signature[parameter.name] = _specialise(value, (at,), attrs, constants, (at,))
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target(arch), options=dict(launch.options))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def inspect(launch: Launch, arch: str) -> Report:
    """Compile ``launch`` for ``arch`` and count."""
    kernel = build(launch, arch)
    dots = frozenset(re.findall(r"tt\.dot [^\n]*: tensor<[\dx]+x(\w+)", kernel.asm["ttir"]))
    if arch.startswith("sm_"):
        text = kernel.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    else:
        text = kernel.asm["amdgcn"]
        registers, spilled = _number(r"\.vgpr_count:\s+(\d+)", text), 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return Report(
        kernel=launch.kernel.__name__,
        arch=arch,
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_core=len(re.findall(_TENSOR_CORE[family(arch)], text)),
        warpgroup=len(re.findall(r"\b(?:wgmma\.mma|tcgen05\.mma)", text)),
        stores=len(re.findall(_STORE[arch[:2]], text)),
        atomics=len(_ATOMIC.findall(text)),
        dot_types=dots,
    )
