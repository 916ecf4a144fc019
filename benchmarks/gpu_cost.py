"""Lower bounds of GPU cases from data sheets, shown beside the measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.inputs import DTYPES
from pyvit.dispatch import cost_model


def call_cost(case: Case, backward: bool) -> cost_model.Cost | None:
    """Bytes and flops of one call of the case's operator; None for whole models."""
    s, dtype = case.shape, DTYPES[case.dtype]
    if case.op == "flash_attention":
        causal = s.get("causal", False)
        return cost_model.attention(
            s["batch"], s["heads"], s["length"], s["length"], s["dim"], dtype, causal=causal, backward=backward
        )
    if case.op == "window_attention":
        window = (s["window"], s["window"])
        return cost_model.window_attention(
            s["batch"], s["side"], s["side"], window, s["heads"], s["width"] // s["heads"], dtype, backward=backward
        )
    if case.op == "patch_embed":
        patches = s.get("keep") or (s["size"] // s["patch"]) ** 2
        pixel = 1 if s.get("uint8") else None
        patch = (s["patch"], s["patch"])
        return cost_model.patch_embed(
            s["batch"], 3, patch, patches, s["width"], dtype, prefix=1, pixel_bytes=pixel, backward=backward
        )
    return _loss_cost(case.op, s, dtype, backward)


def _loss_cost(op: str, s: Mapping[str, Any], dtype: torch.dtype, backward: bool) -> cost_model.Cost | None:
    """A pairwise loss: embeddings and their gradients are moved, logits are not; half of a symmetric matrix is
    computed.
    """
    if op in ("info_nce", "sigmoid_contrastive", "nt_xent"):
        n, size = s["batch"], s["batch"] * s["dim"] * dtype.itemsize
        products = (2.0 * n * n if op != "nt_xent" else (2.0 * n) ** 2) * s["dim"]
        return cost_model.Cost((4 if backward else 2) * size, (2 if backward else 1) * products, dtype)
    if op == "distillation_cross_entropy":
        student, teacher = s["crops"] * s["batch"], s["views"] * s["batch"]
        moved = (
            (student + teacher + 2 * s["prototypes"] + (student + s["prototypes"] if backward else 0))
            * s["dim"]
            * dtype.itemsize
        )
        products = 2.0 * s["dim"] * s["prototypes"]
        return cost_model.Cost(moved, products * (2 * student if backward else student + teacher), dtype)
    return None


def floor_ms(case: Case, device: str | None = None) -> float:
    """A lower bound in milliseconds for the case on ``device``, by default this machine's GPU; NaN if unknown."""
    try:
        gpu = cost_model.gpu_named(device or torch.cuda.get_device_name())
    except KeyError:
        return math.nan
    passes = {"forward": (False,), "backward": (True,), "forward+backward": (False, True)}.get(case.mode, ())
    costs = [call_cost(case, backward) for backward in passes]
    if not costs or any(c is None for c in costs):
        return math.nan
    return 1e3 * sum(c.floor(gpu) for c in costs if c is not None)
