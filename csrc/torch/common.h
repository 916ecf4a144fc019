// Tensors as the CPU kernels want them, on LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "checks.h"

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

// Straight through the C interface: the dispatcher's way to `new_empty` and `transpose` costs microseconds.
inline Tensor make_strided(const Tensor& like, const int64_t* shape, const int64_t* strides, int64_t dims,
                           ScalarType dtype) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), like.get_device_index(), &made));
  return Tensor(made);
}
inline Tensor make(const Tensor& like, const Ints& shape, std::optional<ScalarType> dtype = std::nullopt) {
  Ints strides(shape.size());
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    step *= shape[i] ? shape[i] : 1;
  }
  return make_strided(like, shape.data(), strides.data(), int64_t(shape.size()), dtype.value_or(like.scalar_type()));
}
inline Tensor zeros(const Tensor& like, const Ints& shape, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_zeros(like, Shape(shape.data(), shape.size()), dtype);
}
inline Tensor none(const Tensor& like) { return make(like, {0}); }
inline Ints shape_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

// Unit stride in the last dimension, by a copy where it is not.
inline Tensor rows(const Tensor& t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
// The small parameters of an operator: contiguous float32.
inline Maybe parameter(const Maybe& t) {
  if (!t) return t;
  return dense(t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}
template <class T>
inline T* data(const Maybe& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

inline float* vector(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(t.defined() && t.scalar_type() == ScalarType::Float && t.numel() == n && t.is_contiguous(),
                  "pyvit: ", name, " must be ", n, " contiguous float32 numbers");
  return static_cast<float*>(t.data_ptr());
}

}  // namespace pyvit
