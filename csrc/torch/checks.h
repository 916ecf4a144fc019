// What the arguments of an operator must be: torch.ops can be called by anyone, and the kernels index by what is
// promised here. For csrc/torch/cpu.cpp, cpu_internal.cpp and cuda.cpp; pyvit/ops has longer messages.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace pyvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t ANY = -1;  // a size that may be anything

inline std::string text(const int64_t* sizes, size_t n) {
  std::string found = "(";
  for (size_t i = 0; i < n; i++) found += (i ? ", " : "") + (sizes[i] == ANY ? "*" : std::to_string(sizes[i]));
  return found + ")";
}
inline std::string text(Shape shape) { return text(shape.data(), shape.size()); }

// Windows of a map (B, H, W, C), which is padded to whole ones.
inline int64_t window_count(const Tensor& map, const Ints& window) {
  return ((map.size(1) + window[0] - 1) / window[0]) * ((map.size(2) + window[1] - 1) / window[1]);
}

// Checks of one operator's arguments against each other. A message is put together only when one fails.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted) const {
    STD_TORCH_CHECK(t.defined(), "pyvit: ", op_, ": ", name, " must be a Tensor, got None");
    const Shape have = t.sizes();
    bool fits = have.size() == wanted.size();
    for (size_t i = 0; fits && i < have.size(); i++) {
      const int64_t want = wanted.begin()[i];
      fits = want == ANY || have[i] == want;
    }
    STD_TORCH_CHECK(fits, "pyvit: ", op_, ": ", name, " must be of shape ", text(wanted.begin(), wanted.size()),
                    ", got ", text(have));
  }
  // On the device of `like`; CPU tensors have no index.
  void device(const char* name, const Tensor& t, const Tensor& like) const {
    STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), "pyvit: ", op_,
                    ": ", name, " must be on the device of the other arguments");
  }
  void dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> wanted, const char* what) const {
    STD_TORCH_CHECK(std::find(wanted.begin(), wanted.end(), t.scalar_type()) != wanted.end(), "pyvit: ", op_, ": ",
                    name, " must be ", what);
  }
  void floating(const char* name, const Tensor& t) const {
    dtype(name, t, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, "float32, bfloat16 or float16");
  }
  // Of the dtype and on the device of `like`.
  void as(const char* name, const Tensor& t, const Tensor& like) const {
    dtype(name, t, {like.scalar_type()}, "of the dtype of the first tensor");
    device(name, t, like);
  }
  // A small parameter: float32 or of the dtype of `like`, on its device.
  void parameter(const char* name, const Maybe& t, const Tensor& like, std::initializer_list<int64_t> wanted) const {
    if (!t) return;
    shape(name, *t, wanted);
    dtype(name, *t, {ScalarType::Float, like.scalar_type()}, "float32 or of the dtype of the first tensor");
    device(name, *t, like);
  }
  // float32 numbers beside `like`.
  void numbers(const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> wanted) const {
    shape(name, t, wanted);
    dtype(name, t, {ScalarType::Float}, "float32");
    device(name, t, like);
  }
  void that(bool holds, const char* name, const char* what) const {
    STD_TORCH_CHECK(holds, "pyvit: ", op_, ": ", name, " must be ", what);
  }

  // Heads (B, H, N, D), or packed (T, H, D).
  void queries_and_keys(const Tensor& q, const Tensor& k, bool packed) const {
    if (packed) {
      shape("q", q, {ANY, ANY, ANY});
      shape("k", k, {ANY, ANY, q.size(2)});
    } else {
      shape("q", q, {ANY, ANY, ANY, ANY});
      shape("k", k, {q.size(0), ANY, ANY, q.size(3)});
    }
    floating("q", q);
    as("k", k, q);
    const int64_t h = q.size(1), hk = k.size(1);
    that(hk == h || (hk > 0 && h % hk == 0), "k", "with a number of heads that divides q's");
    that(q.size(q.dim() - 1) > 0, "q", "of at least one channel per head");
  }
  void values(const Tensor& k, const Tensor& v, bool packed) const {
    if (packed)
      shape("v", v, {k.size(0), k.size(1), ANY});
    else
      shape("v", v, {k.size(0), k.size(1), k.size(2), ANY});
    as("v", v, k);
    that(v.size(v.dim() - 1) > 0, "v", "of at least one channel per head");
  }
  void bias(const Maybe& bias, const Tensor& q, std::initializer_list<int64_t> wanted) const {
    if (!bias) return;
    const Shape have = bias->sizes();
    bool fits = have.size() == 4;
    for (size_t i = 0; fits && i < 4; i++) fits = have[i] == 1 || have[i] == wanted.begin()[i];
    STD_TORCH_CHECK(fits, "pyvit: ", op_, ": bias must be broadcastable to ", text(wanted.begin(), 4), " and 4-D, got ",
                    text(have));
    dtype("bias", *bias, {ScalarType::Bool, ScalarType::Float, q.scalar_type()}, "bool, float32 or of the dtype of q");
    device("bias", *bias, q);
  }
  void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& bias) const {
    queries_and_keys(q, k, false);
    values(k, v, false);
    this->bias(bias, q, {q.size(0), q.size(1), q.size(2), k.size(2)});
  }
  void packed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
              int64_t max_k, const Maybe& bias) const {
    queries_and_keys(q, k, true);
    values(k, v, true);
    shape("cu_seqlens_q", cu_q, {ANY});
    that(cu_q.size(0) > 0, "cu_seqlens_q", "of at least one element");
    shape("cu_seqlens_k", cu_k, {cu_q.size(0)});
    dtype("cu_seqlens_q", cu_q, {ScalarType::Int, ScalarType::Long}, "int32 or int64");
    dtype("cu_seqlens_k", cu_k, {ScalarType::Int, ScalarType::Long}, "int32 or int64");
    device("cu_seqlens_q", cu_q, q);
    device("cu_seqlens_k", cu_k, q);
    that(max_q >= 0 && max_q <= INT32_MAX, "max_seqlen_q", "at least 0 and below 2^31");
    that(max_k >= 0 && max_k <= INT32_MAX, "max_seqlen_k", "at least 0 and below 2^31");
    this->bias(bias, q, {cu_q.size(0) - 1, q.size(1), max_q, max_k});
  }
  // The arguments that a backward takes before the forward's own.
  void results(const Tensor& grad_out, const Maybe& grad_lse, const Tensor& out, const Tensor& lse, bool bias_grad,
               const Tensor& q, const Tensor& v, const Maybe& bias, bool packed) const {
    for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("grad_out", grad_out), {"out", out}}) {
      if (packed)
        shape(name, t, {q.size(0), q.size(1), v.size(2)});
      else
        shape(name, t, {q.size(0), q.size(1), q.size(2), v.size(3)});
      as(name, t, q);
    }
    for (const auto& [name, t] :
         {std::pair<const char*, const Tensor*>("lse", &lse), {"grad_lse", grad_lse ? &*grad_lse : nullptr}}) {
      if (!t) continue;
      if (packed)
        numbers(name, *t, q, {q.size(1), q.size(0)});
      else
        numbers(name, *t, q, {q.size(0), q.size(1), q.size(2)});
    }
    that(!bias_grad || (bias && bias->scalar_type() != ScalarType::Bool), "bias_grad", "false without a float bias");
  }

  void window(const Tensor& qkv, const Ints& window, const Ints& shift, int64_t heads, const Maybe& table,
              const Maybe& logit_scale, const Maybe& pad) const {
    constexpr int64_t LARGEST = 1 << 15;  // an area's square fits in 64 bits
    shape("qkv", qkv, {ANY, ANY, ANY, ANY});
    floating("qkv", qkv);
    that(qkv.size(1) > 0 && qkv.size(2) > 0, "qkv", "a map of at least one token");
    const auto within = [](const Ints& pair, const Ints& most) {
      return pair.size() == 2 && pair[0] >= 0 && pair[1] >= 0 && pair[0] <= most[0] && pair[1] <= most[1];
    };
    that(within(window, {LARGEST, LARGEST}) && window[0] > 0 && window[1] > 0, "window_size",
         "two positive ints of at most 2^15");
    that(within(shift, {window[0] - 1, window[1] - 1}), "shift_size", "two ints from 0 to below window_size");
    const int64_t channels = qkv.size(3);
    that(heads > 0 && channels > 0 && channels % 3 == 0 && channels / 3 % heads == 0, "num_heads",
         "a divisor of a third of qkv's channels");
    parameter("bias_table", table, qkv, {(2 * window[0] - 1) * (2 * window[1] - 1), heads});
    parameter("logit_scale", logit_scale, qkv, {heads});
    parameter("pad_qkv", pad, qkv, {channels});
  }
  void window_results(const Tensor& grad_out, const Tensor& out, const Tensor& lse, const Tensor& qkv,
                      const Ints& window, int64_t heads) const {
    const int64_t b = qkv.size(0), h = qkv.size(1), w = qkv.size(2);
    shape("grad_out", grad_out, {b, h, w, qkv.size(3) / 3});
    shape("out", out, {b, h, w, qkv.size(3) / 3});
    as("grad_out", grad_out, qkv);
    as("out", out, qkv);
    numbers("lse", lse, qkv, {b, window_count(qkv, window), heads, window[0] * window[1]});
  }

  // Returns the number of tokens per image.
  int64_t patches(const Tensor& images, const Tensor& weight, const Maybe& bias, const Ints& stride, const Maybe& pos,
                  const Maybe& prefix, const Maybe& keep, const Maybe& mean, const Maybe& std) const {
    shape("images", images, {ANY, ANY, ANY, ANY});
    shape("weight", weight, {ANY, images.size(1), ANY, ANY});
    floating("weight", weight);
    dtype("images", images, {ScalarType::Byte, weight.scalar_type()}, "uint8 or of the dtype of weight");
    device("images", images, weight);
    that(weight.numel() > 0, "weight", "of at least one element");
    that(stride.size() == 2 && stride[0] > 0 && stride[1] > 0 && stride[0] <= weight.size(2) &&
             stride[1] <= weight.size(3),
         "stride", "two positive ints of at most the patch");
    int64_t all = 1;
    for (int i = 0; i < 2; i++) {
      const int64_t n = images.size(i + 2), p = weight.size(i + 2);
      that(n >= p && (stride[i] != p || n % p == 0), "images",
           "at least as large as a patch, and without overlap a multiple of it");
      all *= (n - p) / stride[i] + 1;
    }
    const int64_t d = weight.size(0);
    parameter("bias", bias, weight, {d});
    parameter("pos_embed", pos, weight, {all, d});
    parameter("prefix", prefix, weight, {ANY, d});
    if (keep) {
      shape("keep", *keep, {images.size(0), ANY});
      dtype("keep", *keep, {ScalarType::Long}, "int64");
      device("keep", *keep, weight);
    }
    that(mean.has_value() == std.has_value(), "mean and std", "given together");
    if (mean) numbers("mean", *mean, weight, {images.size(1)});
    if (std) numbers("std", *std, weight, {images.size(1)});
    return (prefix ? prefix->size(0) : 0) + (keep ? keep->size(1) : all);
  }
  // With the backward's own arguments.
  void patch_results(const Tensor& grad_out, bool images_grad, const Tensor& images, const Tensor& weight,
                     const Maybe& bias, const Ints& stride, const Maybe& pos, const Maybe& prefix, const Maybe& keep,
                     const Maybe& mean, const Maybe& std) const {
    const int64_t tokens = patches(images, weight, bias, stride, pos, prefix, keep, mean, std);
    shape("grad_out", grad_out, {images.size(0), tokens, weight.size(0)});
    as("grad_out", grad_out, weight);
    that(!images_grad || images.scalar_type() != ScalarType::Byte, "images_grad", "false for uint8 images");
  }

 private:
  const char* op_;
};

}  // namespace pyvit
