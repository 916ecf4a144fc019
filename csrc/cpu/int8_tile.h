// Products of int8 weights with rows of 8-bit integers, summed in int32: exact, so that the result is the same on every
// instruction set. The register tiles are those of gemm_tile.h.
//
// A row of x is stored as integers q in 0 .. 255 with a zero point z and a scale: x is about scale (q - z). Weights are
// in -127 .. 127. A lane is 32 bits of a row: four numbers where the processor multiplies bytes (vpdpbusd), else two of
// 16 bits, whose products fit in 32 bits whatever they are.
#pragma once

#include "gemm_epilogue.h"

namespace pyvit::PYVIT_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Four products of an unsigned q and a signed weight, summed without saturation. What z adds is taken off at the start
// of a sum, from the sums of the weights' columns.
struct Dot {
  using element = uint8_t;
  static constexpr int K = 4;
  static constexpr bool SHIFTED = true;
  static inline vu weights(const int8_t* b) { return load_as<vu>(b); }
  static inline void add(vi& sum, uint32_t a, vu b) {
#if defined(__AVX512VNNI__)
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(int(a)), (__m512i)b);
#else
    sum = (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(int(a)), (__m256i)b);
#endif
  }
};
#else
// Two products of q - z, which needs 9 bits, and a weight, widened to 16 bits as it is read.
struct Dot {
  using element = int16_t;
  static constexpr int K = 2;
  static constexpr bool SHIFTED = false;
  static inline vu weights(const int8_t* b) {
#if defined(__AVX512BW__)
    return (vu)_mm512_cvtepi8_epi16(load_as<__m256i>(b));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepi8_epi16(load_as<__m128i>(b));
#else
    typedef int8_t Bytes __attribute__((vector_size(2 * W)));
    typedef int16_t Halves __attribute__((vector_size(4 * W)));
    return (vu) __builtin_convertvector(load_as<Bytes>(b), Halves);
#endif
  }
  static inline void add(vi& sum, uint32_t a, vu b) {
#if defined(__AVX512BW__)
    sum += (vi)_mm512_madd_epi16(_mm512_set1_epi32(int(a)), (__m512i)b);
#elif defined(__AVX2__)
    sum += (vi)_mm256_madd_epi16(_mm256_set1_epi32(int(a)), (__m256i)b);
#elif defined(__SSE2__)
    sum += (vi)_mm_madd_epi16(_mm_set1_epi32(int(a)), (__m128i)b);
#else
    const vi both = (vi)b;
    sum += int16_t(a) * (both << 16 >> 16) + (int32_t(a) >> 16) * (both >> 16);
#endif
  }
};
#endif

// A packed weight of `cols` columns: of each column minus the sum of its weights, then panels of NR columns as in
// gemm_tile.h, [lanes][width][Dot::K] bytes each. It has the same size on every instruction set.
inline int64_t packed_columns(int64_t cols) { return round_up(cols, 16); }
inline int64_t int8_packed_words(int64_t k, int64_t cols) {
  return packed_columns(cols) + (k + 3) / 4 * packed_columns(cols);
}

inline void int8_pack(const int8_t* weight, int64_t k, int64_t cols, uint32_t* packed) {
  int32_t* negative_sums = reinterpret_cast<int32_t*>(packed);
  int8_t* panels = reinterpret_cast<int8_t*>(packed + packed_columns(cols));
  const int64_t lanes = (k + Dot::K - 1) / Dot::K;
  parallel_units((packed_columns(cols) + NR - 1) / NR, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t n = unit * NR, width = std::min<int64_t>(NR, round_up(cols - n, W));
      for (int64_t col = n; col < std::min(n + NR, packed_columns(cols)); col++) {
        const int8_t* from = weight + col * k;
        int32_t sum = 0;
        for (int64_t i = 0; col < cols && i < k; i++) sum += from[i];
        negative_sums[col] = -sum;
        if (col - n >= width) continue;
        int8_t* to = panels + n * lanes * Dot::K + (col - n) * Dot::K;
        for (int64_t l = 0; l < lanes; l++, to += width * Dot::K)
          for (int j = 0; j < Dot::K; j++) {
            const int64_t i = l * Dot::K + j;
            to[j] = col < cols && i < k ? from[i] : int8_t(0);
          }
      }
    }
  });
}

