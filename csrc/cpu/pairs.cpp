// Losses over all pairs of rows of two matrices, tile by tile: the similarities are computed, reduced and overwritten,
// and computed again by the backward.
//
// Rows of either matrix are cut into stripes. In step r stripe i of a meets stripe j of b with i + j = r modulo their
// number: the blocks of a step share no row and no column, so that each adds to the sums and gradients of both in
// place, and the steps follow one another. The order of every sum follows from the shape alone.
#include "pair_tile.h"

namespace pyvit::PYVIT_ISA {
namespace {

constexpr int64_t STRIPES = 16;  // to keep that many threads busy; more where stripes would outgrow the cache
constexpr int64_t STRIPE = 960;

template <class T>
class Worker {
 public:
  Worker(const Pairs& p, const PairsGrad* g, int64_t stripe)
      : p_(p), g_(g), stripe_(stripe), a_(static_cast<const T*>(p.a)), b_(static_cast<const T*>(p.b)) {
    Scratch& memory = scratch();
    s_ = memory.take<float>(PAIR_TILE * PAIR_TILE);
    b_cols_ = memory.take<uint32_t>(PAIR_TILE * p.d);
    if (!std::is_same_v<T, float>) lanes_ = memory.take<uint32_t>(stripe * p.d);
    if (!g) return;
    b_rows_ = memory.take<uint32_t>(PAIR_TILE * round_up(p.d, W));
    if (g->grad_b) a_rows_ = memory.take<uint32_t>(stripe * round_up(p.d, W));
  }

  void block(int64_t i, int64_t j) {
    const int64_t a0 = i * stripe_, a1 = std::min(a0 + stripe_, p_.n), b0 = j * stripe_,
                  b1 = std::min(b0 + stripe_, p_.m);
    if (a0 >= a1 || b0 >= b1) return;
    if (lanes_) pack_a<F32>(a_ + a0 * p_.lda, p_.lda, a1 - a0, p_.d, lanes_);
    for (int64_t r = a0; a_rows_ && r < a1; r += PAIR_TILE)
      pack_rows<F32>(a_ + r * p_.lda, p_.lda, std::min(PAIR_TILE, a1 - r), p_.d,
                     a_rows_ + (r - a0) * round_up(p_.d, W));
    for (int64_t c = b0; c < b1; c += PAIR_TILE) {
      const int64_t cols = std::min(PAIR_TILE, b1 - c);
      const T* b = b_ + c * p_.ldb;
      for (int64_t k = 0; k < p_.d; k += K_BLOCK)
        pack_cols<F32>(b + k, p_.ldb, std::min(K_BLOCK, p_.d - k), cols, b_cols_ + k * round_up(cols, W));
      if (b_rows_) pack_rows<F32>(b, p_.ldb, cols, p_.d, b_rows_);
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
    const uint32_t* a = lanes_ ? lanes_ + (r - a0) * p_.d : reinterpret_cast<const uint32_t*>(a_ + r * p_.lda);
    const int64_t a_row = lanes_ ? p_.d : p_.lda;
    int64_t k = 0;
    do {  // once for d = 0 too, whose similarities are 0
      const int64_t lanes = std::min(K_BLOCK, p_.d - k);
      const uint32_t* b = b_cols_ + k * round_up(cols, W);
      if (k) {
        gemm<F32, true>(rows, cols, lanes, a + k, a_row, 1, b, lanes, s_, PAIR_TILE);
      } else {
        gemm<F32>(rows, cols, lanes, a, a_row, 1, b, lanes, s_, PAIR_TILE);
      }
    } while ((k += K_BLOCK) < p_.d);
  }

  void sums(const PairTile& t, int64_t r, int64_t c) {
    if (p_.sigmoid) return sigmoid_tile(t, p_.scale, p_.bias, p_.total_a + r);
    const bool both = p_.total_b && !t.diagonal;
    softmax_tile(t, p_.scale * LOG2E, {p_.top_a + r, p_.total_a + r},
                 both ? Sums{p_.top_b + c, p_.total_b + c} : Sums{});
  }

  void gradient(const PairTile& t, int64_t r, int64_t c, int64_t a0) {
    if (p_.sigmoid) {
      sigmoid_gradient_tile(t, p_.scale, p_.bias, p_.total_a + r);
    } else {
      softmax_gradient_tile(t, p_.scale * LOG2E, g_->lse_a + r, g_->lse_b + c);
    }
    const auto* p = reinterpret_cast<const uint32_t*>(t.s);
    gemm<F32, true>(t.rows, p_.d, t.cols, p, t.ld, 1, b_rows_, t.cols, g_->grad_a + r * g_->ld, g_->ld);
    if (a_rows_ && !t.diagonal)
      gemm<F32, true>(t.cols, p_.d, t.rows, p, 1, t.ld, a_rows_ + (r - a0) * round_up(p_.d, W), t.rows,
                      g_->grad_b + c * g_->ld, g_->ld);
  }

  const Pairs& p_;
  const PairsGrad* g_;
  const int64_t stripe_;
  const T *a_, *b_;
  float* s_;
  // Rows of a as float32 lanes and as packed for P^T a; a tile of b as packed for a b^T and for P b.
  uint32_t *lanes_ = nullptr, *a_rows_ = nullptr, *b_cols_, *b_rows_ = nullptr;
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

void run(const Pairs& p, const PairsGrad* g) {
  switch (p.dtype) {
    case Dtype::f32:
      return run<float>(p, g);
    case Dtype::bf16:
      return run<bf16>(p, g);
    case Dtype::f16:
      return run<f16>(p, g);
    case Dtype::boolean:
      return;
  }
}

}  // namespace

void pairs(const Pairs& p) {
  // Base 2 inside, so that a call rounds each running maximum once.
  auto rescale = [&](float factor) {
    if (p.sigmoid) return;
    for (int64_t i = 0; i < p.n; i++) p.top_a[i] = std::max(p.top_a[i] * factor, -std::numeric_limits<float>::max());
    if (p.total_b && !p.own)
      for (int64_t i = 0; i < p.m; i++) p.top_b[i] = std::max(p.top_b[i] * factor, -std::numeric_limits<float>::max());
  };
  rescale(LOG2E);
  run(p, nullptr);
  rescale(LN2);
}

void pairs_backward(const Pairs& p, const PairsGrad& g) { run(p, &g); }

}  // namespace pyvit::PYVIT_ISA
