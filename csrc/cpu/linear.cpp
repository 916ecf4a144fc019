// One or two linear layers on rows, with what stands around them: layer norm before, an activation after the first,
// LayerScale and the residual after the last. A block of rows goes through all of it in cache: of a feed-forward
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

template <class D>
inline Panels panels(const Layer& layer) {
  return {layer.weight, lanes_of<D>(layer.in), layer.out};
}

// One layer of all rows, a panel of columns at a time, or where panels are few a part of its rows. `then` is multiplied
// next.
template <class D, bool COARSE, class To>
void by_columns(int64_t rows, const Rows& a, const Layer& layer, const float* bias, const Activation::Kind* activation,
                const To to, const Panels& then = {}) {
  const int64_t count = (layer.out + NR - 1) / NR, tiles = (rows + MR - 1) / MR, parts = parts_of(count, tiles),
                high = (tiles + parts - 1) / parts * MR;
  const Panels all = panels<D>(layer);
  parallel_units(count * parts, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t c = unit / parts * NR, r = unit % parts * high;
      if (r >= rows) continue;
      const Rows from{a.lanes + r / MR * a.tile, a.tile, a.row, a.k};
      const int64_t next = (unit + threads.count()) / parts;  // this thread's next panel, most probably
      const Panels coming = next * NR == c ? Panels{} : next < count ? all.at(next * NR) : then.at((next - count) * NR);
      multiply<D, COARSE>(std::min(high, rows - r), from, all.at(c), bias + c, activation, to.at(r, c), coming);
    }
  });
}

template <class T>
void run(const FusedLinear& a) {
  using D = Compute<T>;
  using E = typename D::element;
  constexpr bool COARSE = sizeof(T) == 2;
  const Layer &first = a.first, &last = a.second.weight ? a.second : a.first;
  const bool two = a.second.weight;
  Scratch& common = shared();
  const float* bias1 = widened(first.bias, a.dtype, first.out, 0.f, common);
  const float* bias2 = widened(last.bias, a.dtype, last.out, 0.f, common);
  const float* scale = widened(a.scale, a.dtype, last.out, 1.f, common);
  const float* norm_weight = a.norm ? widened(a.norm_weight, a.norm_dtype, first.in, 1.f, common) : nullptr;
  const float* norm_bias = a.norm ? widened(a.norm_bias, a.norm_dtype, first.in, 0.f, common) : nullptr;

  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out);
  // Rows are multiplied where they lie if they lie there as lanes.
  const bool in_place = !a.norm && std::is_same_v<T, E> && first.in % D::K == 0 && uintptr_t(x) % 4 == 0;
  const int64_t lanes = lanes_of<D>(first.in), hidden_ld = two ? round_up(first.out, W) : 0,
                row_bytes = lanes * 4 + hidden_ld * int64_t(sizeof(E)), block = rows_of_block(a.rows, row_bytes);
  const auto* activation = a.activated ? &a.activation : nullptr;

  const auto operand = [&](int64_t row, int64_t rows, uint32_t* packed) {
    const T* from = x + row * first.in;
    if (in_place) return reinterpret_cast<const uint32_t*>(from);
    if (a.norm) {
      E* to = reinterpret_cast<E*>(packed);
      const int64_t ld = lanes * D::K;
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        normalize<4>(first.in, from + r * first.in, first.in, norm_weight, norm_bias, a.eps, to + r * ld, ld, nullptr,
                     nullptr);
      for (; r < rows; r++)
        normalize<1>(first.in, from + r * first.in, first.in, norm_weight, norm_bias, a.eps, to + r * ld, ld, nullptr,
                     nullptr);
      if (first.in < ld)
        for (r = 0; r < rows; r++) to[r * ld + first.in] = E{};
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
    if (!two) return by_columns<D, COARSE>(a.rows, rows, first, bias1, activation, result(0));
    by_columns<D, COARSE>(a.rows, rows, first, bias1, activation, Hidden<E>{hidden, hidden_ld}, panels<D>(last));
    by_columns<D, COARSE>(a.rows, rows_along(reinterpret_cast<const uint32_t*>(hidden), hidden_ld / D::K), last, bias2,
                          nullptr, result(0));
    return;
  }

  parallel_units((a.rows + block - 1) / block, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* packed = memory.take<uint32_t>(in_place ? 0 : block * lanes);
    E* hidden = memory.take<E>(block * hidden_ld);
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t row = unit * block, rows = std::min(block, a.rows - row);
      const Rows of_first = rows_along(operand(row, rows, packed), lanes);
      if (!two) {
        multiply<D, COARSE>(rows, of_first, panels<D>(first), bias1, activation, result(row));
        continue;
      }
      multiply<D, COARSE>(rows, of_first, panels<D>(first), bias1, activation, Hidden<E>{hidden, hidden_ld});
      const Rows of_last = rows_along(reinterpret_cast<const uint32_t*>(hidden), hidden_ld / D::K);
      multiply<D, COARSE>(rows, of_last, panels<D>(last), bias2, nullptr, result(row));
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
