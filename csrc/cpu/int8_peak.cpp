// The peak rate of products of 8-bit integers: see peak.cpp.
#include <chrono>

#include "int8_tile.h"

namespace pyvit::PYVIT_ISA {

double int8_peak(double seconds) {
  vi sum[MR * NV];
  for (auto& x : sum) x = vi{};
  vu b{};
  uint32_t a = 0;
  asm volatile("" : "+m"(a), "+m"(b));
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t rounds = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 10000; i++) {
#pragma GCC unroll 32
      for (int t = 0; t < MR * NV; t++) Dot::add(sum[t], a, b);
    }
    rounds += 10000;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  vi total{};
  for (auto& x : sum) total += x;
  asm volatile("" ::"m"(total));
  return 2.0 * double(rounds) * MR * NV * W * Dot::K / elapsed * 1e-9;
}

}  // namespace pyvit::PYVIT_ISA
