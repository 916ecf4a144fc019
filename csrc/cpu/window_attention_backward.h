// The gradients of one (image, window, head): the probabilities again from the log-sum-exp, and five products while
// everything is in cache. Rows of the results go to the caller as they are ready.
#pragma once

#include "window_attention.h"

namespace pyvit::PYVIT_ISA {

// Queries whose probabilities are held at once, at the least where there are as many: their products are long enough to
// keep sums in registers, and all of it stays near.
constexpr int64_t BATCH = 48;

template <class D>
class WindowGradients {
  using E = typename D::element;

 public:
  WindowGradients(const Window& w, const Windows& g, Scratch& memory)
      : next(std::max(g.area, w.d), memory),
        d(w.d),
        n(g.area),
        ld(round_up(w.d, W)),
        g_(g),
        lda_(ld_of_rows<D>(w.d)),
        batch_(batch(g)),
        ldp_(batch_ + g.remainder * W),
        cosine_(w.logit_scale) {
    queries_ = memory.take<uint32_t>(lanes_of<D>(d) * g.ld);  // (lanes of d, ld): a query in a column
    grads_ = memory.take<uint32_t>(lanes_of<D>(d) * g.ld);    // dO, likewise
    keys_ = memory.take<uint32_t>(n * lda_);                  // (n, lda)
    values_ = memory.take<uint32_t>(n * lda_);                // (n, lda)
    last_query_ = memory.take<uint32_t>(lda_);
    last_grad_ = memory.take<uint32_t>(lda_);
    query_pairs_ = memory.take<uint32_t>(lanes_of<D>(n) * ld);  // (lanes of n, ld)
    grad_pairs_ = memory.take<uint32_t>(lanes_of<D>(n) * ld);
    key_pairs_ = D::K == 1 ? keys_ : memory.take<uint32_t>(lanes_of<D>(n) * ld);
    s_ = memory.take<float>(n * ldp_);   // scores, then P: (n, ldp), a query of the batch in a column
    ds_ = memory.take<float>(n * ldp_);  // dP, then dS
    row_ = memory.take<float>(2 * g.ld);
    if (D::K == 2) {
      p_rows_ = memory.take<uint32_t>(n * ldp_ / 2);
      ds_rows_ = memory.take<uint32_t>(n * ldp_ / 2);
      ds_pairs_ = memory.take<uint32_t>(lanes_of<D>(n) * ldp_);
    } else {
      p_rows_ = reinterpret_cast<uint32_t*>(s_);
      ds_rows_ = ds_pairs_ = reinterpret_cast<uint32_t*>(ds_);
    }
    for (float*& rows : sums_) rows = memory.take<float>(n * ld);
  }

  template <class T>
  void pack(const Operands<D, T>& in, const TokenRows<T>& grad_out) {
    in.queries_and_keys([&](const auto& q, const auto& k) {
      pack_columns<D>(q, queries_, g_.ld, g_.remainder, last_query_);
      pack_pairs<D>(q, query_pairs_);
      pack_rows<D>(k, keys_);
      if (D::K == 2) pack_pairs<D>(k, key_pairs_);
    });
    pack_rows<D>(in.part(2), values_);
    pack_columns<D>(grad_out, grads_, g_.ld, g_.remainder, last_grad_);
    pack_pairs<D>(grad_out, grad_pairs_);
  }

  // lse2 (base 2, +inf where there is no query) holds round_up(n, W) values; grad_bias, a tile like the bias, is added
  // to, or null. put(0, 1 or 2, i, c, x) takes W channels of a row of dq, dk or dv; dq and dk lack the factor on the
  // scores.
  template <class Put>
  void run(const float* bias, float scale, float scale2, const float* lse2, float* grad_bias, const Put put) {
    const int64_t cols = g_.remainder ? n - 1 : g_.ld;
    for (int64_t first = 0; first < cols; first += batch_) {
      const int64_t end = std::min(cols, first + batch_);
      for (int64_t i = first; i < end;)
        i += W * next_group((end - i) / W, [&](auto v) {
               constexpr int V = decltype(v)::value;
               if (any_large(lse2 + i, V * W)) {
                 scores_less_largest<V>(i, i - first, bias + i, scale);
               } else {
                 scores<V>(i, i - first, bias + i, scale2, lse2 + i);
               }
               probabilities<V>(i, i - first, grad_bias ? grad_bias + i : nullptr);
             });
      if (g_.remainder && end == cols) last_query(end - first, bias + n * g_.ld, scale, grad_bias);
      products(first, end == cols ? n - first : end - first, put);
    }
  }

