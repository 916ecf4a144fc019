"""Digests of CUDA operators' sources, by which a measurement says what it measured."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

from pyvit.dispatch.capabilities import CAPABILITIES

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"


def test_digests_change_with_an_operator_s_sources(tmp_path: Path) -> None:
    """Its own files and the headers that it includes, but not comments."""
    of = runpy.run_path(str(FOLDER / "digests.py"))["digests"]
    before = of()
    kernels = {op for op, found in CAPABILITIES.items() if "cuda" in found and not found["cuda"].pure}
    assert set(before) == kernels - {"flash_attention_varlen"}  # in flash_attention's files
    copy = Path(shutil.copytree(FOLDER, tmp_path / "cuda"))
    assert of(copy) == before
    for name, line, changed in (
        ("mma.cuh", "\n// why\n/* and\n how */\n", set()),
        ("window_attention_backward.cu", "\nint unused;\n", {"window_attention"}),
        ("attention_forward.cuh", "\nint unused;\n", {"window_attention", "flash_attention"}),
        ("mma.cuh", "\nint unused;\n", set(before)),
    ):
        was = of(copy)
        (copy / name).write_text((copy / name).read_text() + line)
        assert {op for op in was if of(copy)[op] != was[op]} == changed
