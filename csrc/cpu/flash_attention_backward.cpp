// Gradients of exact attention: probabilities recomputed from the log-sum-exp, block by block.
#include <vector>

#include "flash_attention.h"

namespace pyvit::PYVIT_ISA {
namespace {

constexpr int64_t KEY_BLOCK = 1024;  // keys whose scores and gradients of scores are held at once
constexpr int64_t ROW_BLOCK = 48;

// A piece is some rows of one query head. It owns its rows of grad_q, and a partial grad_k and grad_v over all keys;
// where one key head has a single piece the partial is the result, otherwise the partials are added in order
// afterwards. Pieces that share a slice of a broadcast bias form chains, worked through in order, each with its own
// partial of that slice. All of this follows from the shape alone, so the bits do not depend on the number of threads.
struct Plan {
  int64_t splits, rows;               // pieces per query head, rows of each
  int64_t partials;                   // pieces per key head
  int64_t slices = 0, chains = 1;     // of the bias gradient: slices, chains per slice
  std::vector<int64_t> order, start;  // pieces by chain; where each chain starts

  Plan(const Attention& a, const AttentionGrad& g) {
    constexpr int64_t ENOUGH = 32;  // pieces to keep many cores busy
    const int64_t heads = a.batch * a.heads;
    splits = std::clamp<int64_t>(std::min((ENOUGH + heads - 1) / heads, a.nq / 256), 1, ENOUGH);
    rows = round_up((a.nq + splits - 1) / splits, 16);
    splits = std::max<int64_t>(1, (a.nq + rows - 1) / rows);
    partials = splits * (a.heads / a.kv_heads);
    const int64_t pieces = heads * splits;
    std::vector<std::vector<int64_t>> members;
    if (g.grad_bias) {
      slices = g.bias_b * g.bias_h;
      members.resize(slices);
      for (int64_t piece = 0; piece < pieces; piece++) members[slice(a, g, piece)].push_back(piece);
      chains = std::clamp<int64_t>((ENOUGH + slices - 1) / slices, 1, std::max<int64_t>(1, pieces / slices));
    }
    for (auto& of_slice : members)
      for (int64_t c = 0; c < chains; c++) {
        start.push_back(int64_t(order.size()));
        const int64_t n = int64_t(of_slice.size());
        order.insert(order.end(), of_slice.begin() + c * n / chains, of_slice.begin() + (c + 1) * n / chains);
      }
    if (members.empty())
      for (int64_t piece = 0; piece < pieces; piece++) {
        start.push_back(piece);
        order.push_back(piece);
      }
    start.push_back(int64_t(order.size()));
  }
  int64_t slice(const Attention& a, const AttentionGrad& g, int64_t piece) const {
    const int64_t b = piece / splits / a.heads, h = piece / splits % a.heads;
    return (g.bias_b > 1 ? b : 0) * g.bias_h + (g.bias_h > 1 ? h : 0);
  }
};

// Scores and their gradients of `rows` queries and one block of keys, as the lanes the three products want.
template <class D>
struct Grads {
  float *scores, *dscores;           // (rows, ld); dscores becomes A of grad_q in place
  uint32_t *p_columns, *ds_columns;  // A of grad_v and grad_k, keys as rows: (rows lanes, ld)
  int64_t ld;
};

// A log-sum-exp from whose magnitude on its rounding shows in the gradients.
constexpr float LARGE = 128.f;

// Of the rows of a block: what makes probabilities of scores, and delta = sum of dO * O, less the gradient of the
// log-sum-exp. P = exp2(score - lse2), with scores in powers of two; where that is not sure to be at most 1, because a
// log-sum-exp is LARGE and float32 has rounded away what was added to the largest score, P = exp2((score - top) * unit
// - log2_sum), with scores as the forward took them.
struct RowStatistics {
  static constexpr int64_t ROWS = ROW_BLOCK + 2 * MR;
  float delta[ROWS], lse2[ROWS], top[ROWS], log2_sum[ROWS];
};

// One row (float32) or a pair of rows (bf16, whose lanes hold two queries) of P and dS from products and dP.
// dS = P (dP - delta); columns from `valid` on are 0.
template <class D, bool FROM_TOP>
inline void gradient_rows(const Grads<D>& g, int64_t r, int64_t rows, int64_t n, const int64_t* valid,
                          const float* const* bias, float scale2, const Scores& scores, const RowStatistics& of,
                          float* const* grad_bias, int64_t bias_k) {
  const int64_t ld = g.ld;
  const float *lse2 = of.lse2 + r, *top = of.top + r, *log2_sum = of.log2_sum + r, *delta = of.delta + r;
  vf bias_sum[D::K] = {};
  for (int64_t c = 0; c < n; c += W) {
    vf p[D::K], ds[D::K];
    for (int k = 0; k < D::K; k++) {
      const int left = r + k < rows ? int(std::min<int64_t>(W, valid[k] - c)) : 0;
      if (left <= 0) {
        p[k] = ds[k] = vf{};
      } else {
        vf x = load(g.scores + (r + k) * ld + c);
        if constexpr (FROM_TOP) {
          if (bias[k]) {
            x = scores.with(x * scores.factor, read(bias[k] + c, left));
          } else {
            x = rounded(x * scores.factor);
          }
          x = (x - top[k]) * scores.unit - log2_sum[k];
        } else {
          x = x * scale2 - lse2[k];
          if (bias[k]) x = scores.with(x, read(bias[k] + c, left) * LOG2E);
        }
        p[k] = exp2_for<D>(x);
        ds[k] = p[k] * (load(g.dscores + (r + k) * ld + c) - delta[k]);
        if (left < W) {
          p[k] = keep_first(p[k], left);
          ds[k] = keep_first(ds[k], left);
        }
        if (grad_bias[k]) {
          if (!bias_k) {
            bias_sum[k] += ds[k];
          } else if (left == W) {
            store(grad_bias[k] + c, load(grad_bias[k] + c) + ds[k]);
          } else {
            store_n(grad_bias[k] + c, load_n(grad_bias[k] + c, left) + ds[k], left);
          }
        }
      }
    }
    if constexpr (D::K == 1) {
      store(g.scores + r * ld + c, p[0]);
      store(g.dscores + r * ld + c, ds[0]);
    } else {
      store_as(g.p_columns + r / 2 * ld + c, pair_lanes(p[0], p[1]));
      store_as(g.ds_columns + r / 2 * ld + c, pair_lanes(ds[0], ds[1]));
      for (int k = 0; k < 2 && r + k < rows; k++)
        store_lanes<D>(reinterpret_cast<uint32_t*>(g.dscores + (r + k) * ld), c, ds[k]);
    }
  }
  for (int k = 0; k < D::K; k++)
    if (grad_bias[k] && !bias_k) *grad_bias[k] += reduce_add(bias_sum[k]);
}

// The bias's gradient: the chains of each slice, added in order.
inline void reduce_bias(const AttentionGrad& g, const Plan& plan, const float* partials, int64_t slice, Dtype dtype) {
  parallel_units(plan.slices, [&](Queue& queue) {
    for (int64_t s; (s = queue.next()) >= 0;)
      for (int64_t c = 0; c < slice; c++) {
        float sum = 0;
        for (int64_t chain = 0; chain < plan.chains; chain++) sum += partials[(s * plan.chains + chain) * slice + c];
        const int64_t at = s * slice + c;
        with_dtype(dtype, [&](auto t) { static_cast<decltype(t)*>(g.grad_bias)[at] = from_float<decltype(t)>(sum); });
      }
  });
}

// Gradients of transformed rows, kept until those of the angles are summed: (B, H, tokens, d in whole vectors), or (H,
// tokens, d) of packed sequences. The row of a token:
inline int64_t turned_row(const Attention& a, const AttentionGrad& g, int64_t b, int64_t h, int64_t token) {
  return ((a.cu_q ? 0 : b) * a.heads + h) * g.tokens + token;
}
inline void keep_scaled(const float* from, int64_t rows, int64_t ld, float scale, float* to) {
  for (int64_t c = 0; c < rows * ld; c += W) store(to + c, load(from + c) * scale);
}

// The gradients of sines and cosines: a token's row has one owner, who adds over batch entries and heads in order,
// queries before keys. q_turned and k_turned are scaled.
template <class T>
void reduce_angles(const Attention& a, const AttentionGrad& g, const float* q_turned, const float* k_turned) {
  const QkTransform& t = *a.transform;
  constexpr int64_t TOKENS = 8;
  const int64_t angles = g.tokens - t.prefix, blocks = (angles + TOKENS - 1) / TOKENS, ldd = round_up(a.d, W);
  const int64_t batch = a.cu_q ? 1 : a.batch, width = 2 * t.rotated;
  parallel_units(g.rope_b * g.rope_h * blocks, [&](Queue& queue) {
    Scratch& memory = scratch();
    const QkRows rows[2] = {{&t, false, a.d, memory}, {&t, true, a.d, memory}};
    float* x = memory.take<float>(ldd);
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t slice = unit / blocks, first = unit % blocks * TOKENS, last = std::min(first + TOKENS, angles);
      const int64_t rb = slice / g.rope_h, rh = slice % g.rope_h;
      float* grad = g.grad_rope + (slice * angles + first) * width;
      std::fill(grad, grad + (last - first) * width, 0.f);
      for (int64_t b = g.rope_b > 1 ? rb : 0; b < (g.rope_b > 1 ? rb + 1 : batch); b++)
        for (int key = 0; key < 2; key++) {
          const Tokens& from = key ? a.k : a.q;
          const int64_t heads = key ? a.kv_heads : a.heads;
          for (int64_t h = g.rope_h > 1 ? rh : 0; h < (g.rope_h > 1 ? rh + 1 : heads); h++)
            for (int64_t i = first; i < last; i++) {
              const int64_t token = i + t.prefix;
              rows[key].normalize_row(static_cast<const T*>(from.data) + b * from.b + h * from.h + token * from.n, x);
              rows[key].add_angles(x, (key ? k_turned : q_turned) + ((b * heads + h) * g.tokens + token) * ldd,
                                   grad + (i - first) * width);
            }
        }
    }
  });
}

// n partial sums (2, ldd) of a norm's weight and bias, added in order.
inline void reduce_norm(const std::vector<float>& partials, int64_t d, int64_t ldd, float* weight, float* bias) {
  for (int which = 0; which < 2; which++) {
    float* to = which ? bias : weight;
    if (!to) continue;
    std::fill(to, to + d, 0.f);
    for (size_t at = which * ldd; at < partials.size(); at += 2 * ldd)
      for (int64_t c = 0; c < d; c++) to[c] += partials[at + c];
  }
}

template <class D, class T>
class Backward {
  using Panels = KeyPanels<D, T>;

