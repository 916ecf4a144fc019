// Run-time choice of the instruction set.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyvit {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};
constexpr const char* kInt8Names[] = {"portable", "avx2", "avxvnni", "avx512", "avx512vnni"};
// What PYVIT_CPU_ISA may say, the best last, and the sets that stand for it.
struct Choice {
  const char* name;
  Isa isa;
  Int8Isa int8_isa;
};
constexpr Choice kChoices[] = {
    {"portable", Isa::portable, Int8Isa::portable},   {"avx2", Isa::avx2, Int8Isa::avx2},
    {"avxvnni", Isa::avx2, Int8Isa::avxvnni},         {"avx512", Isa::avx512, Int8Isa::avx512},
    {"avx512vnni", Isa::avx512, Int8Isa::avx512vnni}, {"avx512bf16", Isa::avx512bf16, Int8Isa::avx512vnni}};

#if defined(__x86_64__)
// Asked of the processor, not of __builtin_cpu_supports, which needs a runtime library that not every compiler links.
struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(uint32_t leaf, uint32_t subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

// The register states that the operating system saves: 2 and 4 are AVX's, 0xe0 are AVX-512's.
bool saves(uint32_t states) {
  if (!(Cpuid(1, 0).ecx >> 27 & 1)) return false;  // no xgetbv
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & states) == states;
}
#endif

bool has(const char* name) {
  for (const auto& [feature, present] : cpu_features())
    if (!std::strcmp(feature, name)) return present;
  return false;
}

bool supported(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return supported(Isa::avx512) && has("avx512bf16");
    case Isa::avx512:
      return supported(Isa::avx2) && has("avx512f") && has("avx512bw") && has("avx512vl") && has("avx512dq");
    case Isa::avx2:
      return has("avx2") && has("fma") && has("f16c");
    case Isa::portable:
      return true;
  }
  return false;
}

bool supported(Int8Isa isa) {
  switch (isa) {
    case Int8Isa::avx512vnni:
      return supported(Isa::avx512) && has("avx512vnni");
    case Int8Isa::avx512:
      return supported(Isa::avx512);
    case Int8Isa::avxvnni:
      return supported(Isa::avx2) && has("avxvnni");
    case Int8Isa::avx2:
      return supported(Isa::avx2);
    case Int8Isa::portable:
      return true;
  }
  return false;
}

Choice choose() {
  const char* forced = std::getenv("PYVIT_CPU_ISA");
  if (!forced || !*forced) {
    Choice best{"", Isa::portable, Int8Isa::portable};
    for (const Choice& each : kChoices) {
      if (supported(each.isa)) best.isa = each.isa;
      if (supported(each.int8_isa)) best.int8_isa = each.int8_isa;
    }
    return best;
  }
  for (const Choice& each : kChoices)
    if (!std::strcmp(forced, each.name)) {
      if (!supported(each.isa) || !supported(each.int8_isa))
        throw std::runtime_error(std::string("PYVIT_CPU_ISA=") + forced + ": not supported by this processor");
      return each;
    }
  throw std::runtime_error(
      std::string("PYVIT_CPU_ISA must be portable, avx2, avxvnni, avx512, avx512vnni or avx512bf16, got ") + forced);
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID.
std::vector<std::pair<const char*, bool>> cpu_features() {
#if defined(__x86_64__)
  const Cpuid basic(1, 0), extended(7, 0), more(7, 1);
  const bool avx = saves(0x06), avx512 = saves(0xe6);
  const auto bit = [](uint32_t word, int at) { return (word >> at & 1) != 0; };
  return {{"avx2", avx && bit(extended.ebx, 5)},
          {"fma", avx && bit(basic.ecx, 12)},
          {"f16c", avx && bit(basic.ecx, 29)},
          {"avx512f", avx512 && bit(extended.ebx, 16)},
          {"avx512bw", avx512 && bit(extended.ebx, 30)},
          {"avx512vl", avx512 && bit(extended.ebx, 31)},
          {"avx512dq", avx512 && bit(extended.ebx, 17)},
          {"avx512bf16", avx512 && bit(more.eax, 5)},
          {"avx512vnni", avx512 && bit(extended.ecx, 11)},
          {"avxvnni", avx && bit(more.eax, 4)}};
#else
  return {};
#endif
}

Isa isa() { return chosen().isa; }
Int8Isa int8_isa() { return chosen().int8_isa; }
const char* isa_name(Isa isa) { return kNames[int(isa)]; }
const char* isa_name(Int8Isa isa) { return kInt8Names[int(isa)]; }

}  // namespace pyvit
