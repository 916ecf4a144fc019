"""``F.scaled_dot_product_attention`` on pyvit's kernels, for every caller in the process: :func:`activate_sdpa`.

PyTorch's function calls one of several operators of the dispatcher. While it is activated, these are pyvit's:

- on a CPU ``_scaled_dot_product_flash_attention_for_cpu`` and its backward, for nearly all calls:
  csrc/torch/sdpa_override.cpp;
- on a CPU ``_scaled_dot_product_attention_math``, for calls that PyTorch's fused kernel does not serve: :func:`_math`;
- on a GPU ``_scaled_dot_product_flash_attention`` and its backward, where pyvit's kernels were measured faster:
  :class:`_Cuda`, through the registry of implementations in ``torch.nn.attention``.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvit import dispatch, library, torch_private
from pyvit.dispatch import Call, choice, devices
from pyvit.integrations.forwards import servable
from pyvit.ops import checks
from pyvit.ops.flash_attention import ATTENTION, ATTENTION_BACKWARD, asked
from pyvit.ops.scaled_dot_product_attention import scaled_dot_product_attention

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_lock = threading.RLock()

#: PyTorch's own kernel of an operator, which calls that pyvit's do not serve go to; None if torch does not tell.
_get_kernel: Any = getattr(torch.library, "get_kernel", None)


class Calls(NamedTuple):
    """Calls since the process began: ``served`` by pyvit's kernels, ``left`` to PyTorch's while activated."""

    served: int
    left: int


class Activation:
    """Result of :func:`activate_sdpa`; ``print`` it. As a context manager it restores PyTorch's kernels at the end."""

    def __init__(self) -> None:
        #: Device type -> what pyvit's kernels serve there, or why they serve nothing.
        self.devices: dict[str, str] = {}

    def restore(self) -> None:
        """Undo this activation. PyTorch's kernels serve again once every activation is undone."""
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _installed.close()

    @property
    def calls(self) -> Calls:
        return sdpa_calls()

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"  {device:<5} {what}" for device, what in self.devices.items()]
        state = "active" if self in _active else "restored"
        return "\n".join(
            [
                f"scaled_dot_product_attention ({state}): {self.calls.served} calls served, {self.calls.left} left",
                *lines,
            ]
        )

    __repr__ = __str__


_active: list[Activation] = []
_installed = contextlib.ExitStack()
_what: dict[str, str] = {}


def activate_sdpa() -> Activation:
    """Make ``F.scaled_dot_product_attention`` run on pyvit's kernels, for every caller in the process and in every
    thread, in eager mode and in graphs of ``torch.compile``, compiled before or after.

    Models are not touched. Calls that pyvit's kernels do not serve (float64, dropout, nested tensors, tensor
    subclasses), calls for which PyTorch's kernels are known to be faster (:func:`pyvit.explain`), and all calls under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`` go to PyTorch's kernels as before, bit for bit.

    Returns an :class:`Activation`, which names what is served per device. Undo it by its ``restore()``, at the end of
    ``with pyvit.activate_sdpa():``, or with all others by :func:`restore_sdpa`. Activations nest: PyTorch's kernels
    serve again when the last is undone.
    """
    with _lock:
        if not _active:
            _what.clear()
            with contextlib.ExitStack() as stack:  # undone if one of them fails
                _what["cpu"] = _install_cpu(stack)
                _what["cuda"] = _install_cuda(stack)
                _installed.push(stack.pop_all())
        found = Activation()
        found.devices = dict(_what)
        _active.append(found)
        return found


def restore_sdpa() -> None:
    """Undo every :func:`activate_sdpa`: ``F.scaled_dot_product_attention`` runs PyTorch's kernels again."""
    with _lock:
        _active.clear()
        _installed.close()


def sdpa_calls() -> Calls:
    """How many calls of PyTorch's attention operators were served by pyvit's kernels, and how many left to PyTorch."""
    served, left = _counts
    if library.problem() is None:
        more = torch.ops.pyvit.sdpa_calls()
        served, left = served + more[0], left + more[1]
    return Calls(served, left)


_counts = [0, 0]  # served, left; by Python functions of this module


def _count(served: bool) -> None:
    with _lock:
        _counts[not served] += 1


def _override(op: Any, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False) -> Any:
    """Register ``kernel`` for ``op`` of aten until the result is collected, without PyTorch's warning about it."""
    found = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        found.impl(op, kernel, key, with_keyset=with_keyset, allow_override=True)
    return found


# CPU


