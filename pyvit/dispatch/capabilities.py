"""What each backend serves, as data: dispatch, ``explain``, errors, the documentation's table and the tests' parameters
read it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from pyvit import library

#: As listed and reported; the order in which they are asked is :func:`preference`'s.
BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
#: Those made of PyTorch's own operators, which autograd and compilers see through.
PLAIN = ("torch", "reference")

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Capability:
    """One backend's promise for one operator.

    ``features`` are the optional things a call may ask for (see each operator's ``describe``); a feature not listed is
    refused. ``head_dim`` is (smallest, largest, multiple of).
    """

    dtypes: tuple[torch.dtype, ...]
    features: frozenset[str] = frozenset()
    head_dim: tuple[int, int, int] = (1, 1 << 30, 1)
    #: Written in Python over torch's own matrix products: serves tensors of the device of the backend's name, with no
    #: compiled library.
    pure: bool = False


def _missing(backend: str, device: str) -> str | None:
    if backend == "cpu":
        return library.problem() if device == "cpu" else f"runs on cpu tensors, got {device}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package 'triton' is not installed (pip install triton)"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "runs on GPU tensors (on cpu only in Triton's interpreter, TRITON_INTERPRET=1)"
        return None if device in ("cpu", "cuda") else f"runs on cuda tensors, got {device}"
    if device != "cuda":
        return f"runs on cuda tensors, got {device}"
    if library.problem() is not None:
        return library.problem()
    return None if library.has_cuda() else "the compiled library was built without CUDA (no nvcc at build time)"


#: MISSING[backend, device]: why a backend cannot run on a device type on this machine, None where it can. Looking never
#: touches a GPU.
MISSING = {(b, device): _missing(b, device) for b in BACKENDS if b not in PLAIN for device in ("cpu", "cuda")}


_ATTENTION = frozenset({"bias", "bool_mask", "bias_grad", "causal", "gqa", "grad", "lse", "lse_grad"})
_VARLEN = _ATTENTION
_WINDOW = frozenset({"bias_table", "logit_scale", "pad_qkv", "shift", "padding", "grad"})
_PATCH = frozenset({"uint8", "normalize", "overlap", "pos_embed", "prefix", "keep", "grad", "images_grad"})

_REFERENCE = Capability(
    (F64, F32, F16, BF16), _ATTENTION | _WINDOW | _PATCH | {"dropout", "prototypes", "center", "logits", "wider_dtype"}
)

#: CAPABILITIES[operator][backend]
CAPABILITIES: dict[str, dict[str, Capability]] = {
    "flash_attention": {"cpu": Capability((F32, BF16, F16), _ATTENTION, (1, 256, 1))},
    "flash_attention_varlen": {"cpu": Capability((F32, BF16, F16), _VARLEN, (1, 256, 1))},
    "rope_attention": {"cpu": Capability((F32, BF16, F16), _ATTENTION, (1, 256, 1))},
    "decomposed_attention": {"cpu": Capability((F32, BF16, F16), frozenset({"grad", "lse", "lse_grad"}), (1, 256, 1))},
    "attention_map": {"cpu": Capability((F32, BF16, F16), frozenset({"bias", "bool_mask", "gqa"}), (1, 256, 1))},
    "window_attention": {"cpu": Capability((F32, BF16, F16), _WINDOW)},
    "patch_embed": {"cpu": Capability((F32, BF16, F16), _PATCH)},
    "layer_norm": {"cpu": Capability((F32, BF16, F16))},
    "rms_norm": {"cpu": Capability((F32, BF16, F16))},
    "linear": {"cpu": Capability((F32, BF16, F16), pure=True)},
    "mlp": {"cpu": Capability((F32, BF16, F16), pure=True)},
    "gated_mlp": {"cpu": Capability((F32, BF16, F16), pure=True)},
}
_TILED = Capability((F32, BF16, F16, F64), frozenset({"grad", "group", "prototypes", "center", "logits"}), pure=True)
for _loss in ("info_nce", "nt_xent", "sigmoid_contrastive", "distillation_cross_entropy", "nearest_neighbor"):
    CAPABILITIES[_loss] = {"cuda": _TILED, "cpu": _TILED}
for _op in ("window_attention", "patch_embed"):
    CAPABILITIES.setdefault(_op, {})
# 16-byte rows and the head dimensions that the tile widths cover; dropout is refused.
CAPABILITIES["flash_attention"]["cuda"] = Capability((F32, F16, BF16), _ATTENTION, (8, 128, 8))
CAPABILITIES["flash_attention_varlen"]["cuda"] = Capability((F32, F16, BF16), _VARLEN, (8, 128, 8))
CAPABILITIES["window_attention"]["cuda"] = Capability((F32, F16, BF16), _WINDOW, (8, 64, 8))
CAPABILITIES["patch_embed"]["cuda"] = Capability((F32, F16, BF16), _PATCH)
# Blocks cover any head dimension; the bound is what has been compiled and checked.
_TRITON = (F32, F16, BF16)
CAPABILITIES["flash_attention"]["triton"] = Capability(_TRITON, _ATTENTION | {"dropout"}, (1, 256, 1))
CAPABILITIES["flash_attention_varlen"]["triton"] = Capability(_TRITON, _VARLEN, (1, 256, 1))
CAPABILITIES["attention_map"]["triton"] = Capability(_TRITON, frozenset({"bias", "bool_mask", "gqa"}), (1, 256, 1))
CAPABILITIES["window_attention"]["triton"] = Capability(_TRITON, _WINDOW | {"dropout"}, (1, 128, 1))
CAPABILITIES["patch_embed"]["triton"] = Capability(_TRITON, _PATCH)
for _loss in ("info_nce", "nt_xent", "sigmoid_contrastive"):
    CAPABILITIES[_loss]["triton"] = Capability(_TRITON, frozenset({"grad"}))
CAPABILITIES["distillation_cross_entropy"]["triton"] = Capability(_TRITON, frozenset({"grad", "prototypes", "center"}))
#: Operators that pyvit has CPU kernels for and no others. They are operators of PyTorch, or made of them and of others
#: that serve every device; a GPU backend that was chosen for all operators (:class:`pyvit.use_backend`) leaves them
#: with the backend "torch".
CPU_ONLY = frozenset({"layer_norm", "rms_norm", "linear", "mlp", "gated_mlp", "rope_attention", "decomposed_attention"})
# PyTorch's kernels where they compute the same. Attention's return no log-sum-exp, draw dropout from other random
# numbers, and give NaN for some rows that a mask empties.
CAPABILITIES["flash_attention"]["torch"] = Capability((F32, F16, BF16), frozenset({"causal", "gqa", "grad"}))
CAPABILITIES["patch_embed"]["torch"] = Capability(
    (F32, F16, BF16), frozenset({"overlap", "pos_embed", "prefix", "grad", "images_grad"})
)
for _op in CPU_ONLY:
    CAPABILITIES[_op]["torch"] = Capability(
        (F64, F32, F16, BF16), _ATTENTION if _op in ("rope_attention", "decomposed_attention") else frozenset()
    )
for _table in CAPABILITIES.values():
    _table["reference"] = _REFERENCE


def preference(op: str) -> list[str]:
    """Backends in the order in which dispatch asks them for ``op`` where :mod:`pyvit.dispatch.choice` says nothing.

    A kernel comes before a tile loop in Python, which multiplies float32 copies of its tiles and launches several
    kernels for each: that much needs no measurement. Triton's kernels come before CUDA's because they serve more calls.
    """

    def rank(backend: str) -> tuple[bool, bool, bool, bool]:
        capability = CAPABILITIES[op].get(backend)
        pure = capability is not None and capability.pure
        return backend == "reference", backend == "torch", pure, backend == "cuda"

    return sorted(BACKENDS, key=rank)


def absent(op: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of ``device`` on this machine, None where it can; does not look at
    the GPUs (:func:`pyvit.dispatch.devices.refused` does)."""
    capability = CAPABILITIES[op].get(backend)
    if capability is not None and capability.pure:
        return None if backend == device else f"runs on {backend} tensors, got {device}"
    if backend in PLAIN:  # every device of PyTorch's: MPS, XPU, ...
        return None
    return MISSING[backend, device] if (backend, device) in MISSING else _missing(backend, device)
