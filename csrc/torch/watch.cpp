// Whether weights that are kept packed have changed where PyTorch counts no change: written through `.data`, NumPy,
// DLPack. Reading them all in every call would cost what packing saves. Each call reads some words of every weight,
// spread over its rows and its columns, and in its turn one stripe of it: a change of much is seen at once, of anything
// in the end.
#include "common.h"

#include <algorithm>
#include <cstring>

namespace pyvit {
namespace {

constexpr int64_t SAMPLES = 64, STRIPES = 128, WORD = sizeof(uint64_t);
constexpr uint64_t MIX = 0x9E3779B97F4A7C15;

uint64_t word(const char* at) {
  uint64_t found;
  std::memcpy(&found, at, WORD);
  return found;
}

// A contiguous matrix of a word or more, and what was in it.
struct Print {
  int64_t address, rows, cols, size;
  uint64_t samples, stripes[STRIPES];

  const char* data() const { return reinterpret_cast<const char*>(address); }
  int64_t bytes() const { return rows * cols * size; }
  // One word in each part of the rows, and in each part of the columns.
  uint64_t sample() const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < SAMPLES; i++) {
      const int64_t row = (2 * i + 1) * rows / (2 * SAMPLES), col = (2 * (i * 37 % SAMPLES) + 1) * cols / (2 * SAMPLES);
      sum += word(data() + std::min((row * cols + col) * size, bytes() - WORD)) * (MIX * uint64_t(2 * i + 1));
    }
    return sum;
  }
  uint64_t stripe(int64_t at) const {
    const int64_t words = bytes() / WORD, end = (at + 1) * words / STRIPES;
    uint64_t sum = at + 1 < STRIPES ? 0 : word(data() + bytes() - WORD);
    for (int64_t i = at * words / STRIPES; i < end; i++) sum += word(data() + i * WORD) * uint64_t(2 * i + 1);
    return sum;
  }
};
static_assert(sizeof(Print) % WORD == 0);

Tensor weight_print(Tensor weight) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.is_contiguous() && weight.numel() * int64_t(weight.element_size()) >= WORD,
      "pyvit: weight_print: weight must be a contiguous matrix of 8 bytes or more");
  Tensor out = make(weight, {int64_t(sizeof(Print)) / WORD}, ScalarType::Long);
  Print& p = *static_cast<Print*>(out.data_ptr());
  p.address = reinterpret_cast<int64_t>(weight.data_ptr());
  p.rows = weight.size(0);
  p.cols = weight.size(1);
  p.size = weight.element_size();
  p.samples = p.sample();
  for (int64_t i = 0; i < STRIPES; i++) p.stripes[i] = p.stripe(i);
  return out;
}

}  // namespace
}  // namespace pyvit

// Of `count` prints whose weights are still where they were: 0 where nothing is seen to have changed, 1 where a sample
// has, 2 where nothing but the stripe of this turn has. Not an operator, since it trusts addresses.
extern "C" __attribute__((visibility("default"))) int pyvit_weights_changed(const void* prints, int64_t count,
                                                                            int64_t turn) {
  int changed = 0;
  const auto* p = static_cast<const pyvit::Print*>(prints);
  const int64_t at = turn % pyvit::STRIPES;
  for (const auto* end = p + count; p < end; p++) {
    if (p->sample() != p->samples) return 1;
    if (p->stripe(at) != p->stripes[at]) changed = 2;
  }
  return changed;
}

STABLE_TORCH_LIBRARY_FRAGMENT(pyvit, m) {
  // For pyvit/ops/packs.py.
  m.def("weight_print(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) { m.impl("weight_print", TORCH_BOX(&pyvit::weight_print)); }
