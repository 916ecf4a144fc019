// The instructions that the kernels are written in: 16-bit types, swizzled shared-memory tiles, cp.async, ldmatrix and
// mma.sync.
//
// Under nvcc these are PTX of sm_80; elsewhere emulation/emulation.h supplies the same meaning on fibers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYVIT_DEVICE __device__ __forceinline__
#define PYVIT_DEVICE_CALL __device__ __noinline__
#define PYVIT_BARRIER() __syncthreads()
#else
#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulation/emulation.h"
#define PYVIT_DEVICE inline
#define PYVIT_DEVICE_CALL inline
#define PYVIT_BARRIER() ::pyvit::emulation::block_barrier(__FILE__, __LINE__)
#endif

namespace pyvit {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#ifdef __CUDACC__

PYVIT_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char pyvit_shared[];
  return pyvit_shared;
}
PYVIT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
PYVIT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
PYVIT_DEVICE float infinity() { return __int_as_float(0x7F800000); }
PYVIT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// To within an ulp.
PYVIT_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PYVIT_DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
PYVIT_DEVICE float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Two values in one register, the first in the low half.
PYVIT_DEVICE uint32_t pack(bf16, float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
PYVIT_DEVICE uint32_t pack(f16, float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
PYVIT_DEVICE uint32_t round_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
PYVIT_DEVICE float shuffle_xor(float x, int lane_mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, lane_mask); }
PYVIT_DEVICE void warp_barrier() { __syncwarp(); }

PYVIT_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
PYVIT_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
PYVIT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
PYVIT_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
// The address of a row in shared memory, kept in a register: left to itself the compiler finds it again at every use.
using SharedRow = uint32_t;
PYVIT_DEVICE SharedRow shared_row(const void* p) {
  SharedRow row;
  asm("mov.b32 %0, %1;" : "=r"(row) : "r"(shared_address(p)));
  return row;
}
PYVIT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedRow row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
PYVIT_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedRow row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
PYVIT_DEVICE void mma(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PYVIT_DEVICE void mma(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PYVIT_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

using std::max;
using std::min;
inline char* shared_memory() { return emulation::shared_memory(); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float infinity() { return INFINITY; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float widen(bf16 x) { return emulation::bfloat16_to_float(x.bits); }
inline float widen(f16 x) { return emulation::half_to_float(x.bits); }
inline uint32_t pack(bf16, float low, float high) {
  return emulation::float_to_bfloat16(low) | uint32_t(emulation::float_to_bfloat16(high)) << 16;
}
inline uint32_t pack(f16, float low, float high) {
  return emulation::float_to_half(low) | uint32_t(emulation::float_to_half(high)) << 16;
}
inline uint32_t round_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7F800000) == 0x7F800000 ? bits : (bits + 0x1000) & 0xFFFFE000u;
}
inline float shuffle_xor(float x, int lane_mask) {
  emulation::ShuffleOperand o{bits_of(x), 0, lane_mask};
  emulation::collective(emulation::combine_shuffle_xor, &o);
  return float_of(o.result);
}
inline void warp_barrier() { emulation::collective(nullptr, nullptr); }
inline void copy_async(void* shared, const void* global, int bytes) { emulation::copy_async(shared, global, bytes); }
inline void copy_commit() { emulation::copy_commit(); }
template <int Pending>
inline void copy_wait() {
  emulation::copy_wait(Pending);
}
using SharedRow = const char*;
inline SharedRow shared_row(const void* p) { return static_cast<const char*>(p); }
inline void ldmatrix_x4(uint32_t (&r)[4], SharedRow row) {
  emulation::LdmatrixOperand o{row, r, false};
  emulation::collective(emulation::combine_ldmatrix_x4, &o);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], SharedRow row) {
  emulation::LdmatrixOperand o{row, r, true};
  emulation::collective(emulation::combine_ldmatrix_x4, &o);
}
inline void mma(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulation::MmaOperand o{c, a, b};
  emulation::collective(emulation::combine_mma_bf16, &o);
}
inline void mma(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulation::MmaOperand o{c, a, b};
  emulation::collective(emulation::combine_mma_f16, &o);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::MmaOperand o{c, a, b};
  emulation::collective(emulation::combine_mma_tf32, &o);
}

#endif

PYVIT_DEVICE float widen(float x) { return x; }
template <class T>
PYVIT_DEVICE T narrow(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T{uint16_t(pack(T{}, x, x))};
}
PYVIT_DEVICE int warp_of(int thread) { return thread >> 5; }
PYVIT_DEVICE int lane_of(int thread) { return thread & 31; }

// Sum or maximum over the four lanes that share a row of accumulators.
PYVIT_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
PYVIT_DEVICE float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
PYVIT_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask; mask >>= 1) x += shuffle_xor(x, mask);
  return x;
}

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

