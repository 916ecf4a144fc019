// One or two linear layers on rows, with what stands around them: a norm before, an activation or a gate after the
// first, LayerScale and the residual after the last. A block of rows goes through all of it in cache: of a feed-forward
// layer the hidden rows, four times as wide as the others, never reach memory.
#include "column_parts.h"
#include "gemm_epilogue.h"
#include "layer_norm.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Blocks of fewer rows read the weights from memory more often than is good, unless the rows are more than this many
// bytes in all.
constexpr int64_t FEW_ROWS = 64, MOST_SHARED = 4 << 20;

// Where a layer's values go: the next layer's operand, or the result. Passed by value: through a reference its members
// would be read again after every store.
template <class E>
struct Hidden {
  E* rows;
  int64_t ld;
  Hidden at(int64_t r, int64_t c) const { return {rows + r * ld + c, ld}; }
  void ahead(Prefetch&, int64_t, int64_t, int64_t, int64_t) const {}
  template <class N>
  void put(int64_t r, int64_t c, vf y, N) const {
    store(rows + r * ld + c, y);  // whole vectors: zeros behind the last column
  }
};
template <class T>
struct Result {
  T* rows;
  int64_t ld;
  const float* scale;
  const T* residual;
  Result at(int64_t r, int64_t c) const {
    return {rows + r * ld + c, ld, scale ? scale + c : nullptr, residual ? residual + r * ld + c : nullptr};
  }
  // What nobody has read yet comes while the tile is computed.
  void ahead(Prefetch& lines, int64_t r, int64_t high, int64_t c, int64_t width) const {
    lines.add(rows + r * ld + c, ld, high, width, true);
    if (residual) lines.add(residual + r * ld + c, ld, high, width, true);
  }
  template <class N>
  void put(int64_t r, int64_t c, vf y, N left) const {
    if (scale) y *= load(scale + c);
    if (residual) y += read(residual + r * ld + c, left);
    write(rows + r * ld + c, y, left);
  }
};

// Values of a panel of columns, each times the gate of its row and column, to where `To` puts them.
template <class To>
struct Times {
  const float* gates;  // rows of NR
  To to;
  void ahead(Prefetch& lines, int64_t r, int64_t high, int64_t c, int64_t width) const {
    to.ahead(lines, r, high, c, width);
  }
  template <class N>
  void put(int64_t r, int64_t c, vf y, N left) const {
    to.put(r, c, y * load(gates + r * NR + c), left);
  }
};

template <class D>
inline Panels panels(const Layer& layer) {
  return {layer.weight, lanes_of<D>(layer.in), layer.out};
}

// activation(a weight + bias), or with a gate activation(a gate + gate_bias) * (a weight + bias).
struct Step {
  Panels weight;
  const float* bias;
  const Activation::Kind* activation = nullptr;
  Panels gate = {};
  const float* gate_bias = nullptr;
  // Of the panel that begins at `col`.
  Step at(int64_t col) const {
    return {weight.at(col), bias + col, activation, gate.at(col), gate_bias ? gate_bias + col : nullptr};
  }
  Panels first() const { return gate.words ? gate : weight; }
};

// `step` of a block of rows. Gates of a panel of columns stay in cache, in `gates`, while its values are multiplied:
// both weights at once would be too much for L2.
template <class D, bool COARSE, class To>
inline void multiply(int64_t rows, const Rows& a, const Step& step, float* gates, const To to,
                     const Panels& then = {}) {
  if (!step.gate.words) return multiply<D, COARSE>(rows, a, step.weight, step.bias, step.activation, to, then);
  for (int64_t n = 0; n < step.weight.cols; n += NR) {
    const Step panel = step.at(n);
    multiply<D, COARSE>(rows, a, panel.gate, panel.gate_bias, panel.activation, Hidden<float>{gates, NR}, panel.weight);
    multiply<D, COARSE>(rows, a, panel.weight, panel.bias, nullptr, Times<To>{gates, to.at(0, n)},
                        n + NR < step.weight.cols ? step.gate.at(n + NR) : then);
  }
}

