// What forward and backward of window attention share: packing through pointers to rows, products with an epilogue that
// fetch what comes next.
//
// Scores are held transposed, keys as rows and queries as columns: maximum and sum of the softmax run down the columns,
// one query per vector lane, and no window size needs a horizontal reduction. A window of W k + 1 tokens (7 x 7) would
// waste a vector on its last query, so that one, the remainder, is done by dot products.
#pragma once

#include "dtype.h"
#include "window_coordinates.h"

namespace pyvit::PYVIT_ISA {

// Where running maxima start: no finite score lies below.
constexpr float LEAST = std::numeric_limits<float>::lowest();

// Packing. Row i of an operand is rows[i] + at, d channels.

template <class T>
struct TokenRows {
  const T* const* rows;
  int64_t at, n, d;
  const T* operator[](int64_t i) const { return rows[i] + at; }
};

// Tokens as rows, lanes along the channels, zero-padded to whole vectors.
template <class D>
inline int64_t ld_of_rows(int64_t d) {
  return round_up(lanes_of<D>(d), W);
}
template <class D, class T>
inline void pack_rows(const TokenRows<T>& in, uint32_t* out) {
  const int64_t ld = ld_of_rows<D>(in.d);
  for (int64_t i = 0; i < in.n; i++)
    for (int64_t l = 0; l < ld; l += W) store_as(out + i * ld + l, lanes_along<D>(in[i] + l * D::K, in.d - l * D::K));
}

// Channels as rows of lanes, tokens as columns, zero-padded to whole vectors; with `remainder` the last token becomes
// the row `last` instead.
template <class D, class T>
inline void pack_columns(const TokenRows<T>& in, uint32_t* out, int64_t ld, bool remainder, uint32_t* last) {
  const int64_t lanes = lanes_of<D>(in.d), n = remainder ? in.n - 1 : in.n;
  if (remainder) pack_rows<D>(TokenRows<T>{in.rows + n, in.at, 1, in.d}, last);
  for (int64_t i = 0; i < n; i += W)
    for (int64_t l = 0; l < lanes; l += W) {
      vu r[W];
      const int64_t left = in.d - l * D::K;
      if (i + W <= n) {
#pragma GCC unroll 16
        for (int k = 0; k < W; k++) r[k] = lanes_along<D>(in[i + k] + l * D::K, left);
      } else {
#pragma GCC unroll 16
        for (int k = 0; k < W; k++) r[k] = i + k < n ? lanes_along<D>(in[i + k] + l * D::K, left) : vu{};
      }
      transpose(r);
      const int64_t count = std::min<int64_t>(W, lanes - l);
      for (int64_t k = 0; k < count; k++) store_as(out + (l + k) * ld + i, r[k]);
    }
}

// Lanes of tokens as rows, channels as columns, zero-padded to whole vectors.
template <class D, class T>
inline void pack_pairs(const TokenRows<T>& in, uint32_t* out) {
  if constexpr (D::K == 1) {
    pack_rows<D>(in, out);
  } else {
    for (int64_t i = 0; i < in.n; i += 2)
      for (int64_t c = 0; c < in.d; c += W, out += W) {
        store_as(out, lanes_of_rows<D>(in[i] + c, i + 1 < in.n ? in[i + 1] - in[i] : 0, in.d - c, i + 1 < in.n));
      }
  }
}

// Products

#if defined(__AVX512F__)
constexpr int WIDEST = 4;
constexpr int tile_height(int v) { return v == 4 ? 6 : 8; }
#elif defined(__AVX__)
constexpr int WIDEST = 2;
constexpr int tile_height(int v) { return v == 2 ? 6 : 8; }
#else
constexpr int WIDEST = 2;
constexpr int tile_height(int) { return 4; }
#endif

inline int64_t group(int64_t left) { return left <= WIDEST ? left : WIDEST == 4 && left % 4 ? 3 : WIDEST; }

// f(v) with the number of vectors of the next group of columns as a constant; returns it.
template <class F>
inline int64_t next_group(int64_t left, const F& f) {
  const int64_t v = group(left);
  switch (v) {
    case 1:
      f(std::integral_constant<int, 1>{});
      break;
    case 2:
      f(std::integral_constant<int, 2>{});
      break;
    default:
      if constexpr (WIDEST == 4) {
        if (v == 3) {
          f(std::integral_constant<int, 3>{});
        } else {
          f(std::integral_constant<int, 4>{});
        }
      }
  }
  return v;
}

// The most vectors of queries that are taken together.
inline int64_t widest_group(const Windows& g) {
  int64_t most = 0;
  for (int64_t left = (g.remainder ? g.area - 1 : g.ld) / W; left > 0; left -= group(left))
    most = std::max(most, group(left));
  return most;
}

// M rows, V vectors of columns of A B; lane k of row m of A is a[m * lda + k], or a[m + k * lda] if it lies in COLUMNS.
// done(m, v, sums). What `done` holds it holds by value, and it is passed by value: a store may change whatever has an
// address, so anything else would be loaded again after each.
template <class D, int M, int V, bool COLUMNS, class Done>
inline void tile_then(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t lanes, const Done done,
                      PrefetchList& next) {
  // A line for about every 12 cycles: memory gives no more, and what waits for it holds up the loads.
  constexpr int EACH = M * V >= 24 ? 1 : 2;
  const auto fetch = next.take((lanes + EACH - 1) / EACH);
  vf acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[m][v] = vf{};
  for (int64_t k = 0; k < lanes; k++) {
    if (k % EACH == 0) fetch(k / EACH);
    vu bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) bv[v] = load_as<vu>(b + k * ldb + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const uint32_t x = COLUMNS ? a[m + k * lda] : a[m * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) D::fma(acc[m][v], x, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) done(m, v, acc[m][v]);
}

// All rows of one group of columns; done(row, v, sums).
template <class D, int V, bool COLUMNS, int M = tile_height(V), class Done>
inline void product(int64_t rows, int64_t lanes, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
                    const Done done, PrefetchList& next, int64_t row = 0) {
  for (; row + M <= rows; row += M) {
    tile_then<D, M, V, COLUMNS>(
        a + (COLUMNS ? row : row * lda), lda, b, ldb, lanes,
        [=](int m, int v, vf x) __attribute__((always_inline)) { done(row + m, v, x); }, next);
  }
  if constexpr (M > 1)
    if (row < rows) product<D, V, COLUMNS, (M > 4 ? 4 : M / 2)>(rows, lanes, a, lda, b, ldb, done, next, row);
}

// All columns: done(row, column, sums). M: the rows of a tile at most, or 0 for as many as fit into the registers.
template <class D, bool COLUMNS, int M = 0, class Done>
inline void product_then(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t lda, const uint32_t* b,
                         int64_t ldb, const Done done, PrefetchList& next) {
  for (int64_t c = 0; c < cols;)
    c += W * next_group((cols - c + W - 1) / W, [&](auto v) {
           constexpr int V = decltype(v)::value;
           product<D, V, COLUMNS, M ? M : tile_height(V)>(
               rows, lanes, a, lda, b + c, ldb,
               [=](int64_t row, int u, vf x) __attribute__((always_inline)) { done(row, c + u * W, x); }, next);
         });
}

// Dot products of n rows of lanes with one: out[j] for j < round_up(n, W), zero beyond n.
template <int STEP = 1>
inline vf sum_rows(vu (&r)[W]) {
  if constexpr (STEP < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * STEP) {
      transpose_pair<STEP>(r[i], r[i + STEP], std::make_integer_sequence<int, W>{});
      r[i] = (vu)((vf)r[i] + (vf)r[i + STEP]);
    }
    return sum_rows<STEP * 2>(r);
  } else {
    return (vf)r[0];
  }
}
template <class D>
inline vf multiply_add(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
  if constexpr (D::K == 2) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + (vf)a * (vf)b;
}
template <class D>
inline void dots(const uint32_t* a, int64_t n, int64_t ld, const uint32_t* b, float* out) {
  for (int64_t j = 0; j < n; j += W) {
    vu r[W];
#pragma GCC unroll 16
    for (int k = 0; k < W; k++) {
      vf sum{};
      if (j + k < n)
        for (int64_t l = 0; l < ld; l += W)
          sum = multiply_add<D>(sum, load_as<vu>(a + (j + k) * ld + l), load_as<vu>(b + l));
      r[k] = (vu)sum;
    }
    store(out + j, sum_rows(r));
  }
}

// Cosine attention: rows over their length, at least 1e-12, as F.normalize; `inverse` is what they were multiplied by.
template <class T, class E>
inline void normalise(const TokenRows<T>& in, E* out, float* inverse) {
  const int64_t ld = round_up(in.d, W);
  for (int64_t i = 0; i < in.n; i++) {
    vf squares{};
    for (int64_t c = 0; c < in.d; c += W) {
      const vf x = in.d - c >= W ? load(in[i] + c) : load_n(in[i] + c, int(in.d - c));
      squares += x * x;
    }
    inverse[i] = 1.f / std::max(std::sqrt(reduce_add(squares)), 1e-12f);
    for (int64_t c = 0; c < in.d; c += W)
      store(out + i * ld + c, (in.d - c >= W ? load(in[i] + c) : load_n(in[i] + c, int(in.d - c))) * inverse[i]);
  }
}

// Queries, keys and values of one head in one window. Cosine attention normalises queries and keys first.
template <class D, class T>
class Operands {
  using E = typename D::element;

