// Schemas and CPU kernels of torch.ops.pyvit, on LibTorch's stable ABI: one binary for every torch >= 2.10 and every
// Python.
//
// Shapes, dtypes and devices are checked by pyvit/ops before a call gets here; what is checked below is what would be
// unsafe otherwise.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"

namespace pyvit {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::Bool:
      return Dtype::boolean;
    default:
      STD_TORCH_CHECK(false,
                      "pyvit: the cpu kernels take float32, bfloat16 and float16 tensors; use backend='reference'");
  }
}

void check_backend(const std::string& backend) {
  STD_TORCH_CHECK(backend == "auto" || backend == "cpu", "pyvit: backend '", backend,
                  "' cannot run on cpu tensors through torch.ops");
}

// Straight through the C interface: the dispatcher's way to `new_empty` and `transpose` costs microseconds.
Tensor make_strided(const Tensor& like, const int64_t* shape, const int64_t* strides, int64_t dims, ScalarType dtype) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), like.get_device_index(), &made));
  return Tensor(made);
}
Tensor make(const Tensor& like, const Ints& shape, std::optional<ScalarType> dtype = std::nullopt) {
  Ints strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i] ? shape[i] : 1;
  }
  return make_strided(like, shape.data(), strides.data(), int64_t(shape.size()), dtype.value_or(like.scalar_type()));
}
Tensor zeros(const Tensor& like, const Ints& shape, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_zeros(like, Shape(shape.data(), shape.size()), dtype);
}
Tensor none(const Tensor& like) { return make(like, {0}); }
Ints shape_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

