// What one tile of similarities gives to a loss over all pairs: its part of the log-sum-exps or of the sum, and the
// loss's derivative with respect to it. A tile lies in L2; every function passes over it once or twice.
#pragma once

#include "softmax.h"

namespace pyvit::PYVIT_ISA {

// Rows and columns of a tile at most: whole register tiles, and with the rows it came from within L2.
constexpr int64_t PAIR_TILE = W == 16 ? 192 : 96;

// exp(x - top): the difference first, which is exact where it counts, so that no probability is above 1.
inline vf exp_less(vf x, vf top) { return exp2v((x - top) * LOG2E); }

// Running log-sum-exps. `top` starts at the least finite number: what is masked whole stays at total 0.
struct Sums {
  float *top, *total;
  void add(int64_t i, float now, float sum) const {
    total[i] = total[i] * std::exp(top[i] - now) + sum;
    top[i] = now;
  }
};

struct PairTile {
  float* s;
  int64_t ld, rows, cols;
  bool diagonal;     // each row against itself, no candidate
  int64_t positive;  // the positive pair of row i is in column i + positive, where there is such a column

  int64_t padded() const { return round_up(cols, W); }
  // Columns up to a whole vector are there to be computed with, not to be counted.
  void pad(float value) const {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = cols; c < padded(); c++) s[i * ld + c] = value;
  }
  template <class F>
  void each_positive(const F& f) const {
    const auto diagonal_at = [&](int64_t shift) {
      for (int64_t i = std::max<int64_t>(0, -shift); i < std::min(rows, cols - shift); i++) f(s[i * ld + i + shift]);
    };
    diagonal_at(positive);
    if (diagonal) diagonal_at(-positive);  // the mirror image is in the same tile
  }
  void set_diagonal(float value) const {
    for (int64_t i = 0; diagonal && i < rows; i++) s[i * ld + i] = value;
  }
};

// Scales a tile of similarities to logits, and adds it to the sums of its rows and, unless null, its columns.
inline void softmax_tile(const PairTile& t, float scale, Sums rows, Sums cols) {
  const int64_t width = t.padded();
  float top[PAIR_TILE], sum[PAIR_TILE], row_top[PAIR_TILE];
  for (int64_t c = 0; c < width; c++) {
    top[c] = cols.top && c < t.cols ? cols.top[c] : 0.f;
    sum[c] = 0.f;
  }
  for (int64_t i = 0; i < t.rows; i++)
    for (int64_t c = 0; c < width; c += W) store(t.s + i * t.ld + c, load(t.s + i * t.ld + c) * scale);
  t.pad(-INF);
  t.set_diagonal(-INF);
  for (int64_t i = 0; i < t.rows; i++) {
    const float* s = t.s + i * t.ld;
    vf most = set1(rows.top[i]);
    for (int64_t c = 0; c < width; c += W) {
      const vf x = load(s + c);
      most = vmax(most, x);
      store(top + c, vmax(load(top + c), x));
    }
    row_top[i] = reduce_max(most);
  }
  for (int64_t i = 0; i < t.rows; i++) {
    const float* s = t.s + i * t.ld;
    const vf most = set1(row_top[i]);
    vf total{};
    if (cols.top) {
      for (int64_t c = 0; c < width; c += W) {
        const vf x = load(s + c);
        total += exp_less(x, most);
        store(sum + c, load(sum + c) + exp_less(x, load(top + c)));
      }
    } else {
      for (int64_t c = 0; c < width; c += W) total += exp_less(load(s + c), most);
    }
    rows.add(i, row_top[i], reduce_add(total));
  }
  for (int64_t c = 0; cols.top && c < t.cols; c++) cols.add(c, top[c], sum[c]);
}

// Similarities to the derivative of the sum of both directions' cross-entropies with respect to the logits: the
// probabilities by rows plus those by columns, less 2 for a positive pair.
inline void softmax_gradient_tile(const PairTile& t, float scale, const float* row_lse, const float* col_lse) {
  float lse[PAIR_TILE];
  for (int64_t c = 0; c < t.padded(); c++) lse[c] = c < t.cols ? col_lse[c] : 0.f;
  for (int64_t i = 0; i < t.rows; i++) {
    float* s = t.s + i * t.ld;
    const vf by_row = set1(row_lse[i]);
    for (int64_t c = 0; c < t.padded(); c += W) {
      const vf x = rounded(load(s + c) * scale);
      store(s + c, exp_less(x, by_row) + exp_less(x, load(lse + c)));
    }
  }
  t.set_diagonal(0.f);
  t.each_positive([](float& p) { p -= 2.f; });
}

// log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)), whose series ends below half a unit in the last place.
inline vf log1p_unit(vf e) {
  const vf z = e / (2.f + e), q = z * z;
  vf p = set1(1.f / 15);
  p = p * q + 1.f / 13;
  p = p * q + 1.f / 11;
  p = p * q + 1.f / 9;
  p = p * q + 1.f / 7;
  p = p * q + 1.f / 5;
  p = p * q + 1.f / 3;
  p = p * q + 1.f;
  return 2.f * z * p;
}

// exp(-|x|)
inline vf exp_minus(vf x) { return exp2v((vf)((vi)x | set1i(INT32_MIN)) * LOG2E); }

// Similarities to logits, that of a positive pair negated; padding's terms and derivatives are 0.
inline void sigmoid_logits(const PairTile& t, float scale, float bias) {
  for (int64_t i = 0; i < t.rows; i++)
    for (int64_t c = 0; c < t.padded(); c += W) store(t.s + i * t.ld + c, load(t.s + i * t.ld + c) * scale + bias);
  t.pad(-INF);
  t.each_positive([](float& x) { x = -x; });
}

// Adds softplus of the logits to each row's total.
inline void sigmoid_tile(const PairTile& t, float scale, float bias, float* totals) {
  sigmoid_logits(t, scale, bias);
  for (int64_t i = 0; i < t.rows; i++) {
    vf total{};
    for (int64_t c = 0; c < t.padded(); c += W) {
      const vf x = load(t.s + i * t.ld + c);
      total += vmax(vf{}, x) + log1p_unit(exp_minus(x));
    }
    totals[i] += reduce_add(total);
  }
}

// Similarities to the derivative of those terms with respect to the logits, which it adds to each row's total.
inline void sigmoid_gradient_tile(const PairTile& t, float scale, float bias, float* totals) {
  sigmoid_logits(t, scale, bias);
  for (int64_t i = 0; i < t.rows; i++)
    for (int64_t c = 0; c < t.padded(); c += W) {
      float* s = t.s + i * t.ld + c;
      const vf x = load(s), e = exp_minus(x);
      store(s, (x < 0.f ? e : set1(1.f)) / (1.f + e));
    }
  t.each_positive([](float& p) { p = -p; });
  for (int64_t i = 0; i < t.rows; i++) {
    vf total{};
    for (int64_t c = 0; c < t.padded(); c += W) total += load(t.s + i * t.ld + c);
    totals[i] += reduce_add(total);
  }
}

}  // namespace pyvit::PYVIT_ISA
