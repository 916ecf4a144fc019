"""Dispatcher schemas of every pyvit operator: the one place they are written.

``setup.py`` turns SCHEMAS into ``schemas.inc``, so that the compiled library defines the operators by itself (a C++
program needs no Python); without the library, :mod:`pyvit.library` defines them from here. The module imports nothing,
so that the build can read it.

``backend`` is ``"auto"`` or a name from :data:`pyvit.dispatch.capabilities.BACKENDS`; it is part of the schema because
gradients run in other threads and compiled graphs outlive the context that chose it. ``seed`` (1,) int64 seeds dropout,
see :func:`pyvit.ops.reference.dropout_keep`.

The arguments and outputs of ``<name>_backward`` are named after those of ``<name>``, and
:class:`pyvit.dispatch.Gradient` reads the names: ``grad_<output>``, ``<output>``, ``<argument>_grad`` (whether that
gradient is wanted), the forward's arguments; and ``grad_<argument>``. Gradients that are not wanted are empty tensors.
"""

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, bool is_causal, float scale, float dropout_p, Tensor? "
    "seed, str backend"
)
_VARLEN = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "Tensor? bias, bool is_causal, float scale, str backend"
)
_ROPE = (
    "Tensor q, Tensor k, Tensor v, Tensor? rope, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, "
    "Tensor? cu_seqlens, int max_seqlen, Tensor? bias, str qk_norm, float eps, int num_prefix_tokens, "
    "bool interleaved, bool is_causal, float scale, str backend"
)
_DECOMPOSED = "Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, float scale, str backend"
_WINDOW = (
    "Tensor qkv, int[] window_size, int[] shift_size, int num_heads, Tensor? bias_table, Tensor? logit_scale, "
    "Tensor? pad_qkv, float scale, float dropout_p, Tensor? seed, str backend"
)
_PATCH = (
    "Tensor images, Tensor weight, Tensor? bias, int[] stride, Tensor? pos_embed, Tensor? prefix, Tensor? keep, "
    "Tensor? mean, Tensor? std, str backend"
)

SCHEMAS = {
    # out (B, H, Nq, Dv), stored as (B, Nq, H, Dv) so that merging the heads is free; lse (B, H, Nq) float32, natural
    # logarithm.
    "flash_attention": f"({_ATTENTION}) -> (Tensor out, Tensor lse)",
    "flash_attention_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, {_ATTENTION}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)"
    ),
    # Packed sequences: q (Tq, H, D), out (Tq, H, Dv), lse (H, Tq).
    "flash_attention_varlen": f"({_VARLEN}) -> (Tensor out, Tensor lse)",
    "flash_attention_varlen_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, {_VARLEN}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)"
    ),
    # q and k normalised ("none", "layer", "rms") and rotated by rope (B or 1, H or 1, N less the prefix tokens, 2, R);
    # then as flash_attention, or with cu_seqlens as flash_attention_varlen.
    "rope_attention": f"({_ROPE}) -> (Tensor out, Tensor lse)",
    "rope_attention_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool rope_grad, bool bias_grad, {_ROPE}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_rope, Tensor grad_q_weight, Tensor grad_q_bias, "
        "Tensor grad_k_weight, Tensor grad_k_bias, Tensor grad_bias)"
    ),
    # rel_h (B, H, Nq, rows of the grid of keys), rel_w (B, H, Nq, columns); the rest as flash_attention.
    "decomposed_attention": f"({_DECOMPOSED}) -> (Tensor out, Tensor lse)",
    "decomposed_attention_backward": (
        f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_DECOMPOSED}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_rel_h, Tensor grad_rel_w)"
    ),
    # rows (B, R) int64 -> probabilities (B, H, R, Nk).
    "attention_map": "(Tensor q, Tensor k, Tensor rows, Tensor? bias, float scale, str backend) -> Tensor",
    # qkv (B, H, W, 3C) -> out (B, H, W, C), lse (B, windows, heads, window area) float32.
    "window_attention": f"({_WINDOW}) -> (Tensor out, Tensor lse)",
    "window_attention_backward": (
        f"(Tensor grad_out, Tensor out, Tensor lse, {_WINDOW}) "
        "-> (Tensor grad_qkv, Tensor grad_bias_table, Tensor grad_logit_scale, Tensor grad_pad_qkv)"
    ),
    # images (B, C, H, W) -> (B, P + K, D).
    "patch_embed": f"({_PATCH}) -> Tensor",
    "patch_embed_backward": (
        f"(Tensor grad_out, bool images_grad, bool weight_grad, {_PATCH}) "
        "-> (Tensor grad_images, Tensor grad_weight, Tensor grad_bias, Tensor grad_pos_embed, Tensor grad_prefix)"
    ),
}

