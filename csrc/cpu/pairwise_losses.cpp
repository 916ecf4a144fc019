// Losses over all pairs of rows of two matrices, tile by tile: the similarities are computed, reduced and overwritten,
// and computed again by the backward.
//
// Rows of either matrix are cut into stripes. In step r stripe i of a meets stripe j of b with i + j = r modulo their
// number: the blocks of a step share no row and no column, so that each adds to the sums and gradients of both in
// place, and the steps follow one another. The order of every sum follows from the shape alone.
//
// Similarities are float32 whatever the inputs are. Where the processor multiplies bfloat16, those of such inputs lose
// nothing by it, and their derivatives are rounded to it before they multiply the inputs, as probabilities are in
// attention.
#include "pairwise_losses.h"

#include "dtype.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {
namespace {

constexpr int64_t STRIPES = 16;  // to keep that many threads busy; more where stripes would outgrow the cache
constexpr int64_t STRIPE = 960;

template <class T>
class Worker {
  using D = Compute<T>;

 public:
  Worker(const Pairs& p, const PairsGrad* g, int64_t stripe)
      : p_(p),
        g_(g),
        stripe_(stripe),
        depth_(lanes_of<D>(p.d)),
        a_(static_cast<const T*>(p.a)),
        b_(static_cast<const T*>(p.b)) {
    Scratch& memory = scratch();
    s_ = memory.take<float>(PAIR_TILE * PAIR_TILE);
    b_cols_ = memory.take<uint32_t>(PAIR_TILE * depth_);
    if (!std::is_same_v<T, float>) lanes_ = memory.take<uint32_t>(stripe * depth_);
    if (!g) return;
    b_rows_ = memory.take<uint32_t>(packed_size<D>(PAIR_TILE, p.d));
    if (!g->grad_b) return;
    a_rows_ = memory.take<uint32_t>(packed_size<D>(stripe, p.d));
    if (D::K > 1) s_columns_ = memory.take<uint32_t>(PAIR_TILE / D::K * PAIR_TILE);
  }

  void block(int64_t i, int64_t j) {
    const int64_t a0 = i * stripe_, a1 = std::min(a0 + stripe_, p_.n), b0 = j * stripe_,
                  b1 = std::min(b0 + stripe_, p_.m);
    if (a0 >= a1 || b0 >= b1) return;
    if (lanes_) pack_a<D>(a_ + a0 * p_.lda, p_.lda, a1 - a0, p_.d, lanes_);
    for (int64_t r = a0; a_rows_ && r < a1; r += PAIR_TILE)
      pack_rows<D>(a_ + r * p_.lda, p_.lda, std::min(PAIR_TILE, a1 - r), p_.d, a_rows_ + packed_size<D>(r - a0, p_.d));
    for (int64_t c = b0; c < b1; c += PAIR_TILE) {
      const int64_t cols = std::min(PAIR_TILE, b1 - c);
      const T* b = b_ + c * p_.ldb;
      for (int64_t k = 0; k < depth_; k += K_BLOCK)
        pack_cols<D>(b + k * D::K, p_.ldb, std::min(K_BLOCK * D::K, p_.d - k * D::K), cols,
                     b_cols_ + k * round_up(cols, W));
      if (b_rows_) pack_rows<D>(b, p_.ldb, cols, p_.d, b_rows_);
      for (int64_t r = a0; r < a1 && !(p_.own && r > c); r += PAIR_TILE) {
        const int64_t rows = std::min(PAIR_TILE, a1 - r);
        similarities(r, rows, cols, a0);
        const PairTile t{s_, PAIR_TILE, rows, cols, p_.own && r == c, p_.shift < 0 ? cols : r + p_.shift - c};
        if (g_) {
          gradient(t, r, c, a0);
        } else {
          sums(t, r, c);
        }
      }
    }
  }

