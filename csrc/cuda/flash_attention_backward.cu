// Gradients of dense and packed attention: see attention.cuh for the kernels that own queries, keys and bias.
#include "attention_backward.cuh"
#include "attention_bias.cuh"
#include "flash_attention.cuh"
#include "reduce.cuh"

namespace pyvit::cuda {

const char* flash_attention_backward(const AttentionGradient& given, Stream stream) {
  AttentionGradient params = given;
  set_units(params.forward);
  const Attention& f = params.forward;
  return with_head_dim(f.type, f.d > f.dv ? f.d : f.dv, [&](auto element, auto width) -> const char* {
    using T = decltype(element);
    constexpr int D = width(), NT = kBackwardColumns<T, D>;
    const auto query_bytes = [&](int n) { return Layout<T, D, NT>{n, 2, f.nk > 8 * NT ? 2 : 1}.bytes(); };
    const int query_warps = choose_warps(f.nq, query_bytes);
    const dim3 query_grid(ceil_div(f.nq, 16 * query_warps) * f.batch, f.heads);
    if (const char* error =
            launch("flash_attention_backward (queries)", attention_backward_queries<Dense<T>, D, NT, false>, query_grid,
                   32 * query_warps, query_bytes(16 * query_warps), params, stream))
      return error;

    const int stages = key_pass_stages<NT>(f.nq, f.heads / f.kv_heads);
    const auto key_bytes = [&](int n) { return Layout<T, D, NT>{n, 2, stages}.bytes(); };
    const int key_warps = choose_warps(f.nk, key_bytes);
    const dim3 key_grid(ceil_div(f.nk, 16 * key_warps) * f.batch, f.kv_heads);
    if (const char* error = launch("flash_attention_backward (keys)", attention_backward_keys<Dense<T>, D, NT>,
                                   key_grid, 32 * key_warps, key_bytes(16 * key_warps), params, stream))
      return error;
    if (params.grad_bias == nullptr) return nullptr;

    constexpr int kRows = 64;
    const int bytes = Layout<T, D, NT>{kRows, 2, 1}.bytes();
    const int extent[4] = {f.batch, f.heads, ceil_div(f.nq, kRows), ceil_div(f.nk, 8 * NT)};
    const int size[4] = {f.batch, f.heads, f.nq, f.nk};
    int owned = 1;
    int64_t elements = 1;
    for (int i = 0; i < 4; ++i)
      if (!params.bias_broadcast[i]) owned *= extent[i], elements *= size[i];
    if (const char* error = launch("flash_attention_backward (bias)", attention_backward_bias<Dense<T>, D, NT>,
                                   dim3(unsigned(owned) * params.chunks), 2 * kRows, bytes, params, stream))
      return error;
    return reduce_partials(params.partials, params.chunks, elements, f.bias_type, params.grad_bias, stream);
  });
}

}  // namespace pyvit::cuda
