// Schemas and CPU kernels of torch.ops.pyvit, on LibTorch's stable ABI: one binary for every torch >= 2.10 and every
// Python.
//
// pyvit/ops checks its arguments before a call gets here, and says more where they do not fit; others call these
// operators too, so that each entry checks (checks.h) what its kernel relies on.
#include <algorithm>
#include <tuple>

#include "../cpu/parallel.h"
#include "attention_tensors.h"
#include "build_facts.h"

namespace pyvit {
namespace {

void check_dropout(double dropout_p) {
  STD_TORCH_CHECK(dropout_p == 0, "pyvit: the cpu kernels have no dropout; use backend='reference'");
}

std::tuple<Tensor, Tensor> flash_attention(Tensor q, Tensor k, Tensor v, Maybe bias, bool is_causal, double scale,
                                           double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  const Checks checks("flash_attention");
  checks.attention(q, k, v, bias);
  check_channels(checks, q, v);
  q = rows(q);
  k = rows(k);
  v = rows(v);
  Tensor out = make_heads(q, q.size(0), q.size(1), q.size(2), v.size(3));
  Tensor lse = make(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (q.numel()) kernels().attention(attention_of(q, k, v, out, lse, bias, is_causal, scale));
  return {out, lse};
}

// The gradients of q, k and v into tensors of any strides but in their last dimension; returns the bias's.
Tensor flash_attention_backward_(Tensor grad_out, Maybe grad_lse, Tensor out, Tensor lse, bool bias_grad, Tensor q,
                                 Tensor k, Tensor v, Maybe bias, bool is_causal, double scale, Tensor dq, Tensor dk,
                                 Tensor dv) {
  const Checks checks("flash_attention_backward");
  checks.results(grad_out, grad_lse, out, lse, bias_grad, q, v, bias, false);
  check_channels(checks, q, v);
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
                                 gradient_of(grad_out, grad_lse, dq, dk, dv, bias_grad ? Maybe(dbias) : Maybe()));
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
  Checks("flash_attention_backward").attention(q, k, v, bias);
  Tensor dq = heads_like(q);
  Tensor dk = heads_like(k);
  Tensor dv = heads_like(v);
  Tensor dbias =
      flash_attention_backward_(grad_out, grad_lse, out, lse, bias_grad, q, k, v, bias, is_causal, scale, dq, dk, dv);
  return {dq, dk, dv, dbias};
}

// As above for q, k and v that are parts of qkv (B, N, 3, H, D), whose gradient is of one piece.
std::tuple<Tensor, Tensor> flash_attention_qkvpacked_backward(Tensor grad_out, Maybe grad_lse, Tensor out, Tensor lse,
                                                              bool bias_grad, Tensor qkv, Maybe bias, bool is_causal,
                                                              double scale) {
  const Checks checks("flash_attention_qkvpacked_backward");
  checks.shape("qkv", qkv, {ANY, ANY, 3, ANY, ANY});
  auto part = [](const Tensor& t, int64_t i) { return torch::stable::transpose(torch::stable::select(t, 2, i), 1, 2); };
  checks.attention(part(qkv, 0), part(qkv, 1), part(qkv, 2), bias);
  Tensor grad = make(qkv, shape_of(qkv));
  Tensor dbias =
      flash_attention_backward_(grad_out, grad_lse, out, lse, bias_grad, part(qkv, 0), part(qkv, 1), part(qkv, 2), bias,
                                is_causal, scale, part(grad, 0), part(grad, 1), part(grad, 2));
  return {grad, dbias};
}

std::tuple<Tensor, Tensor> flash_attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                                  Tensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                  Maybe bias, bool is_causal, double scale, std::string backend) {
  check_backend(backend);
  const Checks checks("flash_attention_varlen");
  checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias);
  check_channels(checks, q, v);
  const Ints cu_q = lengths("flash_attention_varlen", cu_seqlens_q, q.size(0), max_seqlen_q, "cu_seqlens_q");
  const Ints cu_k = lengths("flash_attention_varlen", cu_seqlens_k, k.size(0), max_seqlen_k, "cu_seqlens_k");
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
  const Checks checks("flash_attention_varlen_backward");
  checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, bias);
  checks.results(grad_out, grad_lse, out, lse, bias_grad, q, v, bias, true);
  check_channels(checks, q, v);
  const Ints cu_q = lengths("flash_attention_varlen", cu_seqlens_q, q.size(0), max_seqlen_q, "cu_seqlens_q");
  const Ints cu_k = lengths("flash_attention_varlen", cu_seqlens_k, k.size(0), max_seqlen_k, "cu_seqlens_k");
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
    kernels().attention_backward(a, gradient_of(grad_out, grad_lse, dq, dk, dv, bias_grad ? Maybe(dbias) : Maybe()));
  } else {
    for (Tensor* t : {&dq, &dk, &dv}) torch::stable::zero_(*t);
  }
  return {dq, dk, dv, dbias};
}

