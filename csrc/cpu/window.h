// What forward and backward of window attention share: where the tokens of a window lie, packing through pointers to
// rows, products with an epilogue, the bias as a tile per head.
//
// Scores are held transposed, keys as rows and queries as columns: maximum and sum of the softmax run down the columns,
// one query per vector lane, and no window size needs a horizontal reduction. A window of W k + 1 tokens (7 x 7) would
// waste a vector on its last query, so that one is done apart, by dot products.
#pragma once

#include "gemm_tile.h"
#include "kernels.h"

namespace pyvit::PYVIT_ISA {

// Geometry

struct Windows {
  explicit Windows(const Window& w)
      : rows((w.height + w.wh - 1) / w.wh),
        cols((w.width + w.ww - 1) / w.ww),
        sy(rows > 1 ? w.sy : 0),
        sx(cols > 1 ? w.sx : 0),
        area(w.wh * w.ww),
        ld(round_up(area, W)),
        apart(area % W == 1 && area > W) {}

  int64_t per_image() const { return rows * cols; }

  int64_t rows, cols, sy, sx;  // windows of a map; the shift in force
  int64_t area, ld;
  bool apart;  // the last query is done by itself
};

// One window of one image: coordinates of its rows and columns, -1 in the padding, and the regions they belong to.
class Place {
 public:
  Place(const Window& w, const Windows& windows, Scratch& memory)
      : w_(w),
        g_(windows),
        y_(memory.take<int64_t>(w.wh)),
        x_(memory.take<int64_t>(w.ww)),
        ids_(memory.take<float>(2 * windows.ld)),
        masked_(memory.take<float>((windows.area + 1) * windows.ld)) {
    std::fill(ids_, ids_ + 2 * windows.ld, -2.f);
  }

  void set(int64_t index) {
    image_ = index / g_.per_image();
    index %= g_.per_image();
    const bool seam_y = axis(index / g_.cols, g_.rows, w_.wh, w_.height, g_.sy, y_);
    const bool seam_x = axis(index % g_.cols, g_.cols, w_.ww, w_.width, g_.sx, x_);
    const bool padded = std::count(y_, y_ + w_.wh, -1) || std::count(x_, x_ + w_.ww, -1);
    mixed_ = seam_y || seam_x || (padded && !w_.pad);
    if (!mixed_) return;
    for (int64_t t = 0; t < g_.area; t++) {
      const int64_t ty = t / w_.ww, tx = t % w_.ww;
      const bool real = y_[ty] >= 0 && x_[tx] >= 0;
      const int region = 2 * (seam_y && ty >= w_.wh - g_.sy) + (seam_x && tx >= w_.ww - g_.sx);
      query_ids()[t] = float(region);
      key_ids()[t] = real || w_.pad ? float(region) : -1.f;
    }
  }

  // Pointers to the channels of every token; `padding` stands for those outside the map.
  template <class T>
  void rows(const Map& map, T* padding, T** out) const {
    T* base = static_cast<T*>(map.data) + image_ * map.b;
    for (int64_t ty = 0; ty < w_.wh; ty++)
      for (int64_t tx = 0; tx < w_.ww; tx++)
        *out++ = y_[ty] < 0 || x_[tx] < 0 ? padding : base + y_[ty] * map.y + x_[tx] * map.x;
  }

  // The head's bias, with -inf where a query may not attend to a key.
  const float* bias(const float* tile) const {
    if (!mixed_) return tile;
    const int64_t n = g_.area, ld = g_.ld;
    for (int64_t j = 0; j < n; j++) select(tile + j * ld, query_ids(), key_ids()[j], masked_ + j * ld);
    if (g_.apart) select(tile + n * ld, key_ids(), query_ids()[n - 1], masked_ + n * ld);
    return masked_;
  }

 private:
  // Tokens of window `at` of `count` along one axis of `size` tokens; returns whether the seam of the shift crosses it.
  static bool axis(int64_t at, int64_t count, int64_t window, int64_t size, int64_t shift, int64_t* out) {
    const int64_t whole = count * window;
    for (int64_t i = 0; i < window; i++) {
      int64_t token = at * window + i + shift;
      if (token >= whole) token -= whole;
      out[i] = token < size ? token : -1;
    }
    return shift && at == count - 1;
  }
  float* query_ids() const { return ids_; }
  float* key_ids() const { return ids_ + g_.ld; }
  void select(const float* bias, const float* ids, float id, float* out) const {
    for (int64_t c = 0; c < g_.ld; c += W) store(out + c, load(ids + c) == set1(id) ? load(bias + c) : set1(-INF));
  }

