// torch.ops.pyvit_cuda: the CUDA kernels under the schemas of torch.ops.pyvit, on LibTorch's stable ABI. Results and
// scratch are allocated here, by torch; the launchers get pointers, strides and torch's current stream.
//
// PYVIT_CUDA_DISPATCH names the dispatch key: CUDA, or CPU when the kernels are built for the host emulation.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "../cuda/launch.h"
#include "common.h"

#ifndef PYVIT_CUDA_DISPATCH
#define PYVIT_CUDA_DISPATCH CUDA
#include <dlfcn.h>
namespace {
// Part of the stable ABI, but of libtorch_cuda, which is not linked, so that one binary serves CPU builds of torch too:
// there, the library is not loaded and there is no stream.
bool current_stream(int32_t device, void** stream) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return get && get(device, stream) == 0;
}
}  // namespace
#else
static bool current_stream(int32_t, void**) { return true; }
#endif

namespace pyvit {
namespace {

using cuda::Type;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Bool:
      return Type::boolean;
    default:
      STD_TORCH_CHECK(false, "pyvit: the cuda kernels take float32, float16 and bfloat16 tensors");
  }
}
Tensor make_like(const Tensor& t) { return make(t, shape_of(t)); }

// Rows of the last dimension that begin on 16 bytes, by a copy where they do not.
bool aligned(const Tensor& t) {
  const int64_t step = 16 / int64_t(t.element_size());
  if (reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 || (t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1))
    return false;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    if (t.size(i) > 1 && t.stride(i) % step) return false;
  return true;
}
Tensor rows(const Tensor& t) {
  if (t.numel() == 0 || aligned(t)) return t;
  const Tensor copy = dense(t);
  return aligned(copy) ? copy : torch::stable::clone(copy);
}

// Tensors of rows whose strides in these dimensions are below 2^31, as the kernels take them; a copy makes them so.
Tensor near(const Tensor& t, std::initializer_list<int> dims) {
  const auto is_near = [&](const Tensor& x) {
    return std::all_of(dims.begin(), dims.end(), [&](int i) { return x.size(i) <= 1 || x.stride(i) <= INT32_MAX; });
  };
  if (is_near(t)) return t;
  const Tensor copy = dense(t);
  STD_TORCH_CHECK(is_near(copy), "pyvit cuda: rows are 2^31 elements apart and more");
  return copy;
}

template <int N>
void set(int64_t (&to)[N], const Ints& from) {
  std::copy(from.begin(), from.end(), to);
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "pyvit cuda: ", error); }
cuda::Stream stream_of(const Tensor& t) {
  cuda::Stream stream{nullptr, std::max<int>(t.get_device(), 0), 0};
  STD_TORCH_CHECK(current_stream(stream.device, &stream.handle),
                  "pyvit: torch gives no CUDA stream; this torch is built without CUDA");
  check(cuda::find_shared_limit(stream));
  return stream;
}
void check_call(const std::string& backend, double dropout_p) {
  STD_TORCH_CHECK(backend == "cuda" || backend == "auto", "pyvit: backend '", backend,
                  "' cannot run through torch.ops.pyvit_cuda");
  STD_TORCH_CHECK(dropout_p == 0, "pyvit: the cuda kernels have no dropout");
}
void check_head_dim(const char* op, int64_t d, int64_t most) {
  STD_TORCH_CHECK(d % 8 == 0 && d >= 8 && d <= most, op,
                  ": the cuda kernels take head dimensions that are multiples of 8 up to ", most, ", got ", d);
}

// Dense tensors are (B, H, N, D); packed ones (T, H, D), as if of one batch.
Tensor token_rows(const Tensor& t) { return near(rows(t), {t.dim() == 4 ? 2 : 0}); }
Ints strides(const Tensor& t) {
  return t.dim() == 4 ? Ints{t.stride(0), t.stride(1), t.stride(2)} : Ints{0, t.stride(1), t.stride(0)};
}

struct Packing {
  Tensor cu_seqlens_q, cu_seqlens_k;
  int64_t longest_q, longest_k;
};