 private:
  void similarities(int64_t r, int64_t rows, int64_t cols, int64_t a0) {
    const uint32_t* a = lanes_ ? lanes_ + (r - a0) * depth_ : reinterpret_cast<const uint32_t*>(a_ + r * p_.lda);
    const int64_t a_row = lanes_ ? depth_ : p_.lda;
    int64_t k = 0;
    do {  // once for d = 0 too, whose similarities are 0
      const int64_t lanes = std::min(K_BLOCK, depth_ - k);
      const uint32_t* b = b_cols_ + k * round_up(cols, W);
      gemm<D>(rows, cols, lanes, a + k, a_row, 1, b, lanes, s_, PAIR_TILE, k > 0);
    } while ((k += K_BLOCK) < depth_);
  }

  void sums(const PairTile& t, int64_t r, int64_t c) {
    if (p_.sigmoid) return sigmoid_tile(t, p_.scale, p_.bias, p_.total_a + r);
    const bool both = p_.total_b && !t.diagonal;
    softmax_tile(t, p_.scale, {p_.top_a + r, p_.total_a + r}, both ? Sums{p_.top_b + c, p_.total_b + c} : Sums{});
  }

  void gradient(const PairTile& t, int64_t r, int64_t c, int64_t a0) {
    if (p_.sigmoid) {
      sigmoid_gradient_tile(t, p_.scale, p_.bias, p_.total_a + r);
    } else {
      softmax_gradient_tile(t, p_.scale, g_->lse_a + r, g_->lse_b + c);
    }
    auto* rows = reinterpret_cast<uint32_t*>(t.s);
    const uint32_t* columns = rows;
    if constexpr (D::K > 1) {
      round(t);
      columns = s_columns_;
    }
    const int64_t col_lanes = lanes_of<D>(t.cols), row_lanes = lanes_of<D>(t.rows);
    gemm<D>(t.rows, p_.d, col_lanes, rows, t.ld, 1, b_rows_, col_lanes, g_->grad_a + r * g_->ld, g_->ld, true);
    if (a_rows_ && !t.diagonal)
      gemm<D>(t.cols, p_.d, row_lanes, columns, 1, t.ld, a_rows_ + packed_size<D>(r - a0, p_.d), row_lanes,
              g_->grad_b + c * g_->ld, g_->ld, true);
  }

  // The tile's derivatives as lanes: along its rows in place, and down its columns.
  void round(const PairTile& t) {
    t.pad(0.f);
    for (int64_t i = 0; i < t.rows; i++) {
      float* row = t.s + i * t.ld;
      for (int64_t c = 0; s_columns_ && i % 2 == 0 && c < t.padded(); c += W)
        store_as(s_columns_ + i / 2 * t.ld + c,
                 pair_lanes(load(row + c), i + 1 < t.rows ? load(row + t.ld + c) : vf{}));
      for (int64_t c = 0; c < t.padded(); c += W) store_lanes<D>(reinterpret_cast<uint32_t*>(row), c, load(row + c));
    }
  }

  const Pairs& p_;
  const PairsGrad* g_;
  const int64_t stripe_, depth_;  // depth: the lanes of a row
  const T *a_, *b_;
  float* s_;
  // Rows of a as lanes and as packed for P^T a; a tile of b as packed for a b^T and for P b; a tile's lanes down
  // columns.
  uint32_t *lanes_ = nullptr, *a_rows_ = nullptr, *b_cols_, *b_rows_ = nullptr, *s_columns_ = nullptr;
};

template <class T>
void run(const Pairs& p, const PairsGrad* g) {
  const int64_t most = std::max(p.n, p.m);
  const int64_t stripe = std::min(STRIPE, round_up((most + STRIPES - 1) / STRIPES, PAIR_TILE));
  const int64_t stripes = (most + stripe - 1) / stripe;
  for (int64_t step = 0; step < stripes; step++)
    parallel_units(stripes, [&](Queue& queue) {
      Worker<T> worker(p, g, stripe);
      for (int64_t i; (i = queue.next()) >= 0;) {
        const int64_t j = (step - i + stripes) % stripes;
        if (!p.own || i <= j) worker.block(i, j);
      }
    });
}

}  // namespace

void pairs(const Pairs& p) {
  with_dtype(p.dtype, [&](auto t) { run<decltype(t)>(p, nullptr); });
}

void pairs_backward(const Pairs& p, const PairsGrad& g) {
  with_dtype(p.dtype, [&](auto t) { run<decltype(t)>(p, &g); });
}

}  // namespace pyvit::PYVIT_ISA
