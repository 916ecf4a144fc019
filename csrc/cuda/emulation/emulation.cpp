#include "emulation.h"

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace pyvit::emulation {
namespace {

constexpr size_t kStack = 512 << 10;
constexpr int kMaxThreads = 1024;

enum class State { ready, in_warp, at_barrier, done };

struct Copy {
  char* to;
  const char* from;
  int bytes, group;
};

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  State state = State::done;
  Thread thread;
  int warp = 0, lane = 0, groups = 0;
  const char* file = nullptr;
  int line = 0;
  std::vector<Copy> copies;
};

struct Warp {
  int arrived = 0;
  Combine combine = nullptr;
  void* operands[32] = {};
};

std::vector<Fiber> fibers(kMaxThreads);
std::vector<Warp> warps(kMaxThreads / 32);
std::vector<std::vector<int>> ready(kMaxThreads / 32);  // per warp
std::vector<int> turns;                                 // warps, the favoured first
Context scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
char* shared = nullptr;
size_t shared_size = 0, most_shared = 163 << 10;  // as on sm_80, unless a test says otherwise
int threads = 0, at_barrier = 0, finished = 0;
std::string error;
uint64_t random_state = 0x9E3779B97F4A7C15u;
std::map<std::pair<std::string, int>, uint64_t> sites;
std::string launches;
std::string skipped_file;
int skipped_line = 0;

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

#if defined(__x86_64__)
extern "C" void pyvit_emulation_switch(void** save, void* load);
asm(R"(
.text
.type pyvit_emulation_switch,@function
pyvit_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyvit_emulation_switch,.-pyvit_emulation_switch
)");
#endif

// The sanitizer must know which stack is in use; a fiber that ends for good gives its fake stack back.
void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  pyvit_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.machine, &to.machine);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void leave(State state) {
  running->state = state;
  switch_context(running->context, scheduler, state == State::done);
}

[[noreturn]] void fail(const std::string& message) {
  if (error.empty()) error = message;
  leave(State::done);
  __builtin_unreachable();
}

void wake(Fiber& fiber) {
  fiber.state = State::ready;
  ready[fiber.warp].push_back(int(&fiber - fibers.data()));
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  (*body)();
  if (!running->copies.empty()) fail("a thread ended with cp.async copies that it never waited for");
  ++finished;
  leave(State::done);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(fiber.stack, 4096, PROT_NONE);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack + 4096,
                                kStack - 4096);  // a fiber abandoned after an error leaves its frames poisoned
#endif
  fiber.context.fake_stack = nullptr;
  fiber.context.bottom = fiber.stack + 4096;
  fiber.context.size = kStack - 4096;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(fiber.stack + kStack) -
               2;  // at entry the stack is 16-byte aligned plus a return address
  *top = reinterpret_cast<void*>(fiber_main);
  top[1] = nullptr;
  fiber.context.stack_pointer = top - 6;
#else
  getcontext(&fiber.context.machine);
  fiber.context.machine.uc_stack = {.ss_sp = fiber.stack + 4096, .ss_flags = 0, .ss_size = kStack - 4096};
  fiber.context.machine.uc_link = nullptr;
  makecontext(&fiber.context.machine, fiber_main, 0);
#endif
  fiber.copies.clear();
  fiber.groups = 0;
  fiber.file = nullptr;
}

std::string waiting() {
  std::map<std::string, int> where;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == State::at_barrier) ++where["at the barrier " + std::string(f.file) + ":" + std::to_string(f.line)];
    if (f.state == State::in_warp) ++where["in a warp collective"];
  }
  std::string text = std::to_string(finished) + " threads ended";
  for (auto& [name, count] : where) text += ", " + std::to_string(count) + " " + name;
  return text;
}

// Warps take turns in an order that is drawn anew about every `patience` steps: with little patience they advance
// together, with much one runs as far ahead of the others as the barriers let it. Within a warp any lane may be next.
Fiber* next_fiber(uint64_t patience) {
  if (draw() % patience == 0)
    for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[draw() % i]);
  for (int warp : turns) {
    auto& list = ready[warp];
    if (list.empty()) continue;
    const size_t at = draw() % list.size();
    Fiber* fiber = &fibers[list[at]];
    list[at] = list.back();
    list.pop_back();
    return fiber;
  }
  return nullptr;
}

void run_block(dim3 block_index, dim3 grid, dim3 block) {
  memset(shared, 0xFF, shared_size);
  finished = at_barrier = 0;
  for (auto& list : ready) list.clear();
  turns.resize(threads / 32);
  for (int i = 0; i < int(turns.size()); ++i) turns[i] = i;
  const uint64_t patience = draw() % 3 == 0 ? 1 : 1 + draw() % 4096;
  for (auto& warp : warps) warp.arrived = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    prepare(f);
    f.warp = i / 32, f.lane = i % 32;
    const unsigned u = i;
    f.thread = {dim3(u % block.x, u / block.x % block.y, u / (block.x * block.y)), block_index, block, grid};
    wake(f);
  }
  while (error.empty()) {
    running = next_fiber(patience);
    if (!running) break;
    switch_context(scheduler, running->context, false);
  }
  running = nullptr;
  if (error.empty() && finished != threads) error = "not all threads reach the same point: " + waiting();
}

}  // namespace

