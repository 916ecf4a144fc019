// Shifted-window attention, backward: the probabilities of one (image, window, head) again from the log-sum-exp, and
// the five products of its gradients while everything is in cache.
//
// A real token is in exactly one window, so its gradient is written once. What several windows add to (bias table,
// logit scale, padding token) is summed per unit of work, units follow from the shapes alone, and their sums are added
// in order: the bits do not depend on the number of threads.
#include <tuple>

#include "window.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Queries whose probabilities are held at once, at the least where there are as many: their products are long enough to
// keep sums in registers, and all of it stays near.
constexpr int64_t BATCH = 48;

template <class D>
class Backward {
  using E = typename D::element;

 public:
  Backward(const Window& w, const Windows& g, Scratch& memory)
      : ahead(std::max(g.area, w.d), memory),
        d(w.d),
        n(g.area),
        ld(round_up(w.d, W)),
        g_(g),
        lda_(ld_of_rows<D>(w.d)),
        batch_(batch(g)),
        ldp_(batch_ + g.apart * W),
        cosine_(w.logit_scale) {
    queries_ = memory.take<uint32_t>(lanes_of<D>(d) * g.ld);
    grads_ = memory.take<uint32_t>(lanes_of<D>(d) * g.ld);
    keys_ = memory.take<uint32_t>(n * lda_);
    values_ = memory.take<uint32_t>(n * lda_);
    last_query_ = memory.take<uint32_t>(lda_);
    last_grad_ = memory.take<uint32_t>(lda_);
    query_pairs_ = memory.take<uint32_t>(lanes_of<D>(n) * ld);
    grad_pairs_ = memory.take<uint32_t>(lanes_of<D>(n) * ld);
    key_pairs_ = D::K == 1 ? keys_ : memory.take<uint32_t>(lanes_of<D>(n) * ld);
    s_ = memory.take<float>(n * ldp_);
    ds_ = memory.take<float>(n * ldp_);
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
  void pack(const Operands<D, T>& in, const Rows<T>& grad_out) {
    in.queries_and_keys([&](const auto& q, const auto& k) {
      pack_columns<D>(q, queries_, g_.ld, g_.apart, last_query_);
      pack_pairs<D>(q, query_pairs_);
      pack_rows<D>(k, keys_);
      if (D::K == 2) pack_pairs<D>(k, key_pairs_);
    });
    pack_rows<D>(in.part(2), values_);
    pack_columns<D>(grad_out, grads_, g_.ld, g_.apart, last_grad_);
    pack_pairs<D>(grad_out, grad_pairs_);
  }

  // lse2 (base 2, +inf where there is no query) holds round_up(n, W) values; grad_bias, a tile like the bias, is added
  // to, or null. put(0, 1 or 2, i, c, x) takes W channels of a row of dq, dk or dv; dq and dk lack the factor on the
  // scores.
  template <class Put>
  void run(const float* bias, float scale2, const float* lse2, float* grad_bias, const Put put) {
    const int64_t cols = g_.apart ? n - 1 : g_.ld;
    for (int64_t first = 0; first < cols; first += batch_) {
      const int64_t end = std::min(cols, first + batch_);
      for (int64_t i = first; i < end;)
        i += W * next_group((end - i) / W, [&](auto v) {
               probabilities<decltype(v)::value>(i, i - first, bias + i, scale2, lse2 + i,
                                                 grad_bias ? grad_bias + i : nullptr);
             });
      if (g_.apart && end == cols) last_query(end - first, bias + n * g_.ld, scale2, lse2[n - 1], grad_bias);
      products(first, end == cols ? n - first : end - first, put);
    }
  }

  Ahead ahead;
  const int64_t d, n, ld;

 private:
  // Queries in batches of about the same size, whole groups of vectors each.
  static int64_t batch(const Windows& g) {
    const int64_t vectors = (g.apart ? g.area - 1 : g.ld) / W, most = std::max<int64_t>(BATCH / W, widest_group(g));
    const int64_t batches = std::max<int64_t>(1, vectors / most), each = (vectors + batches - 1) / batches;
    return round_up(each, widest_group(g)) * W;
  }

  // P and dS = P (dP - delta) of V vectors of queries, from column `at` of the batch. delta = sum of P dP, and the sum
  // of P once more: what rounding left in the log-sum-exp, or in a 16-bit output, does not enter the gradients.
  template <int V>
  void probabilities(int64_t first, int64_t at, const float* bias, float scale2, const float* lse2, float* grad_bias) {
    float *const scores = s_ + at, *const grads = ds_ + at;
    const int64_t ldp = ldp_, ld_bias = g_.ld;
    product<D, V, false>(
        n, lanes_of<D>(d), keys_, lda_, queries_ + first, g_.ld,
        [=](int64_t j, int v, vf x) __attribute__((always_inline)) {
          x = x * scale2 + (load(bias + j * ld_bias + v * W) - load(lse2 + v * W));
          store(scores + j * ldp + v * W, x);
        },
        ahead);
    product<D, V, false>(
        n, lanes_of<D>(d), values_, lda_, grads_ + first, g_.ld,
        [=](int64_t j, int v, vf x) __attribute__((always_inline)) { store(grads + j * ldp + v * W, x); }, ahead);
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
  static vf inverse(vf sum) { return sum == 0.f ? vf{} : 1.f / sum; }

  // The query done apart becomes the column `at`.
  void last_query(int64_t at, const float* bias, float scale2, float lse2, float* grad_bias) {
    float *p = row_, *ds = row_ + g_.ld;
    dots<D>(keys_, n, lda_, last_query_, p);
    dots<D>(values_, n, lda_, last_grad_, ds);
    vf sum{}, delta{};
    for (int64_t j = 0; j < n; j += W) {
      const vf e = exp2v<D::K == 2>(load(p + j) * scale2 + (load(bias + j) - lse2));
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
        [=](int64_t i, int64_t c, vf x) __attribute__((always_inline)) { put(0, first + i, c, x); }, ahead);
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
        ahead);
  }

  const Windows& g_;
  int64_t lda_, batch_, ldp_;
  bool cosine_;
  uint32_t *queries_, *grads_, *keys_, *values_, *last_query_, *last_grad_, *query_pairs_, *grad_pairs_, *key_pairs_;
  uint32_t *p_rows_, *ds_rows_, *ds_pairs_;
  float *s_, *ds_, *row_, *sums_[2];
};

// Sums of every range of windows and every head: bias table; k and v of the padding token; logit scale.
struct Records {
  float *tables, *pads;  // or null
  double* logits;
  int64_t table, pad;  // sizes of one
};

template <class T>
class Worker {
  using D = Compute<T>;