 public:
  Backward(const Attention& a, const AttentionGrad& g)
      : a_(a),
        g_(g),
        memory_(scratch()),
        block_(std::min(KEY_BLOCK, std::max<int64_t>(a.nk, 1))),
        ld_(round_up(block_, W)),
        ldd_(round_up(a.d, W)),
        ldv_(round_up(a.dv, W)),
        query_transform_(a.transform, false, a.d, memory_),
        key_transform_(a.transform, true, a.d, memory_),
        k_columns_(Panels::KEYS_AS_COLUMNS, a.k, a.nk, a.d, KEY_BLOCK, memory_),
        v_columns_(Panels::KEYS_AS_COLUMNS, a.v, a.nk, a.dv, KEY_BLOCK, memory_),
        k_rows_(Panels::KEYS_AS_ROWS, a.k, a.nk, a.d, KEY_BLOCK, memory_) {
    const int64_t rows = ROW_BLOCK + 2 * MR;
    queries_ = memory_.take<uint32_t>(rows * lanes_of<D>(a.d));     // (rows, lanes of d)
    grads_out_ = memory_.take<uint32_t>(rows * lanes_of<D>(a.dv));  // (rows, lanes of dv)
    query_rows_ = memory_.take<uint32_t>(packed_size<D>(rows, a.d));
    grad_rows_ = memory_.take<uint32_t>(packed_size<D>(rows, a.dv));
    grad_q_ = memory_.take<float>(rows * ldd_);  // (rows, ldd)
    loaded_ = a.transform ? memory_.take<typename D::element>(std::max<int64_t>(rows, NR) * ldd_) : nullptr;
    bias_ = memory_.take<float>(D::K * BiasRows::size(a.grid, ld_));
    if (a.grid) {
      grid_sums_ = memory_.take<float>(rows * GridLayout::size(*a.grid));  // (rows, a query's numbers)
      grid_grads_ = memory_.take<float>(D::K * ld_);
    }
    s_ = {memory_.take<float>(rows * ld_), memory_.take<float>(rows * ld_), nullptr, nullptr, ld_};
    if (D::K == 2) {
      s_.p_columns = memory_.take<uint32_t>(rows / 2 * ld_);
      s_.ds_columns = memory_.take<uint32_t>(rows / 2 * ld_);
    } else {
      s_.p_columns = reinterpret_cast<uint32_t*>(s_.scores);
      s_.ds_columns = reinterpret_cast<uint32_t*>(s_.dscores);
    }
  }