// Unit stride in the last dimension, by a copy where it is not.
Tensor rows(const Tensor& t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
// The small parameters of an operator: contiguous float32.
Maybe parameter(const Maybe& t) {
  if (!t) return t;
  return dense(t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}
template <class T>
T* data(const Maybe& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

float* vector(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == n && t.is_contiguous(), "pyvit: ", name,
                  " must be ", n, " contiguous float32 numbers");
  return static_cast<float*>(t.data_ptr());
}

// (B, H, N, D) and packed (T, H, D).
Tokens tokens(const Tensor& t) {
  return t.dim() == 4 ? Tokens{t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}
                      : Tokens{t.data_ptr(), 0, t.stride(1), t.stride(0)};
}
// Heads merge without a copy when tokens come before heads in memory.
Tensor make_heads(const Tensor& like, int64_t b, int64_t h, int64_t n, int64_t d) {
  const int64_t shape[] = {b, h, n, d}, strides[] = {n * h * d, d, h * d, 1};
  return make_strided(like, shape, strides, 4, like.scalar_type());
}

Bias bias_of(const Maybe& bias) {
  if (!bias) return {};
  auto stride = [&](int i) { return bias->size(i) == 1 ? 0 : bias->stride(i); };
  return {bias->data_ptr(), dtype_of(*bias), stride(0), stride(1), stride(2), stride(3)};
}

// attention

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                       const Maybe& bias, bool causal, double scale) {
  Attention a{};
  const bool packed = q.dim() == 3;
  a.batch = packed ? 0 : q.size(0);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.nq = packed ? 0 : q.size(2);
  a.nk = packed ? 0 : k.size(2);
  a.d = q.size(q.dim() - 1);
  a.dv = v.size(v.dim() - 1);
  a.dtype = dtype_of(q);
  a.q = tokens(q);
  a.k = tokens(k);
  a.v = tokens(v);
  a.out = tokens(out);
  a.bias = bias_of(bias);
  a.causal = causal;
  a.scale = float(scale);
  a.lse = static_cast<float*>(lse.data_ptr());
  a.lse_b = packed ? 0 : lse.stride(0);
  a.lse_h = lse.stride(packed ? 0 : 1);
  return a;
}

void check_dropout(double dropout_p) {
  STD_TORCH_CHECK(dropout_p == 0, "pyvit: the cpu kernels have no dropout; use backend='reference'");
}

std::tuple<Tensor, Tensor> flash_attention(Tensor q, Tensor k, Tensor v, Maybe bias, bool is_causal, double scale,
                                           double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  q = rows(q);
  k = rows(k);
  v = rows(v);
  Tensor out = make_heads(q, q.size(0), q.size(1), q.size(2), v.size(3));
  Tensor lse = make(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (q.numel()) kernels().attention(attention_of(q, k, v, out, lse, bias, is_causal, scale));
  return {out, lse};
}

// Fills in what both backward forms share; grad_bias is dense.
AttentionGrad gradient_of(const Tensor& grad_out, const Maybe& grad_lse, const Tensor& dq, const Tensor& dk,
                          const Tensor& dv, const Tensor& dbias, bool bias_grad) {
  AttentionGrad g{};
  g.grad_out = tokens(grad_out);
  g.grad_q = tokens(dq);
  g.grad_k = tokens(dk);
  g.grad_v = tokens(dv);
  g.grad_lse = data<float>(grad_lse);
  if (bias_grad) {
    g.grad_bias = dbias.data_ptr();
    g.bias_b = dbias.size(0);
    g.bias_h = dbias.size(1);
    g.bias_q = dbias.size(2);
    g.bias_k = dbias.size(3);
  }
  return g;
}

// The gradients of q, k and v into tensors of any strides but in their last dimension; returns the bias's.
Tensor flash_attention_backward_(Tensor grad_out, Maybe grad_lse, Tensor out, Tensor lse, bool bias_grad, Tensor q,
                                 Tensor k, Tensor v, Maybe bias, bool is_causal, double scale, Tensor dq, Tensor dk,
                                 Tensor dv) {
  q = rows(q);
  k = rows(k);
  v = rows(v);
  out = rows(out);
  grad_out = rows(grad_out);
  lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  const bool work = q.numel() && k.numel();
  Tensor dbias = !bias_grad ? none(q) : work ? make(*bias, shape_of(*bias)) : zeros(*bias, shape_of(*bias));
  if (work) {
    kernels().attention_backward(attention_of(q, k, v, out, lse, bias, is_causal, scale),
                                 gradient_of(grad_out, grad_lse, dq, dk, dv, dbias, bias_grad));
  } else {
    for (Tensor* t : {&dq, &dk, &dv}) torch::stable::zero_(*t);
  }
  return dbias;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_backward(Tensor grad_out, Maybe grad_lse, Tensor out,
                                                                    Tensor lse, bool bias_grad, Tensor q, Tensor k,
                                                                    Tensor v, Maybe bias, bool is_causal, double scale,
                                                                    double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  Tensor dq = make_heads(q, q.size(0), q.size(1), q.size(2), q.size(3));
  Tensor dk = make_heads(k, k.size(0), k.size(1), k.size(2), k.size(3));
  Tensor dv = make_heads(v, v.size(0), v.size(1), v.size(2), v.size(3));
  Tensor dbias =
      flash_attention_backward_(grad_out, grad_lse, out, lse, bias_grad, q, k, v, bias, is_causal, scale, dq, dk, dv);
  return {dq, dk, dv, dbias};
}

// As above for q, k and v that are parts of qkv (B, N, 3, H, D), whose gradient is of one piece.
std::tuple<Tensor, Tensor> flash_attention_qkvpacked_backward(Tensor grad_out, Maybe grad_lse, Tensor out, Tensor lse,
                                                              bool bias_grad, Tensor qkv, Maybe bias, bool is_causal,
                                                              double scale) {
  Tensor grad = make(qkv, shape_of(qkv));
  auto part = [](const Tensor& t, int64_t i) { return torch::stable::transpose(torch::stable::select(t, 2, i), 1, 2); };
  Tensor dbias =
      flash_attention_backward_(grad_out, grad_lse, out, lse, bias_grad, part(qkv, 0), part(qkv, 1), part(qkv, 2), bias,
                                is_causal, scale, part(grad, 0), part(grad, 1), part(grad, 2));
  return {grad, dbias};
}

// The cumulative lengths as int64 on the host's side, checked: the kernels index with them.
Ints lengths(const Tensor& cu, int64_t total, int64_t longest, const char* name) {
  Tensor wide = dense(cu.scalar_type() == ScalarType::Long ? cu : torch::stable::to(cu, ScalarType::Long));
  const int64_t* p = static_cast<const int64_t*>(wide.data_ptr());
  Ints ends(p, p + wide.numel());
  bool good = !ends.empty() && ends.front() == 0 && ends.back() == total;
  for (size_t i = 1; good && i < ends.size(); i++) good = ends[i] >= ends[i - 1] && ends[i] - ends[i - 1] <= longest;
  STD_TORCH_CHECK(good, "pyvit: flash_attention_varlen: ", name, " must ascend from 0 to ", total,
                  " in steps of at most ", longest);
  return ends;
}

void set_lengths(Attention& a, const Ints& cu_q, const Ints& cu_k, int64_t max_q, int64_t max_k) {
  a.batch = int64_t(cu_q.size()) - 1;
  a.nq = max_q;
  a.nk = max_k;
  a.cu_q = cu_q.data();
  a.cu_k = cu_k.data();
}

std::tuple<Tensor, Tensor> flash_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                  Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                  Maybe bias, bool is_causal, double scale, std::string backend) {
  check_backend(backend);
  const Ints cu_q = lengths(cu_seqlens_q, q.size(0), max_seqlen_q, "cu_seqlens_q");
  const Ints cu_k = lengths(cu_seqlens_k, k.size(0), max_seqlen_k, "cu_seqlens_k");
  STD_TORCH_CHECK(cu_q.size() == cu_k.size(),
                  "pyvit: flash_attention_varlen: cu_seqlens_q and cu_seqlens_k must have one length");
  q = rows(q);
  k = rows(k);
  v = rows(v);
  Tensor out = make(q, {q.size(0), q.size(1), v.size(2)}), lse = make(q, {q.size(1), q.size(0)}, ScalarType::Float);
  if (q.numel()) {
    Attention a = attention_of(q, k, v, out, lse, bias, is_causal, scale);
    set_lengths(a, cu_q, cu_k, max_seqlen_q, max_seqlen_k);
    kernels().attention(a);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attention_varlen_backward(
    Tensor grad_out, Maybe grad_lse, Tensor out, Tensor lse, bool bias_grad, Tensor q, Tensor k, Tensor v,
    Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, Maybe bias, bool is_causal,
    double scale, std::string backend) {
  check_backend(backend);
  const Ints cu_q = lengths(cu_seqlens_q, q.size(0), max_seqlen_q, "cu_seqlens_q");
  const Ints cu_k = lengths(cu_seqlens_k, k.size(0), max_seqlen_k, "cu_seqlens_k");
  q = rows(q);
  k = rows(k);
  v = rows(v);
  out = rows(out);
  grad_out = rows(grad_out);
  lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  Tensor dq = make(q, shape_of(q)), dk = make(k, shape_of(k)), dv = make(v, shape_of(v));
  const bool work = q.numel() && k.numel();
  Tensor dbias = !bias_grad ? none(q) : work ? make(*bias, shape_of(*bias)) : zeros(*bias, shape_of(*bias));
  if (work) {
    Attention a = attention_of(q, k, v, out, lse, bias, is_causal, scale);
    set_lengths(a, cu_q, cu_k, max_seqlen_q, max_seqlen_k);
    kernels().attention_backward(a, gradient_of(grad_out, grad_lse, dq, dk, dv, dbias, bias_grad));
  } else {
    for (Tensor* t : {&dq, &dk, &dv}) torch::stable::zero_(*t);
  }
  return {dq, dk, dv, dbias};
}

Tensor attention_map(Tensor q, Tensor k, Tensor rows_index, Maybe bias, double scale, std::string backend) {
  check_backend(backend);
  q = rows(q);
  k = rows(k);
  rows_index = dense(rows_index);
  Tensor out = make(q, {q.size(0), q.size(1), rows_index.size(1), k.size(2)});
  const int64_t* index = static_cast<const int64_t*>(rows_index.data_ptr());
  for (int64_t i = 0; i < rows_index.numel(); i++)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < q.size(2), "pyvit: attention_map: rows must be in [0, ", q.size(2),
                    "), got ", index[i]);
  if (!out.numel()) return out;
  AttentionMap m{q.size(0),          q.size(1),     k.size(1),   q.size(2), k.size(2),   q.size(3),
                 rows_index.size(1), dtype_of(q),   tokens(q),   tokens(k), tokens(out), index,
                 rows_index.size(1), bias_of(bias), float(scale)};
  kernels().attention_map(m);
  return out;
}

// window attention

Map map_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

Window window_of(const Tensor& qkv, const Ints& window, const Ints& shift, int64_t heads, const Maybe& table,
                 const Maybe& logit_scale, const Maybe& pad, double scale, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(window.size() == 2 && shift.size() == 2,
                  "pyvit: window_attention: window_size and shift_size must be pairs");
  return {qkv.size(0),
          qkv.size(1),
          qkv.size(2),
          heads,
          qkv.size(3) / 3 / heads,
          window[0],
          window[1],
          shift[0],
          shift[1],
          dtype_of(qkv),
          map_of(qkv),
          map_of(out),
          data<float>(table),
          data<float>(logit_scale),
          data<float>(pad),
          float(scale),
          static_cast<float*>(lse.data_ptr())};
}

std::tuple<Tensor, Tensor> window_attention(Tensor qkv, Ints window_size, Ints shift_size, int64_t num_heads,
                                            Maybe bias_table, Maybe logit_scale, Maybe pad_qkv, double scale,
                                            double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  qkv = rows(qkv);
  bias_table = parameter(bias_table);
  logit_scale = parameter(logit_scale);
  pad_qkv = parameter(pad_qkv);
  const int64_t b = qkv.size(0), h = qkv.size(1), w = qkv.size(2), area = window_size[0] * window_size[1];
  const int64_t windows = ((h + window_size[0] - 1) / window_size[0]) * ((w + window_size[1] - 1) / window_size[1]);
  Tensor out = make(qkv, {b, h, w, qkv.size(3) / 3}), lse = make(qkv, {b, windows, num_heads, area}, ScalarType::Float);
  if (qkv.numel())
    kernels().window(
        window_of(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, scale, out, lse));
  return {out, lse};
}

// A float32 gradient in the dtype of the parameter it belongs to; empty when there is no such parameter.
Tensor as_parameter(const Maybe& grad, const Maybe& given, const Tensor& like) {
  if (!given) return none(like);
  return given->scalar_type() == ScalarType::Float ? *grad : torch::stable::to(*grad, given->scalar_type());
}
Maybe zeros_like(const Maybe& t) { return t ? Maybe(zeros(*t, shape_of(*t), ScalarType::Float)) : Maybe(); }

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(Tensor grad_out, Tensor out, Tensor lse,
                                                                     Tensor qkv, Ints window_size, Ints shift_size,
                                                                     int64_t num_heads, Maybe bias_table,
                                                                     Maybe logit_scale, Maybe pad_qkv, double scale,
                                                                     double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  qkv = rows(qkv);
  grad_out = rows(grad_out);
  out = rows(out);
  lse = dense(lse);
  const Maybe table = parameter(bias_table), logits = parameter(logit_scale), pad = parameter(pad_qkv);
  Tensor grad_qkv = make(qkv, shape_of(qkv));
  Maybe grad_table = zeros_like(bias_table), grad_logits = zeros_like(logit_scale), grad_pad = zeros_like(pad_qkv);
  if (qkv.numel())
    kernels().window_backward(
        window_of(qkv, window_size, shift_size, num_heads, table, logits, pad, scale, out, lse),
        {map_of(grad_out), map_of(grad_qkv), data<float>(grad_table), data<float>(grad_logits), data<float>(grad_pad)});
  return {grad_qkv, as_parameter(grad_table, bias_table, qkv), as_parameter(grad_logits, logit_scale, qkv),
          as_parameter(grad_pad, pad_qkv, qkv)};
}

// patch embedding

struct PatchTensors {
  Tensor images, weight;
  Maybe bias, pos, prefix, keep, mean, std;

  // The kernels' view; `out` may be null.
  Patch view(const Ints& stride, void* out) const {
    STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                    "pyvit: patch_embed: stride must be a pair of positive ints");
    const int64_t h = images.size(2), w = images.size(3), ph = weight.size(2), pw = weight.size(3);
    const int64_t all = ((h - ph) / stride[0] + 1) * ((w - pw) / stride[1] + 1);
    if (keep) {
      const int64_t* k = data<int64_t>(keep);
      for (int64_t i = 0; i < keep->numel(); i++)
        STD_TORCH_CHECK(k[i] >= 0 && k[i] < all, "pyvit: patch_embed: keep must be in [0, ", all, "), got ", k[i]);
    }
    return {images.size(0),
            images.size(1),
            h,
            w,
            weight.size(0),
            ph,
            pw,
            stride[0],
            stride[1],
            prefix ? prefix->size(0) : 0,
            keep ? keep->size(1) : all,
            dtype_of(weight),
            images.data_ptr(),
            images.scalar_type() == ScalarType::Byte,
            images.stride(0),
            images.stride(1),
            images.stride(2),
            images.stride(3),
            weight.data_ptr(),
            data<float>(bias),
            data<float>(pos),
            data<float>(prefix),
            data<int64_t>(keep),
            data<float>(mean),
            data<float>(std),
            out};
  }
};

PatchTensors patch_tensors(const Tensor& images, const Tensor& weight, const Maybe& bias, const Maybe& pos,
                           const Maybe& prefix, const Maybe& keep, const Maybe& mean, const Maybe& std) {
  return {images,          dense(weight),     parameter(bias),
          parameter(pos),  parameter(prefix), keep ? Maybe(dense(*keep)) : keep,
          parameter(mean), parameter(std)};
}

Tensor patch_embed(Tensor images, Tensor weight, Maybe bias, Ints stride, Maybe pos_embed, Maybe prefix, Maybe keep,
                   Maybe mean, Maybe std, std::string backend) {
  check_backend(backend);
  const PatchTensors t = patch_tensors(images, weight, bias, pos_embed, prefix, keep, mean, std);
  Patch p = t.view(stride, nullptr);
  Tensor out = make(weight, {p.batch, p.prefix_tokens + p.kept, p.dim});
  p.out = out.data_ptr();
  if (out.numel()) kernels().patch(p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(Tensor grad_out, bool images_grad,
                                                                        bool weight_grad, Tensor images, Tensor weight,
                                                                        Maybe bias, Ints stride, Maybe pos_embed,
                                                                        Maybe prefix, Maybe keep, Maybe mean, Maybe std,
                                                                        std::string backend) {
  check_backend(backend);
  const PatchTensors t = patch_tensors(images, weight, bias, pos_embed, prefix, keep, mean, std);
  grad_out = dense(grad_out);
  const Patch p = t.view(stride, nullptr);
  Maybe d_images = images_grad ? zeros_like(images) : Maybe(), d_weight = weight_grad ? zeros_like(weight) : Maybe();
  Maybe d_bias = zeros_like(bias), d_pos = zeros_like(pos_embed), d_prefix = zeros_like(prefix);
  if (grad_out.numel())
    kernels().patch_backward(p, {grad_out.data_ptr(), data<float>(d_images), data<float>(d_weight), data<float>(d_bias),
                                 data<float>(d_pos), data<float>(d_prefix)});
  return {as_parameter(d_images, images_grad ? Maybe(images) : Maybe(), weight),
          as_parameter(d_weight, weight_grad ? Maybe(weight) : Maybe(), weight), as_parameter(d_bias, bias, weight),
          as_parameter(d_pos, pos_embed, weight), as_parameter(d_prefix, prefix, weight)};
}

// activations

Activation::Kind kind_of(const std::string& name) {
  constexpr const char* NAMES[] = {"gelu", "gelu_tanh", "quick_gelu", "silu", "relu"};
  const auto* found = std::find(std::begin(NAMES), std::end(NAMES), name);
  STD_TORCH_CHECK(found != std::end(NAMES), "pyvit: activation: no activation is called '", name, "'");
  return Activation::Kind(found - std::begin(NAMES));
}

Activation activation_of(const Tensor& x, const std::string& name) {
  Activation a{};
  a.kind = kind_of(name);
  a.cols = x.dim() ? x.size(x.dim() - 1) : 1;
  a.rows = a.cols ? x.numel() / a.cols : 0;
  a.dtype = dtype_of(x);
  a.in = x.data_ptr();
  return a;
}
void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      t.is_contiguous() && x.is_contiguous() && t.numel() == x.numel() && t.scalar_type() == x.scalar_type(),
      "pyvit: activation: ", name, " must be contiguous and of the shape and dtype of x, which must be contiguous too");
}

void activation(Tensor x, std::string name, Tensor out) {
  check_like(out, x, "out");
  Activation a = activation_of(x, name);
  a.out = out.data_ptr();
  if (x.numel()) kernels().activation(a);
}

Tensor activation_backward(Tensor grad, Tensor x, std::string name, Tensor grad_x, Maybe out) {
  check_like(grad, x, "grad");
  check_like(grad_x, x, "grad_x");
  if (out) check_like(*out, x, "out");
  Activation a = activation_of(x, name);
  Tensor sums = make(x, {a.cols}, ScalarType::Float);
  a.grad = grad.data_ptr();
  a.grad_in = grad_x.data_ptr();
  if (out) a.out = out->data_ptr();
  a.column_sums = static_cast<float*>(sums.data_ptr());
  if (x.numel()) {
    kernels().activation(a);
  } else {
    torch::stable::zero_(sums);
  }
  return sums;
}

// layer norm

LayerNorm layer_norm_of(const Tensor& x, const Tensor& y, const Maybe& weight, const Maybe& bias, double eps) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel() &&
                      (x.scalar_type() == y.scalar_type() || x.scalar_type() == ScalarType::Float),
                  "pyvit: layer_norm: x and its result must be contiguous, of one size, and x float32 if their dtypes "
                  "differ");
  LayerNorm a{};
  a.cols = x.size(x.dim() - 1);
  a.rows = a.cols ? x.numel() / a.cols : 0;
  a.in = dtype_of(x);
  a.out = dtype_of(y);
  const auto fits = [&](const Maybe& p) {
    return !p || (p->is_contiguous() && p->numel() == a.cols && (!weight || p->scalar_type() == weight->scalar_type()));
  };
  STD_TORCH_CHECK(fits(weight) && fits(bias), "pyvit: layer_norm: weight and bias must be contiguous, of ", a.cols,
                  " elements and one dtype");
  if (weight || bias) a.parameters = dtype_of(weight ? *weight : *bias);
  a.x = x.data_ptr();
  a.weight = data<char>(weight);
  a.bias = data<char>(bias);
  a.eps = float(eps);
  return a;
}
// Means, then reciprocal deviations, (2, rows).
void set_statistics(LayerNorm& a, const Tensor& statistics) {
  a.mean = vector(statistics, 2 * a.rows, "statistics");
  a.rstd = a.mean + a.rows;
}

