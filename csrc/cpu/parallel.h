// How a kernel divides its work among threads, and the memory it works in.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pyvit {

// Threads, provided by whoever loads the library (torch's pool): body(begin, end, context) over chunks of [0, n).
struct Threads {
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
  int (*count)();
};
extern Threads threads;

// Units 0 .. n in ascending order, to whichever thread asks next: pieces of unequal cost balance by themselves.
class Queue {
 public:
  explicit Queue(int64_t n) : n_(n) {}
  // The next unit, or -1 when none is left.
  int64_t next() {
    const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
    return unit < n_ ? unit : -1;
  }

 private:
  const int64_t n_;
  std::atomic<int64_t> next_{0};
};

// worker(queue) on every thread; it takes units until there are none. Which thread computes a unit must not matter to
// the result.
template <class F>
void parallel_units(int64_t n, const F& worker) {
  if (n <= 0) return;
  struct Context {
    Queue queue;
    const F& worker;
  } context{Queue(n), worker};
  const int64_t most = threads.count();
  threads.run(
      n < most ? n : most,
      [](int64_t, int64_t, void* c) {
        auto* context = static_cast<Context*>(c);
        context->worker(context->queue);
      },
      &context);
}

// Memory aligned to a cache line, and its release; null when there is none.
void* aligned_allocate(size_t bytes);
void aligned_free(void* data);

// Scratch memory of the calling thread, kept between calls; 64-byte aligned. Pointers stay valid until the next
// `scratch()` of that thread.
class Scratch {
 public:
  ~Scratch();
  void reset() { used_ = 0; }
  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(bytes(n * int64_t(sizeof(T))));
  }

 private:
  void* bytes(int64_t n);
  struct Block {
    char* data;
    int64_t size;
  };
  static constexpr int kBlocks = 64;
  Block blocks_[kBlocks] = {};
  int used_ = 0;
};
Scratch& scratch();  // reset
Scratch& shared();   // reset; the calling thread's for what the threads of one call share

}  // namespace pyvit