 public:
  Worker(const Window& w, const Windows& g, const Shared<T>& shared, const WindowGrad& grad, const Units& units,
         const Records& records)
      : w_(w),
        g_(g),
        grad_(grad),
        shared_(shared),
        units_(units),
        records_(records),
        memory_(scratch()),
        sites_{{w, g, memory_}, {w, g, memory_}},
        operands_(w, g.area, memory_),
        gradients_(w, g, memory_),
        tile_((g.area + 1) * g.ld),
        tiles_(grad.grad_table ? memory_.take<float>(units.heads() * tile_ + W) : nullptr),
        shifted_(memory_.take<float>(w.ww * round_up(2 * w.ww - 1, W))),
        lse2_(memory_.take<float>(g.ld)),
        zeros_(memory_.take<T>(w.heads * w.d)),
        sink_(memory_.take<T>(3 * w.heads * w.d)) {
    for (float*& rows : rows_) rows = memory_.take<float>(g.area * gradients_.ld);
    std::fill(zeros_, zeros_ + w.heads * w.d, T{});
    std::fill(shifted_, shifted_ + w.ww * round_up(2 * w.ww - 1, W), 0.f);
  }

  void set(int at, int64_t index) {
    Site& site = sites_[at];
    const int64_t n = g_.area, channels = w_.heads * w_.d;
    site.place.set(index);
    site.place.rows(w_.qkv, shared_.padding(), site.qkv);
    site.place.rows(grad_.grad_out, zeros_, site.grad_out);
    site.place.rows(grad_.grad_qkv, sink_, site.result);
    site.lines.clear();
    for (int part = 0; part < 3; part++) site.lines.add(site.qkv, n, part * channels, w_.d);
    site.lines.add(site.grad_out, n, 0, w_.d);
    for (int part = 0; part < 3; part++) site.lines.add(site.result, n, part * channels, w_.d);
  }
  void fetch() { gradients_.ahead.clear(); }
  void fetch(int at, int64_t head) { gradients_.ahead.set(sites_[at].lines, head * w_.d * sizeof(T)); }