def _install_cpu(stack: contextlib.ExitStack) -> str:
    if (problem := library.problem()) is not None:
        return f"left to PyTorch: {problem}"
    refused = {dtype: why for dtype in _DTYPES if (why := _refusal(dtype)) is not None}
    if len(refused) == len(_DTYPES):
        return f"left to PyTorch: {next(iter(refused.values()))}"
    if torch_private.attention_math is not None:
        # The second takes the warning that C++ would print for the operator below.
        libraries = [_override(torch_private.attention_math, _math, "AutogradCPU") for _ in range(2)]
        stack.callback(libraries.clear)
    if not torch.ops.pyvit.override_sdpa(*(dtype not in refused for dtype in _DTYPES)):
        stack.close()
        return "left to PyTorch: this torch does not have the C interface of its attention kernels"
    stack.callback(torch.ops.pyvit.override_sdpa, False, False, False)
    text = ", ".join(_name(dtype) for dtype in _DTYPES if dtype not in refused)
    return text + "".join(f"; {_name(dtype)} left to PyTorch: {why}" for dtype, why in refused.items())


def _refusal(dtype: torch.dtype) -> str | None:
    """Why CPU calls of ``dtype`` go to PyTorch, None if pyvit's kernels serve them."""
    if (wanted := dispatch.requested_backend()) not in (None, "cpu"):
        return f"backend {wanted!r} is chosen"
    for features in ((), ("grad",)):
        call = Call("flash_attention", "cpu", dtype, features, (64,))
        if refused := dispatch.reasons(call, "cpu"):
            return "; ".join(refused)
        if dispatch.select(call) != "cpu":
            first = choice.first(*call[:4], (), ("cpu", "torch"))
            return "its kernels come first" if first is None else first.why
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _NotComputed(Tensor):
    """The attention weights that ``_scaled_dot_product_attention_math`` also returns and that
    ``F.scaled_dot_product_attention`` drops."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            "pyvit.activate_sdpa: pyvit's kernels do not compute the attention weights of "
            "torch._scaled_dot_product_attention_math; call it outside of the activation, or pyvit.ops.attention_map"
        )


_WEIGHTS = Tensor._make_subclass(_NotComputed, torch.empty(0))  # type: ignore[attr-defined]


def _math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``_scaled_dot_product_attention_math`` on CPU tensors: masks that are learned, any number of leading dimensions,
    values of another width."""
    if dropout_p == 0 and dropout_mask is None and _served_instead(query, key, value, attn_mask, is_causal):
        try:
            out = scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **options)
        except (ValueError, TypeError):
            pass  # PyTorch's error, below
        else:
            _count(True)
            return out, _WEIGHTS
    _count(False)
    return torch_private.attention_math.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, dropout_mask, **options
    )


def _served_instead(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether pyvit's kernels serve a call that PyTorch's fused kernel did not.

    Graphs are left as PyTorch traces them, since the compiler's caches outlive the process.
    """
    if (
        torch_private.dispatch_modes()
        or torch_private.transforms_active()
        or torch_private.forward_mode()
        or torch.jit.is_tracing()
        or not torch.backends.cuda.flash_sdp_enabled()  # sdpa_kernel chose the formula; the flag is for CPUs too
    ):
        return False
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not all(servable(t) and t.numel() for t in tensors) or (is_causal and mask is not None):
        return False
    if _fused(query, key, value) and (mask is None or not mask.requires_grad):
        return False  # whoever called it wants the formula
    features = asked(
        query, key, value, mask, is_causal, 0.0, query.dim() > 2 and query.shape[-3] != key.shape[-3], False
    )
    dims = (query.shape[-1], value.shape[-1])
    call = Call("flash_attention", "cpu", query.dtype, features, dims)
    wanted = dispatch.requested_backend()
    return wanted in (None, "cpu") and not dispatch.reasons(call, "cpu") and dispatch.select(call) == "cpu"


def _fused(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's fused CPU kernel serves tensors of these shapes."""
    tensors = (query, key, value)
    return (
        all(t.dim() == 4 and t.stride(-1) == 1 for t in tensors)
        and len({t.shape[0] for t in tensors}) == len({t.shape[-1] for t in tensors}) == 1
        and key.shape[1] == value.shape[1]
    )


# GPUs


def _install_cuda(stack: contextlib.ExitStack) -> str:
    if not (torch.version.cuda or torch.version.hip):
        return "left to PyTorch: this torch is built for CPUs"
    if (why := _gpu_refusal()) is not None:
        return f"left to PyTorch: {why}"
    from torch.nn import attention

    if not hasattr(attention, "restore_flash_attention_impl"):  # torch 2.10, whose registry undoes nothing
        stack.callback(_Cuda().remove)
    else:
        before = attention.current_flash_attention_impl()
        attention.register_flash_attention_impl("pyvit", register_fn=_Cuda)
        attention.activate_flash_attention_impl("pyvit")
        stack.callback(_restore_implementation, before)
    return "calls without a mask or dropout for which pyvit.explain names a kernel of pyvit's"


def _restore_implementation(before: str | None) -> None:
    from torch.nn import attention

    if attention.current_flash_attention_impl() != "pyvit":  # someone has activated another since
        return
    if before is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(before)


def _gpu_refusal() -> str | None:
    """Why GPU calls go to PyTorch, None if some are served by pyvit's kernels."""
    if _get_kernel is None:
        return "this torch does not tell its own kernels (torch.library.get_kernel)"
    if not devices.present():
        return "there is no GPU"
    if dispatch.requested_backend() in ("cuda", "triton"):
        return None
    gpu = choice.current_gpu()
    faster = [
        row
        for row in choice.MEASURED
        if (row.gpu, row.op) == (gpu, "flash_attention")
        and not row.torch <= min(row.cuda, row.triton)
        and choice.stale(row) is None
    ]
    return None if faster else "its kernels come first where pyvit's present ones have not been measured"


def _gpu_backend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, backward: bool) -> str | None:
    """The backend of pyvit's that comes first for a call, None if PyTorch's does."""
    if query.dim() != 4 or query.dtype not in _DTYPES or not query.numel() or not key.numel():
        return None
    (b, h, nq, d), (hk, nk), dv = query.shape, key.shape[1:3], value.shape[3]
    features = asked(query, key, value, None, is_causal, 0.0, hk != h, False)
    if backward and "grad" not in features:
        features = (*features, "grad")
    sizes = dispatch.sizes("cuda", b, h, hk, nq, nk, max(d, dv))
    call = Call("flash_attention", "cuda", query.dtype, features, (d,) if d == dv else (d, dv), sizes)
    wanted = dispatch.requested_backend()
    if wanted is not None and dispatch.reasons(call, wanted):
        return None
    chosen = dispatch.select(call)
    return chosen if chosen in ("cuda", "triton") else None