  PrefetchList next;
  const int64_t d, n, ld;

 private:
  // Queries in batches of about the same size, whole groups of vectors each.
  static int64_t batch(const Windows& g) {
    const int64_t vectors = (g.remainder ? g.area - 1 : g.ld) / W, most = std::max<int64_t>(BATCH / W, widest_group(g));
    const int64_t batches = std::max<int64_t>(1, vectors / most), each = (vectors + batches - 1) / batches;
    return round_up(each, widest_group(g)) * W;
  }

  // Whether some log-sum-exp is so large that the sum of the powers it stands for may not be a float.
  static bool any_large(const float* lse2, int64_t count) {
    bool found = false;
    for (int64_t i = 0; i < count; i++) found |= std::fabs(lse2[i]) > 0x1p10f && lse2[i] != INF;
    return found;
  }

  // Scores of V vectors of queries in powers of two, less lse2, to column `at` of the batch.
  template <int V>
  void scores(int64_t first, int64_t at, const float* bias, float scale2, const float* lse2) {
    float* const out = s_ + at;
    const int64_t ldp = ldp_, ld_bias = g_.ld;
    product<D, V, false>(
        n, lanes_of<D>(d), keys_, lda_, queries_ + first, g_.ld,
        [=](int64_t j, int v, vf x) __attribute__((always_inline)) {
          const vf b = load(bias + j * ld_bias + v * W);
          store(out + j * ldp + v * W, x * scale2 + (b * LOG2E - load(lse2 + v * W)));
        },
        next);
  }

  // The same where lse2 is large: less the largest score, which is found again.
  template <int V>
  __attribute__((noinline)) void scores_less_largest(int64_t first, int64_t at, const float* bias, float scale) {
    float* const out = s_ + at;
    keys_times<V>(keys_, queries_ + first, out);
    vf top[V];
    for (int v = 0; v < V; v++) top[v] = set1(LEAST);
    for (int64_t j = 0; j < n; j++)
      for (int v = 0; v < V; v++) {
        const vf x = load(out + j * ldp_ + v * W) * scale + load(bias + j * g_.ld + v * W);
        top[v] = vmax(top[v], x);
        store(out + j * ldp_ + v * W, x);
      }
    for (int64_t j = 0; j < n; j++)
      for (int v = 0; v < V; v++) {
        float* s = out + j * ldp_ + v * W;
        store(s, (load(s) - top[v]) * LOG2E);
      }
  }

  // P and dS = P (dP - delta) of V vectors of queries, from their scores in column `at` of the batch. delta = sum of
  // P dP, and the sum of P once more: what rounding left in the log-sum-exp, or in a 16-bit output, does not enter the
  // gradients.
  template <int V>
  void probabilities(int64_t first, int64_t at, float* grad_bias) {
    float *const scores = s_ + at, *const grads = ds_ + at;
    keys_times<V>(values_, grads_ + first, grads);
    vf sum[V], delta[V];
    for (int v = 0; v < V; v++) sum[v] = delta[v] = vf{};
    for (int64_t j = 0; j < n; j++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        float* s = scores + j * ldp_ + v * W;
        const vf e = exp2v<D::K == 2>(load(s));
        sum[v] += e;
        delta[v] += e * load(grads + j * ldp_ + v * W);
        store(s, e);
      }
    for (int v = 0; v < V; v++) {
      sum[v] = inverse(sum[v]);
      delta[v] *= sum[v];
    }
    if (cosine_) {  // the gradient of a temperature sums dS times the scores, where a rounded delta would show: refine
                    // it
      vf rest[V];
      for (int v = 0; v < V; v++) rest[v] = vf{};
      for (int64_t j = 0; j < n; j++)
        for (int v = 0; v < V; v++)
          rest[v] += load(scores + j * ldp_ + v * W) * (load(grads + j * ldp_ + v * W) - delta[v]);
      for (int v = 0; v < V; v++) delta[v] += rest[v] * sum[v];
    }
    for (int64_t j = 0; j < n; j += D::K)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        vf p[2], ds[2] = {};
        for (int k = 0; k < D::K && j + k < n; k++) {
          const int64_t to = (j + k) * ldp_ + v * W;
          p[k] = load(scores + to) * sum[v];
          ds[k] = p[k] * (load(grads + to) - delta[v]);
          if (grad_bias) {
            float* total = grad_bias + (j + k) * g_.ld + v * W;
            store(total, load(total) + ds[k]);
          }
          store(reinterpret_cast<E*>(p_rows_) + at + to, p[k]);
          store(reinterpret_cast<E*>(ds_rows_) + at + to, ds[k]);
        }
        if constexpr (D::K == 2) store_as(ds_pairs_ + j / 2 * ldp_ + at + v * W, pair_lanes(ds[0], ds[1]));
      }
  }
  // out (n, V vectors) = rows of keys or values times columns of queries or gradients.
  template <int V>
  void keys_times(const uint32_t* rows, const uint32_t* columns, float* out) {
    product<D, V, false>(
        n, lanes_of<D>(d), rows, lda_, columns, g_.ld,
        [=, ldp = ldp_](int64_t j, int v, vf x) __attribute__((always_inline)) { store(out + j * ldp + v * W, x); },
        next);
  }
  static vf inverse(vf sum) { return sum == 0.f ? vf{} : 1.f / sum; }

