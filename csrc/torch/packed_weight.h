// A packed weight is kept beside the weight and says in its header what it was made of. Each call compares, and packs
// the weight anew where it has changed.
#pragma once

#include <cstddef>
#include <cstring>
#include <mutex>

#include "cpu_tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyvit {

// Called where a change was seen so late that results before may be of the old weight.
inline void (*changed_late)() = nullptr;

// What a weight is, and what was in it when it was packed.
//
// PyTorch counts the changes that it sees. Writes past that count (through `.data`, NumPy, DLPack) show in the memory
// alone. Reading all of it in every call would cost what packing saves: each call reads some words of every weight,
// spread over its rows and its columns, and in turn one stripe of it. A change of much is seen at once, of anything in
// the end.
struct Header {
  static constexpr int64_t SAMPLES = 64, STRIPES = 128, WORD = sizeof(uint64_t);
  static constexpr uint64_t MIX = 0x9E3779B97F4A7C15;

  int64_t address, version, rows, cols, size;
  uint64_t samples, stripes[STRIPES];
  int64_t turn;

  int64_t bytes() const { return rows * cols * size; }
  uint64_t word(int64_t at) const {
    uint64_t found;
    std::memcpy(&found, reinterpret_cast<const char*>(address) + std::min(at, bytes() - WORD), WORD);
    return found;
  }
  // One word in each part of the rows, and in each part of the columns.
  uint64_t sample() const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < SAMPLES; i++) {
      const int64_t row = (2 * i + 1) * rows / (2 * SAMPLES);
      const int64_t col = (2 * (i * 37 % SAMPLES) + 1) * cols / (2 * SAMPLES);
      sum += word((row * cols + col) * size) * (MIX * uint64_t(2 * i + 1));
    }
    return sum;
  }
  uint64_t stripe(int64_t at) const {
    const int64_t words = bytes() / WORD, end = (at + 1) * words / STRIPES;
    uint64_t sum = at + 1 < STRIPES ? 0 : word(bytes() - WORD);
    for (int64_t i = at * words / STRIPES; i < end; i++) sum += word(i * WORD) * uint64_t(2 * i + 1);
    return sum;
  }
  bool is_of(const Header& weight) const { return !std::memcmp(this, &weight, offsetof(Header, samples)); }
};
constexpr int64_t HEADER = (sizeof(Header) + 63) / 64 * 16;  // in 32-bit words

// Of a tensor made under inference mode, whose changes are not counted, -1.
inline int64_t version_of(const Tensor& t) {
  StableIValue stack[] = {torch::stable::detail::from(t)};
  if (torch_call_dispatcher("aten::_version", "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return -1;
  return torch::stable::detail::to<int64_t>(stack[0]);
}

inline Header header_of(const Tensor& weight) {
  Header h{};
  h.address = reinterpret_cast<int64_t>(weight.data_ptr());
  h.version = version_of(weight);
  h.rows = weight.size(0);
  h.cols = weight.size(1);
  h.size = weight.element_size();
  return h;
}

inline void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.defined() && weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous() &&
                      weight.numel() * int64_t(weight.element_size()) >= Header::WORD,
                  "pyvit: prepacked weights: weight must be a contiguous matrix of 8 bytes or more on the CPU");
}

// Calls `pack` where the header at `words` is not that of the weight as it is now; returns whether it did.
template <class Pack>
bool renew(const Tensor& weight, void* words, const Pack& pack) {
  static std::mutex packing;
  Header& kept = *static_cast<Header*>(words);
  Header now = header_of(weight);
  const auto current = [&] {
    if (!kept.is_of(now) || kept.sample() != kept.samples) return false;
    const int64_t at = kept.turn++ % Header::STRIPES;
    if (kept.stripe(at) == kept.stripes[at]) return true;
    if (changed_late) changed_late();
    return false;
  };
  if (current()) return false;
  const std::lock_guard<std::mutex> lock(packing);
  if (kept.is_of(now) && kept.sample() == kept.samples && kept.turn == 0) return false;  // by another thread meanwhile
  kept.address = 0;
  pack();
  now.samples = now.sample();
  for (int64_t i = 0; i < Header::STRIPES; i++) now.stripes[i] = now.stripe(i);
  kept = now;
  return true;
}

// Weights that stay: in large pages, where the system gives them. Of small ones every 64th line read costs a walk
// through the page tables.
inline void in_large_pages([[maybe_unused]] const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t first = (uintptr_t(t.data_ptr()) + LARGE - 1) / LARGE * LARGE;
  const uintptr_t end = (uintptr_t(t.data_ptr()) + t.numel() * t.element_size()) / LARGE * LARGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace pyvit
