// Forward of dense and packed attention (Dao et al., "FlashAttention-2", 2023): see attention_forward.cuh for the
// algorithm.
#include "attention_forward.cuh"
#include "flash_attention.cuh"

namespace pyvit::cuda {

const char* flash_attention(const Attention& forward, Stream stream) {
  AttentionGradient params{};
  params.forward = forward;
  set_units(params.forward);
  return with_head_dim(forward.type, forward.d > forward.dv ? forward.d : forward.dv, [&](auto element, auto width) {
    using T = decltype(element);
    constexpr int D = width(), NT = kForwardColumns<T, D>;
    const int stages = forward.nk > 8 * NT ? 2 : 1;
    const auto bytes = [&](int rows) { return Layout<T, D, NT>{rows, 1, stages}.bytes(); };
    const int warps = choose_warps(forward.nq, bytes);
    const dim3 grid(ceil_div(forward.nq, 16 * warps) * forward.batch, forward.heads);
    return launch("flash_attention", attention_forward<Dense<T>, D, NT>, grid, 32 * warps, bytes(16 * warps), params,
                  stream);
  });
}

}  // namespace pyvit::cuda
