"""Finding attention modules without a rule: by what they compute, or by their name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import nn

from pyvit.integrations.forwards import Left
from pyvit.integrations.originals import Code

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_WHOLE = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "memory_efficient_attention",
    "flex_attention",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_qkvpacked_func",
    "get_interface",  # transformers' choice of one of these
}


def unknown_attention(model: nn.Module, handled: Iterable[nn.Module]) -> list[tuple[str, Left]]:
    """Attention modules of ``model`` that are neither ``handled`` nor part of a handled module."""
    found: list[tuple[str, Left]] = []
    computing: dict[type, bool] = {}
    attending = {id(part) for module in handled for part in module.modules()}
    covered = set(attending)
    for path, module in reversed(list(model.named_modules())):  # submodules first
        if id(module) in covered or type(module).__module__.startswith("pyvit."):
            continue
        if type(module) not in computing:
            computing[type(module)] = computes_attention(module)
        own = any(True for _ in itertools.chain(module.parameters(recurse=False), module.children()))
        named = (
            "attention" in type(module).__name__.lower()
            and own
            and not any(id(m) in attending for m in module.modules())
        )
        if computing[type(module)] or named:
            attending.add(id(module))
            found.append((path, Left(module, "not a class that pyvit knows")))
    return found[::-1]


def computes_attention(module: nn.Module) -> bool:
    """Whether the code of a module's class, or of a base class, applies a softmax and matrix products."""
    for ancestor in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        if issubclass(ancestor, nn.Module):
            reads = Code(ancestor).reads
            softmax = "softmax" in reads or any(
                isinstance(child, nn.Softmax) and name in reads for name, child in module.named_children()
            )
            if _WHOLE & reads or (softmax and _PRODUCTS & reads):
                return True
    return False
