// Gradients of window attention: map, bias table, temperature and padding value, none with atomics.
#include "attention_backward.cuh"
#include "attention_bias.cuh"
#include "reduce.cuh"
#include "window_attention_backward.cuh"

namespace pyvit::cuda {

// One warp per (row of the table, head): its lanes share the (query, key) pairs of that offset, and sum the partials of
// every group.
static __global__ void __launch_bounds__(128) table_gradient(const __grid_constant__ WindowGradient params) {
  const Window& w = params.forward;
  const int width = 2 * w.window_w - 1, n = w.window_h * w.window_w, lane = lane_of(threadIdx.x);
  const int64_t at = int64_t(blockIdx.x) * 4 + warp_of(threadIdx.x);
  const bool exists = at < int64_t(2 * w.window_h - 1) * width * w.heads;
  float sum = 0.0f;
  if (exists) {
    const int row = int(at / w.heads), head = int(at % w.heads);
    const int dy = row / width - (w.window_h - 1), dx = row % width - (w.window_w - 1);
    const int high = w.window_h - abs(dy), wide = w.window_w - abs(dx);
    for (int pair = lane; pair < high * wide; pair += 32) {
      const int y = pair / wide + max(0, -dy), x = pair % wide + max(0, -dx);
      const int query = (y + dy) * w.window_w + x + dx, key = y * w.window_w + x;
      for (int c = 0; c < params.chunks; ++c)
        sum += params.partials[((int64_t(c) * w.heads + head) * n + query) * n + key];
    }
  }
  sum = warp_sum(sum);
  if (exists && lane == 0) params.grad_bias_table[at] = sum;
}

// One warp per head. The temperature has no gradient beyond its clamp.
static __global__ void __launch_bounds__(32) logit_gradient(const __grid_constant__ WindowGradient params) {
  const int head = blockIdx.x, count = params.chunks * params.query_tiles;
  float sum = 0.0f;
  for (int i = lane_of(threadIdx.x); i < count; i += 32) sum += params.logit_partials[int64_t(head) * count + i];
  sum = warp_sum(sum);
  if (threadIdx.x == 0)
    params.grad_logit_scale[head] = params.forward.logit_scale[head] <= 4.605170185988092f ? sum : 0.0f;
}

// Column sums of the padding tokens' rows, in kPadChunks parts; then grad_pad is their sum. A thread per column.
static __global__ void __launch_bounds__(256) pad_gradient(const __grid_constant__ WindowGradient params) {
  const Window& w = params.forward;
  const int columns = 2 * w.heads * w.d, column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int high = (w.height + w.window_h - 1) / w.window_h * w.window_h,
            wide = (w.width + w.window_w - 1) / w.window_w * w.window_w;
  const int64_t rows = int64_t(w.batch) * (int64_t(high) * wide - int64_t(w.height) * w.width);
  float sum = 0.0f;
  for (int64_t row = rows * blockIdx.y / gridDim.y; row < rows * (blockIdx.y + 1) / gridDim.y; ++row)
    sum += params.pad_rows[row * columns + column];
  params.pad_partials[int64_t(blockIdx.y) * columns + column] = sum;
}

namespace {

// Windows of up to so many tokens that one-pass kernels are compiled for: with the second there are registers only for
// narrow heads in 16 bits.
constexpr int kSmall = 64, kMiddle = 144;
template <class T, int D>
constexpr bool kHasMiddle = sizeof(T) == 2 && D <= 32;

int window_rows(const Window& w) { return ceil_div(w.window_h * w.window_w, 16) * 16; }

template <class T, int D, int COLUMNS>
bool one_pass_fits(const Window& w, Stream stream) {
  const int rows = window_rows(w);
  return rows <= COLUMNS && WindowLayout<T, D, COLUMNS>(rows, w).bytes(w) <= stream.shared_limit;
}
// Columns of the one-pass kernel's matrices; 0 where no block can hold the window.
template <class T, int D>
int one_pass_columns(const Window& w, Stream stream) {
  if (one_pass_fits<T, D, kSmall>(w, stream)) return kSmall;
  if constexpr (kHasMiddle<T, D>)
    if (one_pass_fits<T, D, kMiddle>(w, stream)) return kMiddle;
  return 0;
}

template <class T, int D, int NT, int TILES>
const char* launch_one_pass(const WindowGradient& params, Stream stream) {
  const Window& w = params.forward;
  const int rows = window_rows(w);
  const WindowLayout<T, D, 8 * NT * TILES> memory(rows, w);
  return launch("window_attention_backward", window_backward<T, D, NT, TILES>, dim3(params.chunks, w.heads), 2 * rows,
                memory.bytes(w), params, stream);
}

template <class T, int D>
int passes_bytes(const Window& w, int rows) {
  constexpr int NT = kBackwardColumns<T, D>;
  return Layout<T, D, NT>{rows, 2, w.window_h * w.window_w > 8 * NT ? 2 : 1}.bytes() + Windows<T>::scratch_bytes(w);
}
// The table's sums beside them, which save a third pass wherever they fit.
template <class T, int D>
struct QueryPass {
  static constexpr int kMostBytes = 112 << 10;  // two blocks of an sm_90 processor, one of sm_80
  int warps, bytes;
  bool sums;

