// Norm per head and rotary positions of queries and keys: done to their rows as a kernel loads them, and the way back
// for the gradients of those rows.
#pragma once

#include "gemm_tile.h"
#include "layer_norm.h"

namespace pyvit::PYVIT_ISA {

// Lanes 2i and 2i + 1 as (-v[2i + 1], v[2i]): a quarter turn of pairs that lie side by side.
template <int... I>
inline vf swap_neighbours(vf v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}
inline vf quarter_turn(vf v) {
  vu sign;
  for (int i = 0; i < W; i++) sign[i] = i & 1 ? 0u : 0x80000000u;
  return (vf)((vu)swap_neighbours(v, std::make_integer_sequence<int, W>{}) ^ sign);
}

// Queries or keys of d channels. A row is a token of one head; `b`, `h` and `token` say where its angles are.
class QkRows {
 public:
  QkRows(const QkTransform* t, bool keys, int64_t d, Scratch& memory) : d_(d) {
    if (!t) return;
    t_ = *t;
    active_ = true;
    half_ = t_.rope ? t_.rotated / 2 : 0;
    rotation_ = !t_.rope ? NO_ROTATION : t_.interleaved ? NEIGHBOURS : HALVES;
    second_ = t_.same_halves ? 0 : half_;
    weight_ = widened(keys ? t_.k_weight : t_.q_weight, Dtype::f32, d, 1.f, memory);
    bias_ = widened(keys ? t_.k_bias : t_.q_bias, Dtype::f32, d, 0.f, memory);
    row_ = memory.take<float>(columns_of(d));
  }

  bool active() const { return active_; }
  bool normalized() const { return t_.norm != QkTransform::none; }
  static int64_t columns_of(int64_t d) { return round_up(d, W); }

  // Rows x (rows, d), of token `token` and those after it, as the product takes them: out (rows, d), `ld` apart.
  template <class T, class E>
  void transform(const T* x, int64_t ldx, int64_t rows, int64_t b, int64_t h, int64_t token, E* out, int64_t ld) const {
    int64_t r = 0;
    for (; r < rows && (!in_registers() || (t_.rope && token + r < t_.prefix)); r++) {
      const float* rope = angles(b, h, token + r);
      const T* from = x + r * ldx;
      E* to = out + r * ld;
      if (normalized()) {
        normalize_row(from, row_);
        if (rope) rotate(row_, rope, to);
        copy(row_, rope ? t_.rotated : 0, to);
      } else {
        if (rope) rotate(from, rope, to);
        copy(from, rope ? t_.rotated : 0, to);
      }
    }
    if (r == rows) return;
    const float* rope = t_.rope ? angles(b, h, token + r) : nullptr;
    with_kinds([&](auto norm, auto rotation) {
      rows_in_registers<norm.value, rotation.value>(x + r * ldx, ldx, rows - r, rope, out + r * ld, ld);
    });
  }

  // x (d), normalised: out (d).
  template <class T>
  void normalize_row(const T* x, float* out) const {
    if (t_.norm == QkTransform::layer) {
      normalize<1, true>(d_, x, 0, weight_, bias_, t_.eps, out, 0, nullptr, nullptr);
    } else if (t_.norm == QkTransform::rms) {
      normalize<1, false>(d_, x, 0, weight_, bias_, t_.eps, out, 0, nullptr, nullptr);
    } else {
      copy(x, 0, out);
    }
  }

