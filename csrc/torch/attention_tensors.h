// The arguments of the CPU kernels of attention, from tensors.
#pragma once

#include "cpu_tensors.h"

namespace pyvit {

// The kernels' registers and scratch are laid out for so many channels.
constexpr int64_t MAX_CHANNELS = 256;

inline void check_backend(const std::string& backend) {
  STD_TORCH_CHECK(backend == "auto" || backend == "cpu", "pyvit: backend '", backend,
                  "' cannot run on cpu tensors through torch.ops");
}

inline void check_channels(const Checks& checks, const Tensor& q, const Tensor& v) {
  checks.that(q.size(q.dim() - 1) <= MAX_CHANNELS && v.size(v.dim() - 1) <= MAX_CHANNELS, "q and v",
              "of at most 256 channels per head");
}

// (B, H, N, D) and packed (T, H, D).
inline Tokens tokens(const Tensor& t) {
  const bool packed = t.dim() == 3;
  Tokens a{};
  a.data = t.data_ptr();
  a.b = packed ? 0 : t.stride(0);
  a.h = t.stride(1);
  a.n = t.stride(packed ? 0 : 2);
  return a;
}

// (B, H, Nq, Nk), or the last of these dimensions.
inline Bias bias_of(const Maybe& bias) {
  if (!bias) return {};
  const auto stride = [&](int64_t i) {
    i += bias->dim() - 4;
    return i < 0 || bias->size(i) == 1 ? 0 : bias->stride(i);
  };
  Bias a{};
  a.data = bias->data_ptr();
  a.dtype = bias->scalar_type() == ScalarType::Bool ? Dtype::boolean : dtype_of(*bias);
  a.b = stride(0);
  a.h = stride(1);
  a.q = stride(2);
  a.k = stride(3);
  return a;
}

inline Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
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
  a.lse = data<float>(lse);
  a.lse_b = packed ? 0 : lse.stride(0);
  a.lse_h = lse.stride(packed ? 0 : 1);
  return a;
}

// Fills in what all backward forms share; grad_bias is dense.
inline AttentionGrad gradient_of(const Tensor& grad_out, const Maybe& grad_lse, const Tensor& dq, const Tensor& dk,
                                 const Tensor& dv, const Maybe& dbias = {}) {
  AttentionGrad g{};
  g.grad_out = tokens(grad_out);
  g.grad_q = tokens(dq);
  g.grad_k = tokens(dk);
  g.grad_v = tokens(dv);
  g.grad_lse = data<float>(grad_lse);
  if (dbias) {
    g.grad_bias = dbias->data_ptr();
    g.bias_b = dbias->size(0);
    g.bias_h = dbias->size(1);
    g.bias_q = dbias->size(2);
    g.bias_k = dbias->size(3);
  }
  return g;
}

// Uninitialised, of the shape of t (B, H, N, D).
inline Tensor heads_like(const Tensor& t) { return make_heads(t, t.size(0), t.size(1), t.size(2), t.size(3)); }

// The cumulative lengths as int64 on the host's side, checked: the kernels index with them. `longest` becomes the
// longest there is: work is divided by it.
inline Ints lengths(const char* op, const Tensor& cu, int64_t total, int64_t& longest, const char* name) {
  Tensor wide = dense(cu.scalar_type() == ScalarType::Long ? cu : torch::stable::to(cu, ScalarType::Long));
  const int64_t* p = data<int64_t>(wide);
  Ints ends(p, p + wide.numel());
  bool good = !ends.empty() && ends.front() == 0 && ends.back() == total;
  int64_t most = 0;
  for (size_t i = 1; good && i < ends.size(); i++) {
    good = ends[i] >= ends[i - 1] && ends[i] - ends[i - 1] <= longest;
    most = std::max(most, ends[i] - ends[i - 1]);
  }
  STD_TORCH_CHECK(good, "pyvit: ", op, ": ", name, " must ascend from 0 to ", total, " in steps of at most ", longest);
  longest = most;
  return ends;
}

inline void set_lengths(Attention& a, const Ints& cu_q, const Ints& cu_k, int64_t max_q, int64_t max_k) {
  a.batch = int64_t(cu_q.size()) - 1;
  a.nq = max_q;
  a.nk = max_k;
  a.cu_q = cu_q.data();
  a.cu_k = cu_k.data();
}

// A float32 gradient in the dtype of the parameter it belongs to; empty when there is no such parameter.
inline Tensor as_parameter(const Maybe& grad, const Maybe& given, const Tensor& like) {
  if (!given) return none(like);
  return given->scalar_type() == ScalarType::Float ? *grad : torch::stable::to(*grad, given->scalar_type());
}
inline Maybe zeros_like(const Maybe& t) { return t ? Maybe(zeros(*t, shape_of(*t), ScalarType::Float)) : Maybe(); }

}  // namespace pyvit