// One layer of all rows, a panel of columns at a time, or where panels are few a part of its rows. `then` is multiplied
// next.
template <class D, bool COARSE, class To>
void by_columns(int64_t rows, const Rows& a, const Step& step, const To to, const Panels& then = {}) {
  const int64_t count = (step.weight.cols + NR - 1) / NR, tiles = (rows + MR - 1) / MR, parts = parts_of(count, tiles),
                high = (tiles + parts - 1) / parts * MR;
  const Panels all = step.first();
  parallel_units(count * parts, [&](Queue& queue) {
    float* gates = step.gate.words ? scratch().take<float>(std::min(high, rows) * NR) : nullptr;
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t c = unit / parts * NR, r = unit % parts * high;
      if (r >= rows) continue;
      const Rows from{a.lanes + r / MR * a.tile, a.tile, a.row, a.k};
      const int64_t next = (unit + threads.count()) / parts;  // this thread's next panel, most probably
      const Panels coming = next * NR == c ? Panels{} : next < count ? all.at(next * NR) : then.at((next - count) * NR);
      multiply<D, COARSE>(std::min(high, rows - r), from, step.at(c), gates, to.at(r, c), coming);
    }
  });
}

// A norm with its parameters as float32.
struct Normalizer {
  const FusedNorm& norm;
  const float *weight = nullptr, *bias = nullptr;
  Normalizer(const FusedNorm& given, int64_t n, Scratch& memory) : norm(given) {
    if (!norm) return;
    weight = widened(norm.weight, norm.dtype, n, 1.f, memory);
    bias = widened(norm.bias, norm.dtype, n, 0.f, memory);
  }
  // y, which may be x, of `rows` rows of n.
  template <class X, class Y>
  void operator()(int64_t rows, int64_t n, const X* x, int64_t ldx, Y* y, int64_t ldy) const {
    norm.rms ? by_rows<false>(rows, n, x, ldx, y, ldy) : by_rows<true>(rows, n, x, ldx, y, ldy);
  }

 private:
  template <bool CENTERED, class X, class Y>
  void by_rows(int64_t rows, int64_t n, const X* x, int64_t ldx, Y* y, int64_t ldy) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      normalize<4, CENTERED>(n, x + r * ldx, ldx, weight, bias, norm.eps, y + r * ldy, ldy, nullptr, nullptr);
    for (; r < rows; r++)
      normalize<1, CENTERED>(n, x + r * ldx, ldx, weight, bias, norm.eps, y + r * ldy, ldy, nullptr, nullptr);
  }
};