const Thread& current() { return running->thread; }
char* shared_memory() { return shared; }
int shared_limit() { return int(most_shared); }

const char* launch(const char* name, const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  static std::string message;
  error.clear();
  threads = int(block.x * block.y * block.z);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  launches += std::string(name) + ";" + std::to_string(threads) + ";" + std::to_string(shared_bytes) + "\n";
  if (threads < 32 || threads % 32 || threads > kMaxThreads)
    error = "a block of " + std::to_string(threads) + " threads";
  if (shared_bytes > most_shared)
    error =
        std::to_string(shared_bytes) + " bytes of shared memory, and a block may have " + std::to_string(most_shared);
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) error = "an impossible grid";
  if (error.empty()) {
    body = &kernel;
    shared_size = shared_bytes;
    shared = static_cast<char*>(aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
#if defined(__SANITIZE_ADDRESS__)
    const size_t slack = (shared_bytes + 127) / 128 * 128 - shared_bytes;
    __asan_poison_memory_region(shared + shared_bytes, slack);
#endif
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t j = draw() % (i + 1);
      order[i] = order[j];
      order[j] = i;
    }
    for (uint64_t b : order) {
      if (!error.empty()) break;
      run_block(dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)), grid, block);
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared + shared_bytes, slack);
#endif
    free(shared);
    shared = nullptr;
  }
  if (error.empty()) return nullptr;
  message = std::string(name) + ": " + error;
  return message.c_str();
}

void block_barrier(const char* file, int line) {
  const char* base = strrchr(file, '/');
  file = base ? base + 1 : file;
  if (running->thread.thread.x == 0) ++sites[{file, line}];
  if (line == skipped_line && skipped_file == file) return;
  running->file = file, running->line = line;
  if (++at_barrier == threads) {
    at_barrier = 0;
    for (int i = 0; i < threads; ++i) {
      if (fibers[i].line != line || strcmp(fibers[i].file, file) != 0)
        fail("threads wait at different barriers: " + waiting());
      if (&fibers[i] != running) wake(fibers[i]);
    }
    wake(*running);
    switch_context(running->context, scheduler, false);
    return;
  }
  leave(State::at_barrier);
}

void collective(Combine combine, void* operand) {
  Warp& warp = warps[running->warp];
  if (warp.arrived && warp.combine != combine) fail("lanes of one warp are in different collectives");
  warp.combine = combine;
  warp.operands[running->lane] = operand;
  if (++warp.arrived < 32) return leave(State::in_warp);
  warp.arrived = 0;
  if (combine) combine(warp.operands);
  const int first = running->warp * 32;
  for (int i = first; i < first + 32; ++i) wake(fibers[i]);
  switch_context(running->context, scheduler, false);
}

void copy_async(void* to, const void* from, int bytes) {
  char* target = static_cast<char*>(to);
  if (target < shared || target + 16 > shared + shared_size) fail("cp.async writes outside shared memory");
  if (reinterpret_cast<uintptr_t>(to) % 16 || (bytes && reinterpret_cast<uintptr_t>(from) % 16))
    fail("cp.async on a misaligned address");
  memset(target, 0xFF, 16);  // from here to the wait the bytes may be anything
  running->copies.push_back({target, static_cast<const char*>(from), bytes, running->groups});
}

void check_shared_row(const void* row) {
  const char* from = static_cast<const char*>(row);
  if (from < shared || from + 16 > shared + shared_size) fail("ldmatrix reads outside shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix on a misaligned row");
}

void copy_commit() { ++running->groups; }

void copy_wait(int pending_groups) {
  std::vector<Copy> later;
  for (const Copy& c : running->copies) {
    if (c.group >= running->groups - pending_groups) {
      later.push_back(c);
      continue;
    }
    memset(c.to, 0, 16);
    if (c.bytes) memcpy(c.to, c.from, c.bytes);
  }
  running->copies.swap(later);
}

extern "C" {
// For the tests: the order of threads, the barriers and launches met so far, and one barrier to leave out.
void pyvit_emulation_seed(uint64_t seed) { random_state = seed * 0x9E3779B97F4A7C15u + 0x5851F42D4C957F2Du; }
void pyvit_emulation_skip(const char* file, int line) { skipped_file = file, skipped_line = line; }
void pyvit_emulation_limit(int bytes) { most_shared = bytes; }
void pyvit_emulation_forget_sites() {
  sites.clear();
  launches.clear();
}
const char* pyvit_emulation_launches() { return launches.c_str(); }
const char* pyvit_emulation_sites() {
  static std::string text;
  text.clear();
  for (auto& [site, visits] : sites) text += site.first + ":" + std::to_string(site.second) + "\n";
  return text.c_str();
}
}

}  // namespace pyvit::emulation
