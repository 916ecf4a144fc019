// linear.cpp with int8 weights: each row that is multiplied is first brought to 8 bits, with a scale and a zero point
// of its own. A block of rows goes through both layers in cache: neither the sums nor the hidden rows reach memory.
#include "column_parts.h"
#include "int8_args.h"
#include "int8_tile.h"
#include "reproducible.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Where blocks of rows have fewer, and all rows are at most this many bytes, threads share the columns instead.
constexpr int64_t FEW_ROWS = 4 * MR, MOST_SHARED = 4 << 20;

// Rows of integers that a product reads.
struct Quantized {
  Dot::element* values = nullptr;
  int64_t ld = 0;  // in lanes
  int32_t* zero = nullptr;
  float* scale = nullptr;
  Quantized(int64_t rows, int64_t k, Scratch& memory) {
    if (!k) return;
    ld = round_up(k, W) / Dot::K;  // whole vectors
    values = memory.take<Dot::element>(rows * ld * Dot::K);
    zero = memory.take<int32_t>(rows);
    scale = memory.take<float>(rows);
  }
  static int64_t row_bytes(int64_t k) { return k * int64_t(sizeof(Dot::element)); }
  Quantized at(int64_t row) const {
    Quantized rows = *this;
    rows.values += row * ld * Dot::K;
    rows.zero += row;
    rows.scale += row;
    return rows;
  }
  operator Int8Rows() const { return {reinterpret_cast<const uint32_t*>(values), ld, zero, scale}; }
};

// A row to integers q in 0 .. 255: its range, widened to contain 0, is divided into 255 steps, and q is x / step + z
// rounded to the nearest, ties to even. Of a row whose range is not finite the scale is NaN. One whose range is below
// 2^-118 counts as zeros, whose products are 0.
template <class X>
inline void quantize_row(int64_t k, const X* x, const Quantized& to, int64_t row) {
  vf low{}, high{};
  vi top{};  // the largest magnitude by its bits: those of infinity and NaN are above all others
  vectors(k, [&](int64_t c, int n) {
    const vf v = read(x + c, n);
    low = vmin(v, low);
    high = vmax(v, high);
    const vi bits = (vi)vabs(v);
    top = bits > top ? bits : top;
  });
  int32_t largest = 0;
  for (int i = 0; i < W; i++) largest = std::max<int32_t>(largest, top[i]);
  const float most = reduce_max(high), least = -reduce_max(-low), range = most - least;
  const bool finite = largest < 0x7f800000 && range < INF, some = finite && range >= 0x1p-118f;
  const float inverse = some ? 255.f / range : 0.f;
  const float zero = some ? (-least * inverse + TO_INTEGER) - TO_INTEGER : 0.f;
  to.scale[row] = some ? range / 255.f : finite ? 0.f : std::numeric_limits<float>::quiet_NaN();
  to.zero[row] = int32_t(zero);
  Dot::element* out = to.values + row * to.ld * Dot::K;
  vectors(k, [&](int64_t c, int n) {
    vi q = (vi)(read(x + c, n) * inverse + (TO_INTEGER + zero));
    const vi last = set1i(INTEGER_ZERO + 255);
    q = q < last ? q : last;
    if constexpr (Dot::SHIFTED) {  // the low byte
#if defined(__AVX512F__)
      store_as(out + c, _mm512_cvtepi32_epi8((__m512i)q));
#else
      typedef uint8_t Bytes __attribute__((vector_size(W)));
      store_as(out + c, __builtin_convertvector((vu)q, Bytes));
#endif
    } else {
      typedef int16_t Halves __attribute__((vector_size(2 * W)));
      store_as(out + c, __builtin_convertvector(q - set1i(INTEGER_ZERO + int32_t(zero)), Halves));
    }
  });
}