  // grad_k (nk, ldd_) and grad_v (nk, ldv_) are this piece's, zeroed; grad_bias the chain's (bias_q, bias_k), or null.
  // With a transform: `turned` takes the gradients of its result for the call's queries unless it is null, `sums` the
  // piece's share of those of the norm's weight and bias.
  void piece(const Head& head, int64_t first, int64_t last, float* grad_k, float* grad_v, float* grad_bias,
             float* turned, float* sums) {
    k_columns_.pack(head, key_transform_, loaded_, &k_rows_);
    v_columns_.pack(head);
    const auto bias_rows = [&](int k) {
      return BiasRows(a_.bias, a_.grid, head.b, head.h, ld_, bias_ + k * BiasRows::size(a_.grid, ld_));
    };
    BiasRows bias[2] = {bias_rows(0), bias_rows(D::K - 1)};
    const int64_t at_once = row_block(last - first, ROW_BLOCK);
    for (int64_t i = first; i < last; i += at_once)
      block(head, i, std::min(at_once, last - i), bias, grad_k, grad_v, grad_bias, turned, sums);
  }
  const QkRows& key_transform() const { return key_transform_; }

 private:
  void block(const Head& head, int64_t i, int64_t rows, BiasRows* bias, float* grad_k, float* grad_v, float* grad_bias,
             float* turned, float* sums) {
    const Scores kind(a_.scale, a_.biased(), a_.masked());
    const T* q = head.query<T>(a_.q) + i * a_.q.n;
    const T* dout = head.query<T>(g_.grad_out) + i * g_.grad_out.n;
    const int64_t lanes = lanes_of<D>(a_.d), lanes_v = lanes_of<D>(a_.dv), row_lanes = lanes_of<D>(rows);
    pack_queries<D>(query_transform_, head, q, a_.q.n, i, rows, a_.d, loaded_, queries_, query_rows_);
    pack_a<D>(dout, g_.grad_out.n, rows, a_.dv, grads_out_);
    pack_rows<D>(dout, g_.grad_out.n, rows, a_.dv, grad_rows_);
    RowStatistics of;
    const bool from_top = statistics(head, i, rows, dout, of);
    if (from_top) sum_again(head, i, rows, bias[0], kind, of);
    const auto rows_of_gradients = from_top ? gradient_rows<D, true> : gradient_rows<D, false>;
    const int64_t keys = a_.causal ? std::min(head.nk, i + rows) : head.nk;
    if (!keys) std::fill(grad_q_, grad_q_ + rows * ldd_, 0.f);
    const int64_t of_grid = a_.grid ? GridLayout::size(*a_.grid) : 0;
    if (a_.grid) std::fill(grid_sums_, grid_sums_ + rows * of_grid, 0.f);
    for (int64_t j = 0; j < keys; j += KEY_BLOCK) {
      const int64_t n = std::min(KEY_BLOCK, keys - j), packed = std::min(KEY_BLOCK, head.nk - j);
      const int64_t computed = std::min(packed, round_up(n, NR));
      gemm<D>(rows, computed, lanes, queries_, lanes, 1, k_columns_.at(j), lanes, s_.scores, ld_);
      gemm<D>(rows, computed, lanes_v, grads_out_, lanes_v, 1, v_columns_.at(j), lanes_v, s_.dscores, ld_);
      for (int64_t r = 0; r < rows; r += D::K) {
        int64_t valid[2];
        const float* bias_rows[2] = {};
        float* grad_rows[2] = {};
        for (int k = 0; k < D::K && r + k < rows; k++) {
          const int64_t row = i + r + k;
          valid[k] = a_.causal ? std::clamp<int64_t>(row + 1 - j, 0, n) : n;
          bias_rows[k] = bias[k].row(row, j, n);
          if (grad_bias) grad_rows[k] = grad_bias + (g_.bias_q > 1 ? row * g_.bias_k : 0) + (g_.bias_k > 1 ? j : 0);
          if (a_.grid) {
            grad_rows[k] = grid_grads_ + k * ld_;
            std::fill(grad_rows[k], grad_rows[k] + n, 0.f);
          }
        }
        rows_of_gradients(s_, r, rows, n, valid, bias_rows, a_.scale * LOG2E, kind, of, grad_rows,
                          a_.grid || g_.bias_k > 1 ? 1 : 0);
        if (a_.grid)
          for (int k = 0; k < D::K && r + k < rows; k++)
            add_grid_gradient(*a_.grid, j, n, grad_rows[k], grid_sums_ + (r + k) * of_grid);
      }
      const uint32_t* ds = reinterpret_cast<const uint32_t*>(s_.dscores);
      gemm<D>(rows, a_.d, lanes_of<D>(n), ds, ld_, 1, k_rows_.at(j), lanes_of<D>(packed), grad_q_, ldd_, j > 0);
      gemm<D>(n, a_.dv, row_lanes, s_.p_columns, 1, ld_, grad_rows_, row_lanes, grad_v + j * ldv_, ldv_, true);
      gemm<D>(n, a_.d, row_lanes, s_.ds_columns, 1, ld_, query_rows_, row_lanes, grad_k + j * ldd_, ldd_, true);
    }
    if (a_.grid) store_grid_gradient(head, i, rows);
    T* result = head.query<T>(g_.grad_q) + i * g_.grad_q.n;
    if (!a_.transform) {
      for (int64_t r = 0; r < rows; r++) store_row(result + r * g_.grad_q.n, grad_q_ + r * ldd_, a_.scale, a_.d);
      return;
    }
    const int64_t token = head.q0 + i;
    if (turned) keep_scaled(grad_q_, rows, ldd_, a_.scale, turned + turned_row(a_, g_, head.b, head.h, token) * ldd_);
    query_transform_.backward(q, a_.q.n, rows, head.b, head.h, token, a_.scale, grad_q_, ldd_, result, g_.grad_q.n,
                              sums);
  }