_DISTILL = (
    "Tensor student, Tensor teacher, Tensor? student_prototypes, Tensor? teacher_prototypes, Tensor? center, "
    "Tensor weights, "
    "float student_temp, float teacher_temp, str backend"
)

_LAYER_NORM = "Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType dtype, str backend"
_RMS_NORM = "Tensor x, Tensor? weight, float eps, ScalarType dtype, str backend"

#: Operators whose kernels are Python functions: tile loops over the vendor's matrix product, or calls of the library's
#: passes. They are always defined from here, library or not. Losses, log-sum-exps and statistics are float32 (float64
#: for float64).
PYTHON_SCHEMAS = {
    # a, b (N, D), scale () -> loss (), lse over b for each a (N,), over a for each b (N,).
    "info_nce": "(Tensor a, Tensor b, Tensor scale, str backend) -> (Tensor loss, Tensor lse_a, Tensor lse_b)",
    "info_nce_backward": (
        "(Tensor grad_loss, Tensor lse_a, Tensor lse_b, Tensor a, Tensor b, Tensor scale, str backend) "
        "-> (Tensor grad_a, Tensor grad_b, Tensor grad_scale)"
    ),
    # z1, z2 (N, D), temperature () -> loss (), lse (2N,).
    "nt_xent": "(Tensor z1, Tensor z2, Tensor temperature, str backend) -> (Tensor loss, Tensor lse)",
    "nt_xent_backward": (
        "(Tensor grad_loss, Tensor lse, Tensor z1, Tensor z2, Tensor temperature, str backend) "
        "-> (Tensor grad_z1, Tensor grad_z2, Tensor grad_temperature)"
    ),
    # a, b (N, D), scale (), bias () -> loss ().
    "sigmoid_contrastive": "(Tensor a, Tensor b, Tensor scale, Tensor bias, str backend) -> Tensor loss",
    "sigmoid_contrastive_backward": (
        "(Tensor grad_loss, Tensor a, Tensor b, Tensor scale, Tensor bias, str backend) "
        "-> (Tensor grad_a, Tensor grad_b, Tensor grad_scale, Tensor grad_bias)"
    ),
    # student (S, N, C), teacher (T, N, C), prototypes (K, C) or None for C = K, center (K,), weights (S, T, N)
    # -> loss (), lse (S, N), lse (T, N).
    "distillation_cross_entropy": f"({_DISTILL}) -> (Tensor loss, Tensor lse_student, Tensor lse_teacher)",
    "distillation_cross_entropy_backward": (
        f"(Tensor grad_loss, Tensor lse_student, Tensor lse_teacher, {_DISTILL}) "
        "-> (Tensor grad_student, Tensor grad_student_prototypes)"
    ),
    # x (..., K), weight (M, K), bias (M,) -> (..., M).
    "linear": "(Tensor x, Tensor weight, Tensor? bias, str? activation, str backend) -> Tensor",
    # x (..., K), fc1_weight (H, K), fc2_weight (M, H) -> (..., M).
    "mlp": (
        "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str activation, "
        "str backend) -> Tensor"
    ),
    # x (..., K), fc1_weight (2 H, K), or (H, K) beside gate_weight (H, K); fc2_weight (M, H) -> (..., M). hidden_norm:
    # 0 for none, 1 for layer norm, 2 for RMS norm.
    "gated_mlp": (
        "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor? gate_weight, Tensor? gate_bias, Tensor fc2_weight, "
        "Tensor? fc2_bias, int hidden_norm, Tensor? norm_weight, Tensor? norm_bias, float eps, bool gate_last, "
        "str activation, str backend) -> Tensor"
    ),
    # x (..., C) -> out (..., C), means and reciprocal deviations (2, rows).
    "layer_norm": f"({_LAYER_NORM}) -> (Tensor out, Tensor statistics)",
    "layer_norm_backward": (
        f"(Tensor grad_out, Tensor statistics, bool weight_grad, bool bias_grad, {_LAYER_NORM}) "
        "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
    # x (..., C) -> out (..., C), reciprocal root mean squares (1, rows).
    "rms_norm": f"({_RMS_NORM}) -> (Tensor out, Tensor rstd)",
    "rms_norm_backward": (
        f"(Tensor grad_out, Tensor rstd, bool weight_grad, {_RMS_NORM}) -> (Tensor grad_x, Tensor grad_weight)"
    ),
    # x (N, D) -> index of the row with the largest inner product, itself left out, (N,) int64.
    "nearest_neighbor": "(Tensor x, str backend) -> Tensor",
}
