"""pyvit's operators: drop-in PyTorch functions, each documented in its own module."""

from pyvit import dispatch, library

library.define_operators()

from pyvit.ops.attention_map import attention_map  # noqa: E402
from pyvit.ops.decomposed_attention import decomposed_attention  # noqa: E402
from pyvit.ops.distillation_cross_entropy import distillation_cross_entropy  # noqa: E402
from pyvit.ops.flash_attention import flash_attention  # noqa: E402
from pyvit.ops.flash_attention_qkvpacked import flash_attention_qkvpacked  # noqa: E402
from pyvit.ops.flash_attention_varlen import flash_attention_varlen  # noqa: E402
from pyvit.ops.gated_mlp import gated_mlp  # noqa: E402
from pyvit.ops.info_nce import info_nce  # noqa: E402
from pyvit.ops.koleo import koleo  # noqa: E402
from pyvit.ops.layer_norm import layer_norm  # noqa: E402
from pyvit.ops.linear import linear  # noqa: E402
from pyvit.ops.mlp import mlp  # noqa: E402
from pyvit.ops.nt_xent import nt_xent  # noqa: E402
from pyvit.ops.patch_embed import patch_embed  # noqa: E402
from pyvit.ops.rms_norm import rms_norm  # noqa: E402
from pyvit.ops.rope_attention import rope_attention  # noqa: E402
from pyvit.ops.scaled_dot_product_attention import scaled_dot_product_attention  # noqa: E402
from pyvit.ops.sigmoid_contrastive import sigmoid_contrastive  # noqa: E402
from pyvit.ops.sinkhorn_knopp import sinkhorn_center, sinkhorn_knopp  # noqa: E402
from pyvit.ops.window_attention import window_attention  # noqa: E402

__all__ = [
    "attention_map",
    "decomposed_attention",
    "distillation_cross_entropy",
    "flash_attention",
    "flash_attention_qkvpacked",
    "flash_attention_varlen",
    "gated_mlp",
    "info_nce",
    "koleo",
    "layer_norm",
    "linear",
    "mlp",
    "nt_xent",
    "patch_embed",
    "rms_norm",
    "rope_attention",
    "scaled_dot_product_attention",
    "sigmoid_contrastive",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "window_attention",
]


@dispatch.before_modes
def _register_flops() -> None:
    """Counters of flops learn pyvit's operators when they first see one: their module is slow to import."""
    from pyvit.ops import flops

    flops.register()
