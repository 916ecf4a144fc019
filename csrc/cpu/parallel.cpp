#include "parallel.h"

#include <cstdlib>
#include <new>

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

void* Scratch::bytes(int64_t n) {
  if (used_ == kBlocks) throw std::bad_alloc();
  Block& block = blocks_[used_++];
  if (block.size < n) {
    std::free(block.data);
    block.size = (n + 4095) / 4096 * 4096;
    block.data = static_cast<char*>(std::aligned_alloc(64, block.size));
    if (!block.data) {
      block.size = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

Scratch::~Scratch() {
  for (Block& block : blocks_) std::free(block.data);
}

}  // namespace pyvit
