"""A digest of each CUDA operator's sources: ``python csrc/cuda/digests.py``. The build puts them into the library, so
that a measurement can say which version of a kernel it is of."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_COMMENT = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)


def digests(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Operator -> digest of ``<operator>.cu``, ``<operator>_backward.cu`` and every header of ``folder`` that they
    include, without comments and spaces."""
    found: dict[str, set[Path]] = {}
    for backward in sorted(folder.rglob("*_backward.cu")):
        op = backward.stem.removesuffix("_backward")
        found[op] = _included(backward, folder) | _included(backward.with_name(f"{op}.cu"), folder)
    return {
        op: hashlib.sha256("".join(_code(path) for path in sorted(paths)).encode()).hexdigest()[:16]
        for op, paths in found.items()
    }


def _included(source: Path, folder: Path) -> set[Path]:
    """``source`` and the files it includes, directly or not."""
    seen: set[Path] = set()
    open_ = [source]
    while open_:
        path = open_.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            open_ += [at for at in (path.parent / name, folder / name) if at.exists()][:1]
    return seen


def _code(path: Path) -> str:
    return "".join(_COMMENT.sub(lambda m: m[1] or " ", path.read_text()).split())


if __name__ == "__main__":
    for op, digest in digests().items():
        print(op, digest)
