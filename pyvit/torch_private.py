"""All private names of torch that pyvit uses, each with a fallback if a release of torch does not have it.

A fallback gives the same results more slowly, so that a rename in torch costs speed but breaks nothing.
``PYVIT_TORCH_PRIVATE=0`` uses the fallbacks everywhere. :func:`missing` lists the private names that this torch lacks;
``pyvit info`` shows them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_missing: list[str] = []


def _find(path: str) -> Any:
    """The object at ``path`` (``module:name``), or None."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        _missing.append(path)
        return None
    return None if os.environ.get("PYVIT_TORCH_PRIVATE") == "0" else found


def missing() -> list[str]:
    """The private names that this torch lacks."""
    return list(_missing)


def _or(path: str, stand_in: Any) -> Any:
    found = _find(path)
    return stand_in if found is None else found


#: Number of active torch dispatch modes. Fallback: 1, so that calls go through the dispatcher, which calls all modes.
dispatch_modes: Callable[[], int] = _or("torch._C:_len_torch_dispatch_stack", lambda: 1)

#: The active dispatch modes, innermost last.
dispatch_mode_stack: Callable[[], Sequence[Any]] = _or(
    "torch.utils._python_dispatch:_get_current_dispatch_mode_stack", lambda: ()
)

#: A context without dispatch modes.
without_modes: Callable[[], Any] = _or("torch.utils._python_dispatch:_disable_current_modes", contextlib.nullcontext)

#: Whether a transform of torch.func is active. Fallback: True, because that form of an operator also works without one.
transforms_active: Callable[[], bool] = _or("torch._C:_are_functorch_transforms_active", lambda: True)

#: A context in which operators skip the dispatcher's autograd layer.
below_autograd: Callable[[], Any] = _or("torch._C:_AutoDispatchBelowAutograd", contextlib.nullcontext)

#: ``(tensors, others, weight)``: linear interpolation of tensors towards others, in place.
lerp_all: Callable[[list[Tensor], list[Tensor], float], Any] = _or(
    "torch:_foreach_lerp_",
    lambda tensors, others, weight: [a.lerp_(b, weight) for a, b in zip(tensors, others, strict=True)],
)

#: Number of tensors that share an untyped storage; None if torch does not tell.
storage_uses: Callable[[int], int] | None = _find("torch._C:_storage_Use_Count")

#: The class of fake tensors.
FAKE_TENSORS: Any = _or("torch._subclasses.fake_tensor:FakeTensor", ())

#: The dictionaries of global module hooks. Fallback: as if there were hooks, so that every module is called.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS: tuple[Any, ...] = tuple(_or(f"torch.nn.modules.module:_global{name}", (True,)) for name in HOOKS)

_mode = _find("torch._C:_get_dispatch_mode")
_tracers = [_find(f"torch._C:_TorchDispatchModeKey.{name}") for name in ("FAKE", "PROXY", "FUNCTIONAL")]


def is_traced() -> bool:
    """Whether tensors may have no values: under FakeTensorMode or make_fx, and while the compiler traces a backward
    formula.
    """
    if dispatch_modes() == 0:
        return False
    if _mode is None or None in _tracers:
        return any(
            type(mode).__name__ in ("FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode")
            for mode in dispatch_mode_stack()
        )
    return any(_mode(key) is not None for key in _tracers)


_exporting = _find("torch.compiler:_is_exporting_flag") is not None


def exporting() -> bool:
    """Whether torch.export traces. While torch.compile traces, torch 2.10 answers yes to the public question too."""
    return bool(torch.compiler._is_exporting_flag if _exporting else torch.compiler.is_exporting())


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active, so that tensors may be dual."""
    return getattr(forward_ad, "_current_level", 0) >= 0


_keys, _dense = _find("torch._C:_dispatch_keys"), _find("torch._C:DispatchKey.Dense")


def is_batched(t: Tensor) -> bool:
    """Whether ``t`` is a batch of tensors, as in ``autograd.grad(is_grads_batched=True)``: it has no memory of
    its own."""
    if _keys is not None and _dense is not None:
        return not _keys(t).has(_dense)
    try:
        t.data_ptr()
    except RuntimeError:
        return True
    return False


@functools.cache
def _autocast_keys(device: str) -> Any:
    keys, key = _find("torch._C:DispatchKeySet"), _find(f"torch._C:DispatchKey.Autocast{device}")
    guard = _find("torch._C:_ExcludeDispatchKeyGuard")
    return None if None in (keys, key, guard) else (guard, keys(key))


def without_autocast_layer(device: str) -> Any:
    """A context in which operators on ``device`` ("CPU", "CUDA") are not cast by the dispatcher."""
    found = _autocast_keys(device)
    return torch.autocast(device.lower(), enabled=False) if found is None else found[0](found[1])


_AUTOGRAD = ("AutogradCPU", "AutogradCUDA", "AutogradMeta", "AutogradOther", "AutogradFunctionality", "ADInplaceOrView")
_force, _included, _excluded = (
    _find(f"torch._C:{name}")
    for name in ("_ForceDispatchKeyGuard", "_dispatch_tls_local_include_set", "_dispatch_tls_local_exclude_set")
)
_layers = [_find(f"torch._C:DispatchKey.{name}") for name in _AUTOGRAD]


@contextlib.contextmanager
def above_autograd() -> Iterator[None]:
    """Enable the dispatcher's autograd layer within :func:`below_autograd`."""
    if None in (_force, _included, _excluded, *_layers):
        yield
        return
    excluded = _excluded()
    for layer in _layers:
        excluded = excluded.remove(layer)
    with _force(_included(), excluded):
        yield


def fake_mode() -> Any:
    """A context that creates tensors without values, or None if this torch has none."""
    found = _find("torch._subclasses.fake_tensor:FakeTensorMode")
    return None if found is None else found()


#: The operator that computes attention by the formula; None if torch has none of this name.
attention_math: Any = _find("torch:ops.aten._scaled_dot_product_attention_math.default")


@functools.cache
def _fsdp_names() -> Any:
    state = _find("torch.distributed.fsdp:FSDPModule._get_fsdp_state")
    return state, _find("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init")


def make_fsdp_root(module: Any) -> None:
    """Make a module that ``fully_shard`` has sharded the root of the sharded modules in it, as its first forward pass
    does.

    Fallback: nothing. Parts of the module must then not be called before the module itself.
    """
    state, initialise = _fsdp_names()
    if None not in (state, initialise):
        initialise(state(module))
