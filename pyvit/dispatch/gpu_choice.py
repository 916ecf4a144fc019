"""Which of the two GPU backends serves a call that both can: the one measured faster at this shape or a like one, else
the one predicted.

``python -m benchmarks.gpu`` (its step "dispatch") measures on the GPU at hand and writes rows for :data:`MEASURED`.
Predictions come from :mod:`pyvit.dispatch.cost_model`; they look at sizes alone and are made without a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from pyvit import library
from pyvit.dispatch import cost_model


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one call, forward and, with ``grad``, backward. ``shape`` is what decides the tiles (see
    :func:`shape_of`).

    ``digests`` of the CUDA and the Triton kernels measured (pyvit.library.cuda_digests, pyvit.triton_kernels.digests),
    and ``triton_version``: see :func:`stale`.
    """

    gpu: str
    op: str
    dtype: torch.dtype
    grad: bool
    shape: tuple[int, ...]
    cuda: float
    triton: float
    source: str
    digests: tuple[str, str] = ("", "")
    triton_version: str = ""


@functools.cache
def stale(row: Measured) -> str | None:
    """Why ``row`` decides no call, as what it measured has changed since; None if it may."""
    from pyvit.triton_kernels import digests, tiles

    if not all(row.digests):
        return "does not say which version of the kernels it is of"
    changed = [
        name
        for name, was, now in zip(
            ("cuda", "triton"),
            row.digests,
            (library.cuda_digests().get(row.op.removesuffix("_varlen")), digests.operator(row.op)),
            strict=True,
        )
        if was != now
    ]
    if changed:
        return f"the kernels of {' and '.join(changed)} have changed since"
    return None if row.triton_version == tiles.triton_version() else f"measured with Triton {row.triton_version}"


def _h100(op: str, grad: bool, shape: tuple[int, ...], cuda: float, triton: float) -> Measured:
    return Measured("H100", op, torch.bfloat16, grad, shape, cuda, triton, "2026-11-26")


#: The shapes of ``benchmarks.gpu_cases``; what else was timed then is in benchmarks/results. The rows of 2026-11-26 are
#: older than the kernels' digests, and every kernel has changed since (docs/gpu-status.md): they decide nothing, and
#: ``benchmarks.gpu_backends`` compares the cost model with them.
MEASURED: tuple[Measured, ...] = (
    _h100("flash_attention", False, (197, 197, 64), 0.4984, 0.253),
    _h100("flash_attention", True, (197, 197, 64), 2.867, 1.231),
    _h100("flash_attention", False, (257, 257, 64), 0.6116, 0.3312),
    _h100("flash_attention", True, (257, 257, 64), 3.655, 1.468),
    _h100("flash_attention", False, (577, 577, 64), 0.7126, 0.2593),
    _h100("flash_attention", True, (577, 577, 64), 3.896, 1.302),
    _h100("flash_attention", False, (1025, 1025, 64), 1.157, 0.3549),
    _h100("flash_attention", True, (1025, 1025, 64), 6.987, 1.996),
    _h100("window_attention", False, (7, 7, 32), 0.4928, 0.3137),
    _h100("window_attention", True, (7, 7, 32), 1.713, 1.343),
    _h100("window_attention", False, (8, 8, 32), 0.5195, 0.2278),
    _h100("window_attention", True, (8, 8, 32), 2.004, 1.183),
    _h100("window_attention", False, (12, 12, 32), 1.082, 2.176),
    _h100("window_attention", True, (12, 12, 32), 3.411, 7.552),
    _h100("window_attention", False, (16, 16, 32), 1.448, 3.306),
    _h100("window_attention", True, (16, 16, 32), 10.16, 11.34),
    _h100("window_attention", False, (24, 24, 32), 2.79, 8.128),
    _h100("window_attention", True, (24, 24, 32), 19.93, 21.98),
    _h100("patch_embed", False, (16, 16, 768), 0.518, 0.394),
    _h100("patch_embed", True, (16, 16, 768), 1.92, 1.0),
)


@dataclass(frozen=True)
class Choice:
    """The faster backend, on which GPU, by what evidence, and both figures in milliseconds."""

    faster: str
    gpu: str
    basis: str
    cuda: float
    triton: float

    def __str__(self) -> str:
        return f"{self.basis}, for {self.gpu}: cuda {self.cuda:.3g} ms, triton {self.triton:.3g} ms"


#: The GPU whose rates stand for one without rates of its own, by major compute capability; an A100 stands for the rest.
_NEAREST_GPU = {9: "H100", 10: "B200"}