  const Window& w_;
  const Windows& g_;
  int64_t *y_, *x_;
  float *ids_, *masked_;
  int64_t image_ = 0;
  bool mixed_ = false;
};

// What a call prepares once: the bias of every head in units of log2, expanded to (keys, queries), for the query done
// apart one more row over the keys; the padding token; the factors on the scores.
template <class T>
class Shared {
 public:
  Shared(const Window& w, const Windows& g) : w_(w), g_(g), stride_((g.area + 1) * g.ld) {
    static thread_local Scratch memory;  // lives through the call, as the scratch memory of a thread does not
    memory.reset();
    const int64_t heads = w.table ? w.heads : 1, rows = (2 * w.wh - 1) * (2 * w.ww - 1);
    bias_ = memory.take<float>(heads * stride_ + W);
    pad_ = memory.take<T>(3 * w.heads * w.d);
    for (int64_t c = 0; c < 3 * w.heads * w.d; c++) pad_[c] = from_float<T>(w.pad ? w.pad[c] : 0.f);
    float* column = memory.take<float>(rows + W);
    std::fill(column, column + rows + W, 0.f);
    for (int64_t h = 0; h < heads; h++) {
      if (w.table)
        for (int64_t r = 0; r < rows; r++) column[r] = w.table[r * w.heads + h] * LOG2E;
      expand(column, bias_ + h * stride_);
    }
    memory_ = &memory;
  }

  const float* bias(int64_t head) const { return bias_ + (w_.table ? head * stride_ : 0); }
  T* padding() const { return pad_; }
  // The factor on the products of queries and keys; in units of log2.
  double scale(int64_t head) const {
    return w_.logit_scale ? std::exp(double(std::min(w_.logit_scale[head], LN100))) : w_.scale;
  }
  double scale2(int64_t head) const { return scale(head) * 1.4426950408889634; }

  // More memory that every thread may use until the call ends.
  template <class U>
  U* take(int64_t n) const {
    return memory_->take<U>(n);
  }

  static constexpr float LN100 = 4.605170185988092f;

 private:
  // Queries of one window row are neighbours in the table. Whole vectors are written: what goes too far is overwritten.
  void expand(const float* column, float* tile) const {
    for (int64_t j = 0; j < g_.area; j++) {
      float* row = tile + j * g_.ld;
      for (int64_t y = 0; y < w_.wh; y++) {
        const float* from = column + (y - j / w_.ww + w_.wh - 1) * (2 * w_.ww - 1) - j % w_.ww + w_.ww - 1;
        for (int64_t x = 0; x < w_.ww; x += W) store(row + y * w_.ww + x, load(from + x));
      }
      std::fill(row + g_.area, row + g_.ld, 0.f);
    }
    if (!g_.apart) return;
    float* last = tile + g_.area * g_.ld;  // query n - 1 less key j is key n - 1 - j less query 0, mirrored
    for (int64_t j = 0; j < g_.area; j++) last[j] = tile[g_.area - 1 - j];
    std::fill(last + g_.area, last + g_.ld, -INF);
  }

