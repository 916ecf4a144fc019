// Rows of scores: bias in, running softmax out.
#pragma once

#include "dtype.h"
#include "gemm_tile.h"
#include "grid_bias.h"
#include "kernel_args.h"

namespace pyvit::PYVIT_ISA {

// Bias rows as float32, expanded once where every query shares the row.
class BiasRows {
 public:
  // Of `buffer`: `keys` at a time.
  static int64_t size(const GridBias* grid, int64_t keys) {
    return std::max(round_up(keys, W), GridBiasRows::size(grid, keys));
  }
  BiasRows(const Bias& bias, const GridBias* grid, int64_t b, int64_t h, int64_t keys, float* buffer)
      : bias_(bias), grid_(grid, b, h, keys, buffer), base_(b * bias.b + h * bias.h), buffer_(buffer) {}

  // Bias of query i for keys j .. j + n, or null without a bias.
  const float* row(int64_t i, int64_t j, int64_t n) {
    if (grid_) return grid_.row(i, j, n);
    if (!bias_.data) return nullptr;
    const int64_t at = base_ + i * bias_.q + j * bias_.k;
    if (bias_.dtype == Dtype::f32 && bias_.k == 1) return static_cast<const float*>(bias_.data) + at;
    if (at == cached_ && n == cached_n_) return buffer_;
    if (bias_.dtype == Dtype::boolean) {
      const bool* p = static_cast<const bool*>(bias_.data) + at;
      for (int64_t c = 0; c < n; c++) buffer_[c] = p[c * bias_.k] ? 0.f : -INF;
    } else {
      with_dtype(bias_.dtype, [&](auto t) { expand(static_cast<const decltype(t)*>(bias_.data) + at, n); });
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
  GridBiasRows grid_;
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

// x as it is rounded: the compiler makes no multiply-add of a product before and a difference after.
inline vf rounded(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// Scores of products of queries and keys: the products themselves, or products times `factor` plus a bias, or where a
// mask is false -inf, whatever the product is. A difference
// of two scores times `unit` is in powers of two. Scores stay in natural units until the largest is subtracted: times
// log2(e) a finite one may be infinite, and large ones that differ may round to the same.
struct Scores {
  bool raw, mask;
  float factor, unit;
  float natural;  // what a score is multiplied by to be one of the caller's

  // x with the bias or mask of its key.
  vf with(vf x, vf bias) const { return mask ? (bias == 0.f ? x : set1(-INF)) : x + bias; }

  Scores(float scale, bool biased, bool mask)
      : raw(!biased && scale > 0),
        mask(mask),
        factor(raw ? 1.f : scale),
        unit(raw ? scale * LOG2E : LOG2E),
        natural(raw ? scale : 1.f) {}
};

// The running maximum of a row's scores, and the sum of its exponentials relative to it.
struct RowState {
  float max = -INF, sum = 0.f;
};

// One row of products (n columns, the first `valid` of them allowed) in two steps, each over all rows of a block before
// the next, so that no row waits for another's reductions. First: products become scores in place; the largest.
inline float row_max(float* s, int64_t valid, const float* bias, const Scores& scores) {
  const int64_t whole = valid / W * W;
  const int tail = int(valid - whole);
  vf top = set1(-INF);
  auto largest = [&](vf x, int64_t c) {
    store(s + c, x);
    top = vmax(top, c < whole ? x : load_n(s + c, tail, -INF));
  };
  if (bias) {
    for (int64_t c = 0; c < whole; c += W) largest(scores.with(load(s + c) * scores.factor, load(bias + c)), c);
    if (tail) largest(scores.with(load(s + whole) * scores.factor, load_n(bias + whole, tail)), whole);
  } else if (!scores.raw) {
    for (int64_t c = 0; c < valid; c += W) largest(load(s + c) * scores.factor, c);
  } else {
#pragma GCC unroll 4
    for (int64_t c = 0; c < whole; c += W) top = vmax(top, load(s + c));
    if (tail) top = vmax(top, load_n(s + whole, tail, -INF));
  }
  return reduce_max(top);
}

// Then: probabilities relative to the new running maximum, as lanes in place; columns from `valid` to round_up(n, W)
// become 0. Returns the factor by which earlier sums must shrink.
template <class D>
inline float row_exp(float* s, int64_t n, int64_t valid, float unit, float here, RowState& state) {
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
  }
  vf sum{};
#pragma GCC unroll 2
  for (int64_t c = 0; c < whole; c += W) {
    const vf p = exp2_for<D>((load(s + c) - now) * unit);
    sum += p;
    store_lanes<D>(lanes, c, p);
  }
  int64_t c = whole;
  if (tail) {
    const vf p = keep_first(exp2_for<D>((load(s + c) - now) * unit), tail);
    sum += p;
    store_lanes<D>(lanes, c, p);
    c += W;
  }
  for (; c < n; c += W) store_lanes<D>(lanes, c, vf{});
  const float factor = before == -INF ? 0.f : std::exp2((before - now) * unit);
  state.max = now;
  state.sum = state.sum * factor + reduce_add(sum);
  return factor;
}

}  // namespace pyvit::PYVIT_ISA
