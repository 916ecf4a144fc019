// Exact attention, forward, and attention maps, for one (batch, head) at a time.
//
// Keys and values are packed once per head into panels; queries pass in blocks of rows whose scores stay in L2. Up to
// KEY_BLOCK keys a row's softmax is a single pass; beyond, a running one.
#include "flash_attention.h"

namespace pyvit::PYVIT_ISA {
namespace {

constexpr int64_t KEY_BLOCK = 2048;  // keys whose scores are held at once
constexpr int64_t ROW_BLOCK = 48;
constexpr int64_t ROWS = ROW_BLOCK + 2 * W;  // of a block at most, in whole vectors and register tiles

template <class D, class T>
void forward_rows(const Attention& a, const Head& head, const KeyPanels<D, T>& key_panels,
                  const KeyPanels<D, T>& value_panels, const QkRows& transform, int64_t first, int64_t last,
                  int64_t rows_at_once, uint32_t* queries, typename D::element* loaded, float* scores, float* out,
                  float* bias_buffer, Prefetch& next) {
  const int64_t block = std::min(KEY_BLOCK, std::max<int64_t>(head.nk, 1)), ld = round_up(block, W),
                ldo = round_up(a.dv, W);
  const Scores kind(a.scale, a.biased(), a.masked());
  BiasRows bias(a.bias, a.grid, head.b, head.h, block, bias_buffer);
  const T* q = head.query<T>(a.q);
  T* result = head.query<T>(a.out);
  float* lse = a.lse + head.statistic(a);
  RowState state[ROWS];
  for (int64_t i = first; i < last; i += rows_at_once) {
    const int64_t rows = std::min(rows_at_once, last - i), lanes = lanes_of<D>(a.d);
    pack_queries<D>(transform, head, q + i * a.q.n, a.q.n, i, rows, a.d, loaded, queries);
    for (int64_t r = 0; r < rows; r++) state[r] = {};
    const int64_t keys = a.causal ? std::min(head.nk, i + rows) : head.nk;
    if (!keys) std::fill(out, out + rows * ldo, 0.f);
    for (int64_t j = 0; j < keys; j += KEY_BLOCK) {
      const int64_t n = std::min(KEY_BLOCK, keys - j);
      const int64_t packed = std::min(KEY_BLOCK, head.nk - j);
      gemm<D>(rows, std::min(packed, round_up(n, NR)), lanes, queries, lanes, 1, key_panels.at(j), lanes, scores, ld,
              false, &next);
      const auto valid = [&](int64_t r) { return a.causal ? std::clamp<int64_t>(i + r + 1 - j, 0, n) : n; };
      float top[ROWS];
      for (int64_t r = 0; r < rows; r++) top[r] = row_max(scores + r * ld, valid(r), bias.row(i + r, j, n), kind);
      for (int64_t r = 0; r < rows; r++) {
        const float factor = row_exp<D>(scores + r * ld, n, valid(r), kind.unit, top[r], state[r]);
        if (j && factor != 1.f)
          for (int64_t c = 0; c < ldo; c += W) store(out + r * ldo + c, load(out + r * ldo + c) * factor);
      }
      const uint32_t* p = reinterpret_cast<const uint32_t*>(scores);
      gemm<D>(rows, a.dv, lanes_of<D>(n), p, ld, 1, value_panels.at(j), lanes_of<D>(packed), out, ldo, j > 0, &next);
    }
    float top[ROWS] = {}, sum[ROWS] = {};
    for (int64_t r = 0; r < rows; r++) {
      top[r] = state[r].max;
      sum[r] = state[r].sum;
      store_row(result + (i + r) * a.out.n, out + r * ldo, sum[r] == 0 ? 0.f : 1.f / sum[r], a.dv);
    }
    for (int64_t r = 0; r < rows; r += W) {
      const vf s = load(sum + r), l = load(top + r) * kind.natural + log2v(s) * LN2;
      write(lse + i + r, s == 0.f ? set1(-INF) : (s != s ? s : l), int(std::min<int64_t>(W, rows - r)));
    }
  }
}

template <class T>
void forward(const Attention& a) {
  using D = Compute<T>;
  const int64_t heads = a.batch * a.heads;
  // Enough pieces for every thread; a row's result does not depend on the pieces.
  const int64_t wanted = (4 * threads.count() + heads - 1) / heads;
  const int64_t rows_at_once = row_block(a.nq, ROW_BLOCK);
  const int64_t piece = round_up(std::max<int64_t>(rows_at_once, (a.nq + wanted - 1) / wanted), rows_at_once);
  const int64_t pieces = (a.nq + piece - 1) / piece;
  parallel_units(heads * pieces, [&](Queue& queue) {
    Scratch& memory = scratch();
    using Panels = KeyPanels<D, T>;
    const QkRows query_rows(a.transform, false, a.d, memory), key_rows(a.transform, true, a.d, memory);
    Panels keys(Panels::KEYS_AS_COLUMNS, a.k, a.nk, a.d, KEY_BLOCK, memory);
    Panels values(Panels::KEYS_AS_ROWS, a.v, a.nk, a.dv, KEY_BLOCK, memory);
    const int64_t ld = round_up(std::min(KEY_BLOCK, std::max<int64_t>(a.nk, 1)), W), rows = rows_at_once + MR;
    uint32_t* queries = memory.take<uint32_t>(rows * lanes_of<D>(a.d));  // (rows, lanes of d)
    using Element = typename D::element;
    const int64_t most = std::max<int64_t>(rows, NR);
    Element* loaded = a.transform ? memory.take<Element>(most * QkRows::columns_of(a.d)) : nullptr;
    float* scores = memory.take<float>(rows * ld);              // (rows, keys of a block)
    float* out = memory.take<float>(rows * round_up(a.dv, W));  // (rows, dv)
    float* bias = memory.take<float>(BiasRows::size(a.grid, ld));
    const auto head_of = [&](int64_t unit) { return Head(a, unit / pieces / a.heads, unit / pieces % a.heads); };
    const auto rows_of = [&](int64_t unit, const Head& head) {
      const int64_t first = unit % pieces * piece;
      return std::pair(first, std::min(first + piece, head.nq));
    };
    for (int64_t unit = queue.next(), after; unit >= 0; unit = after) {
      after = queue.next();
      const Head head = head_of(unit);
      const auto [first, last] = rows_of(unit, head);
      Prefetch next;
      next.add(head.query<T>(a.out) + first * a.out.n, a.out.n, std::min(rows_at_once, last - first), a.dv, true);
      if (after >= 0) {
        const Head coming = head_of(after);
        const auto [from, to] = rows_of(after, coming);
        if (coming.b != head.b || coming.hk != head.hk) {
          next.add(coming.key<T>(a.k, coming.hk), a.k.n, coming.nk, a.d);
          next.add(coming.key<T>(a.v, coming.hk), a.v.n, coming.nk, a.dv);
        }
        next.add(coming.query<T>(a.q) + from * a.q.n, a.q.n, to - from, a.d);
      }
      if (first >= last) continue;
      keys.pack(head, key_rows, loaded);
      values.pack(head);
      forward_rows<D, T>(a, head, keys, values, query_rows, first, last, rows_at_once, queries, loaded, scores, out,
                         bias, next);
    }
  });
}

// Probabilities of chosen rows, exact softmax over all keys at once.
template <class T>
void map_rows(const AttentionMap& m) {
  using D = Compute<T>;
  const int64_t lanes = lanes_of<D>(m.d), ld = round_up(m.nk, W);
  parallel_units(m.batch * m.heads, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* keys = memory.take<uint32_t>(packed_size<D>(m.d, m.nk));
    uint32_t* query = memory.take<uint32_t>(lanes);
    float *scores = memory.take<float>(ld), *bias_buffer = memory.take<float>(ld);
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t b = unit / m.heads, h = unit % m.heads, hk = h / (m.heads / m.kv_heads);
      pack_cols<D>(static_cast<const T*>(m.k.data) + b * m.k.b + hk * m.k.h, m.k.n, m.d, m.nk, keys);
      BiasRows bias(m.bias, nullptr, b, h, m.nk, bias_buffer);
      for (int64_t r = 0; r < m.rows; r++) {
        const int64_t i = m.index[b * m.index_b + r];
        pack_a<D>(static_cast<const T*>(m.q.data) + b * m.q.b + h * m.q.h + i * m.q.n, 0, 1, m.d, query);
        gemm<D>(1, m.nk, lanes, query, lanes, 1, keys, lanes, scores, ld);
        RowState state;
        const Scores kind(m.scale, m.bias.data, m.bias.data && m.bias.dtype == Dtype::boolean);
        const float top = row_max(scores, m.nk, bias.row(i, 0, m.nk), kind);
        row_exp<F32>(scores, m.nk, m.nk, kind.unit, top, state);
        T* out = static_cast<T*>(m.out.data) + b * m.out.b + h * m.out.h + r * m.out.n;
        store_row(out, scores, state.sum == 0 ? 0.f : 1.f / state.sum, m.nk);
      }
    }
  });
}

}  // namespace

void attention(const Attention& a) {
  with_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void attention_map(const AttentionMap& m) {
  with_dtype(m.dtype, [&](auto t) { map_rows<decltype(t)>(m); });
}

}  // namespace pyvit::PYVIT_ISA
