"""Whether something watches a call's operations, for operators that would hide them from it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvit import torch_private

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def traced(*tensors: Tensor | None) -> bool:
    """Whether something does: a compiler, ``torch.jit.trace``, a functorch transform, a dispatch mode (flop counters),
    dual numbers."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, tensors))
        or torch_private.transforms_active()
        or torch_private.dispatch_modes() > 0
        or torch.jit.is_tracing()
        or torch_private.forward_mode()
    )


def transformed(grad: Tensor) -> bool:
    """Whether a backward may not take ``grad`` to a kernel: as :func:`traced`, or because it is several in one
    (``is_grads_batched``)."""
    return traced(grad) or torch_private.is_batched(grad)


def compiled_inference(*tensors: Tensor | None) -> bool:
    """Whether ``torch.compile`` traces a call without gradients or transforms. Inductor's own products on a CPU take up
    to 1.2x as long."""
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.is_grad_enabled()
        and not torch_private.exporting()
        and not torch_private.transforms_active()
        and all(type(t) in _PLAIN for t in tensors)
    )