void layer_norm(Tensor x, Maybe weight, Maybe bias, double eps, Tensor out, Maybe statistics) {
  LayerNorm a = layer_norm_of(x, out, weight, bias, eps);
  a.y = out.data_ptr();
  if (statistics) set_statistics(a, *statistics);
  if (x.numel()) kernels().layer_norm(a);
}

void layer_norm_backward(Tensor grad, Tensor x, Maybe weight, Tensor statistics, Tensor grad_x, Maybe grad_parameters) {
  LayerNorm a = layer_norm_of(x, grad, weight, std::nullopt, 0);
  set_statistics(a, statistics);
  STD_TORCH_CHECK(grad_x.is_contiguous() && grad_x.numel() == x.numel() && grad_x.scalar_type() == x.scalar_type(),
                  "pyvit: layer_norm: grad_x must be as x is");
  LayerNormGrad g{grad.data_ptr(), grad_x.data_ptr(), nullptr, nullptr};
  if (grad_parameters) {
    g.grad_weight = vector(*grad_parameters, 2 * a.cols, "grad_parameters");
    g.grad_bias = g.grad_weight + a.cols;
  }
  if (x.numel()) {
    kernels().layer_norm_backward(a, g);
  } else if (grad_parameters) {
    torch::stable::zero_(*grad_parameters);
  }
}

