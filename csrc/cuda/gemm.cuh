// A 128 x 128 tile of a matrix product whose operands are gathered by index arithmetic: implicit matrices, never in
// memory.
#pragma once

#include "kernel_launch.cuh"

namespace pyvit::cuda {

// 16 bytes of a row from `from` on, of which `valid` elements exist (the rest zeros).
template <class T>
PYVIT_DEVICE Bytes16 load_chunk(const T* from, int64_t valid) {
  constexpr int kPerChunk = 16 / int(sizeof(T));
  if (valid >= kPerChunk && reinterpret_cast<uintptr_t>(from) % 16 == 0) return *reinterpret_cast<const Bytes16*>(from);
  Bytes16 chunk{};
  T* to = reinterpret_cast<T*>(&chunk);
#pragma unroll
  for (int i = 0; i < kPerChunk; ++i)
    if (i < valid) to[i] = from[i];
  return chunk;
}

constexpr int kGemmTile = 128, kGemmThreads = 256;
constexpr int kGemmBytes = 2 * 2 * kGemmTile * 64;  // two stages of two tiles, 64 bytes of k

// C[m0 ..., n0 ...] = A B over k in [k_first, k_last). An operand names a line by `line(i)` and 16 bytes of it by
// `load(line, first)`, zeros outside. Lines of A are m (or k when A_BY_K), lines of B are n (or k when B_BY_K). A warp
// computes 32 x 64; of the result, what depends on m or n alone (divisions, above all) is computed once for each by
// result.row(m) and result.column(n), and result.put(row, column, value) stores.
template <class T, bool A_BY_K, bool B_BY_K, class A, class B, class Result>
PYVIT_DEVICE void multiply_tile(const A& a, const B& b, int64_t m0, int64_t n0, int64_t k_first, int64_t k_last,
                                const Result& result) {
  constexpr int kStep = 64 / int(sizeof(T)), kPerChunk = 16 / int(sizeof(T)), kChunks = kGemmTile * 4 / kGemmThreads;
  using TileA = Tile<T, A_BY_K ? kGemmTile : kStep>;
  using TileB = Tile<T, B_BY_K ? kGemmTile : kStep>;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const auto tile_a = [&](int stage) {
    return TileA{reinterpret_cast<T*>(shared_memory() + stage * 2 * kGemmTile * 64)};
  };
  const auto tile_b = [&](int stage) {
    return TileB{reinterpret_cast<T*>(shared_memory() + (stage * 2 + 1) * kGemmTile * 64)};
  };

  // The lines of an operand by m or n are the same at every step, so what is known of them is kept.
  decltype(a.line(0)) lines_a[kChunks];
  decltype(b.line(0)) lines_b[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int line = (thread + i * kGemmThreads) / 4;
    if constexpr (!A_BY_K) lines_a[i] = a.line(m0 + line);
    if constexpr (!B_BY_K) lines_b[i] = b.line(n0 + line);
  }
  Bytes16 fetched_a[kChunks], fetched_b[kChunks];
  const auto fetch = [&](int64_t k0) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int c = thread + i * kGemmThreads;
      if constexpr (A_BY_K) {
        const int64_t k = k0 + c / TileA::kChunks;
        fetched_a[i] = k < k_last ? a.load(a.line(k), m0 + c % TileA::kChunks * kPerChunk) : Bytes16{};
      } else {
        fetched_a[i] = a.load(lines_a[i], k0 + c % 4 * kPerChunk);
      }
      if constexpr (B_BY_K) {
        const int64_t k = k0 + c / TileB::kChunks;
        fetched_b[i] = k < k_last ? b.load(b.line(k), n0 + c % TileB::kChunks * kPerChunk) : Bytes16{};
      } else {
        fetched_b[i] = b.load(lines_b[i], k0 + c % 4 * kPerChunk);
      }
    }
  };
  const auto put = [&](int stage) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int c = thread + i * kGemmThreads;
      *reinterpret_cast<Bytes16*>(tile_a(stage).chunk(c / TileA::kChunks, c % TileA::kChunks)) = fetched_a[i];
      *reinterpret_cast<Bytes16*>(tile_b(stage).chunk(c / TileB::kChunks, c % TileB::kChunks)) = fetched_b[i];
    }
  };

  const int row0 = warp % 4 * 32, column0 = warp / 4 * 64;
  float sums[2][8][4] = {};
  if (k_first < k_last) fetch(k_first);
  int stage = 0;
  for (int64_t k0 = k_first; k0 < k_last; k0 += kStep, stage ^= 1) {
    put(stage);
    PYVIT_BARRIER();
    if (k0 + kStep < k_last) fetch(k0 + kStep);
#pragma unroll
    for (int k = 0; k < kStep; k += Fragments<T>::kK) {
      Fragments<T> f[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if constexpr (A_BY_K)
          f[i].load_a_transposed(f[i].place_a_transposed(tile_a(stage), row0 + 16 * i, lane), k);
        else
          f[i].load_a(tile_a(stage), row0 + 16 * i, k, lane);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if constexpr (B_BY_K)
          f[0].load_b_transposed(f[0].place_b_transposed(tile_b(stage), column0 + 16 * n, lane), k);
        else
          f[0].load_b(f[0].place_b(tile_b(stage), k, lane), column0 + 16 * n);
#pragma unroll
        for (int i = 0; i < 4; ++i) f[1].b[i] = f[0].b[i];
#pragma unroll
        for (int i = 0; i < 2; ++i) f[i].multiply(sums[i][2 * n], sums[i][2 * n + 1]);
      }
    }
  }
  decltype(result.row(0)) rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) rows[i] = result.row(m0 + row0 + 8 * i + g);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto column = result.column(n0 + column0 + 8 * n + 2 * t + side);
#pragma unroll
      for (int i = 0; i < 4; ++i) result.put(rows[i], column, sums[i / 2][n][2 * (i % 2) + side]);
    }
  }
}

}  // namespace pyvit::cuda
