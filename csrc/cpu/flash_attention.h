// One (batch, head) of an attention call, and how its rows are divided and written.
#pragma once

#include "dtype.h"
#include "parallel.h"
#include "qk_transform.h"
#include "softmax.h"

namespace pyvit::PYVIT_ISA {

// One (batch, head) of the call.
struct Head {
  int64_t b, h, hk, nq, nk, q0, k0;

  Head(const Attention& a, int64_t b, int64_t h)
      : b(b), h(h), hk(h / (a.heads / a.kv_heads)), nq(a.nq), nk(a.nk), q0(0), k0(0) {
    if (a.cu_q) {
      q0 = a.cu_q[b];
      nq = a.cu_q[b + 1] - q0;
      k0 = a.cu_k[b];
      nk = a.cu_k[b + 1] - k0;
    }
  }
  template <class T>
  T* query(const Tokens& t) const {
    return static_cast<T*>(t.data) + b * t.b + h * t.h + q0 * t.n;
  }
  template <class T>
  T* key(const Tokens& t, int64_t head) const {
    return static_cast<T*>(t.data) + b * t.b + head * t.h + k0 * t.n;
  }
  int64_t statistic(const Attention& a) const { return b * a.lse_b + h * a.lse_h + q0; }
};

// One key head's keys or values as panels, in blocks of keys: keys as the rows of B (keys x d), or as its columns.
template <class D, class T>
class KeyPanels {
 public:
  enum Layout { KEYS_AS_ROWS, KEYS_AS_COLUMNS };

  KeyPanels(Layout layout, const Tokens& from, int64_t nk, int64_t d, int64_t block, Scratch& memory)
      : layout_(layout),
        from_(from),
        d_(d),
        block_(block),
        words_(memory.take<uint32_t>(nk / block * size(block) + size(std::max<int64_t>(nk % block, 1)))) {}

  void pack(const Head& head) {
    if (!begin(head)) return;
    for (int64_t j = 0; j < head.nk; j += block_) {
      const int64_t n = std::min(block_, head.nk - j), ld = from_.n;
      const T* rows = head.key<T>(from_, h_) + j * ld;
      if (layout_ == KEYS_AS_ROWS) {
        pack_rows<D>(rows, ld, n, d_, block_at(j));
      } else {
        pack_cols<D>(rows, ld, d_, n, block_at(j));
      }
    }
  }
  // The same of transformed keys, also into panels of the other layout unless they are null. NR keys at a time: what
  // `loaded` (NR, d in whole vectors) holds stays in L1 until it is packed.
  void pack(const Head& head, const QkRows& transform, typename D::element* loaded, KeyPanels* other = nullptr) {
    if (!transform.active()) {
      pack(head);
      if (other) other->pack(head);
      return;
    }
    if (!begin(head)) return;
    if (other) other->begin(head);
    const int64_t ld = QkRows::columns_of(d_);
    for (int64_t j = 0; j < head.nk; j += block_)
      for (int64_t n = std::min(block_, head.nk - j), i = 0; i < n; i += NR) {
        const int64_t count = std::min<int64_t>(NR, n - i);
        const T* rows = head.key<T>(from_, h_) + (j + i) * from_.n;
        transform.transform(rows, from_.n, count, head.b, h_, head.k0 + j + i, loaded, ld);
        pack_some(loaded, ld, j, n, i, count);
        if (other) other->pack_some(loaded, ld, j, n, i, count);
      }
  }
  // The block that begins with key j.
  const uint32_t* at(int64_t j) const { return words_ + j / block_ * size(block_); }

 private:
  int64_t size(int64_t keys) const {
    return layout_ == KEYS_AS_ROWS ? packed_size<D>(keys, d_) : packed_size<D>(d_, keys);
  }
  uint32_t* block_at(int64_t j) { return words_ + j / block_ * size(block_); }
  // Whether the head is another than the one packed last.
  bool begin(const Head& head) {
    if (head.b == b_ && head.hk == h_) return false;
    b_ = head.b;
    h_ = head.hk;
    return true;
  }
  // `count` rows as keys j + i on, of the block of n keys that begins with key j; i is a multiple of NR.
  void pack_some(const typename D::element* rows, int64_t ld, int64_t j, int64_t n, int64_t i, int64_t count) {
    uint32_t* to = block_at(j);
    if (layout_ == KEYS_AS_COLUMNS) return pack_cols<D>(rows, ld, d_, count, to + i * lanes_of<D>(d_));
    for (int64_t c = 0; c < d_; c += NR) {  // their lanes of each panel
      const int64_t columns = std::min<int64_t>(NR, d_ - c);
      pack_rows<D>(rows + c, ld, count, columns, to + c * lanes_of<D>(n) + i / D::K * round_up(columns, W));
    }
  }
  const Layout layout_;
  const Tokens& from_;
  const int64_t d_, block_;
  uint32_t* words_;
  int64_t b_ = -1, h_ = -1;  // whose are packed
};

// Queries as A, and with `row_panels` as B of grad_k; `loaded` (rows, d in whole vectors) takes them when they are
// transformed.
template <class D, class T>
inline void pack_queries(const QkRows& transform, const Head& head, const T* q, int64_t ld, int64_t first, int64_t rows,
                         int64_t d, typename D::element* loaded, uint32_t* queries, uint32_t* row_panels = nullptr) {
  const auto pack = [&](const auto* from, int64_t apart) {
    pack_a<D>(from, apart, rows, d, queries);
    if (row_panels) pack_rows<D>(from, apart, rows, d, row_panels);
  };
  if (!transform.active()) return pack(q, ld);
  const int64_t ldd = QkRows::columns_of(d);
  transform.transform(q, ld, rows, head.b, head.h, head.q0 + first, loaded, ldd);
  pack(static_cast<const typename D::element*>(loaded), ldd);
}

// Rows per block: a multiple of the register tile that divides n into nearly equal parts.
inline int64_t row_block(int64_t n, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, (n + most - 1) / most);
  return round_up((n + blocks - 1) / blocks, MR * 2);
}

template <class T>
inline void store_row(T* out, const float* x, float factor, int64_t n) {
  int64_t c = 0;
  for (; c + W <= n; c += W) store(out + c, load(x + c) * factor);
  if (c < n) store_n(out + c, load(x + c) * factor, int(n - c));
}

}  // namespace pyvit::PYVIT_ISA
