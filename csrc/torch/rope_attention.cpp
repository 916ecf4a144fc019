// Attention whose queries and keys are normalised and rotated as they are loaded: pyvit/ops/rope_attention.py.
#include <cstring>
#include <tuple>

#include "attention_tensors.h"

namespace pyvit {
namespace {

QkTransform::Norm norm_of(const std::string& name) {
  constexpr const char* NAMES[] = {"none", "layer", "rms"};
  const auto* found = std::find(std::begin(NAMES), std::end(NAMES), name);
  STD_TORCH_CHECK(found != std::end(NAMES), "pyvit: rope_attention: qk_norm must be one of none, layer and rms, got '",
                  name, "'");
  return QkTransform::Norm(found - std::begin(NAMES));
}

// Whether the second half of every row of float32 `rope` repeats the first, as it does for angles of pairs: then half
// of it need not be read. A look at each number costs less than one head's rows do.
bool same_halves(const Tensor& rope) {
  const int64_t half = rope.size(4) / 2;
  for (int64_t b = 0; b < rope.size(0); b++)
    for (int64_t h = 0; h < rope.size(1); h++)
      for (int64_t n = 0; n < rope.size(2); n++)
        for (int64_t i = 0; i < 2; i++) {
          const float* row =
              data<float>(rope) + b * rope.stride(0) + h * rope.stride(1) + n * rope.stride(2) + i * rope.stride(3);
          if (std::memcmp(row, row + half, half * sizeof(float)) != 0) return false;
        }
  return true;
}

// The arguments of a call, checked, and as the kernels take them.
struct RopeCall {
  Tensor q, k, v;
  Maybe rope, q_weight, q_bias, k_weight, k_bias;
  Ints cu;
  int64_t longest;
  QkTransform transform{};

  RopeCall(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Maybe& rope_,
           const Maybe& q_weight_, const Maybe& q_bias_, const Maybe& k_weight_, const Maybe& k_bias_,
           const Maybe& cu_seqlens, int64_t max_seqlen, const Maybe& bias, const std::string& qk_norm, double eps,
           int64_t prefix, bool interleaved)
      : q(q_), k(k_), v(v_), longest(max_seqlen) {
    const Checks checks(op);
    const bool packed = cu_seqlens.has_value();
    if (packed) {
      checks.packed(q, k, v, *cu_seqlens, *cu_seqlens, max_seqlen, max_seqlen, bias);
      checks.that(k.size(0) == q.size(0), "k", "of as many tokens as q");
    } else {
      checks.attention(q, k, v, bias);
    }
    check_channels(checks, q, v);
    const int64_t d = q.size(q.dim() - 1), tokens = q.size(packed ? 0 : 2);
    transform.norm = norm_of(qk_norm);
    transform.eps = float(eps);
    for (const auto& [name, t] :
         {std::pair<const char*, const Maybe&>("q_weight", q_weight_), {"k_weight", k_weight_}}) {
      checks.parameter(name, t, q, {d});
      checks.that(!t || transform.norm != QkTransform::none, name, "None without qk_norm");
    }
    for (const auto& [name, t] : {std::pair<const char*, const Maybe&>("q_bias", q_bias_), {"k_bias", k_bias_}}) {
      checks.parameter(name, t, q, {d});
      checks.that(!t || transform.norm == QkTransform::layer, name, "None unless qk_norm is layer");
    }
    checks.that(prefix >= 0 && prefix <= tokens && (!prefix || (rope_ && !packed)), "num_prefix_tokens",
                "0, or with a rope at most the tokens of a dense batch");
    if (rope_) {
      checks.that(packed || k.size(2) == tokens, "k", "of as many tokens as q");
      checks.parameter("rope", rope_, q, {ANY, ANY, tokens - prefix, 2, ANY});
      const int64_t rotated = rope_->size(4), batch = rope_->size(0), heads = rope_->size(1);
      checks.that(rotated > 0 && rotated % 2 == 0 && rotated <= d, "rope",
                  "of an even number of channels, at most q's");
      checks.that(batch == 1 || (!packed && batch == q.size(0)), "rope", "of one batch entry, or as many as q");
      checks.that(heads == 1 || (heads == q.size(1) && heads == k.size(1)), "rope",
                  "of one head, or as many as q and k");
    }
    q = rows(q);
    k = rows(k);
    v = rows(v);
    rope = rope_ && rope_->scalar_type() != ScalarType::Float ? parameter(rope_) : rope_;
    if (rope) rope = rows(*rope);
    q_weight = parameter(q_weight_);
    q_bias = parameter(q_bias_);
    k_weight = parameter(k_weight_);
    k_bias = parameter(k_bias_);
    if (packed) cu = lengths(op, *cu_seqlens, q.size(0), longest, "cu_seqlens");
    transform.q_weight = data<float>(q_weight);
    transform.q_bias = data<float>(q_bias);
    transform.k_weight = data<float>(k_weight);
    transform.k_bias = data<float>(k_bias);
    transform.prefix = prefix;
    transform.interleaved = interleaved;
    if (!rope) return;
    transform.rope = data<float>(rope);
    transform.rotated = rope->size(4);
    transform.rope_b = rope->size(0) == 1 ? 0 : rope->stride(0);
    transform.rope_h = rope->size(1) == 1 ? 0 : rope->stride(1);
    transform.rope_n = rope->stride(2);
    transform.rope_cos = rope->stride(3);
    transform.same_halves = !interleaved && same_halves(*rope);
  }