  const Window& w_;
  const Windows& g_;
  int64_t stride_;
  float* bias_;
  T* pad_;
  Scratch* memory_;
};

// Packing. Row i of an operand is rows[i] + at, d channels.

template <class T>
struct Rows {
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
inline void pack_rows(const Rows<T>& in, uint32_t* out) {
  const int64_t ld = ld_of_rows<D>(in.d);
  for (int64_t i = 0; i < in.n; i++)
    for (int64_t l = 0; l < ld; l += W) store_as(out + i * ld + l, lanes_along<D>(in[i] + l * D::K, in.d - l * D::K));
}

// Channels as rows of lanes, tokens as columns, zero-padded to whole vectors; with
// `apart` the last token becomes the row `last` instead.
template <class D, class T>
inline void pack_columns(const Rows<T>& in, uint32_t* out, int64_t ld, bool apart, uint32_t* last) {
  const int64_t lanes = lanes_of<D>(in.d), n = apart ? in.n - 1 : in.n;
  if (apart) pack_rows<D>(Rows<T>{in.rows + n, in.at, 1, in.d}, last);
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
inline void pack_pairs(const Rows<T>& in, uint32_t* out) {
  if constexpr (D::K == 1) {
    pack_rows<D>(in, out);
  } else {
    for (int64_t i = 0; i < in.n; i += 2)
      for (int64_t c = 0; c < in.d; c += W, out += W) {
        const int64_t bytes = 2 * std::min<int64_t>(W, in.d - c);
        vh low{}, high{};
        std::memcpy(&low, in[i] + c, bytes);
        if (i + 1 < in.n) std::memcpy(&high, in[i + 1] + c, bytes);
        store_as(out, __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16);
      }
  }
}

// Two rows of values as lanes of pairs, low first.
inline vu pair_lanes(vf low, vf high) {
#if defined(__AVX512BF16__)
  static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (vu)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
#else
  bf16 a[W], b[W];
  store(a, low);
  store(b, high);
  return __builtin_convertvector(load_as<vh>(a), vu) | __builtin_convertvector(load_as<vh>(b), vu) << 16;
#endif
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

// f(v) with the number of vectors of the next group of columns as a constant; returns it.
template <class F>
inline int64_t next_group(int64_t left, const F& f) {
  const int64_t v = left <= WIDEST ? left : WIDEST == 4 && left % 4 ? 3 : WIDEST;
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

// M rows, V vectors of columns of A B; lane k of row m of A is a[m * lda + k], or a[m + k * lda] if it lies in COLUMNS.
// done(m, v, sums).
template <class D, int M, int V, bool COLUMNS, class Done>
inline void tile_then(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t lanes, const Done& done) {
  vf acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[m][v] = vf{};
  for (int64_t k = 0; k < lanes; k++) {
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
                    const Done& done, int64_t row = 0) {
  for (; row + M <= rows; row += M)
    tile_then<D, M, V, COLUMNS>(a + (COLUMNS ? row : row * lda), lda, b, ldb, lanes,
                                [&](int m, int v, vf x) __attribute__((always_inline)) { done(row + m, v, x); });
  if constexpr (M > 1)
    if (row < rows) product<D, V, COLUMNS, (M > 4 ? 4 : M / 2)>(rows, lanes, a, lda, b, ldb, done, row);
}

// All columns: done(row, column, sums).
template <class D, bool COLUMNS, class Done>
inline void product_then(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t lda, const uint32_t* b,
                         int64_t ldb, const Done& done) {
  for (int64_t c = 0; c < cols;)
    c += W * next_group((cols - c + W - 1) / W, [&](auto v) {
           product<D, decltype(v)::value, COLUMNS>(rows, lanes, a, lda, b + c, ldb,
                                                   [&](int64_t row, int u, vf x)
                                                       __attribute__((always_inline)) { done(row, c + u * W, x); });
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
inline void normalise(const Rows<T>& in, E* out, float* inverse) {
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
  Operands(const Window& w, int64_t n, Scratch& memory)
      : w_(w), n_(n), ld_(round_up(w.d, W)), rows_(memory.take<T*>(n)) {
    if (!w.logit_scale) return;
    inverse_ = memory.take<float>(2 * n);
    unit_rows_ = memory.take<E*>(2 * n);
    E* unit = memory.take<E>(2 * n * ld_);
    for (int64_t i = 0; i < 2 * n; i++) unit_rows_[i] = unit + i * ld_;
  }
  void set(const Place& place, T* padding, int64_t head) {
    place.rows(w_.qkv, padding, rows_);
    channel_ = head * w_.d;
    if (!w_.logit_scale) return;
    normalise(part(0), unit_rows_[0], inverse_);
    normalise(part(1), unit_rows_[n_], inverse_ + n_);
  }
  // 0, 1, 2: q, k, v.
  Rows<T> part(int64_t which) const { return {rows_, which * w_.heads * w_.d + channel_, n_, w_.d}; }
  const float* inverse(int64_t which) const { return inverse_ + which * n_; }
  // f(queries, keys) as they enter the scores.
  template <class F>
  void queries_and_keys(const F& f) const {
    if (w_.logit_scale) {
      f(Rows<E>{unit_rows_, 0, n_, w_.d}, Rows<E>{unit_rows_ + n_, 0, n_, w_.d});
    } else {
      f(part(0), part(1));
    }
  }

 private:
  const Window& w_;
  int64_t n_, ld_, channel_ = 0;
  T** rows_;
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

// log2 of positive normal numbers: 2 atanh((m - 1) / (m + 1)) / ln 2 for the mantissa m in [sqrt(1/2), sqrt(2)).
inline vf log2v(vf x) {
  const vi e = (vi)((vu)x - 0x3f3504f3u) >> 23;
  const vf m = (vf)((vi)x - (e << 23));
  const vf t = (m - 1.f) / (m + 1.f), u = t * t;
  vf p = set1(2.f / 9.f * LOG2E);
  p = p * u + 2.f / 7.f * LOG2E;
  p = p * u + 2.f / 5.f * LOG2E;
  p = p * u + 2.f / 3.f * LOG2E;
  p = p * u + 2.f * LOG2E;
  return t * p + __builtin_convertvector(e, vf);
}

// Windows per unit of work, so that there are units enough for many cores, and the same for any number of them.
inline int64_t windows_per_unit(const Window& w, const Windows& g) {
  return std::max<int64_t>(1, w.batch * g.per_image() * w.heads / 256);
}

}  // namespace pyvit::PYVIT_ISA
