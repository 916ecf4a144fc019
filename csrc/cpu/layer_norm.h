// Layer norm and RMS norm of some rows. A row is read from memory once: it stays in L1 for the passes after the first.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernel_args.h"
#include "parallel.h"
#include "vec.h"

namespace pyvit::PYVIT_ISA {

// n parameters as float32, whole vectors of them, zeros behind; `missing` where there are none.
inline const float* widened(const void* p, Dtype dtype, int64_t n, float missing, Scratch& memory) {
  float* out = memory.take<float>((n + W - 1) / W * W);
  vectors(n, [&](int64_t c, int left) {
    vf v = keep_first(set1(missing), left);
    if (p && dtype == Dtype::f32) v = read(static_cast<const float*>(p) + c, left);
    if (p && dtype == Dtype::bf16) v = read(static_cast<const bf16*>(p) + c, left);
    if (p && dtype == Dtype::f16) v = read(static_cast<const f16*>(p) + c, left);
    store(out + c, v);
  });
  return out;
}

// Sums of f(row, column, elements) along R rows. Rows pass together, for sums wait for each other.
template <int R, class F>
inline void row_sums(int64_t cols, float (&out)[R], const F& f) {
  vf sum[R];
  for (vf& s : sum) s = vf{};
  vectors(cols, [&](int64_t c, int n) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r] += f(r, c, n);
  });
  for (int r = 0; r < R; r++) out[r] = reduce_add(sum[r]);
}

// Of R rows, `ldx` and `ldy` apart. `mean_out` and `rstd_out`, where not null, take the statistics. RMS norm is not
// CENTERED, and has neither mean nor bias.
template <int R, bool CENTERED = true, class X, class Y>
inline void normalize(int64_t cols, const X* x, int64_t ldx, const float* weight, const float* bias, float eps, Y* y,
                      int64_t ldy, float* mean_out, float* rstd_out) {
  const float share = 1.f / float(cols);
  [[maybe_unused]] float mean[R];
  float rstd[R];
  if constexpr (CENTERED) {
    row_sums<R>(cols, mean, [&](int r, int64_t c, int n) { return read(x + r * ldx + c, n); });
    for (float& m : mean) m *= share;
  }
  row_sums<R>(cols, rstd, [&](int r, int64_t c, int n) {
    vf d = read(x + r * ldx + c, n);
    if constexpr (CENTERED) {
      d -= mean[r];
      if (n != W) d = keep_first(d, n);
    }
    return d * d;
  });
  for (float& v : rstd) v = 1.f / std::sqrt(v * share + eps);
  vectors(cols, [&](int64_t c, int n) {
    const vf w = load(weight + c), b = CENTERED ? load(bias + c) : vf{};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const vf v = read(x + r * ldx + c, n);
      if constexpr (CENTERED) {
        write(y + r * ldy + c, (v - mean[r]) * rstd[r] * w + b, n);
      } else {
        write(y + r * ldy + c, v * rstd[r] * w, n);
      }
    }
  });
  for (int r = 0; rstd_out && r < R; r++) {
    if constexpr (CENTERED) mean_out[r] = mean[r];
    rstd_out[r] = rstd[r];
  }
}

}  // namespace pyvit::PYVIT_ISA
