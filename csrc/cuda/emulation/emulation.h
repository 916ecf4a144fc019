// CUDA's execution model on the host, so that the kernels of this directory run unchanged where there is no GPU.
//
// A block's threads are fibers on one host thread. A fiber runs until it needs others (a block barrier, a warp
// collective), and the next one is drawn at random, so an order that a kernel relies on without a barrier is broken
// sooner or later. Shared memory is a heap block of exactly the bytes asked for, filled with NaN patterns before each
// block; cp.async lands at the wait and not before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace pyvit::emulation {

struct Thread {
  dim3 thread, block, block_dim, grid_dim;
};

const Thread& current();
char* shared_memory();
int shared_limit();  // bytes of it that a block may have

// Runs `kernel` for every thread of the grid. Returns nullptr, or what went wrong (too much shared memory, a barrier
// that not all threads reach, a collective that not all lanes join, a copy never waited for), valid until the next
// launch.
const char* launch(const char* name, const std::function<void()>& kernel, dim3 grid, dim3 block, size_t shared_bytes);

void block_barrier(const char* file, int line);

// All 32 lanes meet; the last to arrive calls combine(operands), which reads and writes what every lane brought.
using Combine = void (*)(void* const operands[32]);
void collective(Combine combine, void* operand);

// The 16 bytes that a lane gives ldmatrix must be aligned and lie in shared memory.
void check_shared_row(const void* row);

// 16 bytes to shared memory: `bytes` of them from source, the rest zeros.
void copy_async(void* shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int pending_groups);

struct ShuffleOperand {
  uint32_t value, result;
  int lane_mask;
};
void combine_shuffle_xor(void* const operands[32]);

struct LdmatrixOperand {
  const void* row;  // lane 8 i + r brings row r of matrix i
  uint32_t* registers;
  bool transpose;
};
void combine_ldmatrix_x4(void* const operands[32]);

struct MmaOperand {
  float* c;
  const uint32_t *a, *b;
};
void combine_mma_bf16(void* const operands[32]);  // m16n8k16
void combine_mma_f16(void* const operands[32]);   // m16n8k16
void combine_mma_tf32(void* const operands[32]);  // m16n8k8

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);

}  // namespace pyvit::emulation

#define threadIdx (::pyvit::emulation::current().thread)
#define blockIdx (::pyvit::emulation::current().block)
#define blockDim (::pyvit::emulation::current().block_dim)
#define gridDim (::pyvit::emulation::current().grid_dim)