Tensor attention_map(Tensor q, Tensor k, Tensor rows_index, Maybe bias, double scale, std::string backend) {
  check_backend(backend);
  const Checks checks("attention_map");
  checks.queries_and_keys(q, k, false);
  check_channels(checks, q, k);
  checks.shape("rows", rows_index, {q.size(0), ANY});
  checks.dtype("rows", rows_index, {ScalarType::Long}, "int64");
  checks.device("rows", rows_index, q);
  checks.bias(bias, q, {q.size(0), q.size(1), q.size(2), k.size(2)});
  q = rows(q);
  k = rows(k);
  rows_index = dense(rows_index);
  Tensor out = make(q, {q.size(0), q.size(1), rows_index.size(1), k.size(2)});
  const int64_t* index = data<int64_t>(rows_index);
  for (int64_t i = 0; i < rows_index.numel(); i++)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < q.size(2), "pyvit: attention_map: rows must be in [0, ", q.size(2),
                    "), got ", index[i]);
  if (!out.numel()) return out;
  AttentionMap m{};
  m.batch = q.size(0);
  m.heads = q.size(1);
  m.kv_heads = k.size(1);
  m.nq = q.size(2);
  m.nk = k.size(2);
  m.d = q.size(3);
  m.rows = rows_index.size(1);
  m.dtype = dtype_of(q);
  m.q = tokens(q);
  m.k = tokens(k);
  m.out = tokens(out);
  m.index = index;
  m.index_b = rows_index.size(1);
  m.bias = bias_of(bias);
  m.scale = float(scale);
  kernels().attention_map(m);
  return out;
}

// window attention

Map map_of(const Tensor& t) {
  Map a{};
  a.data = t.data_ptr();
  a.b = t.stride(0);
  a.y = t.stride(1);
  a.x = t.stride(2);
  return a;
}

Window window_of(const Tensor& qkv, const Ints& window, const Ints& shift, int64_t heads, const Maybe& table,
                 const Maybe& logit_scale, const Maybe& pad, double scale, const Tensor& out, const Tensor& lse) {
  Window w{};
  w.batch = qkv.size(0);
  w.height = qkv.size(1);
  w.width = qkv.size(2);
  w.heads = heads;
  w.d = qkv.size(3) / 3 / heads;
  w.wh = window[0];
  w.ww = window[1];
  w.sy = shift[0];
  w.sx = shift[1];
  w.dtype = dtype_of(qkv);
  w.qkv = map_of(qkv);
  w.out = map_of(out);
  w.table = data<float>(table);
  w.logit_scale = data<float>(logit_scale);
  w.pad = data<float>(pad);
  w.scale = float(scale);
  w.lse = data<float>(lse);
  return w;
}

