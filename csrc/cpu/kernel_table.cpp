// The kernels of one instruction set, and its peak rate.
#include <chrono>

#include "gemm_tile.h"
#include "kernel_args.h"

namespace pyvit::PYVIT_ISA {

void attention(const Attention&);
void attention_backward(const Attention&, const AttentionGrad&);
void attention_map(const AttentionMap&);
void window(const Window&);
void window_backward(const Window&, const WindowGrad&);
void patch(const Patch&);
void patch_backward(const Patch&, const PatchGrad&);
void activation(const Activation&);
void row_norm(const RowNorm&);
void row_norm_backward(const RowNorm&, const RowNormGrad&);
int64_t packed_layer_size(int64_t in, int64_t out, Dtype dtype);
void pack_layer(const void* weight, int64_t in, int64_t out, Dtype dtype, uint32_t* packed);
void fused_linear(const FusedLinear&);
void transpose(const Transposition&);
void log_sum_exp(const TileScores&);
void pairs(const Pairs&);
void pairs_backward(const Pairs&, const PairsGrad&);
void distillation(const Distillation&);
void distillation_backward(const Distillation&, const DistillationGrad&);
void product(const Product&);

namespace {

// Multiply-adds per second of the register tile alone: operands in registers, nothing loaded.
template <class D>
double peak(double seconds) {
  vf acc[MR * NV];
  for (auto& x : acc) x = vf{};
  vu b{};
  uint32_t a = 0;
  asm volatile("" : "+m"(a), "+m"(b));
  const auto start = std::chrono::steady_clock::now();
  double elapsed = 0;
  int64_t rounds = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 10000; i++) {
#pragma GCC unroll 32
      for (int t = 0; t < MR * NV; t++) D::fma(acc[t], a, b);
    }
    rounds += 10000;
    elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  vf sum{};
  for (auto& x : acc) sum += x;
  asm volatile("" ::"m"(sum));
  return 2.0 * double(rounds) * MR * NV * W * D::K / elapsed * 1e-9;
}

double fma_peak(Dtype dtype, double seconds) {
  return dtype == Dtype::bf16 ? peak<Compute<bf16>>(seconds) : peak<F32>(seconds);
}

}  // namespace

const Kernels& table() {
  static const Kernels kernels{attention,
                               attention_backward,
                               attention_map,
                               window,
                               window_backward,
                               patch,
                               patch_backward,
                               activation,
                               row_norm,
                               row_norm_backward,
                               packed_layer_size,
                               pack_layer,
                               fused_linear,
                               transpose,
                               log_sum_exp,
                               pairs,
                               pairs_backward,
                               distillation,
                               distillation_backward,
                               product,
                               fma_peak};
  return kernels;
}

}  // namespace pyvit::PYVIT_ISA
