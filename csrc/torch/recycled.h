// Memory for results that pass from layer to layer. They have the same sizes again and again, and new memory costs
// more than many an operator that writes to it: the kernel clears each page when it is first touched.
#pragma once

#include <sys/mman.h>

#include <deque>
#include <mutex>

#include "../cpu/parallel.h"
#include "cpu_tensors.h"

#if defined(__linux__)  // elsewhere a reference cannot be weak, and memory is torch's
// Since torch 2.11; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* deleter_context);

namespace pyvit {

// Blocks that no tensor uses any more, for the next tensor of the same size. Whoever finds it in use goes to the
// system's allocator, so that a process that was forked meanwhile does not wait for ever.
// Their memory comes from the system, not from malloc: kept blocks would keep the free memory around them apart.
class FreeBlocks {
 public:
  void* take(size_t bytes) {
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock)
        for (auto block = free_.rbegin(); block != free_.rend(); ++block)
          if (block->bytes == bytes) {
            void* data = block->data;
            free_.erase(std::next(block).base());
            held_ -= bytes;
            return data;
          }
    }
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
  void give(void* data, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return release(data, bytes);
    free_.push_back({data, bytes});
    held_ += bytes;
    while (free_.size() > MOST || held_ > MOST_BYTES) {
      release(free_.front().data, free_.front().bytes);
      held_ -= free_.front().bytes;
      free_.pop_front();
    }
  }

 private:
  static void release(void* data, size_t bytes) { munmap(data, bytes); }
  static constexpr size_t MOST = 64, MOST_BYTES = 256 << 20;
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::deque<Block> free_;  // the least recently used first
  size_t held_ = 0;
};

// Never destroyed: tensors may outlive everything static.
inline FreeBlocks& free_blocks() {
  static FreeBlocks& blocks = *new FreeBlocks;
  return blocks;
}

// A contiguous tensor of the dtype and on the device of `like`, its memory recycled if it has more than some pages.
inline Tensor make_recycled(const Tensor& like, const Ints& shape) {
  constexpr size_t LEAST = 512 << 10, MOST = 64 << 20;
  size_t bytes = like.element_size();
  for (const int64_t n : shape) bytes *= size_t(n);
  if (!torch_from_blob || bytes < LEAST || bytes > MOST) return make(like, shape);
  Ints strides(shape.size());
  for (int64_t i = int64_t(shape.size()) - 1, step = 1; i >= 0; step *= shape[i--]) strides[i] = step;
  void* data = free_blocks().take(bytes);
  if (!data) return make(like, shape);
  AtenTensorHandle made;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type()));
  const auto give = [](void* data, void* bytes) { free_blocks().give(data, reinterpret_cast<size_t>(bytes)); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, int64_t(shape.size()), shape.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(),
      like.get_device_index(), &made, aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(bytes)));
  return Tensor(made);
}

}  // namespace pyvit
#else
namespace pyvit {
inline Tensor make_recycled(const Tensor& like, const Ints& shape) { return make(like, shape); }
}  // namespace pyvit
#endif
