// Tensors as the kernels take and return them, for the files of this folder: LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"

// The namespaces of the operators in torch.ops; packaging/hub.py builds a copy under others.
#ifndef PYVIT_NAMESPACE
#define PYVIT_NAMESPACE pyvit
#define PYVIT_CUDA_NAMESPACE pyvit_cuda
#endif

namespace pyvit {

// Uninitialised, on the device of `like`. Straight through the C interface: the dispatcher's way to `new_empty` and
// `transpose` costs microseconds.
inline Tensor make_strided(const Tensor& like, const int64_t* shape, const int64_t* strides, int64_t dims,
                           ScalarType dtype) {
  AtenTensorHandle made;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, shape, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &made));
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
// (B, H, N, D), with tokens before heads in memory: merging the heads needs no copy.
inline Tensor make_heads(const Tensor& like, int64_t b, int64_t h, int64_t n, int64_t d) {
  const int64_t shape[] = {b, h, n, d}, strides[] = {n * h * d, d, h * d, 1};
  return make_strided(like, shape, strides, 4, like.scalar_type());
}
inline Tensor zeros(const Tensor& like, const Ints& shape, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_zeros(like, Shape(shape.data(), shape.size()), dtype);
}
inline Tensor none(const Tensor& like) { return make(like, {0}); }
inline Ints shape_of(const Tensor& t) { return Ints(t.sizes().begin(), t.sizes().end()); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Maybe dense(const Maybe& t) { return t ? Maybe(dense(*t)) : t; }
inline Maybe dense_as(const Maybe& t, ScalarType dtype) {
  return t ? Maybe(dense(t->scalar_type() == dtype ? *t : torch::stable::to(*t, dtype))) : t;
}
// A small parameter of an operator: contiguous float32.
inline Maybe parameter(const Maybe& t) { return dense_as(t, ScalarType::Float); }

template <class T = void>
inline T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
template <class T = void>
inline T* data(const Maybe& t) {
  return t ? data<T>(*t) : nullptr;
}

}  // namespace pyvit
