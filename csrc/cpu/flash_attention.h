// One (batch, head) of an attention call, and how its rows are divided and written.
#pragma once

#include "softmax.h"

namespace pyvit::PYVIT_ISA {

// One (batch, head) of the call.
struct Head {
  int64_t b, h, hk, nq, nk, q0, k0;

  Head(const Attention& a, int64_t b, int64_t h)
      : b(b), h(h), hk(h / (a.heads / a.kv_heads)), nq(a.nq), nk(a.nk), q0(0), k0(0) {
    if (a.cu_q) {
      q0 = a.cu_q[b];
      nq = a.cu_q[b + 1] - q0;
      k0 = a.cu_k[b];
      nk = a.cu_k[b + 1] - k0;
    }
  }
  template <class T>
  T* query(const Tokens& t) const {
    return static_cast<T*>(t.data) + b * t.b + h * t.h + q0 * t.n;
  }
  template <class T>
  T* key(const Tokens& t, int64_t head) const {
    return static_cast<T*>(t.data) + b * t.b + head * t.h + k0 * t.n;
  }
  int64_t statistic(const Attention& a) const { return b * a.lse_b + h * a.lse_h + q0; }
};

// Rows per block: a multiple of the register tile that divides n into nearly equal parts.
inline int64_t row_block(int64_t n, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, (n + most - 1) / most);
  return round_up((n + blocks - 1) / blocks, MR * 2);
}

template <class T>
inline void store_row(T* out, const float* x, float factor, int64_t n) {
  int64_t c = 0;
  for (; c + W <= n; c += W) store(out + c, load(x + c) * factor);
  if (c < n) store_n(out + c, load(x + c) * factor, int(n - c));
}

}  // namespace pyvit::PYVIT_ISA
