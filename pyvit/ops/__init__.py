"""pyvit's operators: drop-in PyTorch functions, each documented in its own module."""

from pyvit import library

library.define_operators()

from pyvit.ops.attention_map import attention_map  # noqa: E402
from pyvit.ops.flash_attention import flash_attention, flash_attention_varlen, scaled_dot_product_attention  # noqa: E402
from pyvit.ops.linear import linear  # noqa: E402
from pyvit.ops.patch_embed import patch_embed  # noqa: E402
from pyvit.ops.window_attention import window_attention  # noqa: E402

__all__ = [
    "attention_map",
    "flash_attention",
    "flash_attention_varlen",
    "linear",
    "patch_embed",
    "scaled_dot_product_attention",
    "window_attention",
]
