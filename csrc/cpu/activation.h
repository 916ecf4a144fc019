// Activations and their gradients, on vectors of floats.
#pragma once

#include "kernel_args.h"
#include "vec.h"

namespace pyvit::PYVIT_ISA {

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

// body(Y{}) with the activation Y that `kind` names.
template <bool COARSE, class F>
inline void with_activation(Activation::Kind kind, const F& body) {
  switch (kind) {
    case Activation::gelu:
      return body(Gelu<COARSE>{});
    case Activation::gelu_tanh:
      return body(Gated<Tanh, COARSE>{});
    case Activation::quick_gelu:
      return body(Gated<Quick, COARSE>{});
    case Activation::silu:
      return body(Gated<Identity, COARSE>{});
    case Activation::relu:
      return body(Relu{});
  }
}

// The activation of x + bias in place, of `rows` rows of x, `ld` apart, and `cols` columns, rounded up to whole
// vectors.
template <bool COARSE>
void activate(Activation::Kind kind, int64_t rows, int64_t cols, float* x, int64_t ld, const float* bias);

}  // namespace pyvit::PYVIT_ISA
