// What launchers must know of a device before they choose a kernel.
#include "kernel_launch.cuh"

namespace pyvit::cuda {

const char* find_shared_limit(Stream& stream) {
#ifdef __CUDACC__
  return read_shared_limit(stream);
#else
  stream.shared_limit = emulation::shared_limit();
  return nullptr;
#endif
}

}  // namespace pyvit::cuda