struct alignas(16) Floats4 {
  float at[4];
};

// Rows of COLS elements in shared memory. 16-byte chunks are permuted within a row so that the same chunk of eight
// consecutive rows lies in eight different bank groups, whatever the row's length; no row is padded.
template <class T, int COLS>
struct Tile {
  static constexpr int kPerChunk = 16 / int(sizeof(T)), kChunks = COLS / kPerChunk;
  static constexpr int kMask = kChunks % 8 == 0 ? 7 : kChunks % 4 == 0 ? 3 : kChunks % 2 == 0 ? 1 : 0;
  static constexpr int kShift = kChunks % 8 == 0 ? 0 : kChunks % 4 == 0 ? 1 : 2;
  static_assert(COLS % kPerChunk == 0, "rows are whole 16-byte chunks");
  __host__ __device__ static constexpr int bytes(int rows) { return rows * COLS * int(sizeof(T)); }

  T* data;

  PYVIT_DEVICE T* chunk(int row, int c) const {
    return data + (row * kChunks + (c ^ ((row >> kShift) & kMask))) * kPerChunk;
  }
  // The rows from a multiple of 8 on, after which the permutation repeats.
  PYVIT_DEVICE Tile from(int row) const { return {data + row * COLS}; }
  PYVIT_DEVICE T* at(int row, int col) const { return chunk(row, col / kPerChunk) + col % kPerChunk; }
};

// Operands of one multiply: A is 16 x kK, B is kK x 8 (here two of them, 16 columns). 32-bit floats are multiplied as
// three TF32 products of high and low parts, which keeps float32's accuracy; their k order is permuted alike in A and B
// (lane t of a quad holds k = 2t and 2t + 1), so that accumulators are operands of the next product without an exchange
// between lanes.
// Addresses of a lane are found once (a Place), for rows that are a multiple of 8 apart.
template <class T>
struct Fragments {
  static constexpr int kK = 16;
  uint32_t a[4], b[4];

  template <int COLS>
  struct Place {
    SharedRow at;

    PYVIT_DEVICE SharedRow row(int i) const { return at + i * COLS * int(sizeof(T)); }
  };

  PYVIT_DEVICE void multiply(float (&c0)[4], float (&c1)[4]) const {
    mma(T{}, c0, a, b);
    mma(T{}, c1, a, b + 2);
  }
  // A = tile[row0 + m][k0 + k]
  template <int COLS>
  PYVIT_DEVICE void load_a(Tile<T, COLS> tile, int row0, int k0, int lane) {
    ldmatrix_x4(a, shared_row(tile.at(row0 + (lane & 15), k0 + (lane >> 4) * 8)));
  }
  // A = tile[k0 + k][col0 + m]
  template <int COLS>
  PYVIT_DEVICE static Place<COLS> place_a_transposed(Tile<T, COLS> tile, int col0, int lane) {
    return {shared_row(tile.at((lane & 7) + (lane >> 4) * 8, col0 + (lane >> 3 & 1) * 8))};
  }
  template <int COLS>
  PYVIT_DEVICE void load_a_transposed(Place<COLS> from, int k0) {
    ldmatrix_x4_transposed(a, from.row(k0));
  }
  // B = tile[n0 + n][k0 + k]
  template <int COLS>
  PYVIT_DEVICE static Place<COLS> place_b(Tile<T, COLS> tile, int k0, int lane) {
    return {shared_row(tile.at((lane & 7) + (lane >> 4) * 8, k0 + (lane >> 3 & 1) * 8))};
  }
  template <int COLS>
  PYVIT_DEVICE void load_b(Place<COLS> from, int n0) {
    ldmatrix_x4(b, from.row(n0));
  }
  // B = tile[k0 + k][n0 + n]
  template <int COLS>
  PYVIT_DEVICE static Place<COLS> place_b_transposed(Tile<T, COLS> tile, int n0, int lane) {
    return {shared_row(tile.at(lane & 15, n0 + (lane >> 4) * 8))};
  }
  template <int COLS>
  PYVIT_DEVICE void load_b_transposed(Place<COLS> from, int k0) {
    ldmatrix_x4_transposed(b, from.row(k0));
  }
  // A = 16 columns of accumulators; `step` counts the kK columns of them in use.
  PYVIT_DEVICE void take_a(const float (&left)[4], const float (&right)[4], int) {
    a[0] = pack(T{}, left[0], left[1]), a[1] = pack(T{}, left[2], left[3]);
    a[2] = pack(T{}, right[0], right[1]), a[3] = pack(T{}, right[2], right[3]);
  }
};

