// Shifted-window attention, backward: one (image, window, head) after another (window_attention_backward.h), and what
// is summed over them.
//
// A real token is in exactly one window, so its gradient is written once. What several windows add to (bias table,
// logit scale, padding token) is summed per unit of work, units follow from the shapes alone, and their sums are added
// in order: the bits do not depend on the number of threads.
#include <tuple>

#include "window_attention_backward.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Sums of every range of windows and every head: bias table; k and v of the padding token; logit scale.
struct Records {
  float *tables, *pads;  // or null
  double* logits;
  int64_t table, pad;  // sizes of one
};

// Where rows of dq, dk and dv (parts 0, 1, 2) go: to the map, dq and dk with the factor on the scores; or to buffers.
// Passed by value, see tile_then.
template <class T>
struct ToMap {
  T* const* rows;
  int64_t channels, head, d;  // of a part; the head's first; the head's
  float scale;
  T* at(int part, int64_t i, int64_t c) const { return rows[i] + part * channels + head + c; }
  void operator()(int part, int64_t i, int64_t c, vf x) const {
    store_up_to(at(part, i, c), part < 2 ? x * scale : x, d - c);
  }
};
struct ToBuffers {
  float* rows[3];  // (n, ld)
  int64_t ld;
  void operator()(int part, int64_t i, int64_t c, vf x) const { store(rows[part] + i * ld + c, x); }
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
    site.tokens.set(index);
    site.tokens.rows(w_.qkv, shared_.padding(), site.qkv);
    site.tokens.rows(grad_.grad_out, zeros_, site.grad_out);
    site.tokens.rows(grad_.grad_qkv, sink_, site.result);
    site.lines.clear();
    for (int part = 0; part < 3; part++) site.lines.add(site.qkv, n, part * channels, w_.d);
    site.lines.add(site.grad_out, n, 0, w_.d);
    for (int part = 0; part < 3; part++) site.lines.add(site.result, n, part * channels, w_.d);
  }
  void fetch() { gradients_.next.clear(); }
  void fetch(int at, int64_t head) { gradients_.next.set(sites_[at].lines, head * w_.d * sizeof(T)); }

  void begin(int64_t unit) {
    first_head_ = units_.first_head(unit);
    record_ = units_.range(unit) * w_.heads;
    if (tiles_) std::fill(tiles_, tiles_ + units_.heads() * tile_, 0.f);
  }
  void head(int at, int64_t index, int64_t head) {
    const Site& site = sites_[at];
    const int64_t n = g_.area, d = w_.d, channels = w_.heads * d, record = record_ + head;
    operands_.set(site.qkv, head);
    gradients_.pack(operands_, TokenRows<T>{site.grad_out, head * d, n, d});
    const float* lse = w_.lse + (index * w_.heads + head) * n;
    for (int64_t i = 0; i < g_.ld; i += W) {
      const vf l = i + W <= n ? load(lse + i) : load_n(lse + i, int(n - i), -INF);
      store(lse2_ + i, l == set1(-INF) ? set1(INF) : vmin(set1(-LEAST), l * LOG2E));  // in this order a NaN stays
    }
    const float scale = float(shared_.scale(head)), scale2 = float(shared_.scale(head) * 1.4426950408889634);
    const float* bias = site.tokens.bias(shared_.bias(head));
    float* grad_bias = tiles_ ? tiles_ + (head - first_head_) * tile_ : nullptr;
    const ToMap<T> map{site.result, channels, head * d, d, scale};
    // float32 goes straight to the map, but where normalisation or the sums of padding tokens come in between.
    if constexpr (std::is_same_v<T, float>)
      if (!w_.logit_scale && !records_.pads) return gradients_.run(bias, scale, scale2, lse2_, grad_bias, map);
    const int64_t ld = gradients_.ld;
    gradients_.run(bias, scale, scale2, lse2_, grad_bias, ToBuffers{{rows_[0], rows_[1], rows_[2]}, ld});
    if (w_.logit_scale) {
      records_.logits[record] += through_normalisation(0, rows_[0], scale);
      through_normalisation(1, rows_[1], scale);
    }
    for (int64_t i = 0; i < n; i++) {
      const bool padding = records_.pads && site.result[i] == sink_;
      for (int part = 0; part < 3; part++)
        for (int64_t c = 0; c < d; c += W) {
          const vf x = load(rows_[part] + i * ld + c) * (w_.logit_scale || part == 2 ? 1.f : scale);
          store_up_to(map.at(part, i, c), x, d - c);
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
        : tokens(w, g, memory),
          qkv(memory.take<T*>(g.area)),
          grad_out(memory.take<T*>(g.area)),
          result(memory.take<T*>(g.area)),
          lines(7 * g.area * LineList::per_row<T>(w.d), std::max(g.area, w.d), memory) {}
    WindowTokens tokens;
    T **qkv, **grad_out, **result;
    LineList lines;
  };

  // Rows g = d loss / d x^ become those of x, x^ = x / max(|x|, eps): (g - x^ (x^ . g)) / |x|. Returns the sum of x^ .
  // g.
  double through_normalisation(int64_t which, float* rows, float scale) {
    const TokenRows<T> in = operands_.part(which);
    double total = 0;
    for (int64_t i = 0; i < g_.area; i++) {
      const float inverse = operands_.inverse(which)[i];
      float* row = rows + i * gradients_.ld;
      const auto unit = [&](int64_t c) {
        return (w_.d - c >= W ? load(in[i] + c) : load_n(in[i] + c, int(w_.d - c))) * inverse;
      };
      vf sum{};
      for (int64_t c = 0; c < w_.d; c += W) sum += unit(c) * load(row + c);
      const float projection = reduce_add(sum) * scale;
      total += projection;
      const float back = inverse < 1e12f ? projection : 0.f;  // a constant length has no gradient
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
    if (!g_.remainder) return;
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
  WindowGradients<D> gradients_;
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
  with_dtype(w.dtype, [&](auto t) { backward<decltype(t)>(w, g); });
}

}  // namespace pyvit::PYVIT_ISA
