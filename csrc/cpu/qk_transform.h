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
  QkRows(const QkTransform* t, bool keys, int64_t d, Scratch& memory)
      : t_(t),
        d_(d),
        half_(t ? t->rotated / 2 : 0),
        weight_(t ? widened(keys ? t->k_weight : t->q_weight, Dtype::f32, d, 1.f, memory) : nullptr),
        bias_(t ? widened(keys ? t->k_bias : t->q_bias, Dtype::f32, d, 0.f, memory) : nullptr) {}

  bool active() const { return t_ != nullptr; }
  bool normalized() const { return t_ && t_->norm != QkTransform::none; }

  // Rows x (rows, d), of token `token` and those after it, as the product takes them: out (rows, d), `ld` apart.
  template <class T>
  void transform(const T* x, int64_t ldx, int64_t rows, int64_t b, int64_t h, int64_t token, float* out, int64_t ld) const {
    if (normalized()) {
      normalize_rows(x, ldx, rows, out, ld);
      for (int64_t r = 0; r < rows; r++)
        if (const float* rope = angles(b, h, token + r)) rotate(out + r * ld, rope, out + r * ld);
      return;
    }
    for (int64_t r = 0; r < rows; r++) {
      const float* rope = angles(b, h, token + r);
      if (rope) rotate(x + r * ldx, rope, out + r * ld);
      copy(x + r * ldx, rope ? t_->rotated : 0, out + r * ld);
    }
  }

  // The same without the rotation.
  template <class T>
  void normalize_rows(const T* x, int64_t ldx, int64_t rows, float* out, int64_t ld, float* mean = nullptr,
                      float* rstd = nullptr) const {
    if (!normalized()) {
      for (int64_t r = 0; r < rows; r++) copy(x + r * ldx, 0, out + r * ld);
      return;
    }
    int64_t r = 0;
    const auto next = [&](auto count) {
      constexpr int R = decltype(count)::value;
      const auto at = [&](float* p) { return p ? p + r : nullptr; };
      const T* from = x + r * ldx;
      float* to = out + r * ld;
      if (t_->norm == QkTransform::layer) {
        normalize<R, true>(d_, from, ldx, weight_, bias_, t_->eps, to, ld, at(mean), at(rstd));
      } else {
        normalize<R, false>(d_, from, ldx, weight_, bias_, t_->eps, to, ld, at(mean), at(rstd));
      }
      r += R;
    };
    while (r + 4 <= rows) next(std::integral_constant<int, 4>{});
    while (r < rows) next(std::integral_constant<int, 1>{});
  }

  // dy (rows, d), `ld` apart and in whole vectors: gradients of what `transform` makes of x, which become scale * dy in
  // passing and then those of what the rotation was given. dx gets the gradients of x. `sums`, with a norm: those of
  // weight and bias, added to (2, columns_of(d)).
  template <class T>
  void backward(const T* x, int64_t ldx, int64_t rows, int64_t b, int64_t h, int64_t token, float scale, float* dy,
                int64_t ld, T* dx, int64_t lddx, float* sums) const {
    for (int64_t r = 0; r < rows; r++) {
      float* g = dy + r * ld;
      const float* rope = angles(b, h, token + r);
      if (rope) rotate_back(g, scale, rope);
      for (int64_t c = rope ? t_->rotated : 0; c < d_; c += W) {
        const int n = int(std::min<int64_t>(W, d_ - c));
        write(g + c, read(g + c, n) * scale, n);
      }
      if (normalized()) {
        if (t_->norm == QkTransform::layer) {
          norm_backward<true>(x + r * ldx, g, dx + r * lddx, sums);
        } else {
          norm_backward<false>(x + r * ldx, g, dx + r * lddx, sums);
        }
      } else {
        vectors(d_, [&](int64_t c, int n) { write(dx + r * lddx + c, read(g + c, n), n); });
      }
    }
  }
  static int64_t columns_of(int64_t d) { return round_up(d, W); }

  // Adds to `grad` (2, rotated) the gradients of a token's sines and cosines: dy (d) is the gradient of the row that x
  // (d), normalised, was rotated to.
  void add_angles(const float* x, const float* dy, float* grad) const {
    float *sin = grad, *cos = grad + t_->rotated;
    const auto add = [](float* to, vf v, int n) { write(to, read(to, n) + v, n); };
    if (t_->interleaved) {
      vectors(t_->rotated, [&](int64_t c, int n) {
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
  // Sines of a token, null if it is not rotated; the cosines are rope_cos further.
  const float* angles(int64_t b, int64_t h, int64_t token) const {
    if (!t_->rope || token < t_->prefix) return nullptr;
    return t_->rope + b * t_->rope_b + h * t_->rope_h + (token - t_->prefix) * t_->rope_n;
  }
  template <class T>
  void copy(const T* x, int64_t from, float* out) const {
    for (int64_t c = from; c < d_; c += W) {
      const int n = int(std::min<int64_t>(W, d_ - c));
      write(out + c, read(x + c, n), n);
    }
  }
  // The rotated channels of x to those of out, which may be x.
  template <class T>
  void rotate(const T* x, const float* sin, float* out) const {
    const float* cos = sin + t_->rope_cos;
    if (t_->interleaved) {
      vectors(t_->rotated, [&](int64_t c, int n) {
        const vf v = read(x + c, n);
        write(out + c, v * read(cos + c, n) + quarter_turn(v) * read(sin + c, n), n);
      });
    } else {
      vectors(half_, [&](int64_t c, int n) {
        const vf p = read(x + c, n), q = read(x + half_ + c, n);
        write(out + c, p * read(cos + c, n) - q * read(sin + c, n), n);
        write(out + half_ + c, q * read(cos + half_ + c, n) + p * read(sin + half_ + c, n), n);
      });
    }
  }
  // In place: the gradient of the rotated channels to that of their source.
  void rotate_back(float* g, float scale, const float* sin) const {
    const float* cos = sin + t_->rope_cos;
    if (t_->interleaved) {
      vectors(t_->rotated, [&](int64_t c, int n) {
        const vf v = read(g + c, n) * scale;
        write(g + c, v * read(cos + c, n) - quarter_turn(v * read(sin + c, n)), n);
      });
    } else {
      vectors(half_, [&](int64_t c, int n) {
        const vf p = read(g + c, n) * scale, q = read(g + half_ + c, n) * scale;
        write(g + c, p * read(cos + c, n) + q * read(sin + half_ + c, n), n);
        write(g + half_ + c, q * read(cos + half_ + c, n) - p * read(sin + c, n), n);
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
    rstd[0] = 1.f / std::sqrt(rstd[0] * share + t_->eps);
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

  const QkTransform* t_;
  int64_t d_, half_;
  const float *weight_, *bias_;
};

}  // namespace pyvit::PYVIT_ISA
