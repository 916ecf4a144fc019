// Shifted-window attention, forward: one (image, window, head) at a time, straight from and to the map.
#include "window_attention.h"

namespace pyvit::PYVIT_ISA {
namespace {

// The packed operands of one head in one window, and their attention.
template <class D>
class Forward {
  using E = typename D::element;

 public:
  Forward(const Window& w, const Windows& g, Scratch& memory)
      : next(std::max(g.area, w.d), memory),
        d(w.d),
        n(g.area),
        g_(g),
        ldk_(ld_of_rows<D>(d)),
        ldv_(round_up(d, W)),
        queries_(memory.take<uint32_t>(lanes_of<D>(d) * g.ld)),  // (lanes of d, ld), a query in a column
        keys_(memory.take<uint32_t>(n * ldk_)),                  // (n, ldk)
        values_(memory.take<uint32_t>(lanes_of<D>(n) * ldv_)),   // (lanes of n, ldv)
        last_(memory.take<uint32_t>(ldk_)),                      // the remainder query
        scores_(memory.take<float>(n * WIDEST * W)),             // (n, queries taken together)
        row_(memory.take<float>(g.ld)) {}                        // of the remainder query

  template <class T>
  void pack(const Operands<D, T>& in) {
    in.queries_and_keys([&](const auto& q, const auto& k) {
      pack_columns<D>(q, queries_, g_.ld, g_.remainder, last_);
      pack_rows<D>(k, keys_);
    });
    pack_pairs<D>(in.part(2), values_);
  }

  // out: pointers to the rows of the result.
  void run(const float* bias, double scale, float* lse, float* const* out) {
    const int64_t cols = g_.remainder ? n - 1 : g_.ld;
    for (int64_t i = 0; i < cols;)
      i += W * next_group((cols - i) / W,
                          [&](auto v) { queries<decltype(v)::value>(i, bias + i, scale, lse + i, out + i); });
    if (g_.remainder) last_query(bias + n * g_.ld, scale, lse + n - 1, out[n - 1]);
  }

  PrefetchList next;

 private:
  // In two floats: the error of one would shift every score of a row by as much as the largest is rounded.
  static std::pair<float, float> split(double x) { return {float(x), float(x - float(x))}; }

  // V vectors of queries from `first` on: all their scores, in L1, then softmax, then the output.
  template <int V>
  void queries(int64_t first, const float* bias, double factor, float* lse, float* const* out) {
    constexpr int64_t ld = V * W;
    const int64_t count = std::min(ld, n - first);
    const std::pair<float, float> scale = split(factor);
    float* const scores = scores_;
    const int64_t ld_bias = g_.ld;
    vf top[V], sum[V];
    for (int v = 0; v < V; v++) top[v] = set1(LEAST), sum[v] = vf{};  // finite, so that a row without keys sums to zero
    product<D, V, false>(
        n, lanes_of<D>(d), keys_, ldk_, queries_ + first, g_.ld,
        [=, highest = top](int64_t j, int v, vf x) __attribute__((always_inline)) {
          x = x * scale.first + (x * scale.second + load(bias + j * ld_bias + v * W));
          store(scores + j * ld + v * W, x);
          highest[v] = vmax(highest[v], x);
        },
        next);
    uint32_t* p = reinterpret_cast<uint32_t*>(scores_);
    for (int64_t j = 0; j < n; j += D::K)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const float* s = scores_ + j * ld + v * W;
        const vf e = exp2v<D::K == 2>((load(s) - top[v]) * LOG2E);
        sum[v] += e;
        if constexpr (D::K == 1) {
          store_as(p + j * ld + v * W, e);
        } else {
          const vf next = j + 1 < n ? exp2v<true>((load(s + ld) - top[v]) * LOG2E) : vf{};
          sum[v] += next;
          store_as(p + j / 2 * ld + v * W, pair_lanes(e, next));
        }
      }
    float inverse[V * W];
    for (int v = 0; v < V; v++) {
      store(inverse + v * W, sum[v] == 0.f ? vf{} : 1.f / sum[v]);
      const vf l = sum[v] == 0.f ? set1(-INF) : top[v] + log2v(sum[v]) * LN2;
      if (count > v * W) store_up_to(lse + v * W, l, count - v * W);
    }
    product_then<D, true>(
        count, d, lanes_of<D>(n), p, ld, values_, ldv_,
        [=, width = d, factor = inverse](int64_t i, int64_t c, vf x)
            __attribute__((always_inline)) { store_up_to(out[i] + c, x * factor[i], width - c); },
        next);
  }

