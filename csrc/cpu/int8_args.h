// What the kernels on int8 weights are asked to do: as kernel_args.h.
#pragma once

#include "kernel_args.h"

namespace pyvit {

// The layers' weights are int8, packed by Int8Kernels: a row of a weight stands for itself times its scale. `first` and
// `second`: scales (out,) of the layers.
struct Int8Linear {
  FusedLinear linear;
  const float *first, *second;
};

struct Int8Kernels {
  int64_t (*packed_words)(int64_t in, int64_t out);
  void (*pack)(const int8_t* weight, int64_t in, int64_t out, uint32_t* packed);
  void (*fused_linear)(const Int8Linear&);
};

}  // namespace pyvit
