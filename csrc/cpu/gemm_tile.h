// Register tiles and packing: the matrix product all CPU kernels are made of, C (M x N) = A (M x K) B (K x N), operands
// in cache.
//
// K is counted in 32-bit lanes: one float, or two neighbouring bf16 of the k axis. A lane of A is broadcast from
// memory; B lies in panels of NR columns, [K lanes][width] each, zero-padded to a multiple of W columns; only the last
// panel may be narrower.
#pragma once

#include <algorithm>

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

// Called with every k of a tile that begins before it is over.
struct NoStep {
  void operator()(int64_t) const {}
};

// One tile of C: M rows, V vectors of columns. Strides of A in lanes, of C in floats; `bk` lanes from one k of B to the
// next.
template <class D, int M, int V, bool ACC, class Step>
inline void tile(const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b, int64_t bk, int64_t lanes, float* c,
                 int64_t ldc, Step& step) {
  int64_t k = 0;
  do {
    vf acc[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[m][v] = vf{};
    const bool add = ACC || k > 0;
    for (const int64_t end = std::min(lanes, k + K_BLOCK); k < end; k++) {
      step(k);
      vu bv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) bv[v] = load_as<vu>(b + k * bk + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const uint32_t x = a[m * a_row + k * a_k];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) D::fma(acc[m][v], x, bv[v]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        float* p = c + m * ldc + v * W;
        store(p, add ? load(p) + acc[m][v] : acc[m][v]);
      }
  } while (k < lanes);
}

template <class D, int V, bool ACC, int M = MR, class Step>
inline void tile_rows(int rows, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b, int64_t bk,
                      int64_t lanes, float* c, int64_t ldc, Step& step) {
  if constexpr (M > 0) {
    if (rows == M) return tile<D, M, V, ACC>(a, a_row, a_k, b, bk, lanes, c, ldc, step);
    tile_rows<D, V, ACC, M - 1>(rows, a, a_row, a_k, b, bk, lanes, c, ldc, step);
  }
}
// Of up to MR rows and a panel of `width` columns, a multiple of W.
template <class D, bool ACC, class Step>
inline void tile_panel(int rows, int64_t width, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b,
                       int64_t lanes, float* c, int64_t ldc, Step& step) {
  if constexpr (!std::is_same_v<Step, NoStep>) {
    NoStep none;
    if (step.over()) return tile_panel<D, ACC>(rows, width, a, a_row, a_k, b, lanes, c, ldc, none);
  }
  switch (width / W) {
    case NV:
      return tile_rows<D, NV, ACC>(rows, a, a_row, a_k, b, width, lanes, c, ldc, step);
    case 1:
      return tile_rows<D, 1, ACC>(rows, a, a_row, a_k, b, width, lanes, c, ldc, step);
    default:
      tile_rows<D, 2, ACC>(rows, a, a_row, a_k, b, width, lanes, c, ldc, step);
      if (width == 3 * W) tile_rows<D, 1, ACC>(rows, a, a_row, a_k, b + 2 * W, width, lanes, c + 2 * W, ldc, step);
  }
}

// What to fetch while products run: the cache lines of rows of up to 8 matrices, one for every fourth k of a tile, for
// many at once hold up its loads. Rows far apart in memory (one head of an interleaved qkv) are beyond the reach of the
// hardware's prefetchers.
class Prefetch {
 public:
  void clear() { count_ = at_ = 0; }
  template <class T>
  void add(const T* first, int64_t ld, int64_t rows, int64_t cols, bool write = false) {
    if (rows > 0)
      streams_[count_++] = {
          reinterpret_cast<const char*>(first), ld * int64_t(sizeof(T)), rows, cols * int64_t(sizeof(T)), 0, write};
  }
  bool over() const { return at_ == count_; }
  void operator()(int64_t k) {
    if (k & 3 || over()) return;
    Stream& s = streams_[at_];
    if (s.write) {
      __builtin_prefetch(s.row + s.at, 1, 2);
    } else {
      __builtin_prefetch(s.row + s.at, 0, 2);
    }
    if ((s.at += 64) < s.bytes) return;
    s.at = 0;
    s.row += s.ld;
    if (!--s.rows) at_++;
  }

 private:
  struct Stream {
    const char* row;
    int64_t ld, rows, bytes, at;
    bool write;
  } streams_[8];
  int count_ = 0, at_ = 0;
};

// C (rows x cols) = or += A B. C holds round_up(cols, W) columns. Panels are the outer loop: one stays in L1 while the
// rows of A pass. B was packed with `packed_lanes` >= lanes, and with cols columns, or more where cols is a multiple of
// NR.
template <class D, bool ACC = false, class Step>
inline void gemm(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k,
                 const uint32_t* b, int64_t packed_lanes, float* c, int64_t ldc, Step& step) {
  for (int64_t n = 0; n < cols; n += NR) {
    const int64_t width = std::min<int64_t>(NR, round_up(cols - n, W));
    const uint32_t* panel = b + n * packed_lanes;
    for (int64_t m = 0; m < rows; m += MR) {
      const int left = int(std::min<int64_t>(MR, rows - m));
      tile_panel<D, ACC>(left, width, a + m * a_row, a_row, a_k, panel, lanes, c + m * ldc + n, ldc, step);
    }
  }
}
template <class D, bool ACC = false>
inline void gemm(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k,
                 const uint32_t* b, int64_t packed_lanes, float* c, int64_t ldc) {
  NoStep step;
  gemm<D, ACC>(rows, cols, lanes, a, a_row, a_k, b, packed_lanes, c, ldc, step);
}

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
      std::memcpy(&low, p, n_left * 2);
      if (second) std::memcpy(&high, p + ld, n_left * 2);
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
    vu v{};
    if (left >= 2 * W) return load_as<vu>(p);
    std::memcpy(&v, p, left * 2);
    return v;
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
// of MR rows, [lanes][MR], `down_tile` words from one to the next: a lane is stored as a vector of FEW, of which the
// next one overwrites what is too much. As in pack_rows, rows are fetched 16 ahead.
inline int64_t down_tile(int64_t lanes) { return lanes * MR + W; }
template <class D, class T>
inline void pack_down(const T* src, int64_t ld, int64_t rows, int64_t left, int64_t k, uint32_t* out) {
  constexpr int FEW = W > 8 ? 8 : W;
  static_assert(MR <= FEW);
  typedef uint32_t Lanes __attribute__((vector_size(FEW * 4)));
  const int64_t lanes = lanes_of<D>(k), step = down_tile(lanes), narrow = std::max<int64_t>(left - FEW, -1);
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
