// Where the tokens of a window lie, what a call prepares for all of them, and the order in which threads visit them.
#pragma once

#include "gemm_tile.h"
#include "kernel_args.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {

struct Windows {
  explicit Windows(const Window& w)
      : rows((w.height + w.wh - 1) / w.wh),
        cols((w.width + w.ww - 1) / w.ww),
        sy(rows > 1 ? w.sy : 0),
        sx(cols > 1 ? w.sx : 0),
        area(w.wh * w.ww),
        ld(round_up(area, W)),
        remainder(area % W == 1 && area > W) {}

  int64_t per_image() const { return rows * cols; }

  int64_t rows, cols, sy, sx;  // windows of a map; the shift in force
  int64_t area, ld;
  bool remainder;  // one query more than whole vectors of them: it is done by itself
};

// One window of one image: coordinates of its rows and columns, -1 in the padding, and the regions they belong to.
class WindowTokens {
 public:
  WindowTokens(const Window& w, const Windows& windows, Scratch& memory)
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
    if (g_.remainder) select(tile + n * ld, key_ids(), query_ids()[n - 1], masked_ + n * ld);
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

// What a call prepares once: the bias of every head, expanded to (keys, queries), for a remainder query one more row
// over the keys; the padding token; the factors on the scores.
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
        for (int64_t r = 0; r < rows; r++) column[r] = w.table[r * w.heads + h];
      expand(column, bias_ + h * stride_);
    }
    memory_ = &memory;
  }

  const float* bias(int64_t head) const { return bias_ + (w_.table ? head * stride_ : 0); }
  T* padding() const { return pad_; }
  // The factor on the products of queries and keys.
  double scale(int64_t head) const {
    return w_.logit_scale ? std::exp(double(std::min(w_.logit_scale[head], LN100))) : w_.scale;
  }

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
    if (!g_.remainder) return;
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

// Units of work: some heads of a range of windows, by the shapes alone, so that the results are the same for any number
// of threads.
class Units {
 public:
  // About `wanted` units or more; windows with all their heads if there are so many windows, else with a few heads.
  Units(const Window& w, const Windows& g, int64_t wanted, bool ranges) : windows_(w.batch * g.per_image()) {
    heads_ = w.heads;
    if (ranges || windows_ < wanted)
      for (heads_ = std::min<int64_t>(w.heads, 4); w.heads % heads_;) heads_--;
    groups_ = w.heads / heads_;
    each_ = ranges ? std::max<int64_t>(1, windows_ * groups_ / wanted) : 1;
  }
  int64_t count() const { return ranges() * groups_; }
  int64_t ranges() const { return (windows_ + each_ - 1) / each_; }
  int64_t heads() const { return heads_; }  // of a unit
  int64_t first_head(int64_t unit) const { return unit % groups_ * heads_; }
  int64_t range(int64_t unit) const { return unit / groups_; }
  int64_t first(int64_t unit) const { return range(unit) * each_; }
  int64_t last(int64_t unit) const { return std::min(first(unit) + each_, windows_); }

 private:
  int64_t windows_, heads_, groups_, each_;
};

// A thread's way through the units: worker.set(site, window) one window ahead, so that worker.head(site, window, head)
// can fetch the rows of the head after it.
template <class Worker>
void walk(Queue& queue, const Units& units, Worker& worker) {
  int64_t unit = queue.next();
  if (unit < 0) return;
  int site = 0;
  worker.set(site, units.first(unit));
  while (unit >= 0) {
    const int64_t next_unit = queue.next(), head = units.first_head(unit), end = head + units.heads();
    worker.begin(unit);
    for (int64_t i = units.first(unit), last = units.last(unit); i < last; i++, site ^= 1) {
      const bool more = i + 1 < last, next = more || next_unit >= 0;
      if (next) worker.set(site ^ 1, more ? i + 1 : units.first(next_unit));
      for (int64_t h = head; h < end; h++) {
        if (h + 1 < end) {
          worker.fetch(site, h + 1);
        } else if (next) {
          worker.fetch(site ^ 1, more ? head : units.first_head(next_unit));
        } else {
          worker.fetch();
        }
        worker.head(site, i, h);
      }
    }
    worker.end(unit);
    unit = next_unit;
  }
}

}  // namespace pyvit::PYVIT_ISA
