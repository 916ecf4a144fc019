// The instruction sets a kernel unit is compiled for, the choice among them, and the table of kernels each compilation
// exports.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "int8_args.h"

namespace pyvit {

// The unit's own namespace; the build passes -DPYVIT_ISA=avx2 and so on.
enum class Isa { portable, avx2, avx512, avx512bf16 };

// The best set this processor and this build have, or the one PYVIT_CPU_ISA names; throws std::runtime_error when it
// cannot run here. PYVIT_CPU_ISA may name a set of Int8Isa too: the other kernels then take the best one below it.
Isa isa();
const char* isa_name(Isa isa);

// Extensions of x86-64 that the kernels look for, and whether processor and operating system have them; empty on other
// processors.
std::vector<std::pair<const char*, bool>> cpu_features();

// What each compilation of the kernel units defines.
#define PYVIT_DECLARE(name)       \
  namespace name {                \
  const Kernels& table();         \
  double fma_peak(Dtype, double); \
  }
PYVIT_DECLARE(portable)
#if defined(__x86_64__)
PYVIT_DECLARE(avx2)
PYVIT_DECLARE(avx512)
PYVIT_DECLARE(avx512bf16)
// A call of isa()'s function: PYVIT_OF_ISA(table()).
#define PYVIT_OF_ISA(call)                                                \
  (::pyvit::isa() == ::pyvit::Isa::avx512bf16 ? ::pyvit::avx512bf16::call \
   : ::pyvit::isa() == ::pyvit::Isa::avx512   ? ::pyvit::avx512::call     \
   : ::pyvit::isa() == ::pyvit::Isa::avx2     ? ::pyvit::avx2::call       \
                                              : ::pyvit::portable::call)
#else
#define PYVIT_OF_ISA(call) ::pyvit::portable::call
#endif
#undef PYVIT_DECLARE

// The sets of the kernels on int8 weights, whose namespaces are int8_portable and so on: byte products (VNNI) came
// apart from the others.
enum class Int8Isa { portable, avx2, avxvnni, avx512, avx512vnni };
Int8Isa int8_isa();
const char* isa_name(Int8Isa isa);
#define PYVIT_DECLARE(name)           \
  namespace int8_##name {             \
    const Int8Kernels& int8_table();  \
    double int8_peak(double seconds); \
  }
PYVIT_DECLARE(portable)
#if defined(__x86_64__)
PYVIT_DECLARE(avx2)
PYVIT_DECLARE(avxvnni)
PYVIT_DECLARE(avx512)
PYVIT_DECLARE(avx512vnni)
#define PYVIT_OF_INT8_ISA(call)                                                         \
  (::pyvit::int8_isa() == ::pyvit::Int8Isa::avx512vnni ? ::pyvit::int8_avx512vnni::call \
   : ::pyvit::int8_isa() == ::pyvit::Int8Isa::avx512   ? ::pyvit::int8_avx512::call     \
   : ::pyvit::int8_isa() == ::pyvit::Int8Isa::avxvnni  ? ::pyvit::int8_avxvnni::call    \
   : ::pyvit::int8_isa() == ::pyvit::Int8Isa::avx2     ? ::pyvit::int8_avx2::call       \
                                                       : ::pyvit::int8_portable::call)
#else
#define PYVIT_OF_INT8_ISA(call) ::pyvit::int8_portable::call
#endif
#undef PYVIT_DECLARE

inline const Kernels& kernels() { return PYVIT_OF_ISA(table()); }
inline const Int8Kernels& int8_kernels() { return PYVIT_OF_INT8_ISA(int8_table()); }

}  // namespace pyvit