  bool packed() const { return q.dim() == 3; }
  Attention attention(const Tensor& out, const Tensor& lse, const Maybe& bias, bool causal, double scale) const {
    Attention a = attention_of(q, k, v, out, lse, bias, causal, scale);
    if (packed()) set_lengths(a, cu, cu, longest, longest);
    if (transform.rope || transform.norm != QkTransform::none) a.transform = &transform;
    return a;
  }
};

std::tuple<Tensor, Tensor> rope_attention(Tensor q, Tensor k, Tensor v, Maybe rope, Maybe q_weight, Maybe q_bias,
                                          Maybe k_weight, Maybe k_bias, Maybe cu_seqlens, int64_t max_seqlen,
                                          Maybe bias, std::string qk_norm, double eps, int64_t num_prefix_tokens,
                                          bool interleaved, bool is_causal, double scale, std::string backend) {
  check_backend(backend);
  const RopeCall call("rope_attention", q, k, v, rope, q_weight, q_bias, k_weight, k_bias, cu_seqlens, max_seqlen, bias,
                      qk_norm, eps, num_prefix_tokens, interleaved);
  const bool packed = call.packed();
  Tensor out =
      packed ? make(q, {q.size(0), q.size(1), v.size(2)}) : make_heads(q, q.size(0), q.size(1), q.size(2), v.size(3));
  Tensor lse = packed ? make(q, {q.size(1), q.size(0)}, ScalarType::Float)
                      : make(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (q.numel()) kernels().attention(call.attention(out, lse, bias, is_causal, scale));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rope_attention_backward(
    Tensor grad_out, Maybe grad_lse, Tensor out, Tensor lse, bool rope_grad, bool bias_grad, Tensor q, Tensor k,
    Tensor v, Maybe rope, Maybe q_weight, Maybe q_bias, Maybe k_weight, Maybe k_bias, Maybe cu_seqlens,
    int64_t max_seqlen, Maybe bias, std::string qk_norm, double eps, int64_t num_prefix_tokens, bool interleaved,
    bool is_causal, double scale, std::string backend) {
  check_backend(backend);
  const RopeCall call("rope_attention_backward", q, k, v, rope, q_weight, q_bias, k_weight, k_bias, cu_seqlens,
                      max_seqlen, bias, qk_norm, eps, num_prefix_tokens, interleaved);
  const bool packed = call.packed();
  const Checks checks("rope_attention_backward");
  checks.results(grad_out, grad_lse, out, lse, bias_grad, q, v, bias, packed);
  checks.that(!rope_grad || rope, "rope_grad", "false without a rope");
  out = rows(out);
  grad_out = rows(grad_out);
  lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  const auto like = [&](const Tensor& t) { return packed ? make(t, shape_of(t)) : heads_like(t); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const bool work = q.numel() && k.numel();
  Tensor dbias = !bias_grad ? none(q) : work ? make(*bias, shape_of(*bias)) : zeros(*bias, shape_of(*bias));
  Maybe drope = rope_grad ? zeros_like(rope) : Maybe(), dqw = zeros_like(q_weight), dqb = zeros_like(q_bias),
        dkw = zeros_like(k_weight), dkb = zeros_like(k_bias);
  if (work) {
    AttentionGrad g = gradient_of(grad_out, grad_lse, dq, dk, dv, bias_grad ? Maybe(dbias) : Maybe());
    g.grad_q_weight = data<float>(dqw);
    g.grad_q_bias = data<float>(dqb);
    g.grad_k_weight = data<float>(dkw);
    g.grad_k_bias = data<float>(dkb);
    g.grad_rope = data<float>(drope);
    if (drope) {
      g.rope_b = drope->size(0);
      g.rope_h = drope->size(1);
    }
    g.tokens = q.size(packed ? 0 : 2);
    kernels().attention_backward(call.attention(out, lse, bias, is_causal, scale), g);
  } else {
    for (Tensor* t : {&dq, &dk, &dv}) torch::stable::zero_(*t);
  }
  return {dq,
          dk,
          dv,
          as_parameter(drope, rope_grad ? rope : Maybe(), q),
          as_parameter(dqw, q_weight, q),
          as_parameter(dqb, q_bias, q),
          as_parameter(dkw, k_weight, q),
          as_parameter(dkb, k_bias, q),
          dbias};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CPU, m) {
  m.impl("rope_attention", TORCH_BOX(&pyvit::rope_attention));
  m.impl("rope_attention_backward", TORCH_BOX(&pyvit::rope_attention_backward));
}
