"""Triton launches with the PTX interpreter: compiled for a GPU, run here."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

from pyvit.triton_kernels import common
from pyvit.triton_kernels.tiles import SHARED_LIMIT
from pyvit.triton_kernels.tools import compile as compiled
from torch import Tensor
from triton import knobs

from pyvit.dispatch import capabilities
from tests.ptx import machine
from tests.ptx.memory import Fault
from tests.ptx.program import Program, parse

#: Supported architectures; sm_100's ``tcgen05`` is not supported.
PARTS = ("sm_80", "sm_90")
_programs: dict[Any, tuple[Program, int]] = {}


def _without_ptxas(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str]:
    """Triton's hook for the stages of a compilation: none after the PTX. Called without arguments it names the change,
    for the cache."""
    if stages is not None:
        stages["cubin"] = lambda source, metadata: b""
    return "without ptxas", "without ptxas"


def _compiled(launch: common.Launch, arch: str) -> Any:
    with knobs.runtime.scope(), knobs.compilation.scope():
        knobs.runtime.add_stages_inspection_hook = _without_ptxas
        knobs.compilation.disable_line_info = True
        return compiled.build(launch, arch)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def execute(launch: common.Launch, arch: str) -> collections.Counter[str]:
    """Compile ``launch`` as its launcher would on ``arch``, and run it on its CPU tensors."""
    kernel = _compiled(launch, arch)
    if kernel.hash not in _programs:
        _programs[kernel.hash] = (parse(kernel.asm["ptx"]), kernel.metadata.shared)
    program, shared = _programs[kernel.hash]
    if shared > SHARED_LIMIT[arch]:
        raise Fault(f"{launch.name}: {shared} bytes of shared memory, {arch} has {SHARED_LIMIT[arch]}")
    arguments, tensors = [], []
    for parameter in launch.kernel.params:
        if parameter.is_constexpr:
            continue
        for value in _flat(launch.args[parameter.name]):
            if isinstance(value, Tensor):
                tensors.append(value)
            if not (value is None or (isinstance(value, int) and value == 1)):  # those became constants
                arguments.append(value)
    # Triton adds pointers to scratch memory, which these kernels do not use.
    arguments += [0] * (len(program.parameters) - len(arguments))
    return machine.run(program, arguments, tensors, shared, launch.grid)


class _Runner(list):
    """A list of launches that runs each as it is appended."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch
        self.issued: dict[str, collections.Counter[str]] = {}

    def append(self, launch: common.Launch) -> None:
        super().append(launch)
        if launch.grid:
            self.issued.setdefault(launch.name, collections.Counter()).update(execute(launch, self.arch))


@contextlib.contextmanager
def running(arch: str) -> Iterator[_Runner]:
    """Within the block Triton serves CPU tensors: launchers compile their kernels for ``arch`` and run them in the
    interpreter."""
    if arch not in PARTS:
        raise ValueError(f"the machine runs {' and '.join(PARTS)}, got {arch!r}")
    able, common._recorder = capabilities.MISSING["triton", "cpu"], common._Recorder(arch)
    common._recorder.launches = runner = _Runner(arch)
    capabilities.MISSING["triton", "cpu"] = None
    try:
        yield runner
    finally:
        capabilities.MISSING["triton", "cpu"], common._recorder = able, None