template <class T>
void run(const FusedLinear& a) {
  using D = Compute<T>;
  using E = typename D::element;
  constexpr bool COARSE = sizeof(T) == 2;
  const Layer &first = a.first, &last = a.second.weight ? a.second : a.first;
  const bool two = a.second.weight, gated = a.gate.weight;
  Scratch& common = shared();
  const float* bias1 = widened(first.bias, a.dtype, first.out, 0.f, common);
  const float* bias2 = widened(last.bias, a.dtype, last.out, 0.f, common);
  const float* scale = widened(a.scale, a.dtype, last.out, 1.f, common);
  const float* gate_bias = gated ? widened(a.gate.bias, a.dtype, first.out, 0.f, common) : nullptr;
  const Normalizer norm(a.norm, first.in, common), hidden_norm(a.hidden_norm, first.out, common);

  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out);
  // Rows are multiplied where they lie if they lie there as lanes.
  const bool in_place = !a.norm && std::is_same_v<T, E> && first.in % D::K == 0 && uintptr_t(x) % 4 == 0;
  const int64_t lanes = lanes_of<D>(first.in), hidden_ld = two ? round_up(first.out, W) : 0,
                row_bytes = lanes * 4 + hidden_ld * int64_t(sizeof(E)) + (gated ? NR * 4 : 0),
                block = rows_of_block(a.rows, row_bytes);
  const Step step1{panels<D>(first), bias1, a.activated ? &a.activation : nullptr, gated ? panels<D>(a.gate) : Panels{},
                   gate_bias};
  const Step step2{panels<D>(last), bias2};

  const auto operand = [&](int64_t row, int64_t rows, uint32_t* packed) {
    const T* from = x + row * first.in;
    if (in_place) return reinterpret_cast<const uint32_t*>(from);
    if (a.norm) {
      E* to = reinterpret_cast<E*>(packed);
      const int64_t ld = lanes * D::K;
      norm(rows, first.in, from, first.in, to, ld);
      if (first.in < ld)
        for (int64_t r = 0; r < rows; r++) to[r * ld + first.in] = E{};
    } else {
      pack_a<D>(from, first.in, rows, first.in, packed);
    }
    return static_cast<const uint32_t*>(packed);
  };
  const auto result = [&](int64_t row) {
    return Result<T>{out + row * last.out, last.out, a.scale ? scale : nullptr,
                     residual ? residual + row * last.out : nullptr};
  };

  // Of few rows the weights are most of what is read: each thread takes columns, so that none are read twice.
  if (block < FEW_ROWS && a.rows * row_bytes <= MOST_SHARED) {
    uint32_t* packed = common.take<uint32_t>(in_place ? 0 : a.rows * lanes);
    E* hidden = common.take<E>(a.rows * hidden_ld);
    constexpr int64_t SOME = 8;
    if (!in_place)
      parallel_units((a.rows + SOME - 1) / SOME, [&](Queue& queue) {
        for (int64_t unit; (unit = queue.next()) >= 0;)
          operand(unit * SOME, std::min(SOME, a.rows - unit * SOME), packed + unit * SOME * lanes);
      });
    const Rows rows = rows_along(in_place ? reinterpret_cast<const uint32_t*>(x) : packed, lanes);
    if (!two) return by_columns<D, COARSE>(a.rows, rows, step1, result(0));
    by_columns<D, COARSE>(a.rows, rows, step1, Hidden<E>{hidden, hidden_ld}, step2.weight);
    if (a.hidden_norm)
      parallel_units((a.rows + SOME - 1) / SOME, [&](Queue& queue) {
        for (int64_t unit; (unit = queue.next()) >= 0;) {
          E* from = hidden + unit * SOME * hidden_ld;
          hidden_norm(std::min(SOME, a.rows - unit * SOME), first.out, from, hidden_ld, from, hidden_ld);
        }
      });
    by_columns<D, COARSE>(a.rows, rows_along(reinterpret_cast<const uint32_t*>(hidden), hidden_ld / D::K), step2,
                          result(0));
    return;
  }

  parallel_units((a.rows + block - 1) / block, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* packed = memory.take<uint32_t>(in_place ? 0 : block * lanes);
    E* hidden = memory.take<E>(block * hidden_ld);
    float* gates = gated ? memory.take<float>(block * NR) : nullptr;
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t row = unit * block, rows = std::min(block, a.rows - row);
      const Rows of_first = rows_along(operand(row, rows, packed), lanes);
      if (!two) {
        multiply<D, COARSE>(rows, of_first, step1, nullptr, result(row));
        continue;
      }
      multiply<D, COARSE>(rows, of_first, step1, gates, Hidden<E>{hidden, hidden_ld});
      if (a.hidden_norm) hidden_norm(rows, first.out, hidden, hidden_ld, hidden, hidden_ld);
      const Rows of_last = rows_along(reinterpret_cast<const uint32_t*>(hidden), hidden_ld / D::K);
      multiply<D, COARSE>(rows, of_last, step2, nullptr, result(row));
    }
  });
}

}  // namespace

void fused_linear(const FusedLinear& a) {
  switch (a.dtype) {
    case Dtype::bf16:
      return run<bf16>(a);
    case Dtype::f16:
      return run<f16>(a);
    default:
      return run<float>(a);
  }
}

int64_t packed_layer_size(int64_t in, int64_t out, Dtype dtype) {
  return dtype == Dtype::bf16 ? packed_size<Compute<bf16>>(in, out) : packed_size<F32>(in, out);
}

void pack_layer(const void* weight, int64_t in, int64_t out, Dtype dtype, uint32_t* packed) {
  switch (dtype) {
    case Dtype::bf16:
      return pack_cols<Compute<bf16>>(static_cast<const bf16*>(weight), in, in, out, packed);
    case Dtype::f16:
      return pack_cols<F32>(static_cast<const f16*>(weight), in, in, out, packed);
    default:
      return pack_cols<F32>(static_cast<const float*>(weight), in, in, out, packed);
  }
}

}  // namespace pyvit::PYVIT_ISA
