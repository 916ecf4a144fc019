// What the host calls: launchers that take raw pointers, sizes, strides (in elements) and a stream. They allocate
// nothing, so they can be captured into a CUDA graph. Each returns nullptr, or what failed (valid until the thread's
// next call).
#pragma once

#include <cstdint>

namespace pyvit::cuda {

// Work is cut into about so many blocks where it could be cut finer, and sums of fewer terms are not cut: a few waves
// of the largest GPU. The emulation takes other values, so that small problems go the ways of large ones.
#ifndef PYVIT_TARGET_BLOCKS
#define PYVIT_TARGET_BLOCKS 1024
#define PYVIT_LEAST_SUM 512
#endif
constexpr int64_t kTargetBlocks = PYVIT_TARGET_BLOCKS, kLeastSum = PYVIT_LEAST_SUM;

enum class Type : int { f32, f16, bf16, boolean };

struct Stream {
  void* handle;
  int device;
  int shared_limit;  // bytes of shared memory that a block may have: find_shared_limit
};

// Attention over a dense batch, or over packed sequences when cu_seqlens are given (then batch counts sequences, the
// batch strides of the packed tensors are 0, and nq and nk are the longest lengths). Strides are (batch, head, row);
// rows of channels are contiguous, and rows of q, k, v, grad_out and of every result begin on 16 bytes. Strides of rows
// (of windows' maps: of rows and columns) are below 2^31, and so is height x width.
struct Attention {
  Type type;
  int batch, heads, kv_heads, nq, nk, d, dv;
  bool causal;
  float scale;
  float natural, unit;  // set by the launcher: what scores are multiplied by to be natural, and to be powers of two
  const void *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const void *cu_seqlens_q, *cu_seqlens_k;  // (batch + 1)
  bool cu_int64;
  const void* bias;
  Type bias_type;
  int64_t bias_stride[4];  // (batch, head, query, key), 0 where it broadcasts
  void* out;
  int64_t out_stride[3];
  float* lse;  // (batch, head) strides, rows contiguous
  int64_t lse_stride[2];
};

struct AttentionGradient {
  Attention forward;
  const void* grad_out;
  int64_t grad_out_stride[3];
  const float* grad_lse;        // laid out as lse, or null
  float *delta, *shift, *rest;  // laid out as lse: scratch
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_q_stride[3], grad_k_stride[3], grad_v_stride[3];
  void* grad_bias;         // contiguous, or null
  bool bias_broadcast[4];  // which of (batch, head, query, key) the bias lacks
  int chunks;              // bias gradient: partial sums per element
  float* partials;         // (chunks, elements of bias) scratch
};

// Windows of a (batch, height, width, 3 heads d) map; out and grad_out (batch, height, width, heads d).
struct Window {
  Type type;
  int batch, height, width, heads, d, window_h, window_w, shift_h, shift_w;
  float scale;
  const void* qkv;
  int64_t qkv_stride[3];  // (batch, row, column)
  const float *bias_table, *logit_scale;
  const void* pad;  // (3 heads d) of `type`: what padding tokens hold; null masks them out
  void* out;        // contiguous
  float* lse;       // (batch, windows, heads, window area)
};

struct WindowGradient {
  Window forward;
  const void* grad_out;
  int64_t grad_out_stride[3];
  float* delta;                                          // (batch, height, width, heads) scratch
  float *shift, *rest;                                   // laid out as lse: scratch
  void* grad_qkv;                                        // contiguous
  float *grad_bias_table, *grad_logit_scale, *grad_pad;  // or null
  int chunks;                                            // groups of windows: each sums its windows in order
  int query_tiles;                                       // set by the launcher
  float* partials;                                       // (chunks, heads, area, area) scratch for the table
  float* logit_partials;                                 // (heads, chunks x query tiles) scratch
  float* pad_rows;                                       // (batch, padding tokens per image, 2 heads d) scratch
  float* pad_partials;                                   // (kPadChunks, 2 heads d) scratch
};
constexpr int kPadChunks = 64;
int window_query_tiles(const Window&, Stream);

// out (batch, prefix_rows + patches, width): prefix tokens, then patches.
struct PatchEmbed {
  Type type;
  int batch, channels, height, width, patch_h, patch_w, stride_h, stride_w, dim;
  const void* images;
  bool bytes;  // uint8 images
  int64_t image_stride[4];
  const void* weight;  // (dim, channels, patch_h, patch_w) contiguous
  const void *bias, *pos_embed, *prefix;
  Type bias_type, pos_type, prefix_type;
  const int64_t* keep;  // (batch, kept) contiguous or null
  int kept, prefix_rows;
  const float *mean, *std;
  void* out;
};

struct PatchEmbedGradient {
  PatchEmbed forward;
  const void* grad_out;                                                        // contiguous
  void *grad_images, *grad_weight, *grad_bias, *grad_pos_embed, *grad_prefix;  // or null, contiguous
  void* grad_tokens;  // (batch, grid, dim) scratch of `type`, when grad_images and keep
  int weight_chunks;
  float* weight_partials;  // (weight_chunks, dim, channels patch_h patch_w) scratch
  int bias_chunks;
  float* bias_partials;  // (bias_chunks, dim) scratch
};

const char* find_shared_limit(Stream&);  // of its device
const char* flash_attention(const Attention&, Stream);
const char* flash_attention_backward(const AttentionGradient&, Stream);
const char* window_attention(const Window&, Stream);
const char* window_attention_backward(const WindowGradient&, Stream);
const char* patch_embed(const PatchEmbed&, Stream);
const char* patch_embed_backward(const PatchEmbedGradient&, Stream);

}  // namespace pyvit::cuda