@functools.cache
def current_gpu() -> str | None:
    """Key into :data:`cost_model.GPUS` for the current GPU, or for the nearest to it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    found = [key for key in cost_model.GPUS if key.lower() in name]
    return max(found, key=len) if found else _NEAREST_GPU.get(torch.cuda.get_device_capability()[0], "A100")


def shape_of(op: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Of a call's sizes those that decide tiles and padding: lengths and head dimension, window and head dimension,
    patch and width."""
    if op.startswith("flash_attention"):  # batch, heads, key heads, queries, keys, head dimension
        return sizes[3:]
    if op == "window_attention":  # batch, height, width, window, window, heads, head dimension
        return (*sizes[3:5], sizes[6])
    return (*sizes[2:4], sizes[5])  # batch, channels, patch, patch, patches, width


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """The largest factor between sizes of two shapes."""
    return max(max(m, n) / min(m, n) for m, n in zip(a, b, strict=True))


@functools.lru_cache(maxsize=4096)
def compare(op: str, dtype: torch.dtype, features: tuple[str, ...], sizes: tuple[int, ...], gpu: str) -> Choice:
    """Measured figures of this shape, or of the nearest within a factor of two, in elements as wide on a GPU of the
    same architecture; else predictions. Measurements of former kernels are not used, which ``basis`` says. Equal
    figures go to Triton, which serves more calls."""
    grad = bool({"grad", "lse_grad", "images_grad"} & set(features))
    shape, arch = shape_of(op, sizes), _ARCHS.get(gpu, gpu)
    rows = [
        row
        for row in MEASURED
        if (row.op, row.grad, row.dtype.itemsize, _ARCHS.get(row.gpu, row.gpu)) == (op, grad, dtype.itemsize, arch)
        and _distance(row.shape, shape) <= 2
    ]
    rows.sort(key=lambda row: (_distance(row.shape, shape), row.gpu != gpu))
    basis = f"predicted (the measurement of {rows[0].source}: {stale(rows[0])})" if rows else "predicted"
    if current := [row for row in rows if stale(row) is None]:
        row = current[0]
        like = "" if (row.shape, row.gpu) == (shape, gpu) else f" at {'x'.join(map(str, row.shape))} on {row.gpu}"
        return Choice(
            "cuda" if row.cuda < row.triton else "triton", gpu, f"measured ({row.source}){like}", row.cuda, row.triton
        )
    times = [predict(backend, op, dtype, features, sizes, gpu, grad) for backend in ("cuda", "triton")]
    return Choice("cuda" if times[0] < times[1] else "triton", gpu, basis, *times)


#: What Triton compiles for on each GPU, the key of its tiles.
_ARCHS = {"A100": "sm_80", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100"}


def predict(
    backend: str, op: str, dtype: torch.dtype, features: tuple[str, ...], sizes: tuple[int, ...], gpu: str, grad: bool
) -> float:
    """Milliseconds of the forward and, with ``grad``, the backward."""
    passes, where, arch = (False, True) if grad else (False,), cost_model.GPUS[gpu], _ARCHS.get(gpu, "")
    total = 0.0
    for backward in passes:
        if op.startswith("flash_attention"):
            b, h, hkv, n_q, n_k, d = sizes
            floor = cost_model.attention(
                b, h, n_q, n_k, d, dtype, kv_heads=hkv, causal="causal" in features, backward=backward
            )
            bias_grad = "bias_grad" in features
            if backend == "cuda":
                plan = cost_model.cuda_attention(n_q, n_k, d, dtype.itemsize, backward, bias_grad)
            else:
                bias = bool({"bias", "bool_mask"} & set(features))
                plan = cost_model.triton_attention(
                    n_q, n_k, d, dtype.itemsize, backward, bias, bias_grad, arch, h != hkv
                )
        elif op == "window_attention":
            b, height, width, wh, ww, heads, d = sizes
            floor = cost_model.window_attention(b, height, width, (wh, ww), heads, d, dtype, backward=backward)
            table = "bias_table" in features
            if backend == "cuda":
                plan = cost_model.cuda_window(wh * ww, d, dtype.itemsize, backward, table)
            else:
                plan = cost_model.triton_window(wh * ww, d, dtype.itemsize, backward, table, arch)
        else:
            b, c, ph, pw, patches, width = sizes
            pixel_bytes = 1 if "uint8" in features else None
            images_grad = "images_grad" in features
            floor = cost_model.patch_embed(
                b,
                c,
                (ph, pw),
                patches,
                width,
                dtype,
                pixel_bytes=pixel_bytes,
                images_grad=images_grad,
                backward=backward,
            )
            plan = cost_model.patch_plan(b * patches, width, 1 + images_grad * backward, backend == "triton")
        total += plan.seconds(floor, where)
    return 1e3 * total


def first(op: str, dtype: torch.dtype, features: tuple[str, ...], sizes: tuple[int, ...]) -> str | None:
    """ "cuda" or "triton", whichever to ask first; None without a GPU, for sizes unknown while tracing, and for empty
    tensors."""
    gpu = current_gpu()
    return compare(op, dtype, features, sizes, gpu).faster if gpu is not None and sizes and all(sizes) else None


#: The compiler runs it while tracing, instead of tracing it. (torch.compiler.assume_constant_result would import the
#: compiler here.)
first._dynamo_marked_constant = True  # type: ignore[attr-defined]