  void store_grid_gradient(const Head& head, int64_t i, int64_t rows) const {
    const GridBias& grid = *a_.grid;
    with_dtype(grid.dtype, [&](auto t) {
      using B = decltype(t);
      for (int64_t r = 0; r < rows; r++) {
        const float* sums = grid_sums_ + r * GridLayout::size(grid);
        const int64_t query = (head.b * a_.heads + head.h) * a_.nq + i + r;
        store_row(static_cast<B*>(g_.grad_rows) + query * grid.height, sums, 1.f, grid.height);
        store_row(static_cast<B*>(g_.grad_columns) + query * grid.width, sums + GridLayout::columns(grid), 1.f,
                  grid.width);
      }
    });
  }

  // delta and lse2, which is +inf for a row without keys so that P is 0. Returns whether a log-sum-exp is LARGE.
  bool statistics(const Head& head, int64_t i, int64_t rows, const T* dout, RowStatistics& of) {
    bool large = false;
    const T* out = head.query<T>(a_.out) + i * a_.out.n;
    const int64_t at = head.statistic(a_) + i;
    for (int64_t r = 0; r < rows; r++) {
      const T *o = out + r * a_.out.n, *g = dout + r * g_.grad_out.n;
      vf sum{};
      int64_t c = 0;
      for (; c + W <= a_.dv; c += W) sum += load(o + c) * load(g + c);
      if (c < a_.dv) sum += load_n(o + c, int(a_.dv - c)) * load_n(g + c, int(a_.dv - c));
      const float lse = a_.lse[at + r];
      of.delta[r] = reduce_add(sum) - (g_.grad_lse ? g_.grad_lse[at + r] : 0.f);
      of.lse2[r] = lse == -INF ? INF : lse * LOG2E;
      large |= std::fabs(lse) > LARGE && lse != -INF;
    }
    of.delta[rows] = of.lse2[rows] = of.top[rows] = of.log2_sum[rows] = 0.f;
    return large;
  }

