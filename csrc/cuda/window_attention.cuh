// Windows of a feature map as a Problem of attention.cuh. Shift, partition, padding, the relative-position bias, the
// shift mask and the reverse are index arithmetic on the (B, H, W, 3C) map: no window, index or mask tensor exists.
//
// Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022: cosine attention).
#pragma once

#include "attention.cuh"

namespace pyvit::cuda {

// Where a token of a window lies on the map, after the cyclic shift, and its query of the head at hand, or null.
// Padding has its column's complement.
template <class T>
struct alignas(16) TokenOf {
  const T* q;
  int y, x;

  PYVIT_DEVICE bool real() const { return x >= 0; }
};

template <class Element>
struct Windows {
  using T = Element;
  using Params = WindowGradient;
  using Token = TokenOf<T>;
  // What a score needs of a token: its place in the bias table's index arithmetic, and which tokens do not attend to
  // it: those of another region, and none to padding, where that is masked, or beyond the window.
  struct Code {
    int place, flags;  // the place in bytes
  };
  struct alignas(16) CodePair {
    Code at[2];
  };
  static constexpr int kRegion = 3, kPadding = 4, kBeyond = 8;

  const Params& p;
  int head = 0, nq, nk, d, dv;
  float scale = 0.0f;
  int rows, columns, shift_y, shift_x, down, across, center, table_rows;
  uint32_t row_factor;
  int found = -2, window_y = 0, window_x = 0, found_image = 0;  // whose tokens were found last
  int index = 0, image = 0;                                     // the window at hand
  bool edge = false;                                            // some of its tokens do not attend to some others
  char* found_tokens = nullptr;                                 // of one window or two
  const Token* tokens = nullptr;
  const Code* codes = nullptr;
  float* table = nullptr;

  PYVIT_DEVICE Windows(const Params& params, int first_head) : p(params) {
    const Window& w = p.forward;
    nq = nk = w.window_h * w.window_w;
    d = dv = w.d;
    down = (w.height + w.window_h - 1) / w.window_h, across = (w.width + w.window_w - 1) / w.window_w;
    rows = down * w.window_h, columns = across * w.window_w;
    shift_y = down > 1 ? w.shift_h : 0, shift_x = across > 1 ? w.shift_w : 0;
    center = (w.window_h - 1) * (2 * w.window_w - 1) + w.window_w - 1;
    table_rows = 2 * center + 1;
    row_factor = (0x80000000u + w.window_w - 1) / w.window_w;
    read_head(first_head);
  }
  __host__ __device__ static int padded_area(const Window& w) { return (w.window_h * w.window_w + 15) / 16 * 16; }
  // A window's tokens and codes lie together, in one or two buffers; then the table.
  __host__ __device__ static int buffer_bytes(const Window& w) {
    return padded_area(w) * int(sizeof(Token) + sizeof(Code));
  }
  __host__ __device__ static int scratch_bytes(const Window& w, int buffers = 1) {
    return buffers * buffer_bytes(w) + ((2 * w.window_h - 1) * (2 * w.window_w - 1) + 3) / 4 * 16;
  }
  PYVIT_DEVICE void use(char* scratch, int buffers = 1) {
    found_tokens = scratch;
    table = reinterpret_cast<float*>(scratch + buffers * buffer_bytes(p.forward));
    read_table();
  }
  PYVIT_DEVICE void set_head(int h) {
    if (h == head) return;
    read_head(h);
    read_table();
  }
  PYVIT_DEVICE void read_head(int h) {
    head = h;
    scale = cosine() ? exp2f(fminf(p.forward.logit_scale[h], 4.605170185988092f) * kLog2e) : p.forward.scale;
  }
  PYVIT_DEVICE void read_table() {
    const float* from = p.forward.bias_table;
    for (int i = threadIdx.x; i < table_rows; i += blockDim.x)
      table[i] = from ? from[int64_t(i) * p.forward.heads + head] : 0.0f;
  }
  PYVIT_DEVICE float natural() const { return 1.0f; }
  PYVIT_DEVICE float unit() const { return kLog2e; }
  PYVIT_DEVICE static int queries_per_key_head(const Params&) { return 1; }
  PYVIT_DEVICE int count() const { return p.forward.batch * down * across; }
  PYVIT_DEVICE int heads() const { return p.forward.heads; }
  PYVIT_DEVICE int most_queries() const { return nq; }
  PYVIT_DEVICE int most_keys() const { return nk; }
  PYVIT_DEVICE int last_key(int) const { return nk; }
  PYVIT_DEVICE int first_query(int) const { return 0; }