  // The remainder query becomes the column `at`.
  void last_query(int64_t at, const float* bias, float scale, float* grad_bias) {
    float *p = row_, *ds = row_ + g_.ld;
    dots<D>(keys_, n, lda_, last_query_, p);
    dots<D>(values_, n, lda_, last_grad_, ds);
    vf sum{}, delta{}, top = set1(LEAST);
    for (int64_t j = 0; j < n; j += W) {
      const vf x = load(p + j) * scale + load(bias + j);
      store(p + j, x);
      top = vmax(top, x);
    }
    const float most = reduce_max(top);
    for (int64_t j = 0; j < n; j += W) {
      const vf e = exp2v<D::K == 2>((load(p + j) - most) * LOG2E);
      sum += e;
      delta += e * load(ds + j);
      store(p + j, e);
    }
    const float factor = reduce_add(sum) == 0 ? 0.f : 1.f / reduce_add(sum), rough = reduce_add(delta) * factor;
    vf rest{};
    for (int64_t j = 0; j < n; j += W) rest += load(p + j) * (load(ds + j) - rough);
    const float mean = rough + reduce_add(rest) * factor;
    for (int64_t j = 0; j < n; j += W) {
      const vf e = load(p + j) * factor, x = e * (load(ds + j) - mean);
      store(p + j, e);
      store(ds + j, x);
      if (grad_bias) store(grad_bias + n * g_.ld + j, load(grad_bias + n * g_.ld + j) + x);
    }
    E *p_rows = reinterpret_cast<E*>(p_rows_) + at, *ds_rows = reinterpret_cast<E*>(ds_rows_) + at;
    for (int64_t j = 0; j < n; j++) {
      p_rows[j * ldp_] = from_float<E>(p[j]);
      ds_rows[j * ldp_] = from_float<E>(ds[j]);
      if constexpr (D::K == 2) {  // the second of a pair of queries does not exist
        p_rows[j * ldp_ + 1] = ds_rows[j * ldp_ + 1] = E{};
        if (j % 2 == 0) ds_pairs_[j / 2 * ldp_ + at] = as_lane(from_float<E>(ds[j]), from_float<E>(ds[j + 1]));
      }
    }
  }

  // What `count` queries from `first` on give to dq, and add to dk and dv.
  template <class Put>
  void products(int64_t first, int64_t count, const Put put) {
    product_then<D, true>(
        count, d, lanes_of<D>(n), ds_pairs_, ldp_, key_pairs_, ld,
        [=](int64_t i, int64_t c, vf x) __attribute__((always_inline)) { put(0, first + i, c, x); }, next);
    add(2, p_rows_, grad_pairs_ + first / D::K * ld, first, count, put);
    add(1, ds_rows_, query_pairs_ + first / D::K * ld, first, count, put);
  }
  template <class Put>
  void add(int part, const uint32_t* a, const uint32_t* b, int64_t first, int64_t count, const Put put) {
    float* const sums = sums_[part - 1];
    const int64_t ld_sums = ld;
    const bool last = first + count == n;
    product_then<D, false>(
        n, d, lanes_of<D>(count), a, ldp_ / D::K, b, ld,
        [=](int64_t j, int64_t c, vf x) __attribute__((always_inline)) {
          float* sum = sums + j * ld_sums + c;
          if (first) x += load(sum);
          if (last) {
            put(part, j, c, x);
          } else {
            store(sum, x);
          }
        },
        next);
  }

  const Windows& g_;
  int64_t lda_, batch_, ldp_;
  bool cosine_;
  uint32_t *queries_, *grads_, *keys_, *values_, *last_query_, *last_grad_, *query_pairs_, *grad_pairs_, *key_pairs_;
  uint32_t *p_rows_, *ds_rows_, *ds_pairs_;
  float *s_, *ds_, *row_, *sums_[2];
};

}  // namespace pyvit::PYVIT_ISA
