// From the dtype of a call to the element type a kernel is instantiated for.
#pragma once

#include "kernel_args.h"
#include "vec.h"

namespace pyvit::PYVIT_ISA {

// f(an element of the type that `dtype` names).
template <class F>
inline void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

}  // namespace pyvit::PYVIT_ISA
