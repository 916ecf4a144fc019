// pyvit._C: build facts, the processor's features and measured peak rates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "build_facts.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> found;
  for (const auto& [name, present] : pyvit::cpu_features()) found[name] = present;
  return found;
}

template <class F>
void on_threads(int count, const F& f) {
  std::vector<std::thread> pool;
  for (int t = 1; t < count; t++) pool.emplace_back(f, t);
  f(0);
  for (auto& thread : pool) thread.join();
}

void check(int threads, double seconds) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  if (!(seconds > 0)) throw std::invalid_argument("seconds must be positive, got " + std::to_string(seconds));
}

double fma_peak(const std::string& dtype, int threads, double seconds) {
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "int8")
    throw std::invalid_argument("dtype must be float32, bfloat16 or int8, got " + dtype);
  check(threads, seconds);
  py::gil_scoped_release release;
  std::vector<double> rates(threads);
  const auto which = dtype == "bfloat16" ? pyvit::Dtype::bf16 : pyvit::Dtype::f32;
  on_threads(threads, [&](int t) {
    rates[t] = dtype == "int8" ? PYVIT_OF_INT8_ISA(int8_peak(seconds)) : PYVIT_OF_ISA(fma_peak(which, seconds));
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

double copy_bandwidth(int threads, double seconds, int64_t bytes) {
  check(threads, seconds);
  if (bytes < 1) throw std::invalid_argument("bytes must be positive, got " + std::to_string(bytes));
  py::gil_scoped_release release;
  std::vector<double> rates(threads);
  on_threads(threads, [&](int t) {
    std::vector<char> from(bytes, 1), to(bytes, 2);
    const auto start = std::chrono::steady_clock::now();
    double elapsed = 0;
    int64_t rounds = 0;
    for (; elapsed < seconds; rounds++) {
      std::memcpy(to.data(), from.data(), bytes);
      asm volatile("" ::"r"(to.data()) : "memory");
      elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    rates[t] = 2.0 * double(rounds) * double(bytes) / elapsed * 1e-9;
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, processor features and peak-rate probes of pyvit.";
  m.attr("compiler") = PYVIT_COMPILER;
  m.attr("cuda_archs") = PYVIT_CUDA_ARCHS;
  m.def("cpu_features", &cpu_features, "Instruction-set extensions of this processor that pyvit looks for.");
  m.def(
      "cpu_isa", [] { return std::string(pyvit::isa_name(pyvit::isa())); }, "The instruction set the CPU kernels use.");
  m.def(
      "int8_isa", [] { return std::string(pyvit::isa_name(pyvit::int8_isa())); },
      "The instruction set the kernels on int8 weights use.");
  m.def("fma_peak", &fma_peak, py::arg("dtype") = "float32", py::arg("threads") = 1, py::arg("seconds") = 0.2,
        "Multiply-add rate in GF/s (2 per multiply-add) with all operands in registers, summed over threads; dtype "
        "float32, bfloat16 or int8 (sums in int32).");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("threads") = 1, py::arg("seconds") = 0.2,
        py::arg("bytes") = int64_t(256) << 20,
        "Copy rate in GB/s, bytes read plus bytes written, summed over threads each copying its own buffer of that "
        "size.");
}
