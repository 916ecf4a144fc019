"""Choosing a backend, and registering operators so that every way of calling them runs the same kernels.

A public function in :mod:`pyvit.ops` checks its arguments, describes the call (:class:`Call`), asks :func:`select` for
a backend and calls an :class:`Operator`. The same Operator stands behind ``torch.ops.pyvit.<name>``, so the compiler,
export and C++ callers see no other code.
"""

from pyvit.dispatch.autocast import autocast, no_autocast, without_autocast
from pyvit.dispatch.gradients import formula_gradients, reference_backward
from pyvit.dispatch.operator import Gradient, Operator, before_modes
from pyvit.dispatch.select import (
    BackendError,
    Call,
    Explanation,
    copy_notes,
    describes,
    explain,
    reasons,
    requested_backend,
    select,
    sizes,
    use_backend,
    used_backends,
)

__all__ = [
    "BackendError",
    "Call",
    "Explanation",
    "Gradient",
    "Operator",
    "autocast",
    "before_modes",
    "copy_notes",
    "describes",
    "explain",
    "formula_gradients",
    "no_autocast",
    "reasons",
    "reference_backward",
    "requested_backend",
    "select",
    "sizes",
    "use_backend",
    "used_backends",
    "without_autocast",
]

#: requested_backend(), which use_backend keeps up to date here for linear layers: they look at it in each call.
