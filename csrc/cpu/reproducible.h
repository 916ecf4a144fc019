// Arithmetic of float32 rows with the same bits on every instruction set: sums have a fixed order (16 lanes, whatever
// the width of a vector), and nothing here is an estimate or differs by the width. Units that include this are compiled
// without contraction to fused multiply-adds (packaging/native.py), which not every instruction set has.
#pragma once

#include "activation.h"
#include "layer_norm.h"

namespace pyvit::PYVIT_ISA {

// body(column, elements there) for the vectors of a row in groups of 16 columns; the last vectors may be shorter, or
// empty.
constexpr int GROUP = 16, VECTORS = GROUP / W;
template <class F>
inline void groups(int64_t cols, const F& body) {
  int64_t c = 0;
  for (; c + GROUP <= cols; c += GROUP) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) body(v, c + v * W, W);
  }
  if (c < cols)
    for (int v = 0; v < VECTORS; v++) body(v, c + v * W, int(std::clamp<int64_t>(cols - c - v * W, 0, W)));
}

// Sums of f(row, column, elements) along R rows.
template <int R, class F>
inline void ordered_sums(int64_t cols, float (&out)[R], const F& f) {
  vf sum[R][VECTORS];
  for (auto& row : sum)
    for (vf& s : row) s = vf{};
  groups(cols, [&](int v, int64_t c, int n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r][v] += f(r, c, n);
  });
  for (int r = 0; r < R; r++) {
    float lane[GROUP];
    for (int v = 0; v < VECTORS; v++) store(lane + v * W, sum[r][v]);
    for (int half = GROUP / 2; half; half /= 2)
      for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    out[r] = lane[0];
  }
}

// Layer norm of R rows, `ldx` and `ldy` apart; y takes whole vectors.
template <int R, class X>
inline void ordered_layer_norm(int64_t cols, const X* x, int64_t ldx, const float* weight, const float* bias, float eps,
                               float* y, int64_t ldy) {
  const float share = 1.f / float(cols);
  float mean[R], rstd[R];
  ordered_sums<R>(cols, mean, [&](int r, int64_t c, int n) { return read(x + r * ldx + c, n); });
  for (float& m : mean) m *= share;
  ordered_sums<R>(cols, rstd, [&](int r, int64_t c, int n) {
    vf d = read(x + r * ldx + c, n) - mean[r];
    if (n != W) d = keep_first(d, n);
    return d * d;
  });
  for (float& v : rstd) v = 1.f / std::sqrt(v * share + eps);
  vectors(cols, [&](int64_t c, int n) {
    const vf w = load(weight + c), b = load(bias + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store(y + r * ldy + c, (read(x + r * ldx + c, n) - mean[r]) * rstd[r] * w + b);
  });
}

// To the nearest integer, ties to even, for |x| < 2^22: x + TO_INTEGER has no bits below 1, and the integer in its low
// bits, on top of INTEGER_ZERO.
constexpr float TO_INTEGER = 12582912.f;  // 1.5 * 2^23
constexpr int32_t INTEGER_ZERO = 0x4B400000;
inline vi nearest_integer(vf x) { return (vi)(x + TO_INTEGER) - INTEGER_ZERO; }

// 2^x for x in [-126, 126], relative error 3e-6: the exponential's series on [-1/2, 1/2].
inline vf ordered_exp2(vf x) {
  const vf n = (x + TO_INTEGER) - TO_INTEGER, f = x - n;
  vf p = set1(1.33335581e-3f);
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.f;
  return (vf)((vi)p + (nearest_integer(x) << 23));
}

// Absolute error 1.6e-4, which is below a step of rows brought to 8 bits: x (1/2 + erf(x / sqrt(2)) / 2) with a minimax
// polynomial that is 1/2 from 4 on, exactly. Its even and odd terms are summed apart: the chain of dependent operations
// is what takes the time.
struct OrderedGelu {
  static inline vf value(vf x) {
    const vf t = vmin(vmax(x, set1(-4.f)), set1(4.f)), u = t * t, v = u * u;
    vf even = v * 9.306496906e-08f + 7.082119555e-05f, odd = v * -1.125673332e-09f - 3.366545570e-06f;
    even = even * v + 9.363026358e-03f;
    odd = odd * v - 9.745550924e-04f;
    even = even * v + 3.983530998e-01f;
    odd = odd * v - 6.556063890e-02f;
    return x * (t * (even + u * odd) + 0.5f);
  }
};
// x sigmoid(a(x)), relative error 3e-6.
template <class A>
struct OrderedGated {
  static inline vf value(vf x) {
    const vf power = vmin(vmax(A::at(x) * -LOG2E, set1(-126.f)), set1(126.f));
    const vf s = 1.f / (1.f + ordered_exp2(power));
    return x * (power < 126.f ? s : vf{});
  }
};
struct NoActivation {
  static inline vf value(vf x) { return x; }
};

// body(Y{}) with the activation Y that `kind` names; null for none.
template <class F>
inline void with_ordered_activation(const Activation::Kind* kind, const F& body) {
  if (!kind) return body(NoActivation{});
  switch (*kind) {
    case Activation::gelu:
      return body(OrderedGelu{});
    case Activation::gelu_tanh:
      return body(OrderedGated<Tanh>{});
    case Activation::quick_gelu:
      return body(OrderedGated<Quick>{});
    case Activation::silu:
      return body(OrderedGated<Identity>{});
    case Activation::relu:
      return body(Relu{});
  }
}

}  // namespace pyvit::PYVIT_ISA
