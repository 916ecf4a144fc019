// Dense and packed attention as a Problem of attention.cuh: strides, grouped heads, bias of any broadcast, causal mask.
#pragma once

#include "attention.cuh"

namespace pyvit::cuda {

// Whether scores are products before `scale`: nothing is added to them, and the largest is the largest product.
__host__ __device__ inline bool raw_scores(const Attention& f) {
  return (f.bias == nullptr || f.bias_type == Type::boolean) && f.scale > 0.0f;
}
inline void set_units(Attention& f) { f.natural = raw_scores(f) ? f.scale : 1.0f, f.unit = f.natural * kLog2e; }

template <class Element>
struct Dense {
  using T = Element;
  using Params = AttentionGradient;

  const Params& p;
  int head, nq, nk, d, dv;
  float scale;
  bool raw;
  int sequence = 0, kv_head = 0;
  int64_t q_first = 0, k_first = 0;

  PYVIT_DEVICE Dense(const Params& params, int first_head)
      : p(params),
        nq(params.forward.nq),
        nk(params.forward.nk),
        d(params.forward.d),
        dv(params.forward.dv),
        scale(params.forward.scale),
        raw(raw_scores(params.forward)) {
    set_head(first_head);
  }
  PYVIT_DEVICE void set_head(int h) {
    head = h;
    kv_head = h / queries_per_key_head(p);
  }
  PYVIT_DEVICE float natural() const { return p.forward.natural; }
  PYVIT_DEVICE float unit() const { return p.forward.unit; }
  PYVIT_DEVICE void use(char*) {}
  PYVIT_DEVICE static int queries_per_key_head(const Params& params) {
    return params.forward.heads / params.forward.kv_heads;
  }
  PYVIT_DEVICE int count() const { return p.forward.batch; }
  PYVIT_DEVICE int heads() const { return p.forward.heads; }
  PYVIT_DEVICE int most_queries() const { return p.forward.nq; }
  PYVIT_DEVICE int most_keys() const { return p.forward.nk; }
  PYVIT_DEVICE int64_t offset(const void* cu, int s) const {
    return p.forward.cu_int64 ? static_cast<const int64_t*>(cu)[s] : static_cast<const int32_t*>(cu)[s];
  }
  PYVIT_DEVICE void begin(int index) {
    sequence = index;
    if (p.forward.cu_seqlens_q == nullptr) return;
    q_first = offset(p.forward.cu_seqlens_q, index);
    k_first = offset(p.forward.cu_seqlens_k, index);
    nq = int(offset(p.forward.cu_seqlens_q, index + 1) - q_first);
    nk = int(offset(p.forward.cu_seqlens_k, index + 1) - k_first);
  }
  PYVIT_DEVICE int last_key(int query_end) const { return p.forward.causal ? min(nk, query_end) : nk; }
  PYVIT_DEVICE int first_query(int key) const { return p.forward.causal ? key : 0; }

  template <class U>
  PYVIT_DEVICE U* row(U* base, const int64_t (&stride)[3], int h, int64_t first, int i) const {
    return base + (sequence * stride[0] + h * stride[1] + first * stride[2]) + far(i, stride[2]);
  }
  PYVIT_DEVICE int at(int i) const { return i; }
  PYVIT_DEVICE const T* q(int h, int i) const {
    return row(static_cast<const T*>(p.forward.q), p.forward.q_stride, h, q_first, i);
  }
  PYVIT_DEVICE const T* k(int j) const {
    return row(static_cast<const T*>(p.forward.k), p.forward.k_stride, kv_head, k_first, j);
  }
  PYVIT_DEVICE const T* v(int j) const {
    return row(static_cast<const T*>(p.forward.v), p.forward.v_stride, kv_head, k_first, j);
  }
  PYVIT_DEVICE T* out(int h, int i) const {
    return row(static_cast<T*>(p.forward.out), p.forward.out_stride, h, q_first, i);
  }
  PYVIT_DEVICE const T* grad_out(int h, int i) const {
    return row(static_cast<const T*>(p.grad_out), p.grad_out_stride, h, q_first, i);
  }
  PYVIT_DEVICE T* grad_q(int h, int i) const { return row(static_cast<T*>(p.grad_q), p.grad_q_stride, h, q_first, i); }
  PYVIT_DEVICE T* grad_k(int j) const { return row(static_cast<T*>(p.grad_k), p.grad_k_stride, kv_head, k_first, j); }
  PYVIT_DEVICE T* grad_v(int j) const { return row(static_cast<T*>(p.grad_v), p.grad_v_stride, kv_head, k_first, j); }
  PYVIT_DEVICE int64_t statistic(int h, int i) const {
    return sequence * p.forward.lse_stride[0] + h * p.forward.lse_stride[1] + q_first + i;
  }
  PYVIT_DEVICE float* lse(int h, int i) const { return p.forward.lse + statistic(h, i); }
  PYVIT_DEVICE float* shift(int h, int i) const { return p.shift + statistic(h, i); }
  PYVIT_DEVICE float* rest(int h, int i) const { return p.rest + statistic(h, i); }
  PYVIT_DEVICE float* delta_at(int h, int i) const { return p.delta + statistic(h, i); }
  PYVIT_DEVICE float delta(int h, int i) const { return *delta_at(h, i); }
  PYVIT_DEVICE float grad_lse(int h, int i) const { return p.grad_lse ? p.grad_lse[statistic(h, i)] : 0.0f; }