  // dy (rows, d), `ld` apart: gradients of what `transform` makes of x, less a factor `scale`, and overwritten. dx gets
  // the gradients of x. `sums`, with a norm: those of its weight and bias, added to (2, columns_of(d)).
  template <class T>
  void backward(const T* x, int64_t ldx, int64_t rows, int64_t b, int64_t h, int64_t token, float scale, float* dy,
                int64_t ld, T* dx, int64_t lddx, float* sums) const {
    int64_t r = 0;
    for (; r < rows && (!in_registers() || (t_.rope && token + r < t_.prefix)); r++) {
      float* g = dy + r * ld;
      const float* rope = angles(b, h, token + r);
      if (rope) rotate_back(g, scale, rope);
      for (int64_t c = rope ? t_.rotated : 0; c < d_; c += W) {
        const int n = int(std::min<int64_t>(W, d_ - c));
        write(g + c, read(g + c, n) * scale, n);
      }
      if (t_.norm == QkTransform::layer) {
        norm_backward<true>(x + r * ldx, g, dx + r * lddx, sums);
      } else if (t_.norm == QkTransform::rms) {
        norm_backward<false>(x + r * ldx, g, dx + r * lddx, sums);
      } else {
        copy(g, 0, dx + r * lddx);
      }
    }
    if (r == rows) return;
    const float* rope = t_.rope ? angles(b, h, token + r) : nullptr;
    with_kinds([&](auto norm, auto rotation) {
      backward_in_registers<norm.value, rotation.value>(x + r * ldx, ldx, rows - r, rope, scale, dy + r * ld, ld,
                                                        dx + r * lddx, lddx, sums);
    });
  }

  // Adds to `grad` (2, rotated) the gradients of a token's sines and cosines: dy (d) is the gradient of the row that x
  // (d), normalised, was rotated to.
  void add_angles(const float* x, const float* dy, float* grad) const {
    float *sin = grad, *cos = grad + t_.rotated;
    const auto add = [](float* to, vf v, int n) { write(to, read(to, n) + v, n); };
    if (rotation_ == NEIGHBOURS) {
      vectors(t_.rotated, [&](int64_t c, int n) {
        const vf v = read(x + c, n), g = read(dy + c, n);
        add(sin + c, quarter_turn(v) * g, n);
        add(cos + c, v * g, n);
      });
    } else {
      vectors(half_, [&](int64_t c, int n) {
        const vf p = read(x + c, n), q = read(x + half_ + c, n), gp = read(dy + c, n), gq = read(dy + half_ + c, n);
        add(sin + c, -q * gp, n);
        add(sin + half_ + c, p * gq, n);
        add(cos + c, p * gp, n);
        add(cos + half_ + c, q * gq, n);
      });
    }
  }

 private:
  enum Rotation { NO_ROTATION, HALVES, NEIGHBOURS };
  // A row that passes in registers: the usual head, rotated as a whole.
  static constexpr int CHANNELS = 64, N = CHANNELS / W;
  // Rows that pass together, for sums wait for each other: as many as there are registers for.
  static constexpr int AT_ONCE = N <= 4 ? 4 : 1;
  bool in_registers() const { return d_ == CHANNELS && (!t_.rope || t_.rotated == CHANNELS); }

