// Memory to fetch while products run. Rows that are far apart (one head of an interleaved qkv) are beyond the reach of
// the hardware's prefetchers, and many lines fetched at once hold up the loads of a tile: each step takes one at most.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace pyvit::PYVIT_ISA {

constexpr int64_t CACHE_LINE = 64;

// Whole matrices and stretches of memory.

class Prefetch {
 public:
  void clear() {
    count_ = at_ = 0;
    panel_ = panel_end_ = nullptr;
  }
  // `rows` rows of `cols` elements, `ld` apart, of which each fourth step fetches a line. Up to 8 such matrices.
  template <class T>
  void add(const T* first, int64_t ld, int64_t rows, int64_t cols, bool write = false) {
    if (rows > 0 && cols > 0)
      matrices_[count_++] = {
          reinterpret_cast<const char*>(first), ld * int64_t(sizeof(T)), rows, cols * int64_t(sizeof(T)), 0, write};
  }
  // A stretch of memory that will be read in order, of which every second step fetches a line.
  void panel(const uint32_t* first, const uint32_t* last) {
    panel_ = reinterpret_cast<const char*>(first);
    panel_end_ = reinterpret_cast<const char*>(last);
  }
  bool over() const { return at_ == count_ && panel_ >= panel_end_; }
  // Step k of a tile.
  void operator()(int64_t k) {
    if (k & 1) {
      if (panel_ < panel_end_) __builtin_prefetch(panel_, 0, 2), panel_ += CACHE_LINE;
      return;
    }
    if (k & 2 || at_ == count_) return;
    Matrix& m = matrices_[at_];
    if (m.write) {
      __builtin_prefetch(m.row + m.at, 1, 3);
    } else {
      __builtin_prefetch(m.row + m.at, 0, 2);
    }
    if ((m.at += CACHE_LINE) < m.bytes) return;
    m.at = 0;
    m.row += m.ld;
    if (!--m.rows) at_++;
  }

 private:
  struct Matrix {
    const char* row;
    int64_t ld, rows, bytes, at;
    bool write;
  } matrices_[8];
  int count_ = 0, at_ = 0;
  const char *panel_ = nullptr, *panel_end_ = nullptr;
};

// The cache lines of rows that lie anywhere, in the order they are needed: of one head in one window. Those of the
// next head lie a constant number of bytes further.
class LineList {
 public:
  // At most `most` lines; `steps`: of the longest product, which may run past the last line.
  LineList(int64_t most, int64_t steps, Scratch& memory) : list_(memory.take<const char*>(most + steps)), most_(most) {
    const char* nowhere = reinterpret_cast<const char*>(list_);
    std::fill(list_ + most, list_ + most + steps, nowhere);
  }
  void clear() { count_ = 0; }
  // n rows of d elements from rows[i] + at on.
  template <class T>
  void add(T* const* rows, int64_t n, int64_t at, int64_t d) {
    for (int64_t byte = at * int64_t(sizeof(T)), end = byte + d * int64_t(sizeof(T)); byte < end; byte += CACHE_LINE)
      for (int64_t i = 0; i < n; i++) list_[count_++] = reinterpret_cast<const char*>(rows[i]) + byte;
  }
  template <class T>
  static int64_t per_row(int64_t d) {
    return (d * int64_t(sizeof(T)) + CACHE_LINE - 1) / CACHE_LINE;
  }

 private:
  friend class PrefetchList;
  const char** list_;
  int64_t most_, count_ = 0;
};

// Such lines, of which every step fetches one.
class PrefetchList {
 public:
  PrefetchList(int64_t steps, Scratch& memory) : none_(0, steps, memory) { clear(); }
  void clear() { set(none_, 0); }
  void set(const LineList& lines, int64_t offset) {
    next_ = lines.list_;
    end_ = lines.list_ + lines.most_;
    offset_ = offset;
  }
  struct Steps {
    const char* const* lines;
    int64_t offset;
    void operator()(int64_t k) const { __builtin_prefetch(lines[k] + offset, 0, 2); }
  };
  // The steps of the next product.
  Steps take(int64_t steps) {
    const Steps taken{next_, offset_};
    next_ = std::min(next_ + steps, end_);
    return taken;
  }

 private:
  LineList none_;
  const char *const *next_, *const *end_;
  int64_t offset_;
};

}  // namespace pyvit::PYVIT_ISA