  PYVIT_DEVICE void begin(int window_index) {
    find(window_index, 0);
    PYVIT_BARRIER();
    take(0);
  }
  // Finds a window's tokens, into a buffer that nobody reads.
  PYVIT_DEVICE void find(int window_index, int buffer) {
    const Window& w = p.forward;
    if (window_index == found + 1) {
      if (++window_x == across) window_x = 0, ++window_y;
      if (window_y == down) window_y = 0, ++found_image;
    } else {
      found_image = window_index / (down * across);
      window_y = window_index % (down * across) / across, window_x = window_index % across;
    }
    found = window_index;
    const T *map = static_cast<const T*>(w.qkv) + (found_image * w.qkv_stride[0] + head * d),
            *pad = w.pad ? static_cast<const T*>(w.pad) + head * d : nullptr;
    Token* to = reinterpret_cast<Token*>(found_tokens + buffer * buffer_bytes(w));
    Code* code = reinterpret_cast<Code*>(to + padded_area(w));
    for (int i = threadIdx.x; i < padded_area(w); i += blockDim.x) {
      // i / window_w: exact, since i * window_w is below 2^31.
      const int in_y = int(uint64_t(2 * uint32_t(i)) * row_factor >> 32), in_x = i - in_y * w.window_w;
      int y = window_y * w.window_h + in_y, x = window_x * w.window_w + in_x;
      const int region = (y >= rows - shift_y ? 2 : 0) + (x >= columns - shift_x ? 1 : 0);
      y += shift_y, x += shift_x;
      if (y >= rows) y -= rows;
      if (x >= columns) x -= columns;
      const bool real = y < w.height && x < w.width;
      to[i] = real ? Token{map + (far(y, w.qkv_stride[1]) + far(x, w.qkv_stride[2])), y, x} : Token{pad, y, ~x};
      code[i] = i < nq ? Code{(in_y * (2 * w.window_w - 1) + in_x) * 4, region | (real || pad ? 0 : kPadding)}
                       : Code{0, kBeyond};
    }
  }
  // Makes the window that was found last, into this buffer, the one at hand.
  PYVIT_DEVICE void take(int buffer) {
    const Window& w = p.forward;
    index = found, image = found_image;
    tokens = reinterpret_cast<const Token*>(found_tokens + buffer * buffer_bytes(w));
    codes = reinterpret_cast<const Code*>(tokens + padded_area(w));
    // Without an edge no token lies beyond the map or, on a shifted axis, in its last window, which holds two regions.
    const bool masks = w.pad == nullptr;
    edge = (window_y + 1) * w.window_h + shift_y > (masks ? w.height : rows) ||
           (window_x + 1) * w.window_w + shift_x > (masks ? w.width : columns);
  }
  PYVIT_DEVICE Token at(int i) const { return tokens[i]; }

  PYVIT_DEVICE int width() const { return p.forward.heads * d; }
  PYVIT_DEVICE const T* q(int, Token at) const { return at.q; }
  PYVIT_DEVICE const T* k(Token at) const { return at.q ? at.q + width() : nullptr; }
  PYVIT_DEVICE const T* v(Token at) const { return at.q ? at.q + 2 * width() : nullptr; }
  PYVIT_DEVICE int64_t place(Token at) const {
    const int one = p.forward.height * p.forward.width;
    return far(image, one) + (at.y * p.forward.width + at.x);
  }
  PYVIT_DEVICE T* out(int h, Token at) const {
    return at.real() ? static_cast<T*>(p.forward.out) + place(at) * width() + h * d : nullptr;
  }
  PYVIT_DEVICE const T* grad_out(int h, Token at) const {
    if (!at.real()) return nullptr;
    return static_cast<const T*>(p.grad_out) + image * p.grad_out_stride[0] + far(at.y, p.grad_out_stride[1]) +
           far(at.x, p.grad_out_stride[2]) + h * d;
  }
  PYVIT_DEVICE T* grad_part(int which, Token at) const {
    return at.real() ? static_cast<T*>(p.grad_qkv) + (place(at) * 3 + which) * width() + head * d : nullptr;
  }
  PYVIT_DEVICE T* grad_q(int, Token at) const { return grad_part(0, at); }
  PYVIT_DEVICE T* grad_k(Token at) const { return grad_part(1, at); }
  PYVIT_DEVICE T* grad_v(Token at) const { return grad_part(2, at); }
  PYVIT_DEVICE int64_t statistic(int h, int i) const { return (int64_t(index) * p.forward.heads + h) * nq + i; }
  PYVIT_DEVICE float* lse(int h, int i) const { return p.forward.lse + statistic(h, i); }
  PYVIT_DEVICE float* shift(int h, int i) const { return p.shift + statistic(h, i); }
  PYVIT_DEVICE float* rest(int h, int i) const { return p.rest + statistic(h, i); }
  PYVIT_DEVICE float* delta_at(int h, int i) const {
    const Token token = at(i);
    return token.real() ? p.delta + place(token) * p.forward.heads + h : nullptr;
  }
  PYVIT_DEVICE float delta(int h, int i) const {
    const float* at = delta_at(h, i);
    return at ? *at : 0.0f;
  }
  PYVIT_DEVICE float grad_lse(int, int) const { return 0.0f; }