  template <class F>
  void with_kinds(const F& body) const {
    const auto with_norm = [&](auto rotation) {
      using Norm = QkTransform::Norm;
      switch (t_.norm) {
        case QkTransform::none:
          return body(std::integral_constant<Norm, QkTransform::none>{}, rotation);
        case QkTransform::layer:
          return body(std::integral_constant<Norm, QkTransform::layer>{}, rotation);
        case QkTransform::rms:
          return body(std::integral_constant<Norm, QkTransform::rms>{}, rotation);
      }
    };
    switch (rotation_) {
      case NO_ROTATION:
        return with_norm(std::integral_constant<Rotation, NO_ROTATION>{});
      case HALVES:
        return with_norm(std::integral_constant<Rotation, HALVES>{});
      case NEIGHBOURS:
        return with_norm(std::integral_constant<Rotation, NEIGHBOURS>{});
    }
  }
  static vf sum_of(const vf (&v)[N]) {
    vf sum = v[0];
    for (int i = 1; i < N; i++) sum += v[i];
    return sum;
  }
  // The sums of AT_ONCE vectors, each in the same order.
  static void totals(const vf (&of)[AT_ONCE], float (&out)[AT_ONCE]) {
    if constexpr (AT_ONCE == 1) {
      out[0] = reduce_add(of[0]);
    } else {
      constexpr auto LANES = std::make_integer_sequence<int, W>{};
      const vf all = add_pairs<2>(add_pairs<1>(of[0], of[1], LANES), add_pairs<1>(of[2], of[3], LANES), LANES);
      float lanes[W];
      store(lanes, add_fours<8>(add_fours<4>(all, LANES), LANES));
      for (int k = 0; k < AT_ONCE; k++) out[k] = lanes[k];
    }
  }
  // Neighbouring groups of STEP lanes of a are added, and of b; they follow each other by turns.
  template <int STEP, int... I>
  static vf add_pairs(vf a, vf b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, ((I & STEP) ? W + I - STEP : I)...) +
           __builtin_shufflevector(a, b, ((I & STEP) ? W + I : I + STEP)...);
  }
  template <int STEP, int... I>
  static vf add_fours(vf a, std::integer_sequence<int, I...>) {
    if constexpr (STEP >= W) return a;
    return a + __builtin_shufflevector(a, a, ((I ^ STEP) % W)...);
  }
  // v to zero mean (CENTERED) and a mean square of 1; returns the factor.
  template <bool CENTERED>
  static float standardize(vf (&v)[N], float eps) {
    constexpr float SHARE = 1.f / CHANNELS;
    if constexpr (CENTERED) {
      const float mean = reduce_add(sum_of(v)) * SHARE;
      for (vf& x : v) x -= mean;
    }
    vf squares[N];
    for (int i = 0; i < N; i++) squares[i] = v[i] * v[i];
    const float rstd = 1.f / std::sqrt(reduce_add(sum_of(squares)) * SHARE + eps);
    for (vf& x : v) x *= rstd;
    return rstd;
  }
  template <QkTransform::Norm NORM, Rotation ROTATION, class T, class E>
  void rows_in_registers(const T* x, int64_t ldx, int64_t rows, const float* rope, E* out, int64_t ld) const {
    constexpr float SHARE = 1.f / CHANNELS;
    constexpr int HALF = N / 2;
    const int64_t rope_n = t_.rope_n, to_cos = t_.rope_cos, second = second_;
    const float eps = t_.eps, *weight = weight_, *bias = bias_;
    for (int64_t first = 0; first < rows; first += AT_ONCE) {
      int64_t row[AT_ONCE];  // the last one again where there are fewer: a row's bits do not depend on its neighbours
      for (int k = 0; k < AT_ONCE; k++) row[k] = std::min(first + k, rows - 1);
      vf v[AT_ONCE][N];
      for (int k = 0; k < AT_ONCE; k++)
        for (int i = 0; i < N; i++) v[k][i] = load(x + row[k] * ldx + i * W);
      if constexpr (NORM != QkTransform::none) {
        float total[AT_ONCE];
        vf sums[AT_ONCE];
        if constexpr (NORM == QkTransform::layer) {
          for (int k = 0; k < AT_ONCE; k++) sums[k] = sum_of(v[k]);
          totals(sums, total);
          for (int k = 0; k < AT_ONCE; k++)
            for (vf& lane : v[k]) lane -= total[k] * SHARE;
        }
        for (int k = 0; k < AT_ONCE; k++) {
          sums[k] = v[k][0] * v[k][0];
          for (int i = 1; i < N; i++) sums[k] += v[k][i] * v[k][i];
        }
        totals(sums, total);
        for (float& t : total) t = 1.f / std::sqrt(t * SHARE + eps);
        for (int i = 0; i < N; i++) {
          const vf w = load(weight + i * W);
          for (int k = 0; k < AT_ONCE; k++) {
            v[k][i] *= total[k];
            if constexpr (NORM == QkTransform::layer) {
              v[k][i] = v[k][i] * w + load(bias + i * W);
            } else {
              v[k][i] *= w;
            }
          }
        }
      }
      for (int k = 0; k < AT_ONCE; k++) {
        E* to = out + row[k] * ld;
        const float *sin = ROTATION == NO_ROTATION ? nullptr : rope + row[k] * rope_n, *cos = sin + to_cos;
        if constexpr (ROTATION == NO_ROTATION) {
          for (int i = 0; i < N; i++) store(to + i * W, v[k][i]);
        } else if constexpr (ROTATION == NEIGHBOURS) {
          for (int i = 0; i < N; i++)
            store(to + i * W, v[k][i] * load(cos + i * W) + quarter_turn(v[k][i]) * load(sin + i * W));
        } else {
          for (int i = 0; i < HALF; i++) {
            const vf p = v[k][i], q = v[k][i + HALF];
            store(to + i * W, p * load(cos + i * W) - q * load(sin + i * W));
            store(to + (i + HALF) * W, q * load(cos + second + i * W) + p * load(sin + second + i * W));
          }
        }
      }
    }
  }
  template <QkTransform::Norm NORM, Rotation ROTATION, class T>
  void backward_in_registers(const T* x, int64_t ldx, int64_t rows, const float* rope, float scale, const float* dy,
                             int64_t ld, T* dx, int64_t lddx, float* sums) const {
    constexpr float SHARE = 1.f / CHANNELS;
    constexpr bool LAYER = NORM == QkTransform::layer;
    const int64_t rope_n = t_.rope_n, to_cos = t_.rope_cos, second = second_;
    const float eps = t_.eps, *weight = weight_;
    vf of_weight[N], of_bias[N];
    for (int i = 0; NORM != QkTransform::none && i < N; i++) {
      of_weight[i] = load(sums + i * W);
      of_bias[i] = load(sums + CHANNELS + i * W);
    }
    for (int64_t r = 0; r < rows; r++, x += ldx, dy += ld, dx += lddx, rope += ROTATION == NO_ROTATION ? 0 : rope_n) {
      vf g[N];
      for (int i = 0; i < N; i++) g[i] = load(dy + i * W) * scale;
      const float* cos = rope + to_cos;
      if constexpr (ROTATION == NEIGHBOURS) {
        for (int i = 0; i < N; i++) g[i] = g[i] * load(cos + i * W) - quarter_turn(g[i] * load(rope + i * W));
      } else if constexpr (ROTATION == HALVES) {
        for (int i = 0; i < N / 2; i++) {
          constexpr int HALF = N / 2;
          const vf p = g[i], q = g[i + HALF];
          g[i] = p * load(cos + i * W) + q * load(rope + second + i * W);
          g[i + HALF] = q * load(cos + second + i * W) - p * load(rope + i * W);
        }
      }
      if constexpr (NORM == QkTransform::none) {
        for (int i = 0; i < N; i++) store(dx + i * W, g[i]);
      } else {
        vf v[N], along[N];
        for (int i = 0; i < N; i++) v[i] = load(x + i * W);
        const float rstd = standardize<LAYER>(v, eps);
        for (int i = 0; i < N; i++) {
          of_weight[i] += g[i] * v[i];
          if constexpr (LAYER) of_bias[i] += g[i];
          g[i] *= load(weight + i * W);
          along[i] = g[i] * v[i];
        }
        const float level = LAYER ? reduce_add(sum_of(g)) * SHARE : 0.f, slope = reduce_add(sum_of(along)) * SHARE;
        for (int i = 0; i < N; i++) store(dx + i * W, (g[i] - level - v[i] * slope) * rstd);
      }
    }
    for (int i = 0; NORM != QkTransform::none && i < N; i++) {
      store(sums + i * W, of_weight[i]);
      store(sums + CHANNELS + i * W, of_bias[i]);
    }
  }