// A call's tensors as the kernels want them, kept alive for the launch, and its description.
struct AttentionCall {
  Tensor q, k, v;
  Maybe bias;
  std::optional<Packing> packing;
  cuda::Attention a{};

  AttentionCall(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Maybe& bias_, bool causal, double scale,
                std::optional<Packing> packing_ = std::nullopt)
      : q(token_rows(q_)), k(token_rows(k_)), v(token_rows(v_)), bias(bias_), packing(std::move(packing_)) {
    const bool packed = packing.has_value();
    a.type = type_of(q);
    a.heads = int(q.size(1)), a.kv_heads = std::max(1, int(k.size(1)));
    a.batch = int(packed ? packing->cu_seqlens_q.size(0) - 1 : q.size(0));
    a.nq = int(packed ? packing->longest_q : q.size(2)), a.nk = int(packed ? packing->longest_k : k.size(2));
    a.d = int(q.size(q.dim() - 1)), a.dv = int(v.size(v.dim() - 1));
    check_head_dim("flash_attention", a.d, 128);
    check_head_dim("flash_attention", a.dv, 128);
    a.causal = causal, a.scale = float(scale);
    a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
    set(a.q_stride, strides(q)), set(a.k_stride, strides(k)), set(a.v_stride, strides(v));
    if (packed) {
      packing->cu_seqlens_q = dense(packing->cu_seqlens_q);
      packing->cu_seqlens_k =
          dense(packing->cu_seqlens_k.scalar_type() == packing->cu_seqlens_q.scalar_type()
                    ? packing->cu_seqlens_k
                    : torch::stable::to(packing->cu_seqlens_k, packing->cu_seqlens_q.scalar_type()));
      a.cu_seqlens_q = packing->cu_seqlens_q.data_ptr(), a.cu_seqlens_k = packing->cu_seqlens_k.data_ptr();
      a.cu_int64 = packing->cu_seqlens_q.scalar_type() == ScalarType::Long;
    }
    if (bias) {
      a.bias = bias->data_ptr(), a.bias_type = type_of(*bias);
      for (int i = 0; i < 4; ++i) a.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
  }

  std::tuple<Tensor, Tensor> forward() {
    const bool packed = packing.has_value();
    Tensor out = packed ? make(q, {q.size(0), a.heads, a.dv}) : make_heads(q, a.batch, a.heads, a.nq, a.dv);
    Tensor lse = make(q, packed ? Ints{a.heads, q.size(0)} : Ints{a.batch, a.heads, a.nq}, ScalarType::Float);
    set_results(out, lse);
    check(cuda::flash_attention(a, stream_of(q)));
    return {out, lse};
  }

  Four backward(const Tensor& grad_out_, const Maybe& grad_lse_, const Tensor& out_, const Tensor& lse_,
                bool bias_grad) {
    const Tensor grad_out = token_rows(grad_out_), out = token_rows(out_), lse = dense(lse_);
    const Maybe grad_lse = parameter(grad_lse_);
    set_results(out, lse);
    cuda::AttentionGradient g{};
    g.forward = a;
    g.grad_out = grad_out.data_ptr(), g.grad_lse = data<float>(grad_lse);
    set(g.grad_out_stride, strides(grad_out));
    const Tensor delta = make_like(lse), shifts = make_like(lse), rests = make_like(lse);
    g.delta = data<float>(delta), g.shift = data<float>(shifts), g.rest = data<float>(rests);
    const auto like = [&](const Tensor& t) {
      return packing ? make_like(t) : make_heads(t, t.size(0), t.size(1), t.size(2), t.size(3));
    };
    Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v),
           grad_bias = bias && bias_grad ? make_like(*bias) : none(q);
    g.grad_q = grad_q.data_ptr(), g.grad_k = grad_k.data_ptr(), g.grad_v = grad_v.data_ptr();
    set(g.grad_q_stride, strides(grad_q)), set(g.grad_k_stride, strides(grad_k)), set(g.grad_v_stride, strides(grad_v));
    Tensor partials = none(q);
    const bool pairs = a.batch && a.heads && a.nq && a.nk;
    if (bias && bias_grad && !pairs) grad_bias = zeros(*bias, shape_of(*bias));
    if (a.heads == 0) return {grad_q, grad_k, grad_v, grad_bias};
    if (bias && bias_grad && pairs) {
      const int64_t extent[4] = {a.batch, a.heads, (a.nq + 63) / 64, (a.nk + 63) / 64};
      int64_t owned = 1, summed = 1;
      for (int i = 0; i < 4; ++i) {
        g.bias_broadcast[i] = bias->size(i) == 1;
        (g.bias_broadcast[i] ? summed : owned) *= std::max<int64_t>(extent[i], 1);
      }
      // Enough blocks to fill a GPU; a function of the shapes alone, so that the order of the sums, and the bits, are
      // too.
      g.chunks = int(std::min(summed, std::max<int64_t>(1, cuda::kTargetBlocks / owned)));
      partials = make(q, {g.chunks, bias->numel()}, ScalarType::Float);
      g.partials = data<float>(partials), g.grad_bias = grad_bias.data_ptr();
    }
    check(cuda::flash_attention_backward(g, stream_of(q)));
    return {grad_q, grad_k, grad_v, grad_bias};
  }

