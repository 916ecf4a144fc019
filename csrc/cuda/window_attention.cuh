// Windows of a feature map as a Problem of attention.cuh. Shift, partition, padding, the relative-position bias, the
// shift mask and the reverse are index arithmetic on the (B, H, W, 3C) map: no window, index or mask tensor exists.
//
// Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022: cosine attention).
#pragma once

#include "attention.cuh"

namespace pyvit::cuda {

// Where a token of a window lies on the map, after the cyclic shift; `real` is false for padding.
struct Token {
  int y, x;
  bool real;
};

template <class Element>
struct Windows {
  using T = Element;
  using Params = WindowGradient;
  // A token's code: its place in the bias table's index arithmetic, the region it attends within, and whether it is
  // padding.
  static constexpr int kPlace = (1 << 20) - 1, kRegion = 3 << 20, kPadding = 1 << 22;

  const Params& p;
  int head = 0, nq, nk, d, dv;
  float scale = 0.0f, scale_log2 = 0.0f;
  int rows, columns, shift_y, shift_x, down, across, center, table_rows;
  int image = 0, window = 0, index = 0;
  float* table = nullptr;
  int* codes = nullptr;

  PYVIT_DEVICE Windows(const Params& params, int first_head) : p(params) {
    const Window& w = p.forward;
    nq = nk = w.window_h * w.window_w;
    d = dv = w.d;
    down = (w.height + w.window_h - 1) / w.window_h, across = (w.width + w.window_w - 1) / w.window_w;
    rows = down * w.window_h, columns = across * w.window_w;
    shift_y = down > 1 ? w.shift_h : 0, shift_x = across > 1 ? w.shift_w : 0;
    center = (w.window_h - 1) * (2 * w.window_w - 1) + w.window_w - 1;
    table_rows = 2 * center + 1;
    read_head(first_head);
  }
  __host__ __device__ static int scratch_bytes(const Window& w) {
    return ((2 * w.window_h - 1) * (2 * w.window_w - 1) + w.window_h * w.window_w) * 4;
  }
  PYVIT_DEVICE void use(char* scratch) {
    table = reinterpret_cast<float*>(scratch);
    codes = reinterpret_cast<int*>(table + table_rows);
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
    scale_log2 = scale * kLog2e;
  }
  PYVIT_DEVICE void read_table() {
    if (p.forward.bias_table == nullptr) return;
    for (int i = threadIdx.x; i < table_rows; i += blockDim.x)
      table[i] = p.forward.bias_table[int64_t(i) * p.forward.heads + head] * kLog2e;
  }
  PYVIT_DEVICE static int queries_per_key_head(const Params&) { return 1; }
  PYVIT_DEVICE int count() const { return p.forward.batch * down * across; }
  PYVIT_DEVICE int heads() const { return p.forward.heads; }
  PYVIT_DEVICE int most_queries() const { return nq; }
  PYVIT_DEVICE int most_keys() const { return nk; }
  PYVIT_DEVICE int last_key(int) const { return nk; }
  PYVIT_DEVICE int first_query(int) const { return 0; }

  PYVIT_DEVICE void locate(int window_index) {
    index = window_index;
    image = index / (down * across), window = index % (down * across);
  }
  PYVIT_DEVICE void begin(int window_index) {
    locate(window_index);
    const Window& w = p.forward;
    for (int i = threadIdx.x; i < nq; i += blockDim.x) {
      const int y = i / w.window_w, x = i % w.window_w;
      const int region = (window / across * w.window_h + y >= rows - shift_y ? 2 : 0) +
                         (window % across * w.window_w + x >= columns - shift_x ? 1 : 0);
      codes[i] = (y * (2 * w.window_w - 1) + x) | region << 20 | (token(i).real ? 0 : kPadding);
    }
  }
  PYVIT_DEVICE Token token(int i) const {
    const Window& w = p.forward;
    int y = window / across * w.window_h + i / w.window_w + shift_y,
        x = window % across * w.window_w + i % w.window_w + shift_x;
    if (y >= rows) y -= rows;
    if (x >= columns) x -= columns;
    return {y, x, y < w.height && x < w.width};
  }

