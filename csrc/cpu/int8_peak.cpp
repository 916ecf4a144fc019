// The peak rate of products of 8-bit integers: see peak.cpp.
#include <chrono>

#include "int8_tile.h"

namespace pyvit::PYVIT_ISA {
namespace {

// A tile's sums, from operands in registers. Where a product is apart from its sum, equal ones would be computed once,
// and those of every round before the first: so the operands differ, and the weights seem to change.
constexpr int ROWS = Dot::SHIFTED ? MR : 4;
struct Operands {
  uint32_t a[ROWS];
  vu b[NV];
};
inline void round(vi (&sum)[ROWS * NV], Operands& x) {
  if constexpr (Dot::SHIFTED) {
#pragma GCC unroll 32
    for (int t = 0; t < ROWS * NV; t++) Dot::add(sum[t], x.a[0], x.b[0]);
  } else {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(x.b[0]), "+v"(x.b[1]), "+v"(x.b[NV - 2]), "+v"(x.b[NV - 1]));
#elif defined(__SSE2__)
    asm volatile("" : "+x"(x.b[0]), "+x"(x.b[1]));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(x.b[0]), "+w"(x.b[1]));
#endif
#pragma GCC unroll 32
    for (int t = 0; t < ROWS * NV; t++) Dot::add(sum[t], x.a[t / NV], x.b[t % NV]);
  }
}

}  // namespace

double int8_peak(double seconds) {
  vi sum[ROWS * NV];
  for (auto& each : sum) each = vi{};
  Operands operands{};
  asm volatile("" : "+m"(operands));
  Operands x = operands;
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t rounds = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 10000; i++) round(sum, x);
    rounds += 10000;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  vi total{};
  for (auto& each : sum) total += each;
  asm volatile("" ::"m"(total));
  return 2.0 * double(rounds) * ROWS * NV * W * Dot::K / elapsed * 1e-9;
}

}  // namespace pyvit::PYVIT_ISA
