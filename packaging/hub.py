"""Write the package for Hugging Face's ``kernels``: ``make hub``.

    build/hub/build/<variant>/{__init__.py, metadata.json, ops/, dispatch/, ...}

The variant for CPUs has the compiled library, from a build in place. Those for GPUs have the Triton kernels alone and
serve every platform. Each is a copy of a part of pyvit with relative imports, and with its operators under a name of
its own in torch.ops: it can be loaded beside pyvit and beside other versions of itself.

A library for the Hub should be linked as wheels are, for old systems: give their build with ``--native``. Build it with
PYVIT_CUDA=0, since GPUs have variants of their own.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Of the package for the Hub, raised when its interface changes; kernels loads the branch "v<VERSION>".
VERSION = 1
#: variant -> backend. That of the compiled library follows the machine; it needs torch 2.10 or later.
COMPILED = f"torch-stable-abi210-cpu-{platform.machine().replace('arm64', 'aarch64')}-{platform.system().lower()}"
VARIANTS = {COMPILED: "cpu", "torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}

INIT = '''"""pyvit's operators and layers for vision transformers."""

from . import layers, ops
from .dispatch import BackendError, explain, use_backend
from .flash_attn import flash_attn_func, flash_attn_varlen_func
from .ops import *
from .version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "layers",
    "ops",
    "use_backend",
    *ops.__all__,
]
'''


def sources() -> dict[str, Path]:
    """Path in the package -> file of this repository."""
    found = {
        f"{name}.py": ROOT / f"pyvit/{name}.py" for name in ("library", "memory", "schemas", "torch_private", "version")
    }
    for folder in ("dispatch", "ops"):
        found |= {f"{folder}/{path.name}": path for path in (ROOT / "pyvit" / folder).glob("*.py")}
    found |= {f"triton_kernels/{path.name}": path for path in (ROOT / "triton_kernels").glob("*.py")}
    found["flash_attn.py"] = ROOT / "pyvit/integrations/flash_attn.py"
    found["layers.py"] = ROOT / "pyvit/integrations/kernel_layers.py"
    return dict(sorted(found.items()))


def unique_id() -> str:
    """A digest of all that the package is made from."""
    digest = hashlib.sha256(INIT.encode())
    compiled = [path for folder in ("cpu", "torch") for path in (ROOT / "csrc" / folder).iterdir()]
    for path in [*sources().values(), *sorted(compiled)]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def relative(source: str, depth: int) -> str:
    """``source`` with relative imports of pyvit's modules; it is in a package ``depth`` levels below the root."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "pyvit" for alias in node.names):
            raise ValueError(f"line {node.lineno}: import a module of pyvit as 'from pyvit... import ...'")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "pyvit":
            old, new = f"from {node.module} ", f"from .{'.' * depth}{(node.module or '')[len('pyvit.') :]} "
            line = lines[node.lineno - 1]
            assert line[node.col_offset :].startswith(old), line
            lines[node.lineno - 1] = line[: node.col_offset] + new + line[node.col_offset + len(old) :]
    return "".join(lines)


def renamed(source: str, namespace: str) -> str:
    """``source`` with its operators in ``torch.ops.<namespace>``."""
    source = re.sub(r"\btorch\.ops\.pyvit(?=[._\W])", f"torch.ops.{namespace}", source)
    source = source.replace('Library("pyvit",', f'Library("{namespace}",')
    return re.sub(r'(?<=")pyvit::', f"{namespace}::", source)


def write_python(variant: Path, namespace: str, library: str) -> None:
    for name, path in sources().items():
        text = renamed(relative(path.read_text(), name.count("/")), namespace)
        if name == "library.py":
            text, found = re.subn(r"^PATH = .*$", f'PATH = Path(__file__).parent / "{library}"', text, flags=re.M)
            assert found == 1, "pyvit/library.py says where the library is in one line"
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        (variant / name).write_text(text)
    (variant / "__init__.py").write_text(INIT)


def write_library(native: Path, path: Path, namespace: str) -> None:
    """The compiled library with its operators in another namespace: the build's own commands, with the files that
    register operators compiled again."""
    ninja = ["ninja"] if shutil.which("ninja") else [sys.executable, "-m", "ninja"]
    if not (native / "build.ninja").exists():
        raise FileNotFoundError(f"{native} has no build of the library; run 'make build' first")
    said = subprocess.run([*ninja, "-C", str(native), "-t", "compdb"], capture_output=True, text=True, check=True)
    folder, link, objects, running = native / "hub", "", {}, []
    folder.mkdir(exist_ok=True)
    for entry in json.loads(said.stdout):
        output, command = entry["output"], entry["command"]
        if Path(output).name.startswith("libpyvit_ops."):
            link = command.replace(output, str(path))
        elif Path(entry["file"]).parent == ROOT / "csrc/torch":
            objects[output] = str(folder / Path(output).name)
            command = command.replace(output, objects[output])
            defines = [f"-DPYVIT_NAMESPACE={namespace}", f"-DPYVIT_CUDA_NAMESPACE={namespace}_cuda"]
            running.append(subprocess.Popen([*shlex.split(command), *defines], cwd=native))
    codes = [process.wait() for process in running]
    if any(codes):
        raise RuntimeError("the compiler failed")
    for old, new in objects.items():
        link = link.replace(f" {old}", f" {new}")
    subprocess.run(shlex.split(link), cwd=native, check=True)


def write(out: Path, native: Path = ROOT / "build/native", variants: Mapping[str, str] = VARIANTS) -> None:
    """The whole package into the folder ``out``, whose build/ is replaced; ``native`` is where ninja has built."""
    shutil.rmtree(out / "build", ignore_errors=True)
    for name, backend in variants.items():
        variant, namespace = out / "build" / name, f"_pyvit_{backend}_{unique_id()}"
        if name == "torch-cpu":  # beside the compiled one
            namespace += "_noarch"
        variant.mkdir(parents=True)
        library = f"{namespace}.abi3.so"
        if name == COMPILED:
            write_library(native, variant / library, namespace)
        write_python(variant, namespace, library)
        metadata = {
            "name": "pyvit",
            "id": namespace,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the package for Hugging Face's kernels.")
    parser.add_argument("--out", type=Path, default=ROOT / "build/hub")
    parser.add_argument("--native", type=Path, default=ROOT / "build/native", help="a folder in which ninja has built")
    args = parser.parse_args()
    write(args.out, args.native.resolve())
    print(f"wrote {', '.join(sorted(p.name for p in (args.out / 'build').iterdir()))} under {args.out / 'build'}")


if __name__ == "__main__":
    main()