  PYVIT_DEVICE const void* any() const { return p.forward.qkv; }
  PYVIT_DEVICE int width() const { return p.forward.heads * d; }
  PYVIT_DEVICE const T* part(int which, int h, int i) const {
    const Token at = token(i);
    const T* base = static_cast<const T*>(p.forward.pad);
    if (at.real) {
      const int64_t (&stride)[3] = p.forward.qkv_stride;
      base = static_cast<const T*>(p.forward.qkv) + image * stride[0] + at.y * stride[1] + at.x * stride[2];
    }
    return base ? base + which * width() + h * d : nullptr;
  }
  PYVIT_DEVICE const T* q(int h, int i) const { return part(0, h, i); }
  PYVIT_DEVICE const T* k(int j) const { return part(1, head, j); }
  PYVIT_DEVICE const T* v(int j) const { return part(2, head, j); }
  PYVIT_DEVICE int64_t place(Token at) const {
    return (int64_t(image) * p.forward.height + at.y) * p.forward.width + at.x;
  }
  PYVIT_DEVICE T* out(int h, int i) const {
    const Token at = token(i);
    return at.real ? static_cast<T*>(p.forward.out) + place(at) * width() + h * d : nullptr;
  }
  PYVIT_DEVICE const T* grad_out(int h, int i) const {
    const Token at = token(i);
    if (!at.real) return nullptr;
    return static_cast<const T*>(p.grad_out) + image * p.grad_out_stride[0] + at.y * p.grad_out_stride[1] +
           at.x * p.grad_out_stride[2] + h * d;
  }
  PYVIT_DEVICE T* grad_part(int which, int i) const {
    const Token at = token(i);
    return at.real ? static_cast<T*>(p.grad_qkv) + (place(at) * 3 + which) * width() + head * d : nullptr;
  }
  PYVIT_DEVICE T* grad_q(int, int i) const { return grad_part(0, i); }
  PYVIT_DEVICE T* grad_k(int j) const { return grad_part(1, j); }
  PYVIT_DEVICE T* grad_v(int j) const { return grad_part(2, j); }
  PYVIT_DEVICE float* lse(int h, int i) const {
    return p.forward.lse + (int64_t(index) * p.forward.heads + h) * nq + i;
  }
  PYVIT_DEVICE float* delta_at(int h, int i) const {
    const Token at = token(i);
    return at.real ? p.delta + place(at) * p.forward.heads + h : nullptr;
  }
  PYVIT_DEVICE float delta(int h, int i) const {
    const float* at = delta_at(h, i);
    return at ? *at : 0.0f;
  }
  PYVIT_DEVICE float grad_lse(int, int) const { return 0.0f; }

  PYVIT_DEVICE bool cosine() const { return p.forward.logit_scale != nullptr; }
  PYVIT_DEVICE float score(float scaled, int, int i, int j) const {
    if (i >= nq || j >= nk) return -infinity();
    const int query = codes[i], key = codes[j];
    if ((query ^ key) & kRegion || (p.forward.pad == nullptr && key & kPadding)) return -infinity();
    return p.forward.bias_table ? scaled + table[(query & kPlace) - (key & kPlace) + center] : scaled;
  }

  // Gradients of padding tokens are kept apart, one row each in the order of the padded map, and summed afterwards.
  PYVIT_DEVICE float* pad_row(int j) const {
    const Token at = token(j);
    if (at.real || p.grad_pad == nullptr) return nullptr;
    const Window& w = p.forward;
    const int right = columns - w.width, padded = rows * columns - w.height * w.width;
    const int which =
        at.y < w.height ? at.y * right + at.x - w.width : w.height * right + (at.y - w.height) * columns + at.x;
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
