// A CUDA runtime that fails as told, keeps a last error as the real one does, and writes down what was called.
#include <string>

#include "device_launch.h"

namespace {
std::string script, said;
int current = 0;
cudaError_t last = cudaSuccess;

// The script is "call=code;": the call of that name returns the code each time.
cudaError_t answer(const std::string& call, const std::string& detail = "") {
  said += call + detail + ";";
  const size_t at = script.find(call + "=");
  const auto code = cudaError_t(at == std::string::npos ? 0 : std::stoi(script.substr(at + call.size() + 1)));
  if (code != cudaSuccess) last = code;
  return code;
}
std::string number(long long n) { return " " + std::to_string(n); }
}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return answer("cudaGetDevice");
}
cudaError_t cudaSetDevice(int device) {
  const cudaError_t code = answer("cudaSetDevice" + std::string(device ? "" : "Back"), number(device));
  if (code == cudaSuccess) current = device;
  return code;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 101376;
  return answer("cudaDeviceGetAttribute", number(device));
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return answer("cudaFuncSetAttribute", number(value));
}
cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return answer("cudaLaunchKernel",
                number(grid.x) + number(block.x) + number(shared) + number(*static_cast<int*>(arguments[0])));
}
cudaError_t cudaGetLastError() {
  const cudaError_t code = last;
  last = cudaSuccess;
  return code;
}
const char* cudaGetErrorString(cudaError_t code) {
  static std::string text;
  text = "error " + std::to_string(code);
  return text.c_str();
}

extern "C" {
const char* scripted_launch(const char* wanted, int device, int shared) {
  script = wanted, said.clear(), current = 0, last = cudaSuccess;
  int parameters = 42;
  return pyvit::cuda::launch_on_device("attention", nullptr, dim3(3, 2), 64, shared, &parameters,
                                       {nullptr, device, 101376});
}
const char* scripted_limit(const char* wanted, int device, int* limit) {
  script = wanted, said.clear(), last = cudaSuccess;
  pyvit::cuda::Stream stream{nullptr, device, 0};
  const char* error = pyvit::cuda::read_shared_limit(stream);
  *limit = stream.shared_limit;
  return error;
}
const char* scripted_calls() { return said.c_str(); }
int scripted_device() { return current; }
int scripted_last_error() { return last; }
}
