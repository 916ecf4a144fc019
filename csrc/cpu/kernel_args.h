// What the CPU kernels are asked to do: plain structures of pointers, sizes and strides, and the table of functions of
// one instruction set. No torch header is included below this one.
#pragma once

#include <cstdint>

namespace pyvit {

enum class Dtype { f32, bf16, f16, boolean };

// (batch, head, token, channel) with unit stride in the channels; strides in elements.
struct Tokens {
  void* data;
  int64_t b, h, n;
};

// Attention bias: strides in elements, 0 where it broadcasts. No bias: data is null.
struct Bias {
  const void* data;
  Dtype dtype;
  int64_t b, h, q, k;
};

// The sum of two biases, for keys that are a grid of height * width: each query has one number for every row of the
// grid and one for every column. Strides in elements.
struct GridBias {
  const void *rows, *columns;  // (B, H, Nq, height) and (B, H, Nq, width), with unit stride in the last dimension
  Dtype dtype;
  int64_t height, width;
  int64_t rows_b, rows_h, rows_q, columns_b, columns_h, columns_q;
};

// What attention does to the rows of q and k: a norm over the channels of each head, then a rotation of pairs of
// channels, (2i, 2i + 1) where interleaved, else (i, i + rotated / 2).
struct QkTransform {
  enum Norm { none, layer, rms } norm;
  float eps;
  const float *q_weight, *q_bias, *k_weight, *k_bias;  // (d,), null for 1 and 0
  const float* rope;  // sines of the rotated channels of each token, rope_cos further the cosines; null: no rotation
  int64_t rope_b, rope_h, rope_n, rope_cos;
  int64_t rotated, prefix;        // channels, and tokens before the first that has angles
  bool interleaved, same_halves;  // same_halves: sines and cosines of i and i + rotated / 2 are the same numbers
};

struct Attention {
  int64_t batch, heads, kv_heads, nq, nk, d, dv;
  Dtype dtype;
  Tokens q, k, v, out;
  Bias bias;
  bool causal;
  float scale;
  float* lse;  // natural logarithm
  int64_t lse_b, lse_h;
  // Packed sequences: sequence b has rows cu[b] .. cu[b + 1]; the batch strides are 0 then. Null for a dense batch.
  const int64_t *cu_q, *cu_k;
  const QkTransform* transform;  // null: none
  const GridBias* grid;          // null: none; only without `bias`
  bool biased() const { return bias.data || grid; }
  bool masked() const { return bias.data && bias.dtype == Dtype::boolean; }
};

struct AttentionGrad {
  Tokens grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse;  // strides of lse, or null
  void* grad_bias;        // contiguous (bias_b, bias_h, bias_q, bias_k), of the bias's dtype, or null
  int64_t bias_b, bias_h, bias_q, bias_k;
  // Of the grid's biases, contiguous and of their dtype; null without a grid.
  void *grad_rows, *grad_columns;
  // Of the transform: float32, null when not asked. grad_rope is contiguous (rope_b, rope_h, tokens less the prefix, 2,
  // rotated); packed sequences are one batch entry of `tokens`.
  float *grad_q_weight, *grad_q_bias, *grad_k_weight, *grad_k_bias, *grad_rope;
  int64_t rope_b, rope_h, tokens;
};

struct AttentionMap {
  int64_t batch, heads, kv_heads, nq, nk, d, rows;
  Dtype dtype;
  Tokens q, k, out;  // out (B, H, R, Nk)
  const int64_t* index;
  int64_t index_b;
  Bias bias;
  float scale;
};

// Swin's window attention on the whole map. Tensors are (B, H, W, channels) with unit stride in the channels.
struct Map {
  void* data;
  int64_t b, y, x;
};

struct Window {
  int64_t batch, height, width, heads, d;
  int64_t wh, ww, sy, sx;  // window and shift, as given
  Dtype dtype;
  Map qkv, out;
  const float* table;        // ((2 wh - 1)(2 ww - 1), heads) or null
  const float* logit_scale;  // (heads,) or null
  const float* pad;          // (3 C,) or null: padding is masked
  float scale;
  float* lse;  // (B, windows, heads, wh * ww)
};

struct WindowGrad {
  Map grad_out, grad_qkv;
  float *grad_table, *grad_logit_scale, *grad_pad;  // null when the forward had none
};

struct Patch {
  int64_t batch, channels, height, width, dim, ph, pw, sh, sw, prefix_tokens, kept;  // kept: patches per image
  Dtype dtype;                                                                       // of weight and out
  const void* images;
  bool bytes;  // images are uint8; otherwise of dtype
  int64_t image_b, image_c, image_y, image_x;
  const void* weight;                // (D, C * ph * pw) contiguous
  const float *bias, *pos, *prefix;  // contiguous, null when absent
  const int64_t* keep;               // (B, kept) contiguous, or null
  const float *mean, *std;           // null when absent
  void* out;                         // (B, prefix + kept, D) contiguous
};

struct PatchGrad {
  const void* grad_out;                                                   // contiguous, of dtype
  float *grad_images, *grad_weight, *grad_bias, *grad_pos, *grad_prefix;  // contiguous float32, null when not asked
};

// Contiguous (rows, cols). Forward: out = y(in). With `grad`, of y: grad_in (which may be grad), its column sums, and
// y(in) into out unless that is null.
struct Activation {
  enum Kind { gelu, gelu_tanh, quick_gelu, silu, relu } kind;
  int64_t rows, cols;
  Dtype dtype;
  const void* in;
  void* out;
  const void* grad;
  void* grad_in;
  float* column_sums;
};

// Contiguous (rows, cols), or rows of a and b `ld` apart. Forward: out = y(a) * b. With `grad`, of that: the gradients
// of a and b, rows `grad_ld` apart, their column sums, and y(a) * b into out, which may be grad.
struct Gate {
  Activation::Kind kind;
  int64_t rows, cols, ld;
  Dtype dtype;
  const void *a, *b;
  void* out;
  const void* grad;
  void *grad_a, *grad_b;
  int64_t grad_ld;
  float *sums_a, *sums_b;
};

// Layer norm of contiguous (rows, cols): to zero mean and unit variance by rows, then times weight plus bias, null for
// 1 and 0. Not centered it is RMS norm: to a mean square of 1, then times weight. Of float32 rows the result may be a
// 16-bit type.
struct RowNorm {
  int64_t rows, cols;
  bool centered;
  Dtype in, out, parameters;
  const void *x, *weight, *bias;
  void* y;
  float *mean, *rstd;  // of each row; the forward's may be null, mean is if not centered
  float eps;
};
struct RowNormGrad {
  const void* grad;  // of y, in its type
  void* grad_x;
  float *grad_weight, *grad_bias;  // both null when not asked, grad_bias if not centered
};

// `weight` (out, in) as `pack_layer` packs it; bias (out,) of the call's dtype, or null.
struct Layer {
  const uint32_t* weight;
  const void* bias;
  int64_t in, out;
};
// A layer norm of rows, or where it is `rms` their RMS norm.
struct FusedNorm {
  bool given, rms;
  const void *weight, *bias;  // null for 1 and 0
  Dtype dtype;
  float eps;
  explicit operator bool() const { return given; }
};
// out (rows, C) = residual + scale * layers(norm(x)), all contiguous and of one dtype. One layer, its activation after
// it, or with `second` two, the activation between them. With `gate` and `second`, the activation is that of the gate,
// layers(x) = second(hidden_norm(activation(gate(x)) * first(x))). Null: residual 0, scale 1.
struct FusedLinear {
  int64_t rows;
  Dtype dtype;
  const void* x;
  FusedNorm norm, hidden_norm;
  Layer first, second, gate;
  bool activated;
  Activation::Kind activation;
  const void *scale, *residual;
  void* out;
};

// out (cols, rows) = in (rows, cols), contiguous, of elements of 2 or 4 bytes.
struct Transposition {
  int64_t rows, cols, bytes;
  const void* in;
  void* out;
};

// A contiguous tile of scores, and for its rows or its columns the largest score so far and the sum of exp(score -
// top).
struct TileScores {
  int64_t rows, cols;
  const float* scores;
  bool of_rows;
  float *top, *total;
};

// Every row of a (n x d) against every row of b (m x d): losses over similarities that are never held together.
struct Pairs {
  int64_t n, m, d;
  Dtype dtype;
  const void *a, *b;
  int64_t lda, ldb;
  bool own;       // b is a: a row is no candidate for itself, and the half above the diagonal stands for the other
  int64_t shift;  // positive pairs are (i, i + shift); -1 where this b holds none
  float scale;
  bool sigmoid;  // terms are softplus(scale s + bias), negated for a positive pair, not softmax's
  float bias;
  // Added to. Softmax: the running log-sum-exps over each row's and, unless null, each column's logits, as largest
  // (natural logarithm) and sum. Sigmoid: total_a alone, the sum of each row's terms, or of their derivatives.
  float *top_a, *total_a, *top_b, *total_b;
};

struct PairsGrad {
  const float *lse_a, *lse_b;  // softmax's
  float *grad_a, *grad_b;      // added to; for the loss's sum over unscaled logits; grad_b null, or grad_a when own
  int64_t ld;                  // of both, a multiple of 16
};

// A contiguous float32 tile of scores on `cols` prototypes: of the student's s crops of `rows` samples, (s, rows,
// cols), and of the teacher's t, less the center (cols), null for none.
struct Distillation {
  int64_t s, t, rows, cols;
  const float *student, *teacher, *center;
  float student_scale, teacher_scale;        // 1 / temperature
  float *top_s, *total_s, *top_t, *total_t;  // the forward's, updated: (crops, rows), as in TileScores
  float* cross;                              // likewise (s, t, rows): sums of exp(teacher - top) * student
};
// grad (s, rows, cols), float32 or bf16; it may be the student's scores. lse (crops, rows), weights (s, t, rows).
struct DistillationGrad {
  const float *lse_s, *lse_t, *weights;
  Dtype dtype;
  void* grad;
};

// A matrix with contiguous rows, or contiguous columns; ld: from one of them to the next.
struct Operand {
  const void* data;
  int64_t ld;
  bool column_major;
};
// out (n, m) = a (n, k) b (k, m) + bias, or with `add`, of a float32 out, += that.
struct Product {
  int64_t n, m, k;
  Dtype dtype;  // of a, that it is computed in
  Operand a, b;
  Dtype b_dtype;     // a's, or float32: rounded to a's as it is packed, where that is multiplied in
  const void* bias;  // (m,) of b's dtype, or null
  void* out;
  Dtype out_dtype;  // a's, or float32
  int64_t ldo;
  bool add;
};

struct Kernels {
  void (*attention)(const Attention&);
  void (*attention_backward)(const Attention&, const AttentionGrad&);
  void (*attention_map)(const AttentionMap&);
  void (*window)(const Window&);
  void (*window_backward)(const Window&, const WindowGrad&);
  void (*patch)(const Patch&);
  void (*patch_backward)(const Patch&, const PatchGrad&);
  void (*activation)(const Activation&);
  void (*gate)(const Gate&);
  void (*row_norm)(const RowNorm&);
  void (*row_norm_backward)(const RowNorm&, const RowNormGrad&);
  int64_t (*packed_layer_size)(int64_t in, int64_t out, Dtype dtype);
  void (*pack_layer)(const void* weight, int64_t in, int64_t out, Dtype dtype, uint32_t* packed);
  void (*fused_linear)(const FusedLinear&);
  void (*transpose)(const Transposition&);
  void (*log_sum_exp)(const TileScores&);
  void (*pairs)(const Pairs&);
  void (*pairs_backward)(const Pairs&, const PairsGrad&);
  void (*distillation)(const Distillation&);
  void (*distillation_backward)(const Distillation&, const DistillationGrad&);
  void (*product)(const Product&);
  double (*fma_peak)(Dtype dtype, double seconds);  // GF/s of one thread
};

}  // namespace pyvit
