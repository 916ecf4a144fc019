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
// + c |x|), so that no digit is lost to 1 + erf(x): relative error 6e-8, or 8e-5 with COARSE, for values about to be
// rounded to 16 bits. From |x| = 64 on the first factor is 0.
template <bool COARSE>
inline vf normal(vf x, vf& bell) {
  const vf t = reciprocal<COARSE>(1.f + (COARSE ? 0.35f : 0.3f) * vmin(vabs(x), set1(64.f)));
  bell = exp2v<COARSE>(x * x * (-0.5f * LOG2E));
  vf p;
  if constexpr (COARSE) {
    p = set1(-9.862183796e-02f);
    p = p * t + 2.812258486e-01f;
    p = p * t + 8.496636348e-03f;
    p = p * t + 1.741778784e-01f;
    p = p * t + 1.344247190e-01f;
    p = p * t + 3.069925355e-04f;
  } else {
    p = set1(3.843850270e-02f);
    p = p * t - 1.694583297e-01f;
    p = p * t + 2.292625457e-01f;
    p = p * t - 7.719386369e-02f;
    p = p * t + 1.430088878e-01f;
    p = p * t + 9.448263794e-02f;
    p = p * t + 1.219715029e-01f;
    p = p * t + 1.194805577e-01f;
    p = p * t + 7.584521882e-06f;
  }
  const vf low = bell * p;
  return x < 0.f ? low : 1.f - low;
}

// sigmoid(x), and 1 - sigmoid(x) to as many digits.
template <bool COARSE>
inline vf sigmoid(vf x, vf& rest) {
  const vf power = x * -LOG2E, e = exp2v<COARSE>(vmin(power, set1(126.f))), s = reciprocal<COARSE>(1.f + e);
  rest = power > 126.f ? set1(1.f) : e * s;
  return power > 126.f ? vf{} : s;
}

// An activation y(x); `gradient` gives y and the gradient of x for that of y.
template <bool COARSE>
struct Gelu {
  static inline vf value(vf x) {
    vf bell;
    return x * normal<COARSE>(x, bell);
  }
  static inline vf gradient(vf x, vf g, vf& y) {
    vf bell;
    const vf phi = normal<COARSE>(x, bell);
    y = x * phi;
    return g * (phi + x * bell * 0.3989422804f);
  }
};

// x sigmoid(a(x)), where `A::at` gives a and `A::slope` its derivative.
template <class A, bool COARSE>
struct Gated {
  static inline vf value(vf x) {
    vf rest;
    return x * sigmoid<COARSE>(A::at(x), rest);
  }
  static inline vf gradient(vf x, vf g, vf& y) {
    vf rest;
    const vf s = sigmoid<COARSE>(A::at(x), rest);
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

template <class T>
void of_type(const Activation& a) {
  constexpr bool COARSE = sizeof(T) == 2;
  switch (a.kind) {
    case Activation::gelu:
      return run<Gelu<COARSE>, T>(a);
    case Activation::gelu_tanh:
      return run<Gated<Tanh, COARSE>, T>(a);
    case Activation::quick_gelu:
      return run<Gated<Quick, COARSE>, T>(a);
    case Activation::silu:
      return run<Gated<Identity, COARSE>, T>(a);
    case Activation::relu:
      return run<Relu, T>(a);
  }
}

}  // namespace

void activation(const Activation& a) {
  switch (a.dtype) {
    case Dtype::bf16:
      return of_type<bf16>(a);
    case Dtype::f16:
      return of_type<f16>(a);
    default:
      return of_type<float>(a);
  }
}

}  // namespace pyvit::PYVIT_ISA