// linear layers

// weight (out, in) in the order `packed_layers` multiplies it in: 32-bit words, of no meaning elsewhere.
Tensor pack_layer(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "pyvit: pack_layer: weight must be a contiguous matrix");
  const int64_t out = weight.size(0), in = weight.size(1);
  const Dtype dtype = dtype_of(weight);
  Tensor packed = make(weight, {kernels().packed_layer_size(in, out, dtype)}, ScalarType::Int);
  kernels().pack_layer(weight.data_ptr(), in, out, dtype, static_cast<uint32_t*>(packed.data_ptr()));
  return packed;
}

Layer layer_of(const Tensor& x, int64_t in, const Tensor& packed, int64_t out, const Maybe& bias) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int && packed.is_contiguous() &&
                      packed.numel() == kernels().packed_layer_size(in, out, dtype_of(x)),
                  "pyvit: packed_layers: a weight packed for other sizes or another dtype");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == out && bias->scalar_type() == x.scalar_type()),
                  "pyvit: packed_layers: a bias must be contiguous, of the dtype of x and of ", out, " elements");
  return {static_cast<const uint32_t*>(packed.data_ptr()), data<char>(bias), in, out};
}

// out = residual + scale * layers(norm(x)), see csrc/cpu/linear.cpp. An activation "" is none.
void packed_layers(Tensor x, bool norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor first, int64_t first_out,
                   Maybe first_bias, std::string activation, Maybe second, int64_t second_out, Maybe second_bias,
                   Maybe scale, Maybe residual, Tensor out) {
  x = dense(x);
  STD_TORCH_CHECK(x.dim() > 0, "pyvit: packed_layers: x must have a last dimension");
  Layers a{};
  const int64_t in = x.size(x.dim() - 1), width = second ? second_out : first_out;
  a.rows = in ? x.numel() / in : 0;
  a.dtype = dtype_of(x);
  a.x = x.data_ptr();
  a.norm = norm;
  const auto fits = [&](const Maybe& p, int64_t n) { return !p || (p->is_contiguous() && p->numel() == n); };
  STD_TORCH_CHECK(fits(norm_weight, in) && fits(norm_bias, in) &&
                      (!norm_weight || !norm_bias || norm_weight->scalar_type() == norm_bias->scalar_type()),
                  "pyvit: packed_layers: the norm's parameters must be contiguous, of ", in, " elements and one dtype");
  if (norm_weight || norm_bias) a.norm_dtype = dtype_of(norm_weight ? *norm_weight : *norm_bias);
  a.norm_weight = data<char>(norm_weight);
  a.norm_bias = data<char>(norm_bias);
  a.eps = float(eps);
  a.first = layer_of(x, in, first, first_out, first_bias);
  if (second) a.second = layer_of(x, first_out, *second, second_out, second_bias);
  if (!activation.empty()) {
    a.activated = true;
    a.activation = kind_of(activation);
  }
  STD_TORCH_CHECK(fits(scale, width) && (!scale || scale->scalar_type() == x.scalar_type()) &&
                      fits(residual, a.rows * width) && (!residual || residual->scalar_type() == x.scalar_type()) &&
                      fits(out, a.rows * width) && out.scalar_type() == x.scalar_type(),
                  "pyvit: packed_layers: scale, residual and out must be contiguous, of the dtype of x and of the size "
                  "of the result's rows and of the result");
  a.scale = data<char>(scale);
  a.residual = data<char>(residual);
  a.out = out.data_ptr();
  if (out.numel()) kernels().layers(a);
}