  void last_query(const float* bias, double factor, float* lse, float* out) {
    const std::pair<float, float> scale = split(factor);
    dots<D>(keys_, n, ldk_, last_, row_);
    vf top = set1(LEAST), sum{};
    for (int64_t j = 0; j < n; j += W) {
      const vf x = load(row_ + j) * scale.first + (load(row_ + j) * scale.second + load(bias + j));
      store(row_ + j, x);
      top = vmax(top, x);
    }
    const float most = reduce_max(top);
    E* p = reinterpret_cast<E*>(row_);
    for (int64_t j = 0; j < n; j += W) {
      const vf e = exp2v<D::K == 2>((load(row_ + j) - most) * LOG2E);
      sum += e;
      store(p + j, e);
    }
    const float total = reduce_add(sum), inverse = total == 0 ? 0.f : 1.f / total;
    *lse = total == 0 ? -INF : most + std::log2(total) * LN2;
    product_then<D, false, 1>(
        1, d, lanes_of<D>(n), reinterpret_cast<uint32_t*>(row_), 0, values_, ldv_,
        [=, width = d](int64_t, int64_t c, vf x)
            __attribute__((always_inline)) { store_up_to(out + c, x * inverse, width - c); },
        next);
  }

  const int64_t d, n;
  const Windows& g_;
  int64_t ldk_, ldv_;
  uint32_t *queries_, *keys_, *values_, *last_;
  float *scores_, *row_;
};

// float32 results go straight to the map, others through a buffer.
template <class T>
class Worker {
  using D = Compute<T>;

 public:
  Worker(const Window& w, const Windows& g, const Shared<T>& shared)
      : w_(w),
        n_(g.area),
        ld_(round_up(w.d, W)),
        shared_(shared),
        memory_(scratch()),
        sites_{{w, g, memory_}, {w, g, memory_}},
        operands_(w, n_, memory_),
        attention_(w, g, memory_),
        sink_(memory_.take<T>(w.heads * w.d)),
        results_(memory_.take<float*>(n_)),
        buffer_(memory_.take<float>(n_ * ld_)) {
    for (int64_t i = 0; i < n_; i++) results_[i] = buffer_ + i * ld_;
  }
  void set(int at, int64_t index) {
    Site& site = sites_[at];
    site.tokens.set(index);
    site.tokens.rows(w_.qkv, shared_.padding(), site.qkv);
    site.tokens.rows(w_.out, sink_, site.out);
    site.lines.clear();
    for (int part = 0; part < 3; part++) site.lines.add(site.qkv, n_, part * w_.heads * w_.d, w_.d);
    site.lines.add(site.out, n_, 0, w_.d);
  }
  void fetch() { attention_.next.clear(); }
  void fetch(int at, int64_t head) { attention_.next.set(sites_[at].lines, head * w_.d * sizeof(T)); }
  void begin(int64_t) {}
  void end(int64_t) {}
  void head(int at, int64_t index, int64_t head) {
    const Site& site = sites_[at];
    operands_.set(site.qkv, head);
    attention_.pack(operands_);
    if constexpr (std::is_same_v<T, float>)
      for (int64_t i = 0; i < n_; i++) results_[i] = site.out[i] + head * w_.d;
    attention_.run(site.tokens.bias(shared_.bias(head)), shared_.scale(head), w_.lse + (index * w_.heads + head) * n_,
                   results_);
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t i = 0; i < n_; i++)
        for (int64_t c = 0; c < w_.d; c += W)
          store_up_to(site.out[i] + head * w_.d + c, load(results_[i] + c), w_.d - c);
  }

 private:
  struct Site {
    Site(const Window& w, const Windows& g, Scratch& memory)
        : tokens(w, g, memory),
          qkv(memory.take<T*>(g.area)),
          out(memory.take<T*>(g.area)),
          lines(4 * g.area * LineList::per_row<T>(w.d), std::max(g.area, w.d), memory) {}
    WindowTokens tokens;
    T **qkv, **out;
    LineList lines;
  };
  const Window& w_;
  int64_t n_, ld_;
  const Shared<T>& shared_;
  Scratch& memory_;
  Site sites_[2];
  Operands<D, T> operands_;
  Forward<D> attention_;
  T* sink_;
  float **results_, *buffer_;
};

template <class T>
void forward(const Window& w) {
  const Windows g(w);
  const Shared<T> shared(w, g);
  const Units units(w, g, 64, false);
  parallel_units(units.count(), [&](Queue& queue) {
    Worker<T> worker(w, g, shared);
    walk(queue, units, worker);
  });
}

}  // namespace

void window(const Window& w) {
  with_dtype(w.dtype, [&](auto t) { forward<decltype(t)>(w); });
}

}  // namespace pyvit::PYVIT_ISA