  // Sines of a token, null if it is not rotated; the cosines are rope_cos further.
  const float* angles(int64_t b, int64_t h, int64_t token) const {
    if (!t_.rope || token < t_.prefix) return nullptr;
    return t_.rope + b * t_.rope_b + h * t_.rope_h + (token - t_.prefix) * t_.rope_n;
  }
  template <class T, class E>
  void copy(const T* x, int64_t from, E* out) const {
    for (int64_t c = from; c < d_; c += W) {
      const int n = int(std::min<int64_t>(W, d_ - c));
      write(out + c, read(x + c, n), n);
    }
  }
  template <class T, class E>
  void rotate(const T* x, const float* sin, E* out) const {
    const float* cos = sin + t_.rope_cos;
    const int64_t half = half_, second = second_;
    if (rotation_ == NEIGHBOURS) {
      vectors(2 * half, [&](int64_t c, int n) {
        const vf v = read(x + c, n);
        write(out + c, v * read(cos + c, n) + quarter_turn(v) * read(sin + c, n), n);
      });
    } else {
      vectors(half, [&](int64_t c, int n) {
        const vf p = read(x + c, n), q = read(x + half + c, n);
        write(out + c, p * read(cos + c, n) - q * read(sin + c, n), n);
        write(out + half + c, q * read(cos + second + c, n) + p * read(sin + second + c, n), n);
      });
    }
  }
  // In place: the gradient of the rotated channels to that of their source.
  void rotate_back(float* g, float scale, const float* sin) const {
    const float* cos = sin + t_.rope_cos;
    const int64_t half = half_, second = second_;
    if (rotation_ == NEIGHBOURS) {
      vectors(2 * half, [&](int64_t c, int n) {
        const vf v = read(g + c, n) * scale;
        write(g + c, v * read(cos + c, n) - quarter_turn(v * read(sin + c, n)), n);
      });
    } else {
      vectors(half, [&](int64_t c, int n) {
        const vf p = read(g + c, n) * scale, q = read(g + half + c, n) * scale;
        write(g + c, p * read(cos + c, n) + q * read(sin + second + c, n), n);
        write(g + half + c, q * read(cos + second + c, n) - p * read(sin + c, n), n);
      });
    }
  }
  template <bool CENTERED, class T>
  void norm_backward(const T* x, const float* dy, T* dx, float* sums) const {
    const float share = 1.f / float(d_);
    const int64_t columns = columns_of(d_);
    float mean[1] = {0.f}, rstd[1], of_g[1] = {0.f}, of_gx[1];
    if constexpr (CENTERED) {
      row_sums<1>(d_, mean, [&](int, int64_t c, int n) { return read(x + c, n); });
      mean[0] *= share;
    }
    const auto centered = [&](int64_t c, int n) {
      const vf v = read(x + c, n) - mean[0];
      return n == W ? v : keep_first(v, n);
    };
    row_sums<1>(d_, rstd, [&](int, int64_t c, int n) {
      const vf v = centered(c, n);
      return v * v;
    });
    rstd[0] = 1.f / std::sqrt(rstd[0] * share + t_.eps);
    row_sums<1>(d_, of_gx, [&](int, int64_t c, int n) {
      const vf g = read(dy + c, n), v = centered(c, n) * rstd[0];
      store(sums + c, load(sums + c) + g * v);
      return g * load(weight_ + c) * v;
    });
    if constexpr (CENTERED) {
      row_sums<1>(d_, of_g, [&](int, int64_t c, int n) {
        const vf g = read(dy + c, n);
        store(sums + columns + c, load(sums + columns + c) + g);
        return g * load(weight_ + c);
      });
    }
    const float level = of_g[0] * share, slope = of_gx[0] * share;
    vectors(d_, [&](int64_t c, int n) {
      const vf v = centered(c, n) * rstd[0];
      write(dx + c, (read(dy + c, n) * load(weight_ + c) - level - v * slope) * rstd[0], n);
    });
  }

  QkTransform t_{};
  int64_t d_, half_ = 0, second_ = 0;  // channels of a pair's first, and where the angles of its second are
  bool active_ = false;
  Rotation rotation_ = NO_ROTATION;
  const float *weight_ = nullptr, *bias_ = nullptr;
  float* row_ = nullptr;
};

}  // namespace pyvit::PYVIT_ISA