// Rows of integers as lanes, `ld` lanes apart, and of each its zero point and scale.
struct Int8Rows {
  const uint32_t* lanes;
  int64_t ld;
  const int32_t* zero;
  const float* scale;
};

// A packed weight, or one of its panels.
struct Int8Panels {
  const int8_t* bytes = nullptr;
  const int32_t* negative_sums = nullptr;
  int64_t lanes = 0, cols = 0;
  Int8Panels() = default;
  Int8Panels(const uint32_t* packed, int64_t k, int64_t cols)
      : bytes(reinterpret_cast<const int8_t*>(packed + packed_columns(cols))),
        negative_sums(reinterpret_cast<const int32_t*>(packed)),
        lanes((k + Dot::K - 1) / Dot::K),
        cols(cols) {}
  // The panel that begins at `col`, if there is one.
  Int8Panels at(int64_t col) const {
    Int8Panels panel;
    if (col >= cols) return panel;
    panel.bytes = bytes + col * lanes * Dot::K;
    panel.negative_sums = negative_sums + col;
    panel.lanes = lanes;
    panel.cols = std::min<int64_t>(NR, cols - col);
    return panel;
  }
  int64_t lines() const { return lanes * round_up(cols, W) * Dot::K / CACHE_LINE; }
};

// One tile: M rows, V vectors of columns of a panel `width` columns wide, from column `col` on.
template <int M, int V, class Step>
void int8_tile(const Int8Rows& a, const int8_t* b, int64_t width, int64_t lanes, const int32_t* negative_sums,
               int32_t* out, Step& step) {
  vi sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[m][v] = Dot::SHIFTED ? load_as<vi>(negative_sums + v * W) * set1i(a.zero[m]) : vi{};
  const uint32_t* lane = a.lanes;
  const int64_t ld = a.ld;
  for (int64_t k = 0; k < lanes; k++, lane++, b += width * Dot::K) {
    step(k);
    vu bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) bv[v] = Dot::weights(b + v * W * Dot::K);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const uint32_t x = lane[m * ld];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) Dot::add(sum[m][v], x, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store_as(out + m * NR + v * W, sum[m][v]);
}

template <int V, int M = MR, class Step>
inline void int8_tile_rows(int rows, const Int8Rows& a, const int8_t* b, int64_t width, int64_t lanes,
                           const int32_t* negative_sums, int32_t* out, Step& step) {
  if constexpr (M > 0) {
    if (rows == M) return int8_tile<M, V>(a, b, width, lanes, negative_sums, out, step);
    int8_tile_rows<V, M - 1>(rows, a, b, width, lanes, negative_sums, out, step);
  }
}

// Up to MR rows times one panel; `out` has NR columns.
template <class Step>
inline void int8_tile_panel(int rows, const Int8Rows& a, const Int8Panels& b, int32_t* out, Step& step) {
  const int64_t width = round_up(b.cols, W);
  for (int64_t at = 0; at < width;) {
    const int8_t* from = b.bytes + at * Dot::K;
    switch ((width - at) / W) {
      case NV:
        return int8_tile_rows<NV>(rows, a, from, width, b.lanes, b.negative_sums, out, step);
      case 1:
        int8_tile_rows<1>(rows, a, from, width, b.lanes, b.negative_sums + at, out + at, step);
        at += W;
        break;
      default:
        int8_tile_rows<2>(rows, a, from, width, b.lanes, b.negative_sums + at, out + at, step);
        at += 2 * W;
    }
  }
}

}  // namespace pyvit::PYVIT_ISA
