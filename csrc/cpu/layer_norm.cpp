// Layer norm, RMS norm and their gradients.
#include "layer_norm.h"

#include "gemm_tile.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Rows of one unit of work, in groups of four. The parameters' gradients are of one unit first, which bounds their
// rounding error; the number does not depend on threads.
inline int64_t rows_of_unit(int64_t rows) { return std::max<int64_t>(32, round_up((rows + 255) / 256, 4)); }
inline int64_t units_of(int64_t rows) { return (rows + rows_of_unit(rows) - 1) / rows_of_unit(rows); }

struct Parameters {
  const float *weight, *bias;
  Parameters(const RowNorm& a, Scratch& memory)
      : weight(widened(a.weight, a.parameters, a.cols, 1.f, memory)),
        bias(a.centered ? widened(a.bias, a.parameters, a.cols, 0.f, memory) : nullptr) {}
};

// body(first row, how many of them as a constant) for the rows of a unit, up to R together.
template <int R, class F>
inline void row_groups(int64_t rows, int64_t unit, const F& body) {
  int64_t row = unit * rows_of_unit(rows);
  const int64_t end = std::min(rows, row + rows_of_unit(rows));
  for (; row + R <= end; row += R) body(row, std::integral_constant<int, R>{});
  for (; row < end; row++) body(row, std::integral_constant<int, 1>{});
}

template <bool CENTERED, class X, class Y>
void forward(const RowNorm& a) {
  const Parameters given(a, shared());
  parallel_units(units_of(a.rows), [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;)
      row_groups<4>(a.rows, unit, [&](int64_t row, auto r) {
        normalize<r(), CENTERED>(a.cols, static_cast<const X*>(a.x) + row * a.cols, a.cols, given.weight, given.bias,
                                 a.eps, static_cast<Y*>(a.y) + row * a.cols, a.cols, a.mean ? a.mean + row : nullptr,
                                 a.rstd ? a.rstd + row : nullptr);
      });
  });
}

// With z the normalised row and g the gradient of z: (g - mean(g) - z mean(g z)) / deviation, without mean(g) where the
// row is not CENTERED. `weights` and `biases`: sums of the parameters' gradients, or null.
template <bool CENTERED, class X, class Y, int R>
inline void backward_rows(const RowNorm& a, const RowNormGrad& g, const Parameters& given, int64_t row, float* weights,
                          float* biases) {
  const X* x = static_cast<const X*>(a.x) + row * a.cols;
  const Y* grad = static_cast<const Y*>(g.grad) + row * a.cols;
  X* grad_x = static_cast<X*>(g.grad_x) + row * a.cols;
  float mean[R], rstd[R];
  for (int r = 0; r < R; r++) {
    mean[r] = CENTERED ? a.mean[row + r] : 0.f;
    rstd[r] = a.rstd[row + r];
  }
  const auto normalized = [&](int r, int64_t c, int n) {
    const vf v = read(x + r * a.cols + c, n);
    return CENTERED ? (v - mean[r]) * rstd[r] : v * rstd[r];
  };
  vf of_g[R], of_gz[R];
  for (int r = 0; r < R; r++) of_g[r] = of_gz[r] = vf{};
  vectors(a.cols, [&](int64_t c, int n) {
    const vf weight = load(given.weight + c);
    vf of_weight{}, of_bias{};
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const vf dy = read(grad + r * a.cols + c, n), z = normalized(r, c, n), gc = dy * weight;
      if (CENTERED) of_g[r] += gc;
      of_gz[r] += gc * z;
      of_weight += dy * z;
      if (CENTERED) of_bias += dy;
    }
    if (!weights) return;
    store(weights + c, load(weights + c) + of_weight);
    if (CENTERED) store(biases + c, load(biases + c) + of_bias);
  });
  const float share = 1.f / float(a.cols);
  float by_g[R], by_gz[R];
  for (int r = 0; r < R; r++) {
    by_g[r] = CENTERED ? reduce_add(of_g[r]) * share : 0.f;
    by_gz[r] = reduce_add(of_gz[r]) * share;
  }
  vectors(a.cols, [&](int64_t c, int n) {
    const vf weight = load(given.weight + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const int64_t at = r * a.cols + c;
      vf gc = read(grad + at, n) * weight;
      if (CENTERED) gc -= by_g[r];
      write(grad_x + at, (gc - normalized(r, c, n) * by_gz[r]) * rstd[r], n);
    }
  });
}

template <bool CENTERED, class X, class Y>
void backward(const RowNorm& a, const RowNormGrad& g) {
  // Three streams of float32 are as fast as memory is, and that is fastest in order.
  constexpr int TOGETHER = sizeof(X) + sizeof(Y) == 8 ? 1 : 4;
  const int64_t units = units_of(a.rows), ld = round_up(a.cols, W), size = (CENTERED ? 2 : 1) * ld;
  Scratch& memory = shared();
  const Parameters given(a, memory);
  float* sums = g.grad_weight ? memory.take<float>(units * size) : nullptr;  // of a unit: the weight's, the bias's
  parallel_units(units, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      float *weights = sums ? sums + unit * size : nullptr, *biases = sums ? weights + ld : nullptr;
      if (sums) std::fill_n(weights, size, 0.f);
      row_groups<TOGETHER>(a.rows, unit, [&](int64_t row, auto r) {
        backward_rows<CENTERED, X, Y, r()>(a, g, given, row, weights, biases);
      });
    }
  });
  if (!sums) return;
  vectors(a.cols, [&](int64_t c, int n) {
    vf weight{}, bias{};
    for (int64_t unit = 0; unit < units; unit++) {
      weight += load(sums + unit * size + c);
      if (CENTERED) bias += load(sums + unit * size + ld + c);
    }
    write(g.grad_weight + c, weight, n);
    if (CENTERED) write(g.grad_bias + c, bias, n);
  });
}

// f(whether centered as a constant, a value of x's type, one of the result's) for those of a call.
template <class F>
void of_kind(const RowNorm& a, const F& f) {
  const auto of = [&](auto x, auto y) { a.centered ? f(std::true_type{}, x, y) : f(std::false_type{}, x, y); };
  if (a.in == Dtype::bf16) return of(bf16{}, bf16{});
  if (a.in == Dtype::f16) return of(f16{}, f16{});
  if (a.out == Dtype::bf16) return of(float{}, bf16{});
  if (a.out == Dtype::f16) return of(float{}, f16{});
  of(float{}, float{});
}

}  // namespace

void row_norm(const RowNorm& a) {
  of_kind(a, [&](auto centered, auto x, auto y) { forward<centered(), decltype(x), decltype(y)>(a); });
}
void row_norm_backward(const RowNorm& a, const RowNormGrad& g) {
  of_kind(a, [&](auto centered, auto x, auto y) { backward<centered(), decltype(x), decltype(y)>(a, g); });
}

}  // namespace pyvit::PYVIT_ISA