  void begin(int64_t unit) {
    first_head_ = units_.first_head(unit);
    record_ = units_.range(unit) * w_.heads;
    if (tiles_) std::fill(tiles_, tiles_ + units_.heads() * tile_, 0.f);
  }
  void head(int at, int64_t index, int64_t head) {
    const Site& site = sites_[at];
    const int64_t n = g_.area, d = w_.d, channels = w_.heads * d, record = record_ + head;
    operands_.set(site.qkv, head);
    gradients_.pack(operands_, Rows<T>{site.grad_out, head * d, n, d});
    const float* lse = w_.lse + (index * w_.heads + head) * n;
    for (int64_t i = 0; i < g_.ld; i += W) {
      const vf l = i + W <= n ? load(lse + i) : load_n(lse + i, int(n - i), -INF);
      store(lse2_ + i, l == set1(-INF) ? set1(INF) : l * LOG2E);
    }
    const float scale = float(shared_.scale(head));
    // Straight to the map, but where normalisation or the sums of padding tokens come in between.
    const bool straight = !w_.logit_scale && !records_.pads;
    T* const* rows = site.result;
    const int64_t ld = gradients_.ld;
    const auto store_part = [=](int part, int64_t i, int64_t c, vf x) __attribute__((always_inline)) {
      store_up_to(rows[i] + part * channels + head * d + c, x, d - c);
    };
    float* const buffers[3] = {rows_[0], rows_[1], rows_[2]};
    gradients_.run(site.place.bias(shared_.bias(head)), float(shared_.scale2(head)), lse2_,
                   tiles_ ? tiles_ + (head - first_head_) * tile_ : nullptr,
                   [=](int part, int64_t i, int64_t c, vf x) __attribute__((always_inline)) {
                     if (straight) {
                       store_part(part, i, c, part < 2 ? x * scale : x);
                     } else {
                       store(buffers[part] + i * ld + c, x);
                     }
                   });
    if (straight) return;
    if (w_.logit_scale) {
      records_.logits[record] += through_normalisation(0, rows_[0], scale);
      through_normalisation(1, rows_[1], scale);
    }
    for (int64_t i = 0; i < n; i++) {
      const bool padding = records_.pads && site.result[i] == sink_;
      for (int part = 0; part < 3; part++)
        for (int64_t c = 0; c < d; c += W) {
          const vf x = load(rows_[part] + i * ld + c) * (w_.logit_scale || part == 2 ? 1.f : scale);
          store_part(part, i, c, x);
          if (!padding || part == 0) continue;  // the output at a padding token is dropped: its q has no gradient
          float* sum = records_.pads + record * records_.pad + (part - 1) * ld + c;
          store(sum, load(sum) + x);
        }
    }
  }
  void end(int64_t) {
    for (int64_t h = 0; tiles_ && h < units_.heads(); h++)
      reduce_tile(tiles_ + h * tile_, records_.tables + (record_ + first_head_ + h) * records_.table);
  }

 private:
  struct Site {
    Site(const Window& w, const Windows& g, Scratch& memory)
        : place(w, g, memory),
          qkv(memory.take<T*>(g.area)),
          grad_out(memory.take<T*>(g.area)),
          result(memory.take<T*>(g.area)),
          lines(7 * g.area * Lines::per_row<T>(w.d), std::max(g.area, w.d), memory) {}
    Place place;
    T **qkv, **grad_out, **result;
    Lines lines;
  };

  // Rows g = d loss / d x^ become those of x, x^ = x / max(|x|, eps): (g - x^ (x^ . g)) / |x|. Returns the sum of x^ .
  // g.
  double through_normalisation(int64_t which, float* rows, float scale) {
    const Rows<T> in = operands_.part(which);
    double total = 0;
    for (int64_t i = 0; i < g_.area; i++) {
      const float inverse = operands_.inverse(which)[i];
      float* row = rows + i * gradients_.ld;
      const auto unit = [&](int64_t c) {
        return (w_.d - c >= W ? load(in[i] + c) : load_n(in[i] + c, int(w_.d - c))) * inverse;
      };
      vf sum{};
      for (int64_t c = 0; c < w_.d; c += W) sum += unit(c) * load(row + c);
      const float along = reduce_add(sum) * scale;
      total += along;
      const float back = inverse < 1e12f ? along : 0.f;  // a constant length has no gradient
      for (int64_t c = 0; c < w_.d; c += W) store(row + c, (load(row + c) * scale - unit(c) * back) * inverse);
    }
    return total;
  }