class _Cuda:
    """pyvit's kernels for the fused attention of CUDA tensors, until :meth:`remove`."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        forward, backward = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward
        self._forward, self._backward = (_get_kernel(op.default, "CUDA") for op in (forward, backward))
        self._libraries = [
            _override(forward.default, self.forward, "CUDA", with_keyset=True),
            _override(backward.default, self.backward, "CUDA", with_keyset=True),
        ]

    def remove(self) -> None:
        self._libraries.clear()

    def forward(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        backend = None if dropout_p or return_debug_mask else _gpu_backend(query, key, value, is_causal, False)
        _count(backend is not None)
        if backend is not None:
            return flash_forward(backend, query, key, value, is_causal, scale)
        return self._forward.call_boxed(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)

    def backward(
        self,
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        backend = None if dropout_p or cum_seq_q is not None else _gpu_backend(query, key, value, is_causal, True)
        if backend is not None:
            return flash_backward(backend, grad_out, query, key, value, out, logsumexp, is_causal, scale)
        lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
        return self._backward.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, *lengths, dropout_p, is_causal, philox_seed,
            philox_offset, scale=scale,
        )  # fmt: skip


def flash_forward(
    backend: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Any, ...]:
    """The nine outputs of ``_scaled_dot_product_flash_attention``, of which out (B, H, Nq, D) and logsumexp (B, H, Nq)
    matter without dropout."""
    scale = checks.scale("flash_attention", scale, query.shape[3])
    given = (query, key, value, None, is_causal, scale, 0.0, None, backend)
    found, lse = ATTENTION.kernel(backend)(*given)
    out = torch.empty_like(query)  # torch.compile relies on these strides
    out = found if found.stride() == out.stride() else out.copy_(found)
    # Seed and offset of dropout's random numbers, as meta kernels have them.
    old = bool(torch.version.hip)
    dtype = torch.int64 if old else torch.uint64
    seed = torch.zeros(() if old else (2,), dtype=dtype, device=query.device)
    offset, debug_mask = torch.zeros((), dtype=dtype, device=query.device), query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, debug_mask


def flash_backward(
    backend: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, with their strides."""
    scale = checks.scale("flash_attention", scale, query.shape[3])
    given = (grad_out, None, out, logsumexp, False, query, key, value, None, is_causal, scale, 0.0, None, backend)
    grads = ATTENTION_BACKWARD.kernel(backend)(*given)
    wanted = [torch.empty_like(t) for t in (query, key, value)]
    found = [g if g.stride() == w.stride() else w.copy_(g) for g, w in zip(grads, wanted, strict=False)]
    return found[0], found[1], found[2]
