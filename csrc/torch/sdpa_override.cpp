// pyvit.activate_sdpa() on CPUs: this library's kernels for the two operators that F.scaled_dot_product_attention calls
// for CPU tensors. A call that they do not serve goes to PyTorch's kernel, through its C interface, so that no call
// passes through Python.
#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <tuple>

#include "attention_tensors.h"

namespace pyvit {
namespace {

// PyTorch's kernels below its dispatcher; looked up by name, so that the library also loads where they are missing.
void* of_torch(const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(GetModuleHandleA("torch_cpu.dll"), name));
#else
  return dlsym(RTLD_DEFAULT, name);
#endif
}
#define PYVIT_OF_TORCH(name) reinterpret_cast<decltype(&name)>(of_torch(#name))
const auto torch_forward = PYVIT_OF_TORCH(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu);
const auto torch_backward = PYVIT_OF_TORCH(aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward);
#undef PYVIT_OF_TORCH

std::atomic<bool> served_dtypes[3];  // by Dtype
std::atomic<int64_t> served{0}, left{0};

bool is_served(ScalarType dtype) {
  return (dtype == ScalarType::Float && served_dtypes[int(Dtype::f32)]) ||
         (dtype == ScalarType::BFloat16 && served_dtypes[int(Dtype::bf16)]) ||
         (dtype == ScalarType::Half && served_dtypes[int(Dtype::f16)]);
}

bool heads_of_rows(const Tensor& t) { return t.dim() == 4 && t.numel() && (t.stride(3) == 1 || t.size(3) == 1); }

// A mask is (Nq, Nk) or (B, H, Nq, Nk), with sizes of 1 where it is broadcast.
bool mask_fits(const Tensor& mask, const Tensor& q, const Tensor& k) {
  if (mask.dim() != 2 && mask.dim() != 4) return false;
  const ScalarType dtype = mask.scalar_type();
  if (dtype != ScalarType::Float && dtype != q.scalar_type()) return false;
  const int64_t scores[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  for (int64_t i = 0, first = 4 - mask.dim(); i < mask.dim(); i++)
    if (mask.size(i) != 1 && mask.size(i) != scores[first + i]) return false;
  return true;
}

// Autograd saves a mask that is not there as an undefined tensor.
Maybe defined(const Maybe& mask) { return mask && mask->defined() ? mask : Maybe(); }

// The calls that pyvit's kernels serve as PyTorch's do.
bool serves(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p, const Maybe& mask) {
  const ScalarType dtype = q.scalar_type();
  if (!is_served(dtype) || k.scalar_type() != dtype || v.scalar_type() != dtype || dropout_p != 0) return false;
  if (!heads_of_rows(q) || !heads_of_rows(k) || !heads_of_rows(v)) return false;
  const int64_t b = q.size(0), h = q.size(1), d = q.size(3), kv_heads = k.size(1);
  return d <= MAX_CHANNELS && k.size(3) == d && v.size(3) == d && k.size(0) == b && v.size(0) == b &&
         v.size(1) == kv_heads && h % kv_heads == 0 && k.size(2) == v.size(2) && (!mask || mask_fits(*mask, q, k));
}

double scale_of(const std::optional<double>& scale, const Tensor& q) {
  return scale ? *scale : 1 / std::sqrt(double(q.size(3)));
}

// lse (B, H, N) as PyTorch has it: with tokens before heads in memory, and 0 for rows that attend to nothing.
Tensor as_in_torch(const Tensor& lse) {
  const int64_t b = lse.size(0), h = lse.size(1), n = lse.size(2);
  const int64_t shape[] = {b, h, n}, strides[] = {h * n, 1, h};
  Tensor found = make_strided(lse, shape, strides, 3, ScalarType::Float);
  const float* from = data<float>(lse);
  float* to = data<float>(found);
  for (int64_t image = 0; image < b; image++, to += h * n)
    for (int64_t head = 0; head < h; head++)
      for (int64_t token = 0; token < n; token++, from++) to[token * h + head] = *from == -INFINITY ? 0.f : *from;
  return found;
}

// Optional arguments of the C interface.
struct Optionals {
  AtenTensorHandle mask;
  double scale;
  bool has_mask, has_scale;
  Optionals(const Maybe& mask_, const std::optional<double>& scale_)
      : mask(mask_ ? mask_->get() : nullptr), scale(scale_.value_or(0)), has_mask(mask_), has_scale(scale_) {}
  AtenTensorHandle* mask_pointer() { return has_mask ? &mask : nullptr; }
  double* scale_pointer() { return has_scale ? &scale : nullptr; }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, double dropout_p, bool is_causal, Maybe mask,
                                   std::optional<double> scale) {
  mask = defined(mask);
  if (!serves(q, k, v, dropout_p, mask)) {
    left.fetch_add(1, std::memory_order_relaxed);
    Optionals given(mask, scale);
    AtenTensorHandle out, lse;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_forward(q.get(), k.get(), v.get(), dropout_p, is_causal, given.mask_pointer(),
                                                given.scale_pointer(), &out, &lse));
    return {Tensor(out), Tensor(lse)};
  }
  served.fetch_add(1, std::memory_order_relaxed);
  Tensor out = torch::stable::empty_like(q);  // torch.compile relies on these strides
  Tensor lse = make(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  kernels().attention(attention_of(q, k, v, out, lse, mask, is_causal, scale_of(scale, q)));
  return {out, as_in_torch(lse)};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                            double dropout_p, bool is_causal, Maybe mask, std::optional<double> scale) {
  mask = defined(mask);
  if (!serves(q, k, v, dropout_p, mask)) {
    Optionals given(mask, scale);
    AtenTensorHandle dq, dk, dv;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_backward(grad_out.get(), q.get(), k.get(), v.get(), out.get(), lse.get(),
                                                 dropout_p, is_causal, given.mask_pointer(), given.scale_pointer(), &dq,
                                                 &dk, &dv));
    return {Tensor(dq), Tensor(dk), Tensor(dv)};
  }
  Checks("scaled_dot_product_attention's backward").results(grad_out, {}, out, lse, false, q, v, {}, false);
  out = rows(out);
  grad_out = rows(grad_out);
  lse = dense(lse);
  Tensor dq = heads_like(q), dk = heads_like(k), dv = heads_like(v);
  kernels().attention_backward(attention_of(q, k, v, out, lse, mask, is_causal, scale_of(scale, q)),
                               gradient_of(grad_out, {}, dq, dk, dv));
  return {dq, dk, dv};
}

std::mutex changing;
std::unique_ptr<torch::stable::detail::StableLibrary> override_;

// Serves calls of these dtypes from now on; without any, PyTorch's kernels are those of the operators again. Returns
// whether this PyTorch has what it takes.
bool override_sdpa(bool float32, bool bfloat16, bool float16) {
  if (!torch_forward || !torch_backward) return false;
  const std::lock_guard<std::mutex> lock(changing);
  served_dtypes[int(Dtype::f32)] = float32;
  served_dtypes[int(Dtype::bf16)] = bfloat16;
  served_dtypes[int(Dtype::f16)] = float16;
  if (!(float32 || bfloat16 || float16)) {
    override_.reset();
  } else if (!override_) {
    using torch::stable::detail::StableLibrary;
    override_ = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "aten", "CPU", __FILE__, __LINE__);
    override_->impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_BOX(&forward));
    override_->impl("_scaled_dot_product_flash_attention_for_cpu_backward", TORCH_BOX(&backward));
  }
  return true;
}

std::tuple<int64_t, int64_t> sdpa_calls() { return {served, left}; }

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_FRAGMENT(PYVIT_NAMESPACE, m) {
  // For pyvit/integrations/sdpa_override.py.
  m.def("override_sdpa(bool float32, bool bfloat16, bool float16) -> bool");
  m.def("sdpa_calls() -> (int served, int left)");
}

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("override_sdpa", TORCH_BOX(&pyvit::override_sdpa));
  m.impl("sdpa_calls", TORCH_BOX(&pyvit::sdpa_calls));
}
