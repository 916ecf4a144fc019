// Gradients of patch embedding: weight (token chunks, summed in order), images (one owner per pixel), bias, positions
// and prefix.
#include "patch_embed.cuh"

namespace pyvit::cuda {

// A contiguous float32 matrix to store into.
struct Sums {
  float* data;
  int64_t rows, columns;

  PYVIT_DEVICE float* row(int64_t m) const { return m < rows ? data + m * columns : nullptr; }
  PYVIT_DEVICE int64_t column(int64_t n) const { return n; }
  PYVIT_DEVICE void put(float* row, int64_t n, float value) const {
    if (row && n < columns) row[n] = value;
  }
};

template <class T>
__global__ void __launch_bounds__(kGemmThreads) patch_embed_weight(const __grid_constant__ PatchEmbedGradient g) {
  const PatchEmbed& p = g.forward;
  const Pixels<T> pixels(p);
  const TokenGradients<T> gradients{p, static_cast<const T*>(g.grad_out)};
  const int down = (p.dim + kGemmTile - 1) / kGemmTile, across = (pixels.grid.pixels + kGemmTile - 1) / kGemmTile;
  const int chunk = blockIdx.x / (down * across), tile = blockIdx.x % (down * across);
  const int64_t tokens = int64_t(p.batch) * p.kept, pixels_per_patch = pixels.grid.pixels;
  multiply_tile<T, true, true>(gradients, pixels, int64_t(tile / across) * kGemmTile,
                               int64_t(tile % across) * kGemmTile, tokens * chunk / g.weight_chunks,
                               tokens * (chunk + 1) / g.weight_chunks,
                               Sums{g.weight_partials + chunk * p.dim * pixels_per_patch, p.dim, pixels_per_patch});
}

// The gradient of the images: row m is a cell, column n a (channel, row, column) of its pixels.
template <class T>
struct CellPixels {
  Cells cells;
  T* images;
  struct Row {
    T* image;  // null past the last cell
    int y, x;
  };
  struct Column {
    int channel, y, x;
  };

  PYVIT_DEVICE Row row(int64_t m) const {
    const PatchEmbed& p = cells.p;
    if (m >= cells.rows()) return {nullptr, 0, 0};
    const int64_t line = m / cells.across, image = line / cells.down;
    return {images + image * p.channels * p.height * p.width, int(line % cells.down) * p.stride_h,
            int(m % cells.across) * p.stride_w};
  }
  PYVIT_DEVICE Column column(int64_t at) const {
    const int n = int(at), area = cells.p.stride_h * cells.p.stride_w;
    return {n / area, n % area / cells.p.stride_w, n % cells.p.stride_w};
  }
  PYVIT_DEVICE void put(const Row& row, const Column& column, float value) const {
    const PatchEmbed& p = cells.p;
    const int y = row.y + column.y, x = row.x + column.x;
    if (row.image == nullptr || column.channel >= p.channels || y >= p.height || x >= p.width) return;
    if (p.std) value /= p.std[column.channel];
    row.image[(int64_t(column.channel) * p.height + y) * p.width + x] = narrow<T>(value);
  }
};

template <class T>
__global__ void __launch_bounds__(kGemmThreads) patch_embed_images(const __grid_constant__ PatchEmbedGradient g) {
  const PatchEmbed& p = g.forward;
  const Cells cells(p);
  const bool gathered = g.grad_tokens != nullptr;
  const CellGradients<T> gradients{cells, static_cast<const T*>(gathered ? g.grad_tokens : g.grad_out),
                                   gathered ? 0 : p.prefix_rows};
  const CellWeights<T> weights{cells, static_cast<const T*>(p.weight)};
  const int tiles = int((cells.columns() + kGemmTile - 1) / kGemmTile);
  multiply_tile<T, false, true>(gradients, weights, int64_t(blockIdx.x / tiles) * kGemmTile,
                                int64_t(blockIdx.x % tiles) * kGemmTile, 0, cells.depth(),
                                CellPixels<T>{cells, static_cast<T*>(g.grad_images)});
}

// With keep: gradients by patch, the sum of the tokens that name it (zero where none does). A thread per (image, patch,
// channel).
template <class T>
__global__ void __launch_bounds__(256) gather_tokens(const __grid_constant__ PatchEmbedGradient g) {
  const PatchEmbed& p = g.forward;
  const PatchGrid grid(p);
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, patches = int64_t(grid.down) * grid.across;
  if (at >= p.batch * patches * p.dim) return;
  const int64_t image = at / p.dim / patches, patch = at / p.dim % patches, column = at % p.dim;
  const TokenGradients<T> gradients{p, static_cast<const T*>(g.grad_out)};
  float sum = 0.0f;
  for (int i = 0; i < p.kept; ++i)
    if (p.keep[image * p.kept + i] == patch) sum += widen(gradients.row(image * p.kept + i)[column]);
  static_cast<T*>(g.grad_tokens)[at] = narrow<T>(sum);
}

// A thread per (patch, channel): sums over the batch, in order.
template <class T>
__global__ void __launch_bounds__(256) position_gradient(const __grid_constant__ PatchEmbedGradient g) {
  const PatchEmbed& p = g.forward;
  const PatchGrid grid(p);
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, patches = int64_t(grid.down) * grid.across;
  if (at >= patches * p.dim) return;
  const int64_t patch = at / p.dim, column = at % p.dim;
  const TokenGradients<T> gradients{p, static_cast<const T*>(g.grad_out)};
  float sum = 0.0f;
  if (p.keep == nullptr) {
    for (int64_t image = 0; image < p.batch; ++image) sum += widen(gradients.row(image * p.kept + patch)[column]);
  } else {
    for (int64_t token = 0; token < int64_t(p.batch) * p.kept; ++token)
      if (p.keep[token] == patch) sum += widen(gradients.row(token)[column]);
  }
  write_as(p.pos_type, g.grad_pos_embed, at, sum);
}

template <class T>
__global__ void __launch_bounds__(256) prefix_gradient(const __grid_constant__ PatchEmbedGradient g) {
  const PatchEmbed& p = g.forward;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, rows = p.prefix_rows + p.kept;
  if (at >= int64_t(p.prefix_rows) * p.dim) return;
  float sum = 0.0f;
  for (int64_t image = 0; image < p.batch; ++image)
    sum += widen(static_cast<const T*>(g.grad_out)[image * rows * p.dim + at]);
  write_as(p.prefix_type, g.grad_prefix, at, sum);
}

// A thread per channel and a row of blocks per chunk of tokens.
template <class T>
__global__ void __launch_bounds__(256) bias_gradient(const __grid_constant__ PatchEmbedGradient g) {
  const PatchEmbed& p = g.forward;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= p.dim) return;
  const TokenGradients<T> gradients{p, static_cast<const T*>(g.grad_out)};
  const int64_t tokens = int64_t(p.batch) * p.kept;
  float sum = 0.0f;
  for (int64_t token = tokens * blockIdx.y / gridDim.y; token < tokens * (blockIdx.y + 1) / gridDim.y; ++token)
    sum += widen(gradients.row(token)[column]);
  g.bias_partials[int64_t(blockIdx.y) * p.dim + column] = sum;
}

