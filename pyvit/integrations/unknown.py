"""Attention that no rule knows: found by what it computes, or else by its name."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn

from pyvit.integrations.forwards import Left, kind
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


def unknown_attention(model: nn.Module, handled: set[int], known: Callable[[str], bool]) -> list[tuple[str, Left]]:
    """Modules of ``model`` that are attention, of no class that is ``known``, with none of ``handled`` in them to have been it."""
    found: list[tuple[str, Left]] = []
    computing: dict[type, bool] = {}
    attending: set[int] = set(handled)
    for path, module in reversed(list(model.named_modules())):  # what is inside comes first
        name = kind(module)
        if id(module) in handled or name.startswith("pyvit.") or known(name):
            continue
        if type(module) not in computing:
            computing[type(module)] = computes_attention(module)
        own = any(True for _ in itertools.chain(module.parameters(recurse=False), module.children()))
        named = "attention" in type(module).__name__.lower() and own and not any(id(m) in attending for m in module.modules())
        if computing[type(module)] or named:
            attending.add(id(module))
            found.append((path, Left(module, "not a class that pyvit knows")))
    return found[::-1]


def computes_attention(module: nn.Module) -> bool:
    """Whether the code of a module's class, or of one that it derives from, weighs something by a softmax over products."""
    for ancestor in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        if issubclass(ancestor, nn.Module):
            reads = Code(ancestor).reads
            softmax = "softmax" in reads or any(isinstance(child, nn.Softmax) and name in reads for name, child in module.named_children())
            if _WHOLE & reads or (softmax and _PRODUCTS & reads):
                return True
    return False
