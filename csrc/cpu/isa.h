// The instruction sets a kernel unit is compiled for, and the table of kernels each compilation exports.
#pragma once

#include <cstdint>

#include "kernel_args.h"

namespace pyvit {

// The unit's own namespace; the build passes -DPYVIT_ISA=avx2 and so on.
enum class Isa { portable, avx2, avx512, avx512bf16 };

// The best set this processor and this build have, or the one PYVIT_CPU_ISA names; throws std::runtime_error when it
// cannot run here.
Isa isa();
const char* isa_name(Isa isa);
const Kernels& kernels();  // of isa()

}  // namespace pyvit