// Where a layer's values go: rows that are brought to 8 bits next, or the result.
struct Hidden {
  float* rows;
  int64_t ld;
  Hidden at(int64_t r, int64_t c) const { return {rows + r * ld + c, ld}; }
  void ahead(Prefetch&, int64_t, int64_t, int64_t, int64_t) const {}
  template <class N>
  void put(int64_t r, int64_t c, vf y, N) const {
    store(rows + r * ld + c, y);
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

// A layer as it is multiplied: scales of its columns and biases as float32.
struct Int8Layer {
  Int8Panels panels;
  const float *scale, *bias;
  const Activation::Kind* activation;
};

// to.put(activation(sum * scale of the column * scale of the row + bias)) of a tile, in this order.
template <class Y, class N, class To>
inline void finish_tile(int64_t row, int64_t high, int64_t col, N width, const int32_t* tile, const float* row_scale,
                        const float* scale, const float* bias, const To to) {
  const auto value = [&](int64_t i, const int32_t* sums, vf s, vf b) {
    return Y::value(__builtin_convertvector(load_as<vi>(sums), vf) * s * row_scale[i] + b);
  };
  if constexpr (std::is_same_v<N, int64_t>) {
    for (int64_t i = 0; i < high; i++)
      vectors(width, [&](int64_t v, int left) {
        to.put(row + i, col + v, value(i, tile + i * NR + v, load(scale + v), load(bias + v)), left);
      });
  } else {
    vf s[NV], b[NV];
    for (int v = 0; v < NV; v++) {
      s[v] = load(scale + v * W);
      b[v] = load(bias + v * W);
    }
    for (int64_t i = 0; i < high; i++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++)
        to.put(row + i, col + v * W, value(i, tile + i * NR + v * W, s[v], b[v]), std::integral_constant<int, W>{});
  }
}

// A line in every step: a tile has a quarter of the steps of one of floats. Three of a panel, and one of what
// Prefetch::add lists.
struct DensePrefetch {
  Prefetch& lines;
  void operator()(int64_t k) const { lines(k & 3 ? 1 : 0); }
};

// A block of rows times a layer, in `to`. Each panel is fetched while the one before it is multiplied, and at the last
// the panel `then`.
template <class To>
void multiply(int64_t rows, const Int8Rows& a, const Int8Layer& layer, const To to, const Int8Panels& then = {}) {
  alignas(64) int32_t tile[MR * NR];
  Prefetch ahead;
  const DensePrefetch step{ahead};
  const Int8Panels& b = layer.panels;
  for (int64_t n = 0; n < b.cols; n += NR) {
    const Int8Panels panel = b.at(n), next = n + NR < b.cols ? b.at(n + NR) : then;
    const int64_t width = panel.cols, tiles = (rows + MR - 1) / MR, next_lines = next.cols ? next.lines() : 0;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(next.bytes);
    for (int64_t m = 0; m < rows; m += MR) {
      const int64_t high = std::min<int64_t>(MR, rows - m), i = m / MR;
      const bool below = m + MR < rows;
      const int64_t next_m = below ? m + MR : 0, next_n = below ? n : n + NR;
      ahead.clear();
      if (next_n < b.cols)
        to.ahead(ahead, next_m, std::min<int64_t>(MR, rows - next_m), next_n, std::min<int64_t>(NR, b.cols - next_n));
      ahead.panel(words + next_lines * i / tiles * 16, words + next_lines * (i + 1) / tiles * 16);
      int8_tile_panel(int(high), {a.lanes + m * a.ld, a.ld, a.zero + m, a.scale + m}, panel, tile, step);
      with_ordered_activation(layer.activation, [&](auto y) {
        using Y = decltype(y);
        const float *scale = layer.scale + n, *bias = layer.bias + n, *row_scale = a.scale + m;
        width == NR
            ? finish_tile<Y>(m, high, n, std::integral_constant<int64_t, NR>{}, tile, row_scale, scale, bias, to)
            : finish_tile<Y>(m, high, n, width, tile, row_scale, scale, bias, to);
      });
    }
  }
}

// One layer of all rows, a panel of columns at a time, or where panels are few a part of its rows. `then` is multiplied
// next.
template <class To>
void by_columns(int64_t rows, const Quantized& a, const Int8Layer& layer, const To to, const Int8Panels& then = {}) {
  const int64_t count = (layer.panels.cols + NR - 1) / NR, tiles = (rows + MR - 1) / MR, parts = parts_of(count, tiles),
                high = (tiles + parts - 1) / parts * MR;
  parallel_units(count * parts, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t c = unit / parts * NR, r = unit % parts * high;
      if (r >= rows) continue;
      const int64_t next = (unit + threads.count()) / parts;  // this thread's next panel, most probably
      const Int8Panels coming = next * NR == c ? Int8Panels{}
                                : next < count ? layer.panels.at(next * NR)
                                               : then.at((next - count) * NR);
      const Int8Layer panel{layer.panels.at(c), layer.scale + c, layer.bias + c, layer.activation};
      multiply(std::min(high, rows - r), a.at(r), panel, to.at(r, c), coming);
    }
  });
}

// Rows of a block, whole tiles of them, so that the thread with the most rows has few.
int64_t rows_of_int8_block(int64_t rows, int64_t row_bytes) {
  const int64_t most = std::clamp<int64_t>(BLOCK_BYTES / row_bytes / MR * MR, MR, MOST_ROWS), count = threads.count();
  if (rows >= 32 * count * most) return most;
  const auto longest = [&](int64_t block) {
    const int64_t whole = rows / block, rest = round_up(rows % block, MR);
    return whole % count ? (whole + count - 1) / count * block : whole / count * block + rest;
  };
  int64_t best = most;
  for (int64_t block = most - MR; block >= MR; block -= MR)
    if (longest(block) < longest(best)) best = block;
  return best;
}