std::tuple<Tensor, Tensor> window_attention(Tensor qkv, Ints window_size, Ints shift_size, int64_t num_heads,
                                            Maybe bias_table, Maybe logit_scale, Maybe pad_qkv, double scale,
                                            double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  Checks("window_attention").window(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv);
  qkv = rows(qkv);
  bias_table = parameter(bias_table);
  logit_scale = parameter(logit_scale);
  pad_qkv = parameter(pad_qkv);
  const int64_t b = qkv.size(0), h = qkv.size(1), w = qkv.size(2), area = window_size[0] * window_size[1];
  Tensor out = make(qkv, {b, h, w, qkv.size(3) / 3});
  Tensor lse = make(qkv, {b, window_count(qkv, window_size), num_heads, area}, ScalarType::Float);
  if (qkv.numel())
    kernels().window(
        window_of(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv, scale, out, lse));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(Tensor grad_out, Tensor out, Tensor lse,
                                                                     Tensor qkv, Ints window_size, Ints shift_size,
                                                                     int64_t num_heads, Maybe bias_table,
                                                                     Maybe logit_scale, Maybe pad_qkv, double scale,
                                                                     double dropout_p, Maybe, std::string backend) {
  check_backend(backend);
  check_dropout(dropout_p);
  const Checks checks("window_attention_backward");
  checks.window(qkv, window_size, shift_size, num_heads, bias_table, logit_scale, pad_qkv);
  checks.window_results(grad_out, out, lse, qkv, window_size, num_heads);
  qkv = rows(qkv);
  grad_out = rows(grad_out);
  out = rows(out);
  lse = dense(lse);
  const Maybe table = parameter(bias_table), logits = parameter(logit_scale), pad = parameter(pad_qkv);
  Tensor grad_qkv = make(qkv, shape_of(qkv));
  Maybe grad_table = zeros_like(bias_table), grad_logits = zeros_like(logit_scale), grad_pad = zeros_like(pad_qkv);
  WindowGrad g{};
  g.grad_out = map_of(grad_out);
  g.grad_qkv = map_of(grad_qkv);
  g.grad_table = data<float>(grad_table);
  g.grad_logit_scale = data<float>(grad_logits);
  g.grad_pad = data<float>(grad_pad);
  if (qkv.numel())
    kernels().window_backward(window_of(qkv, window_size, shift_size, num_heads, table, logits, pad, scale, out, lse),
                              g);
  return {grad_qkv, as_parameter(grad_table, bias_table, qkv), as_parameter(grad_logits, logit_scale, qkv),
          as_parameter(grad_pad, pad_qkv, qkv)};
}

// patch embedding

struct PatchTensors {
  Tensor images, weight;
  Maybe bias, pos, prefix, keep, mean, std;

  PatchTensors(const Tensor& images_, const Tensor& weight_, const Maybe& bias_, const Maybe& pos_,
               const Maybe& prefix_, const Maybe& keep_, const Maybe& mean_, const Maybe& std_)
      : images(images_),
        weight(dense(weight_)),
        bias(parameter(bias_)),
        pos(parameter(pos_)),
        prefix(parameter(prefix_)),
        keep(dense(keep_)),
        mean(parameter(mean_)),
        std(parameter(std_)) {}

  // The kernels' view, but for the result.
  Patch view(const Ints& stride) const {
    const int64_t h = images.size(2), w = images.size(3), ph = weight.size(2), pw = weight.size(3);
    const int64_t all = ((h - ph) / stride[0] + 1) * ((w - pw) / stride[1] + 1);
    if (keep) {
      const int64_t* k = data<int64_t>(keep);
      for (int64_t i = 0; i < keep->numel(); i++)
        STD_TORCH_CHECK(k[i] >= 0 && k[i] < all, "pyvit: patch_embed: keep must be in [0, ", all, "), got ", k[i]);
    }
    Patch p{};
    p.batch = images.size(0);
    p.channels = images.size(1);
    p.height = h;
    p.width = w;
    p.dim = weight.size(0);
    p.ph = ph;
    p.pw = pw;
    p.sh = stride[0];
    p.sw = stride[1];
    p.prefix_tokens = prefix ? prefix->size(0) : 0;
    p.kept = keep ? keep->size(1) : all;
    p.dtype = dtype_of(weight);
    p.images = images.data_ptr();
    p.bytes = images.scalar_type() == ScalarType::Byte;
    p.image_b = images.stride(0);
    p.image_c = images.stride(1);
    p.image_y = images.stride(2);
    p.image_x = images.stride(3);
    p.weight = weight.data_ptr();
    p.bias = data<float>(bias);
    p.pos = data<float>(pos);
    p.prefix = data<float>(prefix);
    p.keep = data<int64_t>(keep);
    p.mean = data<float>(mean);
    p.std = data<float>(std);
    return p;
  }
};

Tensor patch_embed(Tensor images, Tensor weight, Maybe bias, Ints stride, Maybe pos_embed, Maybe prefix, Maybe keep,
                   Maybe mean, Maybe std, std::string backend) {
  check_backend(backend);
  Checks("patch_embed").patches(images, weight, bias, stride, pos_embed, prefix, keep, mean, std);
  const PatchTensors t(images, weight, bias, pos_embed, prefix, keep, mean, std);
  Patch p = t.view(stride);
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
  Checks("patch_embed_backward")
      .patch_results(grad_out, images_grad, images, weight, bias, stride, pos_embed, prefix, keep, mean, std);
  const PatchTensors t(images, weight, bias, pos_embed, prefix, keep, mean, std);
  grad_out = dense(grad_out);
  const Patch p = t.view(stride);
  Maybe d_images = images_grad ? zeros_like(images) : Maybe(), d_weight = weight_grad ? zeros_like(weight) : Maybe();
  Maybe d_bias = zeros_like(bias), d_pos = zeros_like(pos_embed), d_prefix = zeros_like(prefix);
  PatchGrad g{};
  g.grad_out = grad_out.data_ptr();
  g.grad_images = data<float>(d_images);
  g.grad_weight = data<float>(d_weight);
  g.grad_bias = data<float>(d_bias);
  g.grad_pos = data<float>(d_pos);
  g.grad_prefix = data<float>(d_prefix);
  if (grad_out.numel()) kernels().patch_backward(p, g);
  return {as_parameter(d_images, images_grad ? Maybe(images) : Maybe(), weight),
          as_parameter(d_weight, weight_grad ? Maybe(weight) : Maybe(), weight), as_parameter(d_bias, bias, weight),
          as_parameter(d_pos, pos_embed, weight), as_parameter(d_prefix, prefix, weight)};
}

// the library about itself

std::string cpu_isa() { return isa_name(isa()); }
std::string int8_isa_name() { return isa_name(int8_isa()); }
double fma_peak(bool bf16, double seconds) { return kernels().fma_peak(bf16 ? Dtype::bf16 : Dtype::f32, seconds); }
std::string cuda_archs() { return PYVIT_CUDA_ARCHS; }
// csrc/cuda/digests.py
std::string cuda_digests() { return PYVIT_CUDA_DIGESTS; }

// torch's pool.
void run_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
int count_threads() { return int(torch::stable::get_num_threads()); }
const bool threads_are_set = (threads = {run_threads, count_threads}, true);

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY(PYVIT_NAMESPACE, m) {
#include "schemas.inc"
  // For pyvit/ops/flash_attention_qkvpacked.py.
  m.def(
      "flash_attention_qkvpacked_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, "
      "Tensor qkv, Tensor? bias, bool is_causal, float scale) -> (Tensor, Tensor)");
  m.def("cpu_isa() -> str");
  m.def("int8_isa() -> str");
  m.def("cuda_archs() -> str");
  m.def("cuda_digests() -> str");
  m.def("fma_peak(bool bf16, float seconds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CPU, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&pyvit::cpu_isa));
  m.impl("int8_isa", TORCH_BOX(&pyvit::int8_isa_name));
  m.impl("cuda_archs", TORCH_BOX(&pyvit::cuda_archs));
  m.impl("cuda_digests", TORCH_BOX(&pyvit::cuda_digests));
  m.impl("fma_peak", TORCH_BOX(&pyvit::fma_peak));
}