  // top and log2_sum of every row, as the forward found them.
  void sum_again(const Head& head, int64_t i, int64_t rows, BiasRows& bias, const Scores& kind, RowStatistics& of) {
    const int64_t keys = a_.causal ? std::min(head.nk, i + rows) : head.nk, lanes = lanes_of<D>(a_.d);
    RowState state[RowStatistics::ROWS];
    for (int64_t j = 0; j < keys; j += KEY_BLOCK) {
      const int64_t n = std::min(KEY_BLOCK, keys - j), packed = std::min(KEY_BLOCK, head.nk - j);
      gemm<D>(rows, std::min(packed, round_up(n, NR)), lanes, queries_, lanes, 1, k_columns_.at(j), lanes, s_.scores,
              ld_);
      for (int64_t r = 0; r < rows; r++) {
        const int64_t valid = a_.causal ? std::clamp<int64_t>(i + r + 1 - j, 0, n) : n;
        float* s = s_.scores + r * ld_;
        row_exp<D>(s, n, valid, kind.unit, row_max(s, valid, bias.row(i + r, j, n), kind), state[r]);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      const bool empty = state[r].sum == 0.f;
      of.top[r] = empty ? 0.f : state[r].max;
      of.log2_sum[r] = empty ? INF : std::log2(state[r].sum);
    }
  }

  const Attention& a_;
  const AttentionGrad& g_;
  Scratch& memory_;
  int64_t block_, ld_, ldd_, ldv_;
  QkRows query_transform_, key_transform_;
  Panels k_columns_, v_columns_, k_rows_;
  uint32_t *queries_, *grads_out_, *query_rows_, *grad_rows_;
  float *grad_q_, *bias_, *grid_sums_ = nullptr, *grid_grads_ = nullptr;
  typename D::element* loaded_;
  Grads<D> s_;
};

template <class T>
void backward(const Attention& a, const AttentionGrad& g) {
  using D = Compute<T>;
  const Plan plan(a, g);
  const int64_t ldd = round_up(a.d, W), ldv = round_up(a.dv, W), width = ldd + ldv, slice = g.bias_q * g.bias_k;
  const int64_t chains = int64_t(plan.start.size()) - 1;
  // Partials are kept only where several pieces add up; else one buffer per thread is enough.
  std::vector<float> partials(plan.partials > 1 ? a.batch * a.kv_heads * plan.partials * a.nk * width : 0);
  std::vector<float> bias_partials(g.grad_bias ? chains * slice : 0);

  const bool normalized = a.transform && a.transform->norm != QkTransform::none, turned = g.grad_rope != nullptr;
  const int64_t sequences = a.cu_q ? 1 : a.batch;
  std::vector<float> q_sums(normalized ? a.batch * a.heads * plan.splits * 2 * ldd : 0);
  std::vector<float> k_sums(normalized ? a.batch * a.kv_heads * 2 * ldd : 0);
  std::vector<float> q_turned(turned ? sequences * a.heads * g.tokens * ldd : 0);
  std::vector<float> k_turned(turned ? sequences * a.kv_heads * g.tokens * ldd : 0);
  const auto part = [](std::vector<float>& of, int64_t at) { return of.empty() ? nullptr : of.data() + at; };

  auto write = [&](const QkRows& transform, const Head& head, float* grad_k, const float* grad_v) {
    T *dk = head.key<T>(g.grad_k, head.hk), *dv = head.key<T>(g.grad_v, head.hk);
    for (int64_t j = 0; j < head.nk; j++) store_row(dv + j * g.grad_v.n, grad_v + j * ldv, 1.f, a.dv);
    if (!transform.active()) {
      for (int64_t j = 0; j < head.nk; j++) store_row(dk + j * g.grad_k.n, grad_k + j * ldd, a.scale, a.d);
      return;
    }
    const int64_t token = head.k0, row = ((a.cu_k ? 0 : head.b) * a.kv_heads + head.hk) * g.tokens + token;
    if (turned) keep_scaled(grad_k, head.nk, ldd, a.scale, k_turned.data() + row * ldd);
    transform.backward(head.key<T>(a.k, head.hk), a.k.n, head.nk, head.b, head.hk, token, a.scale, grad_k, ldd, dk,
                       g.grad_k.n, part(k_sums, (head.b * a.kv_heads + head.hk) * 2 * ldd));
  };
  parallel_units(chains, [&](Queue& queue) {
    Backward<D, T> worker(a, g);
    std::vector<float> own(plan.partials > 1 ? 0 : a.nk * width);
    for (int64_t chain; (chain = queue.next()) >= 0;) {
      float* grad_bias = g.grad_bias ? bias_partials.data() + chain * slice : nullptr;
      for (int64_t at = plan.start[chain]; at < plan.start[chain + 1]; at++) {
        const int64_t piece = plan.order[at], split = piece % plan.splits;
        const Head head(a, piece / plan.splits / a.heads, piece / plan.splits % a.heads);
        const int64_t first = split * plan.rows, last = std::min(first + plan.rows, head.nq);
        float* grad_k = own.data();
        if (plan.partials > 1) {
          const int64_t of_head = (head.h % (a.heads / a.kv_heads)) * plan.splits + split;
          grad_k = partials.data() + ((head.b * a.kv_heads + head.hk) * plan.partials + of_head) * a.nk * width;
        } else {
          std::fill(own.begin(), own.end(), 0.f);
        }
        float* grad_v = grad_k + a.nk * ldd;
        if (first < last)
          worker.piece(head, first, last, grad_k, grad_v, grad_bias, part(q_turned, 0), part(q_sums, piece * 2 * ldd));
        if (plan.partials == 1) write(worker.key_transform(), head, grad_k, grad_v);
      }
    }
  });
  if (plan.partials > 1) {
    parallel_units(a.batch * a.kv_heads, [&](Queue& queue) {
      const QkRows transform(a.transform, true, a.d, scratch());
      for (int64_t unit; (unit = queue.next()) >= 0;) {
        float* sum = partials.data() + unit * plan.partials * a.nk * width;
        for (int64_t p = 1; p < plan.partials; p++)
          for (int64_t c = 0; c < a.nk * width; c += W)
            store(sum + c, load(sum + c) + load(sum + p * a.nk * width + c));
        const Head head(a, unit / a.kv_heads, unit % a.kv_heads * (a.heads / a.kv_heads));
        write(transform, head, sum, sum + a.nk * ldd);
      }
    });
  }
  if (g.grad_bias) reduce_bias(g, plan, bias_partials.data(), slice, a.bias.dtype);
  if (normalized) {
    reduce_norm(q_sums, a.d, ldd, g.grad_q_weight, g.grad_q_bias);
    reduce_norm(k_sums, a.d, ldd, g.grad_k_weight, g.grad_k_bias);
  }
  if (turned) reduce_angles<T>(a, g, q_turned.data(), k_turned.data());
}

}  // namespace

void attention_backward(const Attention& a, const AttentionGrad& g) {
  with_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a, g); });
}
}  // namespace pyvit::PYVIT_ISA