 private:
  void set_results(const Tensor& out, const Tensor& lse) {
    a.out = out.data_ptr(), a.lse = data<float>(lse);
    set(a.out_stride, strides(out));
    set(a.lse_stride, packing ? Ints{0, lse.stride(0)} : Ints{lse.stride(0), lse.stride(1)});
  }
};

std::tuple<Tensor, Tensor> flash_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& bias,
                                           bool is_causal, double scale, double dropout_p, const Maybe&,
                                           const std::string& backend) {
  check_call(backend, dropout_p);
  Checks("flash_attention").attention(q, k, v, bias);
  return AttentionCall(q, k, v, bias, is_causal, scale).forward();
}

Four flash_attention_backward(const Tensor& grad_out, const Maybe& grad_lse, const Tensor& out, const Tensor& lse,
                              bool bias_grad, const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& bias,
                              bool is_causal, double scale, double dropout_p, const Maybe&,
                              const std::string& backend) {
  check_call(backend, dropout_p);
  const Checks checks("flash_attention_backward");
  checks.attention(q, k, v, bias);
  checks.results(grad_out, grad_lse, out, lse, bias_grad, q, v, bias, false);
  return AttentionCall(q, k, v, bias, is_causal, scale).backward(grad_out, grad_lse, out, lse, bias_grad);
}

std::tuple<Tensor, Tensor> flash_attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
                                                  const Tensor& cu_k, int64_t longest_q, int64_t longest_k,
                                                  const Maybe& bias, bool is_causal, double scale,
                                                  const std::string& backend) {
  check_call(backend, 0);
  Checks("flash_attention_varlen").packed(q, k, v, cu_q, cu_k, longest_q, longest_k, bias);
  return AttentionCall(q, k, v, bias, is_causal, scale, Packing{cu_q, cu_k, longest_q, longest_k}).forward();
}

Four flash_attention_varlen_backward(const Tensor& grad_out, const Maybe& grad_lse, const Tensor& out,
                                     const Tensor& lse, bool bias_grad, const Tensor& q, const Tensor& k,
                                     const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, int64_t longest_q,
                                     int64_t longest_k, const Maybe& bias, bool is_causal, double scale,
                                     const std::string& backend) {
  check_call(backend, 0);
  const Checks checks("flash_attention_varlen_backward");
  checks.packed(q, k, v, cu_q, cu_k, longest_q, longest_k, bias);
  checks.results(grad_out, grad_lse, out, lse, bias_grad, q, v, bias, true);
  AttentionCall call(q, k, v, bias, is_causal, scale, Packing{cu_q, cu_k, longest_q, longest_k});
  return call.backward(grad_out, grad_lse, out, lse, bias_grad);
}

struct WindowCall {
  Tensor qkv;
  Maybe table, logit_scale, pad;
  int64_t windows;
  cuda::Window w{};

