// Launching a kernel, under nvcc and in the emulation, with errors as text that names the kernel.
#pragma once

#include <type_traits>

#include "launch.h"
#include "mma.cuh"
#ifdef __CUDACC__
#include "device_launch.h"
#endif

namespace pyvit::cuda {

template <class Params>
const char* launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, int shared, const Params& params,
                   [[maybe_unused]] Stream stream) {
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return nullptr;
#ifdef __CUDACC__
  return launch_on_device(name, reinterpret_cast<const void*>(kernel), grid, threads, shared,
                          const_cast<Params*>(&params), stream);
#else
  return emulation::launch(name, [&] { kernel(params); }, grid, dim3(threads), shared);
#endif
}

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

}  // namespace pyvit::cuda