template <class T>
void run(const Int8Linear& call) {
  const FusedLinear& a = call.linear;
  const Layer &first = a.first, &last = a.second.weight ? a.second : a.first;
  const bool two = a.second.weight;
  Scratch& common = shared();
  const auto layer = [&](const Layer& of, const float* scale, bool activated) {
    return Int8Layer{Int8Panels(of.weight, of.in, of.out), widened(scale, Dtype::f32, of.out, 1.f, common),
                     widened(of.bias, a.dtype, of.out, 0.f, common), activated ? &a.activation : nullptr};
  };
  const Int8Layer layer1 = layer(first, call.first, a.activated),
                  layer2 = two ? layer(last, call.second, false) : layer1;
  const float* scale = widened(a.scale, a.dtype, last.out, 1.f, common);
  const float* norm_weight = a.norm ? widened(a.norm.weight, a.norm.dtype, first.in, 1.f, common) : nullptr;
  const float* norm_bias = a.norm ? widened(a.norm.bias, a.norm.dtype, first.in, 0.f, common) : nullptr;

  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  const int64_t k = first.in, hidden = two ? round_up(first.out, W) : 0, normed_ld = round_up(k, W),
                row_bytes = Quantized::row_bytes(k) + (two ? hidden * 4 + Quantized::row_bytes(last.in) : 0),
                block = rows_of_int8_block(a.rows, row_bytes);
  constexpr int R = 4;
  const auto normed_rows = [&](Scratch& memory) { return a.norm ? memory.take<float>(R * normed_ld) : nullptr; };
  const auto operand = [&](int64_t row, int64_t rows, float* normed, const Quantized& to) {
    const T* from = x + row * k;
    int64_t r = 0;
    const auto some = [&](auto count) {
      ordered_layer_norm<count()>(k, from + r * k, k, norm_weight, norm_bias, a.norm.eps, normed, normed_ld);
      for (int i = 0; i < count(); i++) quantize_row(k, normed + i * normed_ld, to, r + i);
    };
    if (a.norm) {
      for (; r + R <= rows; r += R) some(std::integral_constant<int, R>{});
      for (; r < rows; r++) some(std::integral_constant<int, 1>{});
    } else {
      for (; r < rows; r++) quantize_row(k, from + r * k, to, r);
    }
  };
  const auto result = [&](int64_t row) {
    return Result<T>{static_cast<T*>(a.out) + row * last.out, last.out, a.scale ? scale : nullptr,
                     residual ? residual + row * last.out : nullptr};
  };

  if (block < FEW_ROWS && a.rows * row_bytes <= MOST_SHARED) {
    const Quantized rows1(a.rows, k, common), rows2(a.rows, two ? last.in : 0, common);
    const Hidden between{common.take<float>(a.rows * hidden), hidden};
    // f(first row, rows) for a few rows at a time, on all threads.
    const auto in_parts = [&](const auto& f) {
      constexpr int64_t SOME = 2 * R;
      parallel_units((a.rows + SOME - 1) / SOME, [&](Queue& queue) {
        float* normed = normed_rows(scratch());
        for (int64_t unit; (unit = queue.next()) >= 0;)
          f(unit * SOME, std::min<int64_t>(SOME, a.rows - unit * SOME), normed);
      });
    };
    in_parts([&](int64_t row, int64_t rows, float* normed) { operand(row, rows, normed, rows1.at(row)); });
    if (!two) return by_columns(a.rows, rows1, layer1, result(0));
    by_columns(a.rows, rows1, layer1, between, layer2.panels);
    in_parts([&](int64_t row, int64_t rows, float*) {
      for (int64_t r = row; r < row + rows; r++) quantize_row(last.in, between.rows + r * hidden, rows2, r);
    });
    by_columns(a.rows, rows2, layer2, result(0));
    return;
  }

  parallel_units((a.rows + block - 1) / block, [&](Queue& queue) {
    Scratch& memory = scratch();
    float* normed = normed_rows(memory);
    const Quantized rows1(block, k, memory), rows2(block, two ? last.in : 0, memory);
    const Hidden between{memory.take<float>(block * hidden), hidden};
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t row = unit * block, rows = std::min(block, a.rows - row);
      operand(row, rows, normed, rows1);
      if (!two) {
        multiply(rows, rows1, layer1, result(row), layer1.panels.at(0));
        continue;
      }
      multiply(rows, rows1, layer1, between, layer2.panels.at(0));
      for (int64_t r = 0; r < rows; r++) quantize_row(last.in, between.rows + r * hidden, rows2, r);
      multiply(rows, rows2, layer2, result(row), layer1.panels.at(0));
    }
  });
}

void fused_linear(const Int8Linear& a) {
  switch (a.linear.dtype) {
    case Dtype::bf16:
      return run<bf16>(a);
    case Dtype::f16:
      return run<f16>(a);
    default:
      return run<float>(a);
  }
}

}  // namespace

const Int8Kernels& int8_table() {
  static const Int8Kernels kernels{int8_packed_words, int8_pack, fused_linear};
  return kernels;
}

}  // namespace pyvit::PYVIT_ISA