  QueryPass(const Window& w, Stream stream) {
    const int n = w.window_h * w.window_w;
    const auto with_sums = [&](int rows) { return passes_bytes<T, D>(w, rows) + rows * ceil_div(n, 8) * 32; };
    const auto without = [&](int rows) { return passes_bytes<T, D>(w, rows); };
    const int most = min(kMostBytes, stream.shared_limit);
    sums = with_sums(64) <= most;
    warps = sums ? choose_warps(n, with_sums, most) : choose_warps(n, without);
    bytes = sums ? with_sums(16 * warps) : without(16 * warps);
  }
};

// Larger windows, a pass for each owner of rows.
template <class T, int D>
const char* launch_passes(const WindowGradient& params, Stream stream) {
  constexpr int NT = kBackwardColumns<T, D>;
  const Window& w = params.forward;
  const int n = w.window_h * w.window_w;
  const QueryPass<T, D> queries(w, stream);
  const bool sums = queries.sums && params.grad_bias_table;
  if (const char* error = launch("window_attention_backward (queries)",
                                 sums ? attention_backward_queries<Windows<T>, D, NT, true>
                                      : attention_backward_queries<Windows<T>, D, NT, false>,
                                 dim3(unsigned(params.chunks) * params.query_tiles, w.heads), 32 * queries.warps,
                                 queries.bytes, params, stream))
    return error;
  const auto key_bytes = [&](int rows) { return passes_bytes<T, D>(w, rows); };
  const int key_warps = choose_warps(n, key_bytes);
  if (const char* error = launch("window_attention_backward (keys)", attention_backward_keys<Windows<T>, D, NT>,
                                 dim3(unsigned(params.chunks) * ceil_div(n, 16 * key_warps), w.heads), 32 * key_warps,
                                 key_bytes(16 * key_warps), params, stream))
    return error;
  if (sums || params.grad_bias_table == nullptr) return nullptr;
  constexpr int kRows = 64;
  const dim3 tiles(unsigned(params.chunks) * w.heads * ceil_div(n, kRows) * ceil_div(n, 8 * NT));
  return launch("window_attention_backward (bias)", attention_backward_bias<Windows<T>, D, NT>, tiles, 2 * kRows,
                Layout<T, D, NT>{kRows, 2, 1}.bytes() + Windows<T>::scratch_bytes(w), params, stream);
}

}  // namespace

int window_query_tiles(const Window& w, Stream stream) {
  int tiles = 1;
  with_window_dim(w, [&](auto element, auto width) -> const char* {
    using T = decltype(element);
    const int n = w.window_h * w.window_w;
    if (one_pass_columns<T, width()>(w, stream) == 0) tiles = ceil_div(n, 16 * QueryPass<T, width()>(w, stream).warps);
    return nullptr;
  });
  return tiles;
}

const char* window_attention_backward(const WindowGradient& given, Stream stream) {
  WindowGradient params = given;
  const Window& w = params.forward;
  if (int64_t(w.batch) * w.height * w.width == 0 || w.heads == 0) return nullptr;
  return with_window_dim(w, [&](auto element, auto width) -> const char* {
    using T = decltype(element);
    constexpr int D = width();
    params.query_tiles = window_query_tiles(w, stream);
    const int columns = one_pass_columns<T, D>(w, stream);
    if (columns == kSmall) {
      if (const char* error = launch_one_pass<T, D, 8, 1>(params, stream)) return error;
    } else if (columns) {
      if constexpr (kHasMiddle<T, D>)
        if (const char* error = launch_one_pass<T, D, 6, 3>(params, stream)) return error;
    } else if (const char* error = launch_passes<T, D>(params, stream)) {
      return error;
    }
    if (params.grad_bias_table) {
      const int64_t entries = int64_t(2 * w.window_h - 1) * (2 * w.window_w - 1) * w.heads;
      if (const char* error = launch("table_gradient", table_gradient, ceil_div(entries, 4), 128, 0, params, stream))
        return error;
    }
    if (params.grad_logit_scale)
      if (const char* error = launch("logit_gradient", logit_gradient, w.heads, 32, 0, params, stream)) return error;
    if (params.grad_pad == nullptr) return nullptr;
    const int channels = 2 * w.heads * w.d;
    if (const char* error =
            launch("pad_gradient", pad_gradient, dim3(ceil_div(channels, 256), kPadChunks), 256, 0, params, stream))
      return error;
    return reduce_partials(params.pad_partials, kPadChunks, channels, Type::f32, params.grad_pad + channels / 2,
                           stream);
  });
}

}  // namespace pyvit::cuda