  WindowCall(const Tensor& qkv_, const Ints& window, const Ints& shift, int64_t heads, const Maybe& table_,
             const Maybe& logit_scale_, const Maybe& pad_, double scale)
      : qkv(near(rows(qkv_), {1, 2})),
        table(parameter(table_)),
        logit_scale(parameter(logit_scale_)),
        windows(window_count(qkv, window)) {
    if (pad_) pad = rows(*dense_as(pad_, qkv.scalar_type()));
    w.type = type_of(qkv);
    w.batch = int(qkv.size(0)), w.height = int(qkv.size(1)), w.width = int(qkv.size(2));
    w.heads = int(heads), w.d = int(qkv.size(3) / 3 / heads);
    check_head_dim("window_attention", w.d, 64);
    STD_TORCH_CHECK(qkv.size(1) * qkv.size(2) <= INT32_MAX,
                    "window_attention: the cuda kernels take maps of fewer than 2^31 tokens, got ", qkv.size(1), " x ",
                    qkv.size(2));
    w.window_h = int(window[0]), w.window_w = int(window[1]), w.shift_h = int(shift[0]), w.shift_w = int(shift[1]);
    w.scale = float(scale);
    w.qkv = qkv.data_ptr();
    set(w.qkv_stride, {qkv.stride(0), qkv.stride(1), qkv.stride(2)});
    w.bias_table = data<const float>(table), w.logit_scale = data<const float>(logit_scale), w.pad = data(pad);
  }
  int64_t area() const { return int64_t(w.window_h) * w.window_w; }
};

std::tuple<Tensor, Tensor> window_attention(const Tensor& qkv, const Ints& window, const Ints& shift, int64_t heads,
                                            const Maybe& table, const Maybe& logit_scale, const Maybe& pad,
                                            double scale, double dropout_p, const Maybe&, const std::string& backend) {
  check_call(backend, dropout_p);
  Checks("window_attention").window(qkv, window, shift, heads, table, logit_scale, pad);
  WindowCall call(qkv, window, shift, heads, table, logit_scale, pad, scale);
  Tensor out = make(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3});
  Tensor lse = make(qkv, {qkv.size(0), call.windows, heads, call.area()}, ScalarType::Float);
  call.w.out = out.data_ptr(), call.w.lse = data<float>(lse);
  check(cuda::window_attention(call.w, stream_of(qkv)));
  return {out, lse};
}

Four window_attention_backward(const Tensor& grad_out_, const Tensor& out_, const Tensor& lse_, const Tensor& qkv,
                               const Ints& window, const Ints& shift, int64_t heads, const Maybe& table,
                               const Maybe& logit_scale, const Maybe& pad, double scale, double dropout_p, const Maybe&,
                               const std::string& backend) {
  check_call(backend, dropout_p);
  const Checks checks("window_attention_backward");
  checks.window(qkv, window, shift, heads, table, logit_scale, pad);
  checks.window_results(grad_out_, out_, lse_, qkv, window, heads);
  WindowCall call(qkv, window, shift, heads, table, logit_scale, pad, scale);
  const Tensor grad_out = near(rows(grad_out_), {1, 2}), out = rows(dense(out_)), lse = dense(lse_);
  call.w.out = out.data_ptr(), call.w.lse = data<float>(lse);
  cuda::WindowGradient g{};
  g.forward = call.w;
  g.grad_out = grad_out.data_ptr();
  set(g.grad_out_stride, {grad_out.stride(0), grad_out.stride(1), grad_out.stride(2)});
  const int64_t b = qkv.size(0), h = qkv.size(1), w = qkv.size(2), n = call.area(), count = b * call.windows;
  const Tensor delta = make(qkv, {b, h, w, heads}, ScalarType::Float), shifts = make_like(lse), rests = make_like(lse);
  Tensor grad_qkv = make(qkv, shape_of(qkv));
  g.shift = data<float>(shifts), g.rest = data<float>(rests);
  g.delta = data<float>(delta), g.grad_qkv = grad_qkv.data_ptr();
  const cuda::Stream stream = stream_of(qkv);
  const int64_t tiles = cuda::window_query_tiles(call.w, stream);
  // Groups of windows: enough blocks to fill a GPU; a function of the shapes alone, so that the order of the sums, and
  // the bits, are too.
  g.chunks = int(std::max<int64_t>(1, std::min(count, cuda::kTargetBlocks / std::max<int64_t>(heads * tiles, 1))));
  const auto scratch = [&](bool wanted, const Ints& shape) {
    return wanted ? make(qkv, shape, ScalarType::Float) : none(qkv);
  };
  const auto result = [&](const Maybe& t) { return t ? zeros(qkv, shape_of(*t), ScalarType::Float) : none(qkv); };
  const int64_t padded = call.windows * n - h * w;
  const bool pads = pad && padded > 0;
  const Tensor partials = scratch(table.has_value(), {g.chunks, heads, n, n}),
               logits = scratch(logit_scale.has_value(), {heads, g.chunks * tiles}),
               pad_rows = scratch(pads, {b, padded, 2 * qkv.size(3) / 3}),
               pad_partials = scratch(pads, {cuda::kPadChunks, 2 * qkv.size(3) / 3});
  Tensor grad_table = result(table), grad_logit = result(logit_scale), grad_pad = result(pad);
  if (table) g.grad_bias_table = data<float>(grad_table), g.partials = data<float>(partials);
  if (logit_scale) g.grad_logit_scale = data<float>(grad_logit), g.logit_partials = data<float>(logits);
  if (pads)
    g.grad_pad = data<float>(grad_pad), g.pad_rows = data<float>(pad_rows), g.pad_partials = data<float>(pad_partials);
  check(cuda::window_attention_backward(g, stream));
  const auto narrowed = [](const Tensor& grad, const Maybe& t) {
    return t && t->scalar_type() != ScalarType::Float ? torch::stable::to(grad, t->scalar_type()) : grad;
  };
  return {grad_qkv, narrowed(grad_table, table), narrowed(grad_logit, logit_scale), narrowed(grad_pad, pad)};
}

