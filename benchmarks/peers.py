"""Other libraries: whether they are here, their import, and their runtimes. A library that is missing is reported with
the reason. Their models: :mod:`benchmarks.peer_models`.

timm, open_clip and transformers import torchvision to load and augment images. If torchvision was built for another
torch, :mod:`benchmarks.torchvision_operators` makes it importable; if it is missing, empty modules replace it. The
models do not use either.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import torchvision_operators  # noqa: F401
from pyvit.dispatch.devices import cpu_isa

_PACKAGES = {
    "timm": ("timm",),
    "transformers": ("transformers",),
    "torchvision": ("torchvision",),
    "open_clip": ("open_clip",),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "nncf": ("nncf",),
    "torchao": ("torchao",),
}


def absent(peer: str) -> str | None:
    """Why ``peer`` cannot be used, or None."""
    missing = [name for name in _PACKAGES.get(peer, ()) if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def version(peer: str) -> str:
    package = peer.partition(" ")[0]
    if package not in _PACKAGES:
        return ""
    return f"{package} {importlib.metadata.version('open_clip_torch' if package == 'open_clip' else package)}"


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16."""
    return cpu_isa(torch.bfloat16) in ("amx", "avx512bf16")


class _EmptyTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules named torchvision.* whose attributes are empty classes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.partition(".")[0] == "torchvision"
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        def attribute(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            if name == "InterpolationMode":  # read at import, member by member
                return enum.Enum(name, "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS NEAREST_EXACT")
            return type(name, (), {})

        module = types.ModuleType(spec.name)
        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    finder = _EmptyTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_timm() -> types.ModuleType:
    """Import timm, even if torchvision does not work with this torch."""
    return import_peer("timm")


def import_peer(name: str) -> types.ModuleType:
    """Import a library that imports torchvision, even if torchvision does not work with this torch."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with _without_torchvision():
            return importlib.import_module(name)
    return importlib.import_module(name)


def onnxruntime_call(
    model: nn.Module, images: Tensor, threads: int, quantize_in: Path | None = None
) -> Callable[[Tensor], Tensor]:
    """An ONNX Runtime session of ``model`` for the shape of ``images``, with all graph optimisations; with its dynamic
    int8 quantisation, which works on files, in the folder ``quantize_in``."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(
        logging.ERROR
    )  # it warns that torchvision is missing, which these models do not need
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    graph = buffer.getvalue() if quantize_in is None else _dynamic_int8(buffer.getvalue(), quantize_in)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _dynamic_int8(graph: bytes, folder: Path) -> bytes:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    (folder / "float.onnx").write_bytes(graph)
    quant_pre_process(str(folder / "float.onnx"), str(folder / "ready.onnx"), skip_symbolic_shape=True)
    options = {"weight_type": QuantType.QInt8, "per_channel": True}
    quantize_dynamic(
        str(folder / "ready.onnx"), str(folder / "int8.onnx"), op_types_to_quantize=["MatMul", "Gemm"], **options
    )
    return (folder / "int8.onnx").read_bytes()


def openvino_call(
    model: nn.Module, images: Tensor, dtype: str, threads: int, calibration: Sequence[Tensor] = ()
) -> Callable[[Tensor], Tensor]:
    """``model`` compiled by OpenVINO for latency on ``threads`` threads, computing in ``dtype`` ("fp32", "bf16", or
    "int8" by NNCF's post-training quantisation with batches of images, the rest in bf16 where the processor has it)."""
    import openvino

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=images, input=[list(images.shape)])
        if dtype == "int8":
            import nncf

            data = nncf.Dataset([batch.numpy() for batch in calibration])
            kind, preset = nncf.ModelType.TRANSFORMER, nncf.QuantizationPreset.MIXED
            converted = nncf.quantize(converted, data, preset=preset, model_type=kind, subset_size=len(calibration))
    hints: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" or (dtype == "int8" and multiplies_bf16()) else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])
