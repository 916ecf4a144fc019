// The kernels of one instruction set.
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
void gate(const Gate&);
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
double fma_peak(Dtype dtype, double seconds);

const Kernels& table() {
  static const Kernels kernels{attention,
                               attention_backward,
                               attention_map,
                               window,
                               window_backward,
                               patch,
                               patch_backward,
                               activation,
                               gate,
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