  PYVIT_DEVICE bool cosine() const { return p.forward.logit_scale != nullptr; }
  struct ScoreRows {
    static constexpr bool plain = false;
    const char* table[2];  // the row's share of the index is added already
    int flags[2];
  };
  template <bool KEYS>
  PYVIT_DEVICE ScoreRows score_rows(int, int row0, int g, int, int) const {
    ScoreRows at;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Code code = codes[row0 + g + 8 * half];
      at.table[half] = reinterpret_cast<const char*>(table + center) + (KEYS ? -code.place : code.place);
      at.flags[half] = KEYS ? code.flags : code.flags & kRegion;
    }
    return at;
  }
  // Of 16 x 8 scores, those of a lane: of two rows, 8 apart, two columns from `column0 + pair` on. Queries that do not
  // exist may get anything.
  template <bool KEYS>
  PYVIT_DEVICE void finish_scores(float (&s)[4], const ScoreRows& at, int column0, int pair) const {
    const CodePair columns = *reinterpret_cast<const CodePair*>(codes + column0 + pair);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int place = columns.at[e & 1].place;
      s[e] = s[e] * scale + *reinterpret_cast<const float*>(at.table[e >> 1] + (KEYS ? place : -place));
    }
    if (edge || (!KEYS && column0 + 8 > nk)) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = at.flags[e >> 1], column = columns.at[e & 1].flags;
        if (row ^ (KEYS ? column & kRegion : column)) s[e] = -infinity();
      }
    }
  }

  // Gradients of padding tokens are kept apart, one row each in the order of the padded map, and summed afterwards.
  PYVIT_DEVICE float* pad_row(int j) const {
    const Token at = tokens[j];
    if (at.real() || p.grad_pad == nullptr) return nullptr;
    const int x = ~at.x;
    const Window& w = p.forward;
    const int right = columns - w.width, padded = rows * columns - w.height * w.width;
    const int which = at.y < w.height ? at.y * right + x - w.width : w.height * right + (at.y - w.height) * columns + x;
    return p.pad_rows + (int64_t(image) * padded + which) * 2 * width() + head * d;
  }
  PYVIT_DEVICE void store_pad(float* row, int column, float dk, float dv_) const {
    row[column] = dk;
    row[width() + column] = dv_;
  }
  PYVIT_DEVICE void store_logit_partial(int block, int blocks, float sum) const {
    p.logit_partials[int64_t(head) * blocks + block] = sum;
  }
  bool over_windows[4] = {true, false, false, false};  // the table is one for all windows
  PYVIT_DEVICE const bool (&bias_broadcast() const)[4] { return over_windows; }
  PYVIT_DEVICE float* bias_partials() const { return p.partials; }
};

// Calls use(element, width) for the dtype and the smallest head-dimension bucket that holds d.
template <class Use>
const char* with_window_dim(const Window& w, Use use) {
  const auto by_width = [&](auto element) -> const char* {
    using T = decltype(element);
    if (w.d <= 32) return use(T{}, std::integral_constant<int, 32>{});
    if (w.d <= 64) return use(T{}, std::integral_constant<int, 64>{});
    return "window_attention: the head dimension is above 64";
  };
  if (w.type == Type::f32) return by_width(float{});
  return w.type == Type::f16 ? by_width(f16{}) : by_width(bf16{});
}

}  // namespace pyvit::cuda
