// Activations and their gradients: each in one pass over memory, the gradient with the sums of its columns (a bias's
// gradient) and, where asked, the activation again, so that nothing but its argument need be kept.
#include "gemm_tile.h"
#include "kernels.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Rows of one unit of work. Column sums are of one unit first, which bounds their rounding error; the number does not
// depend on threads.
constexpr int64_t ROWS = 32;

// The normal distribution at x, and exp(-x^2 / 2). Below zero it is exp(-x^2 / 2) times a minimax polynomial in 1 / (1
// + 0.3 |x|): relative error 6e-8, so that no digit is lost to 1 + erf(x).
inline vf normal(vf x, vf& bell) {
  const vf t = 1.f / (1.f + 0.3f * vmax(-x, x));
  bell = exp2v(x * x * (-0.5f * LOG2E));
  vf p = set1(3.843850270e-02f);
  p = p * t - 1.694583297e-01f;
  p = p * t + 2.292625457e-01f;
  p = p * t - 7.719386369e-02f;
  p = p * t + 1.430088878e-01f;
  p = p * t + 9.448263794e-02f;
  p = p * t + 1.219715029e-01f;
  p = p * t + 1.194805577e-01f;
  p = p * t + 7.584521882e-06f;
  const vf low = bell * p;
  return x < 0.f ? low : 1.f - low;
}

// sigmoid(x), and 1 - sigmoid(x) to as many digits.
inline vf sigmoid(vf x, vf& rest) {
  const vf power = x * -LOG2E, e = exp2v(vmin(power, set1(126.f))), s = 1.f / (1.f + e);
  rest = power > 126.f ? set1(1.f) : e * s;
  return power > 126.f ? vf{} : s;
}

// An activation y(x); `gradient` gives y and the gradient of x for that of y.
struct Gelu {
  static inline vf value(vf x) {
    vf bell;
    return x * normal(x, bell);
  }
  static inline vf gradient(vf x, vf g, vf& y) {
    vf bell;
    const vf phi = normal(x, bell);
    y = x * phi;
    return g * (phi + x * bell * 0.3989422804f);
  }
};

// x sigmoid(a(x)), where `A::at` gives a and `A::slope` its derivative.
template <class A>
struct Gated {
  static inline vf value(vf x) {
    vf rest;
    return x * sigmoid(A::at(x), rest);
  }
  static inline vf gradient(vf x, vf g, vf& y) {
    vf rest;
    const vf s = sigmoid(A::at(x), rest);
    y = x * s;
    return g * (s + y * rest * A::slope(x));
  }
};
struct Identity {
  static inline vf at(vf x) { return x; }
  static inline vf slope(vf) { return set1(1.f); }
};
struct Quick {
  static inline vf at(vf x) { return x * 1.702f; }
  static inline vf slope(vf) { return set1(1.702f); }
};
struct Tanh {  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  static inline vf at(vf x) { return 1.5957691216f * (x + 0.044715f * x * x * x); }
  static inline vf slope(vf x) { return 1.5957691216f * (1.f + 0.134145f * x * x); }
};

struct Relu {  // a NaN passes
  static inline vf value(vf x) { return x <= 0.f ? vf{} : x; }
  static inline vf gradient(vf x, vf g, vf& y) {
    y = value(x);
    return x <= 0.f ? vf{} : g;
  }
};

// body(column, elements there) for vectors of a row, the last one shorter.
template <class F>
inline void vectors(int64_t cols, const F& body) {
  int64_t c = 0;
  for (; c + W <= cols; c += W) body(c, W);
  if (c < cols) body(c, int(cols - c));
}
template <class T>
inline vf read(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
inline void write(T* p, vf v, int n) {
  n == W ? store(p, v) : store_n(p, v, n);
}

template <class Y, class T>
void forward(const Activation& a) {
  const int64_t n = a.rows * a.cols, step = 16384;
  const T* in = static_cast<const T*>(a.in);
  T* out = static_cast<T*>(a.out);
  parallel_units((n + step - 1) / step, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t at = unit * step;
      vectors(std::min(step, n - at),
              [&](int64_t i, int left) { write(out + at + i, Y::value(read(in + at + i, left)), left); });
    }
  });
}

template <class Y, class T, bool AGAIN>
void backward(const Activation& a) {
  const int64_t units = (a.rows + ROWS - 1) / ROWS, ld = round_up(a.cols, W);
  float* sums = shared().take<float>(units * ld);
  parallel_units(units, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      float* sum = sums + unit * ld;
      std::fill_n(sum, ld, 0.f);
      for (int64_t row = unit * ROWS; row < std::min(a.rows, (unit + 1) * ROWS); row++) {
        const int64_t at = row * a.cols;
        const T *in = static_cast<const T*>(a.in) + at, *grad = static_cast<const T*>(a.grad) + at;
        T* grad_in = static_cast<T*>(a.grad_in) + at;
        vectors(a.cols, [&](int64_t c, int left) {
          vf y;
          const vf g = Y::gradient(read(in + c, left), read(grad + c, left), y);
          write(grad_in + c, g, left);
          if constexpr (AGAIN) write(static_cast<T*>(a.out) + at + c, y, left);
          store(sum + c, load(sum + c) + g);
        });
      }
    }
  });
  for (int64_t c = 0; c < a.cols; c += W) {
    vf total{};
    for (int64_t unit = 0; unit < units; unit++) total += load(sums + unit * ld + c);
    write(a.column_sums + c, total, int(std::min<int64_t>(W, a.cols - c)));
  }
}

template <class Y, class T>
void run(const Activation& a) {
  if (!a.grad) return forward<Y, T>(a);
  a.out ? backward<Y, T, true>(a) : backward<Y, T, false>(a);
}

template <class Y>
void of_type(const Activation& a) {
  switch (a.dtype) {
    case Dtype::bf16:
      return run<Y, bf16>(a);
    case Dtype::f16:
      return run<Y, f16>(a);
    default:
      return run<Y, float>(a);
  }
}

}  // namespace

void activation(const Activation& a) {
  switch (a.kind) {
    case Activation::gelu:
      return of_type<Gelu>(a);
    case Activation::gelu_tanh:
      return of_type<Gated<Tanh>>(a);
    case Activation::quick_gelu:
      return of_type<Gated<Quick>>(a);
    case Activation::silu:
      return of_type<Gated<Identity>>(a);
    case Activation::relu:
      return of_type<Relu>(a);
  }
}

}  // namespace pyvit::PYVIT_ISA
