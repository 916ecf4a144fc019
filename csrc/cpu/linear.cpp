// One or two linear layers on rows, with what stands around them: layer norm before, an activation after the first,
// LayerScale and the residual after the last. A block of rows goes through all of it in cache: of a feed-forward
// layer the hidden rows, four times as wide as the others, never reach memory.
#include "block.h"
#include "layer_norm.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Where a layer's values go: the next layer's operand, or the result. Passed by value: through a reference its members
// would be read again after every store.
template <class E>
struct Hidden {
  E* rows;
  int64_t ld;
  void ahead(ComingLines&, int64_t, int64_t, int64_t, int64_t) const {}
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
  // What nobody has read yet comes while the tile is computed.
  void ahead(ComingLines& lines, int64_t r, int64_t high, int64_t c, int64_t width) const {
    lines.add(rows + r * ld + c, ld, high, width);
    if (residual) lines.add(residual + r * ld + c, ld, high, width);
  }
  template <class N>
  void put(int64_t r, int64_t c, vf y, N left) const {
    if (scale) y *= load(scale + c);
    if (residual) y += read(residual + r * ld + c, left);
    write(rows + r * ld + c, y, left);
  }
};

template <class T>
void run(const Layers& a) {
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
  const int64_t lanes = lanes_of<D>(first.in), hidden_ld = two ? round_up(first.out, W) : 0;
  const int64_t block = rows_of_block(a.rows, lanes * 4 + hidden_ld * int64_t(sizeof(E)));

  parallel_units((a.rows + block - 1) / block, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* packed = memory.take<uint32_t>(in_place ? 0 : block * lanes);
    E* hidden = memory.take<E>(block * hidden_ld);
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t row = unit * block, rows = std::min(block, a.rows - row);
      const T* from = x + row * first.in;
      const uint32_t* operand = packed;
      if (in_place) {
        operand = reinterpret_cast<const uint32_t*>(from);
      } else if (a.norm) {
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

      const Result<T> result{out + row * last.out, last.out, a.scale ? scale : nullptr,
                             residual ? residual + row * last.out : nullptr};
      const auto* activation = a.activated ? &a.activation : nullptr;
      const auto columns = [](const Layer& layer) { return Panels{layer.weight, lanes_of<D>(layer.in), layer.out}; };
      const Rows rows_of_first = rows_along(operand, lanes);
      if (!two) {
        multiply<D, COARSE>(rows, rows_of_first, columns(first), bias1, activation, result);
        continue;
      }
      multiply<D, COARSE>(rows, rows_of_first, columns(first), bias1, activation, Hidden<E>{hidden, hidden_ld});
      const Rows rows_of_last = rows_along(reinterpret_cast<const uint32_t*>(hidden), hidden_ld / D::K);
      multiply<D, COARSE>(rows, rows_of_last, columns(last), bias2, nullptr, result);
    }
  });
}

}  // namespace

void layers(const Layers& a) {
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