struct PatchCall {
  Tensor images, weight;
  Maybe bias, pos_embed, prefix, keep, mean, std;
  cuda::PatchEmbed p{};

  PatchCall(const Tensor& images_, const Tensor& weight_, const Maybe& bias_, const Ints& stride, const Maybe& pos_,
            const Maybe& prefix_, const Maybe& keep_, const Maybe& mean_, const Maybe& std_)
      : images(images_),
        weight(rows(dense(weight_))),
        bias(dense(bias_)),
        pos_embed(dense(pos_)),
        prefix(dense(prefix_)),
        keep(dense(keep_)),
        mean(dense(mean_)),
        std(dense(std_)) {
    p.type = type_of(weight);
    p.batch = int(images.size(0)), p.channels = int(images.size(1)), p.height = int(images.size(2)),
    p.width = int(images.size(3));
    p.dim = int(weight.size(0)), p.patch_h = int(weight.size(2)), p.patch_w = int(weight.size(3));
    p.stride_h = int(stride[0]), p.stride_w = int(stride[1]);
    p.images = images.data_ptr(), p.bytes = images.scalar_type() == ScalarType::Byte;
    set(p.image_stride, {images.stride(0), images.stride(1), images.stride(2), images.stride(3)});
    p.weight = weight.data_ptr();
    p.bias = data(bias), p.pos_embed = data(pos_embed), p.prefix = data(prefix);
    if (bias) p.bias_type = type_of(*bias);
    if (pos_embed) p.pos_type = type_of(*pos_embed);
    if (prefix) p.prefix_type = type_of(*prefix), p.prefix_rows = int(prefix->size(0));
    p.keep = data<const int64_t>(keep);
    // Null means that all patches are kept; of an empty choice nothing is read.
    if (keep && !p.keep) p.keep = static_cast<const int64_t*>(p.images ? p.images : p.weight);
    p.kept = int(keep ? keep->size(1) : grid());
    p.mean = data<const float>(mean), p.std = data<const float>(std);
  }
  int64_t grid() const {
    return int64_t((p.height - p.patch_h) / p.stride_h + 1) * ((p.width - p.patch_w) / p.stride_w + 1);
  }
};