const char* patch_embed_backward(const PatchEmbedGradient& g, Stream stream) {
  const PatchEmbed& p = g.forward;
  return with_type(p.type, [&](auto element) -> const char* {
    using T = decltype(element);
    const PatchGrid grid(p);
    const int64_t patches = int64_t(grid.down) * grid.across;
    if (g.grad_weight) {
      const int blocks = ceil_div(p.dim, kGemmTile) * ceil_div(grid.pixels, kGemmTile) * g.weight_chunks;
      if (const char* error = launch("patch_embed_backward (weight)", patch_embed_weight<T>, blocks, kGemmThreads,
                                     kGemmBytes, g, stream))
        return error;
      if (const char* error = reduce_partials(g.weight_partials, g.weight_chunks, int64_t(p.dim) * grid.pixels, p.type,
                                              g.grad_weight, stream))
        return error;
    }
    if (g.grad_images) {
      const Cells cells(p);
      if (g.grad_tokens)
        if (const char* error =
                launch("gather_tokens", gather_tokens<T>, ceil_div(p.batch * patches * p.dim, 256), 256, 0, g, stream))
          return error;
      const int blocks = ceil_div(cells.rows(), kGemmTile) * ceil_div(cells.columns(), kGemmTile);
      if (const char* error = launch("patch_embed_backward (images)", patch_embed_images<T>, blocks, kGemmThreads,
                                     kGemmBytes, g, stream))
        return error;
    }
    if (g.grad_pos_embed)
      if (const char* error =
              launch("position_gradient", position_gradient<T>, ceil_div(patches * p.dim, 256), 256, 0, g, stream))
        return error;
    if (g.grad_prefix)
      if (const char* error = launch("prefix_gradient", prefix_gradient<T>,
                                     ceil_div(int64_t(p.prefix_rows) * p.dim, 256), 256, 0, g, stream))
        return error;
    if (g.grad_bias == nullptr) return nullptr;
    if (const char* error =
            launch("bias_gradient", bias_gradient<T>, dim3(ceil_div(p.dim, 256), g.bias_chunks), 256, 0, g, stream))
      return error;
    return reduce_partials(g.bias_partials, g.bias_chunks, p.dim, p.bias_type, g.grad_bias, stream);
  });
}

}  // namespace pyvit::cuda
