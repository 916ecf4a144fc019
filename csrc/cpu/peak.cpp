// The peak rate of one instruction set: apart from the kernels, so that pyvit._C is built of this unit alone.
#include <chrono>

#include "gemm_tile.h"
#include "kernel_args.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Multiply-adds per second of the register tile alone: operands in registers, nothing loaded.
template <class D>
double peak(double seconds) {
  vf acc[MR * NV];
  for (auto& x : acc) x = vf{};
  vu b{};
  uint32_t a = 0;
  asm volatile("" : "+m"(a), "+m"(b));
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t rounds = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 10000; i++) {
#pragma GCC unroll 32
      for (int t = 0; t < MR * NV; t++) D::fma(acc[t], a, b);
    }
    rounds += 10000;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  vf sum{};
  for (auto& x : acc) sum += x;
  asm volatile("" ::"m"(sum));
  return 2.0 * double(rounds) * MR * NV * W * D::K / elapsed * 1e-9;
}

}  // namespace

double fma_peak(Dtype dtype, double seconds) {
  return dtype == Dtype::bf16 ? peak<Compute<bf16>>(seconds) : peak<F32>(seconds);
}

}  // namespace pyvit::PYVIT_ISA
