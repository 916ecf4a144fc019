// Packing and the matrix product all CPU kernels are made of, C (M x N) = A (M x K) B (K x N), operands in cache.
// gemm_tile.cpp has the register tiles.
//
// K is counted in 32-bit lanes: one float, or two neighbouring bf16 of the k axis. A lane of A is broadcast from
// memory; B lies in panels of NR columns, [K lanes][width] each, zero-padded to a multiple of W columns; only the last
// panel may be narrower.
#pragma once

#include <algorithm>

#include "prefetch.h"
#include "vec.h"

namespace pyvit::PYVIT_ISA {

#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;  // 24 accumulators, 4 columns of B, 1 broadcast: 29 of 32 registers
#elif defined(__AVX__)
constexpr int MR = 6, NV = 2;  // 15 of 16
#else
constexpr int MR = 4, NV = 2;
#endif
constexpr int NR = NV * W;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A compute type: its lane, how many elements of the k axis a lane holds, and the multiply-accumulate.
struct F32 {
  using element = float;
  static constexpr int K = 1;
  static inline void fma(vf& acc, uint32_t a, vu b) {
    float x;
    __builtin_memcpy(&x, &a, 4);
    acc += x * (vf)b;
  }
};
#if defined(__AVX512BF16__)
struct BF16 {
  using element = bf16;
  static constexpr int K = 2;
  static inline void fma(vf& acc, uint32_t a, vu b) {
    acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

// The compute type for tensors of type T on this instruction set.
template <class T>
struct ComputeOf {
  using type = F32;
};
#if defined(__AVX512BF16__)
template <>
struct ComputeOf<bf16> {
  using type = BF16;
};
#endif
template <class T>
using Compute = typename ComputeOf<T>::type;

// Lanes summed in a register before they join C in memory: bounds the rounding error of long sums.
constexpr int64_t K_BLOCK = 256;

// C (rows x cols) = A B, or with `add`, += A B. C holds round_up(cols, W) columns. Lane k of row m of A is
// a[m * a_row + k * a_k]. B was packed with `packed_lanes` >= lanes, and with cols columns, or more where cols is a
// multiple of NR. What `next` lists is fetched meanwhile.
template <class D>
void gemm(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b,
          int64_t packed_lanes, float* c, int64_t ldc, bool add = false, Prefetch* next = nullptr);

// The same for up to MR rows and one panel of `width` columns, a multiple of W.
template <class D>
void gemm_tile(int rows, int64_t width, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b,
               float* c, int64_t ldc, bool add, Prefetch* next);

inline uint32_t as_lane(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline uint32_t as_lane(bf16 low, bf16 high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }

// Lanes needed for k elements, and words of a packed B.
template <class D>
inline int64_t lanes_of(int64_t k) {
  return (k + D::K - 1) / D::K;
}
template <class D>
inline int64_t packed_size(int64_t k, int64_t cols) {
  return lanes_of<D>(k) * round_up(cols, W);
}

// One lane row of a row-major source as 32-bit lanes, W at a time: elements (k, n .. n + W) or pairs ((k, n), (k + 1,
// n)). `ld` in elements; elements past `n_left` columns, and a second row that does not exist, read as zero.
template <class D, class T>
inline vu lanes_of_rows(const T* p, int64_t ld, int64_t n_left, bool second) {
  const bool whole = n_left >= W;
  if constexpr (D::K == 1) {
    return (vu)(whole ? load(p) : load_n(p, int(n_left)));
  } else if constexpr (std::is_same_v<T, float>) {
    const int n = whole ? W : int(n_left);
    return pair_lanes(read(p, n), second ? read(p + ld, n) : vf{});
  } else {
    vh low{}, high{};
    if (whole) {
      low = load_as<vh>(p);
      if (second) high = load_as<vh>(p + ld);
    } else {
      low = load_bits(p, int(n_left));
      if (second) high = load_bits(p + ld, int(n_left));
    }
    return pair_lanes(low, high);
  }
}

// B from a row-major source with k along its rows: B[k][n] = src[k * ld + n]. Pieces of rows far apart are beyond the
// hardware's prefetchers, so they are fetched 16 rows ahead.
template <class D, class T>
inline void pack_rows(const T* src, int64_t ld, int64_t k, int64_t cols, uint32_t* out) {
  const int64_t lanes = lanes_of<D>(k);
  for (int64_t n = 0; n < cols; n += NR) {
    const int64_t width = std::min<int64_t>(NR, round_up(cols - n, W));
    for (int64_t l = 0; l < lanes; l++)
      for (int64_t v = 0; v < width; v += W, out += W) {
        const T* p = src + l * D::K * ld + n + v;
        for (int r = 0; r < D::K; r++) __builtin_prefetch(p + (16 + r) * ld, 0, 3);
        store_as(out, lanes_of_rows<D>(p, ld, cols - n - v, l * D::K + 1 < k));
      }
  }
}

// Up to W lanes of one row along k: elements k .. k + W, or pairs.
template <class D, class T>
inline vu lanes_along(const T* p, int64_t left) {
  if constexpr (D::K == 1) {
    return (vu)(left >= W ? load(p) : load_n(p, int(left)));
  } else if constexpr (std::is_same_v<T, float>) {
    if (left >= 2 * W) return round_in_order(load(p), load(p + W));
    const int64_t more = left - W;
    return round_in_order(read(p, int(std::min<int64_t>(left, W))), more > 0 ? load_n(p + W, int(more)) : vf{});
  } else {
    return left >= 2 * W ? load_as<vu>(p) : load_pairs(p, int(left));
  }
}

// B from a row-major source with k along its columns: B[k][n] = src[n * ld + k]; transposed W x W lanes at a time.
template <class D, class T>
inline void pack_cols(const T* src, int64_t ld, int64_t k, int64_t cols, uint32_t* out) {
  const int64_t lanes = lanes_of<D>(k);
  for (int64_t n = 0; n < cols; n += NR) {
    const int64_t width = std::min<int64_t>(NR, round_up(cols - n, W));
    for (int64_t v = 0; v < width; v += W)
      for (int64_t l = 0; l < lanes; l += W) {
        vu r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
          const int64_t row = n + v + i;
          r[i] = row < cols ? lanes_along<D>(src + row * ld + l * D::K, k - l * D::K) : vu{};
        }
        transpose(r);
        const int64_t count = std::min<int64_t>(W, lanes - l);
        if (count == W) {
#pragma GCC unroll 16
          for (int i = 0; i < W; i++) store_as(out + (l + i) * width + v, r[i]);
        } else {
          for (int i = 0; i < count; i++) store_as(out + (l + i) * width + v, r[i]);
        }
      }
    out += lanes * width;
  }
}

// Rows of A as lanes along k, zero-padded to whole lanes: out[row][lanes].
template <class D, class T>
inline void pack_a(const T* src, int64_t ld, int64_t rows, int64_t k, uint32_t* out) {
  const int64_t lanes = lanes_of<D>(k);
  for (int64_t r = 0; r < rows; r++) {
    const T* p = src + r * ld;
    uint32_t* o = out + r * lanes;
    int64_t l = 0;
    for (; l + W <= lanes && (l + W) * D::K <= k; l += W) store_as(o + l, lanes_along<D>(p + l * D::K, W * D::K));
    for (; l < lanes; l++) {
      if constexpr (D::K == 1) {
        o[l] = as_lane(to_float(p[l]));
      } else {
        o[l] = as_lane(p[l * 2], l * 2 + 1 < k ? p[l * 2 + 1] : bf16{0});
      }
    }
  }
}

// Elements of two vectors by turns.
template <class V, int... I>
inline auto interleave(V low, V high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, (I / 2 + (I & 1) * int(sizeof...(I) / 2))...);
}

// Rows of A from a source with k along its rows: A[m][k] = src[k * ld + m], of which `left` >= rows may be read. Tiles
// of MR rows, [lanes][MR], `column_major_tile` words from one to the next: a lane is stored as a vector of FEW, of
// which the next one overwrites what is too much. As in pack_rows, rows are fetched 16 ahead.
inline int64_t column_major_tile(int64_t lanes) { return lanes * MR + W; }
template <class D, class T>
inline void pack_a_column_major(const T* src, int64_t ld, int64_t rows, int64_t left, int64_t k, uint32_t* out) {
  constexpr int FEW = W > 8 ? 8 : W;
  static_assert(MR <= FEW);
  typedef uint32_t Lanes __attribute__((vector_size(FEW * 4)));
  const int64_t lanes = lanes_of<D>(k), step = column_major_tile(lanes), narrow = std::max<int64_t>(left - FEW, -1);
  for (int64_t l = 0; l < lanes; l++) {
    const T* p = src + l * D::K * ld;
    const bool second = l * D::K + 1 < k;
    uint32_t* to = out + l * MR;
    for (int r = 0; r < D::K; r++)
      for (int64_t m = 0; m < rows; m += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + (16 + r) * ld + m, 0, 3);
    for (int64_t m = 0; m < rows; m += MR, to += step) {
      if (W == FEW || m > narrow || !std::is_same_v<T, typename D::element>) {
        store_as(to, lanes_of_rows<D>(p + m, ld, left - m, second));
      } else if constexpr (D::K == 1) {
        store_as(to, load_as<Lanes>(p + m));
      } else {
        typedef uint16_t Halves __attribute__((vector_size(FEW * 2)));
        const Halves low = load_as<Halves>(p + m), high = second ? load_as<Halves>(p + ld + m) : Halves{};
        store_as(to, interleave(low, high, std::make_integer_sequence<int, 2 * FEW>{}));
      }
    }
  }
}

}  // namespace pyvit::PYVIT_ISA