// layout

void transposed(Tensor x, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "pyvit: transposed: x must be a contiguous matrix");
  const int64_t rows = x.size(0), cols = x.size(1);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == cols && out.size(1) == rows && out.is_contiguous() &&
                      out.scalar_type() == x.scalar_type(),
                  "pyvit: transposed: out must be contiguous, of the dtype of x and of its shape turned round");
  kernels().transpose({rows, cols, dtype_of(x) == Dtype::f32 ? 4 : 2, x.data_ptr(), out.data_ptr()});
}

// streaming losses: the tile of scores is contiguous float32, the rest float32 vectors of its rows or columns

void log_sum_exp(Tensor scores, int64_t dim, Tensor top, Tensor total) {
  const int64_t rows = scores.size(0), cols = scores.size(1), n = dim == 1 ? rows : cols;
  const float* p = vector(scores, rows * cols, "scores");
  const TileScores t{rows, cols, p, dim == 1, vector(top, n, "top"), vector(total, n, "total")};
  if (scores.numel()) kernels().log_sum_exp(t);
}

Distillation distillation_of(const Tensor& student, const Tensor& teacher, const Maybe& center, double student_temp,
                             double teacher_temp) {
  Distillation d{};
  d.s = student.size(0);
  d.t = teacher.size(0);
  d.rows = student.size(1);
  d.cols = student.size(2);
  d.student = vector(student, d.s * d.rows * d.cols, "student");
  d.teacher = vector(teacher, d.t * d.rows * d.cols, "teacher");
  if (center) d.center = vector(*center, d.cols, "center");
  d.student_scale = float(1 / student_temp);
  d.teacher_scale = float(1 / teacher_temp);
  return d;
}

