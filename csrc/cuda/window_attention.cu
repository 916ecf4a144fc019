// Forward of (shifted) window attention: see window_attention.cuh for the index arithmetic, attention.cuh for the
// algorithm.
#include "attention_forward.cuh"
#include "window_attention.cuh"

namespace pyvit::cuda {

const char* window_attention(const Window& window, Stream stream) {
  WindowGradient params{};
  params.forward = window;
  const int n = window.window_h * window.window_w;
  const int64_t count =
      int64_t(window.batch) * ceil_div(window.height, window.window_h) * ceil_div(window.width, window.window_w);
  return with_window_dim(window, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int D = width(), NT = kForwardColumns<T, D>;
    const auto bytes = [&](int rows) {
      return Layout<T, D, NT>{rows, 1, n > 8 * NT ? 2 : 1}.bytes() + Windows<T>::scratch_bytes(window);
    };
    const int warps = choose_warps(n, bytes), tiles = ceil_div(n, 16 * warps);
    // A block keeps its head's bias table and goes through a group of windows.
    const int64_t groups = max(int64_t(1), min(count, kTargetBlocks * 2 / (int64_t(window.heads) * tiles)));
    const dim3 grid(unsigned(count ? groups * tiles : 0), window.heads);
    return launch("window_attention", attention_forward<Windows<T>, D, NT>, grid, 32 * warps, bytes(16 * warps), params,
                  stream);
  });
}

}  // namespace pyvit::cuda
