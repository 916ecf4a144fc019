"""Small defects of kernels, contracts and formulas, each with the tests that must notice it."""

from __future__ import annotations

from typing import NamedTuple

CPU, TORCH, OPS, NN, TRITON = "csrc/cpu/", "csrc/torch/", "pyvit/ops/", "pyvit/nn/", "triton_kernels/"


class Defect(NamedTuple):
    """``old``, which stands once in ``file``, becomes ``new``. ``tests``: arguments of pytest, those of CPU kernels
    with the default instruction set. ``what`` is wrong then."""

    what: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def interpreted(self) -> bool:
        return self.file.startswith(TRITON)

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


_ATTENTION = "tests/ops/test_flash_attention.py"
_ROPE = "tests/ops/test_rope_attention.py -k 'test_shapes or prefix or packed'"
_DECOMPOSED = "tests/ops/test_decomposed_attention.py"
_WINDOW = "tests/ops/test_window_attention.py"
_PATCH = "tests/ops/test_patch_embed.py"
_INT8 = "tests/ops/test_linear_int8.py"
_NORM = "tests/ops/test_layer_norm.py"
_ON_TRITON = "-k triton"

DEFECTS = (
    # Attention on CPUs
    Defect(
        "earlier output not scaled to the new maximum",
        CPU + "flash_attention.cpp",
        "if (j && factor != 1.f)",
        "if (false && factor != 1.f)",
        _ATTENTION,
    ),
    Defect(
        "a causal query does not see itself",
        CPU + "flash_attention.cpp",
        "std::clamp<int64_t>(i + r + 1 - j, 0, n) : n; };",
        "std::clamp<int64_t>(i + r - j, 0, n) : n; };",
        _ATTENTION,
    ),
    Defect(
        "rows without keys divide by zero",
        CPU + "flash_attention.cpp",
        "sum[r] == 0 ? 0.f : 1.f / sum[r], a.dv",
        "1.f / sum[r], a.dv",
        _ATTENTION,
    ),
    Defect(
        "log-sum-exp in the kernel's units",
        CPU + "flash_attention.cpp",
        "load(top + r) * kind.natural",
        "load(top + r)",
        _ATTENTION,
    ),
    Defect(
        "bias missing in the last, partial vector",
        CPU + "softmax.h",
        "scores.factor, load_n(bias + whole, tail)), whole)",
        "scores.factor, vf{}), whole)",
        _ATTENTION,
    ),
    Defect(
        "a mask that is finite",
        CPU + "softmax.h",
        "return mask ? (bias == 0.f ? x : set1(-INF)) : x + bias;",
        "return mask ? (bias == 0.f ? x : set1(-1e4f)) : x + bias;",
        _ATTENTION,
    ),
    Defect(
        "a bias row kept for the next query",
        CPU + "softmax.h",
        "if (at == cached_ && n == cached_n_) return buffer_;",
        "if (n == cached_n_) return buffer_;",
        _ATTENTION,
    ),
    Defect(
        "rows of NaN count as rows without keys",
        CPU + "softmax.h",
        "if (std::none_of(s, s + valid, [](float x) { return std::isnan(x); })) {",
        "if (true) {",
        _ATTENTION,
    ),
    Defect(
        "dS without delta",
        CPU + "flash_attention_backward.cpp",
        "(load(g.dscores + (r + k) * ld + c) - delta[k])",
        "load(g.dscores + (r + k) * ld + c)",
        _ATTENTION,
    ),
    Defect(
        "the log-sum-exp's gradient dropped",
        CPU + "flash_attention_backward.cpp",
        "reduce_add(sum) - (g_.grad_lse ? g_.grad_lse[at + r] : 0.f)",
        "reduce_add(sum)",
        _ATTENTION,
    ),
    Defect(
        "the first part of a bias's gradient dropped",
        CPU + "flash_attention_backward.cpp",
        "for (int64_t chain = 0; chain < plan.chains; chain++) sum",
        "for (int64_t chain = 1; chain < plan.chains; chain++) sum",
        _ATTENTION,
    ),
    Defect(
        "a part of the gradients of keys dropped",
        CPU + "flash_attention_backward.cpp",
        "for (int64_t p = 1; p < plan.partials; p++)",
        "for (int64_t p = 2; p < plan.partials; p++)",
        _ATTENTION,
    ),
    Defect(
        "gradients of a grid row overwritten by the next block of keys",
        CPU + "grid_bias.h",
        "sums[y] += reduce_add(total);",
        "sums[y] = reduce_add(total);",
        _DECOMPOSED,
    ),
    Defect(
        "blocks of keys begin at column 0 of the grid",
        CPU + "grid_bias.h",
        "y = j / grid.width, x = j % grid.width",
        "y = j / grid.width, x = 0",
        _DECOMPOSED,
    ),
    Defect(
        "columns of the grid for rows",
        TORCH + "decomposed_attention.cpp",
        "grid.width = rel_w.size(3);",
        "grid.width = rel_h.size(3);",
        _DECOMPOSED,
    ),
    Defect(
        "rotation the other way",
        CPU + "qk_transform.h",
        "write(out + c, p * read(cos + c, n) - q * read(sin + c, n), n);",
        "write(out + c, p * read(cos + c, n) + q * read(sin + c, n), n);",
        _ROPE,
    ),
    Defect(
        "prefix tokens rotated",
        CPU + "qk_transform.h",
        "if (!t_.rope || token < t_.prefix) return nullptr;",
        "if (!t_.rope) return nullptr;",
        _ROPE,
    ),
    Defect(
        "the mean's gradient missing in the norm of heads",
        CPU + "qk_transform.h",
        "const float level = LAYER ? reduce_add(sum_of(g)) * SHARE : 0.f",
        "const float level = 0.f",
        _ROPE,
    ),
    Defect(
        "strides of dimensions of size 1",
        TORCH + "attention_tensors.h",
        "return i < 0 || bias->size(i) == 1 ? 0 : bias->stride(i);",
        "return i < 0 ? 0 : bias->stride(i);",
        _ATTENTION,
    ),
    Defect(
        "descending cu_seqlens pass",
        TORCH + "attention_tensors.h",
        "good = ends[i] >= ends[i - 1] && ends[i]",
        "good = ends[i]",
        "tests/ops/test_low_level.py -k cumulative",
    ),
    # Windows on CPUs
    Defect(
        "one token outside the map after a shift",
        CPU + "window_coordinates.h",
        "if (token >= whole) token -= whole;",
        "if (token > whole) token -= whole;",
        _WINDOW,
    ),
    Defect(
        "padding attended to",
        CPU + "window_coordinates.h",
        "key_ids()[t] = real || w_.pad ? float(region) : -1.f;",
        "key_ids()[t] = float(region);",
        _WINDOW,
    ),
    Defect(
        "regions of a shift mixed along x",
        CPU + "window_coordinates.h",
        "+ (seam_x && tx >= w_.ww - g_.sx);",
        "+ 0 * (seam_x && tx >= w_.ww - g_.sx);",
        _WINDOW,
    ),
    Defect(
        "logit scale not clamped",
        CPU + "window_coordinates.h",
        "std::exp(double(std::min(w_.logit_scale[head], LN100)))",
        "std::exp(double(w_.logit_scale[head]))",
        _WINDOW,
    ),
    Defect(
        "a clamped logit scale has a gradient",
        CPU + "window_attention_backward.cpp",
        "w.logit_scale[h] <= Shared<T>::LN100 ? float(sum) : 0.f",
        "float(sum)",
        _WINDOW,
    ),
    Defect(
        "the table's gradient without the last query",
        CPU + "window_attention_backward.cpp",
        "if (!g_.remainder) return;",
        "return;",
        _WINDOW,
    ),
    # Patches, layers and losses on CPUs
    Defect(
        "pixels not shifted by the mean",
        CPU + "patch_embed.cpp",
        "store(out + x, v * scale + shift);",
        "store(out + x, v * scale);",
        _PATCH,
    ),
    Defect(
        "positions by place instead of by patch",
        CPU + "patch_embed.cpp",
        "p.pos ? p.pos + Geometry::patch(p, image, at) * p.dim",
        "p.pos ? p.pos + at * p.dim",
        _PATCH,
    ),
    Defect(
        "the bias's gradient of the first image alone",
        CPU + "patch_embed.cpp",
        "if (grad.grad_bias) add(",
        "if (grad.grad_bias && !image) add(",
        _PATCH,
    ),
    Defect(
        "lanes beyond the row in its variance", CPU + "layer_norm.h", "if (n != W) d = keep_first(d, n);", "", _NORM
    ),
    Defect(
        "layer norm's backward without the mean of the gradient",
        CPU + "layer_norm.cpp",
        "if (CENTERED) gc -= by_g[r];",
        "",
        _NORM,
    ),
    Defect(
        "GELU's slope without its second term",
        CPU + "activation.h",
        "return g * (phi + x * bell * 0.3989422804f);",
        "return g * phi;",
        "tests/ops/test_mlp.py tests/ops/test_linear.py",
    ),
    Defect(
        "ReLU hides NaN",
        CPU + "activation.h",
        "return x <= 0.f ? vf{} : x; }",
        "return x > 0.f ? x : vf{}; }",
        "tests/ops/test_linear.py tests/ops/test_mlp.py",
    ),
    Defect(
        "int8 saturates one step early",
        CPU + "linear_int8.cpp",
        "set1i(INTEGER_ZERO + 255)",
        "set1i(INTEGER_ZERO + 254)",
        _INT8,
    ),
    Defect(
        "int8 without a zero point",
        CPU + "linear_int8.cpp",
        "some ? (-least * inverse + TO_INTEGER) - TO_INTEGER : 0.f",
        "0.f",
        _INT8,
    ),
    Defect(
        "rows that are not finite count as zeros in int8",
        CPU + "linear_int8.cpp",
        "finite ? 0.f : std::numeric_limits<float>::quiet_NaN();",
        "0.f;",
        _INT8,
    ),
    Defect(
        "sums of the wrong columns in int8",
        CPU + "int8_tile.h",
        "int8_tile_rows<1>(rows, a, from, width, b.lanes, b.negative_sums + at,",
        "int8_tile_rows<1>(rows, a, from, width, b.lanes, b.negative_sums,",
        _INT8,
    ),
    Defect(
        "pairs of a diagonal tile counted twice",
        CPU + "pairwise_losses.cpp",
        "if (a_rows_ && !t.diagonal)",
        "if (a_rows_)",
        "tests/ops/test_nt_xent.py",
    ),
    Defect(
        "cross terms not scaled to the new maximum",
        CPU + "distillation_cross_entropy.cpp",
        "cross = cross * fade[j + k] + reduce_add(dot[k]);",
        "cross = cross + reduce_add(dot[k]);",
        "tests/ops/test_distillation_cross_entropy.py",
    ),
    # Contracts and formulas in Python
    Defect(
        "keys of another head dimension pass",
        OPS + "flash_attention.py",
        "if bk != b or dk != d:",
        "if bk != b:",
        "tests/ops/test_errors.py -k flash",
    ),
    Defect(
        "a dropout probability of 1 passes",
        OPS + "checks.py",
        "if not 0.0 <= p < 1.0:",
        "if not 0.0 <= p <= 1.0:",
        "tests/ops/test_dropout.py tests/ops/test_errors.py",
    ),
    Defect(
        "tensors of two devices pass",
        OPS + "checks.py",
        "if t.device != like.device:",
        "if False:",
        "tests/ops/test_errors.py tests/ops/test_misuse.py",
    ),
    Defect(
        "more rotated channels than there are pass",
        OPS + "rope_attention.py",
        "if channels % 2 or not 0 < channels <= d:",
        "if channels % 2 or not 0 < channels:",
        "tests/ops/test_rope_attention.py -k errors",
    ),
    Defect(
        "a grid of other keys passes",
        OPS + "decomposed_attention.py",
        "if rel_h.shape[3] * rel_w.shape[3] != k.shape[2]:",
        "if False:",
        _DECOMPOSED + " -k errors",
    ),
    Defect(
        "a row is its own neighbour",
        OPS + "koleo.py",
        "scores.fill_diagonal_(-math.inf)",
        "pass",
        "tests/ops/test_koleo.py",
    ),
    Defect(
        "neighbours counted within their tile",
        OPS + "koleo.py",
        "torch.where(better, at + j.start, index[i])",
        "torch.where(better, at, index[i])",
        "tests/ops/test_koleo.py",
    ),
    Defect(
        "Sinkhorn-Knopp of no iterations sums to 1",
        OPS + "sinkhorn_knopp.py",
        "return (x - _shared(total, ring)).exp() * samples",
        "return (x - _shared(total, ring)).exp()",
        "tests/ops/test_sinkhorn_knopp.py",
    ),
    Defect(
        "sums of earlier tiles not scaled to the new maximum",
        OPS + "loss_tiles.py",
        "self.total[rows] * torch.exp(self.top[rows] - top) + sums",
        "self.total[rows] + sums",
        "tests/ops/test_loss_tiles.py tests/ops/test_info_nce.py",
    ),
    Defect(
        "half-split pairs turned the other way in the reference",
        OPS + "reference.py",
        "quarter = torch.cat((-b, a), -1)",
        "quarter = torch.cat((b, -a), -1)",
        "tests/ops/test_rotate.py",
    ),
    Defect(
        "merged tokens count as one patch",
        NN + "token_merging.py",
        "bias = size.log()[:, None, None]",
        "bias = None",
        "tests/integrations/test_token_merging.py",
    ),
    Defect(
        "register tokens may be merged into",
        NN + "token_merging.py",
        "scores[:, :, : prefix // 2] = -torch.inf",
        "",
        "tests/integrations/test_token_merging.py",
    ),
    Defect(
        "distances from key to query",
        NN + "position.py",
        "table[at[:, None] - at[None, :] + n - 1]",
        "table[at[None, :] - at[:, None] + n - 1]",
        "tests/models/test_sam.py tests/models/test_detection.py",
    ),
    # Triton, in its interpreter
    Defect(
        "a causal query does not see itself",
        TRITON + "common.py",
        's = tl.where(rows >= cols, s, float("-inf"))',
        's = tl.where(rows > cols, s, float("-inf"))',
        f"{_ATTENTION} -k 'test_causal and triton'",
    ),
    Defect(
        "one key beyond the end",
        TRITON + "common.py",
        's = tl.where(cols < n_k, s, float("-inf"))',
        's = tl.where(cols <= n_k, s, float("-inf"))',
        f"{_ATTENTION} -k 'test_shapes and triton'",
    ),
    Defect(
        "the same dropout in all heads",
        TRITON + "common.py",
        "(head + zero).to(tl.uint32)",
        "zero.to(tl.uint32)",
        f"tests/ops/test_dropout.py {_ON_TRITON}",
    ),
    Defect(
        "earlier sums not scaled to the new maximum",
        TRITON + "flash_attention_forward.py",
        "total = total * shrink + tl.sum(p, 1)",
        "total = total + tl.sum(p, 1)",
        f"{_ATTENTION} -k '(test_long or leading or shifted) and triton'",
    ),
    Defect(
        "the log-sum-exp's gradient added",
        TRITON + "flash_attention_backward.py",
        "delta -= tl.load(grad_lse + rows",
        "delta += tl.load(grad_lse + rows",
        f"{_ATTENTION} -k 'test_shapes and triton'",
    ),
    Defect(
        "dropped probabilities have gradients",
        TRITON + "flash_attention_backward.py",
        "dp = tl.where(keep, dp * keep_scale, 0.0)",
        "dp = dp * keep_scale",
        f"tests/ops/test_dropout.py {_ON_TRITON}",
    ),
    Defect(
        "a bias's gradient cut at the number of queries",
        TRITON + "flash_attention_bias.py",
        "tl.store(base + cols, tl.sum(acc, 0), mask=cols < n_k)",
        "tl.store(base + cols, tl.sum(acc, 0), mask=cols < n_q)",
        f"{_ATTENTION} -k 'bias and triton'",
    ),
    Defect(
        "padding attended to",
        TRITON + "window_coordinates.py",
        "region = tl.where((y < size[0]) & (x < size[1]), region, -1)",
        "region = region",
        f"{_WINDOW} -k 'test_geometry and triton'",
    ),
    Defect(
        "logit scale not clamped",
        TRITON + "window_attention_forward.py",
        "tl.exp(tl.minimum(tl.load(logit_scale + h).to(tl.float32), LN100))",
        "tl.exp(tl.load(logit_scale + h).to(tl.float32))",
        f"{_WINDOW} -k 'clamp and triton'",
    ),
    Defect(
        "pixels multiplied by the deviation",
        TRITON + "patch_embed_kernels.py",
        "factor = 1.0 / tl.load(std + c,",
        "factor = tl.load(std + c,",
        f"{_PATCH} -k 'options and triton'",
    ),
    Defect(
        "pairs beyond the batch counted",
        TRITON + "pairwise_losses_kernels.py",
        'return tl.where(valid, s, float("-inf"))',
        "return s",
        "tests/triton/test_pairwise_losses.py",
    ),
    Defect(
        "earlier tiles not scaled to the new maximum",
        TRITON + "pairwise_losses_kernels.py",
        "total = total * tl.exp2((top - against) * LOG2E) + ",
        "total = total + ",
        "tests/triton/test_pairwise_losses.py",
    ),
)
