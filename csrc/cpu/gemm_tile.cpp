// The register tiles of gemm_tile.h.
#include "gemm_tile.h"

namespace pyvit::PYVIT_ISA {
namespace {

struct NoPrefetch {
  void operator()(int64_t) const {}
};

// One tile of C: M rows, V vectors of columns. Strides of A in lanes, of C in floats; `bk` lanes from one k of B to the
// next.
template <class D, int M, int V, class Step>
void tile(const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b, int64_t bk, int64_t lanes, float* c,
          int64_t ldc, bool add, Step& step) {
  int64_t k = 0;
  do {
    vf acc[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[m][v] = vf{};
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
    if (add) {
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[m][v] += load(c + m * ldc + v * W);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(c + m * ldc + v * W, acc[m][v]);
    add = true;
  } while (k < lanes);
}

template <class D, int V, int M = MR, class Step>
void tile_rows(int rows, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b, int64_t bk, int64_t lanes,
               float* c, int64_t ldc, bool add, Step& step) {
  if constexpr (M > 0) {
    if (rows == M) return tile<D, M, V>(a, a_row, a_k, b, bk, lanes, c, ldc, add, step);
    tile_rows<D, V, M - 1>(rows, a, a_row, a_k, b, bk, lanes, c, ldc, add, step);
  }
}

template <class D, class Step>
inline void tile_panel(int rows, int64_t width, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k,
                       const uint32_t* b, float* c, int64_t ldc, bool add, Step& step) {
  switch (width / W) {
    case NV:
      return tile_rows<D, NV>(rows, a, a_row, a_k, b, width, lanes, c, ldc, add, step);
    case 1:
      return tile_rows<D, 1>(rows, a, a_row, a_k, b, width, lanes, c, ldc, add, step);
    default:
      tile_rows<D, 2>(rows, a, a_row, a_k, b, width, lanes, c, ldc, add, step);
      if (width == 3 * W) tile_rows<D, 1>(rows, a, a_row, a_k, b + 2 * W, width, lanes, c + 2 * W, ldc, add, step);
  }
}
template <class D>
__attribute__((always_inline)) inline void tile_panel(int rows, int64_t width, int64_t lanes, const uint32_t* a,
                                                      int64_t a_row, int64_t a_k, const uint32_t* b, float* c,
                                                      int64_t ldc, bool add, Prefetch* next) {
  if (next && !next->over()) return tile_panel<D>(rows, width, lanes, a, a_row, a_k, b, c, ldc, add, *next);
  NoPrefetch none;
  tile_panel<D>(rows, width, lanes, a, a_row, a_k, b, c, ldc, add, none);
}

}  // namespace

template <class D>
void gemm_tile(int rows, int64_t width, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b,
               float* c, int64_t ldc, bool add, Prefetch* next) {
  tile_panel<D>(rows, width, lanes, a, a_row, a_k, b, c, ldc, add, next);
}

// Panels are the outer loop: one stays in L1 while the rows of A pass.
template <class D>
void gemm(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t a_row, int64_t a_k, const uint32_t* b,
          int64_t packed_lanes, float* c, int64_t ldc, bool add, Prefetch* next) {
  for (int64_t n = 0; n < cols; n += NR) {
    const int64_t width = std::min<int64_t>(NR, round_up(cols - n, W));
    for (int64_t m = 0; m < rows; m += MR)
      tile_panel<D>(int(std::min<int64_t>(MR, rows - m)), width, lanes, a + m * a_row, a_row, a_k, b + n * packed_lanes,
                    c + m * ldc + n, ldc, add, next);
  }
}

#define PYVIT_INSTANTIATE(D)                                                                                    \
  template void gemm<D>(int64_t, int64_t, int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t, \
                        float*, int64_t, bool, Prefetch*);                                                      \
  template void gemm_tile<D>(int, int64_t, int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, float*, \
                             int64_t, bool, Prefetch*);
PYVIT_INSTANTIATE(F32)
#if defined(__AVX512BF16__)
PYVIT_INSTANTIATE(BF16)
#endif

}  // namespace pyvit::PYVIT_ISA
