// A bias of rows and columns of a grid of keys: its rows as attention adds them, and the sums of their gradients.
#pragma once

#include "dtype.h"
#include "kernel_args.h"

namespace pyvit::PYVIT_ISA {

// f(first key, count, grid row, grid column of the first) for the parts of keys j .. j + n that lie in one row each.
template <class F>
inline void grid_parts(const GridBias& grid, int64_t j, int64_t n, const F& f) {
  for (int64_t c = 0, y = j / grid.width, x = j % grid.width, count; c < n; c += count, y++, x = 0) {
    count = std::min(grid.width - x, n - c);
    f(c, count, y, x);
  }
}

// A query's numbers side by side: those of the rows, then those of the columns, with room for a whole vector after
// each.
struct GridLayout {
  static int64_t columns(const GridBias& grid) { return round_up(grid.height, W) + W; }
  static int64_t size(const GridBias& grid) { return columns(grid) + round_up(grid.width, W) + W; }
};

class GridBiasRows {
 public:
  // Of `buffer`: `keys` at a time.
  static int64_t size(const GridBias* grid, int64_t keys) {
    return grid ? round_up(keys, W) + W + GridLayout::size(*grid) : 0;
  }
  GridBiasRows(const GridBias* grid, int64_t b, int64_t h, int64_t keys, float* buffer) : grid_(grid) {
    if (!grid) return;
    rows_ = b * grid->rows_b + h * grid->rows_h;
    columns_ = b * grid->columns_b + h * grid->columns_h;
    sums_ = buffer;
    parts_ = buffer + round_up(keys, W) + W;
  }
  explicit operator bool() const { return grid_; }

  // Bias of query i for keys j .. j + n.
  const float* row(int64_t i, int64_t j, int64_t n) {
    const float* columns = parts_ + GridLayout::columns(*grid_);
    if (i != loaded_) load_parts(i);
    // Vectors may reach into the next part, which then overwrites them.
    grid_parts(*grid_, j, n, [&](int64_t c, int64_t count, int64_t y, int64_t x) {
      const float up = parts_[y];
      for (int64_t o = 0; o < count; o += W) store(sums_ + c + o, load(columns + x + o) + up);
    });
    return sums_;
  }

 private:
  void load_parts(int64_t i) {
    with_dtype(grid_->dtype, [&](auto t) {
      using T = decltype(t);
      const T* rows = static_cast<const T*>(grid_->rows) + rows_ + i * grid_->rows_q;
      const T* columns = static_cast<const T*>(grid_->columns) + columns_ + i * grid_->columns_q;
      vectors(grid_->height, [&](int64_t c, int n) { store(parts_ + c, read(rows + c, n)); });
      vectors(grid_->width,
              [&](int64_t c, int n) { store(parts_ + GridLayout::columns(*grid_) + c, read(columns + c, n)); });
    });
    loaded_ = i;
  }

  const GridBias* grid_;
  int64_t rows_ = 0, columns_ = 0, loaded_ = -1;
  float *sums_ = nullptr, *parts_ = nullptr;
};

// Adds the gradients `ds` of one query's bias for keys j .. j + n to those of its numbers, `sums` as GridLayout says.
inline void add_grid_gradient(const GridBias& grid, int64_t j, int64_t n, const float* ds, float* sums) {
  float* columns = sums + GridLayout::columns(grid);
  grid_parts(grid, j, n, [&](int64_t c, int64_t count, int64_t y, int64_t x) {
    vf total{};
    for (int64_t o = 0; o < count; o += W) {
      const vf g = load_n(ds + c + o, int(std::min<int64_t>(W, count - o)));
      total += g;
      store(columns + x + o, load(columns + x + o) + g);
    }
    sums[y] += reduce_add(total);
  });
}

}  // namespace pyvit::PYVIT_ISA
