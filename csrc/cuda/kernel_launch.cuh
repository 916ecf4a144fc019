// Launching a kernel on a stream of a device, under nvcc and in the emulation, with errors as text that names the
// kernel.
#pragma once

#include <cstdio>

#include <type_traits>

#include "launch.h"
#include "mma.cuh"

namespace pyvit::cuda {

#ifdef __CUDACC__

inline const char* describe(const char* kernel, const char* call, cudaError_t code, dim3 grid, dim3 block, int shared) {
  static thread_local char text[256];
  snprintf(text, sizeof text, "%s: %s failed: %s (grid %u x %u x %u, block %u, %d bytes of shared memory)", kernel,
           call, cudaGetErrorString(code), grid.x, grid.y, grid.z, block.x, shared);
  return text;
}

// The static runtime linked here has its own current device, apart from the one of torch's.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&previous_);
    if (previous_ != device) cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

template <class Params>
const char* launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, int shared, const Params& params,
                   Stream stream) {
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return nullptr;
  OnDevice guard(stream.device);
  if (shared > 48 << 10) {
    const cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (code != cudaSuccess) return describe(name, "cudaFuncSetAttribute", code, grid, threads, shared);
  }
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream.handle)>>>(params);
  const cudaError_t code = cudaGetLastError();
  return code == cudaSuccess ? nullptr : describe(name, "launch", code, grid, threads, shared);
}

#else

template <class Params>
const char* launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, int shared, const Params& params,
                   Stream) {
  if (uint64_t(grid.x) * grid.y * grid.z == 0) return nullptr;
  return emulation::launch(name, [&] { kernel(params); }, grid, dim3(threads), shared);
}

#endif

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

}  // namespace pyvit::cuda
