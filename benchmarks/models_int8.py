"""Whole models with int8 weights: pyvit's, pyvit's in other dtypes, and peers that quantise. The error is that of the
logits against the float64 model, |y - y64| / |y64|."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pyvit
from benchmarks import inputs, models, peers
from benchmarks.cases import Case
from benchmarks.gate import Verdict
from benchmarks.workload import OURS, Contender, Workload, raised, uses_pyvit

Forward = Callable[[Tensor], Tensor]
#: The largest relative error of the logits allowed to pyvit's models, and to peers: theirs is shown and not judged, so
#: that a peer that is faster and less accurate is still a peer.
ALLOWED, PEERS_ALLOWED = 0.05, 1.0
#: Images on which OpenVINO's quantiser calibrates.
CALIBRATION = 16


def dtype() -> torch.dtype:
    """Of what is not quantised: bfloat16 where the processor multiplies it."""
    return torch.bfloat16 if peers.multiplies_bf16() else torch.float32


def _ours(name: str, kind: torch.dtype, quantize: bool) -> Forward:
    model = models.MODULES[OURS](name).eval().to(kind)
    if quantize:
        pyvit.quantize(model, reversible=False)
    pyvit.pack_weights(model)
    return models.no_grad(model)


def _accelerated(name: str, kind: torch.dtype) -> Forward:
    """timm's model, accelerated and quantised."""
    model = models.MODULES["timm"](name).eval().to(kind)
    pyvit.quantize(model, reversible=False)
    pyvit.pack_weights(model)
    return models.no_grad(model)


def _float(name: str) -> nn.Module:
    return models.MODULES["eager SDPA"](name).eval()


def openvino(name: str, images: Tensor, threads: int) -> Forward:
    """By NNCF's post-training quantisation, calibrated on photographs."""
    pixels = inputs.pixels("photos", CALIBRATION, images.shape[-1], seed=1)
    batches = inputs.normalised(pixels).repeat(-(-len(images) // CALIBRATION), 1, 1, 1).split(len(images))
    calibration = [batch for batch in batches if len(batch) == len(images)]
    return peers.openvino_call(_float(name), images, "int8", threads, calibration)


def onnxruntime(name: str, images: Tensor, threads: int) -> Forward:
    """By its dynamic quantisation: int8 weights, and activations' ranges found in each call."""
    with tempfile.TemporaryDirectory() as folder:
        return peers.onnxruntime_call(_float(name), images, threads, quantize_in=Path(folder))


def torchao(name: str, kind: torch.dtype) -> Forward:
    """Its int8 weights with int8 activations of dynamic ranges, which needs torch.compile."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = _float(name).to(kind)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()
    return models.no_grad(torch.compile(model, dynamic=False))


class Provider(NamedTuple):
    """The peers that must be asked for, the dtype of its images, and what prepares its call."""

    packages: tuple[str, ...]
    images: torch.dtype
    make: Callable[[], Forward]


def builders(case: Case, images: Tensor) -> dict[str, Provider]:
    """All providers of a case; ``images`` of the shape that a compiled model is for."""
    name, kind, full, threads = case.op, dtype(), torch.float32, torch.get_num_threads()
    found = {
        OURS: Provider((), kind, lambda: _ours(name, kind, True)),
        f"{OURS} fp32": Provider((), full, lambda: _ours(name, full, False)),
    }
    if kind != full:
        found[f"{OURS} bf16"] = Provider((), kind, lambda: _ours(name, kind, False))
    found["timm + accelerate"] = Provider(("accelerate", "timm"), kind, lambda: _accelerated(name, kind))
    found["openvino"] = Provider(("openvino",), full, lambda: openvino(name, images, threads))
    found["onnxruntime"] = Provider(("onnxruntime",), full, lambda: onnxruntime(name, images, threads))
    found["torchao + compile"] = Provider(("torchao",), kind, lambda: torchao(name, kind))
    return found


def build(case: Case, source: str, asked: Sequence[str]) -> Workload:
    """The workload of an int8 case with the peers of ``asked``."""
    images = models._images(case, source, "cpu")
    batch, size = case.shape["batch"], case.shape["size"]
    moved = models.traffic(case.op, batch, size, "int8", False)
    work = Workload(case, source, models.flops(case.op, batch, False), moved)
    reference = functools.cache(lambda: _reference(case.op, images[:1]))
    for name, provider in builders(case, images).items():
        if not all(package in asked for package in provider.packages):
            continue
        needed = (*provider.packages, *(("nncf",) if name == "openvino" else ()))
        if (reason := next((why for package in needed if (why := peers.absent(package))), None)) is not None:
            work.unavailable[name] = reason
            continue
        try:
            forward = provider.make()
        except Exception as error:
            if name.startswith(OURS):
                raise
            work.unavailable[name] = raised(error)
            continue
        limit = ALLOWED if uses_pyvit(name) else PEERS_ALLOWED
        run = functools.partial(forward, images.to(provider.images))
        work.contenders[name] = Contender(run, functools.partial(_verdict, run, reference, limit), peers.version(name))
    return work


def _reference(name: str, images: Tensor) -> Tensor:
    model = copy.deepcopy(models.MODULES["eager naive"](name)).eval().double()
    with torch.no_grad():
        return model(images.double())


def _verdict(run: Callable[[], Tensor], reference: Callable[[], Tensor], limit: float) -> Verdict:
    """Of the first image's logits."""
    wanted, found = reference(), run()[:1].double()
    error = float((found - wanted).norm() / wanted.norm())
    cosine = float(torch.cosine_similarity(found, wanted, -1).min())
    return Verdict(error, limit, f"relative error {error:.4f}, cosine {cosine:.5f}")
