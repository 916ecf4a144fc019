"""Registers, spills and tensor-core instructions of every CUDA kernel, from ptxas: ``python csrc/cuda/resources.py``.

Compiles csrc/cuda/*.cu for each architecture (needs nvcc; a few minutes) and writes ``csrc/cuda/resources.json`` with a digest of the
sources, from which ``--table`` writes docs/gpu-kernels-cuda.md. ``cuobjdump``, where it is found, counts the tensor-core instructions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
DATA, TABLE = HERE / "resources.json", ROOT / "docs" / "gpu-kernels-cuda.md"
ARCHS = ("80", "90a", "100a")
FLAGS = ("-O3", "-std=c++17")

#: Registers of a multiprocessor, its shared memory in bytes less 1 KB that each block costs, threads, and blocks.
LIMITS = {"80": (65536, 164 << 10, 2048, 32), "90a": (65536, 228 << 10, 2048, 32), "100a": (65536, 228 << 10, 2048, 32)}

#: What a kernel may use: (registers, bytes of spill stores); the longest prefix of the kernel's name that is listed governs.
BUDGETS = {
    "attention_forward": (255, 64),
    "attention_backward": (255, 128),
    "patch_embed": (255, 0),
    "": (64, 0),
}


def digest() -> str:
    """Of everything that the compiled kernels come from."""
    sources = sorted([*HERE.glob("*.cu"), *HERE.glob("*.cuh"), HERE / "launch.h"])
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sources)).hexdigest()[:16]


def budget(kernel: str) -> tuple[int, int]:
    return BUDGETS[max((prefix for prefix in BUDGETS if kernel.startswith(prefix)), key=len)]


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Fraction of a multiprocessor's warps in flight: the least of what registers, shared memory, threads and blocks allow."""
    total, memory, most_threads, most_blocks = LIMITS[arch]
    warps = threads // 32
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(total // per_warp // warps, memory // (shared + 1024), most_threads // threads, most_blocks)
    return blocks * threads / most_threads


def cuobjdump() -> str | None:
    """The disassembler: of the CUDA toolkit, or the one that triton carries."""
    found = shutil.which("cuobjdump")
    if found is None:
        for folder in map(Path, sys.path):
            candidate = folder / "triton/backends/nvidia/bin/cuobjdump"
            if candidate.exists():
                return str(candidate)
    return found


def short(demangled: str) -> str:
    """attention_forward<Dense<bf16>, 64, 8> from the full C++ name."""
    name = demangled.split("(pyvit", 1)[0].replace("pyvit::cuda::", "").replace("pyvit::", "").removeprefix("void ")
    return name.replace("(int)", "").split("(")[0]


def demangle(names: list[str]) -> dict[str, str]:
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return {mangled: short(full) for mangled, full in zip(names, out, strict=True)}


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Per mangled kernel: registers, spill stores and loads in bytes, static shared memory."""
    found: dict[str, dict[str, int]] = {}
    for block in re.split(r"Compiling entry function", text)[1:]:
        name = re.search(r"'(\S+)'", block)
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        if name and spill and registers:
            found[name[1]] = {"registers": int(registers[1]), "spill_stores": int(spill[1]), "spill_loads": int(spill[2])}
    return found


def tensor_instructions(cubin: Path) -> dict[str, int]:
    """Tensor-core instructions (HMMA in SASS) per mangled kernel."""
    tool = cuobjdump()
    if tool is None:
        return {}
    counts: dict[str, int] = {}
    kernel = ""
    for line in subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout.splitlines():
        if "Function :" in line:
            kernel = line.split(":")[1].strip()
        counts[kernel] = counts.get(kernel, 0) + (" HMMA." in line)
    return counts


def compile_all(build: Path, archs: tuple[str, ...]) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {arch: figures}}, compiling with ninja into ``build``."""
    build.mkdir(parents=True, exist_ok=True)
    lines = ["rule cubin", f"  command = nvcc {' '.join(FLAGS)} -arch=sm_$arch -cubin -Xptxas -v $in -o $out > $out.log 2>&1"]
    cubins = [(arch, source, build / f"{source.stem}.{arch}.cubin") for source in sorted(HERE.glob("*.cu")) for arch in archs]
    headers = " ".join(str(p) for p in sorted([*HERE.glob("*.cuh"), HERE / "launch.h"]))
    lines += [f"build {out}: cubin {source} | {headers}\n  arch = {arch}" for arch, source, out in cubins]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(build)], check=True)
    table: dict[str, dict[str, dict[str, int]]] = {}
    for arch, _, out in cubins:
        found, tensor = parse_ptxas(Path(f"{out}.log").read_text()), tensor_instructions(out)
        names = demangle(list(found))
        for mangled, figures in found.items():
            table.setdefault(names[mangled], {})[arch] = figures | {"tensor": tensor.get(mangled, -1)}
    return dict(sorted(table.items()))


def over_budget(table: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Kernels beyond their budget, in words."""
    found = []
    for kernel, per_arch in table.items():
        registers, spills = budget(kernel)
        for arch, figures in per_arch.items():
            if figures["registers"] > registers or figures["spill_stores"] > spills:
                found.append(f"{kernel} on sm_{arch}: {figures['registers']} registers (at most {registers}), "
                             f"{figures['spill_stores']} bytes spilled (at most {spills})")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-resources", help="folder for the cubins")
    args = parser.parse_args()
    table = compile_all(args.build, ARCHS)
    rows = [f"    {json.dumps(kernel)}: {json.dumps(figures)}" for kernel, figures in table.items()]
    DATA.write_text(f'{{\n  "digest": "{digest()}",\n  "kernels": {{\n' + ",\n".join(rows) + "\n  }\n}\n")
    print(f"{len(table)} kernels -> {DATA}")
    for line in over_budget(table):
        print("over budget:", line)


if __name__ == "__main__":
    main()
