"""Which of several backends that can serve a call comes first: the one measured faster at this shape or a like one,
else the one of a declared rule, else the one predicted faster.

``python -m benchmarks.gpu`` (its step "dispatch") measures on the GPU at hand and writes rows for :data:`MEASURED`.
Predictions come from :mod:`pyvit.dispatch.cost_model`; they look at sizes alone and are made without a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pyvit import library
from pyvit.dispatch import cost_model, devices

NAN = math.nan


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one call, forward and, with ``grad``, backward. ``shape`` is what decides the tiles (see
    :func:`shape_of`); ``torch`` is PyTorch's fastest kernel, NaN where it has none.

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
    torch: float
    source: str
    digests: tuple[str, str] = ("", "")
    triton_version: str = ""

    def __str__(self) -> str:
        figures = ", ".join(f"{b} {t:.3g} ms" for b in TIMED if not math.isnan(t := getattr(self, b)))
        return f"{figures} at {'x'.join(map(str, self.shape))} on {self.gpu}, {self.source}"


#: The backends that rows have figures of. Equal figures go to the first, which serves more calls.
TIMED = ("triton", "cuda", "torch")


def _h100(op: str, grad: bool, shape: tuple[int, ...], cuda: float, triton: float, theirs: float = NAN) -> Measured:
    return Measured("H100", op, torch.bfloat16, grad, shape, cuda, triton, theirs, "2026-11-26")


#: The shapes of ``benchmarks.gpu_cases``; what else was timed then is in benchmarks/results. PyTorch's figures are
#: cuDNN's. The rows of 2026-11-26 are older than the kernels' digests, and every kernel has changed since
#: (docs/gpu-status.md): they decide nothing, and ``benchmarks.gpu_model`` compares the cost model with
#: them.
MEASURED: tuple[Measured, ...] = (
    _h100("flash_attention", False, (197, 197, 64), 0.4984, 0.253, 0.176),
    _h100("flash_attention", True, (197, 197, 64), 2.867, 1.231, 0.897),
    _h100("flash_attention", False, (257, 257, 64), 0.6116, 0.3312, 0.26),
    _h100("flash_attention", True, (257, 257, 64), 3.655, 1.468, 1.099),
    _h100("flash_attention", False, (577, 577, 64), 0.7126, 0.2593, 0.231),
    _h100("flash_attention", True, (577, 577, 64), 3.896, 1.302, 0.966),
    _h100("flash_attention", False, (1025, 1025, 64), 1.157, 0.3549, 0.341),
    _h100("flash_attention", True, (1025, 1025, 64), 6.987, 1.996, 1.334),
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


@functools.cache
def stale(row: Measured) -> str | None:
    """Why ``row`` decides no call, as what it measured has changed since; None if it may."""
    from pyvit.triton_kernels import digests, tiles

    if not all(row.digests):
        return "does not say which version of the kernels it is of"
    now = (library.cuda_digests().get(row.op.removesuffix("_varlen")), digests.operator(row.op))
    changed = [name for name, a, b in zip(("cuda", "triton"), row.digests, now, strict=True) if a != b]
    if changed:
        return f"the kernels of {' and '.join(changed)} have changed since"
    return None if row.triton_version == tiles.triton_version() else f"measured with Triton {row.triton_version}"


class Rule(NamedTuple):
    """``backend`` comes first for calls of ``op`` on ``device`` that it can serve and that no measurement decides: of
    these dtypes, on a CPU with these instruction sets, that ask for one of these features (empty: all)."""

    backend: str
    op: str
    device: str
    why: str
    dtypes: tuple[torch.dtype, ...] = ()
    isas: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def fits(self, op: str, device: str, dtype: torch.dtype, features: Sequence[str]) -> bool:
        return (
            (self.op, self.device) == (op, device)
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.features or bool(set(self.features) & set(features)))
            and (not self.isas or devices.cpu_isa(dtype) in self.isas)
        )


_UNMEASURED = "PyTorch's kernels come first where pyvit's present ones have not been measured"
_AMX = "PyTorch's kernels use AMX, pyvit's do not; not measured"
_PORTABLE = (
    "with gradients 1.1x to 1.3x as fast as pyvit's portable kernels, measured 2026-11-30 on a Zen 4 whose vector "
    "instructions PyTorch's matrix products kept; not measured on a CPU without them"
)

#: The first that fits decides.
RULES = (
    Rule("torch", "flash_attention", "cuda", _UNMEASURED),
    Rule("torch", "patch_embed", "cuda", _UNMEASURED),
    Rule("torch", "flash_attention", "cpu", _AMX, (torch.bfloat16, torch.float16), ("amx",)),
    Rule("torch", "rope_attention", "cpu", _AMX, (torch.bfloat16, torch.float16), ("amx",)),
    Rule("torch", "flash_attention", "cpu", _PORTABLE, isas=("portable",), features=("grad",)),
)


class Choice(NamedTuple):
    """The backend that comes first, and by what evidence."""

    backend: str
    why: str


def first(
    op: str,
    device: str,
    dtype: torch.dtype,
    features: tuple[str, ...],
    sizes: tuple[int, ...],
    able: tuple[str, ...],
) -> Choice | None:
    """Which of the ``able`` backends of a call comes first; None where nothing is known, and their declared order
    stands."""
    gpu = current_gpu() if device == "cuda" else None
    known = gpu is not None and bool(sizes) and all(sizes)
    row = nearest(op, dtype, features, sizes, gpu) if known and gpu is not None else None
    unused = "" if row is None or (why := stale(row)) is None else f" (not used, {why}: {row})"
    if row is not None and not unused:
        times = {b: getattr(row, b) for b in TIMED if b in able and not math.isnan(getattr(row, b))}
        if len(times) > 1:
            return Choice(min(times, key=lambda b: times[b]), f"measured: {row}")
    for rule in RULES:
        if rule.backend in able and rule.fits(op, device, dtype, features):
            return Choice(rule.backend, rule.why + unused)
    if known and gpu is not None and {"cuda", "triton"} <= set(able):
        grad = _has_gradient(features)
        times = {b: predict(b, op, dtype, features, sizes, gpu, grad) for b in ("triton", "cuda")}
        figures = ", ".join(f"{b} {t:.3g} ms" for b, t in times.items())
        return Choice(min(times, key=lambda b: times[b]), f"predicted for {gpu}: {figures}{unused}")
    return None


#: The compiler runs it while tracing, instead of tracing it. (torch.compiler.assume_constant_result would import the
#: compiler here.)
first._dynamo_marked_constant = True  # type: ignore[attr-defined]


def current_gpu() -> str | None:
    """Key into :data:`cost_model.GPUS` for the current GPU, or for one of its architecture or generation; None without
    a GPU or for one that is like none of them."""
    present = devices.present()
    if not present:
        return None
    name, arch = present[0].name.lower().replace(" ", ""), present[0].arch
    for alike in (
        lambda key: key.lower() in name,
        lambda key: cost_model.GPUS[key].arch == arch,
        lambda key: cost_model.GPUS[key].arch[:-1] == arch[:-1],
    ):
        if found := [key for key in cost_model.GPUS if alike(key)]:
            return found[0]
    return None


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


def _has_gradient(features: Sequence[str]) -> bool:
    return bool({"grad", "lse_grad", "images_grad"} & set(features))


def nearest(
    op: str, dtype: torch.dtype, features: tuple[str, ...], sizes: tuple[int, ...], gpu: str
) -> Measured | None:
    """The row of this shape, or of the nearest within a factor of two, in elements as wide on a GPU of the same
    architecture; one that is stale only where there is no other."""
    grad, shape, arch = _has_gradient(features), shape_of(op, sizes), cost_model.GPUS[gpu].arch
    rows = [
        row
        for row in MEASURED
        if (row.op, row.grad, row.dtype.itemsize, cost_model.GPUS[row.gpu].arch) == (op, grad, dtype.itemsize, arch)
        and _distance(row.shape, shape) <= 2
    ]
    return min(rows, key=lambda r: (stale(r) is not None, _distance(r.shape, shape), r.gpu != gpu), default=None)


def predict(
    backend: str, op: str, dtype: torch.dtype, features: tuple[str, ...], sizes: tuple[int, ...], gpu: str, grad: bool
) -> float:
    """Milliseconds of the forward and, with ``grad``, the backward."""
    passes, where = (False, True) if grad else (False,), cost_model.GPUS[gpu]
    arch = where.arch
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
                shared = devices.PARTS[arch].shared
                plan = cost_model.cuda_window(wh * ww, d, dtype.itemsize, backward, table, shared)
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