void distillation_tile(Tensor student, Tensor teacher, Maybe center, double student_temp, double teacher_temp,
                       Tensor top_s, Tensor total_s, Tensor top_t, Tensor total_t, Tensor cross) {
  Distillation d = distillation_of(student, teacher, center, student_temp, teacher_temp);
  d.top_s = vector(top_s, d.s * d.rows, "top_s");
  d.total_s = vector(total_s, d.s * d.rows, "total_s");
  d.top_t = vector(top_t, d.t * d.rows, "top_t");
  d.total_t = vector(total_t, d.t * d.rows, "total_t");
  d.cross = vector(cross, d.s * d.t * d.rows, "cross");
  kernels().distillation(d);
}

void distillation_tile_backward(Tensor student, Tensor teacher, Maybe center, double student_temp, double teacher_temp,
                                Tensor lse_s, Tensor lse_t, Tensor weights, Tensor grad) {
  const Distillation d = distillation_of(student, teacher, center, student_temp, teacher_temp);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == student.numel() &&
                      (grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::BFloat16),
                  "pyvit: grad must be contiguous float32 or bfloat16 numbers, as many as student's");
  kernels().distillation_backward(d, {vector(lse_s, d.s * d.rows, "lse_s"), vector(lse_t, d.t * d.rows, "lse_t"),
                                      vector(weights, d.s * d.t * d.rows, "weights"), dtype_of(grad), grad.data_ptr()});
}