  struct ScoreRows {
    bool plain;  // nothing is masked or added: products are left as they are
    int first;   // of two rows, 8 apart
    const char* bias;
  };
  template <bool KEYS>
  PYVIT_DEVICE ScoreRows score_rows(int h, int row0, int g, int column0, int columns) const {
    const Attention& f = p.forward;
    const bool all = KEYS ? !f.causal || row0 + 15 <= column0
                          : column0 + columns <= nk && (!f.causal || column0 + columns - 1 <= row0);
    const int64_t at = sequence * f.bias_stride[0] + h * f.bias_stride[1] + (row0 + g) * f.bias_stride[KEYS ? 3 : 2];
    return {f.bias == nullptr && all && raw, row0 + g, bias_at(static_cast<const char*>(f.bias), at)};
  }
  PYVIT_DEVICE const char* bias_at(const char* from, int64_t elements) const {
    const Type type = p.forward.bias_type;
    return from + (elements << (type == Type::f32 ? 2 : type == Type::boolean ? 0 : 1));
  }
  PYVIT_DEVICE float biased(float score, const char* bias) const {
    const Type type = p.forward.bias_type;
    if (type == Type::boolean) return *bias ? score : -infinity();
    return score +
           (type == Type::f32 ? *reinterpret_cast<const float*>(bias) : widen(*reinterpret_cast<const T*>(bias)));
  }
  // Of 16 x 8 scores, those of a lane: of two rows, 8 apart, two columns from `column0 + pair` on. Queries that do not
  // exist may get anything.
  template <bool KEYS>
  PYVIT_DEVICE void finish_scores(float (&s)[4], const ScoreRows& rows, int column0, int pair) const {
    if (rows.plain) return;
    const Attention& f = p.forward;
    const float factor = raw ? 1.0f : scale;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[e] *= factor;
      const int row = rows.first + (e >> 1) * 8, column = column0 + pair + (e & 1);
      const int i = KEYS ? column : row, j = KEYS ? row : column;
      if (i >= nq || j >= nk || (f.causal && j > i))
        s[e] = -infinity();
      else if (f.bias)
        s[e] = biased(s[e], bias_at(rows.bias,
                                    (e >> 1) * 8 * f.bias_stride[KEYS ? 3 : 2] + column * f.bias_stride[KEYS ? 2 : 3]));
    }
  }
  PYVIT_DEVICE bool cosine() const { return false; }
  PYVIT_DEVICE float* pad_row(int) const { return nullptr; }
  PYVIT_DEVICE void store_pad(float*, int, float, float) const {}
  PYVIT_DEVICE void store_logit_partial(int, int, float) const {}
  PYVIT_DEVICE const bool (&bias_broadcast() const)[4] { return p.bias_broadcast; }
  PYVIT_DEVICE float* bias_partials() const { return p.partials; }
};

// Calls use(element, width) for the dtype and the smallest head-dimension bucket that holds d; nullptr-returning
// launchers all fit.
template <class Use>
const char* with_head_dim(Type type, int d, Use use) {
  const auto by_width = [&](auto element) -> const char* {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (d <= 32) return use(T{}, std::integral_constant<int, 32>{});
      if (d > 64 && d <= 80) return use(T{}, std::integral_constant<int, 80>{});
      if (d > 80 && d <= 96) return use(T{}, std::integral_constant<int, 96>{});
    }
    if (d <= 64) return use(T{}, std::integral_constant<int, 64>{});
    if (d <= 128) return use(T{}, std::integral_constant<int, 128>{});
    return "flash_attention: the head dimension is above 128";
  };
  if (type == Type::f32) return by_width(float{});
  return type == Type::f16 ? by_width(f16{}) : by_width(bf16{});
}

}  // namespace pyvit::cuda
