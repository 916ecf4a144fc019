// Rows of scores: bias in, running softmax out.
#pragma once

#include "gemm_tile.h"
#include "kernel_args.h"

namespace pyvit::PYVIT_ISA {

// Bias rows as float32, expanded once where every query shares the row.
class BiasRows {
 public:
  BiasRows(const Bias& bias, int64_t b, int64_t h, float* buffer)
      : bias_(bias), base_(b * bias.b + h * bias.h), buffer_(buffer) {}

  // Bias of query i for keys j .. j + n, or null without a bias.
  const float* row(int64_t i, int64_t j, int64_t n) {
    if (!bias_.data) return nullptr;
    const int64_t at = base_ + i * bias_.q + j * bias_.k;
    if (bias_.dtype == Dtype::f32 && bias_.k == 1) return static_cast<const float*>(bias_.data) + at;
    if (at == cached_ && n == cached_n_) return buffer_;
    switch (bias_.dtype) {
      case Dtype::f32:
        expand(static_cast<const float*>(bias_.data) + at, n);
        break;
      case Dtype::bf16:
        expand(static_cast<const bf16*>(bias_.data) + at, n);
        break;
      case Dtype::f16:
        expand(static_cast<const f16*>(bias_.data) + at, n);
        break;
      case Dtype::boolean: {
        const bool* p = static_cast<const bool*>(bias_.data) + at;
        for (int64_t c = 0; c < n; c++) buffer_[c] = p[c * bias_.k] ? 0.f : -INF;
      }
    }
    cached_ = at;
    cached_n_ = n;
    return buffer_;
  }

 private:
  template <class T>
  void expand(const T* p, int64_t n) {
    if (bias_.k == 1) {
      int64_t c = 0;
      for (; c + W <= n; c += W) store(buffer_ + c, load(p + c));
      if (c < n) store_n(buffer_ + c, load_n(p + c, int(n - c)), int(n - c));
    } else {
      for (int64_t c = 0; c < n; c++) buffer_[c] = to_float(p[c * bias_.k]);
    }
  }

  const Bias& bias_;
  int64_t base_, cached_ = -1, cached_n_ = -1;
  float* buffer_;
};

// W probabilities into their lanes: floats in place, or rounded to bf16 at half the distance (never ahead of the scores
// still to be read).
template <class D>
inline void store_lanes(uint32_t* row, int64_t column, vf p) {
  store(reinterpret_cast<typename D::element*>(row) + column, p);
}

template <class D>
inline vf exp2_for(vf x) {
  return exp2v<D::K == 2>(x);
}

// The running maximum and sum of one row, in base 2.
struct RowState {
  float max = -INF, sum = 0.f;
};

// One row of scores (n columns, the first `valid` of them allowed) in two steps, each over all rows of a block before
// the next, so that no row waits for another's reductions. First: the largest, in units of log2; with a bias the scores
// stay scaled and the bias added (scale2 is 1 from then on).
inline float row_max(float* s, int64_t valid, const float* bias, float scale2) {
  const int64_t whole = valid / W * W;
  const int tail = int(valid - whole);
  vf top = set1(-INF);
  if (bias) {
    for (int64_t c = 0; c < whole; c += W) {
      const vf x = load(s + c) * scale2 + load(bias + c) * LOG2E;
      store(s + c, x);
      top = vmax(top, x);
    }
    if (tail) {
      const vf x = load(s + whole) * scale2 + load_n(bias + whole, tail) * LOG2E;
      store(s + whole, x);
      top = vmax(top, load_n(s + whole, tail, -INF));
    }
  } else {
    const vf sign = set1(scale2 < 0 ? -0.f : 0.f);  // the largest product is that of the largest or of the least score
    auto largest = [&](vf x) { top = vmax(top, (vf)((vi)x ^ (vi)sign)); };
#pragma GCC unroll 4
    for (int64_t c = 0; c < whole; c += W) largest(load(s + c));
    if (tail) largest(load_n(s + whole, tail, scale2 < 0 ? INF : -INF));
    return valid ? reduce_max(top) * std::fabs(scale2) : -INF;
  }
  return reduce_max(top);
}

// Scores, in units of log2, from which on their rounding shows in a probability.
constexpr float LARGE = 0x1p20f;

// Then: probabilities relative to the new running maximum, as lanes in place; columns from `valid` to round_up(n, W)
// become 0. Returns the factor by which earlier sums must shrink.
template <class D>
inline float row_exp(float* s, int64_t n, int64_t valid, float scale2, float here, RowState& state) {
  const int64_t whole = valid / W * W;
  const int tail = int(valid - whole);
  const float before = state.max;
  float now = here <= before ? before : here;  // a NaN wins
  uint32_t* lanes = reinterpret_cast<uint32_t*>(s);
  if (now == -INF) {
    if (std::none_of(s, s + valid, [](float x) { return std::isnan(x); })) {  // nothing to attend to so far
      for (int64_t c = 0; c < n; c += W) store_lanes<D>(lanes, c, vf{});
      return 1.f;
    }
    now = NAN;
  } else if (scale2 != 1.f && std::fabs(now) > LARGE) {
    // A product that is subtracted from before it is rounded misses the largest one by what rounding took.
    for (int64_t c = 0; c < valid; c += W) store(s + c, load(s + c) * scale2);
    scale2 = 1.f;
  }
  vf sum{};
#pragma GCC unroll 2
  for (int64_t c = 0; c < whole; c += W) {
    const vf p = exp2_for<D>(load(s + c) * scale2 - now);
    sum += p;
    store_lanes<D>(lanes, c, p);
  }
  int64_t c = whole;
  if (tail) {
    const vf p = keep_first(exp2_for<D>(load(s + c) * scale2 - now), tail);
    sum += p;
    store_lanes<D>(lanes, c, p);
    c += W;
  }
  for (; c < n; c += W) store_lanes<D>(lanes, c, vf{});
  const float factor = before == -INF ? 0.f : std::exp2(before - now);
  state.max = now;
  state.sum = state.sum * factor + reduce_add(sum);
  return factor;
}

}  // namespace pyvit::PYVIT_ISA
