// Small reductions in a fixed order.
#pragma once

#include "kernel_launch.cuh"

namespace pyvit::cuda {

struct Partials {
  const float* from;  // (count, elements)
  int count;
  int64_t elements;
  Type type;
  void* to;
};

static __global__ void __launch_bounds__(256) sum_partials(const __grid_constant__ Partials p) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.elements) return;
  float sum = 0.0f;
  for (int i = 0; i < p.count; ++i) sum += p.from[i * p.elements + at];
  if (p.type == Type::f32)
    static_cast<float*>(p.to)[at] = sum;
  else if (p.type == Type::f16)
    static_cast<f16*>(p.to)[at] = narrow<f16>(sum);
  else
    static_cast<bf16*>(p.to)[at] = narrow<bf16>(sum);
}

inline const char* reduce_partials(const float* from, int count, int64_t elements, Type type, void* to, Stream stream) {
  return launch("sum_partials", sum_partials, ceil_div(elements, 256), 256, 0,
                Partials{from, count, elements, type, to}, stream);
}

}  // namespace pyvit::cuda
