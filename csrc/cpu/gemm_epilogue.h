// A block of rows times a packed matrix: tiles are finished (bias, activation, and whatever their destination does) as
// soon as they are computed.
#pragma once

#include "activation.h"
#include "gemm_tile.h"

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

// Cache lines to fetch in the course of a tile. All at once they would hold up its loads.
class ComingLines {
 public:
  void clear() { count_ = 0, read_ = end_ = nullptr; }
  // Words that will be read, tile `i` of `n`'s share of them.
  void read(const uint32_t* words, int64_t count, int64_t i, int64_t n) {
    const int64_t lines = count / 16;
    read_ = words + lines * i / n * 16;
    end_ = words + lines * (i + 1) / n * 16;
  }
  // Lines that will be written.
  template <class T>
  void add(const T* first, int64_t ld, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++) {
      const char* row = reinterpret_cast<const char*>(first + i * ld);
      for (int64_t b = 0; b < cols * int64_t(sizeof(T)) && count_ < MOST; b += 64) line_[count_++] = row + b;
    }
  }
  // Up to `n` lines of a stretch of memory, which then begins behind them.
  void add(const char*& at, const char* end, int64_t n) {
    for (; n && at < end && count_ < MOST; n--, at += 64) line_[count_++] = at;
  }
  bool over() const { return !count_ && read_ >= end_; }
  void operator()(int64_t k) {
    if (k & 1) {
      if (read_ < end_) __builtin_prefetch(read_, 0, 2), read_ += 16;
    } else if (count_ && !(k & 2)) {
      __builtin_prefetch(line_[--count_], 1, 3);
    }
  }

 private:
  static constexpr int MOST = 4 * MR * NR / 16;  // four tiles of float32
  const char* line_[MOST];
  int count_ = 0;
  const uint32_t *read_ = nullptr, *end_ = nullptr;
};

// to.put(activation(tile + bias)), of `high` rows from `row` and NR columns, or `width`, from `col`.
template <class N, class To, class F>
inline void finish(int64_t row, int64_t high, int64_t col, N width, const float* tile, const float* bias, const To to,
                   const F& value) {
  if constexpr (std::is_same_v<N, int64_t>) {
    for (int64_t i = 0; i < high; i++)
      vectors(width, [&](int64_t v, int left) {
        to.put(row + i, col + v, value(load(tile + i * NR + v) + load(bias + col + v)), left);
      });
  } else {
    vf b[NV];
    for (int v = 0; v < NV; v++) b[v] = load(bias + col + v * W);
    for (int64_t i = 0; i < high; i++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++)
        to.put(row + i, col + v * W, value(load(tile + i * NR + v * W) + b[v]), std::integral_constant<int, W>{});
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
  ComingLines ahead;
  const auto end = [&](int64_t m, int64_t high, int64_t n, auto width) {
    if (!activation) return finish(m, high, n, width, tile, bias, to, [](vf y) { return y; });
    with_activation<COARSE>(*activation,
                            [&](auto y) { finish(m, high, n, width, tile, bias, to, decltype(y)::value); });
  };
  for (int64_t n = 0; n < b.cols; n += NR) {
    const Panels panel = b.at(n), next = n + NR < b.cols ? b.at(n + NR) : then;
    const int64_t width = panel.cols, tiles = (rows + MR - 1) / MR;
    for (int64_t m = 0; m < rows; m += MR) {
      const int64_t high = std::min<int64_t>(MR, rows - m);
      const bool below = m + MR < rows;
      const int64_t next_m = below ? m + MR : 0, next_n = below ? n : n + NR;
      ahead.clear();
      if (next_n < b.cols)
        to.ahead(ahead, next_m, std::min<int64_t>(MR, rows - next_m), next_n, std::min<int64_t>(NR, b.cols - next_n));
      ahead.read(next.words, next.lanes * next.cols, m / MR, tiles);
      tile_panel<D, false>(int(high), round_up(width, W), a.lanes + m / MR * a.tile, a.row, a.k, panel.words, b.lanes,
                           tile, NR, ahead);
      width == NR ? end(m, high, n, std::integral_constant<int64_t, NR>{}) : end(m, high, n, width);
    }
  }
}

}  // namespace pyvit::PYVIT_ISA
