// Run-time choice of the instruction set.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyvit {

// Defined by each compilation of the kernel units.
#define PYVIT_DECLARE(name) \
  namespace name {          \
  const Kernels& table();   \
  }
PYVIT_DECLARE(portable)
#if defined(__x86_64__)
PYVIT_DECLARE(avx2)
PYVIT_DECLARE(avx512)
PYVIT_DECLARE(avx512bf16)
#endif

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

bool supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512bf16:
      return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::avx512:
      return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::portable:
      return true;
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

Isa choose() {
  const char* forced = std::getenv("PYVIT_CPU_ISA");
  for (int i = 3; i >= 0; i--) {
    const Isa candidate = Isa(i);
    if (forced && *forced ? std::string(forced) == kNames[i] : supported(candidate)) {
      if (!supported(candidate))
        throw std::runtime_error(std::string("PYVIT_CPU_ISA=") + forced + ": not supported by this processor");
      return candidate;
    }
  }
  throw std::runtime_error(std::string("PYVIT_CPU_ISA must be portable, avx2, avx512 or avx512bf16, got ") + forced);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}
const char* isa_name(Isa isa) { return kNames[int(isa)]; }

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512bf16:
      return avx512bf16::table();
    case Isa::avx512:
      return avx512::table();
    case Isa::avx2:
      return avx2::table();
    case Isa::portable:
      break;
  }
#endif
  return portable::table();
}

}  // namespace pyvit