  // The tile's entries by their row of the table. Queries (y, x) of key (jy, jx) with the same dy = y - jy and jx are
  // summed first: neighbours in x, they go to neighbours of the table, a row of `shifted_` that is zero elsewhere.
  void reduce_tile(const float* tile, float* table) {
    const int64_t n = g_.area, wh = w_.wh, ww = w_.ww, width = 2 * ww - 1, ld = round_up(width, W);
    for (int64_t dy = 1 - wh; dy < wh; dy++) {
      for (int64_t jx = 0; jx < ww; jx++)
        for (int64_t x = 0; x < ww; x += W) {
          const int left = int(std::min<int64_t>(W, ww - x));
          vf sum{};
          for (int64_t jy = std::max<int64_t>(0, -dy); jy < std::min(wh, wh - dy); jy++)
            sum += load(tile + (jy * ww + jx) * g_.ld + (jy + dy) * ww + x);
          store_up_to(shifted_ + jx * ld + ww - 1 - jx + x, sum, left);
        }
      for (int64_t c = 0; c < width; c += W) {
        vf sum{};
        for (int64_t jx = 0; jx < ww; jx++) sum += load(shifted_ + jx * ld + c);
        float* to = table + (dy + wh - 1) * width + c;
        if (width - c >= W) {
          store(to, load(to) + sum);
        } else {
          store_n(to, load_n(to, int(width - c)) + sum, int(width - c));
        }
      }
    }
    if (!g_.apart) return;
    const float* last = tile + n * g_.ld;
    for (int64_t j = 0; j < n; j++) table[(wh - 1 - j / ww + wh - 1) * width + 2 * (ww - 1) - j % ww] += last[j];
  }

  const Window& w_;
  const Windows& g_;
  const WindowGrad& grad_;
  const Shared<T>& shared_;
  const Units& units_;
  const Records& records_;
  Scratch& memory_;
  Site sites_[2];
  Operands<D, T> operands_;
  Backward<D> gradients_;
  int64_t tile_;
  float *tiles_, *shifted_, *lse2_;
  T *zeros_, *sink_;
  float* rows_[3];                       // of dq, dk and dv, where they do not go straight to the map
  int64_t first_head_ = 0, record_ = 0;  // of the unit: its first head, and the record of head 0
};

template <class T>
void backward(const Window& w, const WindowGrad& grad) {
  const Windows g(w);
  const Shared<T> shared(w, g);
  const Units units(w, g, 128, true);
  const int64_t count = units.ranges() * w.heads, ldd = round_up(w.d, W);
  Records records{nullptr, nullptr, shared.template take<double>(count), (2 * w.wh - 1) * (2 * w.ww - 1), 2 * ldd};
  std::fill(records.logits, records.logits + count, 0.0);
  for (auto [wanted, sums, size] : {std::tuple{grad.grad_table, &records.tables, records.table},
                                    std::tuple{grad.grad_pad, &records.pads, records.pad}})
    if (wanted) {
      *sums = shared.template take<float>(count * size);
      std::fill(*sums, *sums + count * size, 0.f);
    }
  parallel_units(units.count(), [&](Queue& queue) {
    Worker<T> worker(w, g, shared, grad, units, records);
    walk(queue, units, worker);
  });
  for (int64_t record = 0; record < count; record++) {
    const int64_t h = record % w.heads;
    for (int64_t r = 0; records.tables && r < records.table; r++)
      grad.grad_table[r * w.heads + h] += records.tables[record * records.table + r];
    for (int64_t part = 1; records.pads && part < 3; part++)
      for (int64_t c = 0; c < w.d; c++)
        grad.grad_pad[(part * w.heads + h) * w.d + c] += records.pads[record * records.pad + (part - 1) * ldd + c];
  }
  for (int64_t h = 0; grad.grad_logit_scale && h < w.heads; h++) {
    double sum = 0;
    for (int64_t record = h; record < count; record += w.heads) sum += records.logits[record];
    grad.grad_logit_scale[h] = w.logit_scale[h] <= Shared<T>::LN100 ? float(sum) : 0.f;
  }
}

}  // namespace

void window_backward(const Window& w, const WindowGrad& g) {
  switch (w.dtype) {
    case Dtype::bf16:
      return backward<bf16>(w, g);
    case Dtype::f16:
      return backward<f16>(w, g);
    default:
      return backward<float>(w, g);
  }
}

}  // namespace pyvit::PYVIT_ISA
