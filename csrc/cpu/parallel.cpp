#include "parallel.h"

#include <cstdlib>
#include <new>

#if defined(_WIN32)
#include <malloc.h>
#endif

namespace pyvit {

Threads threads;

Scratch& scratch() {
  thread_local Scratch memory;
  memory.reset();
  return memory;
}

Scratch& shared() {
  thread_local Scratch memory;
  memory.reset();
  return memory;
}

void* aligned_allocate(size_t bytes) {
  constexpr size_t LINE = 64;
  bytes = (bytes + LINE - 1) / LINE * LINE;
#if defined(_WIN32)
  return _aligned_malloc(bytes, LINE);
#else
  return std::aligned_alloc(LINE, bytes);
#endif
}

void aligned_free(void* data) {
#if defined(_WIN32)
  _aligned_free(data);
#else
  std::free(data);
#endif
}

void* Scratch::bytes(int64_t n) {
  if (used_ == kBlocks) throw std::bad_alloc();
  Block& block = blocks_[used_++];
  if (block.size < n) {
    aligned_free(block.data);
    block.size = (n + 4095) / 4096 * 4096;
    block.data = static_cast<char*>(aligned_allocate(block.size));
    if (!block.data) {
      block.size = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

Scratch::~Scratch() {
  for (Block& block : blocks_) aligned_free(block.data);
}

}  // namespace pyvit
