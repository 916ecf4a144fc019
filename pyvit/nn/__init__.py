"""Modules on pyvit's operators, with timm's parameter names."""

from pyvit.nn.attention import Attention, Packing, rotate
from pyvit.nn.block import Block
from pyvit.nn.layer_norm import LayerNorm
from pyvit.nn.linear import Linear
from pyvit.nn.mlp import GatedMlp, Mlp, SwiGLU, swiglu_hidden
from pyvit.nn.patch_embed import PatchEmbed
from pyvit.nn.pool import AttentionPool
from pyvit.nn.position import RotaryEmbedding, resample_positions, sincos_2d
from pyvit.nn.quantized import QuantizedLinear
from pyvit.nn.residual import DropPath, LayerScale
from pyvit.nn.rms_norm import RMSNorm
from pyvit.nn.token_merging import TokenMerging
from pyvit.nn.weight_init import init_linears
from pyvit.nn.window_attention import WindowAttention, WindowAttentionV2

__all__ = [
    "Attention",
    "AttentionPool",
    "Block",
    "DropPath",
    "GatedMlp",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "Packing",
    "PatchEmbed",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "SwiGLU",
    "TokenMerging",
    "WindowAttention",
    "WindowAttentionV2",
    "init_linears",
    "resample_positions",
    "rotate",
    "sincos_2d",
    "swiglu_hidden",
]