// a (n, k) b^T (m, k), or a b (k, m) where `down`, in float32
void product(Tensor a, Tensor b, bool down, Tensor out, bool add) {
  const int64_t n = a.size(0), m = b.size(down ? 1 : 0), k = a.size(1);
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && k == b.size(down ? 0 : 1) && a.scalar_type() == b.scalar_type() &&
                      a.is_contiguous() && b.is_contiguous(),
                  "pyvit: product: a and b must be contiguous matrices of one dtype that fit each other");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == n && out.size(1) == m && (m <= 1 || out.stride(1) == 1) &&
                      out.scalar_type() == ScalarType::Float,
                  "pyvit: product: out must be float32 of shape (", n, ", ", m, ") with contiguous rows");
  if (n * m == 0) return;
  if (k == 0) {
    if (!add) torch::stable::zero_(out);
    return;
  }
  kernels().product({n, m, k, dtype_of(a), a.data_ptr(), b.data_ptr(), k, down ? m : k, down,
                     static_cast<float*>(out.data_ptr()), out.stride(0), add});
}

// losses over all pairs of rows: one call for the rows of a and those of b, added to the caller's sums in place

Pairs pairs_of(const Tensor& a, const Tensor& b, bool own, int64_t shift, double scale) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                  "pyvit: pairs: a and b must be matrices with rows of the same length and dtype");
  Pairs p{};
  p.n = a.size(0);
  p.m = b.size(0);
  p.d = a.size(1);
  p.dtype = dtype_of(a);
  p.a = a.data_ptr();
  p.b = b.data_ptr();
  p.lda = a.stride(0);
  p.ldb = b.stride(0);
  p.own = own;
  p.shift = shift;
  p.scale = float(scale);
  return p;
}

float* gradient(const Maybe& t, const Pairs& p, int64_t n) {
  STD_TORCH_CHECK(!t || (t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->dim() == 2 &&
                         t->size(0) == n && t->size(1) == (p.d + 15) / 16 * 16),
                  "pyvit: gradients over pairs must be contiguous float32, rows padded to 16");
  return data<float>(t);
}

Tensor pair_softmax(Tensor a, Tensor b, bool own, double scale, Tensor top_a, Tensor total_a, Maybe top_b,
                    Maybe total_b) {
  a = rows(a);
  b = own ? a : rows(b);
  Pairs p = pairs_of(a, b, own, -1, scale);
  p.top_a = vector(top_a, p.n, "top_a");
  p.total_a = vector(total_a, p.n, "total_a");
  p.top_b = own ? p.top_a : top_b ? vector(*top_b, p.m, "top_b") : nullptr;
  p.total_b = own ? p.total_a : total_b ? vector(*total_b, p.m, "total_b") : nullptr;
  kernels().pairs(p);
  return total_a;
}

Tensor pair_softmax_backward(Tensor a, Tensor b, bool own, int64_t shift, double scale, Tensor lse_a, Tensor lse_b,
                             Tensor grad_a, Maybe grad_b) {
  a = rows(a);
  b = own ? a : rows(b);
  const Pairs p = pairs_of(a, b, own, shift, scale);
  PairsGrad g{vector(lse_a, p.n, "lse_a"), vector(lse_b, p.m, "lse_b"), gradient(grad_a, p, p.n),
              gradient(grad_b, p, p.m), grad_a.size(1)};
  if (own) g.grad_b = g.grad_a;
  kernels().pairs_backward(p, g);
  return grad_a;
}

Pairs sigmoid_pairs(const Tensor& a, const Tensor& b, int64_t shift, double scale, double bias, const Tensor& total) {
  Pairs p = pairs_of(a, b, false, shift, scale);
  p.sigmoid = true;
  p.bias = float(bias);
  p.total_a = vector(total, p.n, "total");
  return p;
}

Tensor pair_sigmoid(Tensor a, Tensor b, int64_t shift, double scale, double bias, Tensor total) {
  a = rows(a);
  b = rows(b);
  kernels().pairs(sigmoid_pairs(a, b, shift, scale, bias, total));
  return total;
}

Tensor pair_sigmoid_backward(Tensor a, Tensor b, int64_t shift, double scale, double bias, Tensor total, Tensor grad_a,
                             Tensor grad_b) {
  a = rows(a);
  b = rows(b);
  const Pairs p = sigmoid_pairs(a, b, shift, scale, bias, total);
  kernels().pairs_backward(p, {nullptr, nullptr, gradient(grad_a, p, p.n), gradient(grad_b, p, p.m), grad_a.size(1)});
  return total;
}

// the library about itself

std::string cpu_isa() { return isa_name(isa()); }
double fma_peak(bool bf16, double seconds) { return kernels().fma_peak(bf16 ? Dtype::bf16 : Dtype::f32, seconds); }
std::string cuda_archs() { return PYVIT_CUDA_ARCHS; }

