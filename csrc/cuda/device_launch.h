// A launch on a stream of a device through the CUDA runtime, with errors as text that names the call that failed.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <iterator>

#include "launch.h"

namespace pyvit::cuda {

// Errors after which every later call of the process fails too, as the runtime's documentation has it.
inline bool is_sticky(cudaError_t code) {
  switch (code) {
    case cudaErrorECCUncorrectable:
    case cudaErrorContained:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorExternalDevice:
      return true;
    default:
      return false;
  }
}

// Calls of the runtime one after another until one fails.
class Calls {
 public:
  template <class Call>
  bool run(const char* name, Call call) {
    if (code_ != cudaSuccess) return false;
    failed_ = name;
    code_ = call();
    if (code_ != cudaSuccess) cudaGetLastError();  // taken here, so that no later call reports it as its own
    return code_ == cudaSuccess;
  }
  // nullptr, or what failed; valid until the thread's next.
  const char* error(const char* kernel, dim3 grid, int threads, int shared) const {
    if (code_ == cudaSuccess) return nullptr;
    static thread_local char text[384];
    if (is_sticky(code_))
      snprintf(
          text, sizeof text,
          "%s was not launched: an earlier kernel of this process, not necessarily pyvit's, failed with '%s' (seen "
          "by %s); no CUDA call succeeds until the process is started again. CUDA_LAUNCH_BLOCKING=1 shows which "
          "kernel it was",
          kernel, cudaGetErrorString(code_), failed_);
    else
      snprintf(text, sizeof text, "%s: %s failed: %s (grid %u x %u x %u, block %d, %d bytes of shared memory)", kernel,
               failed_, cudaGetErrorString(code_), grid.x, grid.y, grid.z, threads, shared);
    return text;
  }

 private:
  cudaError_t code_ = cudaSuccess;
  const char* failed_ = "";
};

// Stream::shared_limit, which the runtime is asked for once per device.
inline const char* read_shared_limit(Stream& stream) {
  static std::atomic<int> found[64];
  const bool kept = unsigned(stream.device) < std::size(found);
  stream.shared_limit = kept ? found[stream.device].load() : 0;
  if (stream.shared_limit) return nullptr;
  static thread_local char text[256];
  const cudaError_t code =
      cudaDeviceGetAttribute(&stream.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device);
  if (code != cudaSuccess) {
    cudaGetLastError();
    snprintf(text, sizeof text, "cudaDeviceGetAttribute failed on device %d: %s", stream.device,
             cudaGetErrorString(code));
    return text;
  }
  if (kept) found[stream.device] = stream.shared_limit;
  return nullptr;
}

// The static runtime linked here may have another current device than torch's; the thread gets its own back, also after
// a failure.
inline const char* launch_on_device(const char* name, const void* kernel, dim3 grid, int threads, int shared,
                                    void* params, Stream stream) {
  if (shared > stream.shared_limit) {
    static thread_local char text[256];
    snprintf(text, sizeof text, "%s: a block needs %d bytes of shared memory, and device %d gives %d at most", name,
             shared, stream.device, stream.shared_limit);
    return text;
  }
  Calls calls, back;
  int previous = 0;
  if (!calls.run("cudaGetDevice", [&] { return cudaGetDevice(&previous); }))
    return calls.error(name, grid, threads, shared);
  if (previous != stream.device) calls.run("cudaSetDevice", [&] { return cudaSetDevice(stream.device); });
  if (shared > 48 << 10)
    calls.run("cudaFuncSetAttribute",
              [&] { return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared); });
  void* arguments[] = {params};
  calls.run("cudaLaunchKernel", [&] {
    return cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared, static_cast<cudaStream_t>(stream.handle));
  });
  if (previous != stream.device) back.run("cudaSetDevice (back)", [&] { return cudaSetDevice(previous); });
  const char* error = calls.error(name, grid, threads, shared);
  return error ? error : back.error(name, grid, threads, shared);
}

}  // namespace pyvit::cuda