template <>
struct Fragments<float> {
  static constexpr int kK = 8;
  float a[4], b[4];

  template <int COLS>
  struct Place {
    Tile<float, COLS> tile;
    int row, column;
  };

  PYVIT_DEVICE static void split(float x, uint32_t& high, uint32_t& low) {
    high = round_tf32(x);
    low = round_tf32(x - float_of(high));
  }
  PYVIT_DEVICE void multiply(float (&c0)[4], float (&c1)[4]) const {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Tensor cores truncate when they add to an accumulator, so a long sum would drift: each step's sum is its own,
      // and is added by ordinary additions.
      float part[4] = {};
      split(b[2 * half], b_high[0], b_low[0]);
      split(b[2 * half + 1], b_high[1], b_low[1]);
      mma_tf32(part, a_low, b_high);
      mma_tf32(part, a_high, b_low);
      mma_tf32(part, a_high, b_high);
      float (&c)[4] = half ? c1 : c0;
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] += part[i];
    }
  }
  template <int COLS>
  PYVIT_DEVICE void load_a(Tile<float, COLS> tile, int row0, int k0, int lane) {
    const int g = lane >> 2, k = k0 + (lane & 3) * 2;
    const float *top = tile.at(row0 + g, k), *bottom = tile.at(row0 + g + 8, k);
    a[0] = top[0], a[1] = bottom[0], a[2] = top[1], a[3] = bottom[1];
  }
  template <int COLS>
  PYVIT_DEVICE static Place<COLS> place_a_transposed(Tile<float, COLS> tile, int col0, int lane) {
    return {tile, (lane & 3) * 2, col0 + (lane >> 2)};
  }
  template <int COLS>
  PYVIT_DEVICE void load_a_transposed(Place<COLS> from, int k0) {
    const int k = k0 + from.row, m = from.column;
    a[0] = *from.tile.at(k, m), a[1] = *from.tile.at(k, m + 8);
    a[2] = *from.tile.at(k + 1, m), a[3] = *from.tile.at(k + 1, m + 8);
  }
  template <int COLS>
  PYVIT_DEVICE static Place<COLS> place_b(Tile<float, COLS> tile, int k0, int lane) {
    return {tile, lane >> 2, k0 + (lane & 3) * 2};
  }
  template <int COLS>
  PYVIT_DEVICE void load_b(Place<COLS> from, int n0) {
    const float *first = from.tile.at(n0 + from.row, from.column),
                *second = from.tile.at(n0 + from.row + 8, from.column);
    b[0] = first[0], b[1] = first[1], b[2] = second[0], b[3] = second[1];
  }
  template <int COLS>
  PYVIT_DEVICE static Place<COLS> place_b_transposed(Tile<float, COLS> tile, int n0, int lane) {
    return {tile, (lane & 3) * 2, n0 + (lane >> 2)};
  }
  template <int COLS>
  PYVIT_DEVICE void load_b_transposed(Place<COLS> from, int k0) {
    const int k = k0 + from.row, n = from.column;
    b[0] = *from.tile.at(k, n), b[1] = *from.tile.at(k + 1, n);
    b[2] = *from.tile.at(k, n + 8), b[3] = *from.tile.at(k + 1, n + 8);
  }
  PYVIT_DEVICE void take_a(const float (&left)[4], const float (&right)[4], int step) {
    const float (&c)[4] = step ? right : left;
    a[0] = c[0], a[1] = c[2], a[2] = c[1], a[3] = c[3];
  }
};

}  // namespace pyvit
