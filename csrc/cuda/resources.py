"""Registers, spills and tensor-core instructions of every CUDA kernel, from ptxas: ``python csrc/cuda/resources.py``.

Compiles csrc/cuda/*.cu for each architecture (needs nvcc; a few minutes) and writes ``csrc/cuda/resources.json`` with a
digest of the sources, and docs/gpu-kernels-cuda.md. ``cuobjdump``, where it is found, counts the tensor-core
instructions.
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
from typing import NamedTuple

from pyvit.library import code_for

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
DATA, TABLE = HERE / "resources.json", ROOT / "docs" / "gpu-kernels-cuda.md"

#: What the build is for, unless TORCH_CUDA_ARCH_LIST says otherwise.
DEFAULT_ARCHS = re.search(r'^DEFAULT_ARCHS = "(.+)"', (ROOT / "packaging/native.py").read_text(), re.MULTILINE)[
    1
].split(";")
ARCHS = tuple(arch.removesuffix("+PTX").replace(".", "") for arch in DEFAULT_ARCHS)
GPUS = {
    "T4": (7, 5),
    "A100": (8, 0),
    "RTX 3090": (8, 6),
    "RTX 4090, L4": (8, 9),
    "H100, H200": (9, 0),
    "B200": (10, 0),
    "B300": (10, 3),
    "RTX 5090": (12, 0),
    "GB10": (12, 1),
}
FLAGS = ("-O3", "-std=c++17")

#: Registers of a multiprocessor, its shared memory in bytes less 1 KB that each block costs, threads, and blocks.
LIMITS = {
    "80": (65536, 164 << 10, 2048, 32),
    "90": (65536, 228 << 10, 2048, 32),
    "100": (65536, 228 << 10, 2048, 32),
    "120": (65536, 100 << 10, 1536, 24),
}

#: What a kernel may use on any architecture: (registers, bytes of spill stores). The longest prefix of its name
#: governs, with "half" for both 16-bit types. 128 registers let 16 warps into a multiprocessor, 168 twelve, 255 eight;
#: no budget is wider than its worst kernel needs, so one that grows fails: by registers, or where the hardware gives no
#: more of them by spills. Float kernels pay for the sums that they keep beside the tensor cores' (Fragments<float> in
#: mma.cuh).
BUDGETS = {
    "attention_forward<Dense<half>": (128, 0),
    "attention_forward<Dense<half>, 80": (168, 0),
    "attention_forward<Dense<half>, 96": (168, 0),
    "attention_forward<Dense<half>, 128": (255, 0),
    "attention_forward<Dense<float>, 64": (152, 0),
    "attention_forward<Dense<float>, 128": (255, 156),
    "attention_forward<Windows<half>": (128, 0),
    "attention_forward<Windows<float>": (144, 32),
    "attention_backward_queries<Dense<half>": (232, 0),
    "attention_backward_queries<Dense<float>, 64": (248, 0),
    "attention_backward_queries<Dense<float>, 128": (255, 196),
    "attention_backward_queries<Windows<half>": (240, 0),
    "attention_backward_queries<Windows<float>": (255, 4),
    "attention_backward_keys<Dense<half>": (248, 0),
    "attention_backward_keys<Dense<float>, 64": (255, 0),
    "attention_backward_keys<Dense<float>, 128": (255, 488),
    "attention_backward_keys<Windows": (255, 8),
    "attention_backward_bias<Dense<half>": (200, 0),
    "attention_backward_bias<Dense<float>": (176, 12),
    "attention_backward_bias<Windows": (168, 0),
    "window_backward<half": (168, 12),
    "window_backward<half, 32, 6, 3>": (168, 192),
    "window_backward<float": (255, 8),
    "patch_embed_forward<half": (144, 0),
    "patch_embed_forward<float": (192, 0),
    "patch_embed_images<half": (176, 0),
    "patch_embed_weight<half": (168, 0),
    "patch_embed_images<float": (255, 0),
    "patch_embed_weight<float": (255, 32),
    "table_gradient": (80, 8),
    "": (48, 0),
}


def digest() -> str:
    """Of everything that the compiled kernels come from, less white space, which a formatter may change."""
    sources = sorted([*HERE.glob("*.cu"), *HERE.glob("*.cuh"), HERE / "launch.h"])
    return hashlib.sha256(
        "".join(path.name + "".join(path.read_text().split()) for path in sources).encode()
    ).hexdigest()[:16]


def governing(kernel: str) -> str:
    """The key into BUDGETS for a kernel."""
    name = re.sub(r"\bb?f16\b", "half", kernel)
    return max((prefix for prefix in BUDGETS if name.startswith(prefix)), key=len)


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Fraction of a multiprocessor's warps in flight: the least of what registers, shared memory, threads and blocks
    allow."""
    total, memory, most_threads, most_blocks = LIMITS[arch]
    warps = threads // 32
    per_warp = -(-registers * 32 // 256) * 256
    in_flight = 4 * (total // 4 // per_warp)  # a quarter of the multiprocessor has a quarter of the registers
    blocks = min(in_flight // warps, memory // (shared + 1024), most_threads // threads, most_blocks)
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
    for written, meant in (("(int)", ""), ("(bool)0", "false"), ("(bool)1", "true")):
        name = name.replace(written, meant)
    return name.split("(")[0]


def demangle(names: list[str]) -> dict[str, str]:
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {mangled: short(full) for mangled, full in zip(names, out, strict=True)}


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Per mangled kernel: registers, spill stores and loads in bytes, static shared memory."""
    found: dict[str, dict[str, int]] = {}
    for block in re.split(r"Compiling entry function", text)[1:]:
        name = re.search(r"'(\S+)'", block)
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        if name and spill and registers:
            found[name[1]] = {
                "registers": int(registers[1]),
                "spill_stores": int(spill[1]),
                "spill_loads": int(spill[2]),
            }
    return found


def tensor_instructions(cubin: Path) -> dict[str, int]:
    """Tensor-core instructions (HMMA in SASS) per mangled kernel."""
    tool = cuobjdump()
    if tool is None:
        return {}
    counts: dict[str, int] = {}
    kernel = ""
    for line in subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if "Function :" in line:
            kernel = line.split(":")[1].strip()
        counts[kernel] = counts.get(kernel, 0) + (" HMMA." in line)
    return counts


def compile_all(
    build: Path, archs: tuple[str, ...], units: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {arch: figures}}, compiling with ninja into ``build``; ``units`` (default all) are the .cu files'
    names."""
    build.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule cubin",
        f"  command = nvcc {' '.join(FLAGS)} -arch=sm_$arch -cubin -Xptxas -v -MD -MF $out.d $in -o $out > $out.log 2>&1",
    ]
    lines += ["  depfile = $out.d", "  deps = gcc"]
    sources = [source for source in sorted(HERE.glob("*.cu")) if not units or source.stem in units]
    cubins = [(arch, source, build / f"{source.stem}.{arch}.cubin") for source in sources for arch in archs]
    lines += [f"build {out}: cubin {source}\n  arch = {arch}" for arch, source, out in cubins]
    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run(["ninja", "-C", str(build)], check=True)
    table: dict[str, dict[str, dict[str, int]]] = {}
    for arch, _, out in cubins:
        found, tensor = parse_ptxas(Path(f"{out}.log").read_text()), tensor_instructions(out)
        names = demangle(list(found))
        for mangled, figures in found.items():
            table.setdefault(names[mangled], {})[arch] = figures | {"tensor": tensor.get(mangled, -1)}
    return dict(sorted(table.items()))


class Launch(NamedTuple):
    """A launch that models make: for whom, threads, bytes of dynamic shared memory."""

    what: str
    threads: int
    shared: int


def filling(arch: str, registers: int, launch: Launch) -> str:
    """The occupancy of a launch, or a dash where a block has less shared memory than the launch needs."""
    return f"{found:.0%}" if (found := occupancy(arch, registers, launch.threads, launch.shared)) else "-"


def attention_launch(
    what: str, n: int, width: int, size: int, columns: int, own_tiles: int, extra: int = 0, sums: bool = False
) -> Launch:
    """Of the attention kernels for ``n`` rows and as many others, as Layout and choose_warps in csrc/cuda/attention.cuh
    have it; with ``sums`` of a bias's gradient beside the rows, as QueryPass in window_attention_backward.cu has it."""

    def shared(rows: int) -> int:
        stages = 2 if n > columns else 1
        tiles = (own_tiles * rows + 2 * stages * columns) * width * size + (rows + 4 * stages * columns) * 4
        return tiles + extra + sums * rows * -(-n // 8) * 32

    best, least = 2, float("inf")
    for warps in range(2, 9):
        if warps > 2 and shared(16 * warps) > (112 if sums else 96) << 10:
            break
        blocks = -(-n // (16 * warps))
        cost = blocks * warps + 0.5 * blocks
        if cost <= least:
            least, best = cost, warps
    return Launch(what, 32 * best, shared(16 * best))


def window_scratch(window: int, buffers: int = 1) -> int:
    """Bytes of a head's table and the tokens and codes of one window or two (Windows::scratch_bytes)."""
    return buffers * -(-(window**2) // 16) * 16 * 24 + -(-((2 * window - 1) ** 2) // 4) * 16


def one_pass_launch(what: str, window: int, width: int, size: int, columns: int) -> Launch:
    """Of window_backward, as WindowLayout in csrc/cuda/window_attention_backward.cuh has it."""
    rows = -(-(window**2) // 16) * 16

    def shared(stages: int) -> int:
        return 4 * stages * rows * width * size + 2 * rows * columns * size + 2 * rows * 4 + window_scratch(window, 2)

    return Launch(what, 2 * rows, shared(2) if shared(2) <= 54 << 10 else shared(1))


def launch_of(kernel: str, tokens: int = 197) -> Launch:
    """The common launch of an instantiation; for dense attention at ``tokens``."""
    name, *parameters = re.findall(r"\w+", kernel)
    size = 4 if "float" in parameters else 2
    if name == "window_backward":
        width, columns = int(parameters[1]), 8 * int(parameters[2]) * int(parameters[3])
        window = 7 if columns == 64 else 12
        return one_pass_launch(f"window {window}", window, width, size, columns)
    if name.startswith("attention_"):
        width, columns = int(parameters[2]), 8 * int(parameters[3])
        sums = parameters[-1] == "true"
        others = 16 if sums or name == "attention_backward_keys" else 24
        window = 0 if parameters[0] == "Dense" else 7 if name == "attention_forward" else others
        extra, n = (window_scratch(window), window**2) if window else (0, tokens)
        what = f"window {window}" if window else f"{n} tokens"
        if name == "attention_backward_bias":
            return Launch(what, 128, (2 * 64 + 2 * columns) * width * size + (64 + 4 * columns) * 4 + extra)
        return attention_launch(what, n, width, size, columns, 1 if name == "attention_forward" else 2, extra, sums)
    if name.startswith("patch_embed_"):
        return Launch("any", 256, 32768)
    return Launch("any", {"table_gradient": 128, "logit_gradient": 32}.get(name, 256), 0)


def common() -> list[tuple[str, Launch]]:
    """(kernel, launch) of what models run most, bfloat16."""
    rows = []
    for tokens, width in ((197, 64), (577, 64), (1025, 64), (257, 80)):
        for kernel in ("attention_forward", "attention_backward_queries", "attention_backward_keys"):
            columns = 8 if kernel == "attention_forward" or width <= 64 else 4
            name = f"{kernel}<Dense<bf16>, {width}, {columns}{', false' * kernel.endswith('queries')}>"
            rows.append((name, launch_of(name, tokens)))
    windows = (
        "attention_forward<Windows<bf16>, 32, 8>",
        "window_backward<bf16, 32, 8, 1>",
        "window_backward<bf16, 32, 6, 3>",
    )
    others = ("attention_backward_queries<Windows<bf16>, 32, 8, true>", "attention_backward_keys<Windows<bf16>, 32, 8>")
    patches = ("patch_embed_forward<bf16>", "patch_embed_weight<bf16>", "patch_embed_images<bf16>")
    return rows + [(name, launch_of(name)) for name in (*windows, *others, *patches)]


def document(table: dict[str, dict[str, dict[str, int]]]) -> str:
    """docs/gpu-kernels-cuda.md."""
    lines = [
        "# CUDA kernels",
        "",
        "`csrc/cuda/` holds the kernels of `backend='cuda'`: `flash_attention` (dense, packed, grouped heads, causal, a bias of any",
        "broadcast with its gradient), `window_attention` (Swin V1 and V2) and `patch_embed`, forward and backward, in bfloat16 and",
        "float16 with float32 sums, and in float32 as three TF32 products per product. They are written in sm_80's vocabulary",
        "(`mma.sync`, `ldmatrix`, `cp.async`) behind `mma.cuh`. Attention and window attention are the same kernels over two",
        "descriptions of where rows lie and how a score is made. No kernel uses atomics: each result has one owner, and partial",
        "sums are added in an order that depends on the shapes alone.",
        "",
        "The same files are compiled by g++ for the host (`csrc/cuda/emulation/`): a block's threads are fibers, taken in random",
        "order; shared memory starts as NaN; `cp.async` lands at the wait; AddressSanitizer and UndefinedBehaviorSanitizer watch",
        "every access. `tests/cuda/` runs each operator that way through `pyvit.ops` against the float64 reference, and",
        "`test_barriers.py` shows that leaving out any one barrier of any kernel changes a result or is reported.",
        "",
        "What the emulation does not model, and a GPU may therefore still show:",
        "",
        "- time, bank conflicts, occupancy, and everything else that changes no result;",
        "- memory ordering: a fiber's writes are seen by all at once, and threads change turns only at barriers and warp",
        "  collectives, so a race between two such points (a missing `__syncwarp`, a store that another thread reads too early) shows",
        "  only where the order of turns brings it out;",
        "- `ex2.approx.ftz`: the host's `exp2` is exact to the last bit and keeps subnormals, the instruction errs by 2 in the last",
        "  place and flushes them to zero;",
        "- the order of a product's sum and the width of its accumulator inside `mma.sync`: the host adds k in order, in float32;",
        "- contraction of `a * b + c` into one rounding, which nvcc does and the host compiler may not;",
        "- reading and writing global memory beside its bounds where another allocation of the same process lies: the sanitizer watches",
        "  the host's allocator, not CUDA's; alignment of global accesses beyond what UndefinedBehaviorSanitizer sees of their types;",
        "- limits of the launch other than threads, shared memory and grid: registers per block are held to budgets below instead.",
        "",
        "The launcher (`device_launch.h`) is tested against a runtime that fails as told (`test_launch.py`).",
        "",
        "Windows of up to 64 tokens (144 in 16-bit types, head dimension 32) get all gradients from one block in one pass: 5 products,",
        "7 (8) reads and writes of a map of C channels. Attention and larger windows take two passes: 7 and 12. Up to about 300",
        "tokens of a window the queries' pass also sums the gradient of the table, in shared memory; beyond, and for attention, the",
        "gradient of a bias takes 2 and 4 more. The device is asked how much shared memory a block may have: with 99 KB (compute",
        "capability 8.6, 8.9, 12.0) 16-bit windows of more than 112 tokens and float32 windows of 49 to 64 with head dimension 64 take two",
        "passes, and windows of about 250 tokens and more a third one. Windows of 256 tokens do not fit in one pass: their probabilities and score gradients",
        "alone take 256 KB. A head of",
        "197 tokens fits one block (q, k, v and grad_out 104 KB, 64 keys' columns of the two matrices 52 KB), but then a multiprocessor",
        "has one block, whose loads, products and stores follow one another: on an A100 about 8, 14 and 7 thousand clocks, where the two",
        "passes overlap 24 thousand clocks of memory with 19 of products. That is no gain to build on before both are timed.",
        "",
        "Of this backend and Triton's, the one measured faster serves a call, else the one predicted faster by `pyvit/dispatch/cost_model.py`;",
        "`pyvit.explain` says which and by what figures. `python -m benchmarks.gpu` measures on the GPU at hand.",
        "",
        "# GPUs",
        "",
        "The default build (`TORCH_CUDA_ARCH_LIST`, `setup.py`) is for " + ", ".join(DEFAULT_ARCHS) + ".",
        "",
        "| GPU | compute capability | runs |",
        "|---|---|---|",
        *(
            f"| {name} | {major}.{minor} | {code_for(DEFAULT_ARCHS, (major, minor)) or 'nothing: refused'} |"
            for name, (major, minor) in GPUS.items()
        ),
        "",
        "# Resources",
        "",
        "Written by `python csrc/cuda/resources.py`, from ptxas. Nothing here was measured on a GPU: occupancy is predicted from",
        "registers, shared memory and threads; a dash marks a launch that the GPU's shared memory does not hold, and that is not made.",
        "",
        "## Common launches, bfloat16",
        "",
        "| kernel | of | threads | shared memory | " + " | ".join(f"occupancy sm_{arch}" for arch in ARCHS) + " |",
        "|---|---|---:|---:|" + "---:|" * len(ARCHS),
    ]
    for kernel, launch in common():
        filled = [filling(arch, table[kernel][arch]["registers"], launch) for arch in ARCHS]
        lines.append(
            f"| `{kernel}` | {launch.what} | {launch.threads} | {launch.shared / 1024:.1f} KB | "
            + " | ".join(filled)
            + " |"
        )
    lines += [
        "",
        "## Every instantiation",
        "",
        "Registers per thread, bytes of spill stores and tensor-core instructions in the disassembly, and the occupancy of its common",
        "launch, for " + ", ".join(f"sm_{a}" for a in ARCHS) + ".",
        "",
        "| kernel | registers | spilled | tensor-core instructions | launch | threads | dynamic shared memory | occupancy |",
        "|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for kernel, per_arch in table.items():
        columns = [
            " / ".join(str(per_arch[arch][key]) for arch in ARCHS) for key in ("registers", "spill_stores", "tensor")
        ]
        launch = launch_of(kernel)
        filled = [filling(arch, per_arch[arch]["registers"], launch) for arch in ARCHS]
        columns += [launch.what, str(launch.threads), f"{launch.shared / 1024:.1f} KB", " / ".join(filled)]
        lines.append(f"| `{kernel}` | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def over_budget(table: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Kernels beyond their budget, in words."""
    found = []
    for kernel, per_arch in table.items():
        registers, spills = BUDGETS[governing(kernel)]
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
    TABLE.write_text(document(table))
    print(f"{len(table)} kernels -> {DATA.name}, {TABLE.name}")
    for line in over_budget(table):
        print("over budget:", line)


if __name__ == "__main__":
    main()
