// A block of rows times a packed matrix: tiles are finished (bias, activation, and whatever their destination does) as
// soon as they are computed.
#pragma once

#include "activation.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {

// What a block's rows may take of L2, beside the panels of weights that stream through it.
constexpr int64_t BLOCK_BYTES = 512 << 10, MOST_ROWS = 32 * MR;

// Rows of one unit of work, of `rows` in all. Few are shared out evenly; a row's result does not depend on it.
inline int64_t rows_of_block(int64_t rows, int64_t row_bytes) {
  const int64_t most = std::clamp<int64_t>(BLOCK_BYTES / row_bytes / MR * MR, MR, MOST_ROWS);
  const int64_t threads = ::pyvit::threads.count(), units = (rows + most - 1) / most;
  if (units >= 32 * threads) return most;
  const int64_t even = round_up(units, threads);
  return std::max<int64_t>((rows + even - 1) / even, 1);
}

// to.put(tile + bias), or without a bias to.put(tile), of `high` rows from `row` and NR columns, or `width`, from
// `col`.
template <bool BIASED, class N, class To>
inline void finish(int64_t row, int64_t high, int64_t col, N width, const float* tile, const float* bias, const To to) {
  if constexpr (std::is_same_v<N, int64_t>) {
    for (int64_t i = 0; i < high; i++)
      vectors(width, [&](int64_t v, int left) {
        const vf y = load(tile + i * NR + v);
        to.put(row + i, col + v, BIASED ? y + load(bias + v) : y, left);
      });
  } else {
    vf b[NV];
    for (int v = 0; BIASED && v < NV; v++) b[v] = load(bias + v * W);
    for (int64_t i = 0; i < high; i++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const vf y = load(tile + i * NR + v * W);
        to.put(row + i, col + v * W, BIASED ? y + b[v] : y, std::integral_constant<int, W>{});
      }
  }
}

// Rows of A as lanes: from one tile of MR rows to the next, from row to row, and from k to k.
struct Rows {
  const uint32_t* lanes;
  int64_t tile, row, k;
};
inline Rows rows_along(const uint32_t* lanes, int64_t ld) { return {lanes, MR * ld, ld, 1}; }

// A packed B of `cols` columns.
struct Panels {
  const uint32_t* words = nullptr;
  int64_t lanes = 0, cols = 0;
  // The panel that begins at `col`, if there is one.
  Panels at(int64_t col) const {
    if (col >= cols) return {};
    return {words + col * lanes, lanes, std::min<int64_t>(NR, cols - col)};
  }
};

// to.put(activation(a b + bias)) for a block of rows. A tile is finished while it is in L1. Each panel of b is fetched
// while the one before it is multiplied, and at the last the panel `then`.
template <class D, bool COARSE, class To>
inline void multiply(int64_t rows, const Rows& a, const Panels& b, const float* bias,
                     const Activation::Kind* activation, const To to, const Panels& then = {}) {
  alignas(64) float tile[MR * NR];
  Prefetch ahead;
  const auto end = [&](int64_t m, int64_t high, int64_t n, auto width) {
    if (!activation) return finish<true>(m, high, n, width, tile, bias + n, to);
    activate<COARSE>(*activation, high, width, tile, NR, bias + n);
    finish<false>(m, high, n, width, tile, nullptr, to);
  };
  for (int64_t n = 0; n < b.cols; n += NR) {
    const Panels panel = b.at(n), next = n + NR < b.cols ? b.at(n + NR) : then;
    const int64_t width = panel.cols, tiles = (rows + MR - 1) / MR, next_lines = next.lanes * next.cols / 16;
    for (int64_t m = 0; m < rows; m += MR) {
      const int64_t high = std::min<int64_t>(MR, rows - m), i = m / MR;
      const bool below = m + MR < rows;
      const int64_t next_m = below ? m + MR : 0, next_n = below ? n : n + NR;
      ahead.clear();
      if (next_n < b.cols)
        to.ahead(ahead, next_m, std::min<int64_t>(MR, rows - next_m), next_n, std::min<int64_t>(NR, b.cols - next_n));
      ahead.panel(next.words + next_lines * i / tiles * 16, next.words + next_lines * (i + 1) / tiles * 16);
      gemm_tile<D>(int(high), round_up(width, W), b.lanes, a.lanes + i * a.tile, a.row, a.k, panel.words, tile, NR,
                   false, &ahead);
      width == NR ? end(m, high, n, std::integral_constant<int64_t, NR>{}) : end(m, high, n, width);
    }
  }
}

}  // namespace pyvit::PYVIT_ISA