Tensor patch_embed(const Tensor& images, const Tensor& weight, const Maybe& bias, const Ints& stride,
                   const Maybe& pos_embed, const Maybe& prefix, const Maybe& keep, const Maybe& mean, const Maybe& std,
                   const std::string& backend) {
  check_call(backend, 0);
  Checks("patch_embed").patches(images, weight, bias, stride, pos_embed, prefix, keep, mean, std);
  PatchCall call(images, weight, bias, stride, pos_embed, prefix, keep, mean, std);
  Tensor out = make(weight, {call.p.batch, call.p.prefix_rows + call.p.kept, call.p.dim});
  call.p.out = out.data_ptr();
  check(cuda::patch_embed(call.p, stream_of(images)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    const Tensor& grad_out_, bool images_grad, bool weight_grad, const Tensor& images, const Tensor& weight,
    const Maybe& bias, const Ints& stride, const Maybe& pos_embed, const Maybe& prefix, const Maybe& keep,
    const Maybe& mean, const Maybe& std, const std::string& backend) {
  check_call(backend, 0);
  Checks("patch_embed_backward")
      .patch_results(grad_out_, images_grad, images, weight, bias, stride, pos_embed, prefix, keep, mean, std);
  PatchCall call(images, weight, bias, stride, pos_embed, prefix, keep, mean, std);
  const Tensor grad_out = rows(dense(grad_out_));
  cuda::PatchEmbedGradient g{};
  const int64_t tokens = int64_t(call.p.batch) * call.p.kept, dim = call.p.dim;
  const auto result = [&](bool wanted, const Maybe& t) { return wanted && t ? make(*t, shape_of(*t)) : none(weight); };
  Tensor grad_images = result(images_grad, images), grad_weight = result(weight_grad, call.weight),
         grad_bias = result(true, bias), grad_pos = result(true, pos_embed), grad_prefix = result(true, prefix),
         grad_tokens = none(weight), weight_partials = none(weight), bias_partials = none(weight);
  g.forward = call.p;
  g.grad_out = grad_out.data_ptr();
  if (images_grad) {
    g.grad_images = grad_images.data_ptr();
    if (keep) grad_tokens = make(weight, {call.p.batch, call.grid(), dim}), g.grad_tokens = grad_tokens.data_ptr();
  }
  if (weight_grad) {
    const int64_t owned = ((dim + 127) / 128) * ((call.weight.numel() / std::max<int64_t>(dim, 1) + 127) / 128);
    g.weight_chunks = int(
        std::max<int64_t>(1, std::min(tokens / cuda::kLeastSum, cuda::kTargetBlocks / std::max<int64_t>(owned, 1))));
    weight_partials = make(weight, {g.weight_chunks, call.weight.numel()}, ScalarType::Float);
    g.grad_weight = grad_weight.data_ptr(), g.weight_partials = data<float>(weight_partials);
  }
  if (bias) {
    g.bias_chunks = int(std::max<int64_t>(1, std::min<int64_t>(tokens / cuda::kLeastSum, 64)));
    bias_partials = make(weight, {g.bias_chunks, dim}, ScalarType::Float);
    g.grad_bias = grad_bias.data_ptr(), g.bias_partials = data<float>(bias_partials);
  }
  if (pos_embed) g.grad_pos_embed = grad_pos.data_ptr();
  if (prefix) g.grad_prefix = grad_prefix.data_ptr();
  check(cuda::patch_embed_backward(g, stream_of(images)));
  return {grad_images, grad_weight, grad_bias, grad_pos, grad_prefix};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY(PYVIT_CUDA_NAMESPACE, m) {
#include "schemas.inc"
}

STABLE_TORCH_LIBRARY_IMPL(PYVIT_CUDA_NAMESPACE, PYVIT_CUDA_DISPATCH, m) {
  m.impl("flash_attention", TORCH_BOX(&pyvit::flash_attention));
  m.impl("flash_attention_backward", TORCH_BOX(&pyvit::flash_attention_backward));
  m.impl("flash_attention_varlen", TORCH_BOX(&pyvit::flash_attention_varlen));
  m.impl("flash_attention_varlen_backward", TORCH_BOX(&pyvit::flash_attention_varlen_backward));
  m.impl("window_attention", TORCH_BOX(&pyvit::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&pyvit::window_attention_backward));
  m.impl("patch_embed", TORCH_BOX(&pyvit::patch_embed));
  m.impl("patch_embed_backward", TORCH_BOX(&pyvit::patch_embed_backward));
}
