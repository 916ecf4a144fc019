// One or two linear layers on rows, with what stands around them: layer norm before, an activation after the first,
// LayerScale and the residual after the last. A block of rows goes through all of it in cache: of a feed-forward
// layer the hidden rows, four times as wide as the others, never reach memory.
#include "activation.h"
#include "gemm_tile.h"
#include "layer_norm.h"

namespace pyvit::PYVIT_ISA {
namespace {

// What a block's rows may take of L2, beside the panels of weights that stream through it.
constexpr int64_t BLOCK_BYTES = 512 << 10, MOST_ROWS = 32 * MR;

// Rows of one unit of work. Few rows are shared out evenly; a row's result does not depend on it.
inline int64_t rows_of_block(const Layers& a, int64_t row_bytes) {
  const int64_t most = std::clamp<int64_t>(BLOCK_BYTES / row_bytes / MR * MR, MR, MOST_ROWS);
  const int64_t threads = ::pyvit::threads.count(), units = (a.rows + most - 1) / most;
  if (units >= 32 * threads) return most;
  const int64_t even = round_up(units, threads);
  return std::max<int64_t>((a.rows + even - 1) / even, 1);
}

// Cache lines to fetch in the course of a tile. All at once they would hold up its loads.
class ComingLines {
 public:
  void clear() { count_ = 0; }
  template <class T>
  void add(const T* first, int64_t ld, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++) {
      const char* row = reinterpret_cast<const char*>(first + i * ld);
      for (int64_t b = 0; b < cols * int64_t(sizeof(T)) && count_ < MOST; b += 64) line_[count_++] = row + b;
    }
  }
  bool over() const { return !count_; }
  void operator()(int64_t k) {
    if (count_ && !(k & 3)) __builtin_prefetch(line_[--count_], 1, 3);
  }

 private:
  static constexpr int MOST = 2 * MR * NR / 16;  // two tiles of float32
  const char* line_[MOST];
  int count_ = 0;
};

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

// to.put(activation(tile + bias)), of `high` rows from `row` and NR columns, or `width`, from `col`.
template <class N, class To, class F>
inline void finish(int64_t row, int64_t high, int64_t col, N width, const float* tile, const float* bias, const To to,
                   const F& value) {
  if constexpr (std::is_same_v<N, int64_t>) {
    for (int64_t i = 0; i < high; i++)
      vectors(width, [&](int64_t v, int left) {
        to.put(row + i, col + v, value(load(tile + i * NR + v) + load(bias + col + v)), left);
      });
  } else {
    vf b[NV];
    for (int v = 0; v < NV; v++) b[v] = load(bias + col + v * W);
    for (int64_t i = 0; i < high; i++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++)
        to.put(row + i, col + v * W, value(load(tile + i * NR + v * W) + b[v]), std::integral_constant<int, W>{});
  }
}

// One layer of a block of rows, a (rows x lanes) against packed weights. A tile is finished while it is in L1.
template <class D, bool COARSE, class To>
inline void multiply(int64_t rows, const Layer& layer, const uint32_t* a, int64_t a_row, const float* bias,
                     const Activation::Kind* activation, const To to) {
  alignas(64) float tile[MR * NR];
  const int64_t lanes = lanes_of<D>(layer.in);
  ComingLines ahead;
  const auto end = [&](int64_t m, int64_t high, int64_t n, auto width) {
    if (!activation) return finish(m, high, n, width, tile, bias, to, [](vf y) { return y; });
    with_activation<COARSE>(*activation,
                            [&](auto y) { finish(m, high, n, width, tile, bias, to, decltype(y)::value); });
  };
  for (int64_t n = 0; n < layer.out; n += NR) {
    const int64_t width = std::min<int64_t>(NR, layer.out - n);
    const uint32_t* panel = layer.weight + n * lanes;
    for (int64_t m = 0; m < rows; m += MR) {
      const int64_t high = std::min<int64_t>(MR, rows - m);
      ahead.clear();
      to.ahead(ahead, m, high, n, width);
      tile_panel<D, false>(int(high), round_up(width, W), a + m * a_row, a_row, 1, panel, lanes, tile, NR, ahead);
      width == NR ? end(m, high, n, std::integral_constant<int64_t, NR>{}) : end(m, high, n, width);
    }
  }
}

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
  const int64_t block = rows_of_block(a, lanes * 4 + hidden_ld * int64_t(sizeof(E)));

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
      if (!two) {
        multiply<D, COARSE>(rows, first, operand, lanes, bias1, activation, result);
        continue;
      }
      multiply<D, COARSE>(rows, first, operand, lanes, bias1, activation, Hidden<E>{hidden, hidden_ld});
      multiply<D, COARSE>(rows, last, reinterpret_cast<const uint32_t*>(hidden), hidden_ld / D::K, bias2, nullptr,
                          result);
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