 public:
  Operands(const Window& w, int64_t n, Scratch& memory) : w_(w), n_(n), ld_(round_up(w.d, W)) {
    if (!w.logit_scale) return;
    inverse_ = memory.take<float>(2 * n);
    unit_rows_ = memory.take<E*>(2 * n);
    E* unit = memory.take<E>(2 * n * ld_);
    for (int64_t i = 0; i < 2 * n; i++) unit_rows_[i] = unit + i * ld_;
  }
  void set(T* const* rows, int64_t head) {
    rows_ = rows;
    channel_ = head * w_.d;
    if (!w_.logit_scale) return;
    normalise(part(0), unit_rows_[0], inverse_);
    normalise(part(1), unit_rows_[n_], inverse_ + n_);
  }
  // 0, 1, 2: q, k, v.
  TokenRows<T> part(int64_t which) const { return {rows_, which * w_.heads * w_.d + channel_, n_, w_.d}; }
  const float* inverse(int64_t which) const { return inverse_ + which * n_; }
  // f(queries, keys) as they enter the scores.
  template <class F>
  void queries_and_keys(const F& f) const {
    if (w_.logit_scale) {
      f(TokenRows<E>{unit_rows_, 0, n_, w_.d}, TokenRows<E>{unit_rows_ + n_, 0, n_, w_.d});
    } else {
      f(part(0), part(1));
    }
  }

 private:
  const Window& w_;
  int64_t n_, ld_, channel_ = 0;
  T* const* rows_ = nullptr;
  E** unit_rows_ = nullptr;
  float* inverse_ = nullptr;
};

template <class T>
inline void store_up_to(T* p, vf x, int64_t n) {
  if (n >= W) {
    store(p, x);
  } else {
    store_n(p, x, int(n));
  }
}

}  // namespace pyvit::PYVIT_ISA
