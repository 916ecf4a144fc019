"""Models as files that run without their Python code: torch.export, AOTInductor, ONNX. Each file is loaded again after
it is written, and compared with the model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyvit import library
from pyvit.dispatch import use_backend

#: Formats, and the endings of their files.
FORMATS = {"torch-export": ".pt2", "aotinductor": ".pt2", "onnx": ".onnx"}

#: Where a .pt2 file holds the metadata.
EXTRA = "pyvit.json"

#: Largest difference between the file's outputs and the model's, relative to the largest output.
TOLERANCE = 1e-3


def export_model(
    model: nn.Module,
    images: Tensor,
    path: Path,
    format: str = "torch-export",
    batch: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> float | None:
    """Write ``model`` for inputs like ``images`` (B, C, H, W) to ``path``, and run the file.

    - ``torch-export``: a program for ``torch.export.load``, with pyvit's operators; loading it needs ``import pyvit``.
    - ``aotinductor``: a compiled package for ``torch._inductor.aoti_load_package``. It needs pyvit's compiled library,
      and a C++ compiler here.
    - ``onnx``: with the operators' definitions in PyTorch's own operators. Needs the packages onnx and onnxscript.

    ``batch`` fixes the number of images; None allows any. ``metadata`` is stored in the file (not by aotinductor).

    Returns the largest difference between the outputs of file and model, relative to the largest output; None if the
    file cannot be run here, because onnxruntime is not installed. Raises ValueError, and removes the file, if the
    difference exceeds 1e-3; ImportError for missing packages; RuntimeError without a compiler or pyvit's library.
    """
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"export: a file of {format} must end in {FORMATS[format]}, got {path.name}")
    if format == "onnx":
        _need("onnx", "onnxscript")
    if format == "aotinductor":
        _need_compiler()
    model = model.eval()
    if batch is not None:
        images = images[:1].expand(batch, *images.shape[1:]) if len(images) < batch else images[:batch]
    # torch.export specialises a dimension of 1
    images = images.contiguous() if batch is not None or len(images) > 1 else torch.cat([images, images])
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), _quiet():
        expected = model(images)
        shapes = ({0: torch.export.Dim.DYNAMIC},) if batch is None else None
        with use_backend("reference") if format == "onnx" else contextlib.nullcontext():
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        found = _WRITE[format](program, path, images, json.dumps(dict(metadata or {})))
    if found is None:
        return None
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= TOLERANCE or found.shape != expected.shape:
        path.unlink()
        raise ValueError(f"export: {path} gave other results than the model (relative difference {error:.1e}); removed")
    return error


def _torch_export(program: Any, path: Path, images: Tensor, metadata: str) -> Tensor:
    torch.export.save(program, path, extra_files={EXTRA: metadata})
    return torch.export.load(path).module()(images)


def _aotinductor(program: Any, path: Path, images: Tensor, metadata: str) -> Tensor:
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(path.absolute()))
    return torch._inductor.aoti_load_package(package)(images)


def _onnx(program: Any, path: Path, images: Tensor, metadata: str) -> Tensor | None:
    found = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["scores"], external_data=False
    )
    assert found is not None
    found.model.metadata_props["pyvit"] = metadata
    found.save(str(path))
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})[0]).to(images)


_WRITE = {"torch-export": _torch_export, "aotinductor": _aotinductor, "onnx": _onnx}


def _need(*packages: str) -> None:
    import importlib.util

    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"export: onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _need_compiler() -> None:
    named = os.environ.get("CXX")
    if not any(map(shutil.which, [named] if named else ["g++", "clang++", "c++", "cl"])):
        found = f"CXX names {named}, which does not exist" if named else "none was found"
        raise RuntimeError(
            f"export: aotinductor needs a C++ compiler, and {found}; install one, or choose torch-export or onnx"
        )
    if (reason := library.problem()) is not None:
        raise RuntimeError(f"export: aotinductor needs pyvit's compiled library: {reason}; choose torch-export or onnx")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
