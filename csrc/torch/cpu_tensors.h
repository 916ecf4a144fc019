// Tensors and names as the CPU kernels take them.
#pragma once

#include <algorithm>
#include <iterator>

#include "../cpu/isa.h"
#include "common.h"

namespace pyvit {

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false,
                      "pyvit: the cpu kernels take float32, bfloat16 and float16 tensors; use backend='reference'");
  }
}

inline Activation::Kind activation_kind(const std::string& name) {
  constexpr const char* NAMES[] = {"gelu", "gelu_tanh", "quick_gelu", "silu", "relu"};
  const auto* found = std::find(std::begin(NAMES), std::end(NAMES), name);
  STD_TORCH_CHECK(found != std::end(NAMES), "pyvit: activation: no activation is called '", name, "'");
  return Activation::Kind(found - std::begin(NAMES));
}

// Unit stride in the last dimension, by a copy where it is not.
inline Tensor rows(const Tensor& t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}

inline float* vector(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.defined() && t.scalar_type() == ScalarType::Float && t.numel() == n && t.is_contiguous(),
                  "pyvit: ", name, " must be ", n, " contiguous float32 numbers");
  return data<float>(t);
}

}  // namespace pyvit