// torch's pool.
void run_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
int count_threads() { return int(torch::stable::get_num_threads()); }
const bool threads_are_set = (threads = {run_threads, count_threads}, true);

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY(pyvit, m) {
#include "schemas.inc"
  // In place of out and grad_x, for pyvit/ops/activations.py: rows of x (..., C); returns the sums of grad_x's columns.
  m.def("activation(Tensor x, str name, Tensor(a!) out) -> ()");
  m.def("activation_backward(Tensor grad, Tensor x, str name, Tensor(a!) grad_x, Tensor(b!)? out) -> Tensor");
  // For pyvit/ops/layer_norm.py. statistics (2, rows), grad_parameters (2, C): float32.
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out, Tensor(b!)? statistics) -> ()");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor statistics, Tensor(a!) grad_x, "
      "Tensor(b!)? grad_parameters) -> ()");
  // For pyvit/ops/products.py.
  m.def("pack_layer(Tensor weight) -> Tensor");
  m.def(
      "packed_layers(Tensor x, bool norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor first, "
      "int first_out, Tensor? first_bias, str activation, Tensor? second, int second_out, Tensor? second_bias, "
      "Tensor? scale, Tensor? residual, Tensor(a!) out) -> ()");
  // For pyvit/ops/products.py and streaming.py.
  m.def("transposed(Tensor x, Tensor(a!) out) -> ()");
  // For pyvit/ops/streaming.py.
  m.def("product(Tensor a, Tensor b, bool down, Tensor(a!) out, bool add) -> ()");
  m.def("log_sum_exp(Tensor scores, int dim, Tensor(a!) top, Tensor(b!) total) -> ()");
  // For pyvit/ops/distillation.py. Scores (crops, N, K), lse, tops and totals (crops, N), cross and weights (S, T, N).
  m.def(
      "distillation_tile(Tensor student, Tensor teacher, Tensor? center, float student_temp, float teacher_temp, "
      "Tensor(a!) top_s, Tensor(b!) total_s, Tensor(c!) top_t, Tensor(d!) total_t, Tensor(e!) cross) -> ()");
  m.def(
      "distillation_tile_backward(Tensor student, Tensor teacher, Tensor? center, float student_temp, "
      "float teacher_temp, Tensor lse_s, Tensor lse_t, Tensor weights, Tensor(a!) grad) -> ()");
  // For pyvit/ops/flash_attention_qkvpacked.py.
  m.def(
      "flash_attention_qkvpacked_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, "
      "Tensor qkv, Tensor? bias, bool is_causal, float scale) -> (Tensor, Tensor)");
  // For pyvit/ops/pairs.py.
  m.def(
      "pair_softmax(Tensor a, Tensor b, bool own, float scale, Tensor(a!) top_a, Tensor(b!) total_a, "
      "Tensor(c!)? top_b, Tensor(d!)? total_b) -> Tensor(b!)");
  m.def(
      "pair_softmax_backward(Tensor a, Tensor b, bool own, int shift, float scale, Tensor lse_a, Tensor lse_b, "
      "Tensor(a!) grad_a, Tensor(b!)? grad_b) -> Tensor(a!)");
  m.def("pair_sigmoid(Tensor a, Tensor b, int shift, float scale, float bias, Tensor(a!) total) -> Tensor(a!)");
  m.def(
      "pair_sigmoid_backward(Tensor a, Tensor b, int shift, float scale, float bias, Tensor(a!) total, "
      "Tensor(b!) grad_a, Tensor(c!) grad_b) -> Tensor(a!)");
  m.def("cpu_isa() -> str");
  m.def("cuda_archs() -> str");
  m.def("fma_peak(bool bf16, float seconds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("flash_attention", TORCH_BOX(&pyvit::flash_attention));
  m.impl("flash_attention_backward", TORCH_BOX(&pyvit::flash_attention_backward));
  m.impl("flash_attention_varlen", TORCH_BOX(&pyvit::flash_attention_varlen));
  m.impl("flash_attention_varlen_backward", TORCH_BOX(&pyvit::flash_attention_varlen_backward));
  m.impl("attention_map", TORCH_BOX(&pyvit::attention_map));
  m.impl("window_attention", TORCH_BOX(&pyvit::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&pyvit::window_attention_backward));
  m.impl("patch_embed", TORCH_BOX(&pyvit::patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&pyvit::patch_embed_backward));
  m.impl("flash_attention_qkvpacked_backward", TORCH_BOX(&pyvit::flash_attention_qkvpacked_backward));
  m.impl("pack_layer", TORCH_BOX(&pyvit::pack_layer));
  m.impl("packed_layers", TORCH_BOX(&pyvit::packed_layers));
  m.impl("transposed", TORCH_BOX(&pyvit::transposed));
  m.impl("product", TORCH_BOX(&pyvit::product));
  m.impl("log_sum_exp", TORCH_BOX(&pyvit::log_sum_exp));
  m.impl("distillation_tile", TORCH_BOX(&pyvit::distillation_tile));
  m.impl("distillation_tile_backward", TORCH_BOX(&pyvit::distillation_tile_backward));
  m.impl("activation", TORCH_BOX(&pyvit::activation));
  m.impl("activation_backward", TORCH_BOX(&pyvit::activation_backward));
  m.impl("layer_norm", TORCH_BOX(&pyvit::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&pyvit::layer_norm_backward));
  m.impl("pair_softmax", TORCH_BOX(&pyvit::pair_softmax));
  m.impl("pair_softmax_backward", TORCH_BOX(&pyvit::pair_softmax_backward));
  m.impl("pair_sigmoid", TORCH_BOX(&pyvit::pair_sigmoid));
  m.impl("pair_sigmoid_backward", TORCH_BOX(&pyvit::pair_sigmoid_backward));
}

STABLE_TORCH_LIBRARY_IMPL(pyvit, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&pyvit::cpu_isa));
  m.impl("cuda_archs", TORCH_BOX(&pyvit::cuda_archs));
  m.impl("fma_peak", TORCH_BOX(&pyvit::fma_peak));
}
